"""Shards: jobs that answered parts of one dataset become one job."""

import json
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from experiments.analysis.aggregate import score_corpora, summarise
from experiments.analysis.study import read_study
from experiments.analysis.systems import Result
from experiments.atomic_files import remove_path, replacing, write_json
from experiments.data.sample import ids_hash
from experiments.errors import leave_out
from experiments.job_names import merged_name, override_key
from experiments.jobs.results import RESULT, SAMPLES, SHOTS, config_hash, read_result
from experiments.jobs.sample_rows import (
    SampleColumns,
    digests_of,
    read_columns,
    read_facts,
    read_tables,
    write_tables,
)
from experiments.metrics.answers import text_metrics
from shirg import UserError


def merge_shards(study: Path) -> None:
    """Writes the merged job of every complete set of shards that has changed; call it under the table's lock."""
    sets: dict[str, dict[int, tuple[Path, Result]]] = defaultdict(dict)
    for folder, result in read_study(study).items():
        if result["verb"] == "eval" and result["config"].get("shards", 1) > 1:
            sets[_set_key(result)][result["config"]["shard"]] = (folder, result)
    for parts in sets.values():
        ordered = [parts[number] for number in sorted(parts)]
        if len(ordered) == ordered[0][1]["config"]["shards"] and all(r["status"] == "ok" for _, r in ordered):
            names = [folder.name for folder, _ in ordered]
            merged = study / merged_name(names, ordered[0][1]["overrides"], study)
            try:
                _merge_set(merged, ordered)
            except UserError as error:
                leave_out(merged, error)


def _merge_set(folder: Path, parts: Sequence[tuple[Path, Result]]) -> None:
    results = [result for _, result in parts]
    stamps = [result["times"]["finished"] for result in results]
    before = read_result(folder)
    if before is not None and before["times"].get("shards_finished") == stamps:
        return
    if len(weights := {result["model"]["weights"] for result in results}) > 1:
        raise UserError(f"its shards were answered with different weights ({', '.join(sorted(weights))})")
    if len({json.dumps(result["data"].get("drawn")) for result in results}) > 1:
        raise UserError("the data has changed between its shards; run all of them again with overwrite=true")
    config = {**results[0]["config"], "shard": 0, "shards": 1}
    overrides = [word for word in results[0]["overrides"] if override_key(word) != "shard"]
    command = re.sub(r"shard=\d+", f"shard={','.join(map(str, range(len(parts))))}", results[0]["command"])
    remove_path(folder)
    metrics = tuple(results[0]["quality"]["metrics"])
    tables, corpora = score_corpora(_Interleaved([part / SAMPLES for part, _ in parts]), text_metrics(metrics))
    with replacing(folder / SAMPLES) as target:
        write_tables(target, tables)
    rows = SampleColumns(folder / SAMPLES)
    summary = summarise(rows, metrics, corpora)
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
            "data": {
                **{key: value for key, value in results[0]["data"].items() if key != "drawn"},
                "n": len(rows),
                "ids": ids_hash(row["id"] for row in read_columns(rows.path, ["id"])),
                "digests": digests_of(read_facts(rows.path)),
            },
            **summary,
            "times": _merge_times([result["times"] for result in results], stamps),
        },
    )


@dataclass(frozen=True)
class _Interleaved:
    """The rows of shards in the order of the dataset: shard s holds the samples s, s + shards, s + 2 shards, ..."""

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[pa.Table]:
        for parts in zip_longest(*map(read_tables, self.paths)):
            blocks = [part for part in parts if part is not None]
            row = np.concatenate([np.arange(len(block)) for block in blocks])
            yield pa.concat_tables(blocks, promote_options="default").take(np.argsort(row, kind="stable"))


def _merge_times(times: Sequence[Mapping[str, Any]], stamps: Sequence[str]) -> dict[str, Any]:
    stages = {stage for part in times for stage in part["ms_per_sample"]}
    return {
        "started": min(part["started"] for part in times),
        "finished": max(stamps),
        "shards_finished": list(stamps),
        "wall_s": sum(part["wall_s"] for part in times),
        "ms_per_sample": {s: statistics.median(part["ms_per_sample"].get(s, 0.0) for part in times) for s in stages},
        "waited": max((share for part in times if (share := part.get("waited")) is not None), default=None),
        "batches_timed": sum(part["batches_timed"] for part in times),
        "peak_memory_mib": max((peak for part in times if (peak := part["peak_memory_mib"]) is not None), default=None),
    }


def _set_key(result: Result) -> str:
    """What all shards of a set share."""
    return config_hash({**result["config"], "shard": 0})
