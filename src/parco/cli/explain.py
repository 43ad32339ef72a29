"""`parco explain`."""
def explain() -> None:
    """x"""
