"""Values that were computed from the files of a study, kept from one command to the next.

A value is found by a digest of all that it depends on: size, time and inode of the files, what was asked, and the code
that computes it. After any change the digest is another one, and the value is computed again; nothing kept is trusted
over the files. A copied study has other inodes, so values that somebody else has kept are never found. A file that is
torn or edited is thrown away.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from experiments.atomic_files import write_atomic

NAME = ".table_cache"
_CODE = ("analysis", "jobs", "metrics", "viz")
"""Packages of experiments that compute what is kept."""
_LIBRARIES = ("numpy", "pyarrow", "scipy")

T = TypeVar("T")


class Memo:
    """What is known of one study. Values are plain JSON."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: the file to begin with, whatever state it is in; None begins with nothing."""
        self._known: dict[str, Any] = {} if path is None else _read(path)
        self._stored = set(self._known)
        self._used: set[str] = set()

    def get(self, kind: str, inputs: Sequence[object], compute: Callable[[], T]) -> T:
        """The value of `compute()`, as it comes back from JSON: the same whether it was known or not.

        Args:
            inputs: all that the value depends on besides the code; stamps stand for files.
        """
        key = hashlib.sha256(json.dumps([_code(), kind, inputs]).encode()).hexdigest()[:32]
        if key not in self._known:
            self._known[key] = json.loads(json.dumps(compute()))
        self._used.add(key)
        value: T = self._known[key]
        return value

    def save(self, path: Path, *, prune: bool = False) -> None:
        """Writes what is known, if it is more than before. Call it under the study's lock.

        Args:
            prune: leaves out what was not asked for since this object was made.
        """
        if prune:
            self._known = {key: value for key, value in self._known.items() if key in self._used}
        if set(self._known) == self._stored:
            return
        text = json.dumps(self._known)
        write_atomic(path, f"{_digest(text)}\n{text}")
        self._stored = set(self._known)


def stamp(path: Path) -> list[int]:
    """Stands for the content of a file: it changes whenever the file is written.

    Raises:
        OSError: there is no such file.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _read(path: Path) -> dict[str, Any]:
    """What `save` wrote; nothing where the file is missing or not whole."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(json.loads(text)) if digest == _digest(text) else {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _code() -> str:
    """Identifies the code: its files' content and the versions of the libraries that count."""
    digest = hashlib.sha256(" ".join(map(version, _LIBRARIES)).encode())
    root = Path(__file__).parents[1]
    for package in _CODE:
        for path in sorted((root / package).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
