"""A step shared by several processes equals the step of one: same draws, same padding, same mean."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from baselines import Pooled
from lavida_adapter import LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.objective import Shard
from tests.lavida_adapter.tiny import picture, tiny_model

WORLD = 2


@dataclass
class Table:
    """Where threads that stand for processes lay down their numbers."""

    numbers: list[float] = field(default_factory=lambda: [0.0] * WORLD)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(WORLD, timeout=60))

    def exchange(self, rank: int, number: float) -> list[float]:
        self.numbers[rank] = number
        self.barrier.wait()
        found = list(self.numbers)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Threaded(Shard):
    table: Table = field(default_factory=Table)

    def largest(self, n: int) -> int:
        return int(max(self.table.exchange(self.rank, n)))

    def mean(self, n: int) -> float:
        return sum(self.table.exchange(self.rank, n)) / self.world


def batch(rows: range) -> TrainBatch:
    """Rows that differ in every length: of question, answer and picture."""
    sizes = [(40, 40), (38, 16), (12, 30), (40, 20)]
    return TrainBatch(
        images=[picture(sizes[i], seed=i) for i in rows],
        questions=[("digit red", "letter K", "shape kind shape kind", "digit blue")[i] for i in rows],
        answers=[("7", "blue red green", "square", "1 2 3 4 5")[i] for i in rows],
        ids=[str(i) for i in rows],
    )


def step(rows: range, objective: ObjectiveConfig, share: Shard) -> tuple[float, dict[str, torch.Tensor]]:
    with LOCK, torch.random.fork_rng():  # threads share the random state
        model = tiny_model()
        torch.manual_seed(0)
        add_lora(model, LoraConfig(rank=2, targets=("mm_projector.0",), train_whole=("image_newline",)))
    loss = model.loss(batch(rows), Pooled(), objective, torch.Generator().manual_seed(3), shard=share)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


LOCK = threading.Lock()


@pytest.mark.parametrize(
    "knobs", [{}, {"complementary": False}, {"weighting": "inverse_time"}, {"prefix_mask": True}], ids=str
)
def test_the_mean_over_processes_is_the_global_batch(knobs: dict[str, Any]) -> None:
    objective = ObjectiveConfig(**({"extra_padding": 6} | knobs))
    whole, gradients = step(range(4), objective, Shard())
    table = Table()
    with ThreadPoolExecutor(WORLD) as pool:
        work = [
            pool.submit(step, range(2 * rank, 2 * rank + 2), objective, Threaded(rank, WORLD, table))
            for rank in range(WORLD)
        ]
        parts = [part.result() for part in work]
    assert sum(loss for loss, _ in parts) / WORLD == pytest.approx(whole, abs=1e-5)
    assert parts[0][0] != pytest.approx(parts[1][0], abs=1e-3)
    for name, gradient in gradients.items():
        mean = sum(found[name] for _, found in parts) / WORLD
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6)


def test_rows_are_cut_from_what_all_draw() -> None:
    drawn = torch.arange(6)
    assert [Shard(r, 3).rows(drawn).tolist() for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert Shard().rows(drawn).tolist() == list(range(6))


def test_one_process_agrees_with_itself() -> None:
    assert (Shard.here(), Shard().largest(5), Shard().mean(7)) == (Shard(0, 1), 5, 7)
