"""One adapter for several budgets or resolutions: the selectors that a run trains with (docs/method.md, "Recipes")."""

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from baselines import Pooled
from experiments import build
from lavida_adapter.lightning_module import SelectorSchedule
from lavida_adapter.views import geometry_layout
from shirg import Selector, ShirgSelector, UserError

if TYPE_CHECKING:
    from lavida_adapter import Lavida


POOLED = "pooled"
"""A budget of `mix.budgets`: LaViDa's own tokens."""


def build_schedule(cfg: DictConfig, model: "Lavida", selector: Selector) -> SelectorSchedule | None:
    """The selectors of `mix`, which share the layers of the run's own; None where it trains with that one alone.

    A gate with a head trains at each of its levels.

    Raises:
        UserError: for a mix beside such a head, or one that the selector cannot follow.
    """
    budgets, geometries = list(cfg.mix.budgets), list(cfg.mix.geometries)
    if isinstance(selector, ShirgSelector) and selector.head is not None:
        if budgets or geometries:
            raise UserError("selector.adaptive.mode=head draws its own levels in training: leave mix. empty")
        if not cfg.objective.adaptive_k:
            raise UserError("selector.adaptive.mode=head has to be trained: give objective.adaptive_k (0.1)")
        return SelectorSchedule((tuple(selector.at_level(i) for i in range(len(selector.options.adaptive.levels))),))
    if not budgets and not geometries:
        return None
    if geometries and "geometry" not in cfg.selector:
        raise UserError("mix.geometries: this selector has one way of cutting pictures; choose one with a geometry")
    if budgets and "budget" not in cfg.selector:
        raise UserError("mix.budgets: this selector has no budget; choose one that has")
    if POOLED in budgets and any(True for _ in selector.parameters()):
        raise UserError(f"mix.budgets: {POOLED} would leave the selector's own layers without a gradient: take it out")
    turns = []
    for geometry in geometries or [None]:
        turn = [_variant(cfg, model, selector, budget, geometry) for budget in budgets or [None]]
        turns.append(tuple(turn))
    return SelectorSchedule(tuple(turns))


def _variant(cfg: DictConfig, model: "Lavida", selector: Selector, budget: Any, geometry: str | None) -> Selector:
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
    for name, child in selector.named_children():
        setattr(variant, name, child)
    return variant


def tokens_of(model: "Lavida", geometry: Any) -> int:
    """How many tokens a picture has on a geometry; on LaViDa's own, on its largest canvas."""
    return (
        model.config.budgets["full"] if geometry == "lavida_tiles" else geometry_layout(model.config, geometry).n_tokens
    )
