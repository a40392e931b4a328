"""Every selector with every cache method, on a Dream with grouped keys; what is fed is what a LLaDA is fed."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from experiments import build
from experiments.bench.profile_cache import profile_data
from experiments.bench.reference import plain_counts
from experiments.inference import drift
from experiments.schema import CONF
from experiments.token_stats import TokenGeometry, check_counts, count_sources
from lavida_adapter import AdaptiveK, CachePacker, CacheSelector, DecodeConfig, Generation, Lavida, Prefix
from lavida_adapter.engine import DecodeSteps
from tests.lavida_adapter.tiny import picture

A = 4
DECODE = DecodeConfig(max_new_tokens=A)
SIZES = ((128, 128), (110, 60))
"""A picture without padding, and one with."""
LEAST = 40
"""Picture rows that the cache selectors leave; every selector here feeds more."""


SELECTORS = sorted(path.stem for path in (CONF / "selector").glob("*.yaml"))
METHODS = sorted(path.stem for path in (CONF / "cache").glob("*.yaml") if path.stem != "none")


@pytest.fixture(scope="module")
def models() -> dict[str, Lavida]:
    """One of each family, of the same sizes but for the heads of keys, with the same weights before them."""
    llada, dream = (
        build.build_model(build.compose_eval(f"model={name}"), torch.device("cpu"))
        for name in ("tiny_scratch", "tiny_dream_scratch")
    )
    for part in ("vision_tower", "mm_projector"):
        getattr(dream.model, part).load_state_dict(getattr(llada.model, part).state_dict())
    return {"llada": llada, "dream": dream}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of all rows of a Dream's cache, as the command profiles them."""
    out = tmp_path_factory.mktemp("profile") / "p.json"
    profile_data(["model=tiny_dream_scratch", "selector=full"], 0.5, 2, out)
    assert sum(json.loads(out.read_text())["forget"]) / 3 == pytest.approx(0.5, abs=0.02)
    return out


def encoded(model: Lavida, cfg: DictConfig) -> Prefix:
    selector = build.build_selector(cfg, model.config.budgets, model.config).eval()
    prefix = model.encode(
        [picture(size) for size in SIZES],
        ["what is it?"] * 2,
        selector,
        relevance=build.build_relevance(cfg, selector),
        boxes=[((0.2, 0.2, 0.5, 0.5),)] * 2,
    )
    geometry = TokenGeometry(model.config, selector.geometry)
    for chosen, n, size in zip(prefix.selections, prefix.n_visual, SIZES, strict=True):
        check_counts(selector, count_sources(chosen), n, geometry, size, type(selector).__name__)
    return prefix


@cache
def method(name: str, budget: int, profile: Path) -> CacheSelector | CachePacker:
    options = [f"cache.profile={profile}"] if name == "layer_retention" else []
    made = build.build_cache(build.compose_eval(f"cache={name}", f"budget={budget}", *options), {})
    assert made is not None
    return made


def answered(model: Lavida, prefix: Prefix, by: CacheSelector | CachePacker) -> Generation:
    if isinstance(by, CacheSelector):
        return model.generate(prefix, DECODE, cache_selector=by)
    return model.generate(prefix, DECODE, cache_packer=by)


@torch.inference_mode()
@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_with_every_cache_method(name: str, models: dict[str, Lavida], profile: Path) -> None:
    model = models["dream"]
    lm, mask_id = model.lm, model.config.lm.mask_token_id
    cfg = build.compose_eval(f"selector={name}", "budget=base")
    prefix = encoded(model, cfg)
    assert prefix.n_visual == encoded(models["llada"], cfg).n_visual
    prefilled, masks = model.prefill(prefix), torch.full((2, A), mask_id)
    whole = model.generate(prefix, DECODE)
    # The first token comes from the prompt; of the time grid's steps for the others, those run that fill something.
    assert whole.cache is not None and whole.forwards == sum(k > 0 for k in plain_counts(lm, DECODE)) == 2
    first_B = lm.logits(prefilled.last_BD)
    first_B[:, mask_id] = float("-inf")
    assert torch.equal(whole.ids_BA[:, 0], first_B.argmax(-1))
    for kind in METHODS:
        by = method(kind, LEAST, profile)
        if kind == "adaptive_k" and any(s.scores_BN is None for s in prefix.selections):
            continue  # refused: it ranks by the scores of a selector that has some
        out = answered(model, prefix, by)
        assert out.cache is not None and not bool((out.ids_BA == mask_id).any())
        assert torch.equal(out.ids_BA[:, 0], whole.ids_BA[:, 0]), "nothing is cut before the first token"
        assert out.cache.n_bytes < whole.cache.n_bytes, kind
        logits = DecodeSteps(lm, out.cache, A)(masks)
        assert logits.shape == (2, A, model.config.lm.vocab_size) and bool(logits.isfinite().all()), kind
        moved = drift(lm, prefilled, out.cache, A)
        assert all(0 < most < 20 for most in moved.most), kind
        if isinstance(by, CacheSelector):
            assert out.cached_BP is not None and bool((out.cached_BP | prefix.visual_BP)[prefix.mask_BP].all())
            left = (out.cached_BP & prefix.visual_BP).sum(-1)
            assert bool((left <= LEAST).all()) and (kind == "pyramiddrop" or int(left.max()) == LEAST)


@torch.inference_mode()
def test_adaptive_k_ranks_what_an_even_context_added_without_a_score_last(models: dict[str, Lavida]) -> None:
    """A narrow picture has so few tokens that the context takes some of the global view, which `shirg` leaves out."""
    cfg = build.compose_eval("selector=shirg", "context=even", "cache=adaptive_k", "cache.budget=40")
    for model in models.values():
        selector = build.build_selector(cfg, model.config.budgets, model.config).eval()
        relevance = build.build_relevance(cfg, selector)
        prefix = model.encode([picture((24, 128))], ["what is it?"], selector, relevance=relevance)
        (chosen,) = prefix.selections
        assert chosen.scores_BN is not None
        unranked_T = (chosen.index_BT[0] >= 0) & chosen.scores_BN[0][chosen.index_BT[0]].isneginf()
        assert int(unranked_T.sum()) == 16 and prefix.n_visual == (80,)
        for budget, left in ((40, 0), (66, 2), (80, 16)):
            by = AdaptiveK(budget=budget, candidates=(1.0001, 1.0002))
            out = model.generate(prefix, DECODE, cache_selector=by)
            assert out.cached_BP is not None
            cached_T = out.cached_BP[prefix.visual_BP]
            assert int(cached_T.sum()) == budget and int(cached_T[unranked_T].sum()) == left


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["adaptive_k", "dart", "fastv", "pyramiddrop", "redvtp", "sparsevlm"])
def test_a_cache_that_keeps_every_row_answers_as_the_whole_one(
    kind: str, models: dict[str, Lavida], profile: Path
) -> None:
    prefix = encoded(models["dream"], build.compose_eval("selector=norm_topk", "budget=base"))
    (n,) = set(prefix.n_visual)
    out = answered(models["dream"], prefix, method(kind, n, profile))
    assert torch.equal(out.ids_BA, models["dream"].generate(prefix, DECODE).ids_BA)
    assert out.cached_BP is not None and torch.equal(out.cached_BP, prefix.mask_BP)
