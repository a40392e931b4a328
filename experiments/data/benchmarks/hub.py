"""`source=hub`: parquet tables of a dataset repository, on the hub or in a folder of the same form.

With `streaming` the small columns are read first, and the pictures by row groups when they are needed, so that eight
samples do not cost seven gigabytes. Without it `datasets` downloads the whole split and caches it, which also works for
a machine that has no network later.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from huggingface_hub import HfFileSystem
from PIL import Image

from experiments.data.benchmarks.official_files import Raw
from experiments.data.image_io import PictureFile, read_picture
from shirg import MissingFileError, UserError

PICTURE = "image"
ALIASES = {"val": "validation", "validation": "val"}
"""Both names are in use for the same split."""


@dataclass(frozen=True)
class Candidate:
    """A dataset repository: an id of the hub or a folder."""

    id: str
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Found:
    """The repository and the split that are read."""

    candidate: Candidate
    split: str
    builder: Any
    """`datasets.DatasetBuilder`."""

    @property
    def name(self) -> str:
        return f"{self.candidate.id} ({self.split})"

    @property
    def files(self) -> list[str]:
        """The split's files: addresses of the hub or paths."""
        return [str(url) for url in (self.builder.config.data_files or {}).get(self.split, [])]

    @property
    def revision(self) -> str:
        """The commit of a hub repository; "" for a folder."""
        commit = re.search(r"@([0-9a-f]{40})/", "".join(self.files[:1]))
        return commit[1] if commit else ""


def candidates(hub: Any) -> list[Candidate]:
    """From the config: an id, a mapping with id, config and revision, or a list of those."""
    entries = [hub] if isinstance(hub, str | Mapping) else list(hub)
    found = []
    for entry in entries:
        fields = {"id": entry} if isinstance(entry, str) else dict(entry)
        if "id" not in fields or fields.keys() - {"id", "config", "revision"}:
            raise UserError(f"data.hub: {entry} must be an id, or have an id and, if needed, a config and a revision")
        found.append(Candidate(**fields))
    return found


def find(tried: Sequence[Candidate], split: str) -> Found:
    """The first candidate that can be read and has the split; prints which ones were passed over.

    Raises:
        MissingFileError: none can be read.
        UserError: those that can be read have no such split.
    """
    reasons: dict[str, list[str]] = {}
    splits = []
    for candidate in tried:
        try:
            builder = datasets.load_dataset_builder(candidate.id, name=candidate.config, revision=candidate.revision)
        except (OSError, ValueError, DatasetsError) as error:
            reason = _sentence(error).replace(f"'{candidate.id}'", "it")
            reasons.setdefault(reason, []).append(candidate.id)
            continue
        offered = [str(s) for s in (builder.config.data_files or builder.info.splits or {})]
        name = next((s for s in (split, ALIASES.get(split)) if s in offered), None)
        if name is None:
            splits.append(f"{candidate.id} has {', '.join(offered)}")
            continue
        for passed_over in (*_list(reasons), *splits):
            print(f"data  passed over {passed_over}")
        return Found(candidate, name, builder)
    if splits:
        raise UserError(f"data.split={split} does not exist: {'; '.join(splits)}")
    raise MissingFileError(
        f"no dataset can be read ({'; '.join(_list(reasons)) or 'data.hub is empty'}): give another data.hub=ID, or "
        "data.source=disk or folder with data.root=DIR"
    )


def _list(reasons: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{', '.join(ids)}: {reason}" for reason, ids in reasons.items()]


def read_hub(found: Found, columns: frozenset[str], streaming: bool) -> list[Raw]:
    """Every row of the split, without its picture."""
    # A folder is read in place: `datasets` would copy it, and confuses folders of the same name.
    in_place = os.path.isdir(found.candidate.id)
    if not (streaming or in_place):
        return _download(found, columns)
    if not all(url.endswith(".parquet") for url in found.files):
        raise UserError(
            f"{found.name} is not kept as parquet"
            + (
                "; convert it, or use data.source=folder"
                if in_place
                else ", which streaming needs: data.streaming=false"
            )
        )
    return _stream(found, columns)


def _stream(found: Found, columns: frozenset[str]) -> list[Raw]:
    rows: list[Raw] = []
    for url in found.files:
        try:
            table = _open(url)
            names = _wanted(found, table.schema_arrow.names, columns)
            groups = [table.read_row_group(g, columns=names).to_pylist() for g in range(table.num_row_groups)]
        except UserError:
            raise
        except Exception as error:  # errors of the network and of broken files have no common class
            raise UserError(f"{url} cannot be read ({_sentence(error)}); try again, or data.streaming=false") from error
        for group, fields_of_rows in enumerate(groups):
            for index, fields in enumerate(fields_of_rows):
                where = f"{found.name}, row {len(rows)}"
                load = StreamedPicture(url, group, index, where)
                rows.append(Raw(fields=fields, where=where, picture=f"row {len(rows)}", load_image=load))
    return rows


def _download(found: Found, columns: frozenset[str]) -> list[Raw]:
    candidate = found.candidate
    table = datasets.load_dataset(candidate.id, name=candidate.config, split=found.split, revision=candidate.revision)
    names = _wanted(found, table.column_names, columns)
    if isinstance(table.features[PICTURE], datasets.Image):
        table = table.cast_column(PICTURE, datasets.Image(decode=False))
    rows = []
    for number, fields in enumerate(table.select_columns(names).to_list()):
        where = f"{found.name}, row {number}"
        load = DownloadedPicture(table, number, where)
        rows.append(Raw(fields=fields, where=where, picture=f"row {number}", load_image=load))
    return rows


def _wanted(found: Found, names: Sequence[str], columns: frozenset[str]) -> list[str]:
    if PICTURE not in names:
        raise UserError(f"{found.name} has no column {PICTURE!r}; it has {', '.join(names)}")
    return [name for name in names if name in columns]


@lru_cache(maxsize=8)
def _open(url: str) -> pq.ParquetFile:
    return pq.ParquetFile(HfFileSystem().open(url) if url.startswith("hf://") else url)


@lru_cache(maxsize=2)
def _pictures(url: str, group: int) -> list[Any]:
    """The encoded pictures of a row group; cached, because neighbouring rows are needed one after the other."""
    cells: list[Any] = _open(url).read_row_group(group, columns=[PICTURE]).column(PICTURE).to_pylist()
    return cells


@dataclass(frozen=True)
class StreamedPicture:
    """A cell of a parquet file, whose row group is fetched when it is needed."""

    url: str
    group: int
    index: int
    where: str

    def __call__(self) -> Image.Image:
        return read_picture(self.read(), self.where)

    def read(self) -> bytes:
        try:
            cell = _pictures(self.url, self.group)[self.index]
        except Exception as error:  # errors of the network have no common class
            raise UserError(
                f"{self.where}: the picture cannot be fetched ({_sentence(error)}); resume=true goes on"
            ) from error
        return _encoded(cell, self.where)

    def n_bytes(self) -> int | None:
        """The file's size shared out equally; None on the hub, where the revision tells what it is."""
        file = Path(self.url)
        return file.stat().st_size // _open(self.url).metadata.num_rows if file.is_file() else None


@dataclass(frozen=True, eq=False)
class DownloadedPicture:
    """A cell of a table that `datasets` has downloaded."""

    table: Any
    index: int
    where: str

    def __call__(self) -> Image.Image:
        return read_picture(self.read(), self.where)

    def read(self) -> bytes:
        return _encoded(self.table[self.index][PICTURE], self.where)

    def n_bytes(self) -> None:
        return None


def _encoded(cell: Any, where: str) -> bytes:
    """The picture of a cell, which is a file's bytes or a mapping with the bytes or a path."""
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(data, bytes):
        return data
    path = cell.get("path") if isinstance(cell, Mapping) else None
    if path and os.path.isfile(path):
        return PictureFile(Path(path)).read()
    raise UserError(f"{where}: has no picture; remove the row")


def _sentence(error: BaseException) -> str:
    """The first line of a message, without its final punctuation."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(" .:")
