"""Training of a relevance head: what a step sees against single forward passes, shards, resuming, a LoRA beside it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from baselines import Saint
from lavida_adapter import Lavida, LmEmbed, LoraConfig, ObjectiveConfig, TrainBatch, add_lora
from lavida_adapter.learned_relevance import Learned
from lavida_adapter.lightning_module import OptimConfig
from lavida_adapter.loss import answer_losses, rows_alone
from lavida_adapter.objective import SINGLE, Shard
from lavida_adapter.relevance_training import RelevanceTraining, Seen, SubsetConfig, membership, see, subset_loss
from shirg import Selection, ShirgSelector, Source
from shirg.subset_losses import answer_probabilities, mil_loss, regression_loss, subset_shares, subset_sums
from tests.lavida_adapter.tiny import tiny_model
from tests.lavida_adapter.training_runs import QUIET, draw, fit
from tests.refusals import assert_says, message_of

pytestmark = QUIET
WEIGHTS = {"similarity": 1.0, "neighbour": 0.0, "crop": 0.0}
OPTIM = OptimConfig(steps=6, lr=0.01, warmup=2)
OBJECTIVE = ObjectiveConfig(prefix_mask=True, extra_padding=0, answer_tokens=3)


def selector() -> ShirgSelector:
    return ShirgSelector(budget=9, weights=WEIGHTS, scaffold={"size": 2})


def module(loss: Any, lora: LoraConfig | None = None, seed: int = 7, **options: Any) -> RelevanceTraining:
    model = tiny_model()
    chosen, learned = selector(), Learned(base=LmEmbed())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.requires_grad_(False)
        if lora is not None:
            add_lora(model, lora, chosen)
        learned.fresh(model, {"hidden": 4})
    if loss != "straight_through":
        options["per_question"] = 3
    subsets = SubsetConfig(loss=loss, **options)
    return RelevanceTraining(model, chosen, learned, OBJECTIVE, OPTIM, seed, subsets=subsets)


def seen(model: Lavida, learned: Learned, batch: TrainBatch, tilt: float = 0.5, shard: Shard = SINGLE) -> list[Seen]:
    config = SubsetConfig(loss="joint", per_question=3)
    return see(model, batch, selector(), learned, config, tilt=tilt, seed=5, least=3, shard=shard)


def one(batch: TrainBatch, i: int) -> TrainBatch:
    parts: dict[str, Any] = {name: [getattr(batch, name)[i]] for name in ("images", "questions", "answers", "ids")}
    return TrainBatch(**parts)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_losses_are_those_of_the_subsets_one_by_one(family: str) -> None:
    model, batch = tiny_model(lm={"family": family}), draw(0)
    learned = Learned(base=LmEmbed())
    learned.fresh(model, {"hidden": 4})
    found = seen(model, learned, batch)
    by_question = {round(float(loss), 5) for part in found for loss in part.loss_BM.flatten()}
    assert len(found) == 2, "two canvases"
    alone: set[float] = set()
    for i in range(2):
        single = one(batch, i)
        (part,) = seen(model, learned, single, shard=Shard(i, 2))
        # Noise follows the place in the batch of all processes, so a process draws what one process would draw.
        same = next(p for p in found if p.member_BMN.shape == part.member_BMN.shape)
        assert torch.equal(part.member_BMN, same.member_BMN)
        assert part.member_BMN.sum(-1).tolist() == [[5, 5, 5]], "9 less a scaffold of 4"
        assert len({tuple(m.tolist()) for m in part.member_BMN[0]}) > 1, "subsets differ"
        alone |= {round(float(loss), 5) for loss in part.loss_BM.flatten()}
    assert sorted(alone) == pytest.approx(sorted(by_question), abs=2e-5)


def test_the_loss_of_a_row_is_minus_the_log_probability_of_its_answer() -> None:
    model, batch = tiny_model(drop_token_after_image=False), draw(0)
    with torch.no_grad():
        prefix = model.encode(batch.images, batch.questions, selector(), relevance=LmEmbed())
        blocks = [e[v] for e, v in zip(prefix.embeds_BPD, prefix.visual_BP, strict=True)]
        texts, labels = rows_alone(model, batch, least=3)
        found = answer_losses(model, texts, labels, blocks)
        for i, label in enumerate(labels):
            single = model.encode([batch.images[i]], [batch.questions[i]], selector(), relevance=LmEmbed())
            answer = [token for token in label if token >= 0]
            masked = model.lm.embedding(torch.full((1, len(answer)), model.config.lm.mask_token_id))
            cache = model.lm.prefill(single.embeds_BPD, single.padding, model.visual(single.visual_BP))
            log_p = model.lm.logits(model.lm.decode(masked, cache)).log_softmax(-1)[0]
            assert found[i].item() == pytest.approx(-sum(log_p[j, t].item() for j, t in enumerate(answer)), rel=1e-4)


def test_the_loss_of_a_question_does_not_depend_on_the_others_of_its_batch() -> None:
    """Its answer is padded for itself: not to the length that a longer neighbour needs."""
    model, batch = tiny_model(), draw(0)
    learned = Learned(base=LmEmbed())
    learned.fresh(model, {"hidden": 4})
    long = replace(batch, answers=[batch.answers[0], "blue red green one two K"])
    together = seen(model, learned, long)
    for i in range(2):
        (part,) = seen(model, learned, one(long, i), shard=Shard(i, 2))
        same = next(p for p in together if p.member_BMN.shape == part.member_BMN.shape)
        torch.testing.assert_close(same.loss_BM, part.loss_BM, rtol=0, atol=2e-5)


def test_membership_leaves_synthesised_and_unused_slots_out() -> None:
    source = [Source.SCAFFOLD, Source.KEPT, Source.KEPT, Source.KEPT]
    chosen = Selection(
        tokens_BTD=torch.zeros(1, 4, 2),
        mask_BT=torch.tensor([[True, True, True, False]]),
        index_BT=torch.tensor([[-1, 5, 2, 3]]),
        source_BT=torch.tensor([source]),
        box_BT4=torch.zeros(1, 4, 4),
    )
    assert membership(chosen, 7).nonzero()[:, 0].tolist() == [2, 5]


def test_a_selector_that_merges_is_refused() -> None:
    """A merged token is in the prefix, and none of its parts is in or out."""
    model, learned = tiny_model(), Learned(base=LmEmbed())
    learned.fresh(model, {"hidden": 4})
    merging = ShirgSelector(budget=9, weights=WEIGHTS, scaffold={"size": 2}, merge={"mode": "tome", "share": 0.5})
    given = (model, draw(0), merging, learned, SubsetConfig(loss="joint"))
    run = partial(see, *given, tilt=0.0, seed=5, least=3, shard=SINGLE)
    assert_says(message_of(run), "stage=gate needs tokens that are in or out, and ShirgSelector merges some")


def test_objectives_are_sums_of_their_parts() -> None:
    stage = module("joint")
    part = seen(stage.model, stage.learned, draw(0))[0]
    assert stage.odds is not None
    shares = subset_shares(part.score_BN, part.member_BMN, part.competing_BN)
    p_BM = answer_probabilities(shares, stage.odds(part.asked_BW))
    mil, of_logs = mil_loss(p_BM, part.loss_BM), regression_loss(p_BM.log(), part.loss_BM)
    sums = regression_loss(subset_sums(part.score_BN, part.member_BMN), part.loss_BM)
    for loss, expected in (("subset_mil", mil), ("subset_regression", sums), ("joint", mil + 0.2 * of_logs)):
        odds = None if loss == "subset_regression" else stage.odds
        assert subset_loss(part, SubsetConfig(loss=loss), odds).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["subset_regression", "subset_mil", "joint"])
def test_autocast_does_not_reach_the_loss_of_the_head(loss: str) -> None:
    """With a bfloat16 base it runs under autocast, where CUDA refuses a cross entropy of probabilities."""
    stage = module(loss)
    part, config = seen(stage.model, stage.learned, draw(0))[0], SubsetConfig(loss=loss)
    if stage.odds is not None:
        stage.odds.linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    expected = subset_loss(part, config, stage.odds)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(subset_loss(part, config, stage.odds), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("loss", ["subset_regression", "subset_mil", "joint", "straight_through"])
def test_a_head_learns_beside_a_bfloat16_base(loss: str, device: str) -> None:
    """Its own numbers stay float32; under autocast no operation may be refused, which CUDA does and CPUs do not."""
    stage = module(loss)
    stage.model.to(device, torch.bfloat16)
    stage.relevance_head.to(device)
    if stage.odds is not None:
        stage.odds.to(device)
    before = stage.relevance_head.match_DW.detach().clone()
    step = torch.optim.SGD(stage.relevance_head.parameters(), lr=0.1)
    found = stage.loss(draw(0), torch.Generator().manual_seed(0))
    found.backward()
    step.step()
    assert found.dtype == torch.float32 and bool(found.isfinite())
    assert bool(stage.relevance_head.match_DW.isfinite().all())
    assert not torch.equal(stage.relevance_head.match_DW, before)


@pytest.mark.parametrize("loss", ["subset_regression", "subset_mil", "joint", "straight_through"])
def test_a_resumed_run_ends_as_an_undisturbed_one(loss: str, tmp_path: Path) -> None:
    whole = module(loss)
    before = {name: p.detach().clone() for name, p in whole.relevance_head.named_parameters()}
    losses = fit(whole, 6)
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=3)
    first = module(loss)
    fit(first, 3, callbacks=[saver], enable_checkpointing=True)
    resumed = module(loss)
    assert fit(resumed, 6, resume=tmp_path / "last.ckpt") == losses[3:]
    for name, p in whole.relevance_head.named_parameters():
        assert torch.equal(p, dict(resumed.relevance_head.named_parameters())[name]), name
        assert not torch.equal(p, before[name]), f"{name} has not learned"
    assert not any(p.requires_grad for p in whole.model.parameters())


def test_a_lora_beside_the_head_learns_too() -> None:
    stage = module("joint", LoraConfig(rank=2, targets=("mm_projector.0",)))
    before = {n: p.detach().clone() for n, p in stage.named_parameters() if p.requires_grad}
    assert {n.partition(".")[0] for n in before} == {"model", "relevance_head", "odds"} and stage.adapts
    fit(stage, 3)
    for name, p in stage.named_parameters():
        if name in before and not name.endswith("lora_A.default.weight"):
            assert not torch.equal(p, before[name]), name


def test_the_tilt_begins_after_the_exploration() -> None:
    config = SubsetConfig(loss="joint", explore=0.2, tilt=0.5)
    assert [config.tilt_at(done) for done in (0.0, 0.2, 0.6, 1.0)] == pytest.approx([0.0, 0.0, 0.25, 0.5])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"loss": "joints"}, "objective.subsets.loss='joints': choose one of subset_regression"),
        ({"per_question": 1}, "per_question=1: give 2 to 64"),
        ({"explore": 1.5}, "explore=1.5: give a share"),
        ({"tilt": float("nan")}, "tilt=nan: give a number >= 0"),
        ({"softness": 0.0}, "softness=0.0: give a number above 0"),
        ({"softness": 0.3}, "softness has no effect with objective=joint: leave it at its default"),
        ({"loss": "subset_mil", "regression": 0.3}, "regression has no effect with objective=subset_mil"),
        ({"loss": "straight_through", "per_question": 8}, "per_question has no effect with objective=straight_through"),
    ],
)
def test_refusals(wrong: dict[str, Any], said: str) -> None:
    assert_says(message_of(partial(SubsetConfig, **{"loss": "joint", **wrong})), said)


def test_a_selector_that_ranks_by_no_relevance_is_refused() -> None:
    model, learned = tiny_model(), Learned()
    learned.fresh(model, {"hidden": 4})
    build = partial(
        RelevanceTraining, model, Saint(budget=9), learned, OBJECTIVE, OPTIM, 0, subsets=SubsetConfig(loss="joint")
    )
    assert_says(message_of(build), "stage=gate trains a relevance, and Saint ranks by none")
