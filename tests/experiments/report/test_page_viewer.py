"""The page's viewer and its shape: examples and figures enlarged, remarks at the pointer, nothing cut."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from experiments.analysis.system_names import labels
from experiments.analysis.table import collect
from tests.experiments.report.test_page import CHROMIUM, open_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")

DRIVER = """
(() => {
  const seen = {}, one = (css) => document.querySelector(css), all = (css) => [...document.querySelectorAll(css)];
  const shown = (css) => all(css).filter((node) => node.offsetParent !== null).length;
  const point = (node, kind) => node.dispatchEvent(new PointerEvent(kind, { bubbles: kind === "pointermove" }));
  const state = () => ({
    open: one("dialog").open, title: one("dialog strong").textContent, alt: one(".stage img")?.alt,
    pressed: all("dialog [aria-pressed=true]").map((node) => node.textContent),
  });
  const press = (key) => one("dialog").dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  seen.kept = [shown(".view img.kept"), shown(".view img.heat")];
  one("#layers [data-layer=heat]").click();
  seen.heat = [shown(".view img.kept"), shown(".view img.heat")];
  one("#layers [data-layer=kept]").click();

  const view = one(".view .enlarge"), plain = one(".picture img").src;
  point(view, "pointerenter");
  seen.compared = view.querySelector(".plain").src === plain;
  point(view, "pointerleave");
  seen.restored = view.querySelector(".plain") === null;

  view.click();
  seen.opened = state();
  press("ArrowRight");
  seen.next = state();
  press("ArrowLeft"); press("ArrowLeft");
  seen.last = state();
  press("ArrowDown");
  seen.scores = state();
  press("ArrowDown");
  seen.picture = [state(), one(".stage img").src === plain];
  const other = one(".names button");
  point(other, "pointerenter");
  seen.previewed = state().title;
  point(other, "pointerleave");
  seen.back = state().title;
  press("+");
  seen.zoomed = one(".stage img").style.transform;
  all("dialog button").find((button) => button.textContent === "close").click();
  seen.closed = one("dialog").open;

  const tip = one("#figure-scores .tip"), title = tip.querySelector("title").textContent;
  point(tip, "pointermove");
  seen.remark = [one(".remark").hidden, one(".remark").textContent === title, tip.querySelector("title") === null];
  point(document.body, "pointermove");
  seen.remark.push(one(".remark").hidden);
  one("#figure-scores .corner").click();
  seen.figure = [state(), all(".stage svg").length];
  one("dialog").close();

  seen.wider = document.documentElement.scrollWidth - innerWidth;
  seen.cut = one("#table").scrollWidth - one("#table").parentElement.clientWidth;
  seen.columns = all("#table thead th").filter((head) => head.offsetParent !== null).map((head) => head.textContent);
  seen.half = one("#figure-scores").offsetWidth / one(".figures").offsetWidth;
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
})();
"""


def driven(study: Path, tmp_path: Path, size: str) -> dict[str, Any]:
    """What the driver saw in a window of a size. Our own driver is no part of the page, so the page's policy goes."""
    text = re.sub(r"<meta http-equiv=[^>]+>", "", (study / "report.html").read_text(), count=1)
    (tmp_path / "driven.html").write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"))
    document, console = open_page(tmp_path / "driven.html", tmp_path / "profile", size)
    assert console == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, flags=re.DOTALL)
    assert found is not None
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


def test_an_example_is_enlarged_and_compared(study: Path, tmp_path: Path) -> None:
    seen = driven(study, tmp_path, "1400,1000")
    rows = collect(study)
    names = [name for row, name in zip(rows, labels(rows), strict=True) if row["status"] == "ok"]
    ranked = [name for name in names if name.startswith(("random", "shirg"))]
    assert seen["kept"] == [len(names), 0]
    assert seen["heat"] == [len(names) - len(ranked), len(ranked)], "a system without scores shows its tokens, pale"
    assert seen["compared"] and seen["restored"]
    assert seen["opened"] == {
        "open": True,
        "title": names[0],
        "alt": f"tokens kept by {names[0]}",
        "pressed": ["kept tokens", names[0]],
    }
    assert seen["next"]["title"] == names[1]
    assert seen["last"]["title"] == names[-1], "the arrows go round"
    assert seen["scores"]["alt"] == f"scores of {names[-1]}"
    assert seen["picture"] == [seen["last"] | {"alt": "the picture", "pressed": ["picture", names[-1]]}, True]
    assert (seen["previewed"], seen["back"]) == (names[0], names[-1])
    assert "scale(1.5)" in seen["zoomed"] and seen["closed"] is False


def test_a_figure_has_remarks_and_is_enlarged(study: Path, tmp_path: Path) -> None:
    seen = driven(study, tmp_path, "1400,1000")
    assert seen["remark"] == [False, True, True, True]
    assert seen["figure"][0]["title"] == "Scores by kind of question" and seen["figure"][1] == 1


@pytest.mark.parametrize(("size", "left_out", "share"), [("1400,1000", set(), 0.45), ("700,1000", {"command"}, 0.95)])
def test_nothing_is_cut(study: Path, tmp_path: Path, size: str, left_out: set[str], share: float) -> None:
    seen = driven(study, tmp_path, size)
    assert seen["wider"] <= 0 and seen["cut"] <= 0
    wanted = {
        "system",
        "fine sparse",
        "fine dense",
        "guard sparse",
        "guard dense",
        "fine vs pooled",
        "total ms",
        "command",
    }
    assert wanted - left_out <= set(seen["columns"]) and not left_out & set(seen["columns"])
    assert seen["half"] > share
