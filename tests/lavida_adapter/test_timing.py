"""Stages that interrupt one another reach the timer behind as stages that do not nest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lavida_adapter import CacheSelector, DecodeConfig, FastV, PyramidDrop, RedVTP
from lavida_adapter.timing import NoTimer, Pausing
from tests.lavida_adapter.cache_compression.prompts import made_prefix, small


class Recorder:
    """Notes what begins and ends; refuses to nest."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.running = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        assert not self.running, f"{name} inside {self.running}"
        self.running = name
        self.events.append(name)
        try:
            yield
        finally:
            self.running = ""


def test_the_outer_stage_goes_on_after_the_inner_one() -> None:
    recorder = Recorder()
    timer = Pausing(recorder)
    with timer.stage("a"):
        with timer.stage("b"):
            with timer.stage("c"):
                assert recorder.running == "c"
            assert recorder.running == "b"
        assert recorder.running == "a"
    assert recorder.events == ["a", "b", "c", "b", "a"]
    assert recorder.running == ""
    with pytest.raises(RuntimeError, match="inside"), timer.stage("a"), timer.stage("b"):
        raise RuntimeError("inside")
    assert recorder.running == ""
    with Pausing(NoTimer()).stage("a"):
        pass


@pytest.mark.parametrize(
    ("build", "events"),
    [
        (FastV, ["prefill", "cache", "denoise"]),
        (PyramidDrop, ["prefill", "cache", "denoise"]),
        (RedVTP, ["prefill", "denoise", "cache", "denoise"]),
    ],
)
def test_the_cut_is_a_stage_of_its_own(build: Callable[..., CacheSelector], events: list[str]) -> None:
    recorder = Recorder()
    small().generate(made_prefix(), DecodeConfig(max_new_tokens=4), cache_selector=build(budget=2), timer=recorder)
    assert recorder.events == events
