"""LoRA through peft: exact targets, what is trained of them, and how it is folded into the base.

Hu et al. 2021, arXiv 2106.09685; docs/method.md, "Recipes". Names are those of `lavida_adapter.targets`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import peft
from torch import nn

from lavida_adapter.growth import Growth, RankGrowth
from lavida_adapter.targets import check_parts, expand, part_of
from shirg import Selector

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers get a low-rank update, and which small parameters are trained whole."""

    rank: int
    """0 adds no LoRA layer."""
    alpha: float | None = None
    """Scale of the update times rank; None is twice the rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Names below `model.` or "selector", with {a,b} for alternatives, {0-3} for ranges, {:4/26} for the first layers
    by share, and * for every layer number."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single parts, at the scale of the others."""
    train_whole: tuple[str, ...] = ()
    """Modules or parameters trained without LoRA, named the same way."""
    grow: Growth | None = None
    """Begins with fewer ranks than `rank` and adds the others when the loss stops falling."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora.rank={self.rank}, lora.dropout={self.dropout}: give a rank >= 0 and a dropout in [0, 1)"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha}: give a positive number, or null for twice the rank")
        if self.rank > 0 and not self.targets:
            raise ValueError(f"lora.rank={self.rank} has no lora.targets: name linear layers, or give lora.rank=0")
        check_parts("lora.ranks", list(self.ranks))
        if wrong := {part: rank for part, rank in self.ranks.items() if rank < 1}:
            raise ValueError(f"lora.ranks={wrong}: give ranks >= 1; what is not named in lora.targets has none")
        if self.grow is not None and self.grow.start >= self.rank:
            raise ValueError(f"lora.grow.start={self.grow.start}: give a rank below lora.rank={self.rank}, or no grow")

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """A config as it stands in a file: lists for tuples, and the growth as a mapping."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        if fields.get("grow") is not None:
            fields["grow"] = Growth(**fields["grow"])
        return cls(**fields)

    def rank_of(self, name: str) -> int:
        return self.ranks.get(part_of(name), self.rank)

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Trained:
    """What of one part of the model is trained, and how."""

    part: str
    rank: int | None
    """None for parameters that are trained whole."""
    modules: int
    parameters: int

    def __str__(self) -> str:
        how = "whole" if self.rank is None else f"LoRA, rank {self.rank}"
        layers = f"{self.modules} layer{'s' if self.modules > 1 else ''}"
        return f"{self.part}: {self.parameters:,} parameters ({how}, {layers})"


def add_lora(model: "Lavida", config: LoraConfig, selector: Selector | None = None) -> list[Trained]:
    """Freezes model and selector, then makes the adapter trainable; says what is trained, part by part.

    LoRA's factors are float32 whatever the base is: bfloat16 would round most updates away.

    Raises:
        ValueError: for a target that is not an existing linear layer, an adapter that would train nothing or a layer
            in two ways, layers of the selector that it leaves out, or a model that carries an adapter already.
    """
    tree = tree_of(model, selector)
    if any("lora_" in name for name, _ in tree.named_parameters()):
        raise ValueError("the model carries LoRA layers already: merge them (lavida_adapter.merge_lora) first")
    tree.requires_grad_(False)
    linears = [_short(name) for name, module in tree.named_modules() if isinstance(module, nn.Linear)]
    patterns = config.targets if config.rank > 0 else ()
    targets = list(dict.fromkeys(name for pattern in patterns for name in expand(pattern, linears)))
    whole = trained_whole(tree, config)
    if both := sorted({t for t in targets for name in whole if name.startswith(f"{t}.")}):
        raise ValueError(f"lora.targets and lora.train_whole both name {', '.join(both[:3])}: give it to one of them")
    if not targets and not whole:
        raise ValueError("lora: nothing would be trained; give lora.rank > 0 with targets, or lora.train_whole")
    if idle := sorted(config.ranks.keys() - {part_of(t) for t in targets}) if targets else []:
        raise ValueError(f"lora.ranks.{idle[0]}: lora.targets has no layer of it; add one, or take the rank out")
    own = [f"selector.{name}" for name, _ in selector.named_parameters()] if selector is not None else []
    if left := [n for n in own if n not in whole and not any(n.startswith(f"{t}.") for t in targets)]:
        raise ValueError(
            f"the selector has a layer of its own that would stay as it begins, {left[0].rpartition('.')[0]}: add it "
            "to lora.targets or lora.train_whole, or switch it off in the selector"
        )
    if targets:
        _inject(tree, config, targets)
    for parameter in whole.values():
        parameter.requires_grad_(True)
    return _counts(tree, config, targets, whole)


def _inject(tree: nn.ModuleDict, config: LoraConfig, targets: list[str]) -> None:
    own = {re.escape(full_name(t)): config.rank_of(t) for t in targets if config.rank_of(t) != config.rank}
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=config.dropout,
        rank_pattern=own,
        alpha_pattern={name: config.scale * rank for name, rank in own.items()},
        # peft matches a list by suffix, which would confuse the two ff_out; an expression matches the whole name.
        target_modules="(?:" + "|".join(re.escape(full_name(t)) for t in targets) + ")",
    )
    peft.inject_adapter_in_model(lora, tree)
    injected = [_short(name) for name, _ in lora_layers(tree)]
    if sorted(injected) != sorted(targets):
        raise RuntimeError(f"peft adapted {len(injected)} modules, expected {len(targets)}")
    for name, parameter in tree.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _counts(
    tree: nn.ModuleDict, config: LoraConfig, targets: list[str], whole: Mapping[str, nn.Parameter]
) -> list[Trained]:
    found = []
    factors = {_short(n): p.numel() for n, p in tree.named_parameters() if "lora_" in n}
    for part in dict.fromkeys(part_of(t) for t in targets):
        layers = [t for t in targets if part_of(t) == part]
        size = sum(n for name, n in factors.items() if part_of(name) == part)
        found.append(Trained(part, config.rank_of(layers[0]), len(layers), size))
    for part in dict.fromkeys(part_of(name) for name in whole):
        mine = {name: p for name, p in whole.items() if part_of(name) == part}
        layers_of = {name.rpartition(".")[0] or name for name in mine}
        found.append(Trained(part, None, len(layers_of), sum(p.numel() for p in mine.values())))
    return found


def lora_layers(*modules: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and LoRA layers of some modules."""
    for module in modules:
        for name, layer in module.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                yield name, layer


def rank_growth(config: LoraConfig, *modules: nn.Module) -> RankGrowth | None:
    """What adds ranks to the adapter of these modules while it is trained; None where it begins with all of them."""
    if config.grow is None:
        return None
    factors = [layer.lora_B["default"].weight for _, layer in lora_layers(*modules)]
    return RankGrowth(config.grow, config.rank, factors)


def trained_parameters(model: "Lavida", selector: Selector | None = None) -> dict[str, nn.Parameter]:
    """What is trained of both, by the names that an adapter file has."""
    return {name: p for name, p in tree_of(model, selector).named_parameters() if p.requires_grad}


def tree_of(model: "Lavida", selector: Selector | None) -> nn.ModuleDict:
    """Model and selector as one tree: checkpoint names for the one, "selector" before the other's."""
    return nn.ModuleDict({"model": model.model} | ({} if selector is None else {"selector": selector}))


def full_name(name: str) -> str:
    return name if part_of(name) == "selector" else f"model.{name}"


def _short(name: str) -> str:
    return name.removeprefix("model.").replace(".base_layer", "")


def trained_whole(tree: nn.ModuleDict, config: LoraConfig) -> dict[str, nn.Parameter]:
    """The parameters that are trained without LoRA, by their short names."""
    parameters = {_short(name): p for name, p in tree.named_parameters() if "lora_" not in name}
    above = sorted({".".join(n.split(".")[:i]) for n in parameters for i in range(1, n.count(".") + 2)})
    chosen = [name for pattern in config.train_whole for name in expand(pattern, above)]
    return {n: p for n, p in parameters.items() if any(n == name or n.startswith(f"{name}.") for name in chosen)}


def merge_lora(*modules: nn.Module) -> None:
    """Folds the low-rank updates of model and selector into the base weights and removes the LoRA layers."""
    for module in modules:
        for name, layer in list(lora_layers(module)):
            layer.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, layer.get_base_layer())
