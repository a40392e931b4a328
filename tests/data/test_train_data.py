"""Training data by step: resumed, from worker processes and from a prefetching thread, always the same batches."""

import multiprocessing
import time

import pytest
import torch
from torch.utils.data import DataLoader

from experiments.data.loader import Batches, Shuffled
from experiments.data.train_data import StepDataset, TrainData
from experiments.training.stages import Cutter
from lavida_adapter.views import Views, ready
from shirg import UserError
from tests.data.test_loader import glyphs
from tests.lavida_adapter.tiny import tiny_config


def test_a_resumed_loader_goes_on_with_its_own_step() -> None:
    batches = Batches(Shuffled(glyphs(), 0), 3)
    whole = [batch.ids for batch in StepDataset(batches, 0, 6)]
    assert [batch.ids for batch in StepDataset(batches, 4, 6)] == whole[4:]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_an_error_in_a_worker_is_the_error_of_the_training() -> None:
    """Not a traceback of the worker, with the sentence at its end."""

    def draw(step: int) -> object:
        raise UserError("picture 3.png is broken") if step == 1 else ZeroDivisionError("a bug")

    for begin, kind, note in ((1, UserError, False), (2, ZeroDivisionError, True)):
        loader = DataLoader(
            StepDataset(draw, begin, begin + 1), batch_size=None, num_workers=1, multiprocessing_context="fork"
        )
        (found,) = loader
        with pytest.raises(kind) as raised:
            TrainData(draw, 2).transfer_batch_to_device(found, torch.device("cpu"), 0)
        assert type(raised.value) is kind
        assert any("In a worker process" in line for line in getattr(raised.value, "__notes__", [])) == note


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


def test_a_thread_prefetches_and_raises_what_goes_wrong() -> None:
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
    assert drawn == [0, 1, 2], "two are prefetched, and no more"
    assert [next(steps) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="no step 5"):
        next(steps)
