"""The HTML page and the terminal tables, both made from `result.json` alone."""

from parco.report.page import write

__all__ = ["write"]
