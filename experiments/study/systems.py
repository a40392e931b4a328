"""Jobs as systems: runs that differ in the seed alone are one system, measured several times."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from experiments.study.record import NOT_HASHED, SAMPLES
from experiments.study.samples import RECALL, Score, read_scores
from experiments.study.seeds import Spread, over_seeds

Result = Mapping[str, Any]
"""A result.json."""

_SEED = re.compile(r"(?<![a-zA-Z])(seed[-_=]?)(\d+)")
"""In the path of a checkpoint or an adapter: which training it came from."""


@dataclass(frozen=True)
class RunGroup:
    """One job, or the finished jobs of one config with several seeds."""

    folders: tuple[Path, ...]
    results: tuple[Result, ...]

    @property
    def result(self) -> Result:
        """What stands for all of them where they agree."""
        return self.results[0]

    @property
    def finished(self) -> bool:
        return self.result["status"] == "ok"

    @cached_property
    def seeds(self) -> tuple[str, ...]:
        return tuple(seed_of(result) for result in self.results)

    def scores(self, metric: str) -> list[dict[str, Score]]:
        """Each seed's scores by sample id."""
        return [read_scores(folder / SAMPLES, metric) for folder in self.folders]


def group_runs(results: Mapping[Path, Result]) -> list[RunGroup]:
    """All jobs, in their order; a job that is not finished stands alone, so that its failure stays in sight."""
    groups: dict[str, list[Path]] = {}
    for folder, result in results.items():
        groups.setdefault(_key(result) if result["status"] == "ok" else folder.name, []).append(folder)
    systems = []
    for members in groups.values():
        seeds = {folder: seed_of(results[folder]) for folder in members}
        folders = sorted(members, key=lambda folder: (len(seeds[folder]), seeds[folder], folder.name))
        # The same seed twice is no second training: the same job under another name.
        parts = [folders] if len(set(seeds.values())) == len(folders) else [[folder] for folder in folders]
        systems += [RunGroup(tuple(part), tuple(results[folder] for folder in part)) for part in parts]
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
    model, adapter = map(without_seed, paths(result))
    return config | {"model": config["model"] | {"path": model}, "adapter": adapter}


def seed_columns(system: RunGroup) -> dict[str, Any]:
    """The columns of a row that are over several seeds; empty for a single job."""
    if len(system.results) < 2:
        return {}
    quality = system.result["quality"]
    row: dict[str, Any] = {}
    for metric in quality["metrics"]:
        row |= _spread_columns(metric, spread_over_seeds(system.scores(metric)))
    headline = system.scores(quality["metric"])
    for name in quality["subsets"]:
        row |= _spread_columns(f"subset {name}", spread_over_seeds(_part(headline, name)))
    if quality["recall"]:
        row |= _spread_columns(RECALL, spread_over_seeds(system.scores(RECALL)))
    for name in ("visual", "prefix", "cache"):
        spreads = [result["tokens"][name] for result in system.results if result["tokens"].get(name)]
        if spreads:
            row[f"{name} tokens mean"] = fmean(s["mean"] for s in spreads)
            row |= {f"{name} tokens {key.__name__}": key(s[key.__name__] for s in spreads) for key in (min, max)}
    for stage in system.result["times"]["ms_per_sample"]:
        row[f"{stage} ms"] = median(result["times"]["ms_per_sample"][stage] for result in system.results)
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
    same = [base_config(result), result["choices"], result["data"]["ids"]]
    return json.dumps(same, sort_keys=True, default=str)
