"""Sweeps: `sweep=NAME`, `run=FOLDER` and `debug=true` stand for several overrides; each job's config is composed once.

The words are expanded before Hydra reads the command line, so that a job's folder, its record and the command in its
row have the real overrides. An override given by hand replaces the sweep's own.

Hydra composes every config of a sweep before it starts the first job, so that a mistake in one of them is found at
once, and composes each again when its job starts. A composition takes a tenth of a second, as long as the answers of a
small job; kept in between, a config takes a few kilobytes.
"""

import pickle
import re
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.errors import ConfigError, instead
from experiments.job_names import override_key
from experiments.override_grammar import quote
from experiments.schema import CONF

SWEEPS = CONF / "sweep"
TRUST = "trust"
_REPEATED = frozenset(
    {"model", "selector", "context", "relevance", "budget", "ablation", "experiment", "dtype", "attention"}
)
"""Overrides of a training that its evaluation must repeat."""


def expand(command: str, argv: Sequence[str]) -> list[list[str]]:
    """The command lines that `argv` stands for: one for each product of a sweep, one for each run.

    Raises:
        ConfigError: a sweep that does not exist or is for the other command; a folder without a finished adapter.
    """
    sweeps, runs = ([word.partition("=")[2] for word in argv if word.startswith(f"{key}=")] for key in ("sweep", "run"))
    given = [word for word in argv if not word.startswith(("sweep=", "run=", "debug=", f"{TRUST}="))]
    trusts = [word for word in argv if word.startswith(f"{TRUST}=")]
    if trusts and (not runs or trusts != [f"{TRUST}=true"]):
        raise ConfigError(
            f"{trusts[0]}: {TRUST}=true goes with run=FOLDER and builds the classes that its record names"
        )
    if len(sweeps) + len(runs) > 1 or (runs and command != "eval"):
        raise ConfigError(
            "sweep= and run= stand for whole command lines: give one of them, once; run= is for eval.py "
            "(several runs: run='outputs/STUDY/*')"
        )
    debugging = debug_overrides(command, [word for word in argv if word.startswith("debug=")])
    products: list[list[str]] = [[]]
    if sweeps:
        given = given if {"-m", "--multirun"} & set(given) else ["-m", *given]
        products = sweep_overrides(command, sweeps[0])
    elif runs:
        products = [run_overrides(folder, bool(trusts)) for folder in job_folders("run", runs[0], "train")]
    return [_joined(_joined(given, debugging), product) for product in products]


def _joined(given: Sequence[str], brought: Sequence[str]) -> list[str]:
    """The words with those that they do not give themselves, beside their last override: Hydra wants them together."""
    asked = {override_key(word) for word in given if "=" in word}
    end = max((i for i, word in enumerate(given, 1) if "=" in word and not word.startswith("-")), default=len(given))
    return [*given[:end], *(word for word in brought if override_key(word) not in asked), *given[end:]]


def debug_overrides(command: str, words: Sequence[str]) -> list[str]:
    """What `debug=true` stands for."""
    if wrong := [word for word in words if word not in ("debug=true", "debug=false")]:
        raise ConfigError(f"{wrong[0]}: give debug=true or leave it out")
    if "debug=true" not in words:
        return []
    node = OmegaConf.to_container(OmegaConf.load(CONF / "debug.yaml"))
    assert isinstance(node, dict)
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in node[command].items()]


def sweep_overrides(command: str, name: str) -> list[list[str]]:
    """The overrides of each product in `conf/sweep/NAME.yaml` for a command, "eval" or "train"."""
    known = _sweeps()
    if command not in known.get(name, {}):
        fitting = ", ".join(stem for stem, commands in known.items() if command in commands)
        there = f"the sweeps of {command}.py are {fitting}"
        if name in known:
            raise ConfigError(f"sweep={name} is for {' and '.join(known[name])}.py; {there}")
        raise ConfigError(f"sweep={name} does not exist{instead(name, known, there)}")
    products = known[name][command]
    return [[f"{key}={value}" for key, value in product.items()] for product in products]


def run_overrides(folder: Path, trust: bool = False) -> list[str]:
    """The overrides that evaluate the adapter in a training job's folder: its model and selector, and the adapter.

    The path in the record is where the adapter was written: after a move it is gone, or another training's.

    Args:
        trust: whether the record, which somebody else may have written, decides what Python code runs.
    """
    from experiments.jobs.results import read_result

    result = read_result(folder)
    if result is None:
        raise ConfigError(f"run={folder}: there is no result.json in it; give the folder of a job of train.py")
    if result["verb"] != "train" or result["status"] != "ok":
        raise ConfigError(
            f"run={folder} is a job of {result['verb']}.py with status {result['status']}: train it first"
        )
    adapting = result["training"]["stage"] in ("adapt", "gate")
    found = folder / ("adapter" if adapting else "weights")
    written = found if found.is_dir() else f"DIR (they were written to {result['training']['artifact']})"
    if not adapting:
        raise ConfigError(f"run={folder} trained whole weights, not an adapter: use model.path={written}")
    artifact = found if found.is_dir() else Path(str(result["training"]["artifact"]))
    head_alone = result["training"]["stage"] == "gate" and not (artifact / "adapter.json").is_file()
    key = "relevance.path" if head_alone else "adapter"
    if not found.is_dir():
        what = "relevance head" if head_alone else "adapter"
        raise ConfigError(f"run={folder}: there is no {what} in it: give {key}={written}")
    words = [str(word) for word in result["overrides"]]
    if not trust:
        _check_harmless(folder, words)
    return [*system_of(words), f"{key}={quote(str(found))}"]


def _check_harmless(folder: Path, words: Sequence[str]) -> None:
    """Refuses a record that would build a class, read a variable of the environment or leave the config's folder."""
    for word in words:
        key, value = override_key(word), word.partition("=")[2]
        if _group(key) not in _REPEATED | {"recipe"}:
            continue
        options = CONF / key
        strange = options.is_dir() and not (re.fullmatch(r"[\w-]+", value) and (options / f"{value}.yaml").is_file())
        if strange or "_target_" in word or "${" in value:
            raise ConfigError(
                f"run={folder}: its record asks for {word}, which may run any Python code; if you trust who wrote it, "
                f"give {TRUST}=true"
            )


def system_of(overrides: Sequence[str]) -> list[str]:
    """The overrides of a training that its evaluation needs too, with those that a recipe brings."""
    kept = [word for word in overrides if _group(override_key(word)) in _REPEATED]
    given = {override_key(word) for word in kept}
    chosen = [(override_key(word), word.partition("=")[2]) for word in overrides]
    groups = [(group, name) for group, name in chosen if group in ("recipe", "stage")]
    brought = [word for group, name in groups for word in _brought(group, name) if override_key(word) not in given]
    return [*brought, *kept]


def _group(key: str) -> str:
    """The config group that a key is in: `relevance` of `relevance`, `relevance.path` and `relevance/base`."""
    return re.split(r"[./@]", key)[0]


def _brought(group: str, name: str) -> list[str]:
    """The model, selector and so on that `conf/GROUP/NAME.yaml` trains for, as overrides.

    What a stage changes in a selector is for its training alone.
    """
    recipe = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml")) or {}
    assert isinstance(recipe, dict)
    chosen = {
        key.removeprefix("override /"): value for entry in recipe.get("defaults", []) for key, value in entry.items()
    }
    words = {group: value for group, value in chosen.items() if group in _REPEATED}
    for key in (key for key in recipe if group == "recipe" and key in _REPEATED):
        words |= {f"{key}.{option}": value for option, value in recipe[key].items()}
    return [f"{key}={value}" for key, value in words.items()]


def job_folders(word: str, pattern: str, command: str) -> list[Path]:
    """The folder that a path names, or the job folders of a command that match a glob pattern."""
    if not any(sign in pattern for sign in "*?["):
        return [Path(pattern)]
    root = Path(pattern)
    found = sorted(
        path.parent for path in Path(root.anchor or ".").glob(str(root.relative_to(root.anchor) / "result.json"))
    )
    found = [folder for folder in found if folder.name.startswith(f"{command}_")]
    if not found:
        raise ConfigError(f"{word}={pattern}: no folder of a job of {command}.py matches")
    return found


@cache
def _sweeps() -> dict[str, dict[str, list[dict[str, Any]]]]:
    loaded = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(SWEEPS.glob("*.yaml"))}
    return cast(dict[str, dict[str, list[dict[str, Any]]]], loaded)


class ComposedConfigs(ConfigLoaderImpl):
    """A loader that keeps the config of a job from its first composition to the next request for it."""

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        super().__init__(loader.config_search_path)
        self._composed: dict[tuple[str, ...], bytes] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        kept = self._composed.pop(tuple(sweep_overrides), None)
        if kept is not None:
            config: DictConfig = pickle.loads(zlib.decompress(kept))
            return config
        config = super().load_sweep_config(master_config, sweep_overrides)
        self._composed[tuple(sweep_overrides)] = zlib.compress(pickle.dumps(config), level=1)
        return config

    def __reduce__(self) -> tuple[Any, ...]:
        """The process of a job that a launcher starts composes one config, once: it gets a loader of Hydra's."""
        state = {name: value for name, value in self.__dict__.items() if name != "_composed"}
        return _plain_loader, (), state


def _plain_loader() -> ConfigLoaderImpl:
    return ConfigLoaderImpl.__new__(ConfigLoaderImpl)


class ComposeOnce(Callback):
    """Gives the sweep that begins such a loader."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None and isinstance(hydra.config_loader, ConfigLoaderImpl)
        hydra.config_loader = ComposedConfigs(hydra.config_loader)
