"""One dataset, answered by several jobs: `shards=4 shard=0,1,2,3`.

When all of them are there, they become one more job of the study, as if one job had answered everything: the same
samples in the same order, so the same scores, intervals and differences. Its times are medians over the shards.
"""

import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.data.limit import ids_hash
from experiments.study.files import remove_path, write_json
from experiments.study.record import RESULT, SAMPLES, config_hash, read_result
from experiments.study.samples import read_rows, write_samples
from experiments.study.summary import summarise

SHOTS = "shots"
StoredResult = dict[str, Any]


def merge_shards(study: Path) -> None:
    """Writes the merged job of every complete set of shards that has changed; call it under the table's lock."""
    sets: dict[str, dict[int, tuple[Path, StoredResult]]] = defaultdict(dict)
    for path in sorted(study.glob(f"*/{RESULT}")):
        result = read_result(path.parent)
        if result is None or result["verb"] != "eval" or result["config"].get("shards", 1) == 1:
            continue
        sets[_set_key(result)][result["config"]["shard"]] = (path.parent, result)
    for parts in sets.values():
        ordered = [parts[number] for number in sorted(parts)]
        if len(ordered) == ordered[0][1]["config"]["shards"] and all(r["status"] == "ok" for _, r in ordered):
            _merge_set(study / _merged_name(ordered[0][0].name), ordered)


def _merge_set(folder: Path, parts: Sequence[tuple[Path, StoredResult]]) -> None:
    results = [result for _, result in parts]
    stamps = [result["times"]["finished"] for result in results]
    before = read_result(folder)
    if before is not None and before["times"].get("shards_finished") == stamps:
        return
    if len(weights := {result["model"]["weights"] for result in results}) > 1:
        raise ValueError(
            f"{folder.name}: its shards were answered with different weights ({', '.join(sorted(weights))})"
        )
    rows = _in_order([read_rows(part / SAMPLES) for part, _ in parts])
    config = {**results[0]["config"], "shard": 0, "shards": 1}
    overrides = [word for word in results[0]["overrides"] if word.partition("=")[0] != "shard"]
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


def _in_order(parts: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of shards in the order of the dataset: shard s holds the samples s, s + shards, s + 2 shards, ..."""
    total = sum(map(len, parts))
    return [dict(parts[i % len(parts)][i // len(parts)]) for i in range(total)]


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


def _set_key(result: StoredResult) -> str:
    """What all shards of a set share."""
    return config_hash({**result["config"], "shard": 0})


def _merged_name(job: str) -> str:
    return re.sub(r"_shard-\d+", "", job)
