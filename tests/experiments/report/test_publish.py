"""The files that `experiments.report` writes: LaTeX, JSON, and everything again from the jobs' files alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.analysis.columns import Cell
from experiments.analysis.table import collect, read_table, records
from experiments.report.__main__ import main
from experiments.report.latex import latex, latex_cell, latex_text
from experiments.report.publish import publish, refresh_report

Eval = Callable[..., Path]


def test_json_has_what_the_rows_have(study: Path) -> None:
    assert json.loads((study / "table.json").read_text()) == {"rows": records(read_table(study))}


def test_latex_has_every_row_and_no_bare_special(study: Path) -> None:
    rows = [row for row in collect(study) if row["status"] == "ok"]
    text = (study / "table.tex").read_text()
    assert text == latex(records(read_table(study)))
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert body.count(r"\\") == len(rows) == 6
    assert len({line.count("&") - line.count(r"\&") for line in body.strip().splitlines()}) == 1
    caption = text.split(r"\caption{")[1]
    assert caption.startswith(r"synth\_glyphs, n = 24 of 1536. Scores (exact\_match) in \%"), caption
    assert "/" not in caption and "eval\\_" not in caption, "neither a path nor the name of a folder"
    assert "of full" not in caption and "(n x): n times the tokens of pooled." in caption
    assert r"\textbf{" in body and r"{\scriptsize[" in body
    assert not re.search(r"(?<!\\)[%#_]", body)
    assert latex_text(r"a_b & 50 % \input{x} $~^<>|") == (
        r"a\_b \& 50 \% \textbackslash{}input\{x\} \$\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"
        r"\textbar{}"
    )


def test_a_latex_cell_is_made_of_parts_and_not_of_the_text() -> None:
    scored = Cell("50.0", 50.0, 40.0, 60.0, spread="± 2.0", tail=" of 92.0")
    assert latex_cell(scored, bold=True) == r"\textbf{50.0} of 92.0 $\pm$ 2.0 {\scriptsize[40.0, 60.0]}"
    difference = Cell("-3.0", -3.0, -5.0, 1.0, signed=True, tail="*")
    assert latex_cell(difference, bold=False) == r"$-$3.0* {\scriptsize[$-$5.0, +1.0]}"
    # A text that looks like a number with an interval stays a text.
    assert latex_cell(Cell("run-1 [2, 3]"), bold=False) == "run-1 [2, 3]"
    assert latex_cell(Cell(), bold=False) == "--"


def test_everything_can_be_written_again_from_the_files_alone(
    eval_here: Eval, capfd: pytest.CaptureFixture[str]
) -> None:
    study = eval_here("selector=random", "limit=5", "shots=0").parent
    eval_here("selector=norm_topk", "limit=5", "shots=0")
    publish(study)
    page, table = ((study / name).read_text() for name in ("report.html", "table.md"))
    for name in ("report.html", "table.md", "table.csv", "table.parquet"):
        (study / name).unlink()
    capfd.readouterr()
    main([str(study)])
    assert (study / "report.html").read_text() == page
    assert (study / "table.md").read_text() == table
    assert "report.html table.tex table.json figures deck.pptx" in capfd.readouterr().out


def test_overlaps_come_at_the_end_of_a_command(eval_here: Eval) -> None:
    """To compare every two systems after each job of a long sweep would take longer than the jobs."""
    for selector in ("random", "full"):
        study = eval_here(f"selector={selector}", "limit=6").parent
    for refreshed, overlapping in ((lambda: refresh_report(study), 0), (lambda: publish(study), 2)):
        refreshed()
        header = (study / "table.csv").read_text().splitlines()[0]
        assert len(re.findall(r"overlap [^,]* mean", header)) == overlapping
