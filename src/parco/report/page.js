"use strict";
// The chart library travels gzipped in the page (a third of its size); the browser unpacks it. Nothing is fetched.
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const chart = document.getElementById("frontier");
const data = JSON.parse(document.getElementById("chart-data").textContent);

async function unpackPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly-gzip").textContent.trim()), c => c.charCodeAt(0));
  const source = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = source;
  document.head.append(script);
}

function layout() {
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--soft"), automargin: true };
  return {
    margin: { l: 60, r: 10, t: 10, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: color("--ink"), size: 13 },
    xaxis: { ...axis, title: { text: data.x_title }, tickformat: ".0%" },
    yaxis: { ...axis, title: { text: data.y_title }, ...data.y_axis },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, hovermode: "closest",
    hoverlabel: { bgcolor: color("--wash"), bordercolor: color("--soft"), font: { color: color("--ink") }, align: "left" },
    shapes: data.shapes.map(s => ({ ...s, line: { color: color("--soft"), dash: "dot", width: 1 } })),
    annotations: data.annotations.map(a => ({ ...a, font: { color: color("--soft"), size: 12 } })),
  };
}

function traces() {
  const narrow = chart.clientWidth < 560;
  return data.traces.map(t => ({
    type: "scatter", mode: "markers", name: t.name, x: t.x, y: t.y, text: t.text, hovertemplate: "%{text}<extra></extra>",
    marker: t.plain ? { size: t.size, symbol: t.symbol, color: color("--soft"), line: { width: 2 } } : {
      size: t.size, symbol: t.symbol, color: t.seconds, cmin: data.seconds[0], cmax: data.seconds[1],
      colorscale: [[0, color("--fast")], [.5, color("--middling")], [1, color("--slow")]],
      line: { width: 1.5 }, showscale: !narrow && t === data.traces[0],
      colorbar: { title: { text: data.color_title, side: "right" }, thickness: 12, outlinewidth: 0 },
    },
  }));
}

const draw = () => Plotly.react(chart, traces(), layout(), { displayModeBar: false, responsive: true });

if (data.traces.length) {
  unpackPlotly().then(() => {
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    chart.dataset.drawn = "yes";
  });
} else {
  chart.remove();
}

const openAll = document.getElementById("open-all");
const details = [...document.querySelectorAll(".layers details")];
if (!details.length) openAll.remove();
openAll.addEventListener("click", () => {
  const open = !details.every(d => d.open);
  details.forEach(d => { d.open = open; });
  openAll.textContent = open ? "Hide what was passed over" : "Show all that was passed over";
  openAll.setAttribute("aria-expanded", String(open));
});

const copy = document.getElementById("copy");
copy.addEventListener("click", async () => {
  await navigator.clipboard.writeText(document.getElementById("command").textContent);
  copy.textContent = "Copied";
});
