"""LoRA through peft: which layers are adapted, how the adapter is added and merged.

Its files are in `lavida_adapter.adapter_files`; how it grows during training is in `lavida_adapter.lora_growth`.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self

import peft
import torch
from torch import nn

from lavida_adapter.checkpoint import fingerprint
from lavida_adapter.lora_growth import Growth, RankGrowth
from lavida_adapter.modules import LavidaModules
from shirg import Selector, UserError

PARTS = ("vision_tower", "mm_projector", "image_newline", "transformer", "selector")
"""Parts of the model that can have a rank and a learning rate of their own: the first word of a parameter's name."""

MOST_RANKS, MOST_NAMES = 65_536, 10_000
"""Beyond any model's width and number of layers; a file that says more would fill the memory."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to; any number of `model.` before its name is skipped."""
    return next(word for word in name.split(".") if word != "model")


def check_parts(where: str, given: Sequence[str]) -> None:
    """Raises UserError for a name that is not one of `PARTS`; `where` is the config key that holds the names."""
    for part in given:
        if part not in PARTS:
            near = ", ".join(difflib.get_close_matches(part, PARTS, n=1, cutoff=0))
            raise UserError(f"{where}.{part}: no such part, the nearest is {near}; the parts are {', '.join(PARTS)}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers get a low-rank update, and which parameters are trained in full."""

    rank: int
    """0 adds no LoRA layer."""
    alpha: float | None = None
    """The update is multiplied by alpha / rank. None means twice the rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Patterns of names below `model.`, or of names that begin with "selector."; see `expand`."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single parts of the model. Their alpha is scaled with them, so that alpha / rank stays the same."""
    train_whole: tuple[str, ...] = ()
    """Patterns of modules or parameters that are trained in full, without LoRA."""
    grow: Growth | None = None
    """Start with fewer ranks than `rank` and add the others during training."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"lora.rank={self.rank}, lora.dropout={self.dropout}: give a rank >= 0 and a dropout in [0, 1)"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"lora.alpha={self.alpha}: give a positive number, or null for twice the rank")
        if self.rank > 0 and not self.targets:
            raise UserError(f"lora.rank={self.rank} has no lora.targets: name linear layers, or give lora.rank=0")
        check_parts("lora.ranks", list(self.ranks))
        if wrong := {part: rank for part, rank in self.ranks.items() if rank < 1}:
            raise UserError(f"lora.ranks={wrong}: give ranks >= 1; what is not named in lora.targets has none")
        if self.grow is not None and self.grow.start >= self.rank:
            raise UserError(f"lora.grow.start={self.grow.start}: give a rank below lora.rank={self.rank}, or no grow")

    def _check_types(self) -> None:
        if not isinstance(self.ranks, Mapping):
            raise UserError(f"lora.ranks={self.ranks!r:.80}: give parts of the model and their ranks")
        for name, rank in {"rank": self.rank, **{f"ranks.{part}": rank for part, rank in self.ranks.items()}}.items():
            if type(rank) is not int or rank > MOST_RANKS:
                raise UserError(f"lora.{name}={rank!r:.80}: give a whole number of at most {MOST_RANKS:,}")
        for name, number in (("alpha", self.alpha), ("dropout", self.dropout)):
            if number is not None and (type(number) not in (int, float) or not math.isfinite(number)):
                raise UserError(f"lora.{name}={number!r:.80}: give a number")
        for name, group in (("targets", self.targets), ("train_whole", self.train_whole)):
            short = isinstance(group, tuple) and len(group) <= MOST_NAMES
            if not short or not all(isinstance(pattern, str) and len(pattern) < 1000 for pattern in group):
                raise UserError(f"lora.{name}={group!r:.80}: give a list of at most {MOST_NAMES:,} patterns of layers")

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The config from the plain values of a YAML or JSON file: lists become tuples, `grow` becomes a Growth."""
        if not isinstance(plain, Mapping):
            raise UserError(f"lora={plain!r:.80}: give the options of an adapter")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        if fields.get("grow") is not None:
            fields["grow"] = Growth(**fields["grow"])
        return cls(**fields)

    def rank_of(self, name: str) -> int:
        return self.ranks.get(part_of(name), self.rank)

    @property
    def scale(self) -> float:
        """alpha / rank: what the product B A is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Trained:
    """How much of one part of the model is trained."""

    part: str
    rank: int | None
    """None for parameters that are trained in full."""
    modules: int
    parameters: int

    def __str__(self) -> str:
        how = "whole" if self.rank is None else f"LoRA, rank {self.rank}"
        layers = f"{self.modules} layer{'s' if self.modules > 1 else ''}"
        return f"{self.part}: {self.parameters:,} parameters ({how}, {layers})"


def add_lora(model: LavidaModules, config: LoraConfig, selector: Selector | None = None) -> list[Trained]:
    """Freezes model and selector, adds LoRA layers, and unfreezes what is trained in full. Returns what is trained.

    LoRA's factors are float32 whatever the dtype of the base: bfloat16 would round most updates away.

    Raises:
        UserError: a target that is not an existing linear layer; an adapter that would train nothing, or one layer in
            two ways; layers of the selector that are not trained; a model that has LoRA layers already.
    """
    tree = tree_of(model, selector)
    if any("lora_" in name for name, _ in tree.named_parameters()):
        raise UserError("the model has LoRA layers already: merge them (lavida_adapter.merge_lora) first")
    tree.requires_grad_(False)
    targets, whole = lora_targets(tree, config), trained_whole(tree, config)
    _check_targets(config, targets, whole)
    _check_selector(selector, targets, whole)
    model.keep_base([*targets, *whole], fingerprint)
    if targets:
        _inject(tree, config, targets)
    for parameter in whole.values():
        parameter.requires_grad_(True)
    return _counts(tree, config, targets, whole)


def lora_targets(tree: nn.ModuleDict, config: LoraConfig) -> list[str]:
    """Short names of the linear layers that get LoRA.

    Raises:
        UserError: a pattern that names no linear layer.
    """
    if config.rank == 0:
        return []
    linears = [_short(name) for name, m in tree.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    return list(dict.fromkeys(name for pattern in config.targets for name in expand(pattern, linears)))


def trained_whole(tree: nn.ModuleDict, config: LoraConfig) -> dict[str, nn.Parameter]:
    """The parameters that are trained in full, by their short names."""
    parameters = {_short(name): p for name, p in tree.named_parameters() if "lora_" not in name}
    above = sorted({".".join(n.split(".")[:i]) for n in parameters for i in range(1, n.count(".") + 2)})
    chosen = [name for pattern in config.train_whole for name in expand(pattern, above)]
    return {n: p for n, p in parameters.items() if any(_is_in(n, name) for name in chosen)}


def _check_targets(config: LoraConfig, targets: Sequence[str], whole: Mapping[str, nn.Parameter]) -> None:
    if both := sorted({t for t in targets for name in whole if name.startswith(f"{t}.")}):
        raise UserError(f"lora.targets and lora.train_whole both name {', '.join(both[:3])}: give it to one of them")
    if not targets and not whole:
        raise UserError("lora: nothing would be trained; give lora.rank > 0 with targets, or lora.train_whole")
    unused = sorted(config.ranks.keys() - {part_of(t) for t in targets})
    if targets and unused:
        raise UserError(f"lora.ranks.{unused[0]}: lora.targets has no layer of it; add one, or take the rank out")


def _check_selector(selector: Selector | None, targets: Sequence[str], whole: Mapping[str, nn.Parameter]) -> None:
    """A selector's own layers start without training, so leaving one frozen is an error."""
    own = [] if selector is None else [f"selector.{name}" for name, _ in selector.inner.named_parameters()]
    if left := [n for n in own if n not in whole and not any(_is_in(n, t) for t in targets)]:
        raise UserError(
            f"the selector has a layer of its own that would not be trained, {left[0].rpartition('.')[0]}: add it "
            "to lora.targets or lora.train_whole, or switch it off in the selector"
        )


def _inject(tree: nn.ModuleDict, config: LoraConfig, targets: list[str]) -> None:
    peft.inject_adapter_in_model(peft_config(config, targets), tree)
    injected = [_short(name) for name, _ in lora_layers(tree)]
    if sorted(injected) != sorted(targets):
        raise RuntimeError(f"peft adapted {len(injected)} modules, expected {len(targets)}")
    for name, parameter in tree.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def peft_config(
    config: LoraConfig, targets: Sequence[str], rename: Callable[[str], str] = lambda name: name
) -> peft.LoraConfig:
    """The config in peft's terms, for the linear layers with these short names.

    `rename` maps a name of our tree to that of the model that peft is to find the layer in.
    """
    names = {t: re.escape(rename(full_name(t))) for t in targets}
    ranks = {names[t]: config.rank_of(t) for t in targets if config.rank_of(t) != config.rank}
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=config.dropout,
        rank_pattern=ranks,
        alpha_pattern={name: config.scale * rank for name, rank in ranks.items()},
        # peft matches a list by suffix, which would confuse the two ff_out; an expression matches the whole name.
        target_modules="(?:" + "|".join(names.values()) + ")",
    )


def _counts(
    tree: nn.ModuleDict, config: LoraConfig, targets: list[str], whole: Mapping[str, nn.Parameter]
) -> list[Trained]:
    """What is trained, part by part: LoRA first."""
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


def trained_parameters(model: LavidaModules, selector: Selector | None = None) -> dict[str, nn.Parameter]:
    """What is trained of model and selector, by its name in their common tree."""
    return {name: p for name, p in tree_of(model, selector).named_parameters() if p.requires_grad}


def tree_of(model: LavidaModules, selector: Selector | None) -> nn.ModuleDict:
    """Model and (inner) selector as one tree: "model." and a checkpoint's name, or "selector." and the selector's."""
    return nn.ModuleDict({"model": model.model} | ({} if selector is None else {"selector": selector.inner}))


def full_name(name: str) -> str:
    """The name in the tree of `tree_of` for a short one."""
    return name if part_of(name) == "selector" else f"model.{name}"


def _short(name: str) -> str:
    """The name as a config writes it: without "model.", and as it was before LoRA was added."""
    return name.removeprefix("model.").replace(".base_layer", "")


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def lora_layers(*modules: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every LoRA layer of the modules, with its name."""
    named = (pair for module in modules for pair in module.named_modules())
    yield from ((name, layer) for name, layer in named if isinstance(layer, peft.tuners.lora.LoraLayer))


def merge_lora(*modules: nn.Module) -> None:
    """Adds the low-rank updates to the base weights and removes the LoRA layers."""
    for module in modules:
        for name, layer in list(lora_layers(module)):
            layer.merge()
            torch.autograd.graph.increment_version(layer.get_base_layer().weight)  # peft does not say that it changed
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, layer.get_base_layer())


def expand(pattern: str, names: Sequence[str]) -> list[str]:
    """All names that match a pattern.

    `{a,b}` means a or b; `{0-3}` a range of numbers; `*` every number; `{:4/26}` the first 4 of every 26 layers, of
    as many as exist at this place, rounded up.

    Raises:
        UserError: an alternative that matches nothing; the nearest names are listed.
    """
    heads = [""]
    for piece in re.split(r"(\{[^}]*\})", pattern):
        if piece.startswith("{"):
            grown: list[str] = []
            for head in heads:
                grown += [head + choice for choice in _choices(piece[1:-1], pattern, head, names)]
                if len(grown) > MOST_NAMES:
                    raise UserError(
                        f"lora: {pattern!r:.80} stands for more than {MOST_NAMES:,} names: write it shorter"
                    )
            heads = grown
        else:
            heads = [head + piece for head in heads]
    found: list[str] = []
    for concrete in heads:
        regex = re.compile(_regex(concrete))
        hits = [name for name in names if regex.fullmatch(name)]
        if not hits:
            near = ", ".join(difflib.get_close_matches(concrete, names, n=3, cutoff=0))
            raise UserError(f"lora: {concrete!r} names nothing in this model; the nearest names are {near}")
        found += hits
    return found


def _choices(text: str, pattern: str, head: str, names: Sequence[str]) -> list[str]:
    """The alternatives between two braces, `a,b`, `0-3` or `:4/26`; `head` is the name before them."""
    if span := re.fullmatch(r"(\d+)-(\d+)", text):
        if int(span[1]) > int(span[2]):
            raise UserError(f"lora: the range {{{text}}} in {pattern!r} is empty: write the smaller number first")
        # One more than is allowed, so that `expand` refuses it without making them all.
        return [str(i) for i in range(int(span[1]), min(int(span[2]), int(span[1]) + MOST_NAMES) + 1)]
    if share := re.fullmatch(r":([1-9]\d*)/([1-9]\d*)", text):
        if int(share[1]) > int(share[2]):
            raise UserError(f"lora: the share {{{text}}} in {pattern!r} is more than all layers: give at most 1")
        layer = re.compile(_regex(head) + r"(\d+)(?:\..*)?")
        count = 1 + max((int(match[1]) for name in names if (match := layer.fullmatch(name))), default=-1)
        # Where no layer matches, the text stays as it is, and `expand` raises with the nearest names.
        return [str(i) for i in range(math.ceil(count * Fraction(int(share[1]), int(share[2]))))] or [text]
    return text.split(",")


def _regex(concrete: str) -> str:
    return re.escape(concrete).replace(r"\*", r"\d+")


def rank_growth(config: LoraConfig, *modules: nn.Module) -> RankGrowth | None:
    """The rank growth of the LoRA layers in these modules; None for a config without `grow`.

    Raises:
        UserError: growth that would start with all ranks.
    """
    if config.grow is None:
        return None
    factors = [layer.lora_B["default"].weight for _, layer in lora_layers(*modules)]
    return RankGrowth(config.grow, factors)
