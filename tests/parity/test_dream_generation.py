"""Dream's generation against the published sampler: time grids, and the ids after every step of every run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lavida_adapter import DecodeConfig, Generation, Prefix, dream_published
from lavida_adapter import model as lavida_model
from lavida_adapter.dream_published import denoise_published
from lavida_adapter.sampling import LogitsFn
from lavida_adapter.schedules import EPS
from tests.parity.conftest import Golden
from tests.parity.test_dream_language import prefix_of

DENOISE, PREDICT = lavida_model.denoise, dream_published.predict


def published(call: dict[str, Any]) -> DecodeConfig:
    """The published sampler's keyword arguments as ours; what it ignores is left out."""
    n = call["max_new_tokens"]
    return DecodeConfig(
        max_new_tokens=n,
        step_per_block=call["steps"] if call["steps"] < n else None,
        step_ratio=call.get("step_ratio"),
        schedule=call.get("schedule") or "none",
        shift=call.get("schedule_kwargs", {}).get("shift", 3.0),
        eps=call.get("eps", EPS),
        remasking=call.get("alg", "entropy"),
        temperature=call.get("temperature", 0.0),
        top_p=call.get("top_p"),
        top_k=call.get("top_k", "model"),
        alg_temp=call.get("alg_temp") or 0.0,
        prefix_cache=call["prefix_lm"],
        allow_mask_token=True,
        parity=True,
        keep_history=True,
    )


def drafts_of(call: dict[str, Any], mask_id: int) -> list[list[int]]:
    """The pairs of place and id that the fixture's hook wrote, as one draft with masks between them, for every row."""
    pairs = dict(call.get("draft_hook", []))
    draft = [pairs.get(place, mask_id) for place in range(max(pairs, default=-1) + 1)]
    return [draft] * call.get("batch", 1) if draft else []


class Recorded:
    """One run through `Lavida.generate`: its start, what it predicted, and the logits changed as the fixture did."""

    def __init__(self, call: dict[str, Any], mask_id: int, patch: pytest.MonkeyPatch) -> None:
        self.boost, self.mask_id, self.forwards = call.get("mask_boost", {"steps": [], "add": 0.0}), mask_id, 0
        self.initial: list[list[int]] = []
        self.predicted: list[tuple[list[int], Tensor]] = []
        patch.setattr(lavida_model, "denoise", self.denoise)
        patch.setattr(dream_published, "predict", self.predict)

    def denoise(self, logits_of: LogitsFn, ids_BA: Tensor, *rest: Any, **named: Any) -> Any:
        self.initial = ids_BA.tolist()

        def boosted(ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
            logits = logits_of(ids_BA, want_BM).clone()
            if self.forwards in self.boost["steps"]:
                logits[..., self.mask_id] += self.boost["add"]
            self.forwards += 1
            return logits

        return DENOISE(boosted, ids_BA, *rest, **named)

    def predict(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        tokens, sure = PREDICT(*arguments)
        self.predicted.append((tokens.tolist(), sure))
        return tokens, sure


def check(run: dict[str, Any], out: Generation, equal: Any, family: str) -> None:
    """The reference's full mode carries the prompt's slots in front, but for the end-to-end runs."""
    n = out.ids_BA.shape[1]
    equal(family, [state.tolist() for state in out.history], [[row[-n:] for row in state] for state in run["history"]])
    equal(family, out.ids_BA.tolist(), [row[-n:] for row in run["output"]])
    equal(f"{family}, forwards", out.forwards, run["n_forward_excluding_prefill"])


def test_every_run_gives_the_same_ids_after_every_step(dream: Golden, equal, close, monkeypatch) -> None:
    """Seeded runs too: the same generator draws the same numbers in the same order."""
    inputs, mask_id = dream.tensors("generate_inputs"), dream.ids["mask"]
    runs = [run for run in dream.json("generate") if not run.get("e2e")]
    assert runs
    for run in runs:
        call = run["call"]
        embeds = inputs[f"prompt_embeds_B{call.get('batch', 1)}"]
        ones = torch.ones(embeds.shape[:2], dtype=torch.bool)
        recorded = Recorded(call, mask_id, monkeypatch)
        out = dream.model.generate(
            Prefix(embeds, ones, ~ones),
            published(call),
            drafts=drafts_of(call, mask_id),
            generator=torch.Generator().manual_seed(call.get("torch_seed", 0)),
        )
        n = call["max_new_tokens"]
        equal("Dream, first token and draft", recorded.initial, [row[-n:] for row in run["initial"]])
        check(run, out, equal, "Dream, generation histories")
        traced = [step for step in run.get("trace", []) if step["candidates"]]
        drawn = [step for step in recorded.predicted if step[0]]
        for (tokens, sure), step in zip(drawn, traced, strict=bool(traced)):
            equal("Dream, drawn candidates", tokens, step["candidates"])
            close("Dream, their confidence", sure, torch.tensor(step["confidence"]), 1e-4)


def test_end_to_end_picture_to_answer(dream: Golden, equal) -> None:
    prefix = prefix_of(dream)
    runs = [run for run in dream.json("generate") if run.get("e2e")]
    assert runs
    for run in runs:
        check(run, dream.model.generate(prefix, published(run["call"])), equal, "Dream, end to end, ids")


def test_time_grids(dream: Golden, equal) -> None:
    """Counts of the whole loop over a network that never predicts the mask."""
    mask_id, width = 3, 4

    def never_the_mask(ids_BA: Tensor, want_BM: Tensor | None) -> Tensor:
        assert want_BM is None
        return torch.tensor([0.0, 1.0, 0.0, -9.0]).expand(*ids_BA.shape, width)

    cases = dream.json("time_grid")
    assert cases
    for case in cases:
        n, batch = case["max_new_tokens"], case["batch"]
        config = published({"alg": "maskgit_plus", **case})
        ids_BA = torch.full((batch, n), mask_id)
        ids_BA[:, : n - case["masks_at_start"] // batch] = 0
        _, _, _, history = denoise_published(never_the_mask, ids_BA, config, mask_id, None)
        left = [case["masks_at_start"], *((state == mask_id).sum().item() for state in history)]
        equal("Dream, time grids", [b - a for b, a in zip(left, left[1:], strict=False)], case["tokens_per_step"])
