"""The page of a study of many jobs: small, and everything that it leaves out is named or one click away."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from experiments.analysis.table import collect, read_study_table
from experiments.bench import study_growth
from experiments.report import answer_browser, page
from experiments.report.publish import publish
from tests.experiments.conftest import evaluator
from tests.experiments.report.test_page import CHROMIUM, open_page

JOBS = 130

DRIVER = """
(() => {
  const seen = {}, text = (node) => node.textContent.trim(), all = (css) => [...document.querySelectorAll(css)];
  const rows = () => all("#table tbody tr"), cells = (row) => [...row.cells].map((cell) => cell.outerHTML);
  const click = (css) => document.querySelector(css).click();
  const type = (words) => {
    document.querySelector("#filter").value = words;
    document.querySelector("#filter").dispatchEvent(new Event("input"));
  };
  seen.first = rows().slice(0, 3).map(cells);
  seen.shown = rows().length;
  seen.count = text(document.querySelector("#count"));
  click("#more-rows");
  seen.more = rows().length;
  seen.hidden = document.querySelector("#more-rows").classList.contains("hidden");
  const score = document.querySelector('th[data-kind="score"]');
  score.querySelector("button").click();
  seen.scores = rows().map((row) => Number(row.cells[score.cellIndex].dataset.v));
  seen.best = all("#table td.best").length;
  type("selector.trial=129");
  seen.filtered = rows().map((row) => text(row.querySelector(".changes")));
  seen.chips = all("#verdicts .chip").map(text);
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
})();
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """Copies of two jobs, each with answers and scores of its own; some are seeds of one system."""
    with pytest.MonkeyPatch.context() as patch:
        run = evaluator(tmp_path_factory.mktemp("large"), tiny_weights, patch)
        words = ("data.n=12", "data.density=[sparse]", "shots=2", "study=real")
        templates = [run(f"selector={name}", *words) for name in ("pooled", "norm_topk")]
        large = templates[0].parent.parent / "large"
        for number in range(JOBS):
            study_growth.plant(templates, large, number)
        publish(large)
    return large


def test_the_page_is_bounded_and_says_what_it_leaves_out(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (study / "report.html").read_text()
    assert len(collect(study)) == JOBS
    body = text.split('<table id="table"')[1].split("</table>")[0]
    assert body.count("<tr data-equal") == page.MOST_ROWS < JOBS
    assert text.count("<script") == 3, "rows, answers and our code"
    assert f"Of {JOBS} systems the figures show 40" in text and f"Of {JOBS} systems these are 12" in text
    assert text.count('alt="tokens kept by') == 2 * 12
    latency = text.split('id="figure-latency"')[1].split("</div>")[0]
    assert len(re.findall(">norm_topk[^<]*</text>", latency)) == 39
    stored = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert stored is not None
    data = json.loads(stored[1])
    assert len(data["systems"]) == JOBS and len(data["samples"]) == data["of"] == 12
    for system, row in list(zip(data["systems"], collect(study), strict=True))[:5]:
        scores = [s["given"][number][1] for s, number in zip(data["samples"], system["answers"], strict=True)]
        assert sum(scores) / 12 == row["exact_match mean"]
    monkeypatch.setattr(answer_browser, "MOST_ANSWERS", 5 * JOBS)
    assert "The first 5 of 12 samples" in page.render(read_study_table(study))


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_rows_made_by_the_script_are_those_of_the_page(study: Path, tmp_path: Path) -> None:
    text = (study / "report.html").read_text()
    written = [
        re.findall(r"<td.*?</td>", row, flags=re.DOTALL)
        for row in re.findall(r"<tr data-equal.*?</tr>", text, flags=re.DOTALL)[:3]
    ]
    driven = re.sub(r"<meta http-equiv=[^>]+>", "", text, count=1).replace(
        "</body>", f"<script>{DRIVER}</script></body>"
    )
    (tmp_path / "driven.html").write_text(driven)
    document, console = open_page(tmp_path / "driven.html", tmp_path / "profile")
    assert console == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, flags=re.DOTALL)
    assert found is not None
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert [[_plain(cell) for cell in row] for row in seen["first"]] == [
        [_plain(cell) for cell in row] for row in written
    ]
    assert (seen["shown"], seen["more"], seen["hidden"]) == (100, JOBS, True)
    assert seen["count"] == f"{JOBS} of {JOBS} rows, 100 shown"
    assert seen["scores"] == sorted(seen["scores"], reverse=True) and len(set(seen["scores"])) > 3
    assert seen["best"] == 0, "scores of random weights"
    assert [words.split()[0] for words in seen["filtered"]] == ["selector.trial=129"]
    assert seen["chips"][0] == "all 12"


def _plain(cell: str) -> str:
    """A cell as both ways of making it write it: order of attributes, rounding of a bar and spaces do not count."""
    names = re.compile(r"[\w-]+=")
    tags = re.sub(r"<(\w+)([^>]*)>", lambda tag: f"<{tag[1]} {sorted(names.findall(tag[2]))}>", cell)
    return re.sub(r"\s+", "", html.unescape(tags))
