"""samples.parquet: one row for each sample, what it is and how it was answered."""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.atomic_files import replacing, write_atomic


class SampleFacts(TypedDict):
    """What a dataset says about a sample; plain JSON."""

    id: str
    picture: str
    """The dataset's name for the picture."""
    question: str
    prompt: str
    answers: list[str]
    target: str
    subtask: str
    group: str
    density: str
    place: str
    entity: str
    boxes: NotRequired[list[list[float]] | None]
    """This and the next two are missing in studies from before they existed."""
    history: NotRequired[list[str] | None]
    picture_bytes: NotRequired[int | None]
    """Size of the picture's file, where it has one of its own."""


class SampleRow(SampleFacts):
    """One answer, as inference makes it and samples.parquet keeps it; plain JSON."""

    prediction: str
    """The answer that is scored."""
    text: NotRequired[str | None]
    """The whole text that the answer was taken from. This and the next two are missing in studies from before."""
    has_final: NotRequired[bool | None]
    """Whether the text had an answer where `data.answer_rule` looks; None for a rule that always finds one."""
    gaps: NotRequired[list[str] | None]
    """What the gaps of the sample's draft got."""
    picture_digest: NotRequired[str | None]
    """Which picture it is, by its content; missing in studies from before it existed."""
    n_visual: int
    """Vision tokens of the prompt."""
    n_prefix: int
    """All tokens of the prompt."""
    n_cache: int | None
    """Vision tokens left in a cache that was shortened; the mean over layers, if these differ."""
    kept: list[int]
    """Source tokens that were kept."""
    n_steps: int
    """Denoising steps."""
    cache_bytes: float | None
    drift: float | None
    """Largest |difference| of a logit that a smaller cache makes."""
    same_top1: float | None
    """Share of answer slots whose likeliest token stays the same with a smaller cache."""
    recall: float | None
    """Share of the evidence's tokens that were kept."""
    n_valid: NotRequired[int | None]
    """Source tokens that are not padding. This and the next three are missing in studies from before they existed."""
    coverage: NotRequired[float | None]
    """Share of the picture's regions that hold a kept token."""
    gini: NotRequired[float | None]
    """Gini coefficient of the share that is kept of each region."""
    kept_map: NotRequired[list[float | None] | None]
    """Share that is kept of each of 8 x 8 fields of the picture."""
    scores: dict[str, float | None]
    """By metric."""
    sources: dict[str, int]
    """Tokens by where they come from."""
    batch: NotRequired[int]
    """Number of the batch, which the evaluation adds; likewise the times."""
    ms: NotRequired[dict[str, float]]
    """Milliseconds by stage: the batch's, shared out equally."""


RECALL = "recall"
SpreadName = Literal["coverage", "gini"]
SPREADS: tuple[SpreadName, ...] = ("coverage", "gini")
"""Statistics of what is kept that every sample has; older studies do not have them."""
_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "picture": pa.string(),
    "picture_digest": pa.string(),
    "picture_bytes": pa.int64(),
    "question": pa.string(),
    "prompt": pa.string(),
    "answers": pa.list_(pa.string()),
    "target": pa.string(),
    "prediction": pa.string(),
    "text": pa.string(),
    "has_final": pa.bool_(),
    "gaps": pa.list_(pa.string()),
    "subtask": pa.string(),
    "group": pa.string(),
    "density": pa.string(),
    "place": pa.string(),
    "entity": pa.string(),
    "boxes": pa.list_(pa.list_(pa.float64())),
    "history": pa.list_(pa.string()),
    "n_visual": pa.int32(),
    "n_prefix": pa.int32(),
    "n_cache": pa.int32(),
    "kept": pa.list_(pa.int32()),
    "n_steps": pa.int32(),
    "cache_bytes": pa.float64(),
    "drift": pa.float64(),
    "same_top1": pa.float64(),
    RECALL: pa.float64(),
    "n_valid": pa.int32(),
    "coverage": pa.float64(),
    "gini": pa.float64(),
    "kept_map": pa.list_(pa.float64()),
    "batch": pa.int32(),
}


_ROW_GROUP = 1024


def write_samples(path: Path, rows: Sequence[SampleRow]) -> None:
    """Writes all rows at once."""
    write_atomic(path, encode_samples(rows))


def encode_samples(rows: Sequence[SampleRow]) -> bytes:
    """A parquet file of the rows; scores, token counts by source and times are columns `score_*`, `n_*` and `ms_*`.

    Times are those of the sample's batch, shared out equally: the only columns in which two runs differ.
    """
    flat = [_flatten(row) for row in rows]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(flat, schema=_schema(rows)), buffer, compression="zstd")
    return buffer.getvalue()


def stream_samples(path: Path, rows: Sequence[SampleRow], kept: Iterable[Sequence[int]]) -> None:
    """Writes rows whose kept tokens come one by one: they are most of a row, and need not all be in memory."""
    schema = _schema(rows)
    whole = (cast(SampleRow, {**row, "kept": tokens}) for row, tokens in zip(rows, kept, strict=True))
    with replacing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while part := [_flatten(row) for row in islice(whole, _ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _schema(rows: Sequence[SampleRow]) -> pa.Schema:
    kinds = {"score": pa.float64(), "n": pa.int32(), "ms": pa.float64()}
    extra = {
        f"{kind}_{name}": kinds[kind]
        for row in rows
        for kind, names in (("score", row["scores"]), ("n", row["sources"]), ("ms", row["ms"]))
        for name in names
    }
    return pa.schema([*_COLUMNS.items(), *extra.items()])


def read_rows(path: Path) -> list[SampleRow]:
    """The rows that `write_samples` wrote."""
    return [_unflatten(flat) for flat in pq.read_table(path).to_pylist()]


def picture_of_row(row: Mapping[str, Any]) -> str:
    """Which picture a row is about: rows that share it are resampled together."""
    return str(row.get("picture_digest") or row["picture"])


def drop_partial_digests(rows: Sequence[SampleRow]) -> None:
    """Leaves the names of pictures alone where some rows are from before digests: one picture must not become two."""
    if not all(row.get("picture_digest") for row in rows):
        for row in rows:
            row["picture_digest"] = None


def read_facts(path: Path) -> list[dict[str, Any]]:
    """What the rows say about their samples, without what was answered."""
    wanted = {*SampleFacts.__annotations__, "picture_digest"}
    rows: list[dict[str, Any]] = pq.read_table(
        path, columns=[name for name in pq.read_schema(path).names if name in wanted]
    ).to_pylist()
    return rows


_TEXTS = ("id", "question", "prompt", "answers", "target", "subtask", "group", "density")
_LATER = {"pictures": "picture_digest", "boxes": "boxes", "history": "history"}
"""Facts that rows of older studies do not have."""


def digests_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Identifies what was answered: 16 hex digits for each kind of fact, None for one that some row does not have."""
    found: dict[str, str | None] = {"texts": _digest([[row[name] for name in _TEXTS] for row in rows])}
    for kind, name in _LATER.items():
        values = [row.get(name) for row in rows]
        found[kind] = None if None in values else _digest(values)
    return found


def _digest(values: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


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
    """Scores by sample id; samples without one are left out.

    Args:
        metric: one of answers, or "recall", "coverage", "gini" for what was kept.
    """
    column = metric if metric in (RECALL, *SPREADS) else f"score_{metric}"
    there = pq.read_schema(path).names
    if metric in SPREADS and column not in there:
        return {}
    table = pq.read_table(path, columns=["id", column, picture_column(path), "group", "density"])
    columns = table.to_pydict().values()
    return {i: Score(*fields) for i, *fields in zip(*columns, strict=True) if fields[0] is not None}


def picture_column(path: Path) -> str:
    """The column of samples.parquet that tells which picture a row is about; see `picture_of_row`."""
    file = pq.ParquetFile(path)
    if "picture_digest" not in file.schema_arrow.names:
        return "picture"
    return "picture" if file.read(columns=["picture_digest"])["picture_digest"].null_count else "picture_digest"


def _flatten(row: SampleRow) -> dict[str, Any]:
    flat = {key: row.get(key) for key in _COLUMNS}
    flat |= {f"score_{name}": score for name, score in row["scores"].items()}
    flat |= {f"n_{source}": count for source, count in row["sources"].items()}
    return flat | {f"ms_{stage}": ms for stage, ms in row["ms"].items()}


def _unflatten(flat: Mapping[str, Any]) -> SampleRow:
    row: dict[str, Any] = {key: flat.get(key) for key in _COLUMNS}
    for part, kind in (("scores", "score_"), ("sources", "n_"), ("ms", "ms_")):
        row[part] = {key.removeprefix(kind): flat[key] for key in flat if key.startswith(kind) and key not in _COLUMNS}
    return cast(SampleRow, row)
