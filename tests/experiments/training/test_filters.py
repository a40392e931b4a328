"""Training on conversations, folders and mixtures: examples without room for an answer are dropped and counted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lavida_adapter import Lavida
from lavida_adapter.prompt import prompt_ids
from tests.data import official
from tests.experiments.conftest import Here, result_of

LONG = "why " * 1500
"""More than the 4096 positions of the model's context, in a tokenizer of bytes."""


def llava(folder: Path, questions: list[str]) -> list[str]:
    """Writes a dataset; returns the overrides that train on it."""
    folder.mkdir()
    (folder / "images").mkdir()
    entries: list[dict[str, Any]] = []
    for i, question in enumerate(questions):
        Image.effect_noise((60, 40), 60).convert("RGB").save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "it is"}]
        entries.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "talks.json").write_text(json.dumps(entries))
    return ["data=llava", f"data.json={folder / 'talks.json'}", f"data.images={folder / 'images'}"]


WORDS = ["selector=shirg", "optim.steps=2", "batch_size=2", "study=s", "objective.answer_tokens=null"]


def test_a_cut_answer_is_learned_and_a_lost_one_is_counted(
    train_here: Here, tiny_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prompts around the last place that leaves room for one token of the answer, behind 80 tokens of the picture."""
    model = Lavida.from_pretrained(tiny_weights)
    template = len(prompt_ids(model.tokenizer, "w", model.config, training=True)) - 2
    room = model.config.tokenizer_model_max_length - 80 - template
    questions = ["w" * length for length in (4, room - 1, room, room + 100)]
    job = train_here(*WORDS, "optim.steps=1", *llava(tmp_path / "data", questions))
    printed = capfd.readouterr().out
    assert "talks train: 2 examples; dropped 2 whose prompt leaves no room for the answer" in printed
    (data,) = result_of(job)["data"].values()
    assert re.fullmatch("[0-9a-f]{16}", data.pop("content"))
    assert data == {
        "name": "talks",
        "split": "train",
        "n": 2,
        "dropped": {"whose prompt leaves no room for the answer": 2},
    }


def test_a_benchmark_s_long_prompts_are_dropped_before_they_stop_a_training(
    train_here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step has all four examples; scores from a file, which know their pictures alone, change nothing."""
    monkeypatch.setattr(official, "question", lambda i: LONG if i == 2 else f"What is {i}?")
    read = official.write("docvqa", "disk", tmp_path / "pages", "train", 4)
    save_file({f"{100 + i}": torch.arange(320.0) for i in range(4)}, tmp_path / "scores.safetensors")
    external = ["relevance=external", f"relevance.path={tmp_path / 'scores.safetensors'}"]
    for words in ([], external):
        job = train_here(*WORDS, "batch_size=4", *read, *words)
        printed = capfd.readouterr().out
        assert "docvqa train: 3 examples; dropped 1 whose prompt leaves no room for the answer" in printed
        assert result_of(job)["data"]["data"]["n"] == 3


def test_nothing_to_learn_from_is_one_sentence(
    train_here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = train_here(*WORDS, *llava(tmp_path / "data", [LONG, LONG]), ok=False)
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "talks: none of its 2 examples can be learned from: dropped 2 whose prompt leaves no room" in error
    assert not job.exists(), "what was refused before it began leaves no row"


def test_a_mixture_is_trained_on(train_here: Here, picture_folder: Any) -> None:
    folder = picture_folder("own", ["how many?"] * 3)
    job = train_here(*WORDS, "data=mixture", f"data.parts.own.root={folder}", "data.weights.own=2")
    data = result_of(job)["data"]
    assert {name: part["n"] for name, part in data.items()} == {"glyphs": 1_000_000, "own": 3}
