"""Words that stand for several overrides: `sweep=NAME` and `run=FOLDER`.

They are written out before Hydra reads the command line, so that a job's folder, its record and the command in its row
say what was really asked for, and an override given by hand replaces the one that a sweep would bring.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from experiments.errors import ConfigError
from experiments.schema import CONF, override_key

SWEEPS = CONF / "sweep"
_OF_A_SYSTEM = frozenset({"model", "selector", "relevance", "budget", "ablation", "experiment", "dtype", "attention"})
"""Overrides of a training that say how its result must be evaluated, too."""


def expand(verb: str, argv: Sequence[str]) -> list[list[str]]:
    """The command lines that `argv` stands for: one for each product of a sweep, one for each run.

    Raises:
        ConfigError: a sweep that does not exist or is for another verb; a folder without a finished adapter.
    """
    sweeps, runs = ([word.partition("=")[2] for word in argv if word.startswith(f"{key}=")] for key in ("sweep", "run"))
    given = [word for word in argv if not word.startswith(("sweep=", "run="))]
    if len(sweeps) + len(runs) > 1 or (runs and verb != "eval"):
        raise ConfigError(
            "sweep= and run= stand for whole command lines: give one of them, once; run= is for eval.py "
            "(several runs: run='outputs/STUDY/*')"
        )
    products: list[list[str]] = [[]]
    if sweeps:
        given = given if {"-m", "--multirun"} & set(given) else ["-m", *given]
        products = sweep_overrides(verb, sweeps[0])
    elif runs:
        products = [run_overrides(folder) for folder in job_folders("run", runs[0], "train")]
    asked = {override_key(word) for word in given if "=" in word}
    return [[*given, *(word for word in product if override_key(word) not in asked)] for product in products]


def sweep_overrides(verb: str, name: str) -> list[list[str]]:
    """The overrides of each product in `conf/sweep/NAME.yaml`."""
    known = _sweeps()
    if verb not in known.get(name, {}):
        fitting = ", ".join(stem for stem, verbs in known.items() if verb in verbs)
        why = f"is for {' and '.join(known[name])}.py" if name in known else "does not exist"
        raise ConfigError(f"sweep={name} {why}; the sweeps of {verb}.py are {fitting}")
    products = known[name][verb]
    return [[f"{key}={value}" for key, value in product.items()] for product in products]


def run_overrides(folder: Path) -> list[str]:
    """What evaluates the adapter of a training job: the system that it was trained in, and where it lies."""
    from experiments.jobs.results import read_result

    result = read_result(folder)
    if result is None:
        raise ConfigError(f"run={folder}: there is no result.json in it; give the folder of a job of train.py")
    if result["verb"] != "train" or result["status"] != "ok":
        raise ConfigError(
            f"run={folder} is a job of {result['verb']}.py with status {result['status']}: train it first"
        )
    artifact = result["training"]["artifact"]
    if result["training"]["stage"] != "adapt":
        raise ConfigError(f"run={folder} trained whole weights, not an adapter: use model.path={artifact}")
    return [*system_of(result["overrides"]), f"adapter={artifact}"]


def system_of(overrides: Sequence[str]) -> list[str]:
    """Those of a training's overrides that say how its result must be evaluated, a recipe's among them."""
    kept = [word for word in overrides if override_key(word).partition(".")[0] in _OF_A_SYSTEM]
    given = {override_key(word) for word in kept}
    recipes = [word.partition("=")[2] for word in overrides if override_key(word) == "recipe"]
    brought = [word for name in recipes for word in _recipe(name) if override_key(word) not in given]
    return [*brought, *kept]


def _recipe(name: str) -> list[str]:
    """The system that `conf/recipe/NAME.yaml` trains for, as overrides."""
    recipe = OmegaConf.to_container(OmegaConf.load(CONF / "recipe" / f"{name}.yaml")) or {}
    assert isinstance(recipe, dict)
    chosen = {
        key.removeprefix("override /"): value for entry in recipe.get("defaults", []) for key, value in entry.items()
    }
    words = {group: value for group, value in chosen.items() if group in _OF_A_SYSTEM}
    for group in (key for key in recipe if key in _OF_A_SYSTEM):
        words |= {f"{group}.{knob}": value for knob, value in recipe[group].items()}
    return [f"{key}={value}" for key, value in words.items()]


def job_folders(word: str, pattern: str, verb: str) -> list[Path]:
    """Folders that a path names, or those of the verb's jobs that a glob pattern does."""
    if not any(sign in pattern for sign in "*?["):
        return [Path(pattern)]
    root = Path(pattern)
    found = sorted(
        path.parent for path in Path(root.anchor or ".").glob(str(root.relative_to(root.anchor) / "result.json"))
    )
    found = [folder for folder in found if folder.name.startswith(f"{verb}_")]
    if not found:
        raise ConfigError(f"{word}={pattern}: no folder of a job of {verb}.py matches")
    return found


@cache
def _sweeps() -> dict[str, dict[str, list[dict[str, Any]]]]:
    loaded = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(SWEEPS.glob("*.yaml"))}
    return cast(dict[str, dict[str, list[dict[str, Any]]]], loaded)
