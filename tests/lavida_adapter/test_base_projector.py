"""`relevance.projector=base`: tokens are ranked through the projector from before an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from baselines import Pooled
from lavida_adapter import Lavida, LmEmbed, LoraConfig, ObjectiveConfig, TrainBatch, add_lora, load_adapter, merge_lora
from lavida_adapter.checkpoint import fingerprint
from lavida_adapter.lightning_module import LavidaModule, OptimConfig
from lavida_adapter.lora import lora_layers
from lavida_adapter.relevance import Projector
from shirg import Selection, ShirgSelector, VisionFeatures
from tests.lavida_adapter.tiny import picture, tiny_model

PROJECTOR = LoraConfig(rank=2, targets=("mm_projector.{0,2}", "transformer.blocks.*.q_proj"))
BESIDE = LoraConfig(rank=2, targets=("transformer.blocks.*.q_proj",))
IMAGES = [picture((40, 40)), picture((38, 38)), picture((30, 22))]
ASKED = [IMAGES[i] for i in (0, 1, 0, 2)]
QUESTIONS = ["digit red", "letter K", "digit blue", "letter red"]
SHIPPED = Path(__file__).resolve().parents[2] / "weights/tiny"


class Watching(Pooled):
    """Remembers what it could have ranked by."""

    uses_relevance = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}

    def select(self, features: VisionFeatures) -> Selection:
        assert features.relevance_BN is not None
        self.seen |= zip(features.ids, features.relevance_BN, strict=True)
        return super().select(features)


def found(model: Lavida, projector: Projector) -> tuple[list[Tensor], Tensor]:
    """The relevance of each prompt's tokens, and the prefix."""
    selector = Watching()
    with torch.no_grad():
        prefix = model.encode(ASKED, QUESTIONS, selector, relevance=LmEmbed(projector=projector))
    return [selector.seen[str(i)] for i in range(len(ASKED))], prefix.embeds_BPD


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def with_lora(config: LoraConfig) -> Lavida:
    model = tiny_model()
    add_lora(model, config)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    return model


def test_where_no_adapter_changes_the_projector_both_are_one() -> None:
    for model in (tiny_model(), with_lora(BESIDE)):
        assert model.base_projector is model.model.mm_projector
        base, adapted = found(model, "base"), found(model, "adapted")
        assert equal(base[0], adapted[0]) and torch.equal(base[1], adapted[1])


def test_relevance_is_that_of_the_model_without_an_adapter() -> None:
    """Before the adapter is merged and after; a second adapter does not change what the base is."""
    bare, _ = found(tiny_model(), "adapted")
    model = with_lora(PROJECTOR)
    for merged in (False, True):
        if merged:
            merge_lora(model)
        (base, prefix), (adapted, same_prefix) = found(model, "base"), found(model, "adapted")
        assert equal(base, bare) and torch.equal(prefix, same_prefix)
        assert all(not torch.allclose(a, b, atol=0.01) for a, b in zip(base, adapted, strict=True))
    add_lora(model, PROJECTOR)
    assert equal(found(model, "base")[0], bare)


def test_a_projector_that_is_trained_whole_has_a_base_too() -> None:
    model = tiny_model()
    bare, _ = found(model, "adapted")
    add_lora(model, LoraConfig(rank=0, train_whole=("mm_projector",)))
    with torch.no_grad():
        for parameter in model.model.mm_projector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert equal(found(model, "base")[0], bare) and not equal(found(model, "adapted")[0], bare)


def test_the_copy_is_no_part_of_the_model_and_moves_with_it() -> None:
    model, plain = tiny_model(), tiny_model()
    add_lora(model, PROJECTOR)
    merge_lora(model)  # of zeros
    assert model.state_dict().keys() == plain.state_dict().keys() and fingerprint(model) == fingerprint(plain)
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.base_projector.parameters()} == {torch.bfloat16}
    assert found(model, "base")[0][0].dtype == torch.float32


class Stages:
    """A timer that remembers which stage ran, and whether the base's projector ran in it."""

    def __init__(self) -> None:
        self.running, self.names = "", list[str]()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.running = name
        self.names.append(name)
        yield
        self.running = ""


def test_each_picture_is_projected_once_and_that_counts_as_projecting() -> None:
    """Four prompts are about three pictures of one layout."""
    model, timer = with_lora(PROJECTOR), Stages()
    calls: list[tuple[str, int]] = []
    model.base_projector.register_forward_hook(lambda _, given, __: calls.append((timer.running, len(given[0]))))
    with torch.no_grad():
        model.encode(ASKED, QUESTIONS, Watching(), relevance=LmEmbed(projector="base"), timer=timer)
    assert calls == [("project", 3)]
    assert timer.names[2:5] == ["relevance", "project", "relevance"]


def test_training_leaves_the_copy_alone() -> None:
    model, selector = tiny_model(), ShirgSelector(budget=12, scaffold={"size": 0})
    bare, _ = found(model, "adapted")
    add_lora(model, PROJECTOR, selector)
    module = LavidaModule(
        model, selector, LmEmbed(projector="base"), ObjectiveConfig(), OptimConfig(steps=4, lr=0.1), seed=0
    )
    optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index]  # a dict here
    batch = TrainBatch(
        ids=("a", "b"), images=[ASKED[0], ASKED[3]], questions=QUESTIONS[:2], prompts=QUESTIONS[:2], answers=["7", "K"]
    )
    for step in range(3):
        optimizer.zero_grad()
        module.loss(batch, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in model.base_projector.parameters())
    assert equal(found(model, "base")[0], bare) and not equal(found(model, "adapted")[0], bare)


def test_the_shipped_adapter() -> None:
    """It changes the tower as well, which runs once: its states are ranked, through the projector of the base."""
    bare, model = (Lavida.from_pretrained(SHIPPED) for _ in range(2))
    load_adapter(model, SHIPPED / "adapters/shirg")
    merge_lora(model)
    (base, prefix), (adapted, same_prefix) = found(model, "base"), found(model, "adapted")
    assert torch.equal(prefix, same_prefix) and not equal(base, adapted)
    model.model.mm_projector = bare.model.mm_projector
    assert equal(found(model, "adapted")[0], base)


def test_other_projectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"relevance.projector='none': choose one of base, adapted"):
        LmEmbed(projector="none")  # type: ignore[arg-type]
