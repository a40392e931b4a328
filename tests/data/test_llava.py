"""LLaVA's format: both published layouts, rounds, history, what is left out and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments.data.llava import Llava
from experiments.data.sample import Dataset, Listed, Varied

Write = Callable[..., Path]


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


LCS = {
    "id": "004539375",
    "image": "00453/004539375.jpg",
    "conversations": [
        turn("human", "Render a clear and concise summary of the photo.\n<image>"),
        turn("gpt", "select luxury furniture 3 - inch gel memory foam mattress topper"),
    ],
}
TALK = {
    "id": 33471,
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        turn("human", "<image>\nWhat are the colors of the bus?"),
        turn("gpt", "The bus is white and red."),
        turn("human", "What feature can be seen on its back?"),
        turn("gpt", "An advertisement."),
        turn("human", "Is it driving?"),
        turn("gpt", "Yes."),
    ],
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the file, and a picture for every entry that has one, but not those named by `without`."""

    def write(*entries: Any, name: str = "talks.json", lines: bool = False, without: str = "") -> Path:
        for entry in entries:
            for picture in [entry["image"]] if isinstance(entry.get("image"), str) else []:
                if picture != without:
                    path = tmp_path / "images" / picture
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 6), (200, 10, 10)).save(path)
        (tmp_path / "images").mkdir(exist_ok=True)
        text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(list(entries))
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def load(path: Path, **options: Any) -> Llava:
    return Llava(json=path, images=path.parent / "images", **options)


@pytest.mark.parametrize("lines", [False, True])
def test_both_layouts(write: Write, lines: bool) -> None:
    data = load(write(LCS, TALK, lines=lines), rounds="all", suffix="!")
    assert isinstance(data, Dataset) and isinstance(data, Listed) and isinstance(data, Varied)
    assert (data.name, len(data), data.dropped) == ("talks", 4, {})
    first, second = data[0], data[1]
    assert first.question == "Render a clear and concise summary of the photo."
    assert first.prompt == first.question + "!"
    assert first.answers == ("select luxury furniture 3 - inch gel memory foam mattress topper",)
    assert (second.question, second.answers) == ("What are the colors of the bus?", ("The bus is white and red.",))
    assert second.load_image().size == (8, 6)
    assert len({data[i].id for i in range(4)}) == 4
    assert {data[i].meta["picture"] for i in (1, 2, 3)} == {TALK["image"]}


def test_one_round_of_each_conversation_is_drawn_by_seed_and_epoch(write: Write) -> None:
    path = write(LCS, TALK)
    data, again, other = load(path), load(path), load(path, seed=1)
    assert len(data) == 2
    drawn = [data.at(1, epoch).question for epoch in range(40)]
    assert set(drawn) == {TALK["conversations"][i]["value"].replace("<image>\n", "") for i in (0, 2, 4)}  # type: ignore[index]
    assert drawn == [again.at(1, epoch).question for epoch in range(40)]
    assert drawn != [other.at(1, epoch).question for epoch in range(40)]
    assert data[1].id == data.at(1, 0).id and data[1].history == ()


def test_history_is_what_was_said_before(write: Write) -> None:
    data = load(write(LCS, TALK), rounds="all", history=True)
    assert data[1].history == ()
    assert data[2].history == ("What are the colors of the bus?", "The bus is white and red.")
    assert data[3].history == (*data[2].history, "What feature can be seen on its back?", "An advertisement.")


def test_what_cannot_be_learned_from_is_counted(write: Write) -> None:
    conversation = LCS["conversations"]
    data = load(
        write(
            LCS,
            {"id": "text", "conversations": conversation},
            {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": conversation},
            {"id": "mute", "image": "m.jpg", "conversations": [turn("human", "hm?")]},
            {"id": "empty", "image": "e.jpg", "conversations": [turn("human", "hm?"), turn("gpt", " ")]},
            {
                **TALK,
                "conversations": [turn("gpt", "I start."), turn("system", "Be nice."), *TALK["conversations"][:2]],
            },  # type: ignore[index]
            {**LCS, "image": "gone.jpg"},
            without="gone.jpg",
        ),
        missing="drop",
    )
    assert [data[i].answers for i in range(len(data))] == [
        ("select luxury furniture 3 - inch gel memory foam mattress topper",),
        ("The bus is white and red.",),
    ]
    assert data.dropped == {
        "without a picture": 1,
        "with several pictures": 1,
        "without an answer": 2,
        "whose picture is missing": 1,
    }


def test_rounds_that_do_not_fit_are_dropped_for_good(write: Write) -> None:
    data = load(write(LCS, TALK))
    data.keep(lambda sample: "feature" not in sample.question, "that talk of features")
    assert (len(data), data.dropped) == (2, {"that talk of features": 1})
    assert {data.at(1, epoch).answers[0] for epoch in range(40)} == {"The bus is white and red.", "Yes."}
    data.keep(lambda sample: sample.meta["picture"] == LCS["image"], "of a bus")
    assert (len(data), data.dropped["of a bus"]) == (1, 2)
    with pytest.raises(IndexError):
        data[1]


def test_a_limit_draws_conversations(write: Write) -> None:
    path = write(*[{**LCS, "id": i} for i in range(20)])
    ids = [[data[i].id for i in range(len(data))] for data in (load(path, limit=5), load(path, limit=5, seed=1))]
    assert len(ids[0]) == len(ids[1]) == 5 and ids[0] != ids[1]
    assert len(load(path, limit=500)) == 20
