"""An adapter's file: what is in it, and the one base that it belongs to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavida_adapter import Lavida, LoraConfig, add_lora, load_adapter, save_adapter
from lavida_adapter.lora import ADAPTER, META
from tests.lavida_adapter.test_lora import CONFIG, adapted, logits, step
from tests.lavida_adapter.tiny import tiny_model


@pytest.fixture
def trained() -> Lavida:
    model = tiny_model()
    add_lora(model, CONFIG)
    step(model, 3)
    return model


@pytest.mark.parametrize("config", [CONFIG, LoraConfig(rank=0, train_whole=("mm_projector.0", "image_newline"))])
def test_an_adapter_survives_saving_and_loading(config: LoraConfig, tmp_path: Path) -> None:
    model = tiny_model()
    add_lora(model, config)
    step(model, 2)
    save_adapter(model, config, tmp_path / "adapter")
    again = tiny_model()
    assert load_adapter(again, str(tmp_path / "adapter")) == config
    assert torch.equal(logits(again), logits(model))
    stored = load_file(tmp_path / "adapter" / ADAPTER)
    assert stored.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {ADAPTER, META}


def test_an_adapter_belongs_to_its_base(trained: Lavida, tmp_path: Path) -> None:
    save_adapter(trained, CONFIG, tmp_path)
    other = tiny_model(seed=1)
    with pytest.raises(ValueError, match="was trained on another base checkpoint: load that one"):
        load_adapter(other, tmp_path)
    assert adapted(other) == set()
    # What the adapter brings itself may differ, and so may the precision of a base that is stored in half of it.
    newline = tiny_model()
    with torch.no_grad():
        newline.model.image_newline.zero_()
    load_adapter(newline, tmp_path)
    assert torch.equal(newline.model.image_newline, trained.model.image_newline)
    load_adapter(tiny_model().to(torch.bfloat16), tmp_path)


def test_adapters_that_cannot_be_loaded(trained: Lavida, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no adapter \(adapter.json and adapter.safetensors\)"):
        load_adapter(tiny_model(), tmp_path)
    save_adapter(trained, CONFIG, tmp_path)
    tensors, meta = load_file(tmp_path / ADAPTER), (tmp_path / META).read_text()
    name = "model.image_newline"
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {name: torch.zeros(3)},
        tensors | {"model.more": torch.zeros(3)},
    ):
        save_file(wrong, tmp_path / ADAPTER)
        with pytest.raises(ValueError, match="are not those that its adapter.json describes"):
            load_adapter(tiny_model(), tmp_path)
    save_file(tensors, tmp_path / ADAPTER)
    for broken in ("{", "[]", "{}", json.dumps(json.loads(meta) | {"lora": {"rang": 3}})):
        (tmp_path / META).write_text(broken)
        with pytest.raises(ValueError, match="cannot be read .*: train it again"):
            load_adapter(tiny_model(), tmp_path)
    (tmp_path / META).write_text(meta)
    (tmp_path / ADAPTER).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read .*: train it again"):
        load_adapter(tiny_model(), tmp_path)
