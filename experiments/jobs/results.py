"""The record of a job: what identifies it, and result.json."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf

from experiments.atomic_files import read_json, write_json
from experiments.errors import ConfigError, instead
from experiments.plugins import check_finite
from experiments.schema import CONF, Decode, Train, local_folder

if TYPE_CHECKING:
    import torch

VERSION = 2
"""Format of result.json. In format 1 the config and its digest held dotted names of classes, which a module's move
changes; it is read as format 2."""
RESULT = "result.json"
SAMPLES = "samples.parquet"
SHOTS = "shots"
"""Folder of the samples that are drawn while a job runs."""
LOCK = ".lock"
"""Held by the process that runs the job."""
VOLATILE = ("times",)
"""Keys of result.json that differ between two runs of the same job."""

SESSION = frozenset({"resume", "overwrite"})
"""Keys that say how a job is started, not what it is: they are not recorded."""

NOT_HASHED = frozenset(
    {"study", "threads", "logger", "profiler", "shots", "workers"}
    | {f"trainer.{key}" for key in ("num_nodes", "workers", "detect_anomaly")}
)
QUICK_BYTES, SAMPLE_BYTES = 2**26, 2**12
_TARGET = "_target_"
_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "pillow", "numpy")

_LATER_DATA: dict[str, dict[str, Any]] = {
    name: {"leave_out": [], "only": []} for name in ("synth_glyphs", "synth_glyphs_train")
}
"""Defaults of the options that an option of the group "data" got after the first records were written."""

Status = Literal["running", "ok", "failed", "oom"]


@dataclass(frozen=True)
class Identity:
    """What identifies a run."""

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
    """The config of a job with every reference resolved; raises when a mandatory value is missing or no number.

    Names of classes are left out: where a class lives is no part of an experiment, and `choices` names the options.
    """
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(container, dict)
    config = without_targets({str(k): v for k, v in container.items() if k not in SESSION})
    check_finite(config)
    return config


def without_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the dotted names of the classes that its options build."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(part) for part in value]
        return without_targets(value) if isinstance(value, Mapping) else value

    return {key: cleaned(value) for key, value in config.items() if key != _TARGET}


def files_digest(path: str | None) -> str | None:
    """Which files a local checkpoint or adapter consists of: their whole content where that is quick, else what
    `_sampled` reads. Not when they were written: a copy is the same checkpoint.

    None for a hub id, whose revision the hub's own cache decides. An adapter that was converted to another layout keeps
    the digest that it had before, so that studies with it can be resumed.
    """
    folder = None if path is None else local_folder(str(path))
    if folder is None:
        return None
    digest = hashlib.sha256()
    # A pipe or a link to a device has no end, and no checkpoint is read from it.
    for file in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        digest.update(file.read_bytes() if file.stat().st_size < QUICK_BYTES else _sampled(file))
    return _before_conversion(folder, digest.hexdigest()[:16])


def _sampled(file: Path) -> bytes:
    """Name, size and header of a large safetensors file, with the first and last bytes of every tensor in it."""
    with open(file, "rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        header = opened.read(min(int.from_bytes(opened.read(8), "little"), QUICK_BYTES))
        try:
            spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            places = sorted({8 + len(header) + place for begin, end in spans for place in (begin, end - SAMPLE_BYTES)})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # loading it will say what is wrong
            places = []
        parts = [f"{file.name} {size} ".encode(), header]
        for place in places:
            opened.seek(max(0, min(place, size)))
            parts.append(opened.read(SAMPLE_BYTES))
    return b"".join(parts)


def _before_conversion(folder: Path, digest: str) -> str:
    """The digest that a converted adapter had before; for every other folder the digest itself.

    adapter.json names both digests. The old one counts only while the files are those that the conversion wrote.
    """
    if not (folder / "adapter.json").is_file():
        return digest
    try:
        converted = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))["converted"]
        return str(converted["from"]) if converted["to"] == digest else digest
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not converted, or load_adapter refuses it
        return digest


OWN = "own"
"""The adapter that was trained for the selector."""


def adapter_path(adapter: str | None, model: Mapping[str, Any], selector: str) -> str | None:
    """The folder of an adapter.

    A name is that of a folder in `adapters/` beside the model's weights; `own` stands for the name of the selector.
    Anything else is a path.

    Raises:
        ConfigError: a name that the model has no adapter for.
    """
    if adapter is None or "/" in adapter or local_folder(adapter) is not None:
        return adapter
    name = selector if adapter == OWN else adapter
    path = f"{model.get('path')}/adapters"
    folder = local_folder(path)
    there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder is not None else []
    if name not in there:
        raise ConfigError(
            f"adapter={adapter:.200}: there is no adapter {name:.200} in {path} ({', '.join(there) or 'it has none'})"
            + instead(name, there, f"train one: python train.py selector={selector} weights={path}/{name}")
        )
    return f"{path}/{name}"


HEAD = "relevance"
"""The folder beside a model's weights that holds its relevance head."""


def head_folder(path: str | Path | None, adapter: str | None, model: Mapping[str, Any]) -> Path | None:
    """The folder of the head of relevance=learned: `path`, else the adapter's if it has one, else beside the weights.

    A name without a slash is that of a folder beside the weights, too. None where there is none.
    """
    if path is not None:
        beside = None if "/" in str(path) else local_folder(f"{model.get('path')}/{path}")
        return beside or local_folder(str(path)) or Path(path)
    near = [adapter, f"{model.get('path')}/{HEAD}"]
    found = [folder for place in near if place is not None and (folder := local_folder(place)) is not None]
    return next((folder for folder in found if (folder / f"{HEAD}.json").is_file()), None)


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
        ConfigError: a format that this code does not know.
    """
    result = read_json(folder / RESULT)
    if result is None:
        return None
    if result.get("version") == VERSION:
        return _with_later_keys(result)
    if result.get("version") != 1:
        raise ConfigError(
            f"{folder / RESULT} has format {result.get('version')}, this code writes {VERSION}: use another study= or "
            "overwrite=true"
        )
    config = without_targets(result["config"])
    return _with_later_keys({**result, "version": VERSION, "config": config, "config_hash": config_hash(config)})


def _with_later_keys(result: dict[str, Any]) -> dict[str, Any]:
    """The record with the defaults of options that did not exist when it was written, and today's spelling."""
    before, choices = result.get("config", {}), result.get("choices", {})
    config = {**before, **(_later_train(before) if result.get("verb") == "train" else {})}
    if "selector" in config:
        selector = _respelled(config["selector"])
        config["selector"] = {**_later_options(), **selector} if "diversity" in selector else selector  # SHIRG's
        config.setdefault("context", {})
    if "agg" in config.get("relevance", {}):  # one of lm_embed's
        config["relevance"] = {"projector": "adapted", **config["relevance"]}
    if config.get("decode") is not None:
        config["decode"] = {**_decode_defaults(), **config["decode"]}
    if data := _later_data(config, choices):
        config["data"] = data
    if config == before:
        return result
    return {**result, "choices": {"context": "none", **choices}, "config": config, "config_hash": config_hash(config)}


def _later_train(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a training that are not in its record, or not whole, with the defaults of what came later."""
    text = config.get("text", {})
    later = {key: value for key, value in _train_defaults().items() if key not in config and key not in SESSION}
    return {**later, "text": {"words": 0.0, "fade": 0.0, **text} if text else {}}


@cache
def _train_defaults() -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(Train), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items() if value != MISSING}


def _later_data(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, Any]:
    """The section "data" with the defaults of what datasets got after the first records were written."""
    data = dict(config.get("data", {}))
    if choices.get("data") in _LATER_DATA:
        data = {**_LATER_DATA[choices["data"]], **data}
    parts = {
        name: {**_LATER_DATA.get(choices.get(f"data@data.parts.{name}", ""), {}), **part}
        for name, part in data.get("parts", {}).items()
    }
    return {**data, "parts": parts} if parts else data


def _respelled(selector: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a selector with the spelling that all of them have now."""
    plain = {("neighbour" if key == "neighbor" else key): value for key, value in selector.items()}
    return {key: _respelled(value) if isinstance(value, Mapping) else value for key, value in plain.items()}


@cache
def _later_options() -> dict[str, Any]:
    """Defaults of the options that SHIRG got after the first records were written."""
    defaults = OmegaConf.load(CONF / "selector/shirg.yaml")
    assert isinstance(defaults, DictConfig)
    return {key: OmegaConf.to_container(defaults[key]) for key in ("allocation",)}


@cache
def _decode_defaults() -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(Decode), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def environment(device: "torch.device", dtype: str) -> dict[str, Any]:
    """The machine, versions and commit that produced the numbers."""
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        **_software(),
    }


@cache
def _software() -> Mapping[str, Any]:
    packages = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "platform": platform.platform(), **packages, **code_version()}


@cache
def code_version() -> Mapping[str, Any]:
    """The commit, and whether tracked files differ from it; None outside a git checkout.

    Asked once: what a process runs is the code that it has loaded.
    """
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
