"""Files that somebody else wrote: configs, indices and adapters with values that would hang, fill memory or crash.

Each is refused in one sentence with these words; the last test draws configs, which load or are refused.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lavida_adapter import Lavida, LavidaConfig, LoraConfig, add_lora
from lavida_adapter.adapter_files import META, load_adapter, save_adapter
from lavida_adapter.checkpoint_files import INDEX, SINGLE
from lavida_adapter.lora import expand
from shirg import UserError
from tests.lavida_adapter.tiny import tiny_config, tiny_model
from tests.refusals import assert_says, message_of

NAN, INF, HUGE, DEEP = float("nan"), float("inf"), 10**30, 100_000
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{name}={value!r:.30}": ({name: value}, f"{name}=")
        for name, values in {
            "n_heads": (0, -4, True, "4", [4], {}),
            "n_kv_heads": (0, -1, 2.0),
            "d_model": (0, HUGE, 2**36, "wide"),
            "mlp_hidden_size": (0, HUGE),
            "rms_norm_eps": (NAN, INF, 0, -1e-5, "small"),
            "rope_theta": (NAN, INF, 0),
            "max_sequence_length": (0, HUGE),
            "tokenizer_model_max_length": (0, -1, "long"),
            "embedding_size": ([1], "many", 2.5),
            "mlp_ratio": ([1], "four", 2.5),
            "budgets": ([1], 3, {"base": "many"}, {"base": -1}, {"base": NAN}, {"base": {}}),
            "system_prompt": (3, [], {}),
            "vocab_size": (2**36,),
            "image_grid_pinpoints": (3, "[" * DEEP, [[16.5, INF]], [[HUGE]], "(1x1),...,(6x6)"),
            "attention_dropout": (0.5, [], {}),
            "eos_token_id": ("a", [1], 1.5),
            "trained": ("yes", 1),
            "vision_config": (5, [1], "tower"),
        }.items()
        for value in values
    },
    **{
        f"vision {name}={value!r}": ({"vision_config": {name: value}}, f"{name}=")
        for name, values in {
            "patch_size": (0, -1, "14", [14]),
            "image_size": (0, HUGE, "large"),
            "num_attention_heads": (0, 1.0),
            "layer_norm_eps": (NAN, INF),
            "hidden_act": ("none", 3, []),
        }.items()
        for value in values
    },
    "a long system prompt": ({"system_prompt": "why " * 25_001}, "system_prompt has 100,004 characters"),
    "a large patch": ({"vision_config": {"patch_size": 2**15, "image_size": 2**15}}, "at most 16,384"),
    "layers": ({"n_layers": 10**6}, "more than 1,000 layers"),
    "layers of the tower": ({"vision_config": {"num_hidden_layers": 10**6}}, "more than 1,000 layers"),
    "a huge canvas": ({"image_grid_pinpoints": [[384 * 100, 384 * 100]]}, "has more than 400 views"),
    "a canvas below 0": ({"image_grid_pinpoints": [[-384, -384]]}, "is not made of whole 384-pixel views"),
    "kinds of layers": ({"architectures": ["LlavaDreamForMaskedDiffusion"], "layer_types": [[1]]}, "layer_types="),
    "one kind": ({"model_type": "llava_dream", "layer_types": 3}, "layer_types=3"),
    "width of a head": (
        {"model_type": "llava_dream", "head_dim": "a", "hidden_size": 8, "num_attention_heads": 2},
        "head_dim='a'",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_values_in_a_config(case: str) -> None:
    fields, words = FIELDS[case]
    message = message_of(lambda: LavidaConfig.from_dict(fields))
    assert_says(message, words)
    assert len(message) < 500


def test_blank_names_of_a_model_say_nothing() -> None:
    assert LavidaConfig.from_dict({"model_type": "", "architectures": ["", None, 3]}) == LavidaConfig()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and, in adapter/, an adapter for it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    model, config = tiny_model(), LoraConfig(rank=2, targets=("mm_projector.0",))
    add_lora(model, config)
    save_adapter(model, config, folder / "adapter")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for path in saved.rglob("*.*"):
        target = tmp_path / path.relative_to(saved)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


OUTSIDE = [3, None, True, {}, [], "../x.safetensors", "/dev/zero", "a/b.safetensors", "."]
ABSENT = ["..", "a\0.safetensors", "a" * 5000 + ".safetensors"]
HALF_CHARACTER = '{"a": "\\ud800"}'
BROKEN = ["[" * DEEP, '{"a":' * DEEP, HALF_CHARACTER, "3", "null", ""]


@pytest.mark.parametrize("file", [*OUTSIDE, *ABSENT], ids=lambda file: repr(file)[:30])
def test_names_in_an_index(folder: Path, file: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / SINGLE), file)}))
    message = message_of(lambda: Lavida.from_pretrained(folder))
    assert_says(message, "which do not exist" if file in ABSENT else "the files of a checkpoint lie beside it")
    assert len(message) < 500


TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
DAMAGED = [
    (name, content)
    for name in ("config.json", INDEX, *TOKENIZER, f"adapter/{META}")
    for content in (*BROKEN, b'{"\xe9": 1}')
    if name not in TOKENIZER or content != HALF_CHARACTER  # which the tokenizers package reads
]


@pytest.mark.parametrize(("name", "content"), DAMAGED, ids=lambda part: repr(part)[:30])
def test_texts_that_are_no_object(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    load = (lambda: load_adapter(tiny_model(), folder / "adapter")) if "adapter" in name else load_of(folder)
    assert_says(message_of(load), "cannot be read" if "/" in name or name.startswith("tok") else Path(name).name)


def load_of(folder: Path) -> Callable[[], object]:
    return lambda: Lavida.from_pretrained(folder)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", f"adapter/{META}"])
def test_what_is_no_file_of_bytes(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink()
    SPECIAL[kind](folder / name)
    load = (lambda: load_adapter(tiny_model(), folder / "adapter")) if "adapter" in name else load_of(folder)
    assert_says(message_of(load), f"no {Path(name).name}" if "adapter" not in name else "holds no adapter")


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_lies_beside_the_weights_is_not_opened(folder: Path, kind: str) -> None:
    SPECIAL[kind](folder / "extra.safetensors")
    assert Lavida.from_pretrained(folder).config == tiny_config()


LORA: dict[str, tuple[Any, str]] = {
    **{f"lora={value!r}": (value, "give the options of an adapter") for value in (None, [], 3, "rank", True)},
    **{
        f"{name}={value!r:.30}": ({name: value}, f"lora.{name}")
        for name, values in {
            "rank": ("a", 2.5, 10**9, HUGE, True, None),
            "alpha": (NAN, INF, "a", [], 0),
            "dropout": (NAN, "a", 1.0),
            "targets": ("mm_projector.0", 3, [3], {"a": 1}, ["a" * 10**6], ["a"] * 20_000),
            "ranks": ([1], {"mm_projector": "a"}, {"mm_projector": HUGE}, 3),
            "train_whole": (3, [None]),
        }.items()
        for value in values
    },
    "range": ({"targets": ["{0-99999999}"]}, "stands for more than 10,000 names"),
    "range of whole": ({"train_whole": ["{0-99999999}"]}, "stands for more than 10,000 names"),
    "alternatives": ({"targets": ["{a,b}" * 24]}, "stands for more than 10,000 names"),
    "growth": ({"grow": 3}, "cannot be read"),
    "unknown": ({"colour": 1}, "cannot be read"),
}


@pytest.mark.parametrize("case", LORA)
def test_options_of_an_adapter(folder: Path, case: str) -> None:
    change, words = LORA[case]
    meta = json.loads((folder / "adapter" / META).read_text())
    meta["lora"] = {**meta["lora"], **change} if isinstance(change, dict) else change
    (folder / "adapter" / META).write_text(json.dumps(meta))
    message = message_of(lambda: load_adapter(tiny_model(), folder / "adapter"))
    assert_says(message, words)
    assert len(message) < 500


@pytest.mark.parametrize("value", [torch.tensor(NAN), torch.tensor(INF), torch.tensor(1), torch.tensor(True)])
def test_tensors_of_an_adapter(folder: Path, value: torch.Tensor) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: value.expand(t.shape).contiguous() for name, t in load_file(path).items()}, path)
    assert_says(
        message_of(lambda: load_adapter(tiny_model(), folder / "adapter")), "has NaN, infinity or whole numbers"
    )


def test_as_many_names_as_are_allowed() -> None:
    names = [f"layer.{i}" for i in range(10_000)]
    assert expand("layer.{0-9999}", names) == names


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 64),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 1000), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(-2, 1000), max_size=2),
)
NAMES = sorted({*LavidaConfig().to_dict(), "mlp_ratio", "rope_parameters", "layer_types", "head_dim", "hidden_size"})
TOWER = sorted(LavidaConfig().to_dict()["vision_config"])


@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
    st.dictionaries(st.sampled_from(TOWER), VALUES, max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_any_config_is_read_or_refused(fields: dict[str, Any], tower: dict[str, Any]) -> None:
    try:
        config = LavidaConfig.from_dict({"vision_config": tower, **fields})
    except UserError as error:
        assert 20 < len(str(error)) < 1500
    else:
        assert LavidaConfig.from_dict(config.to_dict()) == config
