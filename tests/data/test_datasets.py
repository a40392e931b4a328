"""Every dataset, drawn or read from files: two builds are identical, ids are unique, a pickled copy is the same."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data.folder import Folder
from experiments.data.llava import Llava
from experiments.data.sample import Dataset, Sample
from experiments.data.synthetic.entitygrid import EntityGrid
from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.data.synthetic.mixture import FAMILIES, SynthMix


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, with a metadata file of questions and a JSON file of conversations about them."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i % 3}.png", "question": f"{i}?", "answer": str(i)} for i in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = [{"from": speaker, "value": f"{speaker} {k}"} for k in range(3) for speaker in ("human", "gpt")]
    (folder / "talks.json").write_text(json.dumps([{"image": f"{i}.png", "conversations": turns} for i in range(3)]))
    return folder


def _entitygrid(_: Path) -> Dataset:
    options = {"split": "test", "suffix": "", "max_new_tokens": 4, "metrics": ["entity_match"]}
    return EntityGrid(**options, canvas=[128, 128], entities=2, sizes=[16], noise=3.0)  # type: ignore[arg-type]


def _mix(_: Path) -> Dataset:
    return SynthMix(shares={"glyphs": 1, "doc": 2}, split="train", n=20, density="train")


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "folder": lambda folder: Folder(root=folder),
    "llava": lambda folder: Llava(json=folder / "talks.json", images=folder, rounds="all", history=True),
    "entitygrid": _entitygrid,
    "mix": _mix,
    "glyphs": lambda _: SynthGlyphs(split="test", n=40, density="sparse,dense"),
    **{name: lambda _, f=f: f(split="test", n=40, density=["sparse", "dense"]) for name, f in FAMILIES.items()},  # type: ignore[misc]
}


def content(sample: Sample) -> tuple[object, ...]:
    fields = (sample.id, sample.question, sample.prompt, sample.answers, sample.boxes, sample.history, sample.meta)
    return *fields, sample.load_image().tobytes()


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_is_the_same_wherever_it_is_built(name: str, pictures: Path) -> None:
    """Built again, read backwards and pickled for a worker process; its end is the end."""
    data = DATASETS[name](pictures)
    assert isinstance(data, Dataset)
    n = len(data)
    first = [content(data[i]) for i in range(n)]
    assert len({fields[0] for fields in first}) == n
    for family in FAMILIES.values():
        family.draw.cache_clear()
    again = DATASETS[name](pictures)
    assert [content(again[i]) for i in reversed(range(n))] == first[::-1]
    there = pickle.loads(pickle.dumps(data))
    assert [content(there[i]) for i in (0, n - 1)] == [first[0], first[-1]]
    assert pickle.loads(pickle.dumps(data[n - 1])).load_image().tobytes() == first[-1][-1]
    with pytest.raises(IndexError):
        data[n]
