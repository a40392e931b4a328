"""Texts with gaps and texts with a final answer, from the data to the rows."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments import build
from experiments.data.folder import Folder
from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.evaluate import prompt_hash
from experiments.schema import CONF
from lavida_adapter import DecodeConfig, Lavida
from lavida_adapter.infill import INFILL
from lavida_adapter.relevance import LmEmbed
from shirg import ShirgSelector, UserError
from tests.experiments.conftest import result_of

Eval = Callable[..., Path]
Write = Callable[..., Path]
REAL = os.environ.get("SHIRG_REAL_SAMPLES")
DECODE = "decode.max_new_tokens=32"


def with_drafts(folder: Path, drafts: list[object], key: str = "draft") -> Path:
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{**row, key: draft} for row, draft in zip(rows, drafts, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows_of(job: Path) -> list[dict[str, object]]:
    return pq.read_table(job / "samples.parquet").to_pylist()


def test_every_line_may_have_its_own_draft(eval_here: Eval, picture_folder: Write) -> None:
    """In one batch: a draft of the line, the draft of the dataset, and both with what they got."""
    folder = with_drafts(picture_folder("mine", ["a", "b", "c"]), ["One [MASK:2].", None, "[MASK:1] [GAP:3]!"])
    common = ("data=folder", f"data.root={folder}", "selector=pooled", DECODE)
    rows = rows_of(eval_here(*common, "data.draft='So [MASK:2] it is'"))
    assert [len(row["gaps"]) for row in rows] == [1, 1, 2]
    assert [row["text"] == row["prediction"] for row in rows] == [True] * 3
    texts = [row["text"] for row in rows]
    assert texts[0].startswith("One ") and texts[0].endswith(".")
    assert texts[1].startswith("So ") and texts[1].endswith(" it is") and texts[2].endswith("!")
    assert not any("<|" in text for text in texts)
    scored = rows_of(eval_here(*common, "data.draft='So [MASK:2] it is'", "data.answer_rule=gaps"))
    assert [row["prediction"] for row in scored] == [" ".join(row["gaps"]) for row in rows]
    assert [row["text"] for row in scored] == texts
    free = rows_of(eval_here("data=folder", f"data.root={picture_folder('free', ['a', 'b'])}", "selector=pooled"))
    assert [(row["gaps"], row["has_final"], row["text"] == row["prediction"]) for row in free] == [([], None, True)] * 2


def test_texts_without_a_final_answer_are_counted(eval_here: Eval, picture_folder: Write) -> None:
    """Drafts write the texts here: the rule sees the same as in a text that the model wrote itself."""
    drafts: list[object] = ["[MASK:1]\nAnswer: 42", "Answer: 41\n[MASK:1]\nANSWER: one ", "[MASK:1] so 42"]
    folder = with_drafts(picture_folder("mine", ["a", "b", "c"]), drafts, key="drafts")
    job = eval_here("data=folder", f"data.root={folder}", "selector=pooled", DECODE, "data.answer_rule=final")
    rows, record = rows_of(job), result_of(job)
    assert [row["has_final"] for row in rows] == [True, True, False]
    assert [row["prediction"] for row in rows[:2]] == ["42", "one"]
    assert rows[2]["prediction"] == str(rows[2]["text"]).splitlines()[-1].strip() != ""
    assert [row["score_exact_match"] for row in rows] == [0, 1, 0]
    assert "Answer: 42" in str(rows[0]["text"])
    assert record["decoding"]["without_final_answer"] == 1
    plain = result_of(eval_here("data=folder", f"data.root={folder}", "selector=pooled", DECODE))
    assert plain["decoding"]["without_final_answer"] is None


@pytest.mark.parametrize("draft", ["", "  ", 3, ["[GAP]"]])
def test_a_draft_that_is_no_text_is_refused_with_its_line(picture_folder: Write, draft: object) -> None:
    folder = with_drafts(picture_folder("mine"), [draft])
    with pytest.raises(UserError, match="metadata.jsonl, line 1: 'draft' must be a non-empty text with gaps"):
        Folder(root=folder)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.draft='none'", "0.png#0: the draft 'none' has no gap to fill"),
        ("data.draft='[MASK:40]'", "0.png#0: the draft has 41 tokens, the answer only 32: raise decode.max_new_tokens"),
        ("data.answer_rule=last", "data.answer_rule='last': choose one of whole, final, gaps"),
    ],
)
def test_unusable_options_stop_the_job_before_any_answer(
    eval_here: Eval, picture_folder: Write, capsys: pytest.CaptureFixture[str], override: str, says: str
) -> None:
    job = eval_here("data=folder", f"data.root={picture_folder('mine')}", "selector=pooled", DECODE, override, ok=False)
    assert says in capsys.readouterr().err
    assert not job.exists(), "what was refused before it began leaves no row"


def test_the_recipes() -> None:
    infill = build.build_decode(build.compose_eval("decode=infill"), 16)
    assert infill == INFILL
    cfg = build.compose_eval("experiment=reason", "model=lavida_reason", "data=chartqa")
    assert build.build_decode(cfg, 16) == DecodeConfig(max_new_tokens=1024)
    assert cfg.data.answer_rule == "final" and '"Answer:"' in cfg.data.suffix
    ids = {name: build.compose_eval(f"model=lavida_{name}").model.path for name in ("lowres", "fim", "reason")}
    assert ids == {
        "lowres": "jacklishufan/lavida-llada-1.0-lowres",
        "fim": "jacklishufan/lavida-llada-1.0-fim",
        "reason": "hbXNov/lavida-llada-reason",
    }
    assert build.compose_eval("model=lavida_lowres").model.mm_pool is False


def test_the_prompt_digest_knows_drafts_and_rules_and_no_older_digest_changes() -> None:
    plain = {"suffix": "x"}
    same = prompt_hash(plain, 16)
    assert prompt_hash({**plain, "draft": None, "answer_rule": "whole"}, 16) == same
    others = [prompt_hash({**plain, **more}, 16) for more in ({"draft": "[GAP]"}, {"answer_rule": "final"})]
    assert len({same, *others}) == 3


def test_the_tiny_model_fills_a_gap_with_what_it_sees() -> None:
    """Chance is one in ten; without a draft the shipped model reads more than four of five glyphs."""
    model = Lavida.from_pretrained(CONF.parent / "weights" / "tiny")
    data = SynthGlyphs(split="test", n=72, density="sparse")
    asked = [s for s in (data[i] for i in range(len(data))) if s.question.startswith(("digit", "letter"))][:12]
    decode, selector, relevance = DecodeConfig(max_new_tokens=24), ShirgSelector(budget=80), LmEmbed()
    right = 0
    for sample in asked:
        found = model.infill(
            sample.load_image(),
            "[MASK:1] [GAP:2] it is",
            selector,
            question=sample.question,
            decode=decode,
            relevance=relevance,
        )
        assert found.text.endswith(" it is") and found.text.startswith(found.gaps[0]) and "<|" not in found.text
        right += found.gaps[0] in sample.answers
    assert right >= 8


@pytest.mark.real
@pytest.mark.skipif(not REAL, reason="SHIRG_REAL_SAMPLES names no such folder")
def test_a_real_picture_and_two_gaps(eval_here: Eval) -> None:
    """Random weights at true geometry: what the gaps get means nothing, but where it stands does."""
    root = next(path.parent for path in sorted(Path(str(REAL)).glob("*/metadata.jsonl")))
    template = "The page says [MASK:4], and below it [GAP:6]."
    common = ("model=small", "data=folder", f"data.root={root}", "data.limit=1", "selector=pooled", DECODE)
    (row,) = rows_of(eval_here(*common, f"data.draft='{template}'", "decode.max_new_tokens=96"))
    text = str(row["text"])
    assert text.startswith("The page says ") and ", and below it " in text and text.endswith(".")
    assert len(row["gaps"]) == 2 and "<|" not in text and int(row["n_visual"]) > 196
