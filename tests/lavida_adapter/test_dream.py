"""Dream: what differs from LLaDA. Outputs predict the next token, and the first answer token comes from the prompt."""

from typing import Any

import pytest
import torch
from torch import Tensor

from baselines import Pooled
from lavida_adapter import DecodeConfig, Lavida, ObjectiveConfig, Prefix, TrainBatch
from lavida_adapter.engine import DecodeSteps
from lavida_adapter.language_model import pick, rotate
from lavida_adapter.loss import draw_loss, states_of_copies
from lavida_adapter.prompt import IGNORE
from tests.lavida_adapter.dense import dense, may_see
from tests.lavida_adapter.tiny import noise, picture, tiny_model

P, A = 9, 5
PADDING = torch.tensor([[1] * 6 + [0] * 3, [1] * 9], dtype=torch.bool)


@pytest.fixture
def model() -> Lavida:
    return tiny_model(lm={"family": "dream"})


def prompts(mask_BP: Tensor, seed: int = 0) -> Prefix:
    return Prefix(noise(2, P, 32, seed=seed) * mask_BP[..., None], mask_BP, torch.zeros_like(mask_BP))


def masks(model: Lavida) -> Tensor:
    return torch.full((2, A), model.config.lm.mask_token_id)


def alone(model: Lavida, prefix: Prefix, ids_BA: Tensor, b: int, *, prompt_sees_answer: bool) -> Tensor:
    """Logits [A, W] of one row's answer, from a dense pass over the row without padding, shifted by one."""
    lm, n = model.lm, prefix.n_tokens[b]
    row = torch.cat([prefix.embeds_BPD[b, :n], lm.embedding(ids_BA[b])])
    allowed = may_see(n, A, None, prompt_sees_answer=prompt_sees_answer)
    return lm.logits(dense(lm, row, allowed, torch.arange(n + A)))[n - 1 : -1]


@torch.no_grad()
def test_a_pass_without_a_cache_reads_the_row_before_each_slot(model: Lavida) -> None:
    prefix, ids = prompts(PADDING), masks(model)
    ids[0, 1], ids[1, 3] = 7, 11
    want = torch.tensor([[0, 4], [3, 1]])
    found, some = (model._logits_whole(prefix, ids, w) for w in (None, want))
    for b in range(2):
        expected = alone(model, prefix, ids, b, prompt_sees_answer=True)
        torch.testing.assert_close(found[b], expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(some[b], expected[want[b]], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("mask", [PADDING, torch.ones_like(PADDING)], ids=["padded", "equal lengths"])
def test_cached_steps_read_the_row_before_each_slot(model: Lavida, mask: Tensor) -> None:
    """The prefill keeps the state that predicts slot 0; a step predicts the others."""
    prefix, ids = prompts(mask), masks(model)
    ids[0, 0], ids[1, 2] = 7, 11
    want = torch.tensor([[1, 4], [3, 2]])
    cache = model.prefill(prefix, n_answer=A)
    steps = DecodeSteps(model.lm, cache, A)
    found, some = steps(ids), steps(ids, want)
    seen: list[int] = []
    hooked = steps(ids, hook=lambda q, k, m: seen.append(q.shape[2]))
    assert seen == [A, A], "a hook sees the queries of all slots, in the last layer too"
    torch.testing.assert_close(hooked, found, rtol=0, atol=1e-5)
    assert cache.last_BD is not None
    for b in range(2):
        expected = alone(model, prefix, ids, b, prompt_sees_answer=False)
        torch.testing.assert_close(found[b, 1:], expected[1:], rtol=0, atol=2e-5)
        torch.testing.assert_close(some[b], expected[want[b]], rtol=0, atol=2e-5)
        torch.testing.assert_close(model.lm.logits(cache.last_BD[b]), expected[0], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_the_first_token_is_the_prompts_and_a_draft_goes_before_it(model: Lavida, engine: Any) -> None:
    prefix, mask_id = prompts(PADDING), model.config.lm.mask_token_id
    decode = DecodeConfig(max_new_tokens=A, engine=engine)
    last_BD = model.prefill(prefix).last_BD
    assert last_BD is not None
    logits_BW = model.lm.logits(last_BD)
    logits_BW[:, mask_id] = float("-inf")
    found = model.generate(prefix, decode)
    assert found.ids_BA[:, 0].tolist() == logits_BW.argmax(-1).tolist()
    assert found.steps == (A - 2, A - 2), "the last step along the time grid commits two"
    assert mask_id not in found.ids_BA
    drafted = model.generate(prefix, decode, drafts=[[7], [mask_id, 9]])
    assert drafted.ids_BA[0, 0] == 7 and drafted.ids_BA[1, :2].tolist() == [int(found.ids_BA[1, 0]), 9]


@torch.no_grad()
def test_a_rows_answer_does_not_depend_on_its_neighbours(model: Lavida) -> None:
    prefix, decode = prompts(PADDING), DecodeConfig(max_new_tokens=A, step_ratio=0.6, schedule="shift")
    together = model.generate(prefix, decode).ids_BA
    for b, n in enumerate(prefix.n_tokens):
        own = Prefix(prefix.embeds_BPD[b : b + 1, :n], prefix.mask_BP[b : b + 1, :n], prefix.visual_BP[b : b + 1, :n])
        assert torch.equal(model.generate(own, decode).ids_BA[0], together[b])


@torch.no_grad()
@pytest.mark.parametrize("prefix_mask", [False, True])
def test_the_loss_reads_the_row_before_each_target(model: Lavida, prefix_mask: bool) -> None:
    """Against a dense pass for each masked copy, and one cross entropy a target."""
    whole, lm = prompts(PADDING, seed=3), model.lm
    begin, labels = [3, 5], torch.full((2, P), IGNORE)
    for b, first in enumerate(begin):
        labels[b, first : whole.n_tokens[b]] = torch.arange(whole.n_tokens[b] - first) + 4
    masked = (labels != IGNORE) & torch.tensor([[i % 2 == 1 for i in range(P)]] * 2)
    copies = torch.cat([masked, (labels != IGNORE) & ~masked])
    mask_D = lm.embedding.weight[model.config.lm.mask_token_id]
    losses = []
    for c, copy in enumerate(copies):
        b, n = c % 2, whole.n_tokens[c % 2]
        row = torch.where(copy[:n, None], mask_D, whole.embeds_BPD[b, :n])
        allowed = may_see(begin[b], n - begin[b], None, prompt_sees_answer=not prefix_mask)
        log_p = lm.logits(dense(lm, row, allowed, torch.arange(n))).log_softmax(-1)
        losses += [-log_p[i - 1, labels[b, i]] for i in copy.nonzero()[:, 0].tolist()]
    assert len(losses) == 7
    expected = torch.stack(losses).mean()
    u = torch.where(masked, 0.0, 1.0)
    found = draw_loss(model, whole, labels, torch.tensor([0.5, 0.5]), u, ObjectiveConfig(prefix_mask=prefix_mask))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    states = states_of_copies(model, whole, labels, copies, prefix_mask=prefix_mask)
    assert states.isfinite().all()


def test_the_padding_tokens_embedding_is_not_trained(model: Lavida) -> None:
    batch = TrainBatch([picture((40, 40))] * 2, ["digit red", "hm?"], ["7", "blue"], ["a", "b"])
    model.requires_grad_(True)
    model.loss(batch, Pooled(), ObjectiveConfig(extra_padding=4), torch.Generator().manual_seed(0)).backward()
    gradient = model.lm.embedding.weight.grad
    assert gradient is not None and gradient.abs().amax() > 0
    assert gradient[model.config.lm.pad_token_id].abs().max() == 0
    for block in model.lm.layers:
        for layer in (block.query, block.key, block.value):
            assert layer.bias is not None and layer.bias.grad is not None


def test_rotation_in_bfloat16_is_rounded_to_bfloat16(model: Lavida) -> None:
    """LLaDA rotates in float32 whatever the dtype of the weights."""
    x, positions = noise(1, 2, 6, 8).to(torch.bfloat16), torch.arange(6)[None] + 100
    cos, sin = model.lm.to(torch.bfloat16).angles(positions)
    assert cos.dtype == sin.dtype == torch.bfloat16
    wide_cos, wide_sin = tiny_model().lm.to(torch.bfloat16).angles(positions)
    assert wide_cos.dtype == torch.float32
    first, second = x.chunk(2, dim=-1)
    sine = torch.cat([-sin.chunk(2, -1)[0], sin.chunk(2, -1)[1]], dim=-1)
    by_hand = x * cos + torch.cat([-second, first], dim=-1) * sine
    assert torch.equal(rotate(x, cos, sin), by_hand)
    assert (rotate(x, wide_cos, wide_sin) - by_hand).abs().max() > 0


def test_rows_are_picked_in_order() -> None:
    x = noise(2, 4, 3)
    assert torch.equal(pick(x, torch.tensor([[1, 1], [3, 0]])), torch.stack([x[0, [1, 1]], x[1, [3, 0]]]))
