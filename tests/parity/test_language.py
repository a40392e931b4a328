"""Language model, cache, generation, schedules and training loss against the reference's numbers."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import lavida_adapter.loss as lavida_loss
from baselines import Pooled
from lavida_adapter import DecodeConfig, ObjectiveConfig, Prefix, TrainBatch
from lavida_adapter.language_model import rotate
from lavida_adapter.lightning_module import LavidaModule, OptimConfig
from lavida_adapter.loss import states_of_copies
from lavida_adapter.objective import Shard, mask_probability, masked_cross_entropy, masked_targets, pad_answers
from lavida_adapter.prefix import splice
from lavida_adapter.prompt import IGNORE, Example
from lavida_adapter.schedules import tokens_per_step
from tests.parity.conftest import Golden
from tests.parity.test_vision import picture_blocks


@torch.no_grad()
def test_logits_and_hidden_states(golden: Golden, close) -> None:
    saved, lm = golden.tensors("lm_forward"), golden.model.lm
    hidden: list[torch.Tensor] = []
    states = lm(lm.embedding(saved["input_ids"]), hidden=hidden)
    for i, state in enumerate(hidden):
        close("LM hidden states", state, saved[f"hidden_{i}"], 1e-3)
    close("LM logits", lm.logits(states), saved["logits"], 1e-3)


@torch.no_grad()
def test_cache_and_cached_logits(golden: Golden, close) -> None:
    saved, lm = golden.tensors("prefix_cache"), golden.model.lm
    prefix, suffix = saved["prefix_embeds"], lm.embedding(saved["suffix_ids"])
    close("prefix logits", lm.logits(lm(prefix)), saved["prefix_logits"], 1e-3)
    cache = lm.prefill(prefix)
    cos, sin = lm.angles(torch.arange(prefix.shape[1])[None])
    for i, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
        # LLaDA's reference stores keys before they are rotated, Dream's stores both.
        unrotated = saved.get(f"past_key_before_rope_{i}", saved[f"past_key_{i}"])
        close("cached keys (rotated)", key, rotate(unrotated, cos, sin), 1e-4)
        if f"past_key_before_rope_{i}" in saved:
            close("cached keys", key, saved[f"past_key_{i}"], 1e-4)
        close("cached values", value, saved[f"past_value_{i}"], 1e-4)
    before = cache.digest()
    close("cached logits", lm.logits(lm.decode(suffix, cache)), saved["suffix_logits_cached"], 1e-3)
    assert cache.digest() == before
    whole = lm.logits(lm(torch.cat([prefix, suffix], dim=1)))
    close("uncached logits", whole[:, prefix.shape[1] :], saved["full_logits_nocache"], 1e-3)
    dense = torch.cat([lm.logits(lm(prefix)), lm.logits(lm.decode(suffix, cache))], dim=1)
    close("dense prefix mask", dense, saved["dense_prefix_mask_logits"], 1e-3)


def test_schedules(golden: Golden, equal) -> None:
    for case in golden.json("schedules"):
        shift = 3.0 if case["shift"] is None else case["shift"]
        ours = tokens_per_step(case["mask_count"], case["steps"], case["schedule"] or "none", shift)
        equal("schedules", ours, case["tokens_per_step"])


def decode_config(call: dict[str, Any]) -> DecodeConfig:
    """The reference's keyword arguments as ours; it ignores `steps`, and its shift defaults to 3."""
    return DecodeConfig(
        max_new_tokens=call["max_new_tokens"],
        block_length=call["block_length"],
        step_ratio=call.get("step_ratio"),
        step_per_block=call.get("step_per_block"),
        schedule=call.get("schedule") or "none",
        shift=call.get("schedule_kwargs", {}).get("shift", 3.0),
        remasking={"entrophy": "entropy"}.get(call.get("remasking", ""), call.get("remasking", "low_confidence")),
        temperature=call.get("temperature", 0),
        prefix_cache=call["prefix_lm"],
        allow_mask_token=True,
        keep_history=True,
    )


def check_run(run: dict[str, Any], out, equal, family: str, prompt: int) -> None:
    """Ids after every step; the reference's full mode carries the prompt's slots in front, as id 0."""
    history = [state.tolist() for state in out.history]
    theirs = run["history"]
    if not run.get("e2e") and not run["call"]["prefix_lm"]:
        theirs = [[row[prompt:] for row in state] for state in theirs]
    output = [row[-out.ids_BA.shape[1] :] for row in run["output"]]
    equal(family, history, theirs)
    equal(family, out.ids_BA.tolist(), output)
    equal(f"{family}, forwards", out.forwards, run["n_forward_excluding_prefill"])


def test_generation_histories(llada: Golden, equal) -> None:
    inputs = llada.tensors("generate_inputs")
    runs = [run for run in llada.json("generate") if not run.get("e2e")]
    assert runs
    for run in runs:
        call = run["call"]
        embeds = inputs[f"prompt_embeds_B{call.get('batch', 1)}"]
        ones = torch.ones(embeds.shape[:2], dtype=torch.bool)
        out = llada.model.generate(
            Prefix(embeds, ones, ~ones),
            decode_config(call),
            drafts=[call["draft_tokens"]] * len(embeds) if "draft_tokens" in call else (),
            generator=torch.Generator().manual_seed(call.get("torch_seed", 0)),
        )
        check_run(run, out, equal, "generation histories", embeds.shape[1])


@torch.no_grad()
def test_end_to_end_picture_to_answer(llada: Golden, equal, close) -> None:
    ids = llada.json("facts")["prompt_input_ids"]
    blocks = picture_blocks(llada, [llada.image("e2e.png")])
    lm = llada.model.lm
    prefix, _ = splice([ids], blocks, lm.embedding, max_length=10**6)
    runs = [run for run in llada.json("generate") if run.get("e2e")]
    assert runs
    for run in runs:
        cached = run["call"]["prefix_lm"]
        config = decode_config(run["call"])
        masks = lm.embedding(torch.full((1, config.max_new_tokens), llada.ids["mask"]))
        states = lm.decode(masks, llada.model.prefill(prefix)) if cached else llada.model.forward_whole(prefix, masks)
        saved = llada.tensors(f"e2e_logits_{'prefix' if cached else 'full'}")["first_step_logits"]
        close("end to end, first logits", lm.logits(states), saved, 1e-3)
        check_run(run, llada.model.generate(prefix, config), equal, "end to end, ids", prefix.embeds_BPD.shape[1])


@torch.no_grad()
def test_training_masks_labels_and_loss(llada: Golden, equal, close) -> None:
    saved, facts, lm = llada.tensors("train_loss"), llada.json("facts")["facts"]["train"], llada.model.lm
    eos, behind = llada.ids["eos"], saved["u_after_image"].shape[1]
    rows, labels = training_rows(saved, eos)
    extra = saved["input_ids"].shape[1] - max(map(len, rows))
    padded, padded_labels = pad_answers(*split_rows(rows, labels), eos=eos, extra=extra)
    equal("training rows", padded, saved["input_ids"].tolist())

    blocks = picture_blocks(llada, [llada.image(f"images/{facts['image']}")]) * len(padded)
    whole, labels_BL = splice(padded, blocks, lm.embedding, max_length=10**6, labels=padded_labels)
    b, length = labels_BL.shape
    u_BL = torch.ones(b, length)
    u_BL[:, length - behind :] = saved["u_after_image"]
    close("masking probability", mask_probability(saved["t"]), saved["p_mask"][:, 0], 1e-6)
    masked, complement = masked_targets(labels_BL != IGNORE, saved["t"], u_BL, saved["u_min"])
    copies = torch.cat([masked, complement])
    equal("training masks", copies[:, -behind:].long().tolist(), saved["masked_after_image"].long().tolist())
    kept = labels_BL.repeat(2, 1).masked_fill(~copies, IGNORE)
    equal("training labels", kept[:, -behind:].tolist(), saved["labels_after_image"].tolist())
    states = states_of_copies(llada.model, whole, labels_BL, copies, prefix_mask=False)
    close("training logits", lm.logits(states[:, -behind:]), saved["logits_after_image"], 1e-3)
    loss = masked_cross_entropy(lm.logits(states[copies]), kept[copies])
    close("training loss", loss[None], saved["loss"], 1e-4)


@dataclass(frozen=True)
class Replay(Shard):
    """The fixture's draws in place of fresh ones."""

    t_B: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    u_BL: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def rows(self, drawn_G: torch.Tensor) -> torch.Tensor:
        found = self.t_B if drawn_G.dim() == 1 else self.u_BL
        assert found.shape == drawn_G.shape
        return found


@torch.no_grad()
def test_training_loss_through_the_module(llada: Golden, close, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in, loss out: only the text's ids and the draws are the fixture's."""
    saved, facts = llada.tensors("train_loss"), llada.json("facts")["facts"]["train"]
    rows, labels = training_rows(saved, llada.ids["eos"])
    prompts, answers = split_rows(rows, labels)
    b, image = len(rows), llada.image(f"images/{facts['image']}")
    ids = [str(i) for i in range(b)]
    monkeypatch.setattr(
        lavida_loss, "training_example", lambda _, i, *__, **___: Example(prompts[int(i)], answers[int(i)])
    )
    extra = saved["input_ids"].shape[1] - max(map(len, rows))
    monkeypatch.setattr(lavida_loss, "extra_padding", lambda *_: extra)
    (block,) = picture_blocks(llada, [image])
    u_BL = torch.ones(b, saved["input_ids"].shape[1] - 1 + len(block))
    u_BL[:, -saved["u_after_image"].shape[1] :] = saved["u_after_image"]
    u_BL[:, 0] = saved["u_min"]  # a prompt token, so that it is the row's smallest and no target
    monkeypatch.setattr(Shard, "here", lambda: Replay(t_B=saved["t"], u_BL=u_BL))
    module = LavidaModule(llada.model, Pooled(), None, ObjectiveConfig(), OptimConfig(steps=1, lr=1.0), seed=0)
    loss = module.loss(TrainBatch([image] * b, ids, ids, ids), torch.Generator())
    close("training loss, through the module", loss[None], saved["loss"], 1e-4)


def training_rows(saved: dict[str, torch.Tensor], eos: int) -> tuple[list[list[int]], list[list[int]]]:
    """The fixture's rows without the padding that the objective adds itself."""
    rows, labels = [], []
    for ids, label, mask in zip(saved["input_ids"], saved["labels_in"], saved["attention_mask_in"].bool(), strict=True):
        real = mask & (ids != eos)
        rows.append(ids[real].tolist())
        labels.append(label[real].tolist())
    return rows, labels


def split_rows(rows, labels) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Prompts and answers: the answer begins at the first target."""
    starts = [next(i for i, v in enumerate(label) if v != IGNORE) for label in labels]
    return [tuple(r[:s]) for r, s in zip(rows, starts, strict=True)], [
        tuple(r[s:]) for r, s in zip(rows, starts, strict=True)
    ]
