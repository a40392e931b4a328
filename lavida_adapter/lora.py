"""LoRA through peft: exact targets, an adapter file of its own, and the base it belongs to.

Hu et al. 2021, arXiv 2106.09685. Names are the checkpoint's own ("mm_projector.0", "transformer.blocks.0.q_proj"); a
pattern that does not name existing linear layers raises, so that a typing error can never train nothing.
"""

import difflib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lavida_adapter.checkpoint import fingerprint

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida

ADAPTER, META = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers get a low-rank update, and which small parameters are trained whole."""

    rank: int
    """0 adds no LoRA layer."""
    alpha: float | None = None
    """Scale of the update times rank; None is twice the rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Names below `model.`, with {a,b} for alternatives, {0-3} for ranges and * for every layer number."""
    train_whole: tuple[str, ...] = ()
    """Modules or parameters trained without LoRA, named the same way."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora.rank={self.rank}, lora.dropout={self.dropout}: give a rank >= 0 and a dropout in [0, 1)"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha}: give a positive number, or null for twice the rank")
        if self.rank > 0 and not self.targets:
            raise ValueError(f"lora.rank={self.rank} has no lora.targets: name linear layers, or give lora.rank=0")


def expand(pattern: str, names: Sequence[str]) -> list[str]:
    """The existing names that a pattern stands for, every alternative of it.

    Raises:
        ValueError: when an alternative names nothing; the nearest names are listed.
    """
    parts = re.split(r"(\{[^}]*\})", pattern)
    choices = [_alternatives(p[1:-1], pattern) if p.startswith("{") else [p] for p in parts]
    found: list[str] = []
    for concrete in ("".join(choice) for choice in itertools.product(*choices)):
        regex = re.compile(re.escape(concrete).replace(r"\*", r"\d+"))
        hits = [name for name in names if regex.fullmatch(name)]
        if not hits:
            near = ", ".join(difflib.get_close_matches(concrete, names, n=3, cutoff=0))
            raise ValueError(f"lora: {concrete!r} names nothing in this model; the nearest names are {near}")
        found += hits
    return found


def add_lora(model: "Lavida", config: LoraConfig) -> dict[str, int]:
    """Freezes the model, then makes the adapter trainable; returns trainable parameters by part.

    Raises:
        ValueError: for a target that is not an existing linear layer, an adapter that would train nothing or a layer
            in two ways, or a model that carries an adapter already.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model carries LoRA layers already: merge them (lavida_adapter.merge_lora) first")
    model.requires_grad_(False)
    linears = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    patterns = config.targets if config.rank > 0 else ()
    targets = list(dict.fromkeys(name for pattern in patterns for name in expand(pattern, linears)))
    whole = _whole(model, config)
    if both := sorted({t for t in targets for name in whole if name.startswith(f"{t}.")}):
        raise ValueError(f"lora.targets and lora.train_whole both name {', '.join(both[:3])}: give it to one of them")
    counts: dict[str, int] = {}
    if targets:
        alpha = 2 * config.rank if config.alpha is None else config.alpha
        lora = peft.LoraConfig(
            r=config.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # only ever divided by the rank: a float will do
            lora_dropout=config.dropout,
            # peft matches a list by suffix, which would confuse the two ff_out; an expression matches the whole name.
            target_modules="(?:" + "|".join(re.escape("model." + t) for t in targets) + ")",
        )
        peft.inject_adapter_in_model(lora, model)
        injected = [n for n, m in model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        if sorted(injected) != sorted(targets):
            raise RuntimeError(f"peft adapted {len(injected)} modules, expected {len(targets)}")
        counts["lora"] = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    for name, parameter in whole.items():
        parameter.requires_grad_(True)
        counts[name] = parameter.numel()
    if not counts:
        raise ValueError("lora: nothing would be trained; give lora.rank > 0 with targets, or lora.train_whole")
    return counts


def _whole(model: "Lavida", config: LoraConfig) -> dict[str, nn.Parameter]:
    """The parameters that are trained without LoRA, by their names in the checkpoint below `model.`."""
    parameters = {name.replace(".base_layer", ""): p for name, p in model.model.named_parameters()}
    above = sorted({".".join(n.split(".")[:i]) for n in parameters for i in range(1, n.count(".") + 2)})
    chosen = [name for pattern in config.train_whole for name in expand(pattern, above)]
    return {n: p for n, p in parameters.items() if any(n == name or n.startswith(f"{name}.") for name in chosen)}


def save_adapter(model: "Lavida", config: LoraConfig, folder: str | Path) -> None:
    """Writes the trained tensors alone, with their configuration and the fingerprint of the base."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    meta = {"lora": asdict(config), "base": base_fingerprint(model, config)}
    for name, write in (
        (ADAPTER, lambda p: save_file(tensors, p)),
        (META, lambda p: p.write_text(json.dumps(meta, indent=2))),
    ):
        temporary = folder / f".{name}"
        write(temporary)
        temporary.replace(folder / name)


def load_adapter(model: "Lavida", folder: str | Path) -> LoraConfig:
    """Puts a saved adapter on its base.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the adapter belongs to another base, or its tensors do not fit.
    """
    folder = Path(folder)
    if not (folder / META).is_file() or not (folder / ADAPTER).is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapter ({META} and {ADAPTER}): give the folder that train.py named"
        )
    try:
        meta = json.loads((folder / META).read_text())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["lora"].items()}
        config, base = LoraConfig(**fields), meta["base"]
        tensors = load_file(folder / ADAPTER)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} cannot be read ({error}): train it again") from error
    if base != base_fingerprint(model, config):
        raise ValueError(f"the adapter in {folder} was trained on another base checkpoint: load that one (model.path=)")
    add_lora(model, config)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if tensors.keys() != wanted.keys() or any(tensors[n].shape != p.shape for n, p in wanted.items()):
        raise ValueError(f"the tensors in {folder / ADAPTER} are not those that its {META} describes")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return config


def base_fingerprint(model: "Lavida", config: LoraConfig) -> str:
    """Fingerprint of what the adapter leaves as it is; the parameters trained whole are not part of it."""
    return fingerprint(model, skip=tuple(f"model.{name}" for name in _whole(model, config)))


def merge_lora(model: "Lavida") -> None:
    """Folds the low-rank updates into the base weights and removes the LoRA layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config  # peft's own note that an adapter is there


def _alternatives(text: str, pattern: str) -> list[str]:
    """The names that `a,b` or `0-3` between braces stands for."""
    if span := re.fullmatch(r"(\d+)-(\d+)", text):
        if int(span[1]) > int(span[2]):
            raise ValueError(f"lora: the range {{{text}}} in {pattern!r} is empty: write the smaller number first")
        return [str(i) for i in range(int(span[1]), int(span[2]) + 1)]
    return text.split(",")
