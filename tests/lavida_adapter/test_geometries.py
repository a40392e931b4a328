"""The notes' geometries: what pixels each token sees, what the tower makes of them, what reaches the prefix."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from baselines import Full, Pooled, Random
from lavida_adapter import DecodeConfig, LavidaConfig, LoraConfig, add_lora
from lavida_adapter.relevance import LmEmbed
from lavida_adapter.views import SINGLE_VIEW, cells_of, cut, geometry_layout, patch_pixels, pooled_count, ready
from shirg import Geometry, Selector, ShirgSelector, Source
from tests.lavida_adapter.tiny import PATCH, picture, tiny_config, tiny_model

GEOMETRIES: tuple[Geometry, ...] = ("seed_canvas48", "single_672", "single_512", "fovea")


def gate(geometry: Geometry, **knobs: Any) -> ShirgSelector:
    coarse = {"size": 1, "source": "global" if geometry in ("fovea", "lavida_tiles") else "canvas"}
    return ShirgSelector(**{"budget": 10, "geometry": geometry, "scaffold": coarse, **knobs})


def test_true_sizes() -> None:
    config = LavidaConfig()
    assert (cells_of(config.vision, (7, 4)), cells_of(config.vision, (7, 6))) == (48, 32)
    counts = {g: (geometry_layout(config, g).n_tokens, geometry_layout(config, g).canvas_px) for g in GEOMETRIES}
    assert counts == {
        "seed_canvas48": (3645, (672, 672)),
        "single_672": (2304, (672, 672)),
        "single_512": (1296, (504, 504)),
        "fovea": (2048, (448, 448)),
    }
    assert geometry_layout(config, "fovea").pooling.most == 1008


@pytest.mark.parametrize("size", [(384, 384), (640, 480), (1600, 900), (300, 1200)])
def test_views_at_true_size(size: tuple[int, int]) -> None:
    config, image = LavidaConfig(), picture(size)
    views = {geometry: cut(image, config, geometry) for geometry in GEOMETRIES}
    shapes = [tuple(v.pixels_V3SS.shape) for v in views.values()]
    assert shapes == [(5, 3, 384, 384), (1, 3, 672, 672), (1, 3, 504, 504), (2, 3, 448, 448)]
    assert all(bool(views[single].valid_N.all()) for single in SINGLE_VIEW)
    for v in views.values():
        assert v.size == size and v.base_count == pooled_count(size, config)
        px = v.layout.canvas_px[0]
        centre = (v.layout.centre_N2[v.layout.role_N != 0].double() * px).round(decimals=3)
        x0, y0, x1, y1 = (round(edge * px, 3) for edge in v.picture_4)
        inside = (centre[:, 0] >= x0) & (centre[:, 0] < x1) & (centre[:, 1] >= y0) & (centre[:, 1] < y1)
        assert torch.equal(inside, v.valid_N[v.layout.role_N != 0])


def test_tokens_of_one_cell_see_the_same_pixels() -> None:
    views = cut(picture((60, 44)), tiny_config(), "seed_canvas48")
    patches = patch_pixels(views.pixels_V3SS, views.layout)
    assert patches.shape == (45, 3, PATCH, PATCH)
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    shared = 0
    for cell, patch in zip(views.layout.cell_N2.tolist(), patches, strict=True):
        if tuple(cell) in seen:
            shared += 1
            assert torch.equal(seen[tuple(cell)], patch)
        seen[tuple(cell)] = patch
    assert shared == 45 - 25


def test_padding_is_black_and_invalid() -> None:
    views = cut(Image.new("RGB", (60, 20), (255, 255, 255)), tiny_config(), "seed_canvas48")
    patches = patch_pixels(views.pixels_V3SS, views.layout)
    row = views.layout.cell_N2[:, 0]
    assert bool((patches[row == 0] == -1).all()) and not bool(views.valid_N[row == 0].any())
    assert bool((patches[row == 2] == 1).all()) and bool(views.valid_N[row == 2].all())


def test_the_fovea_is_the_middle_of_the_picture() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, 0).repeat(3, 2)
    config = LavidaConfig()
    views = cut(Image.fromarray(ramp), config, "fovea")
    whole, middle = (views.pixels_V3SS[i, 0, 224] for i in (0, 1))
    assert whole[0] < -0.99 and whole[-1] > 0.99
    third = 2 * 256 / 6 / 255 - 1
    assert middle[0] == pytest.approx(third, abs=0.02) and middle[-1] == pytest.approx(-third, abs=0.02)
    assert views.picture_4 == pytest.approx((-0.25, -0.25, 1.25, 1.25))


def test_position_embeddings_are_interpolated_and_never_written_back() -> None:
    model = tiny_model()
    tower = model.model.vision_tower
    table = tower.vision_tower.vision_model.embeddings.position_embedding.weight
    before = table.detach().clone()
    small, large = torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 30, 30)
    with torch.no_grad():
        own = tower(small)[0]
        assert tower(large)[0].shape == (1, 25, 16)
        assert torch.equal(tower(small)[0], own) and torch.equal(table, before)
        embeddings = tower.vision_tower.vision_model.embeddings
        grid = before.T.view(1, 16, 3, 3)
        wanted = torch.nn.functional.interpolate(grid, (5, 5), mode="bicubic", align_corners=False).flatten(2).mT
        bias = embeddings.patch_embedding.bias
        assert torch.allclose(embeddings(large, interpolate_pos_encoding=True), wanted + bias, atol=1e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_selector_gets_the_views_that_it_asks_for(geometry: Geometry) -> None:
    model = tiny_model()
    images, questions = [picture((40, 40)), picture((100, 26))], ["what is it", "which one"]
    selectors: list[Selector] = [gate(geometry), Random(budget=10, geometry=geometry)]
    for selector in selectors:
        prefix = model.encode(images, questions, selector, relevance=LmEmbed())
        for selection, count in zip(prefix.selections, prefix.n_visual, strict=True):
            used = int(selection.mask_BT.sum())
            assert count == used and (used == 10 or selector.may_use_less)
            assert selection.source_BT[0, selection.mask_BT[0]].unique().tolist() in ([0, 1], [0])
    base = model.encode(images, questions, Pooled()).n_visual
    short = {} if geometry in SINGLE_VIEW else {"underflow": "mask"}  # a view without padding is never short of tokens
    matched = model.encode(images, questions, gate(geometry, budget="matched", **short), relevance=LmEmbed())
    assert all(n <= b for n, b in zip(matched.n_visual, base, strict=True))
    if geometry in SINGLE_VIEW:
        cells = {"single_672": 25, "single_512": 16}[geometry]
        assert matched.n_visual[0] == min(base[0], cells)
        assert model.encode(images[:1], questions[:1], Full(newline="none", geometry=geometry)).n_visual == (cells,)


def test_edges_of_pixels_reach_the_selector() -> None:
    model = tiny_model()
    selector = ShirgSelector(
        budget=5, weights={"similarity": 0, "neighbor": 0, "edge": 1}, edge_space="pixels", scaffold={"size": 0}
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
    prefix = model.encode([picture((30, 22))], ["which one"], gate(geometry, **knobs), relevance=LmEmbed())
    answer = model.lm.wte(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        cache = model.prefill(prefix)
        written = [k.clone() for k in cache.keys]
        cached = model.lm.decode(answer, cache)
        p = prefix.embeds_BPD.shape[1]
        sees = torch.ones(p + 3, p + 3, dtype=torch.bool)
        sees[:p, p:] = False
        whole = _one_pass(model, torch.cat([prefix.embeds_BPD, answer], dim=1), sees)[:, p:]
        assert torch.allclose(cached, whole, atol=1e-4)
        model.generate(prefix, DecodeConfig(max_new_tokens=4))
    assert all(torch.equal(a, b) for a, b in zip(written, cache.keys, strict=True))


def _one_pass(model: Any, embeds_BLD: torch.Tensor, sees_LL: torch.Tensor) -> torch.Tensor:
    from lavida_adapter.llada import rotary_angles

    lm, x = model.lm, embeds_BLD
    positions = torch.arange(x.shape[1])[None]
    cos, sin = rotary_angles(positions, lm.config.head_dim, lm.config.rope_theta)
    for block in lm.blocks:
        u = block.attn_norm(x)
        k, v = block.keys_values(u, cos, sin)
        x = block.output(x, u, k, v, cos, sin, sees_LL[None, None], "math")
    return lm.ln_f(x)


@pytest.mark.parametrize("geometry", ["lavida_tiles", *GEOMETRIES])
def test_lora_learns_through_the_gate(geometry: Geometry) -> None:
    model = tiny_model()
    layer = "vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    add_lora(model, LoraConfig(rank=2, targets=("mm_projector.{0,2}", layer)))
    wide = {"size": 2, "source": "global" if geometry in ("fovea", "lavida_tiles") else "canvas"}
    selector = gate(geometry, scaffold=wide, budget=12)
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(adapters) == 6 and all(p.requires_grad == (n in adapters) for n, p in model.named_parameters())
    optimiser = torch.optim.SGD(adapters.values(), lr=1.0)
    for step in range(2):
        optimiser.zero_grad()
        prefix = model.encode([picture((40, 40))], ["which one"], selector, relevance=LmEmbed())
        model.lm.decode(model.lm.wte(torch.tensor([[5, 6]])), model.prefill(prefix)).square().mean().backward()
        for name, weight in adapters.items():
            assert weight.grad is not None
            assert bool(weight.grad.any()) == ("lora_B" in name or step > 0), name
        optimiser.step()


def test_kept_tokens_are_the_towers_own() -> None:
    model = tiny_model()
    image = picture((40, 40))
    selection = model.encode([image], ["which"], gate("single_672"), relevance=LmEmbed()).selections[0]
    states = model.model.vision_tower(cut(image, model.config, "single_672").pixels_V3SS)[0][0]
    used = selection.source_BT[0] == int(Source.KEPT)
    assert torch.allclose(selection.tokens_BTD[0, used], states[selection.index_BT[0, used]], atol=1e-6)


def test_views_cut_ahead_of_time_are_those_cut_now_and_fit_their_geometry_alone() -> None:
    config, image = tiny_config(), picture((40, 30))
    for geometry in ("lavida_tiles", "single_672"):
        now = ready(image, config, geometry)
        for ahead in (cut(image, config, geometry), pickle.loads(pickle.dumps(now))):
            views = ready(ahead, config, geometry)
            assert views.layout is now.layout and torch.equal(views.pixels_V3SS, now.pixels_V3SS)
    for views in (cut(image, config, "fovea"), pickle.loads(pickle.dumps(cut(image, config, "fovea")))):
        with pytest.raises(ValueError, match="cut for another geometry than single_672"):
            ready(views, config, "single_672")
