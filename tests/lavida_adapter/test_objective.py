"""The parts of the objective, and a step shared by several processes: same draws, padding and mean as one process."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import Pooled
from lavida_adapter import LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.loss import draw_loss
from lavida_adapter.objective import (
    Shard,
    Tally,
    extra_padding,
    mask_probability,
    masked_cross_entropy,
    masked_targets,
    pad_answers,
    sample_times,
)
from lavida_adapter.prompt import IGNORE
from lavida_adapter.relevance import LmEmbed
from shirg import Selector, ShirgSelector
from tests.lavida_adapter.test_loss import spliced
from tests.lavida_adapter.tiny import noise, picture, tiny_model

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_the_two_copies_partition_the_targets(rows: int, length: int, seed: int) -> None:
    draws = generator(seed)
    target = torch.rand(rows, length, generator=draws) < 0.5
    t, u = torch.rand(rows, generator=draws), torch.rand(rows, length, generator=draws)
    masked, complement = masked_targets(target, t, u)
    assert torch.equal(masked | complement, target)
    assert not (masked & complement).any()


def test_a_position_is_masked_with_its_rows_probability() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    target = torch.ones(3, 20_000, dtype=torch.bool)
    masked, _ = masked_targets(target, t, torch.rand(3, 20_000, generator=generator()))
    torch.testing.assert_close(masked.float().mean(-1), mask_probability(t), rtol=0, atol=0.01)


def test_something_is_always_drawn() -> None:
    """The smallest draw of a row is masked even at t = 0; whether that is a target is left to chance."""
    u = torch.tensor([[0.9, 0.5, 0.7]])
    masked, complement = masked_targets(torch.ones(1, 3, dtype=torch.bool), torch.zeros(1), u)
    assert masked.tolist() == [[False, True, False]]
    masked, complement = masked_targets(torch.tensor([[True, False, True]]), torch.zeros(1), u)
    assert not masked.any()
    assert complement.tolist() == [[True, False, True]]
    # The smallest draw of the row lies where `u` does not reach.
    masked, _ = masked_targets(torch.ones(1, 3, dtype=torch.bool), torch.zeros(1), u, u_min_B=torch.tensor([0.2]))
    assert not masked.any()


@pytest.mark.parametrize(("sampler", "mean"), [("uniform", 0.5), ("logit_normal", 0.5), ("mode", 0.5)])
def test_time_samplers(sampler: str, mean: float) -> None:
    t = sample_times(50_000, sampler, generator(), CPU)  # type: ignore[arg-type]  # a name from the table above
    assert t.min() >= 0
    assert t.max() <= 1
    assert t.mean().item() == pytest.approx(mean, abs=0.01)
    assert torch.equal(t, sample_times(50_000, sampler, generator(), CPU))  # type: ignore[arg-type]
    middle = ((t > 0.25) & (t < 0.75)).float().mean().item()
    # P(|N(0, 1)| < ln 3) for the logistic of a normal; the mode sampler prefers the middle too (by integration).
    assert middle == pytest.approx({"uniform": 0.5, "logit_normal": 0.728, "mode": 0.734}[sampler], abs=0.02)


def test_the_mode_sampler_follows_its_formula() -> None:
    u = torch.rand(7, generator=generator(3))
    expected = [1 - v - 1.29 * (torch.cos(torch.tensor(torch.pi / 2 * v)).item() ** 2 - 1 + v) for v in u.tolist()]
    assert sample_times(7, "mode", generator(3), CPU).tolist() == pytest.approx(expected, abs=1e-6)


def test_extra_padding() -> None:
    config = ObjectiveConfig()
    drawn = [extra_padding(config, generator(seed)) for seed in range(2000)]
    assert min(drawn) == 0
    assert max(drawn) == 127
    assert sum(n == 0 for n in drawn) / 2000 == pytest.approx(129 / 256, abs=0.04)
    assert {extra_padding(ObjectiveConfig(extra_padding=0), generator(s)) for s in range(20)} == {0}
    assert {extra_padding(ObjectiveConfig(extra_padding=1), generator(s)) for s in range(50)} == {0}
    assert {extra_padding(ObjectiveConfig(extra_padding=2), generator(s)) for s in range(50)} == {0, 1}


def test_padding_is_an_end_of_text_target() -> None:
    rows, labels = pad_answers([(1, 2), (1, 2, 3, 4)], [(7, 8), (9,)], eos=0, extra=2)
    assert rows == [[1, 2, 7, 8, 0, 0, 0], [1, 2, 3, 4, 9, 0, 0]]
    assert labels == [[IGNORE] * 2 + [7, 8, 0, 0, 0], [IGNORE] * 4 + [9, 0, 0]]


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_every_answer_is_as_long_as_it_will_be_decoded(extra: int) -> None:
    """Also the shortest answer behind the longest prompt."""
    prompts, answers = [(1,) * 10, (1,) * 3], [(7, 7), (8,) * 5]
    rows, labels = pad_answers(prompts, answers, eos=0, extra=extra, least=8)
    assert len({len(row) for row in rows}) == 1
    assert min(sum(t != IGNORE for t in label) for label in labels) == max(8, 2 + extra)
    plain = pad_answers(prompts, answers, eos=0, extra=extra)
    assert pad_answers(prompts, answers, eos=0, extra=extra, least=2) == plain


def test_cross_entropy_is_a_plain_mean() -> None:
    logits, labels = noise(3, 5), torch.tensor([0, 4, 2])
    by_hand = [-(row[i] - row.exp().sum().log()).item() for row, i in zip(logits, labels.tolist(), strict=True)]
    assert masked_cross_entropy(logits, labels).item() == pytest.approx(sum(by_hand) / 3, abs=1e-6)
    weighted = masked_cross_entropy(logits, labels, torch.tensor([1.0, 0.0, 3.0]), n_targets=10)
    assert weighted.item() == pytest.approx((by_hand[0] + 3 * by_hand[2]) / 10, abs=1e-6)
    assert masked_cross_entropy(logits.to(torch.bfloat16), labels).dtype == torch.float32


def test_a_draw_without_masks_has_no_loss_but_a_gradient_of_zero() -> None:
    logits = noise(3, 5).requires_grad_()
    nothing = torch.zeros(3, dtype=torch.bool)
    loss = masked_cross_entropy(logits[nothing], torch.zeros(3, dtype=torch.int64)[nothing])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


WORLD = 2


@dataclass
class Table:
    """Where threads that stand for processes lay down what they give to each other."""

    given: list[Any] = field(default_factory=lambda: [None] * WORLD)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(WORLD, timeout=60))

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self.given[rank] = pickle.dumps(mine)  # as between processes, nothing is shared
        self.barrier.wait()
        found = [pickle.loads(given) for given in self.given]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Threaded(Shard):
    table: Table = field(default_factory=Table)

    def largest(self, n: int) -> int:
        return int(max(self._exchange(n)))

    def mean(self, n: int) -> float:
        return sum(self._exchange(n)) / self.world

    def _exchange(self, mine: Any) -> list[Any]:
        return self.table.exchange(self.rank, mine)


QUESTIONS = ("digit red", "letter K", "shape kind shape kind", "digit blue")


def batch(rows: range) -> TrainBatch:
    """Rows that differ in every length: of question, answer and picture."""
    sizes = [(40, 40), (38, 16), (12, 30), (40, 20)]
    return TrainBatch(
        images=[picture(sizes[i], seed=i) for i in rows],
        questions=[QUESTIONS[i] for i in rows],
        answers=[("7", "blue red green", "square", "1 2 3 4 5")[i] for i in rows],
        ids=[str(i) for i in rows],
    )


def sharing(rows: range) -> TrainBatch:
    """The first and the last row have one picture, the two between one question: half of each pair in each process."""
    alike = [(40, 40, 0), (38, 16, 1), (12, 30, 2), (40, 40, 0)]
    asked = (QUESTIONS[0], QUESTIONS[1], QUESTIONS[1] + " ", QUESTIONS[3])
    images = [picture((w, h), seed=seed) for w, h, seed in (alike[i] for i in rows)]
    return replace(batch(rows), images=images, questions=[asked[i] for i in rows])


@dataclass(frozen=True)
class Found:
    loss: float
    tally: Tally
    gradients: dict[str, torch.Tensor]


def step(data: TrainBatch, objective: ObjectiveConfig, share: Shard, seed: int = 3) -> Found:
    selector: Selector = Pooled()
    with LOCK, torch.random.fork_rng():  # threads share the random state
        model = tiny_model()
        torch.manual_seed(0)
        add_lora(model, LoraConfig(rank=2, targets=("mm_projector.0",), train_whole=("image_newline",)))
        if objective.adaptive_k:
            selector = ShirgSelector(budget=10, scaffold={"size": 2}, adaptive={"mode": "head"}).at_level(1)
    draws, tally = torch.Generator().manual_seed(seed), Tally()
    loss = model.loss(data, selector, objective, draws, relevance=LmEmbed(), shard=share, tally=tally)
    loss.backward()
    named = [*model.named_parameters(), *selector.named_parameters()]
    return Found(loss.item(), tally, {n: p.grad for n, p in named if p.grad is not None})


LOCK = threading.Lock()
UNEVEN = 0
"""A seed with which a row of the second process masks no target with its one copy, and none of the first."""


def in_processes(data: list[TrainBatch], objective: ObjectiveConfig, seed: int = 3) -> list[Found]:
    """What each process finds for its part of the batch."""
    table = Table()
    with ThreadPoolExecutor(WORLD) as pool:
        work = [pool.submit(step, part, objective, Threaded(r, WORLD, table), seed) for r, part in enumerate(data)]
        return [part.result() for part in work]


def check_mean(parts: list[Found], whole: Found) -> None:
    """Losses, counts and gradients of the processes against those of one with the whole batch."""
    assert sum(part.loss for part in parts) / WORLD == pytest.approx(whole.loss, abs=1e-5)
    for name, term in whole.tally.terms.items():
        assert sum(part.tally.terms[name].item() for part in parts) / WORLD == pytest.approx(term.item(), abs=1e-5)
    # The mean of their accuracies is the accuracy of all: right ones of a process over the mean number of targets.
    assert [part.tally.masked for part in parts] == [whole.tally.masked / WORLD] * WORLD
    for name, gradient in whole.gradients.items():
        mean = torch.stack([part.gradients[name] for part in parts]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"complementary": False},
        {"weighting": "inverse_time"},
        {"weighting": "inverse_time", "complementary": False},
        {"prefix_mask": True},
        {"alignment": 0.5},
    ],
    ids=str,
)
def test_the_mean_over_processes_is_the_global_batch(knobs: dict[str, Any]) -> None:
    objective = ObjectiveConfig(**({"extra_padding": 6} | knobs))
    parts = in_processes([batch(range(2)), batch(range(2, 4))], objective)
    assert parts[0].loss != pytest.approx(parts[1].loss, abs=1e-3)
    check_mean(parts, step(batch(range(4)), objective, Shard()))


def test_pairs_are_contrasted_over_all_processes() -> None:
    """Also with one prompt in each, and pictures and questions that two processes share are no negatives."""
    objective = ObjectiveConfig(extra_padding=0, alignment=1.0)
    terms = []
    for data in (batch, sharing):
        parts, whole = (
            in_processes([data(range(2)), data(range(2, 4))], objective),
            step(data(range(4)), objective, Shard()),
        )
        check_mean(parts, whole)
        terms.append(whole.tally.terms["alignment"].item())
        assert [part.tally.terms["alignment"].item() for part in parts] == pytest.approx([terms[-1]] * 2, abs=1e-5)
    assert abs(terms[0] - terms[1]) > 0.1
    check_mean(
        in_processes([batch(range(1)), batch(range(1, 2))], objective), step(batch(range(2)), objective, Shard())
    )
    same = [replace(batch(range(1)), images=[picture((40, 40), seed=7)]) for _ in range(WORLD)]
    with pytest.raises(ValueError, match="all prompts of this batch have one picture or question: raise batch_size"):
        in_processes(same, objective)


def test_rows_without_masked_targets_are_left_out_over_all_processes() -> None:
    objective = ObjectiveConfig(extra_padding=0, adaptive_k=1.0, complementary=False)
    parts = in_processes([batch(range(2)), batch(range(2, 4))], objective, UNEVEN)
    assert [int(part.tally.row_loss_B.isnan().sum()) for part in parts if part.tally.row_loss_B is not None] == [0, 1]
    check_mean(parts, step(batch(range(4)), objective, Shard(), UNEVEN))
    terms = [part.tally.terms["adaptive_k"].item() for part in parts]
    assert abs(terms[0] - terms[1]) > 0.1


def test_one_masked_target_of_all_processes() -> None:
    """The second process masks nothing, so the mean over both is half the loss of the first."""
    model, objective = tiny_model(), ObjectiveConfig(complementary=False)
    u = torch.full((2, 20), 0.9)
    u[0, 6], u[1, 0] = 0.5, 0.5  # a target of the first row, the first token of the second

    @torch.no_grad()
    def loss(rows: list[int], share: Shard) -> float:
        whole, labels = spliced(model, rows)
        return draw_loss(model, whole, labels, torch.zeros(len(rows)), u[rows], objective, shard=share).item()

    expected, table = loss([0, 1], Shard()), Table()
    with ThreadPoolExecutor(WORLD) as pool:
        parts = list(pool.map(lambda rank: loss([rank], Threaded(rank, WORLD, table)), range(WORLD)))
    assert parts[1] == 0 and expected > 0.1
    assert parts[0] / WORLD == pytest.approx(expected, abs=1e-5)


def test_rows_are_cut_from_what_all_draw() -> None:
    drawn = torch.arange(6)
    assert [Shard(r, 3).rows(drawn).tolist() for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert Shard().rows(drawn).tolist() == list(range(6))


def test_one_process_agrees_with_itself() -> None:
    assert (Shard.here(), Shard().largest(5), Shard().mean(7)) == (Shard(0, 1), 5, 7)
    assert Shard().gather(("a", "b")) == ["a", "b"]
    assert torch.equal(Shard().gather_vectors(noise(2, 3).bfloat16()), noise(2, 3).bfloat16().float())
