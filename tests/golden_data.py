"""Where the golden numbers lie."""

from pathlib import Path


def golden_dir(family: str) -> Path:
    """The folder of one family of golden files."""
    return Path(__file__).parent / "golden" / family
