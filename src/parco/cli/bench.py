"""`parco bench`: every storage on a model's shapes, or whole models, beside other libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parco.cli import terminal

if TYPE_CHECKING:
    from rich.table import Table

    from parco.bench import Shape

ROUNDS_WHOLE = 3
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
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS", show_default=False, help="Rows of x: 1 is a decode, 512 a prefill. [default: 1,8,64,512]"
        ),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Time whole models, also in llama.cpp where that is installed.")
    ] = False,
    peers: Annotated[
        str | None,
        typer.Option(metavar="NAMES", show_default=False, help="Libraries to compare with; those installed without."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(metavar="N", show_default=False, help="Turns of every contender. [default: 7, or 3 with --whole]"),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where bench.json and the plot, bench.html, go.")] = Path(
        "parco-bench"
    ),
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Time every storage on the shapes of a model, or with --whole the model itself, beside other libraries.

    All contenders run in turn in one process; before each product, as many bytes as the model has pass through the
    caches. Medians, ratios to PyTorch's bf16, and shares of what this machine was measured to reach in the same run.
    Peers are torch, torchao, bitsandbytes, and of whole models llama_cpp.
    """
    terminal.quiet_libraries()
    asked = None if peers is None else peers.split(",")
    chosen = None if formats is None else _formats(formats)
    if whole:
        if shapes is not None or rows is not None:
            raise ValueError("--whole times a model as it is used: leave out --shapes and --rows")
        _whole_models(model, chosen, asked, rounds, out, as_json)
    else:
        _products(model, shapes, rows, chosen, asked, rounds, out, as_json)


def _whole_models(
    model: str | None,
    formats: list[str] | None,
    peers: list[str] | None,
    rounds: int | None,
    out: Path,
    as_json: bool,
) -> None:
    from parco import whole
    from parco.report import speeds

    unknown = [name for name in peers or () if name != "llama_cpp"]
    if unknown:
        raise ValueError(f"--peers: {unknown[0]!r} runs no whole models here; llama_cpp does")
    with terminal.progress() as bar:
        report = whole.run(
            model,
            formats=formats,
            llama_cpp=None if peers is None else "llama_cpp" in peers,
            rounds=ROUNDS_WHOLE if rounds is None else rounds,
            progress=bar,
        )
    _save(report, out)
    speeds.write(report, out / "bench.html")
    absent = [f"{one['contender']} takes no part: {one['reason']}" for one in report["missing"]]
    _print(report, [speeds.table(report)], absent, out, as_json)


def _products(
    model: str | None,
    shapes: str | None,
    rows: str | None,
    formats: list[str] | None,
    peers: list[str] | None,
    rounds: int | None,
    out: Path,
    as_json: bool,
) -> None:
    from parco import bench
    from parco.report import throughput

    heights = list(bench.ROWS) if rows is None else [_number(text, "--rows") for text in rows.split(",")]
    if shapes is not None and model is not None:
        raise ValueError(f"--shapes {shapes} and the model {model!r} are two answers to one question: give one of them")
    chosen = _shapes(shapes) if shapes is not None else _model_shapes(model)
    model_bytes = sum(2 * shape[0] * shape[1] * layers for shape, layers in chosen.items())
    with terminal.progress() as bar:
        bar.stage("measure", len(chosen) * len(heights))
        report = bench.run(
            chosen,
            formats=bench.FORMATS if formats is None else formats,
            rows=heights,
            peers=peers,
            rounds=bench.ROUNDS if rounds is None else rounds,
            between=None if shapes is not None else model_bytes,
            advance=bar.advance,
        )
    _save(report, out)
    throughput.write(report, out / "bench.html")
    absent = [
        f"{one['contender']} did not run on {one['shape'][0]}x{one['shape'][1]}: {one['reason']}"
        for one in report["missing"]
    ]
    _print(report, throughput.tables(report), absent, out, as_json)


def _save(report: Any, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _print(report: Any, tables: list[Table], absent: list[str], out: Path, as_json: bool) -> None:
    if as_json:
        terminal.print_json(report)
        return
    console = terminal.console()
    for table in tables:
        console.print(table)
        console.print()
    for line in absent:
        console.print(line)
    console.print(f"{out / 'bench.html'} shows the same, {out / 'bench.json'} holds it.")


def _formats(text: str) -> list[str]:
    from parco.formats import parse

    try:
        return [str(parse(name.strip())) for name in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--formats: {error}") from None


def _shapes(text: str) -> dict[Shape, int]:
    found: dict[Shape, int] = {}
    for part in text.split(","):
        match = SHAPE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"--shapes: {part!r} is no shape such as 4096x11008 (outputs x inputs)")
        shape = (int(match[1]), int(match[2]))
        found[shape] = found.get(shape, 0) + 1
    return found


def _number(text: str, option: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{option}: {text!r} is no whole number above 0")
    return int(text)


def _model_shapes(model: str | None) -> dict[Shape, int]:
    """How many layers of the model have each shape, the most bytes first."""
    from parco import hub
    from parco.nn.blocks import linears

    loaded = hub.load(hub.embedded_path() if model is None else model)
    terminal.show_notes(loaded.notes)
    found: dict[Shape, int] = {}
    for site in linears(loaded.model).values():
        found[site.shape] = found.get(site.shape, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[0][0] * item[0][1] * item[1]))
