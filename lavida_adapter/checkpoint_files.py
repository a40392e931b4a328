"""The files of a checkpoint folder: where it lies, its JSON, and its tensors in one safetensors file or in shards.

Only safetensors files are read, because loading a pickle can run any code. Whether a path that somebody gave is a file
or a folder is asked of os.path, here and elsewhere: it says no for a name that is too long, has a NUL or may not be
looked up, where pathlib raises. A pipe or a device, which never ends, is no file.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from shirg import MissingFileError, UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = ("I", "U", "BOOL")
"""How the names of dtypes begin that cannot hold weights."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, as the header of its file describes it."""

    file: Path
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    kind: str
    """The dtype as safetensors writes it."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype, or None if nothing can be computed in it."""
        return _DTYPES.get(self.kind)

    @property
    def of_integers(self) -> bool:
        return self.kind.startswith(_INTEGERS)


def locate(source: str | Path, *, option: str = "model.path", revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a name that is no folder is downloaded from the hub.

    `option` is the config key of the source, for errors. `revision` pins a branch, tag or commit of the hub.

    Raises:
        MissingFileError: there is no such folder, and the hub has no such repository or is out of reach.
        UserError: a revision of a local folder.
    """
    if os.path.isdir(source):
        if revision is not None:
            raise UserError(
                f"model.revision={revision}: {option}={source} is a local folder, which has no revisions; leave the "
                "revision out"
            )
        return Path(source)
    if os.path.exists(source) or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise MissingFileError(f"{option}={source!s:.200}: no such checkpoint folder")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise MissingFileError(
            f"{option}={source}: no such local folder, and the download from the hub failed "
            f"({type(error).__name__}); download the checkpoint once and give its folder"
        ) from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, from the headers of its files.

    Raises:
        MissingFileError: a file that does not exist.
        UserError: pickled weights, or files that cannot be read.
    """
    files = _files(folder)
    found: dict[str, StoredTensor] = {}
    for path in sorted(set(files.values())):
        with open_tensors(path) as file:
            names = [name for name, p in files.items() if p == path]
            absent = set(names) - set(file.keys())
            if absent:
                raise UserError(f"{path} lacks tensors that {INDEX} lists for it: {_few(sorted(absent))}")
            for name in names:
                header = file.get_slice(name)
                found[name] = StoredTensor(path, name, tuple(header.get_shape()), header.get_dtype())
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a sharded checkpoint or from the single file."""
    if os.path.isfile(folder / INDEX):
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{folder / INDEX} has no weight_map: download the checkpoint again")
        names = {str(file): isinstance(file, str) and Path(file).name == file for file in index.values()}
        if foreign := [file for file, is_name in names.items() if not is_name]:
            raise UserError(f"{folder / INDEX} names {foreign[0][:80]!r}: the files of a checkpoint lie beside it")
        absent = sorted(file for file in names if not os.path.isfile(folder / file))
        if absent:
            raise MissingFileError(f"{folder}: {INDEX} names {_few(absent)}, which do not exist")
        files = {name: folder / file for name, file in index.items()}
    elif os.path.isfile(folder / SINGLE):
        with open_tensors(folder / SINGLE) as file:
            files = {name: folder / SINGLE for name in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} holds pickled weights only ({', '.join(pickles[:3])}): loading a pickle can run any code, "
                "so it is refused; convert the checkpoint to safetensors"
            )
        raise MissingFileError(f"{folder} has no {SINGLE} and no {INDEX}: there are no weights to load")
    for path in sorted({p for p in files.values() if p.suffix != ".safetensors"}):
        raise UserError(
            f"{path} is not a safetensors file: loading a pickle can run any code, so it is refused; convert the "
            "checkpoint to safetensors"
        )
    return files


def _few(names: Sequence[str]) -> str:
    return ", ".join(ascii(name)[1:-1][:80] for name in names[:5])


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is not valid, too deep to read, or has halves of characters (lone surrogates), which no file can
            hold and no tokenizer reads.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        found = json.loads(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("too many brackets inside each other") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character, {error.object[error.start : error.end]!a}") from None
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; UserError names a file without one."""
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def open_tensors(path: Path) -> Any:
    """Opens a safetensors file, as a context manager; UserError names a file that cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_SAVING = ".saving-"


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`; files are moved out of it once all are written.

    It is inside because `folder` may be a mount, and a file cannot be renamed into another file system. What a killed
    save left is removed.

    Raises:
        OSError: for everything that the operating system refuses; safetensors hides it in an error of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_SAVING}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_SAVING, dir=folder) as temporary:
        try:
            yield Path(temporary)
        except SafetensorError as error:
            if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None


def share_like(written: Path, *others: Path) -> None:
    """Gives files the permissions of one that was written by us: safetensors lets nobody else read its files."""
    for path in others:
        shutil.copymode(written, path)
