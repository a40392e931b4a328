"""`data=folder`: the forms of metadata that it accepts, ids, limits, links."""

import json
import random
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf
from PIL import Image

from experiments.data.folder import Folder
from experiments.data.sample import Dataset
from experiments.metrics import METRICS

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"
ROW = {"file_name": "a.png", "question": "What?", "answers": ["this"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with three pictures and nothing else."""
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("deep/c.png", "green")):
        Image.new("RGB", (6, 4), colour).save(folder / name)
    return folder


def write(root: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def row(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**ROW, **changes}.items() if value is not None}


def test_samples(root: Path) -> None:
    write(root, row(), row(file_name="deep/c.png", answers="that", question_id=17), row(answers=None, answer="4"))
    data = Folder(root=root, suffix="\nOne word.", max_new_tokens=5)
    assert isinstance(data, Dataset)
    assert (data.name, data.split, len(data), data.max_new_tokens) == ("mine", "all", 3, 5)
    assert [data[i].id for i in range(3)] == ["a.png#0", "17", "a.png#1"]
    assert [data[i].answers for i in range(3)] == [("this",), ("that",), ("4",)]
    assert data[0].question == "What?" and data[0].prompt == "What?\nOne word."
    assert [data[i].meta["picture"] for i in range(3)] == ["a.png", "deep/c.png", "a.png"]
    assert data[1].load_image().getpixel((0, 0)) == (0, 128, 0)
    assert data[0].boxes == ()


def test_generated_ids_do_not_depend_on_other_pictures(root: Path) -> None:
    alone = Folder(root=write(root, row(), row()))
    assert [alone[i].id for i in range(2)] == ["a.png#0", "a.png#1"]
    mixed = Folder(root=write(root, row(file_name="b.png"), row(), row(file_name="b.png"), row()))
    assert [mixed[i].id for i in range(4)] == ["b.png#0", "a.png#0", "b.png#1", "a.png#1"]


def test_metadata_may_have_blank_lines_a_byte_order_mark_windows_ends_and_odd_separators(root: Path) -> None:
    text = "\ufeff" + json.dumps(row(question="one\u2028line"), ensure_ascii=False) + "\r\n\r\n" + json.dumps(row())
    (root / "metadata.jsonl").write_bytes(text.encode())
    data = Folder(root=root)
    assert len(data) == 2
    assert data[0].question == "one\u2028line"


def test_another_metadata_file(root: Path) -> None:
    write(root, row()).joinpath("metadata.jsonl").rename(root / "dev.jsonl")
    assert len(Folder(root=root, metadata="dev.jsonl", name="x")) == 1


def test_limit_draws_the_same_rows_whatever_the_order_of_lines(root: Path) -> None:
    rows = [row(question_id=f"q{i}") for i in range(30)]
    ten = Folder(root=write(root, *rows), limit=10, seed=3)
    ids = [ten[i].id for i in range(10)]
    assert ids == sorted(ids, key=lambda name: int(name[1:])) and ids != [f"q{i}" for i in range(10)]
    random.Random(0).shuffle(rows)
    again = Folder(root=write(root, *rows), limit=10, seed=3)
    assert {again[i].id for i in range(10)} == set(ids)
    five = Folder(root=root, limit=5, seed=3)
    assert {five[i].id for i in range(5)} < set(ids)
    other = Folder(root=root, limit=10, seed=4)
    assert {other[i].id for i in range(10)} != set(ids)
    assert len(Folder(root=root, limit=99)) == 30


def test_pictures_are_not_opened_before_they_are_needed(root: Path) -> None:
    (root / "a.png").write_bytes(b"no picture")
    data = Folder(root=write(root, row(), row(file_name="b.png")))
    assert data[1].load_image().size == (6, 4)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as a picture .*; replace it or remove its rows"):
        data[0].load_image()


def test_links_inside_the_folder_are_fine(root: Path) -> None:
    (root / "link.png").symlink_to(root / "deep" / "c.png")
    assert Folder(root=write(root, row(file_name="link.png")))[0].load_image().size == (6, 4)


def test_a_folder_may_be_reached_by_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(write(root, row()), target_is_directory=True)
    assert len(Folder(root=tmp_path / "alias")) == 1


def test_the_shipped_config(root: Path) -> None:
    config = OmegaConf.load(CONF / "folder.yaml")
    config.root = str(write(root, row()))
    data = hydra.utils.instantiate(config)
    assert data[0].prompt == "What?\nAnswer the question using a single word or phrase."
    assert data.name == "mine" and set(data.metric_names) <= set(METRICS)
