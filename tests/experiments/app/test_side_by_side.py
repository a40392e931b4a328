"""Answers of the shipped tiny model, side by side: the same as eval.py's, with numbers for every token and step."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from experiments.app.picture_question import PictureQuestion
from experiments.app.result_page import answer_as_html, preview, render_result, time_lines, token_lines
from experiments.app.shipped_pictures import SHIPPED, models_offered, shipped_pictures, suffix_for
from experiments.app.side_by_side import AnswerSlot, SideBySide, answer_question, answer_slots, compare_kept
from experiments.app.token_layer import TokenKind, kept_numbers, token_rows
from experiments.data.synthetic.tokenizer import build_tokenizer

NASTY = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> PictureQuestion:
    shipped = shipped_pictures()
    assert [picture.caption for picture in shipped] == list(SHIPPED)
    first, path = shipped[0], tmp_path_factory.mktemp("pictures") / "first.png"
    first.image.save(path)
    return PictureQuestion(
        picture=path, text=first.question, answer=first.answer, boxes=first.boxes, longest=first.longest
    )


@pytest.fixture(scope="module")
def result(question: PictureQuestion, tmp_path_factory: pytest.TempPathFactory) -> SideBySide:
    return answer_question(question, ["threads=1", "device=cpu"], tmp_path_factory.mktemp("stored"))


def test_the_answers_are_those_of_eval(
    result: SideBySide, question: PictureQuestion, eval_here: Callable[..., Path]
) -> None:
    root = re.search(r"data\.root=(\S+)", result.command)
    assert root is not None
    for answer in result.answers:
        job = eval_here(
            "model=tiny", "data=folder", f"data.root={root[1]}", "data.suffix=", "data.max_new_tokens=3",
            f"selector={answer.selector}", "model.path=./weights/tiny",
        )  # fmt: skip
        (row,) = pq.read_table(job / "samples.parquet").to_pylist()
        for key in ("prediction", "kept", "n_visual", "n_prefix", "n_steps"):
            assert row[key] == answer.row[key], (answer.selector, key)
    assert [answer.row["n_visual"] for answer in result.answers] == [88, 80, 80]
    assert [answer.is_right for answer in result.answers] == [
        a.row["prediction"] == question.answer for a in result.answers
    ]


def test_every_token_has_a_row(result: SideBySide) -> None:
    pooled, saint, shirg = (
        token_rows(answer.selection, answer.geometry(result.image.size)) for answer in result.answers
    )
    assert Counter(row[4] for row in pooled) == {TokenKind.MERGED: 80}
    assert Counter(row[4] for row in saint) == {TokenKind.KEPT: 80, TokenKind.DROPPED: 240}
    assert Counter(row[4] for row in shirg) == {TokenKind.KEPT: 64, TokenKind.DROPPED: 256, TokenKind.SCAFFOLD: 16}
    assert {row[5] for row in shirg if row[4] == TokenKind.KEPT} == kept_numbers(result.answers[2].selection)
    ranked = [row for row in shirg if row[9] is not None]
    assert sorted(row[9] for row in ranked) == list(range(1, 257)) and {row[7] for row in ranked} == {1}, "tiles alone"
    by_rank = [row[8] for row in sorted(ranked, key=lambda row: row[9])]
    assert by_rank == sorted(by_rank, reverse=True)
    assert all(0 <= row[0] < row[2] <= 10_000 and 0 <= row[1] < row[3] <= 10_000 for row in (*pooled, *saint, *shirg))
    assert shirg[0][:4] == [0, 0, 1250, 1250] and shirg[64][:4] == [0, 0, 625, 625], "8 x 8, then four tiles of them"


def test_what_is_kept_by_all_and_by_one_alone(result: SideBySide) -> None:
    shared = compare_kept(result.answers)
    saint, shirg = (kept_numbers(answer.selection) for answer in result.answers[1:])
    assert shared.everywhere == saint & shirg and shared.alone == {"saint": saint - shirg, "shirg": shirg - saint}
    n = len(shared.everywhere)
    expected = f"Both keep {n} tokens; saint alone {80 - n}, shirg alone {64 - n}."
    assert shared.sentence == f"{expected} Not compared: pooled, which makes new tokens."
    assert "takes two selectors" in compare_kept(result.answers[:2]).sentence
    lines = dict(token_lines(result.answers, shared))
    assert lines["  scaffold"] == ["\u2013", "\u2013", "16"] and lines["kept by this one alone"][1] == str(80 - n)
    times = dict(time_lines(result.answers))
    assert "  cache" not in times and all(float(text) > 0 for text in times["in all"])


def test_each_slot_knows_its_step_and_its_confidence(result: SideBySide) -> None:
    for answer in result.answers:
        assert sorted(slot.step or 0 for slot in answer.slots) == [1, 2, 3]
        assert all(slot.confidence is not None and 0 < slot.confidence <= 1 for slot in answer.slots)
        assert answer.slots[0].text == answer.row["prediction"] and not answer.slots[0].is_end
        assert answer.slots[-1].is_end


def test_slots_of_a_history() -> None:
    """Slot 0 is there from the beginning, 1 is written in step 2, 2 in step 1, 3 stays a mask."""
    tokenizer, mask = build_tokenizer(), build_tokenizer().mask_token_id
    a, b, c = tokenizer.encode("abc", add_special_tokens=False)
    history = [torch.tensor([[a, mask, c, mask]]), torch.tensor([[a, b, c, mask]])]
    sure = [torch.tensor([[0.0, 0.0, 0.75, 0.0]]), torch.tensor([[0.0, 0.5, 0.0, 0.0]])]
    found = answer_slots(history, sure, tokenizer, mask)
    assert found[:3] == [
        AnswerSlot("a", False, 0, None),
        AnswerSlot("b", False, 2, 0.5),
        AnswerSlot("c", False, 1, 0.75),
    ]
    assert found[3].step is None and found[3].is_end
    assert [slot.step for slot in answer_slots(history, [], tokenizer, mask)] == [1, 2, 1, None], "no probabilities"
    assert answer_slots([], [], tokenizer, mask) == []


def test_the_page_escapes_what_it_shows(result: SideBySide, question: PictureQuestion, tmp_path: Path) -> None:
    page = render_result(result)
    assert page.count('class="card"') == 3 and page.count("data:image/webp") == 1 + 3 + 2 + 1 + 2 + 2
    assert "threads=1" in page and "right answer: " in page
    stored = re.findall(r"data-tokens=\"(.*?)\"", page)
    assert [len(json.loads(text.replace("&#34;", '"'))) for text in stored] == [80, 320, 336]
    nasty: dict[str, Any] = {"picture": question.picture, "text": NASTY, "answer": NASTY, "selectors": ("pooled",)}
    page = answer_as_html(PictureQuestion(**nasty), ["threads=1"], tmp_path)
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2
    page = answer_as_html(PictureQuestion(**{**nasty, "model": f"./{NASTY}"}), [], tmp_path)
    assert page.startswith('<div class="result"><p class="problem" role="alert">model.path=./&lt;script&gt;')


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": "./nowhere"}, "model.path=./nowhere: there are no weights there"),
        ({"model": "nobody/nothing"}, "model.path=nobody/nothing: no such local folder, and the download"),
        ({"budget": 380, "model": "small"}, "budget"),
        ({"adapter": True, "selectors": ("tome",)}, "there is no adapter tome"),
        ({"selectors": ("oracle",)}, "Oracle needs to know where the evidence is"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(
    question: PictureQuestion, tmp_path: Path, changed: dict[str, Any], sentence: str
) -> None:
    fields = {name: getattr(question, name) for name in question.__dataclass_fields__}
    page = answer_as_html(PictureQuestion(**{**fields, **changed}), ["threads=1"], tmp_path)
    assert 'role="alert"' in page and sentence in page and page.count("<p") == 1


def test_a_preview_is_a_picture_or_a_sentence(question: PictureQuestion, tmp_path: Path) -> None:
    assert question.picture is not None and 'src="data:image/webp;base64,' in preview(question.picture)
    (tmp_path / "notes.jpg").write_text("no picture")
    assert "notes.jpg: cannot be read as a picture" in preview(tmp_path / "notes.jpg")
    assert models_offered()[:3] == ["tiny", "tiny_dream", "tiny_untied"] and "bench_small" not in models_offered()
    assert suffix_for("tiny_dream") == "" and suffix_for("lavida_8b").startswith("\nAnswer the question")
