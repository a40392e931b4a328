"""Between tower and language model: what selectors see, when tokens are projected, who gets gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from baselines import CDPruner, Full, GlobalOnly, LlavaScissor, Pooled, Random, Saint, ToMe, TopV, UniformGrid
from lavida_adapter import DecodeConfig, Lavida, LoraConfig, Prefix, add_lora
from lavida_adapter.encode import send_pixels
from lavida_adapter.prompt import encode_text
from lavida_adapter.relevance import LmEmbed, NoRelevance, RelevanceContext
from lavida_adapter.views import SINGLE_VIEW, cut, make_views
from shirg import Geometry, Selection, Selector, ShirgSelector, Source, VisionFeatures
from tests.lavida_adapter.dense import dense
from tests.lavida_adapter.tiny import SIZES, picture, tiny_model


class Probe(Selector):
    """Keeps the tokens of the highest relevance and remembers what it was shown."""

    uses_relevance = True

    def __init__(self, stage: Any = "pre", needs: frozenset[str] = frozenset()) -> None:
        super().__init__(budget=4)
        self.stage, self.needs = stage, needs
        self.seen: list[VisionFeatures] = []

    def score(self, features: VisionFeatures) -> Tensor:
        self.seen.append(features)
        assert features.relevance_BN is not None
        return features.relevance_BN


class Question:
    """A provider that only looks at what it is given."""

    space = "lm"

    def __init__(self) -> None:
        self.contexts: list[RelevanceContext] = []

    def __call__(self, features: VisionFeatures, context: RelevanceContext) -> Tensor:
        self.contexts.append(context)
        return context.projected().detach().sum(-1)


def test_pixels_are_joined_in_the_type_of_the_model() -> None:
    views = [make_views(picture(size), tiny_model().config) for size in SIZES[:2]]
    expected = torch.cat([v.pixels_V3SS for v in views]).to(torch.bfloat16)
    assert len(views[0].pixels_V3SS) != len(expected)
    assert torch.equal(send_pixels(views, torch.device("cpu"), torch.bfloat16), expected)


def encode(model: Lavida, selector: Selector, relevance: Any, sizes: Any = SIZES) -> Prefix:
    questions = [f"digit {word}" for word in ("red", "green", "blue", "red", "green")][: len(sizes)]
    ids = [f"s{i}" for i in range(len(sizes))]
    return model.encode([picture(size) for size in sizes], questions, selector, relevance=relevance, ids=ids)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["pre", "post"])
def test_what_a_selector_sees(stage: str) -> None:
    taps = {"keys@0"} if stage == "pre" else {"keys@0", "attention@1", "encoder"}
    model, selector = tiny_model(), Probe(stage, frozenset(taps))
    encode(model, selector, LmEmbed())
    assert len(selector.seen) == 4  # five pictures on four canvases
    assert sorted(i for f in selector.seen for i in f.ids) == [f"s{i}" for i in range(5)]
    for features in selector.seen:
        b, n = features.valid_BN.shape
        width = 32 if stage == "post" else 16
        assert features.tokens_BND.shape == (b, n, width)
        assert features.taps["keys@0"].shape == (b, n, 2, 8)
        assert features.n_valid == tuple(features.valid_BN.sum(-1).tolist())
        assert features.layout.n_tokens == n
        if stage == "post":
            assert features.taps["attention@1"].shape == (b, n)
            projected = model.model.mm_projector(features.taps["encoder"])
            torch.testing.assert_close(features.tokens_BND, projected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_choosing_commutes_with_projecting() -> None:
    model = tiny_model()
    pre, post = (encode(model, Probe(stage), LmEmbed()) for stage in ("pre", "post"))
    for one, other in zip(pre.selections, post.selections, strict=True):
        assert torch.equal(one.index_BT, other.index_BT)
    torch.testing.assert_close(pre.embeds_BPD, post.embeds_BPD, rtol=0, atol=1e-5)


class Counting(Pooled):
    """Remembers how many prompts it chose for."""

    def __init__(self, reads_sample: bool = False, uses_relevance: bool = False) -> None:
        super().__init__()
        self.reads_sample, self.uses_relevance = reads_sample, uses_relevance
        self.seen: list[tuple[str, ...]] = []

    def select(self, features: VisionFeatures) -> Selection:
        self.seen.append(features.ids)
        return super().select(features)


@torch.no_grad()
@pytest.mark.parametrize(
    ("selector", "relevance", "chosen_for"),
    [
        (Counting(), LmEmbed(), ("a", "c")),
        (Counting(uses_relevance=True), NoRelevance(), ("a", "c")),
        (Counting(uses_relevance=True), LmEmbed(), ("a", "b", "c", "d")),
        (Counting(reads_sample=True), None, ("a", "b", "c", "d")),
    ],
)
def test_questions_about_one_picture_share_its_selection(
    selector: Counting, relevance: Any, chosen_for: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, one, other = tiny_model(), picture((40, 40)), picture((40, 40), seed=1)
    encoded: list[int] = []
    tower = model.model.vision_tower.forward
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda x, t: (encoded.append(len(x)), tower(x, t))[1])
    questions = ["digit red", "letter K", "digit blue", "x"]
    together = model.encode([one, one, other, one], questions, selector, relevance=relevance, ids=["a", "b", "c", "d"])
    assert selector.seen == [chosen_for]
    assert encoded == [5 + 5], "views of two pictures"
    for i, image in enumerate([one, one, other, one]):
        alone = model.encode([image], questions[i : i + 1], Pooled(), ids=["z"])
        n = alone.n_tokens[0]
        torch.testing.assert_close(together.embeds_BPD[i, :n], alone.embeds_BPD[0], rtol=0, atol=1e-5)
        assert torch.equal(together.selections[i].index_BT, alone.selections[0].index_BT)


@torch.no_grad()
def test_the_provider_gets_the_question_alone() -> None:
    model, provider = tiny_model(), Question()
    encode(model, Probe(), provider, sizes=SIZES[:2])
    questions = [tuple(q.tolist()) for context in provider.contexts for q in context.questions]
    assert questions == [encode_text(model.tokenizer, f"digit {word}") for word in ("red", "green")]
    assert all(context.embedding is model.lm.embedding for context in provider.contexts)


@torch.no_grad()
def test_relevance_is_computed_for_those_who_ask() -> None:
    provider = Question()
    encode(tiny_model(), Pooled(), provider)
    assert provider.contexts == []
    with pytest.raises(ValueError, match="Probe ranks by relevance, and these features have none"):
        encode(tiny_model(), Probe(), None)


@pytest.mark.parametrize("stage", ["pre", "post"])
def test_the_projector_learns_behind_a_relevance(stage: str) -> None:
    """The provider projects without a graph; what the language model reads must still have one."""
    model = tiny_model()
    encode(model, Probe(stage), LmEmbed()).embeds_BPD.square().sum().backward()
    for name, parameter in model.model.mm_projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_tower_keeps_no_graph(trained: bool) -> None:
    model, selector = tiny_model(), Probe()
    model.model.vision_tower.requires_grad_(trained)
    encode(model, selector, LmEmbed())
    assert all(f.tokens_BND.requires_grad == trained for f in selector.seen)


@torch.no_grad()
def test_the_pooled_prefix_is_base_view_then_rows_with_newlines() -> None:
    """The prefix of LaViDa itself, rebuilt view by view for a picture without padding: 4 + 4 * (4 + 1) tokens."""
    model = tiny_model()
    prefix = encode(model, Pooled(), None, sizes=[(40, 40)])
    states, _ = model.model.vision_tower(make_views(picture((40, 40)), model.config).pixels_V3SS)
    grid = model.model.mm_projector(states).transpose(1, 2).unflatten(-1, (3, 3))
    pooled = torch.nn.functional.interpolate(grid, size=(2, 2), mode="bilinear", align_corners=False)
    base, tiles = pooled[0], pooled[1:]
    mosaic = torch.cat([torch.cat([tiles[0], tiles[1]], dim=2), torch.cat([tiles[2], tiles[3]], dim=2)], dim=1)
    rows = [torch.cat([mosaic[:, r].T, model.model.image_newline[None]]) for r in range(4)]
    expected = torch.cat([base.flatten(1).T, *rows])
    assert prefix.n_visual == (24,)
    torch.testing.assert_close(prefix.embeds_BPD[0][prefix.visual_BP[0]], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_newlines_are_the_models_own_vector() -> None:
    model = tiny_model()
    prefix = encode(model, Pooled(), None)
    for b, selection in enumerate(prefix.selections):
        source_T = selection.source_BT[0][selection.mask_BT[0]]
        block_TD = prefix.embeds_BPD[b][prefix.visual_BP[b]]
        assert len(source_T) == len(block_TD) == prefix.n_visual[b]
        newline = source_T == Source.NEWLINE
        assert newline.any()
        assert torch.equal(block_TD[newline], model.model.image_newline.expand(int(newline.sum()), -1))
        assert not (block_TD[~newline] == model.model.image_newline).all(-1).any()


@pytest.mark.parametrize("build", [Random, UniformGrid, Saint, ToMe, CDPruner, LlavaScissor, TopV, ShirgSelector])
def test_a_strip_of_one_pixel_is_seen(build: Callable[..., Selector]) -> None:
    """In mode `pad` no centre of a token lies in it: three tokens of the view cross it."""
    model = tiny_model(image_aspect_ratio="pad")
    images = [picture((1, 100)), picture((100, 1))]
    no_scaffold: dict[str, Any] = {"scaffold": {"size": 0}} if build is ShirgSelector else {}
    for budget, most in (("matched", 3), (2, 2)):
        selector = build(budget=budget, **no_scaffold)
        prefix = model.encode(images, ["what"] * 2, selector, relevance=LmEmbed())
        assert prefix.n_visual == (most, most) or (build is LlavaScissor and 0 < min(prefix.n_visual) <= most)
    for whole in (Full(newline="none"), GlobalOnly()):
        assert model.encode(images, ["what"] * 2, whole).n_visual == (3, 3)


GEOMETRIES: tuple[Geometry, ...] = ("seed_canvas48", "single_672", "single_512", "fovea")


def shirg(geometry: Geometry, **knobs: Any) -> ShirgSelector:
    coarse = {"size": 1, "source": "global" if geometry in ("fovea", "lavida_tiles") else "canvas"}
    return ShirgSelector(**{"budget": 10, "geometry": geometry, "scaffold": coarse, **knobs})


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_selector_gets_the_views_that_it_asks_for(geometry: Geometry) -> None:
    model = tiny_model()
    images, questions = [picture((40, 40)), picture((100, 26))], ["what is it", "which one"]
    selectors: list[Selector] = [shirg(geometry), Random(budget=10, geometry=geometry)]
    for selector in selectors:
        prefix = model.encode(images, questions, selector, relevance=LmEmbed())
        for selection, count in zip(prefix.selections, prefix.n_visual, strict=True):
            used = int(selection.mask_BT.sum())
            assert count == used and (used == 10 or selector.may_use_less)
            assert selection.source_BT[0, selection.mask_BT[0]].unique().tolist() in ([0, 1], [0])
    base = model.encode(images, questions, Pooled()).n_visual
    short = {} if geometry in SINGLE_VIEW else {"underflow": "mask"}  # a view without padding is never short of tokens
    matched = model.encode(images, questions, shirg(geometry, budget="matched", **short), relevance=LmEmbed())
    assert all(n <= b for n, b in zip(matched.n_visual, base, strict=True))
    if geometry in SINGLE_VIEW:
        cells = {"single_672": 25, "single_512": 16}[geometry]
        assert matched.n_visual[0] == min(base[0], cells)
        assert model.encode(images[:1], questions[:1], Full(newline="none", geometry=geometry)).n_visual == (cells,)


@pytest.mark.parametrize("geometry", ["lavida_tiles", "fovea"])
def test_the_base_budget_is_the_models(geometry: Geometry) -> None:
    model = tiny_model()
    base = model.config.budgets["base"]
    for budget, count in (("1/2 base", round(base / 2)), ("1/4 base", round(base / 4))):
        prefix = model.encode([picture((40, 40))], ["x"], Random(budget=budget, geometry=geometry))
        assert prefix.n_visual == (count,)


def test_edges_of_pixels_reach_the_selector() -> None:
    model = tiny_model()
    selector = ShirgSelector(
        budget=5, weights={"similarity": 0, "neighbour": 0, "edge": 1}, edge_space="pixels", scaffold={"size": 0}
    )
    image = Image.new("RGB", (40, 40), (90, 90, 90))
    image.paste(picture((6, 6)), (26, 20))  # the second patch of the first row of the last tile
    selection = model.encode([image], ["what"], selector).selections[0]
    assert selector.needs == {"pixels"} and not selector.uses_relevance
    assert selection.scores_BN is not None and int(selection.scores_BN[0].argmax()) == 9 * 4 + 1


@pytest.mark.parametrize("geometry", ["lavida_tiles", *GEOMETRIES])
@pytest.mark.parametrize("knobs", [{}, {"merge": {"mode": "tome"}, "summary": True, "underflow": "mask"}])
def test_the_prefix_cache_is_exact(geometry: Geometry, knobs: dict[str, Any]) -> None:
    """Answer states behind the cache equal those of one pass in which the prompt does not see the answer."""
    model = tiny_model()
    knobs = {name: value for name, value in knobs.items() if name != "underflow" or geometry not in SINGLE_VIEW}
    prefix = model.encode([picture((30, 22))], ["which one"], shirg(geometry, **knobs), relevance=LmEmbed())
    answer = model.lm.embedding(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        cache = model.prefill(prefix)
        written = [k.clone() for k in cache.keys]
        cached = model.lm.decode(answer, cache)
        p = prefix.embeds_BPD.shape[1]
        sees = torch.ones(p + 3, p + 3, dtype=torch.bool)
        sees[:p, p:] = False
        row = torch.cat([prefix.embeds_BPD[0], answer[0]])
        assert torch.allclose(cached[0], dense(model.lm, row, sees, torch.arange(p + 3))[p:], atol=1e-4)
        model.generate(prefix, DecodeConfig(max_new_tokens=4))
    assert all(torch.equal(a, b) for a, b in zip(written, cache.keys, strict=True))


@pytest.mark.parametrize("geometry", ["lavida_tiles", *GEOMETRIES])
def test_lora_learns_through_the_selector(geometry: Geometry) -> None:
    model = tiny_model()
    layer = "vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    add_lora(model, LoraConfig(rank=2, targets=("mm_projector.{0,2}", layer)))
    wide = {"size": 2, "source": "global" if geometry in ("fovea", "lavida_tiles") else "canvas"}
    selector = shirg(geometry, scaffold=wide, budget=12)
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(adapters) == 6 and all(p.requires_grad == (n in adapters) for n, p in model.named_parameters())
    optimiser = torch.optim.SGD(adapters.values(), lr=1.0)
    for step in range(2):
        optimiser.zero_grad()
        prefix = model.encode([picture((40, 40))], ["which one"], selector, relevance=LmEmbed())
        model.lm.decode(model.lm.embedding(torch.tensor([[5, 6]])), model.prefill(prefix)).square().mean().backward()
        for name, weight in adapters.items():
            assert weight.grad is not None
            assert bool(weight.grad.any()) == ("lora_B" in name or step > 0), name
        optimiser.step()


def test_kept_tokens_are_the_towers_own() -> None:
    model = tiny_model()
    image = picture((40, 40))
    selection = model.encode([image], ["which"], shirg("single_672"), relevance=LmEmbed()).selections[0]
    states = model.model.vision_tower(cut(image, model.config, "single_672").pixels_V3SS)[0][0]
    used = selection.source_BT[0] == int(Source.KEPT)
    assert torch.allclose(selection.tokens_BTD[0, used], states[selection.index_BT[0, used]], atol=1e-6)
