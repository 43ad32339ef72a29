"""The page in headless Chromium: it is drawn without an error and without a request, wide and narrow, light and dark.

Chromium is Debian's package `chromium`; where it is absent these tests are skipped and say so.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from tests.report import example

from parco import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

PROBE = """
<pre id="probe"></pre>
<script>
const problems = [];
addEventListener("error", event => problems.push(event.message || String(event.target.src || event.target.href)), true);
addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective + " " + event.blockedURI));
const error = console.error; console.error = (...words) => { problems.push(words.join(" ")); error(...words); };
async function look() {
  const chart = document.getElementById("frontier");
  for (let wait = 0; chart && chart.dataset.drawn !== "yes" && wait < 200; wait++) {
    await new Promise(done => setTimeout(done, 50));
  }
  const seen = { problems };
  if (chart) {
    seen.marks = chart.querySelectorAll(".points path.point").length;
    Plotly.Fx.hover(chart, [{ curveNumber: 0, pointNumber: 2 }]);
    await new Promise(done => setTimeout(done, 400));
    seen.hover = [...chart.querySelectorAll(".hoverlayer .hovertext")].map(label => label.textContent).join(" ");
  }
  const button = document.getElementById("open-all");
  seen.closed = document.querySelectorAll(".layers details[open]").length;
  button.click();
  seen.opened = document.querySelectorAll(".layers details[open]").length;
  seen.label = button.textContent;
  const details = document.querySelector(".layers details");
  details.querySelector("summary").click();
  seen.first_open = details.open;
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.width = document.documentElement.clientWidth;
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.requests = fetched.filter(name => !name.startsWith("data:"));
  const paper = getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number);
  seen.dark = paper[0] < 128;
  document.getElementById("probe").textContent = JSON.stringify(seen);
}
addEventListener("load", look);
</script>
"""


def chromium(page: Path, *options: str) -> str:
    """The document as Chromium leaves it after its scripts have run; an offline proxy makes any request fail."""
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--proxy-server=127.0.0.1:9",
        f"--user-data-dir={page.parent / 'profile'}",
        "--virtual-time-budget=30000",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def look(folder: Path, *options: str, frame: int | None = None) -> dict[str, object]:
    """What a probe inside the page finds. `frame`: show it so many pixels wide (a window has a least width)."""
    page = report.write(example.result(), folder / "report.html")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<body>", f"<body>{PROBE}", 1), encoding="utf-8")
    if frame is None:
        shown = chromium(page, *options)
    else:
        page = _framed(page, frame)
        shown = chromium(page, "--allow-file-access-from-files", *options)
    found = re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)
    assert found is not None, shown[-2000:]
    return json.loads(unescape(found[1]))


def _framed(page: Path, width: int) -> Path:
    outer = page.with_name("frame.html")
    outer.write_text(
        f'<iframe id="inner" src="{page.name}" width="{width}" height="800"></iframe><pre id="probe"></pre><script>'
        "setInterval(() => { const inner = document.getElementById('inner').contentDocument?.getElementById('probe');"
        " if (inner) document.getElementById('probe').textContent = inner.textContent; }, 100)</script>",
        encoding="utf-8",
    )
    return outer


def test_the_page_works_offline(tmp_path: Path):
    seen = look(tmp_path, "--window-size=1200,900")
    result = example.result()
    assert seen["problems"] == []
    assert seen["requests"] == []
    plans = len(result["frontier"])
    measured = sum(point["measured_loss"] is not None for point in result["frontier"])
    healed = sum(point["healed_loss"] is not None for point in result["frontier"])
    uniform = sum(not row["chosen"] for row in result["alternatives"])
    assert seen["marks"] == plans + measured + healed + uniform + 2
    assert "size 0.3" in str(seen["hover"])
    assert "int5:64 x 6" in str(seen["hover"])
    assert (seen["closed"], seen["opened"]) == (0, len(result["groups"]))
    assert seen["label"] == "Hide what was passed over"
    assert seen["first_open"] is False
    assert seen["overflow"] == 0
    assert seen["dark"] is False


def test_on_a_phone_nothing_is_wider_than_the_screen(tmp_path: Path):
    seen = look(tmp_path, "--window-size=900,900", frame=360)
    assert seen["problems"] == []
    assert int(str(seen["width"])) <= 360
    assert seen["overflow"] == 0


def test_a_dark_screen_gets_a_dark_page(tmp_path: Path):
    seen = look(tmp_path, "--blink-settings=preferredColorScheme=0")
    assert seen["problems"] == []
    assert seen["dark"] is True
