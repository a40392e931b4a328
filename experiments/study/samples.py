"""`samples.parquet`: one row per answered sample, so that anybody can look, compare or score again."""

import io
from collections.abc import Sequence
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
    "kept": pa.list_(pa.int32()),
    "recall": pa.float64(),
    "batch": pa.int32(),
}


def write_samples(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes all rows at once; scores and token counts by source become columns `score_*` and `n_*`."""
    flat = [_flatten(row) for row in rows]
    extra = {
        name: pa.float64() if name.startswith("score_") else pa.int32() for name in flat[0] if name not in _COLUMNS
    }
    schema = pa.schema([*_COLUMNS.items(), *extra.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(flat, schema=schema), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def read_scores(path: Path, metric: str) -> tuple[dict[str, float], dict[str, str]]:
    """Score by sample id, and the picture of each id."""
    columns = pq.read_table(path, columns=["id", "picture", f"score_{metric}"]).to_pydict()
    triples = zip(columns["id"], columns["picture"], columns[f"score_{metric}"], strict=True)
    known = [(i, picture, score) for i, picture, score in triples if score is not None]
    return {i: score for i, _, score in known}, {i: picture for i, picture, _ in known}


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat = {key: row[key] for key in _COLUMNS}
    flat |= {f"score_{name}": score for name, score in row["scores"].items()}
    return flat | {f"n_{source}": count for source, count in row["sources"].items()}
