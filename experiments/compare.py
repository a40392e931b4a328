"""`python -m experiments.compare outputs/STUDY decode=parity`: paired differences of systems that differ in one choice.

The choice is a config group or a key of the config, and one of its options: `selector=pooled`, `experiment=B0`,
`adapter=null`. Each evaluated system is compared with the one that has it and is otherwise the same: same weights,
adapter, decoding and questions. Differences are in points, paired on questions and seeds (docs/report.md, "Intervals").
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median

from experiments.analysis.aggregate import Result, RunGroup, base_config
from experiments.analysis.columns import labels
from experiments.analysis.paired import Row, column, deltas
from experiments.analysis.rows import collect, run_groups
from experiments.analysis.stats import holm
from experiments.errors import fail, is_user_error
from shirg import MissingFileError, UserError

DECIDED = {
    "experiment": {"experiment", "selector"},
    "selector": {"experiment", "selector"},
    "ablation": {"ablation", "relevance"},
}
"""Choices that go with another: an experiment is a selector at a budget, an ablation may take the question away."""


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2 or "=" not in arguments[1]:
        fail("give a study's folder and the choice to compare with, for example outputs/decode decode=parity")
    folder, (group, _, option) = Path(arguments[0]), arguments[1].partition("=")
    try:
        print("\n".join(table(folder, group, option)))
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        fail(str(error))


def table(study: Path, group: str, option: str) -> list[str]:
    """Lines of a Markdown table, the system that is compared with first among those that it is compared to.

    Raises:
        MissingFileError: for a folder without evaluated jobs.
        UserError: when no job has that choice.
    """
    done = [system for system in run_groups(study) if system.finished]
    if not done:
        raise MissingFileError(f"{study}: there are no finished evaluations in this folder")
    chosen = [s for s in done if _choice(s.result, group) == option]
    # A control that was shown other questions is compared, and compared to by nobody.
    bases = {_rest(s.result, group): s for s in chosen if not s.result["config"].get("shuffle_questions")}
    if not bases:
        raise UserError(f"{study}: no finished evaluation has {group}={option}")
    shown = collect(study)
    told = dict(zip((row["job"] for row in shown), labels(shown), strict=True))
    names = list(dict.fromkeys(_groups(done)))
    titles = [f"{name or 'score'}{end}" for name in names for end in ("", f", against {option}")]
    figures = ["n", "seeds", *titles, "steps", "denoise ms", "total ms"]
    lines = [_line(["system", group, *figures]), _line(["---"] * 2 + ["---:"] * len(figures))]
    for rest, base in bases.items():
        others = [s for s in done if s is not base and _rest(s.result, group) == rest]
        rows = [deltas(s, base, option) for s in others]
        for key in (column(name, option) for name in names):
            known = [row for row in rows if f"{key} p" in row]
            for row, adjusted in zip(known, holm([row[f"{key} p"] for row in known]), strict=True):
                row[f"{key} holm"] = adjusted
        for system, row in zip([base, *others], [{}, *rows], strict=True):
            name = told[system.result["job"]]
            lines.append(_line([name, *_cells(system, row, group, names, option)]))
    return lines


def _groups(systems: Sequence[RunGroup]) -> Iterator[str]:
    for system in systems:
        for score in system.scores(system.result["quality"]["metric"])[0].values():
            yield score.group


def _choice(result: Result, group: str) -> str:
    chosen = result["choices"].get(group, result["config"].get(group))
    return "null" if chosen is None else str(chosen)


def _rest(result: Result, group: str) -> str:
    """All that must be the same in two systems that are compared."""
    free = DECIDED.get(group, {group})
    choices = sorted((k, v) for k, v in result["choices"].items() if k not in free)
    config = base_config(result)
    kept = [config[key] for key in ("model", "data", "adapter") if key != group]
    return repr((choices, kept, result["data"]["ids"]))


def _cells(system: RunGroup, row: Row, group: str, names: Sequence[str], option: str) -> list[str]:
    result, scores = system.result, system.scores(system.result["quality"]["metric"])
    cells = [_choice(result, group), str(result["data"]["n"]), str(len(system.seeds))]
    for name in names:
        parts = [[score.value for score in seed.values() if score.group == name] for seed in scores]
        cells.append(f"{100 * fmean(map(fmean, parts)):.1f}" if all(parts) else "-")
        cells.append(_difference(row, column(name, option)))
    times = [r["times"]["ms_per_sample"] for r in system.results]
    steps = fmean(r["decoding"]["steps"]["mean"] for r in system.results)
    return [*cells, f"{steps:.2f}", *(f"{median(t[stage] for t in times):.2f}" for stage in ("denoise", "total"))]


def _difference(row: Row, key: str) -> str:
    if f"{key} mean" not in row:
        return "-"
    mean, low, high = (f"{100 * row[f'{key} {end}']:+.1f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]{'*' if row[f'{key} holm'] < 0.05 else ''}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(sys.argv[1:])
