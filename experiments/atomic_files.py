"""Files that are written whole or not at all, and the journal of a job that may be killed."""

import json
import os
import re
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Self

from experiments.errors import ConfigError


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file beside the target, renamed when the block ends well: a reader sees the old file or the new one.

    Args:
        durable: whether to wait until the disk has it, about 10 ms. Without, it survives the process, not the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids are unique on one machine alone.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # on a file system that cannot be written to there is none
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


_TEMPORARY = re.compile(r"\.(.+)\.([0-9a-f]{12}\.tmp|\d+)")
"""What killed processes leave; older versions put the process id at the end."""


def clear_temporaries(folder: Path, *, only: str | None = None, besides: str | None = None) -> None:
    """Removes what killed processes have left beside the files of a folder. Call it under the lock of their writers.

    Args:
        only: name of the one file that the caller's lock is for.
        besides: name of a file that has a lock of its own.
    """
    for path in folder.glob(".*"):
        if (found := _TEMPORARY.fullmatch(path.name)) and only in (None, found[1]) and found[1] != besides:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes, durable: bool = True) -> None:
    with replacing(path, durable) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def replacing_together(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Several files at once: all of them are on disk before the first one takes its place, and the last one is last."""
    with ExitStack() as stack:
        files = [stack.enter_context(replacing(path)) for path in reversed(paths)][::-1]
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def write_together(contents: Mapping[Path, bytes]) -> None:
    with replacing_together(list(contents)) as files:
        for file, content in zip(files, contents.values(), strict=True):
            file.write(content)


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


class Journal:
    """An append-only file of entries; each is on disk before `append` returns, and none stays in memory.

    Before an entry are its length and its CRC-32. A process that dies while writing leaves a torn end, which is cut off
    when the journal is opened again; a broken entry anywhere else means that the file was changed.

    Args:
        kind: the first line of the file, which says what its entries are.

    Raises:
        ConfigError: a file of another kind, or one that was changed.
    """

    _HEAD = struct.Struct("<II")

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._first = f"{kind}\n".encode()
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        self._end = os.fstat(self._file.fileno()).st_size
        self._file.seek(0)
        found = self._file.read(len(self._first))
        if not self._first.startswith(found.rstrip(b"\0")):
            self._refuse("its first line is another")
        if found != self._first:
            self._cut(0)
        for _ in self:
            pass

    def append(self, entry: bytes) -> int:
        """Where the entry is: an offset that `read` takes."""
        begin = b"" if self._end else self._first
        self._file.write(begin + self._HEAD.pack(len(entry), zlib.crc32(entry)) + entry)
        self._file.flush()
        os.fsync(self._file.fileno())
        offset = self._end + len(begin)
        self._end = offset + self._HEAD.size + len(entry)
        return offset

    def read(self, offset: int) -> bytes:
        """The entry at the offset, which this object has checked before."""
        self._file.seek(offset)
        n_bytes, _ = self._HEAD.unpack(self._file.read(self._HEAD.size))
        return self._file.read(n_bytes)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Every entry with its offset."""
        offset = len(self._first)
        while offset < self._end:
            self._file.seek(offset)
            head = self._file.read(self._HEAD.size)
            n_bytes, checksum = self._HEAD.unpack(head.ljust(self._HEAD.size, b"\0"))
            after = offset + self._HEAD.size + n_bytes
            entry = self._file.read(n_bytes) if after <= self._end else b""
            if not entry or zlib.crc32(entry) != checksum:
                # A torn end is followed by zeros at most, which are read where power failed.
                if entry and self._file.read(2**20).strip(b"\0"):
                    self._refuse(f"byte {offset}")
                self._cut(offset)
            else:
                yield offset, entry
            offset = after

    def _cut(self, offset: int) -> None:
        self._file.truncate(offset)
        self._end = offset

    def _refuse(self, where: str) -> NoReturn:
        self.close()
        raise ConfigError(
            f"{self.path} is not a journal of this version, or was changed ({where}): run the job again with "
            "overwrite=true"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
