"""LoRA through peft: which layers, adding, growing, merging, saving and loading."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Self

import peft
import torch
from torch import Tensor, nn

from shirg import MissingFileError, Selector, UserError

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavida_adapter.checkpoint import fingerprint

if TYPE_CHECKING:
    from lavida_adapter.model import Lavida


PARTS = ("vision_tower", "mm_projector", "image_newline", "transformer", "selector")
"""What has a rank or a learning rate of its own: the first word of a name."""


def part_of(name: str) -> str:
    """The part of a name as it stands below `model.`, in the model itself, or in a training stage."""
    words = [word for word in name.split(".") if word != "model"]
    return words[0]


def check_parts(where: str, given: Sequence[str]) -> None:
    """Raises UserError for a word that is no part of the model."""
    for part in given:
        if part not in PARTS:
            near = ", ".join(difflib.get_close_matches(part, PARTS, n=1, cutoff=0))
            raise UserError(f"{where}.{part}: no such part, the nearest is {near}; the parts are {', '.join(PARTS)}")


def expand(pattern: str, names: Sequence[str]) -> list[str]:
    """The existing names that a pattern stands for, every alternative of it.

    `{a,b}` are alternatives, `{0-3}` a range, `{:4/26}` the first 4 of every 26 of the layers that exist there (rounded
    up), `*` every number.

    Raises:
        UserError: when an alternative names nothing; the nearest names are listed.
    """
    heads = [""]
    for piece in re.split(r"(\{[^}]*\})", pattern):
        if piece.startswith("{"):
            heads = [head + choice for head in heads for choice in _choices(piece[1:-1], pattern, head, names)]
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
    """What stands between two braces: `a,b`, `0-3` or `:4/26`; `head` is what stands before them."""
    if span := re.fullmatch(r"(\d+)-(\d+)", text):
        if int(span[1]) > int(span[2]):
            raise UserError(f"lora: the range {{{text}}} in {pattern!r} is empty: write the smaller number first")
        return [str(i) for i in range(int(span[1]), int(span[2]) + 1)]
    if share := re.fullmatch(r":([1-9]\d*)/([1-9]\d*)", text):
        if int(share[1]) > int(share[2]):
            raise UserError(f"lora: the share {{{text}}} in {pattern!r} is more than all layers: give at most 1")
        layer = re.compile(_regex(head) + r"(\d+)(?:\..*)?")
        count = 1 + max((int(match[1]) for name in names if (match := layer.fullmatch(name))), default=-1)
        # Without a layer there, the message of `expand` names what is nearest.
        return [str(i) for i in range(math.ceil(count * Fraction(int(share[1]), int(share[2]))))] or [text]
    return text.split(",")


def _regex(concrete: str) -> str:
    return re.escape(concrete).replace(r"\*", r"\d+")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """When ranks are added: doubled each time `patience` steps in a row lower their mean loss by less than `gain`."""

    start: int = 16
    patience: int = 200
    gain: float = 0.01
    """As a share of the best mean so far."""

    def __post_init__(self) -> None:
        if self.start < 1 or self.patience < 1 or not 0 <= self.gain < 1:
            raise UserError(
                f"lora.grow={{start: {self.start}, patience: {self.patience}, gain: {self.gain}}}: give a rank and a "
                "number of steps of at least 1, and a share in [0, 1)"
            )


class RankGrowth:
    """Lets the first `rank` columns of every B learn, and more of them when told to by the loss."""

    def __init__(self, config: Growth, most: int, factors_B: list[nn.Parameter]) -> None:
        """`factors_B` are the B matrices [out, r] of all LoRA layers; those of a smaller rank are used up sooner."""
        self.config, self.most, self.rank = config, most, config.start
        self.best: float | None = None
        self.seen = 0
        self.total = torch.zeros((), dtype=torch.float64)
        for factor in factors_B:
            factor.register_hook(self._only_begun)

    def _only_begun(self, gradient_OR: Tensor) -> Tensor:
        begun_R = torch.arange(gradient_OR.shape[1], device=gradient_OR.device) < self.rank
        return gradient_OR * begun_R

    def observe(self, loss: Tensor) -> float | None:
        """Takes the loss of a step; at the end of each `patience` steps their mean, else None."""
        if self.rank >= self.most:
            return None
        self.total = self.total.to(loss.device) + loss.detach()
        self.seen += 1
        if self.seen < self.config.patience:
            return None
        mean = (self.total / self.seen).item()
        self.seen, self.total = 0, torch.zeros_like(self.total)
        return mean

    def decide(self, mean: float) -> bool:
        """Compares the mean of a stretch of steps with the best so far; True when ranks were added."""
        if self.best is None or mean < self.best * (1 - self.config.gain):
            self.best = mean
            return False
        self.rank, self.best = min(2 * self.rank, self.most), min(self.best, mean)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "best": self.best, "seen": self.seen, "total": self.total.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rank, self.best, self.seen = state["rank"], state["best"], state["seen"]
        self.total = torch.tensor(state["total"], dtype=torch.float64)


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
        UserError: for a target that is not an existing linear layer, an adapter that would train nothing or a layer
            in two ways, layers of the selector that it leaves out, or a model that carries an adapter already.
    """
    tree = tree_of(model, selector)
    if any("lora_" in name for name, _ in tree.named_parameters()):
        raise UserError("the model carries LoRA layers already: merge them (lavida_adapter.merge_lora) first")
    tree.requires_grad_(False)
    linears = [_short(name) for name, module in tree.named_modules() if isinstance(module, nn.Linear)]
    patterns = config.targets if config.rank > 0 else ()
    targets = list(dict.fromkeys(name for pattern in patterns for name in expand(pattern, linears)))
    whole = trained_whole(tree, config)
    if both := sorted({t for t in targets for name in whole if name.startswith(f"{t}.")}):
        raise UserError(f"lora.targets and lora.train_whole both name {', '.join(both[:3])}: give it to one of them")
    if not targets and not whole:
        raise UserError("lora: nothing would be trained; give lora.rank > 0 with targets, or lora.train_whole")
    if idle := sorted(config.ranks.keys() - {part_of(t) for t in targets}) if targets else []:
        raise UserError(f"lora.ranks.{idle[0]}: lora.targets has no layer of it; add one, or take the rank out")
    own = [f"selector.{name}" for name, _ in selector.named_parameters()] if selector is not None else []
    if left := [n for n in own if n not in whole and not any(n.startswith(f"{t}.") for t in targets)]:
        raise UserError(
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


ADAPTER, META = "adapter.safetensors", "adapter.json"


def save_adapter(model: "Lavida", config: LoraConfig, folder: str | Path, selector: Selector | None = None) -> None:
    """Writes the trained tensors alone, with their configuration and the fingerprint of the base."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().cpu().contiguous() for n, p in trained_parameters(model, selector).items()}
    meta = {"lora": asdict(config), "base": base_fingerprint(model, config, selector)}
    for name, write in (
        (ADAPTER, lambda p: save_file(tensors, p)),
        (META, lambda p: p.write_text(json.dumps(meta, indent=2))),
    ):
        temporary = folder / f".{name}"
        write(temporary)
        temporary.replace(folder / name)


def load_adapter(model: "Lavida", folder: str | Path, selector: Selector | None = None) -> LoraConfig:
    """Puts a saved adapter on its base, and what it trained of a selector on a selector of the same kind.

    Raises:
        MissingFileError: no adapter there.
        UserError: the adapter belongs to another base or selector, or its tensors do not fit.
    """
    folder = Path(folder)
    if not (folder / META).is_file() or not (folder / ADAPTER).is_file():
        raise MissingFileError(f"{folder} holds no adapter ({META} and {ADAPTER}): give the folder that train.py named")
    try:
        meta = json.loads((folder / META).read_text())
        config, base = LoraConfig.from_dict(meta["lora"]), meta["base"]
        tensors = load_file(folder / ADAPTER)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read ({error}): train it again") from error
    if own := sorted(name for name in tensors if part_of(name) == "selector"):
        if selector is None or not any(True for _ in selector.parameters()):
            raise UserError(
                f"the adapter in {folder} holds {own[0]}, a layer of a selector that this one does not have: give the "
                "selector's knobs as train.py printed them"
            )
    if base != base_fingerprint(model, config, selector):
        raise UserError(f"the adapter in {folder} was trained on another base checkpoint: load that one (model.path=)")
    add_lora(model, config, selector)
    wanted = trained_parameters(model, selector)
    if tensors.keys() != wanted.keys() or any(tensors[n].shape != p.shape for n, p in wanted.items()):
        raise UserError(f"the tensors in {folder / ADAPTER} are not those that its {META} describes")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return config


def base_fingerprint(model: "Lavida", config: LoraConfig, selector: Selector | None = None) -> str:
    """Fingerprint of what the adapter leaves as it is; the parameters trained whole are not part of it."""
    return fingerprint(model, skip=tuple(full_name(name) for name in trained_whole(tree_of(model, selector), config)))
