"""`samples.parquet`: one row per answered sample, so that anybody can look, compare or score again."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.study.files import write_atomic

RECALL = "recall"
_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "picture": pa.string(),
    "question": pa.string(),
    "prompt": pa.string(),
    "answers": pa.list_(pa.string()),
    "target": pa.string(),
    "prediction": pa.string(),
    "subtask": pa.string(),
    "group": pa.string(),
    "density": pa.string(),
    "place": pa.string(),
    "entity": pa.string(),
    "n_visual": pa.int32(),
    "n_prefix": pa.int32(),
    "n_cache": pa.int32(),
    "kept": pa.list_(pa.int32()),
    "n_steps": pa.int32(),
    "cache_bytes": pa.float64(),
    "drift": pa.float64(),
    "same_top1": pa.float64(),
    RECALL: pa.float64(),
    "batch": pa.int32(),
}


def write_samples(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes all rows at once."""
    write_atomic(path, encode_samples(rows))


def encode_samples(rows: Sequence[dict[str, Any]]) -> bytes:
    """A parquet file of the rows; scores, token counts by source and times are columns `score_*`, `n_*` and `ms_*`.

    Times are those of the sample's batch, shared out equally: the only columns in which two runs differ.
    """
    flat = [_flatten(row) for row in rows]
    kinds = {"score": pa.float64(), "ms": pa.float64(), "n": pa.int32()}
    extra = {name: kinds[name.partition("_")[0]] for row in flat for name in row if name not in _COLUMNS}
    schema = pa.schema([*_COLUMNS.items(), *extra.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(flat, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_samples` wrote."""
    return [_unflatten(flat) for flat in pq.read_table(path).to_pylist()]


@dataclass(frozen=True)
class Score:
    value: float
    picture: str
    group: str
    density: str

    @property
    def subset(self) -> str:
        """The column of the table that the sample counts in, "" when its dataset names no groups."""
        return subset_name(self.group, self.density)


def subset_name(group: str, density: str) -> str:
    return " ".join(filter(None, (group, density)))


def read_scores(path: Path, metric: str) -> dict[str, Score]:
    """Scores by sample id, or with metric="recall" the share of evidence kept; samples without one are left out."""
    column = metric if metric == RECALL else f"score_{metric}"
    columns = pq.read_table(path, columns=["id", column, "picture", "group", "density"]).to_pydict().values()
    return {i: Score(*fields) for i, *fields in zip(*columns, strict=True) if fields[0] is not None}


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat = {key: row.get(key) for key in _COLUMNS}
    flat |= {f"score_{name}": score for name, score in row["scores"].items()}
    flat |= {f"n_{source}": count for source, count in row["sources"].items()}
    return flat | {f"ms_{stage}": ms for stage, ms in row["ms"].items()}


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    row = {key: flat[key] for key in _COLUMNS}
    for part, kind in (("scores", "score_"), ("sources", "n_"), ("ms", "ms_")):
        row[part] = {key.removeprefix(kind): flat[key] for key in flat if key.startswith(kind) and key not in _COLUMNS}
    return row
