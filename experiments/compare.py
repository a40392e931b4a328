"""Paired differences of systems that differ in one choice.

The choice is a config group or a key of the config, and one of its options: `selector=pooled`, `experiment=B0`,
`adapter=null`. Each evaluated system is compared with the one that has it and is otherwise the same: same weights,
adapter, decoding and questions. Differences are in points, paired on questions and seeds (docs/report.md, "Intervals").
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import pandas as pd

from experiments.analysis.columns import EMPTY, delta_cell, labels
from experiments.analysis.paired import column, deltas, plainness
from experiments.analysis.rows import Row
from experiments.analysis.stats import holm
from experiments.analysis.systems import Result, RunGroup, base_config
from experiments.analysis.table import collect, run_groups, to_markdown
from experiments.errors import CommandParser, fail, one_sentence
from shirg import MissingFileError, UserError

COUPLED = {
    "experiment": {"experiment", "selector"},
    "selector": {"experiment", "selector"},
    "ablation": {"ablation", "relevance"},
}
"""Choices that change together: an experiment is a selector at a budget, an ablation may take the question away."""


def main(arguments: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m experiments.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", type=Path, help="a study's folder, for example outputs/decode")
    parser.add_argument("choice", metavar="GROUP=OPTION", help="the choice to compare with, for example decode=parity")
    parsed = parser.parse_args(arguments)
    group, equals, option = parsed.choice.partition("=")
    if not equals:
        fail(f"{parsed.choice}: give the choice to compare with as GROUP=OPTION, for example decode=parity")
    with one_sentence():
        frame = paired_table(parsed.study, group, option)
        print(to_markdown(frame, [name not in ("system", group) for name in frame.columns]))


def paired_table(study: Path, group: str, option: str) -> pd.DataFrame:
    """A table of texts, one row for each system: in each block of comparable systems the compared-with one is first.

    Raises:
        MissingFileError: for a folder without evaluated jobs.
        UserError: when no job has that choice.
    """
    done = [system for system in run_groups(study) if system.finished]
    if not done:
        raise MissingFileError(f"{study}: there are no finished evaluations in this folder")
    chosen = [s for s in done if _choice(s.result, group) == option]
    # Shuffled-question controls are compared with a baseline but never used as one.
    plain = [s for s in chosen if not s.result["config"].get("shuffle_questions")]
    # The plainest one comes last and stays.
    bases = {_rest(s, group): s for s in sorted(plain, key=plainness, reverse=True)}
    if not bases:
        raise UserError(f"{study}: no finished evaluation has {group}={option}")
    rows = collect(study)
    label_of = dict(zip((row["job"] for row in rows), labels(rows), strict=True))
    metric_groups = _groups(done)
    lines = []
    for rest, base in bases.items():
        others = [s for s in done if s is not base and _rest(s, group) == rest]
        differences = [deltas(s, base, option) for s in others]
        for key in (column(name, option) for name in metric_groups):
            known = [row for row in differences if f"{key} p" in row]
            for row, adjusted in zip(known, holm([row[f"{key} p"] for row in known]), strict=True):
                row[f"{key} p holm"] = adjusted
        for system, row in zip([base, *others], [{}, *differences], strict=True):
            label = label_of[system.result["job"]]
            choice = _choice(system.result, group)
            lines.append({"system": label, group: choice, **_texts(system, row, metric_groups, option)})
    return pd.DataFrame(lines)


def _groups(systems: Sequence[RunGroup]) -> list[str]:
    """Groups of questions in the systems' data; "" means questions without a group."""
    scores = (system.scores(system.result["quality"]["metric"])[0] for system in systems)
    return list(dict.fromkeys(score.group for table in scores for score in table.values()))


def _choice(result: Result, group: str) -> str:
    chosen = result["choices"].get(group, result["config"].get(group))
    return "null" if chosen is None else str(chosen)


def _rest(system: RunGroup, group: str) -> str:
    """All that must be the same in two systems that are compared."""
    result = system.result
    free = COUPLED.get(group, {group})
    choices = sorted((k, v) for k, v in result["choices"].items() if k not in free)
    config = base_config(result)
    kept = [config[key] for key in ("model", "data", "adapter") if key != group]
    return repr((choices, kept, result["data"]["ids"], system.digests["texts"]))


def _texts(system: RunGroup, differences: Row, groups: Sequence[str], option: str) -> dict[str, str]:
    scores = system.scores(system.result["quality"]["metric"])
    texts = {"n": str(system.result["data"]["n"]), "seeds": str(len(system.seeds))}
    for name in groups:
        parts = [[score.value for score in seed.values() if score.group == name] for seed in scores]
        texts[name or "score"] = f"{100 * fmean(map(fmean, parts)):.1f}" if all(parts) else EMPTY
        difference = delta_cell(differences, column(name, option).removeprefix("delta "))
        texts[f"{name or 'score'}, against {option}"] = difference.text
    times = [r["times"]["ms_per_sample"] for r in system.results]
    texts["steps"] = f"{fmean(r['decoding']['steps']['mean'] for r in system.results):.2f}"
    return texts | {f"{stage} ms": f"{median(t[stage] for t in times):.2f}" for stage in ("denoise", "total")}


if __name__ == "__main__":
    main(sys.argv[1:])
