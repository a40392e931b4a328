"""samples.parquet: one row for each sample, what it is and how it was answered."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


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
    draft: NotRequired[str | None]
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
    """Vision tokens left in a cache that was shortened; the mean over layers, if these differ. All of `n_visual` where
    the answer was complete before the cut."""
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
    "draft": pa.string(),
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


ROW_GROUP = 1024
"""Rows that are written and read together: more are more memory at once, fewer more facts about groups in memory."""
_EXTRA = {"score_": pa.float64(), "n_": pa.int32(), "ms_": pa.float64()}
"""Columns of which every job has its own: scores by metric, token counts by source, times by stage."""


def table_of(rows: Sequence[SampleRow]) -> pa.Table:
    """The rows as columns of samples.parquet; scores, token counts by source and times are `score_*`, `n_*`, `ms_*`.

    Times are those of the sample's batch, shared out equally: the only columns in which two runs differ.

    Raises:
        pa.ArrowException, ValueError, KeyError, TypeError, AttributeError: rows that were read from a damaged file.
    """
    flat = [_flatten(row) for row in rows]
    return pa.Table.from_pylist(flat, schema=schema_of(name for row in flat for name in row))


def schema_of(names: Iterable[str]) -> pa.Schema:
    """The schema of samples.parquet with these columns of its own, and those that every job has."""
    own = [name for name in dict.fromkeys(names) if name not in _COLUMNS]
    extra = [(name, kind) for prefix, kind in _EXTRA.items() for name in own if name.startswith(prefix)]
    return pa.schema([*_COLUMNS.items(), *extra])


def conform(table: pa.Table, schema: pa.Schema, dropped: Collection[str] = ()) -> pa.Table:
    """The columns of the schema, nulls in those that the table does not have or that are dropped."""
    if table.schema == schema and not dropped:
        return table.replace_schema_metadata()
    there = set(table.column_names) - set(dropped)
    columns = [table[f.name].cast(f.type) if f.name in there else pa.nulls(len(table), f.type) for f in schema]
    return pa.table(columns, schema=schema)


def write_tables(file: BinaryIO, tables: Iterable[pa.Table]) -> None:
    """Writes samples.parquet from its rows in parts.

    One picture must not become two: where some rows are from before pictures had digests, none keeps its own.

    Args:
        tables: can be iterated twice; columns that only some of them have are filled with nulls.
    """
    names: dict[str, None] = {}
    digests = True
    for table in tables:
        names |= dict.fromkeys(table.column_names)
        digests = digests and "picture_digest" in table.column_names and not table["picture_digest"].null_count
    schema, dropped = schema_of(names), () if digests else ("picture_digest",)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _in_blocks(conform(table, schema, dropped) for table in tables):
            writer.write_table(group)
            # What the writer keeps of each group lies between what it frees, which would stay with the process.
            pa.default_memory_pool().release_unused()


def _in_blocks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, `ROW_GROUP` of them in each table but the last."""
    held: list[pa.Table] = []
    n_rows = 0
    for table in tables:
        held.append(table)
        n_rows += len(table)
        while n_rows >= ROW_GROUP:
            whole = pa.concat_tables(held)
            yield whole.slice(0, ROW_GROUP)
            held, n_rows = [whole.slice(ROW_GROUP)], n_rows - ROW_GROUP
    if n_rows:
        yield pa.concat_tables(held)


def read_tables(path: Path, columns: Collection[str] | None = None) -> Iterator[pa.Table]:
    """The rows of samples.parquet in blocks, with those of the columns that it has; all columns if None are given."""
    return _blocks_of(_open(path), columns)


def _open(path: Path) -> pq.ParquetFile:
    """Without reading ahead, which would bring the chosen columns of the whole file into memory at once."""
    return pq.ParquetFile(path, pre_buffer=False)


def _blocks_of(file: pq.ParquetFile, columns: Collection[str] | None) -> Iterator[pa.Table]:
    there = [name for name in file.schema_arrow.names if columns is None or name in columns]
    for batch in file.iter_batches(ROW_GROUP, columns=there, use_threads=False):
        yield pa.Table.from_batches([batch])


def read_columns(path: Path, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """Row by row the values of those columns that the file has."""
    for table in read_tables(path, columns):
        yield from table.to_pylist()


def read_rows(path: Path) -> list[SampleRow]:
    """All rows of samples.parquet, in memory."""
    return [_unflatten(flat) for table in read_tables(path) for flat in table.to_pylist()]


class SampleColumns:
    """The columns of samples.parquet, read one at a time: what a job of any size keeps in memory is one of them.

    What the file says about its groups of rows is read once, for all that is read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        self.names: list[str] = self._file.schema_arrow.names
        own = [name for name in self.names if name not in _COLUMNS]
        self.sources = [name.removeprefix("n_") for name in own if name.startswith("n_")]
        self.stages = [name.removeprefix("ms_") for name in own if name.startswith("ms_")]

    def __len__(self) -> int:
        n: int = self._file.metadata.num_rows
        return n

    def known(self, name: str) -> np.ndarray:
        """The values that are not null."""
        return np.asarray(self._read(name).drop_null())

    def is_known(self, name: str) -> np.ndarray:
        """bool: which rows have a value."""
        return np.asarray(self._read(name).is_valid())

    def numbers(self, name: str) -> np.ndarray:
        """float64, 0 where there is no value."""
        return np.asarray(self._read(name).cast(pa.float64()).fill_null(0.0))

    def coded(self, name: str) -> tuple[np.ndarray, list[str]]:
        """The number of each row's text, and the texts in the order of their first rows."""
        numbers, texts = self._encoded(name)
        return numbers, texts.to_pylist()

    def pictures(self) -> np.ndarray:
        """Which picture each row is about: rows that share a number are resampled together."""
        return self._encoded(_picture_column(self._file))[0]

    def tables(self, columns: Collection[str]) -> Iterator[pa.Table]:
        """The rows in blocks, as `read_tables` does."""
        return _blocks_of(self._file, columns)

    def _encoded(self, name: str) -> tuple[np.ndarray, pa.Array]:
        """The number of each row's text, and the texts; null counts as an empty one."""
        blocks = [chunk.fill_null("").dictionary_encode() for chunk in self._chunks(name)]
        encoded = pa.chunked_array(blocks, pa.dictionary(pa.int32(), pa.string())).unify_dictionaries().combine_chunks()
        return np.asarray(encoded.indices), encoded.dictionary

    def _read(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array(self._chunks(name), _type_of(name))

    def _chunks(self, name: str) -> Iterator[pa.Array]:
        if name not in self.names:
            yield pa.nulls(len(self), _type_of(name))
        else:
            for block in self.tables([name]):
                yield from block[name].chunks


def check_types(schema: pa.Schema) -> None:
    """Raises ValueError for rows that are not those of samples.parquet; columns may be missing."""
    for field in schema:
        if field.type != _type_of(field.name):
            raise ValueError(f"column {field.name} has type {field.type}")


def _type_of(name: str) -> pa.DataType:
    extra = (kind for prefix, kind in _EXTRA.items() if name.startswith(prefix))
    return _COLUMNS.get(name) or next(extra, pa.null())


def picture_of_row(row: Mapping[str, Any]) -> str:
    """Which picture a row is about: rows that share it are resampled together."""
    return str(row.get("picture_digest") or row["picture"])


FACTS = (*SampleFacts.__annotations__, "picture_digest")
"""Columns that say what a sample is, not what was answered."""


def read_facts(path: Path) -> Iterator[dict[str, Any]]:
    """What the rows say about their samples, one by one."""
    return read_columns(path, FACTS)


_TEXTS = ("id", "question", "prompt", "answers", "target", "subtask", "group", "density")
_LATER = {"pictures": "picture_digest", "boxes": "boxes", "history": "history", "drafts": "draft"}
"""Facts that rows of older studies do not have."""


def digests_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str | None]:
    """Identifies what was answered: 16 hex digits for each kind of fact, None for one that some row does not have."""
    digests = {kind: hashlib.sha256() for kind in ("texts", *_LATER)}
    unknown = set()
    for row in rows:
        facts = {"texts": [row[name] for name in _TEXTS]} | {kind: row.get(name) for kind, name in _LATER.items()}
        for kind, value in facts.items():
            digests[kind].update(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        unknown |= {kind for kind, value in facts.items() if value is None}
    return {kind: None if kind in unknown else digest.hexdigest()[:16] for kind, digest in digests.items()}


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
    return _picture_column(_open(path))


def _picture_column(file: pq.ParquetFile) -> str:
    if "picture_digest" not in file.schema_arrow.names:
        return "picture"
    unknown = any(block["picture_digest"].null_count for block in _blocks_of(file, ["picture_digest"]))
    return "picture" if unknown else "picture_digest"


def _flatten(row: SampleRow) -> dict[str, Any]:
    flat = {key: row.get(key) for key in _COLUMNS}
    flat |= {f"score_{name}": score for name, score in row["scores"].items()}
    flat |= {f"n_{source}": count for source, count in row["sources"].items()}
    return flat | {f"ms_{stage}": ms for stage, ms in row.get("ms", {}).items()}


def _unflatten(flat: Mapping[str, Any]) -> SampleRow:
    row: dict[str, Any] = {key: flat.get(key) for key in _COLUMNS}
    for part, kind in (("scores", "score_"), ("sources", "n_"), ("ms", "ms_")):
        row[part] = {key.removeprefix(kind): flat[key] for key in flat if key.startswith(kind) and key not in _COLUMNS}
    return cast(SampleRow, row)
