"""The record of a job: result.json, one object for each job, and samples.parquet, one row for each sample."""

import hashlib
import io
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from experiments.atomic_files import read_json, write_atomic, write_json
from experiments.errors import ConfigError
from experiments.schema import CONF, local_folder

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

NOT_HASHED = frozenset({"study", "threads", "logger", "shots", "workers", "trainer.num_nodes", "trainer.workers"})
QUICK_BYTES = 2**26
_TARGET = "_target_"
_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "pillow", "numpy")

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
    """The config of a job with every reference resolved; raises when a mandatory value is missing.

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

    None for a hub id, whose revision the hub's own cache decides. An adapter that was converted to another layout keeps
    the digest that it had before, so that studies with it can be resumed.
    """
    folder = None if path is None else local_folder(path)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size, changed = file.stat().st_size, file.stat().st_mtime_ns
        digest.update(file.read_bytes() if size < QUICK_BYTES else f"{file.name} {size} {changed}".encode())
    return _before_conversion(folder, digest.hexdigest()[:16])


def _before_conversion(folder: Path, digest: str) -> str:
    """The digest that a converted adapter had before; for every other folder the digest itself.

    adapter.json names both digests. The old one counts only while the files are those that the conversion wrote.
    """
    try:
        converted = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))["converted"]
        return str(converted["from"]) if converted["to"] == digest else digest
    except (OSError, ValueError, KeyError, TypeError):  # no adapter, not converted, or one that load_adapter refuses
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
            f"adapter={adapter}: there is no adapter {name} in {path} ({', '.join(there) or 'it has none'}); "
            f"train one: python train.py selector={selector} weights={path}/{name}"
        )
    return f"{path}/{name}"


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
    if result is None or result.get("version") == VERSION:
        return result
    if result.get("version") != 1:
        raise ConfigError(
            f"{folder / RESULT} has format {result.get('version')}, this code writes {VERSION}: use another study= or "
            "overwrite=true"
        )
    config = without_targets(result["config"])
    return {**result, "version": VERSION, "config": config, "config_hash": config_hash(config)}


def environment(device: "torch.device", dtype: str) -> dict[str, Any]:
    """The machine, versions and commit that produced the numbers."""
    import torch

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


class SampleRow(TypedDict):
    """One answer, as inference makes it and samples.parquet keeps it; plain JSON."""

    id: str
    picture: str
    """Names the picture; several questions may share one."""
    question: str
    prompt: str
    answers: list[str]
    target: str
    prediction: str
    subtask: str
    group: str
    density: str
    place: str
    entity: str
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
    "question": pa.string(),
    "prompt": pa.string(),
    "answers": pa.list_(pa.string()),
    "target": pa.string(),
    "prediction": pa.string(),
    "subtask": pa.string(),
    "group": pa.string(),
    "density": pa.string(),
    "place": pa.string(),
    "entity": pa.string(),
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


def write_samples(path: Path, rows: Sequence[SampleRow]) -> None:
    """Writes all rows at once."""
    write_atomic(path, encode_samples(rows))


def encode_samples(rows: Sequence[SampleRow]) -> bytes:
    """A parquet file of the rows; scores, token counts by source and times are columns `score_*`, `n_*` and `ms_*`.

    Times are those of the sample's batch, shared out equally: the only columns in which two runs differ.
    """
    flat = [_flatten(row) for row in rows]
    kinds = {"score": pa.float64(), "ms": pa.float64(), "n": pa.int32()}
    extra = {name: kinds[name.partition("_")[0]] for row in flat for name in row if name not in _COLUMNS}
    schema = pa.schema([*_COLUMNS.items(), *extra.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(flat, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def read_rows(path: Path) -> list[SampleRow]:
    """The rows that `write_samples` wrote."""
    return [_unflatten(flat) for flat in pq.read_table(path).to_pylist()]


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
    if metric in SPREADS and column not in pq.read_schema(path).names:
        return {}
    columns = pq.read_table(path, columns=["id", column, "picture", "group", "density"]).to_pydict().values()
    return {i: Score(*fields) for i, *fields in zip(*columns, strict=True) if fields[0] is not None}


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
