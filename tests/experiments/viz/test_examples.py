"""Examples: which samples are drawn, the same ones for every job of a study; texts that show all characters."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from experiments.data.sample import Sample
from experiments.jobs.results import SHOTS
from experiments.jobs.sample_rows import SampleRow
from experiments.viz.examples import load_examples, pick_examples, printable

Eval = Callable[..., Path]


def test_examples_take_kinds_of_question_in_turn_and_new_pictures_first() -> None:
    samples = [
        Sample(
            id=f"{picture}-{kind}",
            dataset="d",
            split="test",
            load_image=lambda: Image.new("RGB", (1, 1)),
            size=None,
            question="?",
            prompt="?",
            answers=("a",),
            subtask=kind,
            meta={"picture": picture},
        )
        for picture in "abc"
        for kind in ("digit", "letter")
    ]
    assert pick_examples(samples, 4) == {"a-digit": 0, "b-letter": 1, "c-digit": 2, "a-letter": 3}
    assert len(pick_examples(samples, 20)) == 6
    assert pick_examples(samples[:2], 2) == {"a-digit": 0, "a-letter": 1}  # no other picture is left


def test_jobs_of_a_study_show_the_same_samples(eval_here: Eval) -> None:
    shown = []
    for selector in ("full", "random"):
        job = eval_here(f"selector={selector}", "limit=24", "shots=5")
        shown.append([example.record["id"] for example in load_examples(job / SHOTS)])
        assert all(set(one.record) < set(SampleRow.__annotations__) for one in load_examples(job / SHOTS))
    assert shown[0] == shown[1]
    assert len(set(shown[0])) == 5


def test_texts_show_every_character() -> None:
    assert printable("a\nb\x07") == "a\\x0ab\\x07"
    assert printable("abcdef", longest=3) == "abc..." and printable("abc", longest=3) == "abc"


@pytest.mark.parametrize("selector", ["full", "global_only", "shirg"])
def test_strips_and_dots_are_answered_and_drawn(selector: str, eval_here: Eval, tmp_path: Path) -> None:
    sizes = [(60000, 1), (1, 60000), (2000, 60), (1, 1)]
    (tmp_path / "narrow").mkdir()
    rows = []
    for width, height in sizes:
        Image.new("RGB", (width, height), "red").save(tmp_path / f"narrow/{width}.png")
        rows.append(json.dumps({"file_name": f"{width}.png", "question": "what?", "answers": ["red"]}))
    rows[3] = rows[3].replace("1.png", "dot.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "narrow/dot.png")
    (tmp_path / "narrow/metadata.jsonl").write_text("\n".join(rows))
    job = eval_here(f"selector={selector}", "data=folder", f"data.root={tmp_path}/narrow", "decode.max_new_tokens=2")
    examples = load_examples(job / SHOTS)
    assert len(examples) == 4
    for example in examples:
        drawn = [Image.open(io.BytesIO(data)).size for data in (example.picture, example.overlay)]
        assert drawn[0] == drawn[1] and max(drawn[0]) <= 448


def test_examples_do_not_wait_for_the_disk(eval_here: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: dict[int, int] = {}
    for shots in (0, 6):
        calls: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", calls.append)
            folder = eval_here("selector=shirg", "limit=6", f"shots={shots}")
        waits[shots] = len(calls)
    assert waits[6] < waits[0] + 6 and len(list((folder / "shots").iterdir())) > 6 * 3
