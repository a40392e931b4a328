"""Paired differences of systems that differ in one choice, or in the study that they are in.

  python -m experiments.compare outputs/decode decode=parity    the other decoding options, against this one
  python -m experiments.compare outputs/before outputs/after    the systems of the second study, against the first's

The choice is a config group or a key of the config, and one of its options: `selector=pooled`, `experiment=B0`,
`adapter=null`. Each evaluated system is compared with the one that has it and the same weights, adapter, decoding,
budget and questions; options of a selector may differ, and are in the system's name. What has no budget, like `pooled`,
is compared with systems of every budget. With several studies and a choice, the systems of all of them are compared.
Differences are in points, paired on questions and seeds (docs/report.md, "Intervals").
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from statistics import fmean, median

import pandas as pd
from rich.console import Console
from rich.progress import track

from experiments.analysis.columns import EMPTY, Cell, delta_cell
from experiments.analysis.paired import Part, column, deltas, plainness
from experiments.analysis.rows import Row
from experiments.analysis.stats import holm
from experiments.analysis.system_names import labels
from experiments.analysis.systems import Result, RunGroup, base_config
from experiments.analysis.table import collect, run_groups, to_markdown
from experiments.analysis.terminal_table import MORE, Shown, fitting, half_width, lines
from experiments.errors import CommandParser, fail, instead, one_sentence, visible
from shirg import MissingFileError, UserError

COUPLED = {
    "experiment": {"experiment", "selector", "relevance", "context"},
    "selector": {"experiment", "selector"},
    "ablation": {"ablation", "relevance"},
}
"""Choices that change together: an experiment is a selector with all that belongs to it, an ablation may take the
question away."""
COSTS = ("recall", "total ms", "denoise ms", "steps", "n", "seeds")
"""Columns that are shown where there is room: the kept share of the evidence, costs and counts."""


STUDY = "study"
"""The choice of `compare A B`: which study a system is in."""


@dataclass(frozen=True)
class Compared:
    """One system of the table: its name, its choice and its cells by their titles."""

    name: str
    choice: str
    cells: dict[str, Cell]


def main(arguments: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m experiments.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "words", nargs="+", metavar="STUDY | GROUP=OPTION", help="folders of studies, and the choice to compare with"
    )
    parser.add_argument("--subsets", action="store_true", help="divide the questions by density, too")
    parser.add_argument("--seeds", action="store_true", help="the score of each training or seed, too")
    parser.add_argument(
        "--may-differ", default="", metavar="GROUP,...", help="what else may differ, as adapter,relevance"
    )
    parser.add_argument("--wide", action="store_true", help="print every column, as a Markdown table")
    parsed = parser.parse_args(arguments)
    choices = [word for word in parsed.words if "=" in word and not Path(word).is_dir()]
    studies = [Path(word) for word in parsed.words if word not in choices]
    if not studies or len(choices) > 1 or (len(studies) == 1 and not choices):
        fail("give a study and a choice, as outputs/decode decode=parity, or two studies; --help says more")
    if parsed.may_differ and not choices:
        fail("--may-differ belongs to a choice, as selector=pooled")
    group, _, option = choices[0].partition("=") if choices else (STUDY, "", names_of(studies)[0])
    with one_sentence():
        differing = frozenset(filter(None, parsed.may_differ.split(",")))
        found = compare(studies, group, option, "subset" if parsed.subsets else "group", parsed.seeds, differing)
        if parsed.wide:
            frame = table_of(found, group)
            print(to_markdown(frame, [name not in ("system", group) for name in frame.columns]))
        else:
            print_fitting(found, group)


def names_of(studies: Sequence[Path]) -> list[str]:
    """A name for each study: that of its folder, or its path where two folders have the same name."""
    names = [study.resolve().name for study in studies]
    return names if len(set(names)) == len(names) else [str(study) for study in studies]


def compare(
    studies: Sequence[Path],
    group: str,
    option: str,
    part: Part = "group",
    by_seed: bool = False,
    may_differ: frozenset[str] = frozenset(),
) -> list[Compared]:
    """One entry for each system: in each block of comparable systems the compared-with one is first.

    Args:
        part: what the questions are divided by.
        by_seed: adds the mean score of each seed, in the order of the seeds.
        may_differ: choices that may differ besides `group`; with "adapter", any two adapters count as the same, as
            where each was trained for its system, but none is another choice than one.

    Raises:
        MissingFileError: for a folder without evaluated jobs.
        UserError: when no job has that choice, or no two systems are comparable; for an unknown group in `may_differ`.
    """
    done: dict[RunGroup, str] = {}
    labels_of: dict[RunGroup, str] = {}
    for study, name in zip(studies, names_of(studies), strict=True):
        here = [system for system in run_groups(study) if system.finished]
        if not here:
            raise MissingFileError(f"{study}: there are no finished evaluations in this folder")
        rows = collect(study)
        known = dict(zip((row["job"] for row in rows), labels(rows), strict=True))
        done |= dict.fromkeys(here, name)
        several = len(studies) > 1 and group != STUDY
        labels_of |= {s: known[s.result["job"]] + (f" ({name})" if several else "") for s in here}
    choice_of = {s: name if group == STUDY else _choice(s.result, group) for s, name in done.items()}
    _check_groups(may_differ, done)
    rest_of = {s: _rest(s, group, may_differ) for s in done}
    budget_of = {s: None if group in (STUDY, "budget") else str(s.result["config"].get("budget")) for s in done}
    chosen = [s for s in done if choice_of[s] == option]
    # Shuffled-question controls are compared with a baseline but never used as one.
    plain = [s for s in chosen if not s.result["config"].get("shuffle_questions")]
    # The plainest one comes last and stays.
    bases = {
        (rest_of[s], budget_of[s] if "budget" in s.result["config"]["selector"] else None): s
        for s in sorted(plain, key=plainness, reverse=True)
    }
    base_of = {s: bases.get((rest_of[s], budget_of[s])) or bases.get((rest_of[s], None)) for s in done}
    if not bases:
        known_options = sorted(set(choice_of.values()))
        where = ", ".join(map(str, studies))
        raise UserError(f"{where}: no finished evaluation has {group}={option}{instead(option, known_options)}")
    in_order = [s for s in done if base_of[s] is s]
    blocks = [(base, [s for s in done if s is not base and base_of[s] is base]) for base in in_order]
    if group == STUDY:
        blocks = [(base, others) for base, others in blocks if others]
        if not blocks:
            raise UserError(
                f"no system of {studies[1]} has the config and the questions of one of {studies[0]}: "
                "give a choice, as selector=pooled"
            )
    metric_groups = _groups(done, part)
    found = []
    for base, others in track(blocks, "comparing", console=Console(stderr=True), transient=True):
        differences = [deltas(s, base, option, part=part) for s in others]
        for key in (column(name, option) for name in metric_groups):
            rows = [row for row in differences if f"{key} p" in row]
            for row, adjusted in zip(rows, holm([row[f"{key} p"] for row in rows]), strict=True):
                row[f"{key} p holm"] = adjusted
        for system, row in zip([base, *others], [{}, *differences], strict=True):
            cells = _cells(system, row, metric_groups, option, part, by_seed)
            found.append(Compared(labels_of[system], choice_of[system], cells))
    return found


def table_of(found: Sequence[Compared], group: str) -> pd.DataFrame:
    """The comparison as a table of texts."""
    cells = [{title: cell.text for title, cell in each.cells.items()} for each in found]
    return pd.DataFrame([{"system": e.name, group: e.choice, **texts} for e, texts in zip(found, cells, strict=True)])


def print_fitting(found: Sequence[Compared], group: str) -> None:
    """The columns that fit into the terminal; intervals as half of their width where there is no room for both ends."""
    shown = [
        (0.0, Shown("system", (tuple(visible(each.name) for each in found),), right=False)),
        (1.0, Shown(group, (tuple(visible(each.choice) for each in found),), right=False)),
    ]
    for title in found[0].cells:
        cells = [each.cells[title] for each in found]
        forms = (tuple(cell.text for cell in cells), tuple(map(half_width, cells)))
        rank = MORE + COSTS.index(title) if title in COSTS else 2.0
        shown.append((rank, Shown(title.replace(", ", ",\n"), tuple(dict.fromkeys(forms)))))
    taken, hidden = fitting(shown, get_terminal_size().columns)
    print("\n".join(lines(taken)))
    if hidden:
        print(f"{len(hidden)} more columns with --wide")


def _groups(systems: Iterable[RunGroup], part: Part) -> list[str]:
    """Groups or subsets of questions in the systems' data; "" means questions without a group."""
    scores = (system.scores(system.result["quality"]["metric"])[0] for system in systems)
    return list(dict.fromkeys(getattr(score, part) for table in scores for score in table.values()))


def _check_groups(names: Iterable[str], systems: Iterable[RunGroup]) -> None:
    known = sorted({"adapter", *(name for system in systems for name in system.result["choices"])})
    for name in names:
        if name not in known:
            raise UserError(f"may-differ={name:.200}: this is no group of these jobs{instead(name, known)}")


def _choice(result: Result, group: str) -> str:
    chosen = result["choices"].get(group, result["config"].get(group))
    return "null" if chosen is None else str(chosen)


def _rest(system: RunGroup, group: str, may_differ: frozenset[str]) -> str:
    """All that must be the same in two systems that are compared."""
    result = system.result
    if group == STUDY:
        config = base_config(result)
        folder = f"/{system.folders[0].parent.name}/"
        config["adapter"] = config["adapter"].replace(folder, "/*/")  # one that was trained in the study itself
        return repr((sorted(config.items()), sorted(result["choices"].items()), result["data"]["ids"]))
    free = COUPLED.get(group, {group}) | may_differ
    choices = sorted((k, v) for k, v in result["choices"].items() if k not in free)
    config = base_config(result)
    gone = {group} | (may_differ - {"adapter"})
    if "adapter" in may_differ:
        config["adapter"] = result["config"]["adapter"] is not None
    kept = [config[key] for key in ("model", "data", "adapter", "decode") if key not in gone]
    return repr((choices, kept, result["data"]["ids"], system.digests["texts"]))


def _cells(
    system: RunGroup, differences: Row, groups: Sequence[str], option: str, part: Part, by_seed: bool
) -> dict[str, Cell]:
    scores = system.scores(system.result["quality"]["metric"])
    cells = {}
    for name in groups:
        parts = [[score.value for score in seed.values() if getattr(score, part) == name] for seed in scores]
        means = [100 * fmean(values) for values in parts] if all(parts) else []
        cells[name or "score"] = Cell(f"{fmean(means):.1f}") if means else Cell()
        if by_seed:
            cells[f"{name or 'score'} by seed"] = Cell(", ".join(f"{mean:.1f}" for mean in means))
        cells[f"{name or 'score'}, against {option}"] = delta_cell(
            differences, column(name, option).removeprefix("delta ")
        )
    recalls = [r["quality"]["recall"]["mean"] for r in system.results if r["quality"]["recall"]]
    recall = f"{100 * fmean(recalls):.1f}" if recalls else EMPTY
    times = [r["times"]["ms_per_sample"] for r in system.results]
    steps = fmean(r["decoding"]["steps"]["mean"] for r in system.results)
    costs = [f"{median(t['total'] for t in times):.2f}", f"{median(t['denoise'] for t in times):.2f}", f"{steps:.2f}"]
    sizes = [str(system.result["data"]["n"]), str(len(system.seeds))]
    return cells | dict(zip(COSTS, map(Cell, [recall, *costs, *sizes]), strict=True))


if __name__ == "__main__":
    main(sys.argv[1:])
