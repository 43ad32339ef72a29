"""`parco machine`: what this machine can do, measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from parco.cli import terminal

if TYPE_CHECKING:
    from parco.machine import Machine, Peaks


def machine(
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again instead of using the kept measurement.")
    ] = False,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Show the instruction sets, caches and memory of this machine, and how fast it reads and multiplies.

    The speeds are measured on the first call and kept in the user's cache folder; when other programs had the
    processors, they are measured again on the next calls.
    """
    from parco import machine as here

    isa, found, peaks = here.isa(), here.detect(), here.peaks(refresh=refresh)
    if as_json:
        terminal.print_json({**asdict(found), "isa": isa, "peaks": asdict(peaks)})
        return
    _show(isa, found, peaks)


def _show(isa: str, found: Machine, peaks: Peaks) -> None:
    from parco.report import tables, units

    rows = [
        ("processor", found.cpu),
        ("cores", str(found.cores)),
        ("instruction sets", f"{' '.join(found.isas)} (in use: {isa})"),
        ("features", " ".join(found.features) or "none of those that parco looks for"),
        ("caches", f"{units.size(found.l1d)} L1 data, {units.size(found.l2)} L2, {units.size(found.l3)} L3"),
        ("memory", units.size(found.memory)),
        ("GPUs", ", ".join(found.gpus) or "none"),
        ("reads", units.rate(peaks.read_bytes_per_second, "B")),
        ("copies", units.rate(peaks.copy_bytes_per_second, "B")),
    ]
    rows += [
        (f"{element} multiply-adds", units.rate(per_second, ""))
        for element, per_second in peaks.multiply_adds_per_second.items()
    ]
    terminal.console().print(tables.pairs_table(rows))
