"""The page in a real browser, without a network: load, answer, point, step, switch, upload, and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from experiments.app.__main__ import main, split
from experiments.schema import CONF
from tests.experiments.app.browser import CHROMIUM, Browser


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("tiny", "tiny: give key=value"),
        ("port=0", "port=0: give a number from 1 to 65535"),
        ("browser=no", "browser=no: give true or false"),
        ("selector=shirg", "selector=shirg: this is chosen on the page"),
        ("budget=3", "budget=3: this is chosen on the page"),
    ],
)
def test_words_that_are_refused(word: str, sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        split([word])
    assert stop.value.code == 1 and sentence in capfd.readouterr().err
    assert split(["model=small", "port=80", "device=cpu"]) == ({"model": "small", "port": "80"}, ["device=cpu"])


def test_without_gradio_the_command_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.app.__main__.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 1 and "the page needs Gradio: `make app`" in capfd.readouterr().err


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page that was started as a user would, in a folder of its own."""
    pytest.importorskip("gradio")
    if CHROMIUM is None:
        pytest.skip("needs chromium or google-chrome")
    here = tmp_path_factory.mktemp("here")
    command = [sys.executable, "-m", "experiments.app", "browser=false", "threads=1", "device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent), "GRADIO_TEMP_DIR": str(here / "uploads")}
    with subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        found = re.match(r"page  (http://127\.0\.0\.1:\d+/)  \(Ctrl\+C ends it\)", said)
        assert found is not None, said
        yield found[1]
        server.terminate()
        assert server.wait(30) == 128 + signal.SIGTERM


QUESTION = "document.querySelector('#question :is(textarea, input)')?.value"
SHIRG = ".card[data-name=shirg]"


def texts(browser: Browser, place: str) -> list[str]:
    found: list[str] = browser.evaluate(f"[...document.querySelectorAll('{place}')].map(e => e.textContent.trim())")
    return found


def write(browser: Browser, place: str, text: str) -> None:
    """Types into a field of the form, as a person would: its old text is replaced."""
    field = f"document.querySelector('{place} :is(input[type=number], input:not([type=range]), textarea)')"
    browser.evaluate(f"{field}.focus(), {field}.select()")
    browser.send("Input.insertText", text=text)


def press(browser: Browser) -> None:
    browser.evaluate("document.querySelector('#answer').click()")


def answer(browser: Browser, titles: str) -> None:
    """Presses the button and waits for cards with these titles."""
    press(browser)
    found = "[...document.querySelectorAll('#result h3')].map(e => e.textContent).join('; ')"
    browser.wait(f"!document.querySelector('#result .problem') && {found} === {json.dumps(titles)}")


def refused(browser: Browser, sentence: str, place: str = "#result") -> None:
    """Waits until the page says what is wrong."""
    browser.wait(f"document.querySelector('{place} .problem')?.textContent.includes({json.dumps(sentence)})")


def masked_after(browser: Browser, step: int) -> int:
    """Masks in the answer of one selector after a step of the slider."""
    browser.evaluate(
        "(range => {"
        f"range.value = {step}; range.dispatchEvent(new Event('input', {{bubbles: true}}))"
        "})(document.querySelector('.stepper input'))"
    )
    return len(texts(browser, f"{SHIRG} .slot.masked"))


def view(browser: Browser) -> str:
    """Which view the pictures show."""
    (shown,) = browser.evaluate(
        f"[...document.querySelectorAll('{SHIRG} [data-view]')].filter(e => !e.hidden).map(e => e.dataset.view)"
    )
    return str(shown)


def test_the_page_answers_in_a_browser(page: str, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        # Gradio draws its parts one by one.
        parts = ("#samples img", "#answer", "#question :is(textarea, input)", "#selectors .token", "#model input")
        browser.wait(f"{json.dumps(parts)}.every(part => document.querySelector(part)) && {QUESTION} === 'digit green'")
        assert len(browser.evaluate("[...document.querySelectorAll('#samples img')].map(e => e.src)")) == 8
        answer(browser, "pooled 88 tokens; saint 80 tokens; shirg 80 tokens")
        assert texts(browser, ".verdict") == ["wrong", "right", "right"]

        browser.point(f"{SHIRG} .picture", 0.03, 0.03)
        browser.wait(f"document.querySelector('{SHIRG} .pointed').textContent.includes('token 64')")
        pooled, _, shirg = texts(browser, ".pointed")
        assert pooled == "merged token 16; merged token 0"
        ranked = r"token 64 \(tile 1\): \w+, score \S+, rank \d+ of 256"
        assert re.fullmatch(ranked + r"; token 0 \(global view\): \w+; scaffold token 0", shirg)
        assert browser.evaluate(f"document.querySelector('{SHIRG} .mark').style.width") == "6.25%"
        assert [masked_after(browser, step) for step in (0, 1, 2, 3)] == [3, 2, 1, 0]
        assert view(browser) == "kept"
        browser.evaluate("document.querySelector('[data-view=scores]').click()")
        assert view(browser) == "scores"
        assert texts(browser, ".caption")[0] == "no scores: this selector does not rank"

        Image.effect_noise((90, 60), 60).convert("RGB").save(tmp_path / "own.png")
        browser.give_file("input[type=file]", tmp_path / "own.png")
        browser.wait(f"{QUESTION} === ''")
        press(browser)
        refused(browser, "the question is empty")
        write(browser, "#question", "what is <b>this</b>?")
        write(browser, "#budget", "50")
        browser.key("Tab")
        browser.evaluate("document.querySelector('#selectors .token-remove').click()")
        answer(browser, "saint 40 tokens; shirg 40 tokens")
        assert texts(browser, ".asked")[0].startswith("what is <b>this</b>?")
        (command,) = texts(browser, ".command code")
        assert "data.max_new_tokens" not in command, "the sample's 3 no longer hold"
        assert command.startswith("python eval.py -m study=app_") and "'budget=1/2 base'" in command

        write(browser, "#model", "./nowhere")
        browser.key("Enter")
        browser.key("Tab")
        press(browser)
        refused(browser, "model.path=./nowhere: there are no weights there")
        (tmp_path / "notes.png").write_text("no picture")
        browser.give_file("input[type=file]", tmp_path / "notes.png")
        refused(browser, "notes.png: cannot be read as a picture", "#preview")
        assert browser.refused == [], "nothing is asked of another machine"
        assert browser.console == []
