"""What every selector must hold. A new one joins by one line in SELECTORS."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
import yaml

from baselines import (
    CDPruner,
    DivPrune,
    Full,
    GlobalOnly,
    NormTopK,
    Oracle,
    Pooled,
    Random,
    Saint,
    SaintVote,
    ToMe,
    UniformGrid,
    VisionZip,
    VisPruner,
)
from shirg import Selection, Selector, ShirgSelector, Source, VisionFeatures
from tests.cases import CONF, COORDS, FAMILY, OTHERS, Case
from tests.features import GRIDS, PADDED, SIZES, differs, features_for, permute_views, projector, recorded, through
from tests.method_cases import METHODS

SELECTED = ("tokens_BTD", "index_BT", "source_BT", "box_BT4", "mask_BT")

SELECTORS = {
    "pooled": Case(Pooled),
    "full": Case(Full, flips={"newline": "none", "geometry": "single_672"}),
    "random": Case(Random, {"budget": 60}, flips={"budget": 61, "seed": 1, "geometry": "single_672"}),
    "uniform_grid": Case(UniformGrid, {"budget": 60}, flips={"budget": 61, "scope": "global"}),
    "norm_topk": Case(NormTopK, {"budget": 60}, flips={"budget": 61, "sign": -1}),
    "global_only": Case(GlobalOnly),
    "oracle": Case(Oracle, {"budget": 60}, flips={"budget": 61}),
    "saint": Case(
        Saint,
        {"budget": 60},
        flips={"budget": 61, "scope": "global", "schedule": "constant", "rho": 0.5, "layer": -1},
    ),
    "saint_vote": Case(
        SaintVote,
        {"budget": 60, "tau_step": 0.25},
        flips={
            "budget": 61,
            "scope": "global",
            "tau": 0.3,
            "tau_step": 0.5,
            "votes": 1,
            "gamma": 0.1,
            "layer": -1,
        },
    ),
    "divprune": Case(DivPrune, {"budget": 60}, flips={"budget": 61, "scope": "global", "space": "encoder"}),
    "cdpruner": Case(CDPruner, {"budget": 60}, flips={"budget": 61, "scope": "global", "space": "encoder", "sign": -1}),
    "vispruner": Case(
        VisPruner,
        {"budget": 60},
        flips={"budget": 61, "scope": "global", "important": 0.2, "rho": 0.1, "order": "reading", "layer": -2},
    ),
    "visionzip": Case(
        VisionZip,
        {"budget": 60},
        flips={"budget": 61, "scope": "global", "contextual": 0.5, "targets": "centres", "layer": -2},
    ),
    "tome": Case(
        ToMe, {"budget": 60}, flips={"budget": 61, "scope": "global", "rho": 0.4, "order": "reading", "layer": -2}
    ),
    **METHODS,
    **FAMILY,
}
ALL = {**SELECTORS, **OTHERS}


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest) -> Case:
    return ALL[request.param]


@pytest.fixture
def selector(case: Case, request: pytest.FixtureRequest) -> Selector:
    """Of a padded view it keeps less, because a third of its tokens are no choice."""
    is_padded = "grid" in request.fixturenames and request.getfixturevalue("grid") == PADDED
    fewer = {"budget": 40} if is_padded and "budget" in case.options else {}
    return case.build(**{**case.options, **fewer})


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(a: Selection, b: Selection) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in SELECTED)


def is_kept(chosen: Selection) -> torch.Tensor:
    return chosen.mask_BT & (chosen.source_BT == int(Source.KEPT))


def on_grids(*grids: tuple[int, int]) -> pytest.MarkDecorator:
    """Each selector on each of LaViDa's canvases, or once on the one canvas of its own geometry."""
    geometry = {name: case.build(**case.options).geometry for name, case in ALL.items()}
    pairs = [(name, grid) for name in ALL for grid in grids if geometry[name] == "lavida_tiles" or grid == grids[0]]
    ids = [f"{name}-{rows}x{cols}" for name, (rows, cols) in pairs]
    return pytest.mark.parametrize(("case", "grid"), pairs, indirect=["case"], ids=ids)


@on_grids(*GRIDS, PADDED)
def test_a_selection_is_well_formed(selector: Selector, grid: tuple[int, int]) -> None:
    features = features_for(selector, grid, sizes=SIZES[grid])
    chosen = selector(features)
    b, t = chosen.mask_BT.shape
    assert b == 3 and chosen.tokens_BTD.shape == (3, t, 16) and chosen.box_BT4.shape == (3, t, 4)
    assert chosen.index_BT.shape == chosen.source_BT.shape == (3, t)
    assert chosen.index_BT.dtype == chosen.source_BT.dtype == torch.int64
    assert (chosen.mask_BT.dtype, chosen.box_BT4.dtype) == (torch.bool, torch.float32)
    if chosen.scores_BN is not None:
        assert chosen.scores_BN.shape == features.valid_BN.shape and chosen.scores_BN.dtype == torch.float32
    assert_kept(features, chosen)


def assert_kept(features: VisionFeatures, chosen: Selection) -> None:
    """Kept tokens are valid source tokens, unchanged, each once and in reading order; unused slots are empty."""
    kept = is_kept(chosen)
    assert torch.equal(chosen.index_BT >= 0, kept)
    for sample in range(len(features.ids)):
        index = chosen.index_BT[sample][kept[sample]]
        assert bool(features.valid_BN[sample, index].all()), "padding is never kept"
        assert bool((features.layout.rank_N[index].diff() > 0).all()), "each once, in reading order"
        assert torch.equal(chosen.tokens_BTD[sample][kept[sample]], features.tokens_BND[sample, index])
        assert torch.equal(chosen.box_BT4[sample][kept[sample]], features.box_BN4()[sample, index])
    empty = ~chosen.mask_BT | (chosen.source_BT == int(Source.NEWLINE))
    assert bool((chosen.tokens_BTD[empty] == 0).all())


@pytest.mark.parametrize(
    ("grid", "budget"), [((2, 2), 60), ((2, 2), 100), ((2, 2), "matched"), (PADDED, 50), (PADDED, "matched")]
)
def test_budgets_are_exact(case: Case, grid: tuple[int, int], budget: Any) -> None:
    if "budget" not in inspect.signature(case.build).parameters:
        with pytest.raises(TypeError, match="budget"):
            case.build(**case.options, budget=budget)
        return
    selector = case.build(**{**case.options, "budget": budget})
    if grid == PADDED and selector.geometry != "lavida_tiles":
        pytest.skip("its own views")
    features = features_for(selector, grid, sizes=SIZES[grid])
    chosen = selector(features)
    counts = chosen.mask_BT.sum(-1).tolist()
    base = features_for(Pooled(), grid, sizes=SIZES[grid])
    due = Pooled()(base).mask_BT.sum(-1).tolist() if budget == "matched" else [budget] * 3
    assert selector.may_use_less or not selector.may_use_less_on(features.layout)
    assert counts == due or selector.may_use_less_on(features.layout)
    assert all(a <= b for a, b in zip(counts, due, strict=True))
    if grid == PADDED and getattr(selector, "options", None) is not None and case.options.get("underflow") != "mask":
        # Less by the windows of the scaffold that are padding alone, and by nothing else; the first picture has none.
        lost = (~chosen.mask_BT & (chosen.source_BT == int(Source.SCAFFOLD))).sum(-1).tolist()
        assert [a + b for a, b in zip(counts, lost, strict=True)] == due and lost[0] == 0


def test_slots_do_not_depend_on_content(selector: Selector) -> None:
    features = features_for(selector, (2, 2), sizes=SIZES[(2, 2)])
    here = selector(features)
    for tokens in (torch.zeros_like(features.tokens_BND), features.tokens_BND.abs() * 1e4):
        there = selector(replace(features, tokens_BND=tokens, taps=recorded(tokens)))
        assert there.mask_BT.shape == here.mask_BT.shape
        assert selector.may_use_less_on(features.layout) or torch.equal(there.mask_BT.sum(-1), here.mask_BT.sum(-1))


def test_a_budget_that_is_too_large_names_the_picture(case: Case, selector: Selector) -> None:
    if "budget" not in case.options or case.options.get("underflow") == "mask":
        pytest.skip("no budget, or slots may stay unused")
    features = features_for(selector, (2, 2), sizes=[(768, 768), (3000, 300)])
    wanted = features.n_valid[1] + 75
    culprit = r"picture 'picture-1'" if features.n_valid[0] > wanted else "budget"
    with pytest.raises(ValueError, match=rf"budget {wanted} .*{culprit}"):
        case.build(**{**case.options, "budget": wanted})(features)


def test_repeats_bit_for_bit(case: Case, selector: Selector) -> None:
    features = features_for(selector, (2, 2), sizes=SIZES[(2, 2)])
    first, second = case.build(**case.options), case.build(**case.options)
    torch.manual_seed(0)
    here = first(features)
    first(features_for(selector, (2, 2), seed=9))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert same(here, first(features)) and same(here, second(features))
    with threads(2):
        assert torch.equal(here.index_BT, first(features).index_BT)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_given_stays_as_it_is(selector: Selector) -> None:
    features = features_for(selector, (2, 2), sizes=SIZES[(2, 2)])
    given = {f.name: getattr(features, f.name) for f in fields(features)} | dict(features.taps)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    selector(features)
    for name, value in before.items():
        assert torch.equal(given[name], value), name


@on_grids((2, 2), PADDED)
def test_a_picture_does_not_depend_on_its_batch_mates(selector: Selector, grid: tuple[int, int]) -> None:
    features = features_for(selector, grid, sizes=SIZES[grid])
    together = selector(features)
    for sample in range(3):
        alone = selector(features[sample : sample + 1])
        for name in SELECTED:
            assert torch.allclose(getattr(alone, name)[0], getattr(together, name)[sample], atol=1e-6), name
    backwards = replace(
        features,
        ids=features.ids[::-1],
        n_valid=features.n_valid[::-1],
        counts=features.counts[::-1] if features.counts else None,
        boxes=features.boxes[::-1] if features.boxes else None,
        taps={name: tap.flip(0) for name, tap in features.taps.items()},
        **{
            f.name: getattr(features, f.name).flip(0)
            for f in fields(features)
            if isinstance(getattr(features, f.name), torch.Tensor)
        },
    )
    assert torch.equal(selector(backwards).index_BT, together.index_BT.flip(0))


@pytest.mark.parametrize("views", [(4, 2, 0, 1, 3), (1, 2, 3, 4, 0)])
def test_the_numbering_of_views_changes_nothing(selector: Selector, views: tuple[int, ...]) -> None:
    features = features_for(selector, (2, 2), sizes=SIZES[(2, 2)])
    order = [view for view in views if view < features.layout.n_views]
    here, there = selector(features), selector(permute_views(features, order))
    assert torch.equal(here.mask_BT, there.mask_BT)
    for name in ("tokens_BTD", "source_BT", "box_BT4"):
        assert torch.equal(getattr(here, name)[here.mask_BT], getattr(there, name)[here.mask_BT]), name


def test_the_sample_matters_only_to_selectors_that_read_it(selector: Selector) -> None:
    """Prompts about one picture share a selection, unless `reads_sample` is set."""
    features = features_for(selector, (2, 2), sizes=SIZES[(2, 2)])
    ids, boxes = tuple(f"other {i}" for i in features.ids), (((0.5, 0.1, 0.6, 0.9),),) * len(features.ids)
    assert same(selector(features), selector(replace(features, ids=ids, boxes=boxes))) != selector.reads_sample


def test_scale_changes_no_choice(selector: Selector) -> None:
    features = features_for(selector, (2, 2), sizes=SIZES[(2, 2)])
    here = selector(features)
    for scale in (0.25, 8.0):
        tokens = features.tokens_BND * scale
        scaled = selector(replace(features, tokens_BND=tokens, taps={**features.taps, "encoder": tokens}))
        assert torch.equal(here.index_BT, scaled.index_BT)
        assert torch.allclose(scaled.tokens_BTD, here.tokens_BTD * scale, rtol=1e-5)


def test_gradient_reaches_kept_tokens_alone(selector: Selector) -> None:
    features = features_for(selector, (2, 2), sizes=[(640, 480)])
    x = features.tokens_BND.clone().requires_grad_()
    chosen = selector(replace(features, tokens_BND=x))
    kept = is_kept(chosen)
    (grad,) = torch.autograd.grad(chosen.tokens_BTD[kept].sum() + 0 * x.sum(), x)
    expected = torch.zeros(features.layout.n_tokens)
    expected[chosen.index_BT[kept]] = 1
    assert torch.equal(grad[0], expected[:, None].expand(-1, 16))
    assert chosen.tokens_BTD.requires_grad and not chosen.box_BT4.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_come_back_in_their_dtype(selector: Selector, dtype: torch.dtype) -> None:
    assert selector(features_for(selector, (1, 2), sizes=SIZES[(1, 2)], dtype=dtype)).tokens_BTD.dtype == dtype


def test_choosing_commutes_with_projecting(selector: Selector) -> None:
    if selector.stage == "post":
        pytest.skip("sees projected tokens only")
    features, project = features_for(selector, (2, 2), sizes=SIZES[(2, 2)]), projector()
    chosen = selector(features)
    kept = is_kept(chosen)
    early, late = project(chosen.tokens_BTD)[kept], project(features.tokens_BND)
    rows = torch.arange(3)[:, None].expand_as(kept)[kept]
    assert torch.allclose(early, late[rows, chosen.index_BT[kept]], atol=1e-6)


@on_grids((2, 2), (0, 0))
def test_compiles_to_one_graph(case: Case, grid: tuple[int, int]) -> None:
    """Small views and a small budget, because methods that work in rounds are compiled round by round."""
    options = {**case.options, "budget": 34} if "budget" in case.options else case.options
    selector = case.build(**options)
    if isinstance(selector, Random):
        pytest.skip("draws on the host by design")
    features = features_for(selector, grid, side=6, sizes=SIZES[grid])
    torch.compiler.reset()
    compiled = torch.compile(selector, fullgraph=True, backend="aot_eager", dynamic=False)(features)
    eager = selector(features)
    for name in SELECTED:
        assert torch.allclose(getattr(compiled, name), getattr(eager, name), atol=1e-5), name


@pytest.mark.gpu
def test_never_waits_for_the_device(selector: Selector) -> None:
    features = on_device(features_for(selector, (2, 2), sizes=SIZES[(2, 2)]), "cuda")
    selector.to("cuda")
    here = selector(features)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = selector(features)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(here, chosen) and chosen.tokens_BTD.is_cuda
    assert torch.equal(
        chosen.index_BT.cpu(), selector.cpu()(features_for(selector, (2, 2), sizes=SIZES[(2, 2)])).index_BT
    )


def on_device(features: VisionFeatures, device: str) -> VisionFeatures:
    tensors = {f.name: getattr(features, f.name) for f in fields(features)}
    moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    taps = {name: tap.to(device) for name, tap in features.taps.items()}
    return replace(features, layout=features.layout.to(device), taps=taps, **moved)


def test_every_option_changes_something_or_is_refused(case: Case) -> None:
    for option, value in case.flips.items():
        flipped = value if isinstance(value, dict) else {option: value}
        base = {**case.options, **{k: v for k, v in flipped.items() if k != option}}
        here, there = read(case, base), read(case, {**base, **flipped})
        if option in case.refused:
            assert here is not None and there is None, f"{option} must be refused here"
        else:
            assert there is not None and (here is None or differs(here, there)), option


def test_no_option_is_left_out() -> None:
    """Each option is flipped in each case, and each option of each class is somewhere seen to change something."""
    live: dict[Any, set[str]] = {}
    for case in ALL.values():
        parameters = inspect.signature(case.build).parameters
        assert set(case.flips) == set(parameters) and case.refused <= set(parameters)
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values())
        live.setdefault(case.build, set()).update(set(case.flips) - case.refused)
    for build, options in live.items():
        assert options | COORDS >= set(inspect.signature(build).parameters), build


def read(case: Case, options: dict[str, Any]) -> Selection | None:
    """What the language model reads; None where the selector refuses the options or the pictures."""
    try:
        selector = case.build(**options)
        return through(selector, features_for(selector, (2, 2), sizes=[(640, 480), (300, 1000)]))
    except ValueError:
        return None


def test_an_unknown_option_is_refused(case: Case) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        case.build(**case.options, no_such_option=1)


@pytest.mark.parametrize("name", SELECTORS)
def test_the_yaml_says_what_the_code_does(name: str) -> None:
    case = SELECTORS[name]
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    parameters = inspect.signature(case.build).parameters
    if config.pop("defaults", None):  # another file with some options changed
        assert config and set(config) <= set(parameters)
        assert all(value != parameters[option].default for option, value in config.items())
        return
    target = config.pop("_target_")
    assert target == f"{case.build.__module__}.{case.build.__qualname__}"
    assert set(config) == set(parameters)
    assert config.pop("budget", "${budget}") == "${budget}"
    assert config.pop("seed", "${seed}") == "${seed}", "the run's seed reaches what draws"
    required = {"budget": 34} if "budget" in parameters else {}
    default = case.build(**required)
    for option, value in config.items():
        known = getattr(default.options, option) if isinstance(default, ShirgSelector) else None
        if is_dataclass(known):
            code = {f.name: getattr(known, f.name) for f in fields(known)}
            assert value == {k: list(v) if isinstance(v, tuple) else v for k, v in code.items()}
        else:
            assert value == parameters[option].default


def test_each_yaml_has_its_contract() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(SELECTORS)
