"""Systems: one job, or the jobs of one config that differ in the seed alone, which are one row of the table."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.analysis.memo import Memo, stamp
from experiments.analysis.stats import Spread, over_seeds
from experiments.job_names import override_key
from experiments.jobs.results import NOT_HASHED, SAMPLES
from experiments.jobs.sample_rows import (
    RECALL,
    SPREADS,
    Score,
    digests_of,
    read_facts,
    read_scores,
)

Result = Mapping[str, Any]
"""A result.json."""

POSITION = "position gini"
"""Column of the Gini coefficient over positions."""
_SEED = re.compile(r"(?<![a-zA-Z])(seed[-_=]?)(\d+)")
"""The seed of a training, in the path of its checkpoint or adapter."""
_DRAWING = ("selector", "relevance", "cache")
"""Options whose seed is the run's own unless the command line gives another."""


@dataclass(frozen=True, eq=False)
class RunGroup:
    """One job, or the finished jobs of one config with several seeds."""

    folders: tuple[Path, ...]
    results: tuple[Result, ...]
    memo: Memo = field(default_factory=Memo, compare=False)
    """What is known from before."""

    @property
    def result(self) -> Result:
        """The first one, for all that they have in common."""
        return self.results[0]

    @property
    def finished(self) -> bool:
        return self.result["status"] == "ok"

    @cached_property
    def all_seeds(self) -> tuple[str, ...]:
        return tuple(seed_of(result) for result in self.results)

    @cached_property
    def seeds_equal(self) -> bool:
        """Whether several seeds gave the very same answers: nothing is drawn, so they are one observation."""
        if len(self.results) < 2 or len({result["model"]["weights"] for result in self.results}) > 1:
            return False
        return self.memo.get("equal seeds", self.stamps, self._answer_equally)

    def _answer_equally(self) -> bool:
        first, *others = (_answers(folder / SAMPLES) for folder in self.folders)
        return all(other.equals(first) for other in others)

    @cached_property
    def stamps(self) -> list[object]:
        """Stands for the files of all jobs, in keys of the memo."""
        return [
            [record_digest(result), stamp(folder / SAMPLES) if result["status"] == "ok" else None]
            for folder, result in zip(self.folders, self.results, strict=True)
        ]

    @cached_property
    def base(self) -> Mapping[str, Any]:
        return base_config(self.result)

    @cached_property
    def comparison(self) -> str:
        """Equal for systems with the same model and decoding on samples of the same names."""
        return text_of([*(self.base[key] for key in ("model", "decode", "data")), self.result["data"]["ids"]])

    @cached_property
    def overrides(self) -> frozenset[str]:
        return frozenset(self.result["overrides"])

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seeds that are observations of their own."""
        return self.all_seeds[:1] if self.seeds_equal else self.all_seeds

    @cached_property
    def digests(self) -> Mapping[str, str | None]:
        return data_digests(self.folders[0], self.result)

    def scores(self, metric: str) -> list[dict[str, Score]]:
        """The scores of each of `seeds` by sample id."""
        return [read_scores(folder / SAMPLES, metric) for folder in self.folders[: len(self.seeds)]]


def _answers(path: Path) -> pa.Table:
    names = [name for name in pq.read_schema(path).names if name.startswith("score_")]
    return pq.read_table(path, columns=["id", "prediction", "kept", *names]).replace_schema_metadata(None)


def data_digests(folder: Path, result: Result) -> Mapping[str, str | None]:
    """What a finished job answered (`digests_of`), from its samples where it is from before its record had this."""
    known: Mapping[str, str | None] | None = result["data"].get("digests")
    return known if known is not None else _digests_of(folder / SAMPLES, (folder / SAMPLES).stat().st_mtime_ns)


@cache
def _digests_of(path: Path, changed: int) -> Mapping[str, str | None]:
    return digests_of(read_facts(path))


def conflicts(ours: Mapping[str, str | None], theirs: Mapping[str, str | None]) -> list[str]:
    """The kinds of facts in which two jobs' data differ, of those that both know."""
    return [kind for kind, value in ours.items() if None not in (value, theirs.get(kind)) and value != theirs[kind]]


def text_of(value: Any) -> str:
    """Equal texts for equal values of configs."""
    return json.dumps(value, sort_keys=True, default=str)


def record_digest(result: Result) -> str:
    """Stands for a whole record, times included."""
    return hashlib.sha256(text_of(result).encode()).hexdigest()[:16]


def group_runs(results: Mapping[Path, Result], memo: Memo | None = None) -> list[RunGroup]:
    """All jobs, in their order; an unfinished job is a group of its own, so that its failure is shown."""
    groups: dict[str, list[list[Path]]] = {}
    digests = {folder: data_digests(folder, result) for folder, result in results.items() if result["status"] == "ok"}
    for folder, result in results.items():
        alike = groups.setdefault(_key(result) if folder in digests else folder.name, [])
        same = (members for members in alike if not conflicts(digests[members[0]], digests[folder]))
        if (members := next(same, None)) is None:
            alike.append([folder])
        else:
            members.append(folder)
    systems = []
    for members in (members for alike in groups.values() for members in alike):
        seeds = {folder: seed_of(results[folder]) for folder in members}
        folders = sorted(members, key=lambda folder: (len(seeds[folder]), seeds[folder], folder.name))
        # The same seed twice is not a second training but the same job under another name.
        parts = [folders] if len(set(seeds.values())) == len(folders) else [[folder] for folder in folders]
        known = memo or Memo()
        systems += [RunGroup(tuple(part), tuple(results[folder] for folder in part), known) for part in parts]
    return systems


def seed_of(result: Result) -> str:
    """The seed of the trainings that a job uses; its own where their paths name none."""
    trainings = [number for path in paths(result) for _, number in _SEED.findall(path)]
    return "/".join(dict.fromkeys(trainings)) or str(result["config"].get("seed"))


def paths(result: Result) -> list[str]:
    """Where the job's weights came from."""
    return [str(result["config"]["model"].get("path") or ""), str(result["config"].get("adapter") or "")]


def without_seed(text: str) -> str:
    return _SEED.sub(r"\1*", text)


def base_config(result: Result) -> dict[str, Any]:
    """The config with seeds taken out of it, so that equal ones are one system."""
    dropped = NOT_HASHED | {"seed", "stored"}
    config = {key: value for key, value in result["config"].items() if key not in dropped}
    given = set(map(override_key, result["overrides"]))
    for group in _DRAWING:
        if f"{group}.seed" not in given:
            config[group] = {key: value for key, value in config.get(group, {}).items() if key != "seed"}
    model, adapter = map(without_seed, paths(result))
    return config | {"model": config["model"] | {"path": model}, "adapter": adapter}


def seed_columns(system: RunGroup) -> dict[str, Any]:
    """The columns of a row that are over several seeds; empty for a single job."""
    if len(system.seeds) < 2:
        return {}
    return system.memo.get("seeds", system.stamps, lambda: _seed_columns(system))


def _seed_columns(system: RunGroup) -> dict[str, Any]:
    quality = system.result["quality"]
    row: dict[str, Any] = {}
    for metric in quality["metrics"]:
        row |= _spread_columns(metric, spread_over_seeds(system.scores(metric)))
    headline = system.scores(quality["metric"])
    for name in quality.get("groups", ()):  # absent in older records
        part = [{i: score for i, score in table.items() if score.group == name} for table in headline]
        row |= _spread_columns(f"group {name}", spread_over_seeds(part))
    for name in quality["subsets"]:
        row |= _spread_columns(f"subset {name}", spread_over_seeds(_part(headline, name)))
    if quality["recall"]:
        row |= _spread_columns(RECALL, spread_over_seeds(system.scores(RECALL)))
    selections = [result.get("selection", {}) for result in system.results]
    for name in SPREADS:
        # Where a seed is from before these statistics existed, the other seeds alone are not the mean of the row.
        known = all(selection.get(name) for selection in selections)
        row |= _spread_columns(name, spread_over_seeds(system.scores(name))) if known else {f"{name} mean": None}
    places = [selection.get("position_gini") for selection in selections]
    row[POSITION] = None if None in places else fmean(places)
    for name in ("visual", "prefix", "cache"):
        spreads = [result["tokens"][name] for result in system.results if result["tokens"].get(name)]
        if spreads:
            row[f"{name} tokens mean"] = fmean(s["mean"] for s in spreads)
            row |= {f"{name} tokens {key.__name__}": key(s[key.__name__] for s in spreads) for key in (min, max)}
    for stage in system.result["times"]["ms_per_sample"]:
        row[f"{stage} ms"] = median(result["times"]["ms_per_sample"][stage] for result in system.results)
    quartiles = [result["times"].get("ms_quartiles", {}) for result in system.results]
    for stage in set.intersection(*map(set, quartiles)):
        low, high = (median(known[stage][edge] for known in quartiles) for edge in (0, 1))
        row |= {f"{stage} ms q1": low, f"{stage} ms q3": high}
    waited = [share for result in system.results if (share := result["times"].get("waited")) is not None]
    row["waited"] = max(waited, default=None)
    peaks = [result["times"]["peak_memory_mib"] for result in system.results]
    row["peak memory MiB"] = None if None in peaks else max(peaks)
    return row


def spread_over_seeds(scores: Iterable[Mapping[str, Score]], lowest: float = 0.0) -> Spread | None:
    """Over the samples that every seed answered; None where too few seeds or pictures are left."""
    tables = list(scores)
    ids = sorted(set.intersection(*(set(table) for table in tables)))
    pictures = [tables[0][i].picture for i in ids]
    if len(tables) < 2 or len(set(pictures)) < 2:
        return None
    return over_seeds(np.asarray([[table[i].value for i in ids] for table in tables]), pictures, lowest)


def _part(tables: Iterable[Mapping[str, Score]], name: str) -> list[dict[str, Score]]:
    return [{i: score for i, score in table.items() if score.subset == name} for table in tables]


def _spread_columns(name: str, found: Spread | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {f"{name} {key}": getattr(found, key) for key in ("mean", "low", "high", "n", "between")}


def _key(result: Result) -> str:
    return text_of([base_config(result), result["choices"], result["data"]["ids"]])
