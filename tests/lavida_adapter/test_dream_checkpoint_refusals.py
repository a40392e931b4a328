"""Damaged checkpoints of LaViDa on Dream: one sentence each, in published names; and weights that no model can have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lavida_adapter import Lavida
from lavida_adapter.checkpoint_files import INDEX, SINGLE
from shirg import MissingFileError, UserError
from tests.lavida_adapter.test_checkpoint import ROWS, TOWER, edit_config, rewrite
from tests.lavida_adapter.test_checkpoint_refusals import Damage, damaged_shard, refusal, written
from tests.lavida_adapter.tiny import tiny_model, tokenizer

EMBEDDING, HEAD = ROWS["dream"]
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(lm={"family": "dream"}).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(saved: dict[str, bytes], tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for name, content in saved.items():
        (target / name).write_bytes(content)
    return target


def config(**fields: Any) -> Damage:
    return lambda folder: edit_config(folder, **fields)


def tensors(**changes: torch.Tensor | None) -> Damage:
    return lambda folder: rewrite(folder, **changes)


def of_llada(folder: Path) -> None:
    kept = {path: path.read_bytes() for path in folder.glob("*.json")}
    tiny_model().save_pretrained(folder)
    for path, content in kept.items():
        path.write_bytes(content)


def under_own_names(folder: Path) -> None:
    """Saved by someone under the names of our modules."""
    state = {name: t for name, t in load_file(folder / SINGLE).items() if name.startswith("model.layers.0.")}
    ours = {name.replace("model.", "model.transformer.", 1): t for name, t in state.items()}
    rewrite(folder, **dict.fromkeys(state), **ours)


def tokens_of_qwen(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|mask|>", "<|fim_pad|>"))


def lying_index(folder: Path) -> None:
    state = load_file(folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys([*state, "model.more"], SINGLE)}))


def set_numbers(name: str, value: float) -> Damage:
    def damage(folder: Path) -> None:
        tensor = load_file(folder / SINGLE)[name]
        tensor.view(-1)[3] = value
        rewrite(folder, **{name: tensor})

    return damage


N_ROWS = len(tokenizer("dream"))
UNFIT = "do not fit its config.json: "
VALUES = "config.json has values that LaViDa-Dream does not support: "
CASES: dict[str, tuple[Damage, list[str]]] = {
    "no bias": (tensors(**{Q_BIAS: None}), [UNFIT, f"1 missing: {Q_BIAS}"]),
    "no head": (tensors(**{HEAD: None}), [UNFIT, "1 missing: lm_head.weight"]),
    "no newline": (
        tensors(**{"model.image_newline": None}),
        [UNFIT, "1 missing: model.image_newline (which mm_patch_merge_type=spatial_unpad puts behind every row"],
    ),
    "too few rows": (
        tensors(**{EMBEDDING: torch.zeros(9, 32)}),
        [UNFIT, f"model.embed_tokens.weight is [9, 32], expected at least [{N_ROWS}, 32]"],
    ),
    "head of another width": (
        tensors(**{HEAD: torch.zeros(N_ROWS + 9, 31)}),
        [UNFIT, f"lm_head.weight is [{N_ROWS + 9}, 31], expected at least [{N_ROWS}, 32]"],
    ),
    "more key heads": (
        config(num_key_value_heads=4),
        [UNFIT, "layers.0.self_attn.k_proj.weight is [16, 32], expected [32"],
    ),
    "more layers": (config(num_hidden_layers=3), [UNFIT, "12 missing: model.layers.2.input_layernorm.weight, "]),
    "fewer layers": (config(num_hidden_layers=1), [UNFIT, "12 unexpected: model.layers.1.input_layernorm.weight, "]),
    "two more vision layers": (
        tensors(**{f"{TOWER}encoder.layers.{i}.layer_norm1.bias": torch.zeros(16) for i in (2, 3)}),
        [UNFIT, f"1 unexpected: {TOWER}encoder.layers.3.layer_norm1.bias"],
    ),
    "weights of LLaDA": (of_llada, [UNFIT, "missing: lm_head.weight, model.embed_tokens.weight, model.layers.0."]),
    "config of LLaDA": (config(model_type="llava_llada", architectures=[]), ["config.json belongs to LLaDA-V"]),
    "names of our modules": (under_own_names, [UNFIT, "12 missing: ", "12 unexpected: model.transformer.layers.0."]),
    "sliding window": (config(use_sliding_window=True), [VALUES, "use_sliding_window=True (supported: False, None)"]),
    "long context": (config(rope_scaling={"type": "yarn", "factor": 4}), [VALUES, "rope_scaling={'type': 'yarn'"]),
    "tied": (config(tie_word_embeddings=True), [VALUES, "tie_word_embeddings=True"]),
    "dropout": (config(attention_dropout=0.1), [VALUES, "attention_dropout=0.1 (supported: 0.0)"]),
    "quantised": (config(quantization_config={"bits": 4}), [VALUES, "quantization_config"]),
    "several": (
        config(hidden_act="gelu", head_dim=16, layer_types=["sliding_attention"], hidden_size=32.0, eos_token_id=[1]),
        [
            VALUES,
            "hidden_act='gelu'",
            "head_dim=16",
            "layer_types=['sliding_attention']",
            "hidden_size=32.0",
            "_id=[1]",
        ],
    ),
    "no heads": (config(num_attention_heads=0), ["n_heads=0", "must be positive"]),
    "another mask": (config(mask_token_id=7), ["config.json says mask_token_id=7, but the tokenizer's <|mask|> is"]),
    "another eos": (config(eos_token_id=7), ["config.json says eos_token_id=7, but the tokenizer's <|endoftext|> is"]),
    "a tokenizer without mask": (tokens_of_qwen, ["the tokenizer in", "lacks <|mask|>: it is not Dream's"]),
    "a damaged shard": (damaged_shard, ["is not a readable safetensors file"]),
    "a lying index": (lying_index, [f"{SINGLE} lacks tensors that {INDEX} lists for it: model.more"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["has no tokenizer.json, and no vocab.json"]),
    "no JSON": (written("config.json", "{"), ["config.json is not valid JSON"]),
    "NaN": (set_numbers(Q_BIAS, float("nan")), ["has NaN or infinity, as float32, in ", f" {Q_BIAS}: download"]),
    "infinity": (set_numbers(HEAD, float("-inf")), ["has NaN or infinity, as float32, in lm_head.weight: download"]),
    "integers": (
        tensors(
            **{
                Q_BIAS: torch.ones(32, dtype=torch.int8),
                f"{TOWER}post_layernorm.bias": torch.ones(16, dtype=torch.bool),
            }
        ),
        [UNFIT, f"2 of integers (quantised weights are not supported): {Q_BIAS}, {TOWER}post_layernorm.bias"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_checkpoints_of_dream(folder: Path, case: str) -> None:
    damage, words = CASES[case]
    damage(folder)
    sentence = refusal(folder, MissingFileError if case == "no tokenizer" else UserError)
    assert [word for word in words if word not in sentence] == []
    assert "model.transformer.layers" not in sentence or case == "names of our modules"


def test_finite_numbers_that_a_narrow_dtype_cannot_hold(folder: Path) -> None:
    set_numbers(Q_BIAS, 1e6)(folder)
    assert Lavida.from_pretrained(folder).lm.layers[0].query.bias[3] == 1e6
    assert Lavida.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert f"has NaN or infinity, as float16, in {Q_BIAS}: " in refusal(folder, dtype="float16")


def test_all_tensors_that_are_not_finite_in_one_error(folder: Path) -> None:
    for name in (Q_BIAS, HEAD, "model.image_newline"):
        set_numbers(name, float("inf"))(folder)
    assert f"in {HEAD}, model.image_newline, {Q_BIAS}: " in refusal(folder)


def test_numbers_that_are_cut_off_or_never_read_may_be_anything(folder: Path) -> None:
    model = tiny_model(lm={"family": "dream"})
    rows = torch.cat([model.lm.lm_head.weight.detach(), torch.full((4, 32), float("nan"))])
    rewrite(folder, **{HEAD: rows, f"{TOWER}head.probe": torch.full((1, 1, 16), float("nan"))})
    assert torch.equal(Lavida.from_pretrained(folder).lm.lm_head.weight, model.lm.lm_head.weight)
