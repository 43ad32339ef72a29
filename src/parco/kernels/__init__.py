"""Kernels: one folder per operation, its reference in plain torch beside what is faster; `table.py` picks."""
