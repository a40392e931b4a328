"""Checkpoints that load: round trips, what is tolerated, and nothing that runs."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file

from baselines import Pooled
from lavida_adapter import DecodeConfig, Lavida, checkpoint, checkpoint_files
from lavida_adapter.checkpoint import fingerprint
from lavida_adapter.checkpoint_files import INDEX, SINGLE
from tests.lavida_adapter.tiny import picture, tiny_model

WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
ROWS = {"llada": (WTE, HEAD), "dream": ("model.embed_tokens.weight", "lm_head.weight")}
"""Embedding and head of each language model."""
TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> Lavida:
    """On each language model: what a file keeps must not depend on it."""
    return tiny_model(lm={"family": request.param})


def again(model: Lavida, seed: int = 0) -> Lavida:
    """A fresh model of the same kind."""
    return tiny_model(seed, lm={"family": model.config.lm.family})


@pytest.fixture
def folder(model: Lavida, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same(one: Lavida, other: Lavida) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of a single-file checkpoint."""
    state = load_file(folder / SINGLE) | {name: t for name, t in tensors.items() if t is not None}
    save_file({name: t for name, t in state.items() if tensors.get(name, t) is not None}, folder / SINGLE)


def edit_config(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | fields))


def test_round_trip_is_bit_equal(model: Lavida, folder: Path) -> None:
    loaded = Lavida.from_pretrained(folder)
    assert same(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert fingerprint(loaded) == fingerprint(model)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    images, questions = [picture((40, 40))], ["digit red <|eot_id|> naïve?"]
    out = [m.generate(m.encode(images, questions, Pooled()), DecodeConfig(max_new_tokens=5)) for m in (loaded, model)]
    assert torch.equal(out[0].ids_BA, out[1].ids_BA)
    assert out[0].texts == out[1].texts


def layer_names(start: str, leaves: str) -> set[str]:
    return {f"{start}.{i}.{leaf}" for i in range(2) for leaf in leaves.split()}


def test_the_published_names(model: Lavida, folder: Path) -> None:
    """All of them, as docs/lavida.md has them."""
    layers = {
        "llada": layer_names(
            "model.transformer.blocks",
            "attn_norm.weight ff_norm.weight q_proj.weight k_proj.weight v_proj.weight attn_out.weight ff_proj.weight "
            "up_proj.weight ff_out.weight",
        )
        | {"model.transformer.ln_f.weight"},
        "dream": layer_names(
            "model.layers",
            "input_layernorm.weight post_attention_layernorm.weight self_attn.q_proj.weight self_attn.q_proj.bias "
            "self_attn.k_proj.weight self_attn.k_proj.bias self_attn.v_proj.weight self_attn.v_proj.bias "
            "self_attn.o_proj.weight mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight",
        )
        | {"model.norm.weight"},
    }
    linears = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj layer_norm1 layer_norm2"
    leaves = " ".join(f"{leaf}.{kind}" for leaf in f"{linears} mlp.fc1 mlp.fc2".split() for kind in ("weight", "bias"))
    ends = "patch_embedding.weight patch_embedding.bias position_embedding.weight".split()
    rest = {"model.image_newline", f"{TOWER}post_layernorm.weight", f"{TOWER}post_layernorm.bias"}
    rest |= {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    rest |= {f"{TOWER}embeddings.{end}" for end in ends} | layer_names(f"{TOWER}encoder.layers", leaves)
    family = model.config.lm.family
    assert set(load_file(folder / SINGLE)) == layers[family] | set(ROWS[family]) | rest


def test_shards(model: Lavida, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size=20_000)
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert (folder / INDEX).exists()
    assert not (folder / SINGLE).exists()
    assert same(Lavida.from_pretrained(folder), model)
    # The other way round: one file in the place of many leaves no shard and no index behind.
    model.save_pretrained(folder)
    assert [p.name for p in folder.glob("model*")] == [SINGLE]
    assert same(Lavida.from_pretrained(folder), model)


def test_an_index_written_by_hand(model: Lavida, folder: Path) -> None:
    """Any split of the tensors over files will do."""
    state = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(state)
    files = {f"part-{i}.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(index))
    assert same(Lavida.from_pretrained(folder), model)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(model: Lavida, tmp_path: Path, asked: Any, expected: torch.dtype) -> None:
    again(model).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = Lavida.from_pretrained(tmp_path / "half", dtype=asked)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert loaded.dtype == expected
    expected_newline = model.model.image_newline.to(torch.bfloat16).to(expected)
    assert torch.equal(loaded.model.image_newline, expected_newline)
    assert fingerprint(loaded) == fingerprint(again(model).to(torch.bfloat16))
    prefix = loaded.encode([picture((40, 40))], ["x"], Pooled())
    assert loaded.generate(prefix, DecodeConfig(max_new_tokens=2)).ids_BA.shape == (1, 2)


def test_the_device_is_where_every_tensor_goes(folder: Path) -> None:
    """On the meta device nothing can be left behind: every parameter and buffer must have been put there."""
    with pytest.raises(RuntimeError, match="tensors without memory after loading"):
        Lavida.from_pretrained(folder, device="meta")
    loaded = Lavida.from_pretrained(folder, device="cpu")
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    positions = loaded.model.vision_tower.vision_tower.vision_model.embeddings.position_ids
    assert positions.tolist() == [list(range(9))]


@pytest.mark.gpu
def test_cuda(folder: Path) -> None:
    loaded = Lavida.from_pretrained(folder, device="cuda", dtype="bfloat16")
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    prefix = loaded.encode([picture((40, 40))], ["x"], Pooled())
    assert loaded.generate(prefix, DecodeConfig(max_new_tokens=2)).ids_BA.device.type == "cuda"


def test_surplus_rows_of_the_vocabulary_are_cut(model: Lavida, folder: Path) -> None:
    state = load_file(folder / SINGLE)
    names = ROWS[model.config.lm.family]
    longer = {name: torch.cat([state[name], torch.full((5 + i, 32), 99.0)]) for i, name in enumerate(names)}
    rewrite(folder, **longer)
    edit_config(folder, vocab_size=len(model.tokenizer) + 5, embedding_size=len(model.tokenizer) + 5)
    loaded = Lavida.from_pretrained(folder)
    assert same(loaded, model)
    assert loaded.config.lm.vocab_size == len(model.tokenizer)
    loaded.save_pretrained(folder)  # and what was cut off is not in the file
    assert len(load_file(folder / SINGLE)[names[0]]) == len(model.tokenizer)
    assert same(Lavida.from_pretrained(folder), model)


def test_a_further_layer_a_head_and_position_ids_are_ignored(model: Lavida, folder: Path) -> None:
    state = load_file(folder / SINGLE)
    last = {name: tensor for name, tensor in state.items() if name.startswith(f"{TOWER}encoder.layers.1.")}
    layer = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in last.items()}
    assert len(layer) == 16
    head = {f"{TOWER}head.probe": torch.ones(1, 1, 16), f"{TOWER}head.attention.in_proj_weight": torch.ones(48, 16)}
    rewrite(folder, **layer, **head, **{f"{TOWER}embeddings.position_ids": torch.arange(9)[None]})
    assert same(Lavida.from_pretrained(folder), model)


def test_a_missing_final_norm_is_made_up(model: Lavida, folder: Path) -> None:
    rewrite(folder, **{f"{TOWER}post_layernorm.weight": None, f"{TOWER}post_layernorm.bias": None})
    assert same(Lavida.from_pretrained(folder, device="cpu"), model)


def test_no_code_of_a_checkpoint_is_run(model: Lavida, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto_map, a tokenizer class of its own and Python files in the folder are ignored."""
    evil = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\nclass Model: pass\nclass Tokens: pass\n"
    (folder / "modeling_evil.py").write_text(evil)
    edit_config(folder, auto_map={"AutoConfig": "modeling_evil.Model", "AutoModel": "modeling_evil.Model"})
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"auto_map": {"AutoTokenizer": ["modeling_evil.Tokens"] * 2}, "tokenizer_class": "Tokens"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    monkeypatch.chdir(folder)
    assert same(Lavida.from_pretrained(folder), model)
    assert not list(folder.glob("*.ran"))


def test_every_tensor_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    real = checkpoint.open_tensors

    def counted(name: str, part: Any) -> Any:
        mock = MagicMock(wraps=part)
        mock.__getitem__.side_effect = lambda index: (reads.append(name), part[index])[1]
        return mock

    @contextmanager
    def opened(path: Path) -> Iterator[Any]:
        with real(path) as file:
            yield SimpleNamespace(keys=file.keys, get_slice=lambda name: counted(name, file.get_slice(name)))

    monkeypatch.setattr(checkpoint, "open_tensors", opened)
    Lavida.from_pretrained(folder)
    assert sorted(reads) == sorted(load_file(folder / SINGLE))


@pytest.fixture
def other(model: Lavida) -> Lavida:
    return again(model, seed=1)


@pytest.mark.parametrize("broken", ["tokenizer", "weights"])
def test_an_interrupted_save_leaves_the_old_checkpoint(
    model: Lavida, other: Lavida, folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    if broken == "tokenizer":
        monkeypatch.setattr(type(other.tokenizer), "save_pretrained", fail)
    else:
        monkeypatch.setattr(checkpoint, "save_torch_state_dict", fail)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert same(Lavida.from_pretrained(folder), model)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_saved_files_are_as_readable_as_others_and_a_killed_save_is_cleared(model: Lavida, tmp_path: Path) -> None:
    left = tmp_path / "mine/.saving-abc"
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    before = os.umask(0o007)
    try:
        model.save_pretrained(tmp_path / "mine")
    finally:
        os.umask(before)
    assert not left.exists()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "mine").iterdir()} == {0o660}


def test_a_full_disk_is_an_error_of_the_system(model: Lavida, tmp_path: Path) -> None:
    """safetensors has an error of its own for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            model.save_pretrained(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "full"))
    assert list((tmp_path / "full").iterdir()) == []


def test_a_new_save_replaces_the_old_one_and_keeps_other_files(other: Lavida, folder: Path) -> None:
    (folder / "training.json").write_text("{}")
    other.save_pretrained(str(folder))
    assert same(Lavida.from_pretrained(str(folder)), other)
    assert (folder / "training.json").read_text() == "{}"


def test_the_fingerprint_tells_bases_apart(model: Lavida, other: Lavida) -> None:
    assert fingerprint(model) == fingerprint(again(model))
    assert fingerprint(model) != fingerprint(other)
    changed = again(model)
    with torch.no_grad():
        changed.model.image_newline[3] += 0.1
    assert fingerprint(changed) != fingerprint(model)
    assert fingerprint(changed, skip=("model.image_newline",)) == fingerprint(model, skip=("model.image_newline",))


def test_a_hub_id_is_downloaded_without_pickles(
    model: Lavida, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(shutil.copytree(folder, tmp_path / "hub", dirs_exist_ok=True))

    monkeypatch.setattr(checkpoint_files, "snapshot_download", download)
    assert same(Lavida.from_pretrained("somebody/lavida"), model)
    assert same(Lavida.from_pretrained("somebody/lavida", revision="1a2b3c"), model)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    assert asked == [("somebody/lavida", None, patterns), ("somebody/lavida", "1a2b3c", patterns)]


@pytest.mark.slow
def test_loading_needs_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    """Peak resident memory of loading about 100 MB, against the same process before it."""
    big = tiny_model(lm={"d_model": 512, "mlp_hidden_size": 2048, "n_layers": 6})
    size = sum(p.numel() * p.element_size() for p in big.parameters())
    assert size > 90e6
    big.save_pretrained(tmp_path / "big")
    script = (
        "import resource, sys\n"
        "from lavida_adapter import Lavida\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = Lavida.from_pretrained(sys.argv[1])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "big")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 1.4 * size + 50e6


def test_changes_of_the_config_are_obeyed(model: Lavida, folder: Path) -> None:
    theta = {"rope_theta": 7.0, "rms_norm_eps": 0.25}
    drop = not model.config.drop_token_after_image
    edit_config(folder, prefix_attention="image_first", drop_token_after_image=drop, **theta)
    loaded = Lavida.from_pretrained(folder)
    expected = replace(model.config, prefix_attention="image_first", drop_token_after_image=drop)
    assert loaded.config == replace(expected, lm=replace(model.config.lm, **theta))
    assert loaded.lm.layers[0].attention_norm.eps == 0.25


def test_a_newline_vector_is_optional_where_pictures_have_no_rows(model: Lavida, folder: Path) -> None:
    rewrite(folder, **{"model.image_newline": None})
    edit_config(folder, mm_patch_merge_type="flat")
    loaded = Lavida.from_pretrained(folder)
    assert loaded.model.image_newline.tolist() == [0.0] * 32
    assert torch.equal(loaded.lm.embedding.weight, model.lm.embedding.weight)
