"""A copy of a checkpoint for transformers' own loaders, with its vision tower and without it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from lavida_adapter import Lavida
from lavida_adapter.checkpoint_files import SINGLE
from lavida_adapter.tower_files import PUBLISHED_TOWER, TOWER
from shirg import MissingFileError, UserError
from tests.lavida_adapter.test_checkpoint import edit_config, rewrite, same
from tests.lavida_adapter.test_checkpoint_refusals import refusal
from tests.lavida_adapter.tiny import tiny_config, tiny_model

TRANSFORMERS = {
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling.LlavaLLaDAModelLM"},
    "delay_load": True,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06,
    "mm_vision_select_feature": "patch",
    "transformers_version": "4.50.3",
    "unfreeze_mm_vision_tower": True,
    "vision_tower_pretrained": None,
}
"""What such a copy's config.json has beside the published fields."""


@pytest.fixture(params=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> Lavida:
    return tiny_model(lm={"family": request.param})


@pytest.fixture
def folder(model: Lavida, tmp_path: Path) -> Path:
    """With code of its own, which is not run, and a chat template beside the tokenizer."""
    folder = tmp_path / "copy"
    model.save_pretrained(folder)
    edit_config(folder, **TRANSFORMERS)
    for name in ("configuration_llada.py", "modeling.py", "tokenization.py"):
        (folder / name).write_text("import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n")
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"auto_map": {"AutoTokenizer": ["tokenization.Tokens", None]}, "tokenizer_class": "LLaDATokenizer"}
    tokens |= {"chat_template": "{{ messages }}", "processor_class": "LLaDAProcessor"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}')
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    return folder


def without_tower(folder: Path) -> None:
    rewrite(folder, **{name: None for name in load_file(folder / SINGLE) if name.startswith(TOWER)})


def siglip_sizes(**changes: Any) -> dict[str, Any]:
    return asdict(tiny_config().vision) | changes


def save_siglip(target: Path, whole: bool, **changes: Any) -> torch.nn.Module:
    """A SigLIP in transformers' layout: text and vision, or the vision part alone."""
    torch.manual_seed(7)
    if whole:
        text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "projection_size": 8}
        siglip: Any = SiglipModel(SiglipConfig(text_config=text, vision_config=siglip_sizes(**changes)))
    else:
        siglip = SiglipVisionModel(SiglipVisionConfig(**siglip_sizes(**changes)))
    siglip.save_pretrained(target)
    return siglip


def test_a_copy_for_transformers_loads_without_its_code(
    model: Lavida, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    loaded = Lavida.from_pretrained(folder)
    assert same(loaded, model) and loaded.config == model.config
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert not list(folder.glob("*.ran"))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("beginning", ["vision_model.", ""])
def test_the_tower_of_a_siglip(model: Lavida, folder: Path, tmp_path: Path, whole: bool, beginning: str) -> None:
    """Files of the vision part alone name its tensors with or without a beginning, by their age."""
    siglip = save_siglip(tmp_path / "siglip", whole)
    if not whole:
        state = load_file(tmp_path / "siglip" / SINGLE)
        renamed = {beginning + name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
        save_file(renamed, tmp_path / "siglip" / SINGLE)
    without_tower(folder)
    loaded = Lavida.from_pretrained(folder, vision_path=tmp_path / "siglip")
    ours = {name.removeprefix(TOWER): t for name, t in loaded.state_dict().items() if name.startswith(TOWER)}
    theirs = {name.removeprefix("vision_model."): t for name, t in siglip.state_dict().items()}
    assert ours and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    rest = {name: tensor for name, tensor in loaded.state_dict().items() if not name.startswith(TOWER)}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in rest.items()) and len(rest) > 20
    # Saved, it is a checkpoint with a tower.
    loaded.save_pretrained(tmp_path / "whole")
    assert same(Lavida.from_pretrained(tmp_path / "whole"), loaded)


def test_an_absent_tower_is_named(folder: Path) -> None:
    without_tower(folder)
    sentence = refusal(folder, MissingFileError)
    for words in (str(folder), "stored without its vision tower", f"{PUBLISHED_TOWER}, as model.vision_path"):
        assert words in sentence
    edit_config(folder, mm_vision_tower="some/other-siglip")
    sentence = refusal(folder, MissingFileError)
    assert "trained with, some/other-siglip, as model.vision_path (a folder or hub id)" in sentence
    edit_config(folder, mm_vision_tower=None)
    assert f"trained with, {PUBLISHED_TOWER}, as" in refusal(folder, MissingFileError)


def test_half_a_tower_is_not_filled_up(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, **{f"{TOWER}encoder.layers.0.layer_norm1.bias": None})
    assert f"1 missing: {TOWER}encoder.layers.0.layer_norm1.bias" in refusal(folder)
    save_siglip(tmp_path / "siglip", False)
    sentence = refusal(folder, vision_path=tmp_path / "siglip")
    assert f"model.vision_path={tmp_path / 'siglip'}: {folder} has a vision tower of its own" in sentence
    assert sentence.endswith("leave model.vision_path out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads=4 (expected 2)"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 (expected 3)"),
        ({"hidden_size": 8, "hidden_act": "gelu"}, "hidden_size=8 (expected 16), hidden_act='gelu' (expected 'gelu_py"),
        ({"image_size": 26, "patch_size": 4}, "image_size=26 (expected 20), patch_size=4 (expected 6)"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps=0.001 (expected 1e-06)"),
    ],
)
def test_a_tower_of_other_sizes(folder: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Heads, activation and eps do not show in the shapes of tensors."""
    without_tower(folder)
    save_siglip(tmp_path / "siglip", True, **changes)
    sentence = refusal(folder, vision_path=tmp_path / "siglip")
    assert (
        f"model.vision_path={tmp_path / 'siglip'} is another tower than the checkpoint was trained with: " in sentence
    )
    assert words in sentence


def test_what_is_no_siglip(model: Lavida, folder: Path, tmp_path: Path) -> None:
    without_tower(folder)
    save_siglip(tmp_path / "siglip", False)
    (tmp_path / "empty").mkdir()
    for path, kind, words in (
        (
            tmp_path / "nowhere",
            MissingFileError,
            f"model.vision_path={tmp_path / 'nowhere'}: no such checkpoint folder",
        ),
        (tmp_path / "empty", MissingFileError, "has no config.json: it is not a checkpoint folder"),
        (
            folder,
            UserError,
            f"is a {json.loads((folder / 'config.json').read_text())['model_type']} model: give a SigLIP",
        ),
    ):
        assert words in refusal(folder, kind, vision_path=path)
    rewrite(
        tmp_path / "siglip", **{name: None for name in load_file(tmp_path / "siglip" / SINGLE) if "layers.1" in name}
    )
    assert f"16 missing: {TOWER}encoder.layers.1." in refusal(folder, vision_path=tmp_path / "siglip")
    (tmp_path / "siglip" / SINGLE).unlink()
    assert "there are no weights to load" in refusal(folder, MissingFileError, vision_path=tmp_path / "siglip")


def test_a_revision_is_for_the_hub(folder: Path) -> None:
    sentence = refusal(folder, revision="main")
    assert sentence.startswith(f"model.revision=main: model.path={folder} is a local folder, which has no revisions")
