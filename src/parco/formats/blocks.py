"""Blocks: which elements of a matrix share one scale."""

from dataclasses import dataclass

MULTIPLE = 16
"""A block's extents other than 1 are multiples of this, so that kernels may walk a block in whole vectors."""


@dataclass(frozen=True)
class Block:
    """`rows` x `columns` neighbouring elements of an [N, K] matrix; None stands for all of them.

    Blocks at the lower and right edge may be short. Text: `tensor`, `row`, `column`, `32` (a group of 32 columns of
    one row) or `128x128`. Raises ValueError for an extent that is neither None, 1 nor a multiple of 16.
    """

    rows: int | None
    columns: int | None

    def __post_init__(self) -> None:
        for name, extent in (("rows", self.rows), ("columns", self.columns)):
            if extent is not None and extent != 1 and (extent < MULTIPLE or extent % MULTIPLE):
                raise ValueError(f"block {name}={extent}: must be None (all), 1 or a positive multiple of {MULTIPLE}")

    @property
    def is_group(self) -> bool:
        """Whether the block is a part of one row."""
        return self.rows == 1 and self.columns is not None

    def counts(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Number of blocks down and across a matrix of `shape`: the shape of its scales."""
        rows, columns = shape
        down = 1 if self.rows is None else -(-rows // self.rows)
        across = 1 if self.columns is None else -(-columns // self.columns)
        return down, across

    def __str__(self) -> str:
        for name, (rows, columns) in {"tensor": (None, None), "row": (1, None), "column": (None, 1)}.items():
            if (self.rows, self.columns) == (rows, columns):
                return name
        return "x".join("all" if extent is None else str(extent) for extent in (self.rows, self.columns))


TENSOR = Block(None, None)
ROW = Block(1, None)
COLUMN = Block(None, 1)


def group(columns: int) -> Block:
    """`columns` neighbours of one row."""
    return Block(1, columns)


def parse_block(text: str) -> Block:
    """The block that `text` names: `tensor`, `row`, `column`, `32`, `1x128`, `128x128`. ValueError otherwise."""
    named = {"tensor": TENSOR, "row": ROW, "column": COLUMN}
    if text in named:
        return named[text]
    extents = text.split("x")
    if len(extents) == 1:
        extents = ["1", *extents]
    if len(extents) != 2 or not all(extent == "all" or extent.isdecimal() for extent in extents):
        raise ValueError(
            f"block {text!r}: must be tensor, row, column, a number of columns (32) or rows and columns (128x128)"
        )
    rows, columns = (None if extent == "all" else int(extent) for extent in extents)
    return Block(rows, columns)
