"""A whole study, published: figures, LaTeX, slides, and the page in a real browser."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pptx import Presentation

from experiments.analysis.rows import Row, collect
from experiments.jobs.results import VERSION, read_rows
from experiments.report.figures import draw, frontier, training
from experiments.report.publish import escape, latex, publish
from tests.experiments.conftest import evaluator, result_of
from tests.experiments.test_seeds import plant

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PANEL = {"pareto_latency", "pareto_tokens", "differences", "ablations", "budget_curve", "latency", "memory", "tokens"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[Path]:
    """Six jobs with planted scores, one of them failed; one has memory to show, as on an accelerator."""
    few = ("limit=24", "shots=1")
    with pytest.MonkeyPatch.context() as patch:
        run = evaluator(tmp_path_factory.mktemp("published"), tiny_weights, patch)
        jobs = {
            "pooled": run("selector=pooled", *few),
            "full": run("selector=full", *few),
            "random": run("selector=random", *few),
            "shirg": run("selector=shirg", *few),
            "shirg 40": run("selector=shirg", "budget=40", *few),
            "shirg flipped": run("selector=shirg", "ablation=sign_flip", *few),
        }
        run("selector=random", "budget=999", *few, ok=False)
        eighths = {"pooled": 3, "full": 8, "random": 2, "shirg": 7, "shirg 40": 6, "shirg flipped": 1}
        for name, job in jobs.items():
            # Of the samples that pooled answers right, shirg breaks the first of every eight.
            plant(job, lambda i, name=name: i % 8 < eighths[name] and not (name == "shirg" and i % 8 == 0))
        result = result_of(jobs["shirg"])
        result["times"]["peak_memory_mib"] = 12.5
        (jobs["shirg"] / "result.json").write_text(json.dumps(result))
        publish(jobs["pooled"].parent, files=True)
        yield jobs["pooled"].parent


def test_every_figure_is_there_in_both_formats_at_paper_width(study: Path) -> None:
    for kind in ("svg", "png"):
        assert {path.stem for path in (study / "figures").glob(f"*.{kind}")} == PANEL
    for path in (study / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 5.5 * 300
    page = (study / "report.html").read_text()
    assert all(f'id="figure-{name}"' in page for name in PANEL)
    drawn = (study / "figures" / "latency.svg").read_text()
    assert re.search(r">shirg 40</", drawn), "text stays text"
    assert "#1b1f24" in drawn and "var(--ink)" not in drawn
    assert "#1b1f24" not in page.split("<main>")[1] and "var(--ink)" in page.split("<main>")[1]


def test_figures_are_the_same_bytes_every_time(study: Path) -> None:
    for one in draw(study, collect(study)):
        assert one.svg == (study / "figures" / f"{one.name}.svg").read_text(), one.name


def test_the_frontier_is_what_nobody_beats_on_both() -> None:
    points = [(1.0, 20.0), (2.0, 50.0), (2.0, 60.0), (3.0, 55.0), (4.0, 90.0), (9.0, 90.0)]
    assert frontier(points) == [(1.0, 20.0), (2.0, 60.0), (4.0, 90.0)]


def test_json_has_what_the_rows_have(study: Path) -> None:
    assert json.loads((study / "table.json").read_text()) == {"rows": collect(study)}


def test_latex_has_every_row_and_no_bare_special(study: Path) -> None:
    rows = collect(study)
    text = (study / "table.tex").read_text()
    assert text == latex(rows)
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert body.count(r"\\") == len(rows) == 7
    assert len({line.count("&") - line.count(r"\&") for line in body.strip().splitlines()}) == 1
    assert r"\textbf{" in body and r"{\scriptsize[" in body
    assert not re.search(r"(?<!\\)[%#_]", body)
    assert escape(r"a_b & 50 % \input{x} $~^<>|") == (
        r"a\_b \& 50 \% \textbackslash{}input\{x\} \$\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"
        r"\textbar{}"
    )


def test_the_deck_has_the_nine_slides_filled_from_the_study(study: Path) -> None:
    slides = list(Presentation(study / "deck.pptx").slides)
    text = ["\n".join(s.text_frame.text for s in slide.shapes if s.has_text_frame) for slide in slides]
    titles = [slide.shapes.title.text_frame.text for slide in slides]
    assert len(slides) == 9 and titles[0] == "Chosen once, read in every step" and titles[6] == "Ablations"
    rows = {row["job"]: row for row in collect(study)}
    full = next(row for row in rows.values() if row["selector"] == "full")
    delta = [row["delta fine vs pooled mean"] for row in rows.values() if row["selector"] == "full"][0]
    assert f"fine {100 * delta:+.1f} [" in text[1]
    assert f"{full['visual tokens mean'] / 88:.1f} times the tokens" in text[1]
    assert "similarity 0.65" in text[3]
    answers = answered(study)
    assert f"{counts(answers, 'pooled', 'shirg')['fixed']} answers fixed" in text[7]
    assert f"{counts(answers, 'pooled', 'shirg')['broken']} broken of 24" in text[7]
    table = next(shape.table for shape in slides[4].shapes if shape.has_table)
    assert len(table.rows) == 7, "six finished rows and a heading"
    for slide in slides:
        graphics = [s for s in slide.shapes if s.has_table or s.shape_type == 13 or s.shape_type == 1]
        assert graphics, slide.shapes.title.text_frame.text
        for shape in slide.shapes:
            assert shape.left >= 0 and shape.left + shape.width <= 12192000 + 9525


def answered(study: Path) -> dict[str, dict[str, bool]]:
    """Which samples each system answered right, straight from its file."""
    rows = {row["job"]: row for row in collect(study) if row["status"] == "ok"}
    return {
        f"{row['selector']} {row['budget']} {row['ablation']}": {
            sample["id"]: sample["scores"]["exact_match"] >= 0.5
            for sample in read_rows(study / job / "samples.parquet")
        }
        for job, row in rows.items()
    }


def counts(answers: dict[str, dict[str, bool]], first: str, second: str) -> dict[str, int]:
    names = {"pooled": "pooled  none", "shirg": "shirg base (80) none"}
    pairs = [(right, answers[names[second]][i]) for i, right in answers[names[first]].items()]
    return {
        "all": len(pairs),
        "wrong": sum(not b for _, b in pairs),
        "fixed": sum(b and not a for a, b in pairs),
        "broken": sum(a and not b for a, b in pairs),
        "both right": sum(a and b for a, b in pairs),
        "both wrong": sum(not a and not b for a, b in pairs),
    }


DRIVER = """
(async () => {
  const seen = {}, text = (node) => node.textContent.trim(), all = (css) => [...document.querySelectorAll(css)];
  const rows = () => all("#table tbody tr").filter((row) => !row.classList.contains("hidden"));
  const names = () => rows().map((row) => `${text(row.cells[0])} ${text(row.cells[1])}`.trim());
  const click = (css) => document.querySelector(css).click();
  const type = (css, words) => {
    const box = document.querySelector(css);
    box.value = words;
    box.dispatchEvent(new Event("input"));
  };
  seen.equal = names();
  seen.best = rows().flatMap((row) => [...row.querySelectorAll("td.best")]).length;
  click("#equal");
  seen.all = names();
  for (const order of ["ascending", "descending", "restored"]) {
    click('th[data-title="visual tokens"] button');
    seen[order] = names();
  }
  click('th[data-title="fine vs pooled"] button');
  seen.gain = names()[0];
  type("#filter", "SHIRG 40");
  seen.filtered = names();
  seen.count = text(document.querySelector("#count"));
  type("#filter", "");
  seen.chips = Object.fromEntries(all(".chip").map((c) => [c.dataset.verdict, Number(text(c).split(" ").at(-1))]));
  click('.chip[data-verdict="broken"]');
  const look = (cell) => cell.firstElementChild?.className ?? "";
  seen.broken = all("#browser tbody tr").map((row) => [...row.cells].map(look));
  seen.systems = all("#second option").map(text);
  click("#table .copy");
  await new Promise((done) => setTimeout(done, 300));
  seen.copied = text(document.querySelector("#table .copy"));
  console.error("planted");
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
})();
"""


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's document after its scripts ran, and what they said on the console."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --no-first-run"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--virtual-time-budget=5000"]
    command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_the_page_works_in_a_browser_from_disk(study: Path, tmp_path: Path) -> None:
    page = study / "report.html"
    document, said = browse(page, tmp_path / "profile")
    assert said == [] and 'class="scripted"' in document
    # Our own driver is no part of the page, so its policy has to go for it to run.
    driven = re.sub(r"<meta http-equiv=[^>]+>", "", page.read_text()).replace(
        "</body>", f"<script>{DRIVER}</script></body>"
    )
    (tmp_path / "driven.html").write_text(driven)
    document, said = browse(tmp_path / "driven.html", tmp_path / "profile")
    assert len(said) == 1 and "planted" in said[0], "an error on the console would be seen"
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, flags=re.DOTALL)
    assert found is not None
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert seen["equal"] == ["pooled", "random base (80)", "random 999", "shirg base (80)", "shirg base (80)"]
    assert sorted(seen["all"]) == sorted([*seen["equal"], "full", "shirg 40"])
    tokens = {row["selector"] + str(row["budget"]): row.get("visual tokens mean") for row in collect(study)}
    order = [tokens[name.replace(" ", "", 1)] for name in seen["ascending"]]
    assert order[:-1] == sorted(order[:-1]) and order[-1] is None
    order = [tokens[name.replace(" ", "", 1)] for name in seen["descending"]]
    assert order[:-1] == sorted(order[:-1], reverse=True) and order[-1] is None, "no value: last both ways"
    assert seen["restored"] == seen["all"]
    assert seen["gain"] == "full"
    assert seen["filtered"] == ["shirg 40"] and seen["count"] == "1 of 7 rows"
    assert seen["best"] > 0
    wanted = counts(answered(study), "pooled", "shirg")
    assert seen["chips"] == wanted and wanted["broken"] > 0 < wanted["fixed"]
    assert len(seen["broken"]) == wanted["broken"]
    assert all(cells[2:4] == ["answer right", "answer wrong"] for cells in seen["broken"])
    assert len(seen["systems"]) == 6
    assert seen["copied"] in ("copied", "selected")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_a_question_with_a_script_in_it_runs_nothing(
    eval_here: Callable[..., Path], picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    nasty = (
        "<script>document.title = 'taken'; console.error('ran')</script><img src=x onerror=\"console.error('ran')\">"
    )
    folder = picture_folder("pictures", [nasty], answers=[nasty])
    study = eval_here("data=folder", f"data.root={folder}", "selector=pooled").parent
    document, said = browse(study / "report.html", tmp_path / "profile")
    assert said == [] and "<title>default - SHIRG study</title>" in document
    assert document.count("&lt;script&gt;document.title") >= 3, "the heading, the answer, the browser of samples"


def test_a_study_of_trainings_alone_shows_their_curves(tmp_path: Path) -> None:
    assert publish(tmp_path / "nothing") == []
    for selector, rows in (("pooled", "10,2.5,0.1\n20,1.5,\n"), ("shirg", "10,2.0,0.2\n20,1.0,0.5\n")):
        job = tmp_path / f"train_selector-{selector}"
        job.mkdir()
        record = {"version": VERSION, "verb": "train", "status": "running", "choices": {"selector": selector}}
        (job / "result.json").write_text(json.dumps(record))
        (job / "metrics.csv").write_text(f"step,loss,accuracy\n{rows}")
    drawn = training(tmp_path)
    assert drawn is not None
    loss, accuracy = drawn.figure.axes
    assert (loss.get_title(loc="left"), accuracy.get_title(loc="left")) == ("loss", "accuracy")
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[10, 2.5], [20, 1.5]], [[10, 2.0], [20, 1.0]]]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[10, 0.1]], [[10, 0.2], [20, 0.5]]]
    assert publish(tmp_path) == [tmp_path / "report.html"]
    page = (tmp_path / "report.html").read_text()
    assert 'id="figure-training"' in page and ">selector-shirg</text>" in page and '<section id="results"' not in page


def test_a_workspace_is_made_without_the_network(study: Path) -> None:
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    from experiments.report.dashboard import workspace

    rows: list[Row] = collect(study)
    made = workspace(study.name, rows, "somebody")
    assert isinstance(made, workspaces.Workspace)
    assert [section.name for section in made.sections][:2] == ["Scores", "Quality against cost"]
    wire = made._to_model().spec.model_dump_json()
    for metric in ("quality.subsets.fine sparse.mean", "times.ms_per_sample.select", "tokens.visual.mean"):
        assert metric in wire
    assert f'"{study.name}"' in wire, "only this study's runs"
