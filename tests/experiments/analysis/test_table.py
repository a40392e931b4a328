"""The study's table: what it states about finished, limited and dead jobs, and its files."""

import csv
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from experiments.analysis.columns import columns
from experiments.analysis.memo import Memo
from experiments.analysis.study import read_study
from experiments.analysis.systems import Result
from experiments.analysis.table import (
    collect,
    legend,
    markdown,
    parts,
    read_table,
    records,
    refresh,
    to_csv,
    to_markdown,
)
from experiments.analysis.terminal_table import print_table
from experiments.errors import visible
from experiments.report.publish import publish
from shirg import UserError
from tests.experiments.planting import change_result

Eval = Callable[..., Path]


def test_the_table_has_a_row_for_every_job_and_states_its_limits(eval_here: Eval) -> None:
    eval_here("selector=pooled", "limit=12")
    eval_here("selector=random", "limit=12", "budget=999", ok=False)
    job = eval_here("selector=full", "data.n=24")
    study = job.parent
    rows = {r["selector"]: r for r in collect(study)}
    assert rows["full"]["visual tokens min"] == rows["full"]["visual tokens max"] == 336
    assert rows["full"]["prefix tokens mean"] - 336 == rows["pooled"]["prefix tokens mean"] - 88 > 0
    assert rows["full"]["note"] == "untrained model"
    assert rows["pooled"]["note"] == "untrained model; limited to 12 samples"
    assert rows["random"]["status"] == "failed" and "budget 999 is larger" in rows["random"]["reason"]
    text = markdown(records(refresh(study).frame))
    assert text == (study / "table.md").read_text()
    firsts = [line.split("|")[1].strip(": -") for line in text.splitlines() if line.startswith("|")]
    assert firsts == ["system", "", "full", "random", "system", "", "pooled"]
    assert next(c for c in columns(collect(study)) if c.title == "recall").texts[1] == "-"


def test_the_files_hold_what_the_data_frame_holds(eval_here: Eval) -> None:
    eval_here("selector=pooled", "limit=6")
    study = eval_here("selector=random", "limit=6", "budget=999", ok=False).parent
    frame = refresh(study).frame
    assert frame.equals(read_table(study)) and records(frame)[1]["select ms"] is None
    ragged = collect(study)
    assert [{k: v for k, v in row.items() if v is not None} for row in records(frame)] == [
        {k: v for k, v in row.items() if v is not None} for row in ragged
    ]
    flat = list(csv.DictReader((study / "table.csv").read_text().splitlines()))
    assert list(flat[0]) == list(frame.columns) == pq.read_table(study / "table.parquet").column_names
    for row, texts, stored in zip(
        records(frame), flat, pq.read_table(study / "table.parquet").to_pylist(), strict=True
    ):
        assert texts == {key: "" if value is None else str(value) for key, value in row.items()}
        assert stored == row
    assert flat[0]["version"] == "2" and float(flat[0]["select ms"]) > 0 and flat[1]["select ms"] == ""


def test_a_study_is_read_once_for_everything_that_is_published(
    eval_here: Eval, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table files, figures, page, LaTeX, slides and the terminal have the same DataFrame."""
    study = eval_here("selector=pooled", "limit=6").parent
    reads = []

    def counted(folder: Path, known: Memo) -> dict[Path, Result]:
        reads.append(folder)
        return read_study(folder, known)

    monkeypatch.setattr("experiments.analysis.table.read_study", counted)
    publish(study, files=True, show=True)
    assert reads == [study]
    assert "pooled" in capsys.readouterr().out


def test_a_job_that_died_is_not_called_running(eval_here: Eval) -> None:
    job = eval_here("selector=pooled", "limit=4")
    change_result(job, status="running")
    assert [r["status"] for r in collect(job.parent)] == ["stopped"]


def test_what_all_rows_share_is_in_the_legend_alone(eval_here: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    eval_here("selector=pooled", "limit=6", "decode.step_ratio=0.7", "data.density=[sparse,dense]")
    study = eval_here("selector=random", "limit=6", "decode.step_ratio=0.7", "data.density=[sparse,dense]").parent
    assert "changes" not in [c.title for c in columns(collect(study))]
    assert "decode.step_ratio=0.7" in markdown(collect(study)).splitlines()[-1]
    eval_here("selector=random", "limit=6")
    shown = {c.title: c.texts for c in columns(collect(study))}
    assert sum("decode.step_ratio=0.7" in cell for cell in shown["changes"]) == 2
    capsys.readouterr()
    print_table(read_table(study), study, wide=True)
    assert "data.density=[sparse,dense]" in capsys.readouterr().out, "brackets are no markup of the terminal"


def test_a_part_of_the_rows_shows_what_the_legend_does_not(eval_here: Eval) -> None:
    eval_here("selector=pooled", "data.n=12", "decode.step_ratio=0.7", "batch_size=4")
    eval_here("selector=random", "data.n=12", "batch_size=4")
    study = eval_here("selector=pooled", "data.n=12", "limit=6", "batch_size=4").parent
    rows = collect(study)
    whole, limited = (part for _, part in parts(rows))
    shown = [{c.title: c.texts for c in columns(part, rows)} for part in (whole, limited)]
    assert [text for text in shown[0]["changes"] if text] == ["decode.step_ratio=0.7"]
    assert "batch_size=4" not in str(shown) and "batch_size=4" in legend(rows)
    assert {c.title: c.texts for c in columns(whole)}.get("changes") == shown[0]["changes"]


def test_what_was_refused_before_it_began_is_no_result(eval_here: Eval) -> None:
    """A value that nothing takes leaves no folder; what a job had before stays as it was."""
    study = eval_here("selector=pooled", "limit=4").parent
    before = (study / "table.md").read_bytes()
    for word in ("selector.norm=zscor", "model.path=./weights/absent", "limit=0"):
        assert not eval_here("selector=shirg", word, ok=False).exists()
    assert [row["selector"] for row in collect(study)] == ["pooled"] and (study / "table.md").read_bytes() == before
    job = eval_here("selector=random", "limit=4", "budget=999", ok=False)
    failed = (job / "result.json").read_bytes()
    assert b"budget 999 is larger" in failed, "found with the first picture: the job had begun"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.build.check_numbers", refuse)
        eval_here("selector=random", "limit=4", "budget=999", ok=False)
    assert (job / "result.json").read_bytes() == failed


def refuse(*_: object) -> None:
    raise UserError("refused")


def test_a_cell_is_no_formula_no_line_and_no_command() -> None:
    """For a spreadsheet, a Markdown reader and a terminal."""
    cells = ["=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "\t=1", "plain", -1.5]
    rows = list(csv.reader(to_csv(pd.DataFrame({"=a": cells}, dtype=object)).splitlines()))
    texts = ["'=a", "'=cmd|' /C calc'!A0", "'+1", "'-x", "'@SUM(A1)", "'\t=1", "plain", "-1.5"]
    assert [row[0] for row in rows] == texts
    text = to_markdown(pd.DataFrame({"a\nb|c": ["x\n| y |\r<b>\x1b[2J\u2028"]}), [False])
    assert len(text.splitlines()) == 3 and "a b\\|c" in text
    assert r"x \| y \|\\x0d&lt;b>\\x1b[2J\\x2028" in text
    assert visible("\x1b]0;title\x07é图") == r"\x1b]0;title\x07é图"
