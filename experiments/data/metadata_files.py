"""The metadata file of a folder of pictures: JSON lines, CSV or Parquet, under the names of the hub's ImageFolder.

A CSV holds texts alone: an empty cell is none, and a cell of `answers` that is a JSON list is a list.
"""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lavida_adapter.checkpoint_files import parse_json
from shirg import MissingFileError, UserError

DEFAULT = "metadata.jsonl"
NAMES = (DEFAULT, "metadata.csv", "metadata.parquet")
NEEDED = "file_name, question and answers"
_LISTS = ("answers", "answer")


def find_metadata(folder: Path, name: str = DEFAULT) -> Path | None:
    """The metadata file of a folder, or None; the default name stands for each of `NAMES`.

    Raises:
        UserError: there are several.
    """
    if name != DEFAULT:
        return folder / name if os.path.isfile(folder / name) else None
    found = [folder / each for each in NAMES if (folder / each).is_file()]
    if len(found) > 1:
        both = " and ".join(path.name for path in found)
        raise UserError(f"{folder} has {both}: remove all but one, which would be read")
    return found[0] if found else None


def read_metadata(folder: Path, name: str = DEFAULT) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row as a mapping, without what is null, and its place for messages: "FILE, line 3".

    Raises:
        MissingFileError: there is no such file.
        UserError: it cannot be read, or a row is no mapping.
    """
    path = find_metadata(folder, name)
    if path is None:
        raise MissingFileError(f"{folder / name} does not exist: write one JSON object a line with {NEEDED}")
    read = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix, _json_rows)
    yield from read(path)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from error
        if not isinstance(fields, dict):
            raise UserError(f"{where}: must be a JSON object with {NEEDED}")
        yield where, fields


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        for fields in lines:
            where = f"{path}, line {lines.line_num}"
            if None in fields:
                raise UserError(f"{where}: more cells than the first line has names; put texts with commas in quotes")
            given = {key: value for key, value in fields.items() if value not in (None, "")}
            yield where, {key: _cell(key, value) for key, value in given.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid CSV in UTF-8 ({error}); save it again") from error


def _cell(key: str, text: str) -> Any:
    """A list where the cell of an answer is one, else the text."""
    if key in _LISTS and text.lstrip().startswith("["):
        try:
            return parse_json(text)
        except ValueError:
            return text  # an answer may begin with a bracket
    return text


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for fields in batch.to_pylist():
                    yield f"{path}, row {number}", {key: value for key, value in fields.items() if value is not None}
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as Parquet ({why}); write it again") from error
