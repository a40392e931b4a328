"""What a job writes down: `result.json`, one object per job.

Everything in it is a function of the config, the weights and the data, except the object `times`: time stamps,
durations, memory. Two runs of one job differ there and nowhere else.
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from experiments.schema import CONF
from experiments.study.files import read_json, write_json

VERSION = 2
"""Format of result.json. In format 1 the config and its digest held dotted names of classes, which a module's move
changes; it is read as format 2."""
RESULT = "result.json"
SAMPLES = "samples.parquet"
LOCK = ".lock"
"""Held by the process that runs the job."""
VOLATILE = ("times",)
"""Keys of result.json that differ between two runs of the same job."""

SESSION = frozenset({"resume", "overwrite"})
"""Keys that say how a job is started, not what it is: they are not written down."""

NOT_HASHED = frozenset({"study", "threads", "logger", "shots", "workers", "trainer.num_nodes", "trainer.workers"})
QUICK_BYTES = 2**26
_TARGET = "_target_"
_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "pillow", "numpy")

Status = Literal["running", "ok", "failed", "oom"]


@dataclass(frozen=True)
class Identity:
    """Which run this is."""

    version: int
    verb: str
    study: str
    job: str
    command: str
    overrides: list[str]
    choices: dict[str, str]
    config_hash: str
    config: dict[str, Any]


def config_hash(config: Mapping[str, Any]) -> str:
    """A digest of every config value that can change a result."""
    relevant = _relevant(config)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _relevant(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _relevant(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if prefix + key not in NOT_HASHED
    }


def resolve_config(cfg: DictConfig) -> dict[str, Any]:
    """What a job is: the config with every reference filled in; raises when a mandatory value is missing.

    Names of classes are left out: where a class lives is no part of an experiment, and `choices` names the options.
    """
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(container, dict)
    return without_targets({str(k): v for k, v in container.items() if k not in SESSION})


def without_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the dotted names of the classes that its options build."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(part) for part in value]
        return without_targets(value) if isinstance(value, Mapping) else value

    return {key: cleaned(value) for key, value in config.items() if key != _TARGET}


def files_digest(path: str | None) -> str | None:
    """Which files a local checkpoint or adapter consists of: by content where that is quick, by size and time else.

    None for a hub id, whose revision the hub's own cache decides.
    """
    folder = None if path is None else local_folder(path)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size, changed = file.stat().st_size, file.stat().st_mtime_ns
        digest.update(file.read_bytes() if size < QUICK_BYTES else f"{file.name} {size} {changed}".encode())
    return digest.hexdigest()[:16]


def local_folder(path: str) -> Path | None:
    """The folder that a path names, seen from here or from the repository; None when there is none."""
    return next((folder for folder in (Path(path), CONF.parent / path) if folder.is_dir()), None)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that differ and count."""
    keys = []
    for key in sorted(old.keys() | new.keys()):
        if prefix + key in NOT_HASHED:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(prefix + key)
    return keys


def write_result(
    folder: Path, identity: Identity, status: Status, sections: Mapping[str, Any], reason: str | None = None
) -> None:
    head = {"status": status, "reason": reason}
    write_json(folder / RESULT, {**asdict(identity), **head, **sections})


def read_result(folder: Path) -> dict[str, Any] | None:
    """The record of a job in today's format; None when there is none.

    Raises:
        ValueError: a format that this code does not know.
    """
    result = read_json(folder / RESULT)
    if result is None or result.get("version") == VERSION:
        return result
    if result.get("version") != 1:
        raise ValueError(
            f"{folder / RESULT} has format {result.get('version')}, this code writes {VERSION}: use another study= or "
            "overwrite=true"
        )
    config = without_targets(result["config"])
    return {**result, "version": VERSION, "config": config, "config_hash": config_hash(config)}


def environment(device: torch.device, dtype: str) -> dict[str, Any]:
    """What produced the numbers: machine, versions and commit."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: version(package) for package in _PACKAGES},
        **code_version(),
    }


def code_version() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it; None outside a git checkout."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"git": _git("rev-parse", "HEAD"), "git_dirty": None if changed is None else bool(changed)}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=CONF.parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
