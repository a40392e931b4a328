"""LaViDa on Dream against the reference: first token, shifted logits, training loss and gradients."""

import torch

from lavida_adapter.engine import DecodeSteps
from lavida_adapter.loss import states_of_copies
from lavida_adapter.objective import mask_probability, masked_cross_entropy, masked_targets, pad_answers
from lavida_adapter.prefix import Prefix, splice
from lavida_adapter.prompt import IGNORE
from tests.parity.conftest import Golden
from tests.parity.test_language import split_rows, training_rows
from tests.parity.test_vision import picture_blocks


def prefix_of(dream: Golden) -> Prefix:
    """The end-to-end picture and prompt."""
    blocks = picture_blocks(dream, [dream.image("e2e.png")])
    return splice([dream.json("facts")["prompt_input_ids"]], blocks, dream.model.lm.embedding, max_length=10**6)[0]


@torch.no_grad()
def test_first_token_and_first_cached_step(dream: Golden, close) -> None:
    saved, model = dream.tensors("e2e_logits_prefix"), dream.model
    n = saved["first_step_logits"].shape[1]
    cache = model.prefill(prefix_of(dream), n_answer=n)
    assert cache.last_BD is not None
    last = model.lm.logits(cache.last_BD)
    close("prefill, last logits", last[:, None], saved["prefill_last_logits"], 1e-3)
    ids = torch.full((1, n), dream.ids["mask"])
    ids[0, 0] = last.argmax()
    close("first cached step, shifted", DecodeSteps(model.lm, cache, n)(ids), saved["first_step_logits"], 1e-3)
    raw = model.lm.logits(model.lm.decode(model.lm.embedding(ids), cache))
    close("first cached step, raw", raw, saved["first_step_logits_raw"], 1e-3)


@torch.no_grad()
def test_first_step_without_a_cache(dream: Golden, close) -> None:
    saved, model, prefix = dream.tensors("e2e_logits_full"), dream.model, prefix_of(dream)
    n = saved["first_step_logits"].shape[1]
    masks = model.lm.embedding(torch.full((1, n), dream.ids["mask"]))
    shifted = model.lm.logits(model.forward_whole(prefix, masks))
    close("first whole step, shifted", shifted, saved["first_step_logits"], 1e-3)
    close("first whole step, first row", shifted[:, :1], saved["last_prompt_logits_raw"], 1e-3)
    raw = model.lm.logits(model.lm(torch.cat([prefix.embeds_BPD, masks], dim=1)))[:, -n:]
    close("first whole step, raw", raw, saved["first_step_logits_raw"], 1e-3)


def test_training_loss_and_gradients(dream: Golden, equal, close) -> None:
    """From the rows before padding to the gradients; the saved logits start one position before the targets."""
    saved, facts, model = dream.tensors("train_loss"), dream.json("facts")["facts"]["train"], dream.model
    eos, behind = dream.ids["eos"], saved["u_after_image"].shape[1]
    rows, labels = training_rows(saved, eos)
    extra = saved["input_ids"].shape[1] - max(map(len, rows))
    padded, padded_labels = pad_answers(*split_rows(rows, labels), eos=eos, extra=extra)
    equal("training rows", padded, saved["input_ids"].tolist())
    model.requires_grad_(True)
    try:
        blocks = picture_blocks(dream, [dream.image(f"images/{facts['image']}")]) * len(padded)
        whole, labels_BL = splice(padded, blocks, model.lm.embedding, max_length=10**6, labels=padded_labels)
        u_BL = torch.ones(labels_BL.shape)
        u_BL[:, -behind:] = saved["u_after_image"]
        close("masking probability", mask_probability(saved["t"]), saved["p_mask"][:, 0], 1e-6)
        copies = torch.cat(masked_targets(labels_BL != IGNORE, saved["t"], u_BL, saved["u_min"]))
        equal("training masks", copies[:, -behind:].long().tolist(), saved["masked_after_image"].long().tolist())
        kept = labels_BL.repeat(2, 1).masked_fill(~copies, IGNORE)
        equal("training labels", kept[:, -behind:].tolist(), saved["labels_after_image"].tolist())
        states = states_of_copies(model, whole, labels_BL, copies, prefix_mask=False)
        rows_before = saved["logits_after_image"].shape[1]
        close("training logits", model.lm.logits(states[:, -rows_before:]), saved["logits_after_image"], 1e-3)
        loss = masked_cross_entropy(model.lm.logits(states[:, :-1][copies[:, 1:]]), kept[copies])
        close("training loss", loss[None], saved["loss"], 1e-4)
        loss.backward()
        lm = model.lm
        bias, head = lm.layers[0].query.bias, lm.head.weight.grad
        assert bias.grad is not None and lm.embedding.weight.grad is not None and head is not None
        close("gradient of the query bias", bias.grad, saved["grad_q_bias_0"], 1e-4)
        gradient = lm.embedding.weight.grad
        close("gradient of the mask embedding", gradient[dream.ids["mask"]], saved["grad_mask_embedding"], 1e-4)
        assert gradient[eos].abs().max() == 0
        newline = model.model.image_newline.grad
        assert newline is not None
        close("gradient of the newline", newline, saved["grad_image_newline"], 1e-4)
        norms = head[: len(saved["grad_lm_head_norm_rows_0_32"])].norm(dim=-1)
        close("gradient of the head (norms)", norms, saved["grad_lm_head_norm_rows_0_32"], 1e-4)
    finally:
        model.zero_grad()
        model.requires_grad_(False)
