"""Where the golden numbers lie."""

import json
from pathlib import Path


def golden_dir(family: str) -> Path:
    """The folder of one family of golden files."""
    return Path(__file__).parent / "golden" / family


def parity_folder(given: Path | None, family: str) -> Path:
    """The folder of "lavida", "lavida_dream" or "rivals": the given one if it holds this family, else the copy.

    A folder with a config.json holds LaViDa's numbers, on the language model that the file names. Any other is taken
    for the rivals', whose tests then fail if it holds nothing.
    """
    return given if given is not None and family == family_of(given) else golden_dir(family)


def family_of(folder: Path) -> str:
    """What a folder of golden numbers holds."""
    if not (folder / "config.json").is_file():
        return "rivals"
    model_type = json.loads((folder / "config.json").read_text())["lm"].get("model_type", "llava_llada")
    return "lavida_dream" if "dream" in model_type else "lavida"
