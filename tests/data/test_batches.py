"""Batches that depend on the step alone, whoever draws them and however many share them."""

import multiprocessing
import time

import pytest
import torch
from torch.utils.data import DataLoader

from experiments.data.loader import Batches, Shuffled, collate
from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.data.train_data import StepDataset, TrainData
from experiments.training.stages import Cutter
from lavida_adapter.views import Views, ready
from tests.lavida_adapter.tiny import tiny_config


def glyphs(n: int = 24, per_picture: int = 3) -> SynthGlyphs:
    return SynthGlyphs(split="train", n=n, density="train", qa_per_image=per_picture)


def order(seed: int = 0, n: int = 24, *, places: int = 72, first: int = 0) -> list[int]:
    shuffled = Shuffled(glyphs(n), seed)
    return [shuffled.index(place)[1] for place in range(first, places)]


def test_a_place_has_one_sample_wherever_one_starts() -> None:
    assert order(1, first=40) == order(1)[40:]
    assert order(2) != order(1)


def test_every_epoch_holds_every_sample_once_in_a_new_order() -> None:
    found = order()
    epochs = [found[24 * e : 24 * (e + 1)] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_questions_of_a_picture_stay_together_and_share_its_object() -> None:
    found = order()
    assert [i // 3 for i in found[::3]] == [i // 3 for i in found[2::3]]
    batch = Batches(Shuffled(glyphs(), 0), 6)(0)
    assert len({id(image) for image in batch.images}) == 2
    assert len(set(batch.ids)) == 6


def test_a_last_picture_with_fewer_questions_does_not_break_an_epoch() -> None:
    assert set(order(n=10, places=15)) == set(range(10))


def test_processes_share_the_batch_of_one() -> None:
    stream = Shuffled(glyphs(), 0)
    whole = Batches(stream, 6)
    for world in (2, 3):
        parts = [Batches(stream, 6, rank=rank, world=world) for rank in range(world)]
        for step in range(6):
            assert [place for part in parts for place in part.positions(step)] == list(whole.positions(step))
    with pytest.raises(ValueError, match="batch_size=6 is shared by 4 processes: give a multiple of 4"):
        Batches(stream, 6, world=4)
    with pytest.raises(ValueError, match="batch_size=0: give at least 1"):
        Batches(stream, 0)


def test_a_resumed_loader_goes_on_with_its_own_step() -> None:
    batches = Batches(Shuffled(glyphs(), 0), 3)
    whole = [batch.ids for batch in StepDataset(batches, 0, 6)]
    assert [batch.ids for batch in StepDataset(batches, 4, 6)] == whole[4:]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_workers_draw_the_same_batches_in_the_same_order() -> None:
    batches = Batches(Shuffled(glyphs(), 0), 3)
    loader = DataLoader(StepDataset(batches, 2, 7), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [batch.ids for batch in loader] == [batches(step).ids for step in range(2, 7)]


def test_a_spawned_worker_draws_what_this_process_draws() -> None:
    """The batch survives the way between processes: pictures that were one object still are, and get a layout again."""
    config = tiny_config()
    batches = Batches(Shuffled(glyphs(), 0), 6, prepare=Cutter(config, ("lavida_tiles",)))
    loader = TrainData(batches, steps=1, workers=1).train_dataloader()
    assert loader.multiprocessing_context == multiprocessing.get_context("spawn")
    (batch,) = loader
    here = batches(0)
    assert (batch.ids, batch.answers, batch.prompts) == (here.ids, here.answers, here.prompts)
    assert len({id(views) for views in batch.images}) == 2
    for there, ours in zip(batch.images, here.images, strict=True):
        assert isinstance(there, Views) and isinstance(ours, Views) and not hasattr(there, "layout")
        ready_there, ready_ours = (ready(views, config, "lavida_tiles") for views in (there, ours))
        assert ready_there.layout is ready_ours.layout
        assert torch.equal(ready_there.pixels_V3SS, ready_ours.pixels_V3SS)
        assert torch.equal(ready_there.valid_N, ready_ours.valid_N)
    with pytest.raises(ValueError, match="trainer.workers=-1: give 0 or more"):
        TrainData(batches, steps=1, workers=-1)


def test_a_thread_draws_ahead_and_hands_on_what_goes_wrong() -> None:
    drawn: list[int] = []

    def draw(step: int) -> int:
        if step == 5:
            raise ValueError("no step 5")
        drawn.append(step)
        return step

    steps = iter(StepDataset(draw, 0, 9))
    assert next(steps) == 0
    deadline = time.monotonic() + 10
    while len(drawn) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert drawn == [0, 1, 2], "two ahead, and no more"
    assert [next(steps) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="no step 5"):
        next(steps)


def test_collate_takes_the_first_answer_and_the_prompt_with_its_suffix() -> None:
    dataset = SynthGlyphs(split="train", n=3, density="train", qa_per_image=3, suffix=" now")
    batch = collate([dataset[i] for i in range(3)])
    assert batch.prompts == [f"{question} now" for question in batch.questions]
    assert list(batch.answers) == [dataset[i].answers[0] for i in range(3)]
