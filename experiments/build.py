"""Configs become objects here: data, model, selector, context, relevance, cache, decoding, logger.

Weights that are missing, or a budget that the model does not name, raise one sentence that says what to write instead.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments.atomic_files import read_json
from experiments.data.loader import Mixture, Shuffled, Stream, check_weights
from experiments.data.sample import Dataset
from experiments.errors import ConfigError, explain, instead
from experiments.inference import EvalPipeline
from experiments.jobs.results import HEAD, head_folder
from experiments.metrics.answers import Scorer
from experiments.metrics.final_answer import AnswerRule
from experiments.plugins import build_plugin
from experiments.random_model import random_model
from experiments.schema import CONF, VERSION_BASE, local_folder
from experiments.token_stats import TokenGeometry
from shirg import BudgetShare, MissingFileError, Selector, UserError, parse_budget

if TYPE_CHECKING:
    from lavida_adapter import CachePacker, CacheSelector, DecodeConfig, Lavida, LavidaConfig
    from lavida_adapter.relevance import Relevance


_SWITCHES = ("prefix_attention", "drop_token_after_image", "mm_pool")
"""Fields of the model's own config that a run may change; null leaves what the checkpoint says."""
_SOURCE = ("revision", "vision_path")
"""Where weights come from, beside `model.path`: a version on the hub, a SigLIP for a checkpoint without its tower."""


def compose_command(command: str, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """The config that `python COMMAND.py OVERRIDES` would get, and the chosen option of every group.

    Raises:
        ConfigError: overrides that do not compose.
    """
    try:
        with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name=command):
            cfg = compose(command, overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, command, overrides)) from None
    choices = {str(group): str(option) for group, option in cfg.hydra.runtime.choices.items()}
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    return cfg, choices


def compose_eval(*overrides: str) -> DictConfig:
    """The config that eval.py would get from these overrides; ConfigError where they do not compose."""
    return compose_command("eval", overrides)[0]


RANGES: Mapping[str, tuple[int, int] | tuple[float, float]] = {
    "threads": (1, 1024),
    "batch_size": (1, 2**20),
    "seed": (0, 2**63 - 1),
    "model.seed": (0, 2**63 - 1),
    "workers": (0, 256),
    "trainer.workers": (0, 256),
    "shots": (0, 10_000),
    "trainer.num_nodes": (1, 2**16),
    "trainer.log_every": (1, 2**31),
    "trainer.checkpoint_every": (1, 2**31),
    "trainer.clip": (0.0, 1e9),
}
"""Least and largest value: torch cannot hold more, or the memory or the machine would be full."""


def check_numbers(cfg: DictConfig) -> None:
    """Refuses numbers of a run that torch cannot hold or that would fill the memory.

    Raises:
        UserError: names the key.
    """
    for key, (least, most) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not (isinstance(value, type(least)) and least <= value <= most):
            raise UserError(f"{key}={value}: give a number from {least:,} to {most:,}")


def build_dataset(cfg: DictConfig, group: str = "data") -> Dataset:
    """The dataset of `data=...`; an empty one raises."""
    if "parts" in OmegaConf.select(cfg, group):
        raise UserError(f"{group}: a mixture is for training; evaluate its parts one by one")
    dataset = build_plugin(cfg, group, ("__len__", "__getitem__"))
    if not isinstance(dataset, Dataset):
        needed = ", ".join(Dataset.__annotations__)
        raise ConfigError(f"{group}: {type(dataset).__name__} is no dataset: it needs {needed}")
    if not len(dataset):
        raise UserError(f"{group}: {dataset.name} ({dataset.split}) has no samples")
    return dataset


def build_parts(cfg: DictConfig) -> dict[str, Dataset]:
    """The datasets to train on by name: those of a mixture that have a weight, or the one of `data=...`."""
    if "parts" not in cfg.data:
        return {"data": build_dataset(cfg)}
    weights = _weights(cfg)
    return {name: build_dataset(cfg, f"data.parts.{name}") for name in cfg.data.parts if weights[name]}


def build_stream(cfg: DictConfig, parts: Mapping[str, Dataset]) -> Stream:
    """The samples of those datasets without end, in an order of their own."""
    if "parts" not in cfg.data:
        return Shuffled(parts["data"], cfg.seed)
    return Mixture(parts=parts, weights={name: _weights(cfg)[name] for name in parts}, seed=cfg.data.seed)


def _weights(cfg: DictConfig) -> dict[str, float]:
    weights = {str(name): float(weight) for name, weight in cfg.data.weights.items()}
    check_weights([str(name) for name in cfg.data.parts], weights)
    return weights


def build_model(cfg: DictConfig, device: torch.device, prepare: "Callable[[Lavida], None] | None" = None) -> "Lavida":
    """The model of `model=...`, ready to answer.

    `model.path` is a folder (relative ones start at the repository) or a hub id; without it the model is built from
    `model.config` with random weights. `prepare` is called before the model has weights, and may split them over
    processes.
    """
    from lavida_adapter import Lavida

    spec = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(spec, dict)
    known = {"path", "dtype", "config", "seed", *_SOURCE, *_SWITCHES}
    if unknown := sorted(str(k) for k in spec.keys() - known):
        there = f"a model has {', '.join(sorted(known))}"
        raise UserError(f"model.{unknown[0]}: there is no such option{instead(unknown[0], known, there)}")
    path, sizes = spec.get("path"), spec.get("config")
    if (path is None) == (sizes is None):
        raise UserError("model: give either model.path (a checkpoint) or model.config (sizes, random weights)")
    if path is None:
        if useless := [k for k in _SOURCE if spec.get(k) is not None]:
            raise UserError(f"model.{useless[0]}: a model of random weights (model.config) has no such files")
        if not isinstance(sizes, dict):
            raise UserError(f"model.config={sizes}: give sizes by name")
        sizes = {str(k): v for k, v in sizes.items()}
        model = random_model(sizes, int(spec.get("seed") or 0), cfg.dtype, device, prepare)
    else:
        source: dict[str, Any] = {k: str(spec[k]) for k in _SOURCE if spec.get(k) is not None}
        if "vision_path" in source:
            source["vision_path"] = local_folder(source["vision_path"]) or source["vision_path"]
        folder = _checkpoint(str(path))
        model = Lavida.from_pretrained(folder, dtype=str(cfg.dtype), device=device, prepare=prepare, **source)
    model.config = switched(model.config, cfg.model)
    if cfg.attention == "flash" and find_spec("flash_attn") is None:
        raise UserError("attention=flash needs the flash-attn package: pip install -e '.[gpu]', or use attention=sdpa")
    if cfg.attention == "flash" and model.dtype == torch.float32:
        raise UserError(
            "attention=flash computes in bfloat16 or float16 only: choose dtype=bfloat16, or attention=sdpa"
        )
    model.lm.backend = str(cfg.attention)  # type: ignore[assignment]  # the schema allows only backends
    return model.eval().requires_grad_(False)


def switched(config: "LavidaConfig", model: Mapping[str, Any]) -> "LavidaConfig":
    """A checkpoint's config with the switches of `model=...`; null leaves what the checkpoint says."""
    return config.switched(**{name: model[name] for name in _SWITCHES if model.get(name) is not None})


def adapt(adapter: str | None, model: "Lavida", selector: Selector) -> None:
    """Merges a trained adapter into model and selector; None leaves both as they are."""
    if adapter is not None:
        from lavida_adapter import load_adapter, merge_lora

        load_adapter(model, _adapter_folder(adapter), selector)
        merge_lora(model, selector)


def build_selector(cfg: DictConfig, budgets: Mapping[str, int], config: "LavidaConfig | None" = None) -> Selector:
    """The selector of `selector=...`, with the model's numbers for the name of a budget and for `coord_width: auto`.

    `context=...` may wrap it.
    """
    fixed: dict[str, Any] = {}
    if "budget" in cfg.selector:
        fixed["budget"] = resolve_budget(cfg.selector.budget, budgets)
    if config is not None and cfg.selector.get("coord_width") == "auto":
        projected = cfg.selector.scaffold.space == "post"
        fixed["coord_width"] = config.lm.d_model if projected else config.vision.hidden_size
    selector: Selector = build_plugin(cfg, "selector", (Selector,), fixed)
    if "_target_" in cfg.context:
        selector = build_plugin(cfg, "context", (Selector,), {"selector": selector})
    return selector


def build_cache(cfg: DictConfig, budgets: Mapping[str, int]) -> "CacheSelector | CachePacker | None":
    """What `cache=...` does to the prefix cache, a budget's name replaced by a number; None for cache=none."""
    from lavida_adapter import CachePacker, CacheSelector

    if "_target_" not in cfg.cache:
        return None
    fixed = {"budget": resolve_budget(cfg.cache.budget, budgets)} if "budget" in cfg.cache else {}
    made: CacheSelector | CachePacker = build_plugin(cfg, "cache", (CacheSelector, CachePacker), fixed)
    return made


def build_relevance(
    cfg: DictConfig, selector: Selector, model: "Lavida | None" = None, adapter: str | None = None
) -> "Relevance | None":
    """The provider that the selector ranks by; None for a selector that does not ask for one.

    `model` loads the head of a learned relevance; without it, as for training one, there is none yet. `adapter` is the
    folder where it is looked for first.
    """
    if not selector.uses_relevance:
        return None
    fixed = {}
    if OmegaConf.select(cfg, "relevance.base._target_") is not None:
        fixed["base"] = build_plugin(cfg, "relevance.base", ("__call__",))
    provider: Relevance = build_plugin(cfg, "relevance", ("__call__",), fixed)
    load_head(provider, cfg, model, adapter)
    return provider


def load_head(provider: "Relevance", cfg: DictConfig, model: "Lavida | None", adapter: str | None) -> None:
    """Loads the head of a learned relevance; other providers have none.

    Raises:
        MissingFileError: there is no head.
    """
    from lavida_adapter.learned_relevance import Learned

    if model is None or not isinstance(provider, Learned):
        return
    folder = head_folder(provider.path, adapter, cfg.model)
    if folder is None:
        raise MissingFileError(
            f"relevance=learned: neither the adapter nor {cfg.model.get('path')}/{HEAD} holds a relevance head: train "
            "one with train.py stage=gate, and give its folder as relevance.path"
        )
    provider.load(folder, model)


def build_decode(cfg: DictConfig, max_new_tokens: int) -> "DecodeConfig":
    """How answers are generated; their length is `max_new_tokens` unless the config gives one."""
    from lavida_adapter import DecodeConfig

    fields = OmegaConf.to_container(cfg.decode, resolve=True, enum_to_str=True)
    assert isinstance(fields, dict)
    if fields["max_new_tokens"] is None:
        fields["max_new_tokens"] = max_new_tokens
    return DecodeConfig(**{str(k): v for k, v in fields.items()})


def build_pipeline(
    cfg: DictConfig,
    model: "Lavida",
    decode: "DecodeConfig",
    scorers: Mapping[str, Scorer],
    *,
    adapter: str | None = None,
    asked: Mapping[str, str] | None = None,
    answer_rule: AnswerRule = "whole",
) -> EvalPipeline:
    """The pipeline of a config around a loaded model; `adapter` names the folder of one to merge into it."""
    selector = build_selector(cfg, model.config.budgets, model.config).to(model.device).eval()
    adapt(adapter, model, selector)
    return EvalPipeline(
        model=model,
        selector=selector,
        relevance=build_relevance(cfg, selector, model, adapter),
        decode=decode,
        cache=build_cache(cfg, model.config.budgets),
        scorers=dict(scorers),
        geometry=TokenGeometry(model.config, selector.geometry),
        seed=cfg.seed,
        answer_rule=answer_rule,
        asked=asked,
    )


def build_logger(cfg: DictConfig, fixed: Mapping[str, Any] | None = None) -> Any:
    """A Lightning logger, or None for logger=none."""
    return build_plugin(cfg, "logger", ("log_metrics",), fixed) if "_target_" in cfg.logger else None


def fingerprint(model: "Lavida") -> str:
    """Which weights these are."""
    from lavida_adapter.checkpoint import fingerprint

    return fingerprint(model)


def adapter_size(adapter: str | None) -> int:
    """Trained parameters of the adapter; 0 without one."""
    if adapter is None:
        return 0
    from safetensors import safe_open

    from lavida_adapter.adapter_files import weights_file

    with safe_open(weights_file(_adapter_folder(adapter)), framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (not a dict)


def lora_rank(adapter: str | None) -> int | None:
    """The rank of the adapter's LoRA; None for an adapter without LoRA, or none."""
    found = None if adapter is None else read_json(_adapter_folder(adapter) / "adapter_config.json")
    return None if found is None else found.get("r")


def trains_selector(adapter: str) -> bool:
    """Whether the adapter holds trained layers of a selector."""
    from lavida_adapter.adapter_files import holds_selector

    return holds_selector(_adapter_folder(adapter))


def resolve_budget(budget: Any, budgets: Mapping[str, int]) -> int | Literal["matched"]:
    """A budget's number of tokens; names are the model's, and "768/980 base" is that share of one, rounded."""
    with suppress(UserError):
        wanted = parse_budget(budget)
        if not isinstance(wanted, BudgetShare):
            return wanted
        if wanted.name in budgets:
            return wanted.of(budgets[wanted.name])
    names = ", ".join(f"{name} ({count})" for name, count in budgets.items())
    raise UserError(f"budget={budget}: give {names}, a share like '3/4 base', matched, or a positive number of tokens")


def _checkpoint(path: str) -> str | Path:
    """The folder that a path names, else the path as it is: a hub id."""
    folder = local_folder(path)
    if folder is None and path.startswith(("./", "/")):
        raise MissingFileError(f"model.path={path:.200}: there are no weights there; `make tiny` trains the tiny model")
    return folder or path


def _adapter_folder(path: str) -> Path:
    return local_folder(path) or Path(path)
