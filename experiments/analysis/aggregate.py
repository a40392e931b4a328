"""Aggregation: rows of samples to the sections of result.json, shards to one job, seeds to one run group."""

import json
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from experiments.analysis.position_bias import probe
from experiments.analysis.stats import Spread, estimate, over_seeds
from experiments.atomic_files import remove_path, write_json
from experiments.data.sample import ids_hash
from experiments.job_names import merged_name, override_key
from experiments.jobs.results import NOT_HASHED, RESULT, SAMPLES, SHOTS, config_hash, read_result
from experiments.jobs.sample_rows import (
    RECALL,
    SPREADS,
    SampleRow,
    Score,
    SpreadName,
    drop_partial_digests,
    picture_of_row,
    read_rows,
    read_scores,
    subset_name,
    write_samples,
)
from experiments.metrics.answers import score_together, text_metrics
from experiments.metrics.concentration import gini
from shirg import UserError

Result = Mapping[str, Any]
"""A result.json."""

POSITION = "position gini"
"""Column of the Gini coefficient over positions."""
_SEED = re.compile(r"(?<![a-zA-Z])(seed[-_=]?)(\d+)")
"""The seed of a training, in the path of its checkpoint or adapter."""


def summarise(rows: Sequence[SampleRow], metrics: Sequence[str]) -> dict[str, Any]:
    """Every metric over all rows, the headline metric over subsets, recall, token counts, steps and the prefix cache;
    how what is kept is spread over the pictures.

    Metrics that depend on all rows are computed here, and their scores put into the rows. `drift` is the largest
    |difference| of a logit that a smaller cache makes, `same_top1` the share of answer slots whose likeliest token
    stays the same.
    """
    corpora = score_together(rows, text_metrics(metrics))
    tops = {name: facts.get("top", 1.0) for name, facts in corpora.items()}
    headline = metrics[0]
    in_cache = [row["n_cache"] for row in rows if row["n_cache"] is not None]
    return {
        "quality": {
            "metric": headline,
            "metrics": {name: _score(rows, name, tops.get(name, 1.0)) for name in metrics},
            "subsets": {key: _score(part, headline) for key, part in partition(rows, subset).items()},
            "subtasks": {key: _score(part, headline) for key, part in partition(rows, lambda r: r["subtask"]).items()},
            "corpora": {name: facts for name, facts in corpora.items() if facts},
            "probe": probe(rows, headline),
            "recall": _mean_recall(rows),
            "recall_subsets": {key: _mean_recall(part) for key, part in partition(rows, subset).items()},
        },
        "tokens": {
            "visual": _count_spread([row["n_visual"] for row in rows]),
            "prefix": _count_spread([row["n_prefix"] for row in rows]),
            "cache": _count_spread(in_cache) if in_cache else None,
            "by_source": {s: sum(row["sources"][s] for row in rows) / len(rows) for s in rows[0]["sources"]},
        },
        "decoding": {
            "steps": _count_spread([row["n_steps"] for row in rows]),
            "cache_bytes": _mean([row["cache_bytes"] for row in rows]),
            "drift": max((row["drift"] for row in rows if row["drift"] is not None), default=None),
            "same_top1": _mean([row["same_top1"] for row in rows]),
        },
        "selection": {
            **{name: _mean_spread(rows, name) for name in SPREADS},
            "position_gini": position_gini([found for row in rows if (found := row.get("kept_map"))]),
        },
    }


def position_gini(maps: Sequence[Sequence[float | None]]) -> float | None:
    """The Gini coefficient of how often the tokens of each field of the picture are kept, over all selections.

    0 where every field is kept equally often, whatever single pictures look like; None without a kept token.

    Args:
        maps: for each selection the share that is kept of each field; None for a field without a token.
    """
    if not maps:
        return None
    known = [[share for share in field if share is not None] for field in zip(*maps, strict=True)]
    return gini([fmean(shares) for shares in known if shares])


def subset(row: SampleRow) -> str:
    """The subset that a sample belongs to, "" when its dataset names no groups."""
    return subset_name(row["group"], row["density"])


def partition(rows: Sequence[SampleRow], key: Callable[[SampleRow], str]) -> dict[str, list[SampleRow]]:
    """Rows by key, in the order in which the data brings groups and densities; rows with an empty key are left out."""
    groups, densities = list(dict.fromkeys(r["group"] for r in rows)), list(dict.fromkeys(r["density"] for r in rows))
    parts: dict[str, list[SampleRow]] = {}
    for row in sorted(rows, key=lambda row: (groups.index(row["group"]), densities.index(row["density"]))):
        if name := key(row):
            parts.setdefault(name, []).append(row)
    return parts


def _score(rows: Sequence[SampleRow], metric: str, top: float = 1.0) -> dict[str, float] | None:
    """The mean in the metric's own unit; intervals are made for scores in [0, 1]."""
    scored = [(score / top, picture_of_row(row)) for row in rows if (score := row["scores"][metric]) is not None]
    if not scored:
        return None
    found = asdict(estimate(*zip(*scored, strict=True)))
    return {key: value if key == "n" else value * top for key, value in found.items()}


def _mean_recall(rows: Sequence[SampleRow]) -> dict[str, float] | None:
    known = [(row["recall"], picture_of_row(row)) for row in rows if row["recall"] is not None]
    return asdict(estimate(*zip(*known, strict=True))) if known else None


def _mean_spread(rows: Sequence[SampleRow], name: SpreadName) -> dict[str, float] | None:
    known = [(value, picture_of_row(row)) for row in rows if (value := row.get(name)) is not None]
    return asdict(estimate(*zip(*known, strict=True))) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _count_spread(counts: Sequence[int]) -> dict[str, float]:
    return {"mean": sum(counts) / len(counts), "min": min(counts), "max": max(counts)}


@dataclass(frozen=True)
class RunGroup:
    """One job, or the finished jobs of one config with several seeds."""

    folders: tuple[Path, ...]
    results: tuple[Result, ...]

    @property
    def result(self) -> Result:
        """The first one, for all that they have in common."""
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
    """All jobs, in their order; an unfinished job is a group of its own, so that its failure is shown."""
    groups: dict[str, list[Path]] = {}
    for folder, result in results.items():
        groups.setdefault(_key(result) if result["status"] == "ok" else folder.name, []).append(folder)
    systems = []
    for members in groups.values():
        seeds = {folder: seed_of(results[folder]) for folder in members}
        folders = sorted(members, key=lambda folder: (len(seeds[folder]), seeds[folder], folder.name))
        # The same seed twice is not a second training but the same job under another name.
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


def merge_shards(study: Path) -> None:
    """Writes the merged job of every complete set of shards that has changed; call it under the table's lock."""
    sets: dict[str, dict[int, tuple[Path, Result]]] = defaultdict(dict)
    for path in sorted(study.glob(f"*/{RESULT}")):
        result = read_result(path.parent)
        if result is None or result["verb"] != "eval" or result["config"].get("shards", 1) == 1:
            continue
        sets[_set_key(result)][result["config"]["shard"]] = (path.parent, result)
    for parts in sets.values():
        ordered = [parts[number] for number in sorted(parts)]
        if len(ordered) == ordered[0][1]["config"]["shards"] and all(r["status"] == "ok" for _, r in ordered):
            names = [folder.name for folder, _ in ordered]
            _merge_set(study / merged_name(names, ordered[0][1]["overrides"], study), ordered)


def _merge_set(folder: Path, parts: Sequence[tuple[Path, Result]]) -> None:
    results = [result for _, result in parts]
    stamps = [result["times"]["finished"] for result in results]
    before = read_result(folder)
    if before is not None and before["times"].get("shards_finished") == stamps:
        return
    if len(weights := {result["model"]["weights"] for result in results}) > 1:
        raise UserError(
            f"{folder.name}: its shards were answered with different weights ({', '.join(sorted(weights))})"
        )
    rows = _in_order([read_rows(part / SAMPLES) for part, _ in parts])
    drop_partial_digests(rows)
    config = {**results[0]["config"], "shard": 0, "shards": 1}
    overrides = [word for word in results[0]["overrides"] if override_key(word) != "shard"]
    command = re.sub(r"shard=\d+", f"shard={','.join(map(str, range(len(parts))))}", results[0]["command"])
    remove_path(folder)
    summary = summarise(rows, tuple(results[0]["quality"]["metrics"]))
    write_samples(folder / SAMPLES, rows)
    for part, _ in parts:
        for file in (part / SHOTS).glob("*"):
            (folder / SHOTS).mkdir(exist_ok=True)
            shutil.copy2(file, folder / SHOTS)
    write_json(
        folder / RESULT,
        {
            **results[0],
            "job": folder.name,
            "command": command.replace("eval.py", "eval.py -m", 1),
            "overrides": overrides,
            "config": config,
            "config_hash": config_hash(config),
            "shards": [part.name for part, _ in parts],
            "data": {**results[0]["data"], "n": len(rows), "ids": ids_hash(row["id"] for row in rows)},
            **summary,
            "times": _merge_times([result["times"] for result in results], stamps),
        },
    )


def _in_order(parts: Sequence[Sequence[SampleRow]]) -> list[SampleRow]:
    """Rows of shards in the order of the dataset: shard s holds the samples s, s + shards, s + 2 shards, ..."""
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def _merge_times(times: Sequence[Mapping[str, Any]], stamps: Sequence[str]) -> dict[str, Any]:
    stages = {stage for part in times for stage in part["ms_per_sample"]}
    return {
        "started": min(part["started"] for part in times),
        "finished": max(stamps),
        "shards_finished": list(stamps),
        "wall_s": sum(part["wall_s"] for part in times),
        "ms_per_sample": {s: statistics.median(part["ms_per_sample"].get(s, 0.0) for part in times) for s in stages},
        "batches_timed": sum(part["batches_timed"] for part in times),
        "peak_memory_mib": max((peak for part in times if (peak := part["peak_memory_mib"]) is not None), default=None),
    }


def _set_key(result: Result) -> str:
    """What all shards of a set share."""
    return config_hash({**result["config"], "shard": 0})
