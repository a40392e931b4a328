"""Where the golden numbers lie."""

from pathlib import Path


def golden_dir(family: str) -> Path:
    """The folder of one family of golden files."""
    return Path(__file__).parent / "golden" / family


def parity_folder(given: Path | None, family: str) -> Path:
    """The folder of "lavida" or of "rivals": the given one if it holds this family, else the copy.

    A folder with a config.json holds LaViDa's numbers. Any other is taken for the rivals', whose tests then fail if it
    holds nothing.
    """
    if given is None:
        return golden_dir(family)
    holds = "lavida" if (given / "config.json").is_file() else "rivals"
    return given if holds == family else golden_dir(family)
