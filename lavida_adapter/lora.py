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
from typing import TYPE_CHECKING

import peft
import torch
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


def expand(pattern: str, names: Sequence[str]) -> list[str]:
    """The existing names that a pattern stands for, every alternative of it.

    Raises:
        ValueError: when an alternative names nothing; the nearest names are listed.
    """
    parts = re.split(r"(\{[^}]*\})", pattern)
    choices = [_alternatives(p[1:-1]) if p.startswith("{") else [p] for p in parts]
    found: list[str] = []
    for concrete in ("".join(choice) for choice in itertools.product(*choices)):
        regex = re.compile(re.escape(concrete).replace(r"\*", r"\d+"))
        hits = [name for name in names if regex.fullmatch(name)]
        if not hits:
            near = difflib.get_close_matches(concrete, names, n=3, cutoff=0.3)
            raise ValueError(f"lora: {concrete!r} names nothing in this model; the nearest names are {', '.join(near)}")
        found += hits
    return found


def add_lora(model: "Lavida", config: LoraConfig) -> dict[str, int]:
    """Freezes the model, then makes the adapter trainable; returns trainable parameters by part.

    Raises:
        ValueError: for a target that is not an existing linear layer, or an adapter that would train nothing.
    """
    model.requires_grad_(False)
    linears = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    counts: dict[str, int] = {}
    if config.rank > 0 and config.targets:
        targets = list(dict.fromkeys(n for pattern in config.targets for n in expand(pattern, linears)))
        lora = peft.LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
            lora_dropout=config.dropout,
            # peft matches a list by suffix, which would confuse the two ff_out; an expression matches the whole name.
            target_modules="(?:" + "|".join(re.escape("model." + t) for t in targets) + ")",
        )
        peft.inject_adapter_in_model(lora, model)
        injected = [n for n, m in model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        if sorted(injected) != sorted(targets):
            raise RuntimeError(f"peft adapted {len(injected)} modules, expected {len(targets)}")
        counts["lora"] = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    parameters = dict(model.model.named_parameters())
    for pattern in config.train_whole:
        for name in expand(pattern, _with_parents(list(parameters))):
            for full, parameter in parameters.items():
                if full == name or full.startswith(name + "."):
                    parameter.requires_grad_(True)
                    counts[full] = parameter.numel()
    if not counts:
        raise ValueError("lora: nothing would be trained; give lora.rank > 0 with targets, or lora.train_whole")
    return counts


def save_adapter(model: "Lavida", config: LoraConfig, folder: Path) -> None:
    """Writes the trained tensors alone, with their configuration and the fingerprint of the base."""
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


def load_adapter(model: "Lavida", folder: Path) -> LoraConfig:
    """Puts a saved adapter on its base.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the adapter belongs to another base, or its tensors do not fit.
    """
    if not (folder / META).is_file() or not (folder / ADAPTER).is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapter ({META} and {ADAPTER}): give the folder that train.py named"
        )
    meta = json.loads((folder / META).read_text())
    config = LoraConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["lora"].items()})
    if meta["base"] != base_fingerprint(model, config):
        raise ValueError(f"the adapter in {folder} was trained on another base checkpoint: load that one (model.path=)")
    add_lora(model, config)
    tensors = load_file(folder / ADAPTER)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if tensors.keys() != wanted.keys() or any(tensors[n].shape != p.shape for n, p in wanted.items()):
        raise ValueError(f"the tensors in {folder / ADAPTER} are not those that its {META} describes")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return config


def base_fingerprint(model: "Lavida", config: LoraConfig) -> str:
    """Fingerprint of what the adapter leaves as it is; the parameters trained whole are not part of it."""
    names = [n.replace(".base_layer", "") for n, _ in model.model.named_parameters() if "lora_" not in n]
    whole = tuple("model." + n for pattern in config.train_whole for n in expand(pattern, _with_parents(names)))
    return fingerprint(model, skip=whole)


def merge_lora(model: "Lavida") -> None:
    """Folds the low-rank updates into the base weights and removes the LoRA layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, module.get_base_layer())


def _with_parents(names: Sequence[str]) -> list[str]:
    """Parameter names and every module name above them."""
    return sorted({".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)})


def _alternatives(text: str) -> list[str]:
    """ "a,b" -> a, b; "0-3" -> 0, 1, 2, 3."""
    if span := re.fullmatch(r"(\d+)-(\d+)", text):
        return [str(i) for i in range(int(span[1]), int(span[2]) + 1)]
    return text.split(",")
