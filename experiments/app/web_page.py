"""The page: its controls, and which of them change what. Everything that is computed is computed elsewhere.

Gradio is an extra; only this module imports it.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from experiments.app.picture_question import (
    DEFAULT_DECODE,
    DEFAULT_RELEVANCE,
    DEFAULT_SELECTORS,
    LONGEST_ANSWER,
    MOST_SELECTORS,
    PictureQuestion,
)
from experiments.app.result_page import HERE, answer_as_html, preview
from experiments.app.shipped_pictures import (
    ShippedPicture,
    models_offered,
    options,
    shipped_pictures,
    suffix_for,
)
from experiments.app.side_by_side import PICTURES
from shirg import UserError

TITLE = "Which vision tokens should a diffusion VLM keep?"
INTRODUCTION = (
    "Choose a picture, ask a question, and compare what selectors keep and what the model answers. Everything runs on "
    "this machine."
)
WAITING = "<div class='result'><p class='soft'>Press Answer. The first answer also loads the model.</p></div>"
FORM = tuple("text answer model selectors budget relevance decode longest suffix adapter".split())
"""Fields of a `PictureQuestion` that have a control, in the order in which Gradio gives their values."""
LARGEST_FILE = "64mb"
_answering = threading.Lock()
"""Held while the model answers: there is one model, and Python must not end in the middle of its work."""


@dataclass(frozen=True)
class PagePicture:
    """The picture that is on the page, and what is known about it."""

    path: Path
    shipped: ShippedPicture | None = None

    def ask(self, values: Sequence[Any]) -> PictureQuestion:
        """The question that the form's values make; where the answer is, is known for the sample's own question."""
        given = dict(zip(FORM, values, strict=True))
        given |= {"selectors": tuple(given["selectors"] or ()), "model": str(given["model"] or "")}
        given |= {name: int(given[name] or 0) for name in ("budget", "longest")}
        known = self.shipped is not None and given["text"] == self.shipped.question
        boxes = self.shipped.boxes if self.shipped is not None and known else ()
        return PictureQuestion(picture=self.path, boxes=boxes, **given)


def draw_controls(first: ShippedPicture, model: str, models: Sequence[str] | None) -> dict[str, Any]:
    """Draws the controls of `FORM` and the button "run"; returns them by name."""
    made: dict[str, Any] = {}
    made["text"] = gr.Textbox(first.question, label="Question", lines=1, max_lines=4, elem_id="question")
    made["run"] = gr.Button("Answer", variant="primary", elem_id="answer")
    made["selectors"] = gr.Dropdown(
        options("selector"),
        value=list(DEFAULT_SELECTORS),
        multiselect=True,
        max_choices=MOST_SELECTORS,
        label=f"Selectors (up to {MOST_SELECTORS})",
        elem_id="selectors",
    )
    made["budget"] = gr.Slider(
        5,
        400,
        value=100,
        step=5,
        label="Budget, % of base",
        info="100 % is 80 tokens in the tiny model, 980 in the published one.",
        elem_id="budget",
    )
    made["model"] = gr.Dropdown(
        list(models or models_offered()),
        value=model,
        allow_custom_value=models is None,
        label="Model",
        info=None if models else "Or type the folder or the hub id of a checkpoint.",
        elem_id="model",
    )
    with gr.Accordion("More", open=False):
        made["adapter"] = gr.Checkbox(label="Adapter that was trained for the selector (tiny models)")
        made["relevance"] = gr.Dropdown(options("relevance"), value=DEFAULT_RELEVANCE, label="Relevance")
        made["decode"] = gr.Dropdown(options("decode"), value=DEFAULT_DECODE, label="Decoding")
        made["longest"] = gr.Slider(1, 256, value=first.longest, step=1, label="Longest answer, tokens")
        made["suffix"] = gr.Textbox(suffix_for(model), label="Behind the question", lines=2)
        made["answer"] = gr.Textbox(first.answer, label="Right answer, if it is known")
    made["model"].change(suffix_for, made["model"], made["suffix"], api_visibility="private")
    return made


def build_page(base: Sequence[str], model: str, models: Sequence[str] | None) -> gr.Blocks:
    """The page.

    Args:
        base: overrides of eval.py that hold for every question.
        model: the one that is chosen first.
        models: the only ones that may be chosen, for a page that others can reach; None for any.
    """
    shipped = shipped_pictures()
    paths = [store_shipped(picture) for picture in shipped]
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(86_400, 86_400)) as page:
        gr.HTML(f"<div class='head'><h1>{TITLE}</h1><p>{INTRODUCTION}</p></div>")
        picture = gr.State(PagePicture(paths[0], shipped[0]))
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                shown = gr.HTML(preview(paths[0]), elem_id="preview")
                gallery = gr.Gallery(
                    [(each.image, each.caption) for each in shipped],
                    columns=4,
                    height="auto",
                    label="Samples",
                    show_label=False,
                    allow_preview=False,
                    object_fit="contain",
                    interactive=False,
                    buttons=[],
                    elem_id="samples",
                )
                upload = gr.UploadButton("Upload a picture", size="sm", elem_id="upload")
                made = draw_controls(shipped[0], model, models)
            with gr.Column(scale=3, min_width=480):
                result = gr.HTML(WAITING, elem_id="result")

        def choose(event: gr.SelectData) -> list[Any]:
            chosen = shipped[event.index]
            kept = PagePicture(paths[event.index], chosen)
            return [kept, preview(kept.path), chosen.question, chosen.answer, chosen.longest]

        def take(file: str) -> list[Any]:
            return [PagePicture(Path(file)), preview(Path(file)), "", "", LONGEST_ANSWER]

        def answer(where: PagePicture, *values: Any) -> str:
            asked = where.ask(values)
            if models is not None and asked.model not in models:
                asked = replace(asked, model="")
            with _answering:
                return answer_as_html(asked, base, PICTURES)

        about = [picture, shown, made["text"], made["answer"], made["longest"]]
        gallery.select(choose, None, about, api_visibility="private")
        upload.upload(take, upload, about, api_visibility="private")
        gr.on(
            [made["run"].click, made["text"].submit],
            answer,
            [picture, *(made[name] for name in FORM)],
            result,
            api_visibility="private",
            show_progress="minimal",
            scroll_to_output=True,
        )
    return page


def store_shipped(picture: ShippedPicture) -> Path:
    """The sample's picture as a file, so that it takes the way of an uploaded one."""
    path = PICTURES / "samples" / f"{picture.caption}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.image.save(path)
    return path


def serve(base: Sequence[str], model: str, models: Sequence[str] | None, port: int | None, browser: bool) -> None:
    """Opens the page on this machine, in a browser too where that is asked for, and stays until it is interrupted.

    Args:
        base, model, models: as for `build_page`.
        port: None for the first free one from 7860.

    Raises:
        UserError: the port is taken.
    """
    page = build_page(base, model, models)
    # Fonts of the system: a theme's own would be fetched, or be shipped for nothing.
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    theme.set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")
    try:
        _, url, _ = page.launch(
            share=False,
            inbrowser=browser,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            enable_monitoring=False,
            show_error=True,
            max_file_size=LARGEST_FILE,
            theme=theme,
            css_paths=HERE / "app.css",
            head=f"<script>{(HERE / 'token_layer.js').read_text()}</script>",
        )
    except OSError as error:
        raise UserError(f"port={port}: the page cannot be opened there ({error}); give another, or none") from error
    print(f"page  {url}  (Ctrl+C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        with _answering:
            pass
