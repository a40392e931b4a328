"""The page: self-contained, escaped, complete, and working in a real browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pptx import Presentation

from experiments.analysis.system_names import labels
from experiments.analysis.table import collect
from experiments.report.publish import publish, refresh_report
from tests.experiments.conftest import result_of
from tests.experiments.report.answers import answered, counts

Eval = Callable[..., Path]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = '<script>alert("x")</script> & "quotes" | `pipes` {{ 7 * 7 }} $x_1 \\input{y}\x07'


def test_texts_of_a_dataset_are_never_markup(eval_here: Eval, picture_folder: Callable[..., Path]) -> None:
    folder = picture_folder("p|<b>pictures", [NASTY, "plain"], answers=["<img src=x onerror=alert(1)>", "</script>"])
    for selector in ("pooled", "shirg"):
        study = eval_here(
            f"data.root='{folder}'", "data=folder", "data.name='<i>name</i>'", f"selector={selector}"
        ).parent
    publish(study, files=True)
    page = (study / "report.html").read_text()
    assert page.count("<script") == 2 == page.count("</script>"), "the data and the code, both ours"
    assert "onerror=alert(1)>" not in page.replace("&gt;", "")
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &#34;quotes&#34;" in page
    assert "{{ 7 * 7 }}" in page
    assert "<i>name" not in page and "&lt;i&gt;name&lt;/i&gt;" in page
    stored = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert stored is not None and NASTY in [sample["question"] for sample in json.loads(stored[1])["samples"]]
    lines = (study / "table.md").read_text().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:3]}) == 1
    texts = [
        shape.text_frame.text
        for slide in Presentation(study / "deck.pptx").slides
        for shape in slide.shapes
        if shape.has_text_frame
    ]
    assert any('<script>alert("x")</script>' in text for text in texts)


def test_the_page_loads_nothing_and_shows_everything(eval_here: Eval) -> None:
    for selector in ("pooled", "shirg"):
        study = eval_here(f"selector={selector}", "limit=60").parent
    refresh_report(study)
    page = (study / "report.html").read_text()
    assert not re.search(r'(?:src|href)=(?!"(?:data:|#))', page)
    assert "@import" not in page and "url(" not in page
    assert page.count('<section class="sample"') == 8
    assert page.count("data:image/jpeg;base64,") == 8 * (1 + 2 + 1), (
        "the picture, what each kept, and what one ranked by"
    )
    assert page.count('alt="scores of shirg"') == 8 and 'alt="scores of pooled' not in page
    assert "Untrained model." in page and "Synthetic data." in page
    for title in ("fine sparse", "fine dense", "guard sparse", "guard dense", "fine vs pooled", "recall", "select ms"):
        assert f">{title}</button></th>" in page
    commands = {result_of(folder.parent)["command"].replace("'", "&#39;") for folder in study.glob("*/result.json")}
    assert all(command in page for command in commands)
    script = re.search(r"<script>(.*)</script>", page, flags=re.DOTALL)
    policy = re.search(r"script-src 'sha256-([^']+)'", page)
    assert script is not None and policy is not None
    assert base64.b64decode(policy[1]) == hashlib.sha256(script[1].encode()).digest()


def test_rows_over_a_part_stand_apart_and_are_in_no_figure(eval_here: Eval) -> None:
    for few in ((), ("limit=6",)):
        for selector in ("pooled", "random"):
            study = eval_here(f"selector={selector}", "data.n=12", "shots=0", *few).parent
    publish(study)
    page = (study / "report.html").read_text()
    whole, limited = re.findall(r"<tbody>(.*?)</tbody>", page.split('<table id="table"')[1], flags=re.DOTALL)[:2]
    assert whole.count("<tr data-equal") == limited.count("<tr data-equal") == 2
    assert "Limited to a part of the samples" in limited and "Limited to" not in whole
    assert " best" not in whole + limited, "scores of random weights"
    figure = page.split('id="figure-latency"')[1].split("</div>")[0]
    assert figure.count(">random</text>") == 1


DRIVER = """
(async () => {
  const seen = {}, text = (node) => node.textContent.trim(), all = (css) => [...document.querySelectorAll(css)];
  const rows = () => all("#table tbody tr").filter((row) => !row.classList.contains("hidden"));
  const names = () => rows().map((row) => text(row.cells[0]));
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
  const chips = all("#verdicts .chip");
  seen.chips = Object.fromEntries(chips.map((c) => [c.dataset.verdict, Number(text(c).split(" ").at(-1))]));
  click('.chip[data-verdict="broken"]');
  const mark = (cell) => cell.firstElementChild?.className ?? "";
  seen.broken = all("#browser tbody tr").map((row) => [...row.cells].map(mark));
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


def open_page(page: Path, profile: Path, size: str = "1400,1000") -> tuple[str, list[str]]:
    """The page's document after its scripts ran, and what they wrote to the console."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --no-first-run"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--virtual-time-budget=5000"]
    command += [f"--window-size={size}", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_the_page_works_in_a_browser_from_disk(study: Path, tmp_path: Path) -> None:
    page = study / "report.html"
    document, console = open_page(page, tmp_path / "profile")
    assert console == [] and 'class="scripted"' in document
    # Our own driver is no part of the page, so its policy has to go for it to run.
    driven = re.sub(r"<meta http-equiv=[^>]+>", "", page.read_text()).replace(
        "</body>", f"<script>{DRIVER}</script></body>"
    )
    (tmp_path / "driven.html").write_text(driven)
    document, console = open_page(tmp_path / "driven.html", tmp_path / "profile")
    assert len(console) == 1 and "planted" in console[0], "an error on the console would be seen"
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, flags=re.DOTALL)
    assert found is not None
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert seen["equal"] == ["pooled", "random 80", "random 999", "shirg 80", "shirg sign_flip"]
    assert sorted(seen["all"]) == sorted([*seen["equal"], "full", "shirg 40"])
    rows = collect(study)
    tokens = {name: row.get("visual tokens mean") for name, row in zip(labels(rows), rows, strict=True)}
    order = [tokens[name] for name in seen["ascending"]]
    assert order[:-1] == sorted(order[:-1]) and order[-1] is None
    order = [tokens[name] for name in seen["descending"]]
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
    refresh_report(study)
    document, console = open_page(study / "report.html", tmp_path / "profile")
    assert console == [] and "<title>default: tiny on pictures, " in document
    assert document.count("&lt;script&gt;document.title") >= 3, "the heading, the answer, the browser of samples"
