"""Tables and files of the public benchmarks with values that do not belong there: one sentence that names the row."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from experiments.data.benchmarks import hub as hub_source
from tests.data import official
from tests.data.test_benchmarks import load
from tests.refusals import assert_says, message_of

NAN, LONG = float("nan"), "why " * 60_000


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


TABLES: dict[str, dict[str, Any]] = {
    "chartqa": {"question": "?", "answer": "1", "type": "human_test"},
    "docvqa": {"question": "?", "answers": ["1"], "questionId": "7", "question_types": ["layout"]},
    "infovqa": {"question": "?", "answers": ["1"], "questionId": "7", "image_url": "x"},
    "textvqa": {"question": "?", "answers": ["1"] * 10, "question_id": 7, "image_id": "x"},
    "vqav2": {"question": "?", "answers": [{"answer": "1"}] * 10, "question_id": 7, "image_id": 3},
}
QUESTION = "the question is ... ; it must be a text that is not empty"
CHANGES: dict[str, list[tuple[dict[str, Any], str]]] = {
    **dict.fromkeys(TABLES, []),
    "chartqa": [
        *(({"question": value}, QUESTION) for value in (3, b"x", {"a": 1}, ["?"], " ", NAN)),
        *(({"answer": value}, "the answers are ... ; they must be texts") for value in (3, b"x", {"a": 1}, [3], NAN)),
        ({"answer": ""}, "1 of 1 questions have no answers"),
        ({"answer": None}, "1 of 1 questions have no answers"),
        ({"question": None}, "has no question or query"),
        ({"question": LONG}, "row 0: a text of 240,000 characters"),
        ({"answer": LONG}, "row 0: a text of 240,000 characters"),
        ({"type": ["human"]}, "type is ['human']; it must be a text"),
        ({"imgname": {"a": 1}}, "imgname is {'a': 1}; it must be a text"),
        *(
            ({"human_or_machine": value}, "human_or_machine is ... ; it must be 0 (human) or 1 (augmented)")
            for value in ("human", 7, -1, NAN, [0], 0.5)
        ),
    ],
    "docvqa": [
        *(({"questionId": value}, "questionId is ... ; it must be a whole number or") for value in (NAN, [1], True)),
        ({"questionId": None}, "has no questionId or question_id or id"),
        *(({"question_types": value}, "question_types is ... ; it must be a list of texts") for value in ("x", 3, [3])),
        ({"ucsf_document_id": [1]}, "ucsf_document_id is [1]; it must be a text"),
        *(({"answers": value}, "they must be texts") for value in ([[]], [3], [[["a"]]], [None])),
        ({"answers": [LONG]}, "a text of 240,000 characters"),
    ],
    "infovqa": [({"image_url": {"a": 1}}, "image_url is {'a': 1}; it must be a text")],
    "textvqa": [
        ({"image_id": [1]}, "image_id is [1]; it must be a text"),
        ({"question_id": 1.5}, "question_id is 1.5"),
    ],
    "vqav2": [
        ({"answers": [{"answer": 3}]}, "they must be texts"),
        ({"answers": [{"text": "a"}]}, "they must be texts"),
        ({"multiple_choice_answer": [1]}, "multiple_choice_answer is [1]; it must be a text"),
        ({"answer_type": {"a": 1}}, "answer_type is {'a': 1}; it must be a text"),
    ],
}
CASES = [(name, change, words) for name, changes in CHANGES.items() for change, words in changes]


def write(root: Path, name: str, image: Any, **change: Any) -> list[str]:
    """A table of one row as parquet; returns the overrides that read it."""
    hub_source._open.cache_clear()
    hub_source._pictures.cache_clear()
    split = official.split_of(name)
    fields = {**TABLES[name], "image": image, **change}
    (root / "data").mkdir(parents=True)
    pq.write_table(pa.table({key: [value] for key, value in fields.items()}), root / "data" / f"{split}-0.parquet")
    return [f"data={name}", f"data.hub={root}"]


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_as_they_are(tmp_path: Path, name: str) -> None:
    data = load(*write(tmp_path / "t", name, {"bytes": png(), "path": None}))
    assert (data[0].question, data[0].load_image().size) == ("?", (4, 4))


@pytest.mark.parametrize(("name", "change", "words"), CASES, ids=lambda part: repr(part)[:40])
def test_values_in_a_table(tmp_path: Path, name: str, change: dict[str, Any], words: str) -> None:
    message = message_of(lambda: load(*write(tmp_path / "t", name, {"bytes": png(), "path": None}, **change)))
    assert_says(message, words)
    assert len(message) < 500


TEXT = (b"hello", {"bytes": b"hello"})
NO_BYTES = (3, "x.png", {"path": "/dev/zero"}, {"path": "x" * 5000}, {"a": 1}, None, NAN)


@pytest.mark.parametrize("image", [*TEXT, *NO_BYTES], ids=lambda image: repr(image)[:30])
def test_a_picture_that_is_none(tmp_path: Path, image: Any) -> None:
    data = load(*write(tmp_path / "t", "docvqa", image))
    words = "in no format that Pillow knows" if image in TEXT else "has no picture; remove the row"
    assert_says(message_of(lambda: data[0].load_image()), f"row 0: ... {words}")


BROKEN = ["[" * 100_000, '{"data": [{"question": "\\ud800"}]}', "\xff", "null", '{"data": [3]}']


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:20])
def test_official_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "infographicsVQA_val_v1.0_withQT.json").write_text(content, encoding="latin-1")
    message = message_of(lambda: load("data=infovqa", "data.source=disk", f"data.root={tmp_path}"))
    assert_says(message, "infographicsVQA_val_v1.0_withQT.json ")
    assert len(message) < 500


@pytest.mark.parametrize("place", [3, "../../x", "a\0b", "x" * 5000, {"a": 1}])
def test_places_of_pictures(tmp_path: Path, place: object) -> None:
    row = {"questionId": 1, "question": "?", "answers": ["1"], "image_local_name": place}
    (tmp_path / "infographicsVQA_val_v1.0_withQT.json").write_text(json.dumps({"data": [row]}))
    message = message_of(lambda: load("data=infovqa", "data.source=disk", f"data.root={tmp_path}"))
    assert_says(message, "entry 0: its picture is missing")
