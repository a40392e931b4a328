"""The tower against transformers' own SigLIP, and its recordings against a second computation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from lavida_adapter.vision import TAPS, VisionTower, attention_received
from tests.lavida_adapter.tiny import VIEW, noise, tiny_model

HEADS, WIDTH, N = 2, 16, 9


@pytest.fixture
def tower() -> VisionTower:
    return tiny_model().model.vision_tower


@pytest.fixture
def pixels() -> Tensor:
    return noise(3, 3, VIEW, VIEW)


@torch.no_grad()
def residuals(tower: VisionTower, pixels: Tensor) -> list[dict[str, Tensor]]:
    """What each layer could record, by hand: norms, heads and softmax written out."""
    vision = tower.vision_tower.vision_model
    x, found = vision.embeddings(pixels), []
    for layer in tower.layers:
        attention = layer.self_attn
        h = F.layer_norm(x, (WIDTH,), layer.layer_norm1.weight, layer.layer_norm1.bias, 1e-6)
        q, k, v = (
            F.linear(h, p.weight, p.bias).view(-1, N, HEADS, WIDTH // HEADS)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div((WIDTH // HEADS) ** 0.5).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(-1, N, WIDTH)
        middle = x + attention.out_proj(mixed)
        h2 = F.layer_norm(middle, (WIDTH,), layer.layer_norm2.weight, layer.layer_norm2.bias, 1e-6)
        found.append(
            {"keys": k, "attention": weights.mean(dim=(1, 2)), "input": x, "post_norm": h2, "weights": weights}
        )
        x = middle + F.linear(
            F.gelu(F.linear(h2, layer.mlp.fc1.weight, layer.mlp.fc1.bias), approximate="tanh"),
            layer.mlp.fc2.weight,
            layer.mlp.fc2.bias,
        )
        found[-1]["output"] = x
    return [*found, {"input": x}]


@torch.no_grad()
def test_one_layer_less_than_configured_and_no_final_norm(tower: VisionTower, pixels: Tensor) -> None:
    """The output is the second last hidden state of the whole SigLIP model with the same weights."""
    assert len(tower.layers) == tower.config.num_hidden_layers - 1 == 2
    torch.manual_seed(1)
    whole = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            image_size=VIEW,
            patch_size=6,
            vision_use_head=False,
        )
    ).eval()
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in whole.state_dict().items()}
    kept = {name: weights[name] for name in tower.vision_tower.vision_model.state_dict()}
    assert len(kept) == 16 * 2 + 5
    tower.vision_tower.vision_model.load_state_dict(kept)
    hidden = whole(pixels, output_hidden_states=True).hidden_states
    states, _ = tower(pixels)
    assert len(hidden) == 4
    torch.testing.assert_close(states, hidden[-2], rtol=0, atol=1e-5)
    assert (states - hidden[-1]).abs().max() > 0.1


@torch.no_grad()
def test_states_lie_token_by_token(tower: VisionTower, pixels: Tensor) -> None:
    """Otherwise every norm copies them: a third of the tower's time on a GPU."""
    states, taps = tower(pixels, ["input@0", "output@-1"])
    assert tower.vision_tower.vision_model.embeddings(pixels).stride() == (N * WIDTH, 1, N)
    assert states.stride() == taps["input@0"].stride() == taps["output@-1"].stride() == (N * WIDTH, WIDTH, 1)


@torch.no_grad()
def test_the_final_norm_is_stored_but_not_applied(tower: VisionTower, pixels: Tensor) -> None:
    before, _ = tower(pixels)
    tower.vision_tower.vision_model.post_layernorm.weight.fill_(torch.nan)
    assert torch.equal(tower(pixels)[0], before)


@torch.no_grad()
def test_states_against_a_second_computation(tower: VisionTower, pixels: Tensor) -> None:
    torch.testing.assert_close(tower(pixels)[0], residuals(tower, pixels)[-1]["input"], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("what", TAPS)
def test_taps_against_a_second_computation(tower: VisionTower, pixels: Tensor, what: str, layer: int) -> None:
    plain, nothing = tower(pixels)
    states, recorded = tower(pixels, [f"{what}@{layer}"])
    assert nothing == {}
    assert recorded.keys() == {f"{what}@{layer}"}
    assert torch.equal(states, plain)
    expected = residuals(tower, pixels)
    torch.testing.assert_close(recorded[f"{what}@{layer}"], expected[layer][what], rtol=0, atol=1e-5)
    assert (expected[0][what] - expected[1][what]).abs().max() > 1e-3


@torch.no_grad()
def test_many_taps_and_two_spellings_of_one(tower: VisionTower, pixels: Tensor) -> None:
    asked = ["keys@1", "keys@-1", "keys@0", "input@1"]
    _, recorded = tower(pixels, asked)
    assert list(recorded) != [] and recorded.keys() == set(asked)
    assert torch.equal(recorded["keys@1"], recorded["keys@-1"])
    assert not torch.equal(recorded["keys@1"], recorded["keys@0"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "share", "index"), [(26, "0.83", 21), (26, "0.0", 0), (26, "0.99", 25), (3, "0.83", 2), (2, "0.83", 1)]
)
def test_a_layer_may_be_a_share_of_the_depth(tower: VisionTower, layers: int, share: str, index: int) -> None:
    tower.vision_tower.vision_model.encoder.layers = torch.nn.ModuleList([tower.layers[0]] * layers)
    assert tower._parse(f"keys@{share}") == ("keys", index)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 9, 100])
def test_attention_received_is_a_mean_over_heads_and_queries(tower: VisionTower, pixels: Tensor, chunk: int) -> None:
    expected = residuals(tower, pixels)[1]
    h = tower.layers[1].layer_norm1(expected["input"])
    received = attention_received(tower.layers[1].self_attn, h, chunk=chunk)
    torch.testing.assert_close(received, expected["weights"].mean(dim=(1, 2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(received.sum(-1), torch.ones(3), rtol=0, atol=1e-5)
    assert received.std() > 1e-3


@torch.no_grad()
def test_sdpa_runs_and_agrees_with_eager(tower: VisionTower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), kernel(*a, **k))[1])
    fast, _ = tower(pixels)
    assert len(calls) == len(tower.layers)
    for layer in tower.layers:
        layer.self_attn.config._attn_implementation = "eager"
    slow, _ = tower(pixels)
    assert len(calls) == len(tower.layers)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


@torch.no_grad()
def test_views_do_not_see_one_another(tower: VisionTower, pixels: Tensor) -> None:
    alone = torch.cat([tower(pixels[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(tower(pixels)[0], alone, rtol=0, atol=1e-5)


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
