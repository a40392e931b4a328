"""Each `model=` of a published checkpoint, from a tiny checkpoint in the published layout to its rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from lavida_adapter import Lavida
from lavida_adapter.checkpoint_files import INDEX, SINGLE
from tests.lavida_adapter.tiny import picture, tiny_model

FAMILY = {name: "llada" for name in ("lavida_8b", "lavida_lowres", "lavida_fim", "lavida_reason")}
FAMILY["lavida_dream"] = "dream"
EMBEDDING = {"llada": "model.transformer.wte.weight", "dream": "model.embed_tokens.weight"}
HEAD = {"llada": "model.transformer.ff_out.weight", "dream": "lm_head.weight"}
NEWLINE = "model.image_newline"
OWN_FIELDS = ("mm_pool", "prefix_attention", "drop_token_after_image", "budgets", "trained", "init_std", "emb_std")
"""What this project adds to config.json; a published file has none of it."""


def published(folder: Path, name: str, *, shards: bool = False) -> Path:
    """Rows beyond the tokenizer's, a vision layer too many, and a config.json without fields of this project."""
    family = FAMILY[name]
    lowres = {"image_aspect_ratio": None} if name == "lavida_lowres" else {}
    model = tiny_model(lm={"family": family}, **({"image_aspect_ratio": "resize"} if lowres else {}))
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text()) | lowres
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in OWN_FIELDS}))
    state = load_file(folder / SINGLE)
    for row in (EMBEDDING[family], HEAD[family]):
        state[row] = torch.cat([state[row], torch.full((7, state[row].shape[1]), 9.0)])
    for key in [key for key in state if ".encoder.layers.0." in key]:
        state[key.replace(".layers.0.", f".layers.{model.config.vision.num_hidden_layers - 1}.")] = state[key].clone()
    if not shards:
        save_file(state, folder / SINGLE)
        return folder
    (folder / SINGLE).unlink()
    halves = {f"model-0000{i + 1}-of-00002.safetensors": sorted(state)[i::2] for i in range(2)}
    for file, names in halves.items():
        save_file({key: state[key] for key in names}, folder / file)
    weight_map = {key: file for file, names in halves.items() for key in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two pictures with a question each."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i, size in enumerate(((40, 40), (100, 26))):
        picture(size).save(root / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "question": "digit red", "answers": ["7"]} for i in range(2)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


MORE = {
    "lavida_fim": ("decode=infill", "data.draft='a [MASK:2] b'", "decode.block_length=null"),
    "lavida_reason": ("experiment=reason", "decode.max_new_tokens=24"),
}


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", FAMILY)
def test_a_checkpoint_in_the_published_layout_answers(
    eval_here: Callable[..., Path], tmp_path: Path, questions: Path, name: str, shards: bool
) -> None:
    folder = published(tmp_path / "checkpoint", name, shards=shards)
    overrides = (*MORE.get(name, ()), f"model={name}", f"model.path={folder}", "selector=pooled", "dtype=float32")
    job = eval_here(*overrides, "data=folder", f"data.root={questions}", "data.max_new_tokens=12", "shots=0")
    rows: list[dict[str, Any]] = pq.read_table(job / "samples.parquet").to_pylist()
    # A view has 3 x 3 tokens, pooled 2 x 2; the second picture's canvas has three tiles, and a newline in each row.
    expected = {"lavida_lowres": [3 * 3 + 1] * 2}.get(name, [2 * 2 + 4 * (4 + 1), 2 * 2 + 2 * (6 + 1)])
    assert [row["n_visual"] for row in rows] == expected
    assert all(isinstance(row["prediction"], str) for row in rows)
    if name == "lavida_fim":
        assert all(row["text"].startswith("a ") and "b" in row["text"] for row in rows)
        assert all(len(row["gaps"]) == 1 for row in rows)
    if name == "lavida_reason":
        assert [row["has_final"] for row in rows] == [False, False], "random weights write no 'Answer:'"
    loaded = Lavida.from_pretrained(folder)
    assert loaded.config.lm.family == FAMILY[name]
    assert loaded.config.lm.vocab_size == len(loaded.tokenizer), "rows beyond the tokenizer's are cut off"


@pytest.mark.parametrize("name", ["lavida_lowres", "lavida_dream"])
def test_a_missing_newline_is_refused_in_one_sentence(
    name: str, tmp_path: Path, questions: Path, command: Callable[..., Any]
) -> None:
    folder = published(tmp_path / "checkpoint", name)
    save_file({k: v for k, v in load_file(folder / SINGLE).items() if k != NEWLINE}, folder / SINGLE)
    ended = command("eval", f"model={name}", f"model.path={folder}", "data=folder", f"data.root={questions}")
    assert ended.code == 1
    (line,) = (line for line in ended.err if line.startswith("error: "))
    assert f"1 missing: {NEWLINE}" in line
