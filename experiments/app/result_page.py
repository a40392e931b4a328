"""The answers as HTML: a card for each selector, a table that compares them, and the command that repeats it.

The template escapes every text; token_layer.js switches views, follows the pointer and steps through the denoising.
"""

import json
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from experiments.app.picture_question import PictureQuestion
from experiments.app.side_by_side import SelectorAnswer, SharedTokens, SideBySide, answer_question, compare_kept
from experiments.app.token_layer import PictureView, picture_views, plain_view, token_rows
from experiments.data.image_io import read_picture
from experiments.errors import sentence_of
from experiments.viz.examples import printable

HERE = Path(__file__).parent
VIEWS = {
    "kept": "Kept",
    "scores": "Scores",
    "scaffold": "Scaffold",
    "all": "Kept by all",
    "only": "Only this one",
    "picture": "Picture",
}
"""Names of the views and what their switch says."""
STAGES = ("views", "tower", "relevance", "select", "project", "prefill", "cache", "denoise")
SOURCES = ("kept", "scaffold", "summary", "merged", "newline")
EMPTY = "\u2013"
MOST_LETTERS = 400


@cache
def template() -> Template:
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("result.html")


def answer_as_html(question: PictureQuestion, base: Sequence[str], place: Path) -> str:
    """The answers to a question, or the sentence that says why there are none."""
    try:
        return render_result(answer_question(question, base, place))
    except Exception as error:
        return _problem(error)


def preview(path: Path) -> str:
    """A picture that was chosen, or the sentence that says why it cannot be read."""
    try:
        source = plain_view(read_picture(path.read_bytes(), path.name), ())
    except Exception as error:
        return _problem(error)
    return Markup('<div class="preview"><img src="{}" alt="The chosen picture"></div>').format(source)


def _problem(error: Exception) -> str:
    if (sentence := sentence_of(error)) is not None:
        return render_error(sentence)
    traceback.print_exception(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return render_error(f"{type(error).__name__}: {lines[0]} (not foreseen; the terminal shows where it comes from)")


def render_result(result: SideBySide) -> str:
    """The whole answer as HTML."""
    shared = compare_kept(result.answers)
    steps = max(answer.row["n_steps"] for answer in result.answers)
    first = result.answers[0]
    return template().render(
        cards=[_card(answer, result, shared) for answer in result.answers],
        columns=2 if len(result.answers) in (2, 4) else len(result.answers),
        views=VIEWS,
        plain=plain_view(result.image, result.boxes),
        size=result.image.size,
        steps=steps,
        shared=shared.sentence,
        names=[answer.selector for answer in result.answers],
        tables={"Tokens": token_lines(result.answers, shared), "Milliseconds": time_lines(result.answers)},
        command=result.command,
        question=printable(" ".join(first.row["question"].split()), MOST_LETTERS),
        right=None if first.is_right is None else ", ".join(first.row["answers"]),
        untrained=not first.is_trained,
    )


def render_error(sentence: str) -> str:
    """A sentence that says what is wrong."""
    return Markup('<div class="result"><p class="problem" role="alert">{}</p></div>').format(sentence)


def _card(answer: SelectorAnswer, result: SideBySide, shared: SharedTokens) -> dict[str, Any]:
    compared = {}
    if answer.selector in shared.alone and len(shared.alone) > 1:
        compared = {"all": shared.everywhere, "only": shared.alone[answer.selector]}
    views = picture_views(result.image, answer.selection, answer.geometry, result.boxes, compared)
    if not compared:
        views |= dict.fromkeys(("all", "only"), PictureView("not compared with the others", None))
    places = answer.geometry(result.image.size)
    return {
        "name": answer.selector,
        "answer": printable(answer.row["prediction"], MOST_LETTERS),
        "right": answer.is_right,
        "views": {**views, "picture": PictureView("the picture; green: where the answer is", None)},
        "tokens": json.dumps(token_rows(answer.selection, places), separators=(",", ":")),
        "count": sum(answer.row["sources"].values()),
        "slots": answer.slots,
        "steps": answer.row["n_steps"],
    }


Lines = list[tuple[str, list[str]]]
"""Lines of a table: what it is, indented where it is a part of the line above, and a text for each selector."""


def token_lines(answers: Sequence[SelectorAnswer], shared: SharedTokens) -> Lines:
    """What each selector keeps, in numbers."""
    return _filled(
        [
            ("vision tokens", [str(answer.row["n_visual"]) for answer in answers]),
            *((f"  {source}", [str(a.row["sources"].get(source, 0) or EMPTY) for a in answers]) for source in SOURCES),
            ("tokens of the prompt", [str(answer.row["n_prefix"]) for answer in answers]),
            ("kept by this one alone", [_only(answer.selector, shared) for answer in answers]),
            ("kept of the green boxes", [_share(answer.retention) for answer in answers]),
            ("regions with a kept token", [_share(answer.row.get("coverage")) for answer in answers]),
        ]
    )


def time_lines(answers: Sequence[SelectorAnswer]) -> Lines:
    """Milliseconds by stage."""
    return _filled(
        [
            ("in all", [f"{sum(answer.ms.values()):.1f}" for answer in answers]),
            *((f"  {stage}", [_ms(answer.ms.get(stage)) for answer in answers]) for stage in STAGES),
            ("denoising steps", [str(answer.row["n_steps"]) for answer in answers]),
        ]
    )


def _filled(lines: Lines) -> Lines:
    """Without the lines that have no value at all."""
    return [(name, texts) for name, texts in lines if set(texts) != {EMPTY}]


def _only(selector: str, shared: SharedTokens) -> str:
    return str(len(shared.alone[selector])) if selector in shared.alone and len(shared.alone) > 1 else EMPTY


def _share(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.1f}"
