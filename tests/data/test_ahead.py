"""Pictures that other processes cut: the same views, each once, and errors in their own words."""

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments.data.image_io import ViewBatches, load_picture, load_pictures, prefetch_pictures
from experiments.data.sample import Sample
from lavida_adapter.views import Views, cut, ready
from tests.lavida_adapter.tiny import tiny_config


def sample(folder: Path, name: str, question: str) -> Sample:
    return Sample(
        id=f"{name}-{question}",
        dataset="d",
        split="test",
        load_image=partial(load_picture, folder / name),
        size=None,
        question=question,
        prompt=question,
        answers=("1",),
        meta={"picture": name},
    )


@pytest.fixture
def batches(tmp_path: Path) -> list[list[Sample]]:
    """Two pictures in three batches; the first batch asks twice about one of them."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("a.png", (40, 90, 3)), ("b.png", (70, 30, 3))):
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / name)
    asked = [["a.png", "a.png", "b.png"], ["b.png"], ["a.png"]]
    return [[sample(tmp_path, name, str(i)) for i, name in enumerate(names)] for names in asked]


def test_workers_cut_what_would_be_cut_here(batches: list[list[Sample]]) -> None:
    config = tiny_config()
    found = list(prefetch_pictures(batches, config, "lavida_tiles", workers=2))
    assert [len(pictures or ()) for pictures in found] == [3, 1, 1]
    for batch, pictures in zip(batches, found, strict=True):
        assert pictures is not None
        for image, views in zip(load_pictures(batch), pictures, strict=True):
            assert isinstance(views, Views) and views.size == image.size
            expected, there = cut(image, config, "lavida_tiles"), ready(views, config, "lavida_tiles")
            assert torch.equal(there.pixels_V3SS, expected.pixels_V3SS) and torch.equal(there.valid_N, expected.valid_N)
            assert there.layout is expected.layout and there.picture_4 == expected.picture_4
    shared = found[0]
    assert shared is not None and shared[0] is shared[1] and shared[0] is not shared[2]


def test_a_broken_picture_is_told_in_its_own_sentence(batches: list[list[Sample]], tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"not a picture")
    given = ViewBatches(batches, tiny_config(), "lavida_tiles")
    assert isinstance(given[1], ValueError) and not isinstance(given[2], Exception)
    coming = prefetch_pictures(batches[1:], tiny_config(), "lavida_tiles", workers=1)
    with pytest.raises(ValueError, match=r"b\.png: cannot be read as a picture .*; replace it or remove its rows$"):
        next(coming)


def test_without_workers_nothing_is_loaded(batches: list[list[Sample]]) -> None:
    assert list(prefetch_pictures(batches, tiny_config(), "lavida_tiles", workers=0)) == [None] * 3
    with pytest.raises(ValueError, match="workers=-1: give 0 or more"):
        next(prefetch_pictures(batches, tiny_config(), "lavida_tiles", workers=-1))
