"""Checkpoints that do not load: each damage to a saved one raises UserError with one line that has these words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from lavida_adapter import Lavida, LoraConfig, add_lora, checkpoint_files
from lavida_adapter.checkpoint_files import INDEX, SINGLE
from shirg import MissingFileError, UserError
from tests.lavida_adapter.test_checkpoint import HEAD, WTE, edit_config, rewrite
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


Damage = Callable[[Path], object]


def pickled(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / SINGLE).unlink()
        torch.save({"model.image_newline": torch.zeros(3)}, folder / name)

    return damage


def index_of_pickles(folder: Path) -> None:
    names = list(load_file(folder / SINGLE))
    (folder / SINGLE).rename(folder / "part.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.bin")}))


def index_that_lies(folder: Path) -> None:
    state = load_file(folder / SINGLE)
    save_file({"model.image_newline": state["model.image_newline"]}, folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, "one.safetensors")}))


def damaged_shard(folder: Path) -> None:
    tiny_model().save_pretrained(folder, max_shard_size=20_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def written(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def weights(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / SINGLE).write_bytes(change((folder / SINGLE).read_bytes()))


def other_tokenizer(folder: Path) -> None:
    raw = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(raw.replace("<|eot_id|>", "<|im_end|>"))


UNREADABLE = [SINGLE, "is not a readable safetensors file: "]
CASES: dict[str, tuple[Damage, list[str]]] = {
    **{
        f"pickle {name}": (
            pickled(name),
            [f"holds pickled weights only ({name})", "can run any code"],
        )
        for name in ("pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "state.pkl")
    },
    "index of pickles": (index_of_pickles, ["part.bin is not a safetensors file", "can run any code"]),
    "half a file": (weights(lambda data: data[: len(data) // 2]), UNREADABLE),
    "five bytes": (weights(lambda data: data[:5]), UNREADABLE),
    "empty file": (weights(lambda data: b""), UNREADABLE),
    "noise": (weights(lambda data: b"\xff" * 100), UNREADABLE),
    "too long": (weights(lambda data: data + b"more"), UNREADABLE),
    "zip": (weights(lambda data: b"PK\x03\x04" + data), UNREADABLE),
    "damaged shard": (damaged_shard, ["model-00002-of-", "is not a readable safetensors file: "]),
    "index that lies": (index_that_lies, ["one.safetensors lacks tensors", INDEX, "model.mm_projector.0.bias"]),
    "index: not JSON": (written(INDEX, "{"), [INDEX, "is not valid JSON"]),
    "index: no map": (written(INDEX, "{}"), [INDEX, "has no weight_map"]),
    "index: empty map": (written(INDEX, '{"weight_map": {}}'), [INDEX, "has no weight_map"]),
    "index: a list": (written(INDEX, "[]"), [INDEX, "is not a JSON object"]),
    "config: not JSON": (written("config.json", "{'d_model': 1}"), ["config.json is not valid JSON"]),
    "config: empty": (written("config.json", ""), ["config.json is not valid JSON"]),
    "config: a list": (written("config.json", "[1]"), ["config.json is not a JSON object"]),
    "config: not text": (written("config.json", b"\xff\xfe"), ["config.json is not valid JSON"]),
    "config: unsupported": (written("config.json", '{"alibi": true, "n_heads": "4"}'), ["alibi=True", "n_heads='4'"]),
    "config: more layers": (
        lambda folder: edit_config(folder, n_layers=3),
        ["9 missing: model.transformer.blocks.2.attn_norm.weight"],
    ),
    "config: fewer layers": (
        lambda folder: edit_config(folder, n_layers=1),
        ["9 unexpected: model.transformer.blocks.1.attn_norm.weight"],
    ),
    **{
        f"tokenizer {content!r}": (written("tokenizer.json", content), ["the tokenizer files in", "cannot be read: "])
        for content in ("", "{", '{"version": "1.0"}', "[]")
    },
    "another tokenizer": (other_tokenizer, ["the tokenizer in", "lacks <|eot_id|>: it is not LLaDA's"]),
    **{
        name: (
            lambda folder, name=name: edit_config(folder, **{name: 7}),
            [f"{name}=7, but the tokenizer's {token}"],
        )
        for name, token in (("mask_token_id", "<|mdm_mask|>"), ("eos_token_id", "<|endoftext|>"))
    },
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_checkpoints(folder: Path, case: str) -> None:
    damage, words = CASES[case]
    damage(folder)
    sentence = refusal(folder)
    assert str(folder) in sentence or "config.json" in sentence
    assert [word for word in words if word not in sentence] == []


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
        "2 missing: model.image_newline (which mm_patch_merge_type=spatial_unpad puts behind every row of a picture), "
        "model.transformer.blocks.0.q_proj.weight;",
        "4 of the wrong shape: ",
        "model.mm_projector.0.weight is [31, 16], expected [32, 16]",
        "model.transformer.ln_f.weight is [32, 1], expected [32]",
        f"{WTE} is [5, 32], expected at least [{rows}, 32]",
        f"{HEAD} is [400, 31], expected at least [{rows}, 32]",
        "2 unexpected: lm_head.weight, model.transformer.blocks.7.q_proj.weight",
    ):
        assert part in sentence


def test_long_lists_are_cut(folder: Path) -> None:
    edit_config(folder, n_layers=6)
    sentence = refusal(folder)
    assert "36 missing: " in sentence
    assert sentence.count("model.transformer.blocks.") == 20
    assert sentence.endswith(" ...")


def test_absent_files(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"model.image_newline": "model-1.safetensors"}}')
    assert "names model-1.safetensors, which do not exist" in refusal(folder, MissingFileError)
    (folder / INDEX).unlink()
    (folder / SINGLE).unlink()
    assert f"{folder} has no {SINGLE} and no {INDEX}" in refusal(folder, MissingFileError)
    (folder / "tokenizer.json").unlink()
    assert f"{folder} has no tokenizer.json: copy the tokenizer files" in refusal(folder, MissingFileError)
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json: it is not a checkpoint folder" in refusal(folder, MissingFileError)
    for source in (tmp_path / "absent", "./absent/x", "~/absent", "absent", "a/b/c", folder / "tokenizer_config.json"):
        assert refusal(source, MissingFileError) == f"model.path={source}: no such checkpoint folder"


@pytest.mark.parametrize("dtype", ["float23", "int8", torch.int64, "nn"])
def test_unknown_dtypes(folder: Path, dtype: Any) -> None:
    assert refusal(folder, dtype=dtype) == f"dtype={dtype}: choose auto, float32, bfloat16 or float16"


def test_an_embedding_in_a_dtype_that_cannot_be_computed_in(folder: Path) -> None:
    rewrite(folder, **{WTE: load_file(folder / SINGLE)[WTE].to(torch.float8_e4m3fn)})
    assert refusal(folder).startswith("dtype=auto: the checkpoint stores its embedding in a dtype that cannot be")
    assert Lavida.from_pretrained(folder, dtype="float32").dtype == torch.float32


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: no network access, and one sentence that says what to do."""

    def offline(repo: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nLong explanation.")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(checkpoint_files, "snapshot_download", offline)
    sentence = refusal("somebody/lavida", MissingFileError)
    for word in ("model.path=somebody/lavida", "no such local folder", "LocalEntryNotFoundError", "give its folder"):
        assert word in sentence


def test_lora_layers_are_not_saved_as_a_base(tmp_path: Path) -> None:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2, targets=("mm_projector.0",)))
    with pytest.raises(UserError, match="the model carries LoRA layers: merge them"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
