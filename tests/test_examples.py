"""The notebooks in examples/ run from the first cell to the last, are short, and are stored without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_LINES = 60


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return found


def code(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]


def test_there_are_five_and_the_tutorial_names_each() -> None:
    assert len(NOTEBOOKS) == 5
    tutorial = (ROOT / "docs/tutorial.md").read_text()
    assert [path.name for path in NOTEBOOKS if path.name not in tutorial] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_short_and_holds_no_output(path: Path) -> None:
    lines = [line for source in code(path) for line in source.splitlines() if line.strip()]
    assert 10 <= len(lines) <= MOST_LINES
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells(path))
    assert max(map(len, lines)) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    """In a copy of the folders that they use, so that their studies are left nowhere."""
    for name in ("conf", "weights", "eval.py", "train.py", "experiments", "shirg", "baselines", "lavida_adapter"):
        os.symlink(ROOT / name, tmp_path / name)
    script = "\n".join(code(path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
