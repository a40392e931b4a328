"""`python -m experiments.compare outputs/STUDY decode=parity`: paired differences of rows that differ in one choice.

Each evaluated job is compared with the job that has the given choice (a config group and one of its options) and is
otherwise the same: same model, selector, data and questions. Differences are in points, paired on the questions.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.cli import fail


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2 or "=" not in arguments[1]:
        fail("give a study's folder and the choice to compare with, for example outputs/decode decode=parity")
    folder, (group, _, option) = Path(arguments[0]), arguments[1].partition("=")
    try:
        print("\n".join(table(folder, group, option)))
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))


def table(study: Path, group: str, option: str) -> list[str]:
    """Lines of a Markdown table, the job that is compared with first in each group of jobs.

    Raises:
        FileNotFoundError: for a folder without evaluated jobs.
        ValueError: when no job has that choice.
    """
    from experiments.study.record import RESULT, read_result

    found = [(path.parent, read_result(path.parent)) for path in sorted(study.glob(f"*/{RESULT}"))]
    done = [(folder, r) for folder, r in found if r is not None and r["verb"] == "eval" and r["status"] == "ok"]
    if not done:
        raise FileNotFoundError(f"{study}: there are no finished evaluations in this folder")
    bases = {_others(r, group): (folder, r) for folder, r in done if r["choices"].get(group) == option}
    if not bases:
        raise ValueError(f"{study}: no finished evaluation has {group}={option}")
    head = ["selector", group, "n", "fine", "guard", "against it", "steps", "denoise ms", "total ms"]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    ordered = sorted(done, key=lambda pair: (pair[1]["choices"]["selector"], pair[1]["choices"].get(group) != option))
    for folder, result in ordered:
        base = bases.get(_others(result, group))
        if base is not None:
            lines.append(_line(_cells(folder, result, base[0], group)))
    return lines


def _others(result: dict[str, Any], group: str) -> tuple[Any, ...]:
    """All that must be the same in two jobs that are compared."""
    choices = tuple(sorted((k, v) for k, v in result["choices"].items() if k != group))
    return choices, result["data"]["ids"], result["config"]["adapter"], result["config"]["seed"]


def _cells(folder: Path, result: dict[str, Any], base: Path, group: str) -> list[str]:
    from experiments.study.record import SAMPLES
    from experiments.study.samples import read_scores
    from experiments.study.stats import paired_delta

    metric = result["quality"]["metric"]
    ours, theirs = (read_scores(path / SAMPLES, metric) for path in (folder, base))
    cells = [result["choices"]["selector"], str(result["choices"].get(group)), str(result["data"]["n"])]
    for name in ("fine", "guard"):
        part = [100 * score.value for score in ours.values() if score.group == name]
        cells.append(f"{sum(part) / len(part):.1f}" if part else "-")
    values, others = ({i: score.value for i, score in scores.items()} for scores in (ours, theirs))
    delta = None if folder == base else paired_delta(values, others, {i: ours[i].picture for i in ours})
    shown = "-" if delta is None else f"{100 * delta.mean:+.1f} [{100 * delta.low:+.1f}, {100 * delta.high:+.1f}]"
    ms = result["times"]["ms_per_sample"]
    return [*cells, shown, f"{result['decoding']['steps']['mean']:.2f}", f"{ms['denoise']:.2f}", f"{ms['total']:.1f}"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(sys.argv[1:])
