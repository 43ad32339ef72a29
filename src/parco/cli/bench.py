"""`parco bench`: every storage on a model's shapes beside PyTorch's own products."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parco.cli import terminal

if TYPE_CHECKING:
    from parco.bench import Shape

SHAPE = re.compile(r"(\d+)x(\d+)")


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", show_default=False, help="A folder or hub name; the embedded model without."),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", metavar="NxK,...", show_default=False, help="Outputs x inputs, instead of a MODEL's."),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(metavar="NAMES", show_default=False, help="Formats such as int4:32,mxfp4,fp8_e4m3:row."),
    ] = None,
    rows: Annotated[str, typer.Option(metavar="NUMBERS", help="Rows of x: 1 is a decode, 512 a prefill.")] = (
        "1,8,64,512"
    ),
    rounds: Annotated[int, typer.Option(metavar="N", help="Times that every contender is timed.")] = 7,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where bench.json and the plot, bench.html, go.")] = Path(
        "parco-bench"
    ),
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Time every storage on the shapes of a model, for decode and prefill, beside PyTorch's own products.

    All contenders run in turn in one process; before each, as many bytes as the model has pass through the caches.
    Medians, ratios to PyTorch's bf16, and shares of what this machine was measured to reach in the same run.
    """
    terminal.quiet_libraries()
    from parco import bench
    from parco.report import throughput

    heights = [_whole(text, "--rows") for text in rows.split(",")]
    if shapes is not None and model is not None:
        raise ValueError(f"--shapes {shapes} and the model {model!r} are two answers to one question: give one of them")
    chosen = _shapes(shapes) if shapes is not None else _model_shapes(model)
    model_bytes = sum(2 * shape[0] * shape[1] * layers for shape, layers in chosen.items())
    with terminal.progress() as bar:
        bar.stage("measure", len(chosen) * len(heights))
        report = bench.run(
            chosen,
            formats=bench.FORMATS if formats is None else formats.split(","),
            rows=heights,
            rounds=rounds,
            between=None if shapes is not None else model_bytes,
            advance=bar.advance,
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    throughput.write(report, out / "bench.html")
    if as_json:
        terminal.print_json(report)
        return
    console = terminal.console()
    for table in throughput.tables(report):
        console.print(table)
        console.print()
    for one in report["missing"]:
        console.print(f"{one['contender']} did not run on {one['shape'][0]}x{one['shape'][1]}: {one['reason']}")
    console.print(f"{out / 'bench.html'} shows the same, {out / 'bench.json'} holds it.")


def _shapes(text: str) -> dict[Shape, int]:
    found: dict[Shape, int] = {}
    for part in text.split(","):
        match = SHAPE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"--shapes: {part!r} is no shape such as 4096x11008 (outputs x inputs)")
        shape = (int(match[1]), int(match[2]))
        found[shape] = found.get(shape, 0) + 1
    return found


def _whole(text: str, option: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{option}: {text!r} is no whole number above 0")
    return int(text)


def _model_shapes(model: str | None) -> dict[Shape, int]:
    """How many layers of the model have each shape, the most bytes first."""
    from parco import hub
    from parco.nn.blocks import linears

    found: dict[Shape, int] = {}
    for site in linears(hub.load(hub.embedded_path() if model is None else model).model).values():
        found[site.shape] = found.get(site.shape, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[0][0] * item[0][1] * item[1]))
