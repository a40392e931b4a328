"""Paired comparisons: which system a system is compared to, on the same samples, and whether they differ."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal

import numpy as np

from experiments.analysis.rows import Row
from experiments.analysis.stats import detectable, holm, over_seeds, paired_delta
from experiments.analysis.systems import RunGroup, conflicts
from experiments.job_names import UNNAMED, override_key
from experiments.jobs.results import SAMPLES
from experiments.jobs.sample_facts import compare_facts, describe
from experiments.jobs.sample_rows import Score, read_facts

Part = Literal["group", "subset"]
"""What questions are divided by: their group, or their group and their density."""
ReadScores = Callable[[RunGroup, str], Sequence[dict[str, Score]]]
"""Reads the scores of each seed of a system by sample id."""
BASELINE = "pooled"
UNABLATED = "unablated"
FULL = "full"
"""The selector that keeps all tokens."""
OF_FULL = "of full"
"""How the columns end that say which share of its score a row has."""
EQUAL = 0.02
"""Budgets that differ by less than this share count as equal: pictures of odd shapes round differently."""


def compare_all(systems: Sequence[RunGroup], rows: Sequence[Row]) -> None:
    """Adds to each row its paired differences, with p values adjusted over the systems, and its budget ratio.

    `delta [GROUP ]vs NAME KEY`: over all samples and within each group of questions, against the baseline, and for an
    ablation also against the method without it.
    """
    kinds: dict[str, list[RunGroup]] = {}
    for system in systems:
        if system.finished:
            kinds.setdefault(system.comparison, []).append(system)
    alike = [kinds[system.comparison] if system.finished else [] for system in systems]
    for name, choose in ((BASELINE, baseline), (UNABLATED, unablated)):
        _compare(name, [choose(one, among) for one, among in zip(systems, alike, strict=True)], systems, rows)
    by_job = {row["job"]: row for row in rows}
    for system, row, candidates in zip(systems, rows, alike, strict=True):
        if f"compared to {BASELINE}" not in row and (stranger := _other_data(system, candidates)) is not None:
            row["note"] = "; ".join(filter(None, (row["note"], _say_why(system, stranger))))
        row["budget ratio"] = budget_ratio(row, by_job)
        if (whole := plainest(FULL, system, candidates)) is not None:
            row |= shares(row, by_job[whole.result["job"]])
    _adjust(rows)


def _compare(name: str, others: Sequence[RunGroup | None], systems: Sequence[RunGroup], rows: Sequence[Row]) -> None:
    """Adds the differences of each system to the other one, where it has one."""
    known = [(other, one, row) for other, one, row in zip(others, systems, rows, strict=True) if other is not None]
    # Those with the same other system come one after the other, so that its scores are read once.
    scores = lru_cache(maxsize=1)(RunGroup.scores)
    for other, system, row in sorted(known, key=lambda one: one[0].result["job"]):
        row |= deltas(system, other, name, scores)
        row[f"compared to {name}"] = other.result["job"]


def _adjust(rows: Sequence[Row]) -> None:
    """Adds Holm's p values; a family is the systems that are compared with the same one."""
    for name in dict.fromkeys(key for row in rows for key in row if key.startswith("delta ") and key.endswith(" p")):
        against = f"compared to {other_name(name.removesuffix(' p'))}"
        families: dict[str, list[Row]] = {}
        for row in rows:
            if name in row:
                families.setdefault(row[against], []).append(row)
        for family in families.values():
            for row, p in zip(family, holm([row[name] for row in family]), strict=True):
                row[f"{name} holm"] = p


def baseline(system: RunGroup, alike: Sequence[RunGroup]) -> RunGroup | None:
    """The pooled system that answered the same questions with the same model and decoding; without adapter first.

    Args:
        alike: the finished systems with the same `comparison`, this one among them.
    """
    best = plainest(BASELINE, system, alike)
    return None if best is system else best


def plainest(selector: str, system: RunGroup, alike: Sequence[RunGroup]) -> RunGroup | None:
    """Of the systems with a selector, without a cache selector, that answered the same data: the one that changes
    least; this one itself, where it is that.
    """
    candidates = [other for other in alike if _is_plain(other, selector) and _same_data(system, other)]
    return min(candidates, key=plainness, default=None)


def shares(row: Row, whole: Row) -> Row:
    """`[GROUP ]of full`: a row's score as a share of that with all tokens, over all samples and in each group.

    Nothing where the samples differ, and where nothing is right with all tokens.
    """
    if row.get("ids") != whole.get("ids"):
        return {}
    groups = [key.removesuffix(" mean") for key in row if key.startswith("group ") and key.endswith(" mean")]
    found = {}
    for key in (str(row["metric"]), *groups):
        mine, all_tokens = row.get(f"{key} mean"), whole.get(f"{key} mean")
        if mine is not None and all_tokens:
            name = key.removeprefix("group ") if key in groups else ""
            found[f"{name} {OF_FULL}".strip()] = mine / all_tokens
    return found


def plainness(system: RunGroup) -> tuple[bool, int, str, str]:
    """Sorts the systems that may serve as a baseline: without adapter, with the fewest overrides, the oldest.

    A variant that is added later, with another batch size for example, does not take the baseline's place.
    """
    result = system.result
    given = [word for word in result["overrides"] if override_key(word) not in UNNAMED | {"seed"}]
    return result["config"]["adapter"] is not None, len(given), str(result["times"].get("started")), result["job"]


def _is_plain(system: RunGroup, selector: str) -> bool:
    choices = system.result["choices"]
    return choices["selector"] == selector and choices.get("cache", "none") == "none"


def _other_data(system: RunGroup, alike: Sequence[RunGroup]) -> RunGroup | None:
    """A baseline that would be comparable, had it answered the same data."""
    return next((other for other in alike if _is_plain(other, BASELINE) and not _same_data(system, other)), None)


def _same_data(system: RunGroup, other: RunGroup) -> bool:
    """Whether samples of the same names were the same."""
    return not conflicts(system.digests, other.digests)


def _say_why(system: RunGroup, other: RunGroup) -> str:
    theirs, ours = (read_facts(one.folders[0] / SAMPLES) for one in (other, system))
    return f"not compared to {other.result['job']}, whose data was other: {describe(compare_facts(theirs, ours))}"


def unablated(system: RunGroup, alike: Sequence[RunGroup]) -> RunGroup | None:
    """For an ablation, the system that differs from it least and has nothing taken away; None for other systems.

    Args:
        alike: as for `baseline`.
    """
    if not is_ablation(system):
        return None

    def distance(other: RunGroup) -> tuple[bool, int, str]:
        adapters = [s.result["config"]["adapter"] is None for s in (system, other)]
        return adapters[0] != adapters[1], len(system.overrides ^ other.overrides), other.result["job"]

    candidates = [
        other
        for other in alike
        if not is_ablation(other)
        and other.result["choices"]["selector"] == system.result["choices"]["selector"]
        and _same_data(system, other)
    ]
    return min(candidates, key=distance, default=None)


def is_ablation(system: RunGroup) -> bool:
    return system.result["choices"].get("ablation", "none") != "none"


def deltas(
    system: RunGroup, other: RunGroup, name: str, scores: ReadScores = RunGroup.scores, part: Part = "group"
) -> Row:
    """Paired differences over all samples and within each group (or subset) of questions."""
    inputs = [system.stamps, other.stamps, name, part]
    return system.memo.get("difference", inputs, lambda: _deltas(system, other, name, scores, part))


def _deltas(system: RunGroup, other: RunGroup, name: str, scores: ReadScores, part: Part) -> Row:
    metric = system.result["quality"]["metric"]
    pairs = _pair_seeds(system, other, system.scores(metric), scores(other, metric))
    if not pairs:
        return {}
    row: Row = {}
    of = attrgetter(part)
    for group in ("", *dict.fromkeys(of(score) for score in pairs[0][0].values() if of(score))):
        parts = [
            ({i: s for i, s in ours.items() if group in ("", of(s))}, {i: s.value for i, s in theirs.items()})
            for ours, theirs in pairs
        ]
        row |= {f"{column(group, name)} {key}": value for key, value in _difference(parts).items()}
    return row


def column(group: str, name: str) -> str:
    """The prefix of a difference's columns; an empty group means all samples."""
    return " ".join(filter(None, ("delta", group, "vs", name)))


def other_name(difference: str) -> str:
    """The name of the system that a difference is taken to: `pooled` of "fine vs pooled"."""
    return difference.rpartition("vs ")[2]


def _difference(parts: Sequence[tuple[Mapping[str, Score], Mapping[str, float]]]) -> Row:
    """One seed: the paired bootstrap and the sign test. Several: pictures and seeds are both random."""
    ours, theirs = parts[0]
    pictures = {i: score.picture for i, score in ours.items()}
    if len(parts) > 1:
        ids = sorted(set.intersection(*(mine.keys() & other.keys() for mine, other in parts)))
        if len({pictures[i] for i in ids}) < 2:
            return {}
        table = np.asarray([[mine[i].value - other[i] for i in ids] for mine, other in parts])
        found = over_seeds(table, [pictures[i] for i in ids])
        return _keys(found, "mean", "low", "high", "p", "between") | {"seeds": found.seeds}
    delta = paired_delta({i: score.value for i, score in ours.items()}, theirs, pictures)
    return {} if delta is None else _keys(delta, "mean", "low", "high", "p", "wins", "losses")


def _keys(found: Any, *names: str) -> Row:
    return {name: getattr(found, name) for name in names} | {"detectable": detectable(found.low, found.high)}


def _pair_seeds(
    system: RunGroup, other: RunGroup, our_scores: Sequence[dict[str, Score]], their_scores: Sequence[dict[str, Score]]
) -> list[tuple[dict[str, Score], dict[str, Score]]]:
    """Scores to subtract: seed by seed where both have them.

    Where the other has one seed and all are of one base model, all of ours are compared with it. Another training of
    the base model is no fair partner.
    """
    ours = dict(zip(system.seeds, our_scores, strict=True))
    theirs = dict(zip(other.seeds, their_scores, strict=True))
    if len(theirs) == 1 and len({result["model"]["weights"] for one in (system, other) for result in one.results}) == 1:
        (only,) = theirs.values()
        return [(scores, only) for scores in ours.values()]
    return [(scores, theirs[seed]) for seed, scores in ours.items() if seed in theirs]


def budget_ratio(row: Row, by_job: Mapping[str, Row]) -> float | None:
    """How many times the baseline's tokens this row uses; 1 within `EQUAL`, None without a baseline.

    Counted with and without newline tokens, since some selectors have none, and the nearer one taken. For a cache
    selector the rows that stay in the cache are counted.
    """
    job = row.get(f"compared to {BASELINE}", row["job"] if row["selector"] == BASELINE else None)
    other = by_job.get(job) if job is not None else None
    if other is None or not other.get("visual tokens mean") or row.get("visual tokens mean") is None:
        return None
    theirs = (other["visual tokens mean"], _without_newlines(other))
    cut = row.get("cache tokens mean")
    ours = (cut, cut) if cut is not None else (row["visual tokens mean"], _without_newlines(row))
    nearest = min((a / b for a, b in zip(ours, theirs, strict=True)), key=lambda ratio: abs(ratio - 1))
    return 1.0 if abs(nearest - 1) <= EQUAL else nearest


def _without_newlines(row: Row) -> float:
    return row["visual tokens mean"] - row.get("newline tokens", 0)
