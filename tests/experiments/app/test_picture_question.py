"""A question of the page: what is refused, where it is stored, and the words that mean the same to eval.py."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from experiments import build
from experiments.app.picture_question import ANSWER_ONLY, PictureQuestion
from experiments.data.folder import Folder
from experiments.override_grammar import check_words


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "my photo.PNG"
    Image.effect_noise((40, 30), 60).save(path)
    return path


def test_it_is_stored_as_a_dataset_of_one_sample(picture: Path, tmp_path: Path) -> None:
    question = PictureQuestion(picture=picture, text="what's {this}, 5=5?\n", answer="a 'b'")
    folder = question.store(tmp_path / "stored")
    assert folder.name == question.digest and len(folder.name) == 8
    assert json.loads((folder / "metadata.jsonl").read_text())["file_name"] == "picture.png"
    (sample,) = Folder(root=folder, suffix="")
    assert (sample.question, sample.answers) == ("what's {this}, 5=5?\n", ("a 'b'",))
    assert sample.load_image().size == (40, 30)
    unknown = PictureQuestion(picture=picture, text=question.text)
    assert unknown.digest != question.digest
    assert Folder(root=unknown.store(tmp_path / "stored"))[0].answers == ("unknown",)


@pytest.mark.parametrize(
    ("changed", "values"),
    [
        ({}, {"budget": "base", "adapter": None, "model.path": "./weights/tiny", "data.max_new_tokens": 16}),
        ({"budget": 50, "selectors": ("shirg",)}, {"selector.budget": "1/2 base"}),
        ({"model": "small", "decode": "threshold"}, {"model.path": None, "decode.threshold": 0.9}),
        ({"model": "nobody/no model"}, {"model.path": "nobody/no model", "dtype": "bfloat16"}),
        ({"relevance": "none", "adapter": True}, {"relevance._target_": "lavida_adapter.relevance.NoRelevance"}),
        ({"suffix": ANSWER_ONLY}, {"data.max_new_tokens": 16}),
        ({"suffix": "\nIn 'one' word.", "longest": 3}, {"data.max_new_tokens": 3}),
    ],
)
def test_the_command_composes_to_what_was_chosen(
    picture: Path, tmp_path: Path, changed: dict[str, Any], values: dict[str, Any]
) -> None:
    question = PictureQuestion(picture=picture, text="why?", **changed)
    folder = question.store(tmp_path / "a 'folder'")
    python, script, *given = shlex.split(question.command(folder, ["device=cpu"]))
    assert [python, script] == ["python", "eval.py"] and ("-m" in given) == (len(question.selectors) > 1)
    check_words(given)
    assert given[-1] == f"selector={','.join(question.selectors)}"
    cfg = build.compose_eval(*[word for word in given[:-1] if word != "-m"], f"selector={question.selectors[-1]}")
    assert Path(cfg.data.root) == folder and cfg.data.suffix == question.suffix and cfg.device == "cpu"
    assert cfg.resume and cfg.study == f"app_{folder.name}" and (cfg.adapter == "own") == question.adapter
    assert {key: OmegaConf.select(cfg, key) for key in values} == values


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"picture": None}, "no picture: choose one"),
        ({"picture": Path("gone.png")}, "gone.png: the picture is no longer there"),
        ({"text": " \n"}, "the question is empty.*relevance=lm_embed ranks"),
        ({"text": "", "relevance": "none"}, "the question is empty: type one; the model answers it$"),
        ({"model": " "}, "there is no model"),
        ({"selectors": ()}, "0 selectors are chosen: choose 1 to 4"),
        ({"selectors": ("pooled",) * 5}, "5 selectors are chosen"),
    ],
)
def test_what_is_refused_before_any_model(
    picture: Path, tmp_path: Path, changed: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        PictureQuestion(**{"picture": picture, "text": "why?", **changed}).store(tmp_path)


def test_a_file_that_is_no_picture_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"^notes\.png: cannot be read as a picture"):
        PictureQuestion(picture=tmp_path / "notes.png", text="why?").store(tmp_path / "stored")
    assert not (tmp_path / "stored").exists()
