"""An adapter's files: what is in them, what peft makes of them, and the one base that they belong to."""

import hashlib
import json
from pathlib import Path

import peft
import pytest
import torch
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file

from baselines import Pooled
from experiments.jobs.results import files_digest
from experiments.schema import CONF
from lavida_adapter import Lavida, LoraConfig, add_lora, load_adapter, merge_lora, save_adapter
from lavida_adapter.adapter_files import META, OLD_WEIGHTS, weights_file
from lavida_adapter.lora import rank_growth
from lavida_adapter.relevance import LmEmbed
from shirg import ShirgSelector, UserError
from tests.golden_data import golden_dir
from tests.lavida_adapter.test_lora import CONFIG, adapted, logits, train, trained_model
from tests.lavida_adapter.test_lora_growth import GROWING, growing
from tests.lavida_adapter.tiny import picture, tiny_model

WEIGHTS = CONF.parent / "weights/tiny"
CONVERTED = WEIGHTS / "adapters/shirg"
OLD = golden_dir("adapter_old")
"""The shipped adapter of shirg in the layout that it was written in."""
PEFT = {"adapter_config.json", "adapter_model.safetensors"}
COORDS = LoraConfig(
    rank=3,
    targets=("mm_projector.0", "transformer.blocks.*.q_proj", "selector.coords.linear"),
    ranks={"selector": 2},
    train_whole=("image_newline",),
)
"""With a layer of the selector, at a rank of its own."""


def with_coords() -> ShirgSelector:
    return ShirgSelector(budget=10, scaffold={"size": 2}, coord_embed="sincos_linear", coord_width=16)


@pytest.mark.parametrize(
    ("config", "names"),
    [(CONFIG, {META, *PEFT}), (LoraConfig(rank=0, train_whole=("mm_projector.0", "image_newline")), None)],
)
def test_an_adapter_survives_saving_and_loading(config: LoraConfig, names: set[str] | None, tmp_path: Path) -> None:
    model = trained_model(config, 2)
    folder = tmp_path / "adapter"
    for _ in range(2):  # in place of the one before it
        save_adapter(model, config, folder)
    again = tiny_model()
    assert load_adapter(again, str(folder)) == config
    assert torch.equal(logits(again), logits(model))
    stored = load_file(weights_file(folder))
    trained = {n.replace(".default", "") for n, p in model.named_parameters() if p.requires_grad}
    assert stored.keys() == {f"base_model.model.{name}" for name in trained}
    assert {p.name for p in folder.iterdir()} == (names or {META, "adapter_model.safetensors"})
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "safetensors lets nobody else read its files"


@pytest.mark.parametrize("ranks", [{}, {"transformer": 2, "vision_tower": 5}])
def test_peft_loads_the_same_weights(ranks: dict[str, int], tmp_path: Path) -> None:
    """By its own loader, onto a fresh model: LoRA of every part, and the newline vector that is trained in full."""
    config = LoraConfig(rank=3, alpha=4.0, targets=CONFIG.targets, train_whole=CONFIG.train_whole, ranks=ranks)
    model = trained_model(config)
    save_adapter(model, config, tmp_path)
    found = tiny_model()
    wrapped = peft.PeftModel.from_pretrained(found, str(tmp_path))
    for (name, ours), (same, theirs) in zip(model.named_parameters(), found.named_parameters(), strict=True):
        assert name == same and torch.equal(ours, theirs), name
    assert torch.equal(logits(found), logits(model)) and not torch.equal(logits(tiny_model()), logits(model))
    read = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(read, peft.LoraConfig) and (read.r, read.lora_alpha) == (3, 4.0)
    assert sorted(read.rank_pattern.values()) == [2] * 4 * bool(ranks) + [5] * 2 * bool(ranks)
    assert load_peft_weights(str(tmp_path)).keys() == peft.get_peft_model_state_dict(wrapped).keys() | {
        "base_model.model.model.image_newline"
    }


def test_an_adapter_of_the_layout_before_is_read_and_is_the_one_that_ships(tmp_path: Path) -> None:
    old, new = Lavida.from_pretrained(WEIGHTS), Lavida.from_pretrained(WEIGHTS)
    config = load_adapter(old, OLD)
    assert load_adapter(new, CONVERTED) == config
    for (name, p), (_, q) in zip(old.named_parameters(), new.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    # Saved again it is the shipped one, byte by byte, and the files of the old layout are gone.
    for file in OLD.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_adapter(old, config, tmp_path)
    for name in PEFT:
        assert (tmp_path / name).read_bytes() == (CONVERTED / name).read_bytes(), name
    assert not (tmp_path / OLD_WEIGHTS).exists()


def test_a_converted_adapter_keeps_its_digest_while_its_tensors_are_the_same(tmp_path: Path) -> None:
    before = hashlib.sha256((OLD / OLD_WEIGHTS).read_bytes()).hexdigest()[:16]
    assert files_digest(str(CONVERTED)) == files_digest(str(OLD)) == before
    for name in (META, "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((CONVERTED / name).read_bytes())
    assert files_digest(str(tmp_path)) == before
    changed = bytearray((tmp_path / "adapter_model.safetensors").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "adapter_model.safetensors").write_bytes(changed)
    assert files_digest(str(tmp_path)) == hashlib.sha256(changed).hexdigest()[:16] != before
    for broken in ("{", "[]", '{"converted": []}'):
        (tmp_path / META).write_text(broken)
        assert files_digest(str(tmp_path)) == hashlib.sha256(changed).hexdigest()[:16]


def test_an_adapter_belongs_to_its_base(tmp_path: Path) -> None:
    trained = trained_model()
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


def test_a_selectors_layer_is_kept_with_the_adapter(tmp_path: Path) -> None:
    model, selector = tiny_model(), with_coords()
    add_lora(model, COORDS, selector)
    with torch.no_grad():
        for parameter in (*model.parameters(), *selector.parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(model, COORDS, tmp_path, selector)
    again, other = tiny_model(), with_coords()
    assert load_adapter(again, tmp_path, other) == COORDS

    def embedded(model: Lavida, selector: ShirgSelector) -> torch.Tensor:
        with torch.no_grad():
            return model.encode([picture((40, 40))], ["digit red"], selector, relevance=LmEmbed()).embeds_BPD

    before = embedded(model, selector)
    assert torch.equal(embedded(again, other), before)
    merge_lora(again, other)
    torch.testing.assert_close(embedded(again, other), before, rtol=0, atol=1e-5)
    assert (embedded(tiny_model(), with_coords()) - before).abs().max() > 1e-2
    assert not [n for n, _ in other.named_parameters() if "lora" in n]
    for without in (None, Pooled(), ShirgSelector(budget=10)):
        with pytest.raises(ValueError, match=r"holds .*selector.coords.linear.lora_A.* a layer of a selector that"):
            load_adapter(tiny_model(), tmp_path, without)


def test_a_grown_adapter_is_saved_with_all_its_ranks(tmp_path: Path) -> None:
    model, _ = growing()
    train(model, 2)
    save_adapter(model, GROWING, tmp_path)
    again = tiny_model()
    assert load_adapter(again, tmp_path) == GROWING
    assert torch.equal(logits(again), logits(model))
    assert rank_growth(GROWING, again) is not None


def test_a_disk_without_space_keeps_the_adapter_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = trained_model(steps=1), trained_model(steps=2)
    save_adapter(first, CONFIG, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lavida_adapter.adapter_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(second, CONFIG, tmp_path)
    again = tiny_model()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(first))
    assert {path.name for path in tmp_path.iterdir()} == {META, *PEFT}


@pytest.fixture
def dream_adapter() -> tuple[Lavida, LoraConfig]:
    """A trained adapter of Dream, at a rank of its own in the language model."""
    targets = (*CONFIG.targets[:2], "transformer.layers.*.self_attn.{q_proj,o_proj}", "transformer.lm_head")
    config = LoraConfig(rank=3, targets=targets, ranks={"transformer": 2}, train_whole=("image_newline",))
    model = tiny_model(lm={"family": "dream"})
    add_lora(model, config)
    train(model, 2)
    return model, config


def test_an_adapter_of_dream_has_the_published_names(dream_adapter: tuple[Lavida, LoraConfig], tmp_path: Path) -> None:
    model, config = dream_adapter
    save_adapter(model, config, tmp_path)
    names = {name.removeprefix("base_model.model.") for name in load_file(weights_file(tmp_path))}
    assert {n for n in names if not n.startswith(("model.vision_tower.", "model.mm_projector."))} == {
        *(
            f"model.layers.{i}.self_attn.{leaf}.lora_{ab}.weight"
            for i in (0, 1)
            for leaf in ("q_proj", "o_proj")
            for ab in "AB"
        ),
        *("lm_head.lora_A.weight", "lm_head.lora_B.weight", "model.image_newline"),
    }
    again = tiny_model(lm={"family": "dream"})
    assert load_adapter(again, tmp_path) == config
    assert torch.equal(logits(again), logits(model))
    merge_lora(again)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_peft_loads_an_adapter_of_dream_on_the_published_modules(
    dream_adapter: tuple[Lavida, LoraConfig], tmp_path: Path
) -> None:
    """By its own loader, onto a tree of the published names that shares its modules with a fresh model."""
    model, config = dream_adapter
    save_adapter(model, config, tmp_path)
    found = tiny_model(lm={"family": "dream"})
    published = torch.nn.Module()
    published.config = {}  # type: ignore[assignment]  # peft looks for one
    published.model = torch.nn.Module()
    for name, part in found.model.transformer.named_children():
        (published if name == "lm_head" else published.model).add_module(name, part)
    for name in ("vision_tower", "mm_projector"):
        published.model.add_module(name, getattr(found.model, name))
    published.model.image_newline = found.model.image_newline
    peft.PeftModel.from_pretrained(published, str(tmp_path))  # type: ignore[arg-type]
    found.model.transformer.lm_head = published.lm_head  # the one module that peft replaced in the outer tree
    assert torch.equal(logits(found), logits(model)) and not torch.equal(
        logits(model), logits(tiny_model(lm={"family": "dream"}))
    )


def test_an_adapter_of_the_other_language_model(dream_adapter: tuple[Lavida, LoraConfig], tmp_path: Path) -> None:
    save_adapter(*dream_adapter, tmp_path / "dream")
    save_adapter(trained_model(), CONFIG, tmp_path / "llada")
    for folder, other, model in (
        ("dream", "llada", tiny_model()),
        ("llada", "dream", tiny_model(lm={"family": "dream"})),
    ):
        with pytest.raises(UserError) as error:
            load_adapter(model, tmp_path / folder)
        assert f"was trained on another language model, {folder}, and this one is {other}: load a" in str(error.value)
        assert adapted(model) == set()
    meta = json.loads((tmp_path / "llada" / META).read_text())
    assert meta.pop("family") == "llada"
    (tmp_path / "llada" / META).write_text(json.dumps(meta))  # as adapters were before there was a second one
    assert load_adapter(tiny_model(), tmp_path / "llada") == CONFIG


def test_adapters_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no adapter \(adapter.json and adapter_model.safetensors\)"):
        load_adapter(tiny_model(), tmp_path)
    save_adapter(trained_model(), CONFIG, tmp_path)
    path, meta = weights_file(tmp_path), (tmp_path / META).read_text()
    tensors = load_file(path)
    name = "base_model.model.model.image_newline"
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {name: torch.zeros(3)},
        tensors | {"base_model.model.more": torch.zeros(3)},
    ):
        save_file(wrong, path)
        with pytest.raises(UserError, match="are not those that its adapter.json describes"):
            load_adapter(tiny_model(), tmp_path)
    save_file(tensors, path)
    for broken in ("{", "[]", "{}", json.dumps(json.loads(meta) | {"lora": {"rang": 3}})):
        (tmp_path / META).write_text(broken)
        with pytest.raises(UserError, match="cannot be read .*: train it again"):
            load_adapter(tiny_model(), tmp_path)
    (tmp_path / META).write_text(meta)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read .*: train it again"):
        load_adapter(tiny_model(), tmp_path)
