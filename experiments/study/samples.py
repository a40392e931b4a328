"""`samples.parquet`: one row per answered sample, so that anybody can look, compare or score again."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.study.files import write_atomic

_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "picture": pa.string(),
    "question": pa.string(),
    "prompt": pa.string(),
    "answers": pa.list_(pa.string()),
    "prediction": pa.string(),
    "subtask": pa.string(),
    "group": pa.string(),
    "density": pa.string(),
    "n_visual": pa.int32(),
    "n_prefix": pa.int32(),
    "n_cache": pa.int32(),
    "kept": pa.list_(pa.int32()),
    "recall": pa.float64(),
    "batch": pa.int32(),
}


def write_samples(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes all rows at once; scores, token counts by source and times become columns `score_*`, `n_*` and `ms_*`.

    Times are those of the sample's batch, shared out equally: the only columns in which two runs differ.
    """
    flat = [_flatten(row) for row in rows]
    kinds = {"score": pa.float64(), "ms": pa.float64(), "n": pa.int32()}
    extra = {name: kinds[name.partition("_")[0]] for row in flat for name in row if name not in _COLUMNS}
    schema = pa.schema([*_COLUMNS.items(), *extra.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(flat, schema=schema), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


@dataclass(frozen=True)
class Score:
    value: float
    picture: str
    group: str


def read_scores(path: Path, metric: str) -> dict[str, Score]:
    """Scores by sample id; samples without one are left out."""
    columns = pq.read_table(path, columns=["id", f"score_{metric}", "picture", "group"]).to_pydict().values()
    return {i: Score(*fields) for i, *fields in zip(*columns, strict=True) if fields[0] is not None}


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat = {key: row[key] for key in _COLUMNS}
    flat |= {f"score_{name}": score for name, score in row["scores"].items()}
    flat |= {f"n_{source}": count for source, count in row["sources"].items()}
    return flat | {f"ms_{stage}": ms for stage, ms in row["ms"].items()}
