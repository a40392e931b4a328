"""Training one adapter for several budgets or resolutions: the selectors of a run (docs/method.md, "Recipes")."""

from typing import Any

from omegaconf import DictConfig

from baselines import Pooled
from experiments import build
from lavida_adapter import Lavida
from lavida_adapter.lightning_module import SelectorSchedule
from lavida_adapter.views import geometry_layout
from shirg import Selector, ShirgSelector, UserError

POOLED = "pooled"
"""The value of `mix.budgets` that means LaViDa's own pooled tokens."""


def build_schedule(cfg: DictConfig, model: Lavida, selector: Selector) -> SelectorSchedule | None:
    """The selectors of `mix`, which share the trained layers of the run's own; None without `mix`.

    A SHIRG selector whose budget is predicted by a head trains at each of the head's levels instead.

    Raises:
        UserError: `mix` together with such a head, or a value of `mix` that the selector does not support.
    """
    budgets, geometries = list(cfg.mix.budgets), list(cfg.mix.geometries)
    inner = selector.inner
    if isinstance(inner, ShirgSelector) and inner.head is not None:
        if inner is not selector:
            raise UserError("selector.adaptive.mode=head trains at its own levels: leave context=none")
        if budgets or geometries:
            raise UserError("selector.adaptive.mode=head trains at its own levels: leave mix. empty")
        if not cfg.objective.adaptive_k:
            raise UserError("selector.adaptive.mode=head has to be trained: give objective.adaptive_k, for example 0.1")
        return SelectorSchedule((tuple(inner.at_level(i) for i in range(len(inner.options.adaptive.levels))),))
    if not budgets and not geometries:
        return None
    if geometries and "geometry" not in cfg.selector:
        raise UserError("mix.geometries: this selector supports one geometry only; choose one with a geometry option")
    if budgets and "budget" not in cfg.selector:
        raise UserError("mix.budgets: this selector has no budget; choose one with a budget option")
    if POOLED in budgets and any(True for _ in selector.parameters()):
        raise UserError(f"mix.budgets: {POOLED} gives the selector's own layers no gradient: take it out")
    turns = []
    for geometry in geometries or [None]:
        turn = [_variant(cfg, model, selector, budget, geometry) for budget in budgets or [None]]
        turns.append(tuple(turn))
    return SelectorSchedule(tuple(turns))


def _variant(cfg: DictConfig, model: Lavida, selector: Selector, budget: Any, geometry: str | None) -> Selector:
    """The selector at another budget and geometry (None: its own). On another geometry the kept fraction stays."""
    if budget == POOLED:
        return Pooled()
    changed = cfg.copy()
    budgets = model.config.budgets
    if budget is not None:
        changed.selector.budget = budget
    if geometry is not None:
        count = build.resolve_budget(changed.selector.budget, budgets)
        changed.selector.geometry = geometry
        if count != "matched":
            share = tokens_of(model, geometry) / tokens_of(model, cfg.selector.geometry)
            changed.selector.budget = max(1, round(count * share))
    variant = build.build_selector(changed, budgets, model.config).to(model.device)
    for name, child in selector.inner.named_children():
        setattr(variant.inner, name, child)
    return variant


def tokens_of(model: Lavida, geometry: Any) -> int:
    """The number of tokens of a picture on a geometry; on LaViDa's own, that of its largest canvas."""
    return (
        model.config.budgets["full"] if geometry == "lavida_tiles" else geometry_layout(model.config, geometry).n_tokens
    )
