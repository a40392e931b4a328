"""Checkpoints that do not load: one sentence each, which says what is wrong and where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from lavida_adapter import Lavida, add_lora, checkpoint
from lavida_adapter.checkpoint import HEAD, INDEX, SINGLE, WTE
from lavida_adapter.lora import LoraConfig
from shirg import MissingFileError, UserError
from tests.lavida_adapter.test_checkpoint import edit_config, rewrite
from tests.lavida_adapter.tiny import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(saved: dict[str, bytes], tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for name, content in saved.items():
        (target / name).write_bytes(content)
    return target


def refusal(source: Path | str, kind: type[Exception] = UserError, **arguments: Any) -> str:
    """The error of loading: one line, raised on purpose."""
    with pytest.raises(kind) as error:
        Lavida.from_pretrained(source, **arguments)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "state.pkl"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    (folder / SINGLE).unlink()
    torch.save({"model.image_newline": torch.zeros(3)}, folder / name)
    sentence = f"holds pickled weights only ({name}): loading a pickle can run any code, so it is refused"
    assert sentence in refusal(folder)


def test_an_index_that_names_pickles(folder: Path) -> None:
    names = list(load_file(folder / SINGLE))
    (folder / SINGLE).rename(folder / "pytorch_model-1.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model-1.bin")}))
    assert "pytorch_model-1.bin is not a safetensors file: loading a pickle can run any code" in refusal(folder)


def test_all_mismatches_in_one_error(folder: Path) -> None:
    changes: dict[str, torch.Tensor | None] = {
        "model.image_newline": None,
        "model.transformer.blocks.0.q_proj.weight": None,
        "model.mm_projector.0.weight": torch.zeros(31, 16),
        "model.transformer.ln_f.weight": torch.zeros(32, 1),
        WTE: torch.zeros(5, 32),
        HEAD: torch.zeros(400, 31),
        "model.transformer.blocks.7.q_proj.weight": torch.zeros(2),
        "lm_head.weight": torch.zeros(2),
    }
    rewrite(folder, **changes)
    sentence = refusal(folder)
    rows = len(tiny_model().tokenizer)
    for part in (
        f"the tensors in {folder} do not fit its config.json: ",
        "2 missing: model.image_newline, model.transformer.blocks.0.q_proj.weight;",
        "4 of the wrong shape: ",
        "model.mm_projector.0.weight is [31, 16], expected [32, 16]",
        "model.transformer.ln_f.weight is [32, 1], expected [32]",
        f"{WTE} is [5, 32], expected at least [{rows}, 32]",
        f"{HEAD} is [400, 31], expected at least [{rows}, 32]",
        "2 unexpected: lm_head.weight, model.transformer.blocks.7.q_proj.weight",
    ):
        assert part in sentence


def test_sizes_that_the_weights_do_not_have(folder: Path) -> None:
    edit_config(folder, n_layers=3)
    assert "9 missing: model.transformer.blocks.2.attn_norm.weight" in refusal(folder)
    edit_config(folder, n_layers=1)
    assert "9 unexpected: model.transformer.blocks.1.attn_norm.weight" in refusal(folder)


def test_long_lists_are_cut(folder: Path) -> None:
    edit_config(folder, n_layers=6)
    sentence = refusal(folder)
    assert "36 missing: " in sentence
    assert sentence.count("model.transformer.blocks.") == 20
    assert sentence.endswith(" ...")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"\xff" * 100,
        lambda data: data + b"more",
        lambda data: b"PK\x03\x04" + data,
    ],
    ids=["half", "five bytes", "empty", "noise", "too long", "zip"],
)
def test_damaged_weights(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / SINGLE).write_bytes(damage((folder / SINGLE).read_bytes()))
    assert f"{folder / SINGLE} is not a readable safetensors file: " in refusal(folder)


def test_a_damaged_shard(folder: Path) -> None:
    tiny_model().save_pretrained(folder, max_shard_size=20_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} is not a readable safetensors file: " in refusal(folder)
    shard.unlink()
    assert f"{INDEX} names {shard.name}, which do not exist" in refusal(folder, MissingFileError)


def test_an_index_that_lies(folder: Path) -> None:
    state = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    save_file({"model.image_newline": state["model.image_newline"]}, folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, "one.safetensors")}))
    assert f"one.safetensors lacks tensors that {INDEX} lists for it: model.mm_projector.0.bias" in refusal(folder)
    for content, sentence in (
        ("{", "is not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("[]", "is not a JSON object"),
    ):
        (folder / INDEX).write_text(content)
        assert f"{folder / INDEX} {sentence}" in refusal(folder)


def test_files_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE).unlink()
    assert f"{folder} has no {SINGLE} and no {INDEX}" in refusal(folder, MissingFileError)
    (folder / "tokenizer.json").unlink()
    assert f"{folder} has no tokenizer.json: copy the tokenizer files" in refusal(folder, MissingFileError)
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json: it is not a checkpoint folder" in refusal(folder, MissingFileError)
    for source in (tmp_path / "absent", "./absent/x", "~/absent", "absent", "a/b/c", folder / "tokenizer_config.json"):
        assert refusal(source, MissingFileError) == f"model.path={source}: no such checkpoint folder"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{'d_model': 1}", "config.json is not valid JSON"),
        ("", "config.json is not valid JSON"),
        ("[1]", "config.json is not a JSON object"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        ('{"alibi": true, "n_heads": "4"}', "config.json has values that LaViDa-LLaDA does not support: alibi=True"),
    ],
)
def test_damaged_configs(folder: Path, content: str | bytes, sentence: str) -> None:
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]"])
def test_damaged_tokenizers(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert f"the tokenizer files in {folder} cannot be read: " in refusal(folder)


@pytest.mark.parametrize(("name", "token"), [("mask_token_id", "<|mdm_mask|>"), ("eos_token_id", "<|endoftext|>")])
def test_special_ids_that_disagree(folder: Path, name: str, token: str) -> None:
    known = tiny_model().tokenizer.convert_tokens_to_ids(token)
    edit_config(folder, **{name: 7})
    assert refusal(folder) == f"{folder}: config.json says {name}=7, but the tokenizer's {token} is {known}"


def test_a_tokenizer_that_is_not_lladas(folder: Path) -> None:
    raw = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(raw.replace("<|eot_id|>", "<|im_end|>"))
    assert refusal(folder) == f"the tokenizer in {folder} lacks <|eot_id|>: it is not LLaDA's"


@pytest.mark.parametrize("dtype", ["float23", "int8", torch.int64, "nn"])
def test_dtypes_that_are_none(folder: Path, dtype: Any) -> None:
    assert refusal(folder, dtype=dtype) == f"dtype={dtype}: choose auto, float32, bfloat16 or float16"


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: nothing is asked of the network, and one sentence says what to do."""

    def offline(repo: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nLong explanation.")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    assert refusal("somebody/lavida", MissingFileError) == (
        "model.path=somebody/lavida: no such local folder, and the download from the hub failed "
        "(LocalEntryNotFoundError); download the checkpoint once and give its folder"
    )


def test_lora_layers_are_not_saved_as_a_base(tmp_path: Path) -> None:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2, targets=("mm_projector.0",)))
    with pytest.raises(ValueError, match="the model carries LoRA layers: merge them"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_in_a_type_that_nothing_is_computed_in(folder: Path) -> None:
    rewrite(folder, **{WTE: load_file(folder / SINGLE)[WTE].to(torch.float8_e4m3fn)})
    assert refusal(folder).startswith("dtype=auto: the checkpoint stores its embedding in a dtype that cannot be")
    assert Lavida.from_pretrained(folder, dtype="float32").dtype == torch.float32
