"""Files that are written whole or not at all, and the journal of a job that may be killed."""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from experiments.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside the target, renamed when the block ends well: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids are unique on one machine alone.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # on a file system that cannot be written to there is none
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{12}\.tmp|\d+)")
"""What killed processes leave; older versions put the process id at the end."""


def clear_temporaries(folder: Path, min_age_s: float = 0.0) -> None:
    """Removes what killed processes have left beside the files of a folder.

    Args:
        min_age_s: least age, where another process may be writing into the folder now.
    """
    for path in folder.glob(".*"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        with suppress(FileNotFoundError):  # another process has removed or renamed it
            if time.time() - path.lstat().st_mtime >= min_age_s:
                path.unlink()


def write_atomic(path: Path, content: str | bytes) -> None:
    with replacing(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Several files at once: all of them are on disk before the first one takes its place, and the last one is last."""
    with ExitStack() as stack:
        for path, content in reversed(list(contents.items())):
            file = stack.enter_context(replacing(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomic(path, encode_json(value))


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Half a character, which UTF-8 cannot hold, is written as the escape that JSON has for it."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file, or None when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): delete it and run the job again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object: delete it and run the job again")
    return value


def remove_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Entry = dict[str, Any]


class Journal:
    """An append-only file of JSON objects, one per line; each is on disk before `append` returns.

    A process that dies while writing leaves a torn last line. Opening the journal again drops it; a torn line anywhere
    else means that the file was edited, and raises.

    Args:
        slim: what of an entry stays in memory; `load` reads the whole one from the disk.
    """

    def __init__(self, path: Path, slim: Callable[[Entry], Entry] | None = None) -> None:
        self.path = path
        self.entries: list[Entry] = []
        """What `slim` leaves of each entry."""
        self._slim, self._begins = slim, [0]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(self._begins[-1])
                break
            try:
                self._keep(json.loads(line), len(line))
            # A line of another program may be any value: `slim` does not find what it reads there.
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                self._file.close()
                raise ConfigError(
                    f"{path}, line {number} is not one of this job's: run the job again with overwrite=true"
                ) from None

    def append(self, entry: Entry) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._keep(entry, len(line))

    def load(self, number: int) -> Entry:
        """Entry number `number` as it was appended."""
        self._file.seek(self._begins[number])
        entry: Entry = json.loads(self._file.readline())
        return entry

    def _keep(self, entry: Entry, n_bytes: int) -> None:
        self.entries.append(entry if self._slim is None else self._slim(entry))
        self._begins.append(self._begins[-1] + n_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
