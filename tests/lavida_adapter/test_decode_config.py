"""Decoding options of both language models: what is refused, by whom, and that every shipped option runs on both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lavida_adapter import DecodeConfig, Lavida, Prefix
from lavida_adapter.decode_config import REMASKING
from lavida_adapter.dream_published import check_dream
from lavida_adapter.sampling import check_llada
from shirg import UserError
from tests.lavida_adapter.tiny import noise, tiny_model

P, A = 7, 6
FOLDER = Path(__file__).parents[2] / "conf" / "decode"
PUBLISHED = {"parity": True, "allow_mask_token": True}


@pytest.fixture(params=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> Lavida:
    return tiny_model(lm={"family": request.param})


def prompts(batch: int = 2) -> Prefix:
    ones = torch.ones(batch, P, dtype=torch.bool)
    return Prefix(noise(batch, P, 32), ones, ~ones)


Check = Callable[[DecodeConfig], None]
REFUSED: dict[str, tuple[dict[str, Any], Check | None, str]] = {
    "eps": ({"eps": 1.0}, None, "decode.eps=1.0: give the end of the time grid"),
    "alg_temp": ({"alg_temp": -1}, None, "decode.alg_temp=-1: give 0 or more"),
    "top_p": ({"top_p": 1.5}, None, "decode.top_p=1.5: give a probability"),
    "top_p 0": ({"top_p": 0.0}, None, "decode.top_p=0.0: give a probability"),
    "top_k": ({"top_k": 0}, None, "decode.top_k=0: give a positive number"),
    "top_k by a word": ({"top_k": "all"}, None, "decode.top_k='all': give a positive number"),
    "top_k yes": ({"top_k": True}, None, "decode.top_k=True: give a positive number"),
    "threshold and alg_temp": ({"threshold": 0.5, "alg_temp": 0.5}, None, "decode.alg_temp draws a number of them"),
    "alg_temp of no confidence": ({"remasking": "origin", "alg_temp": 0.5}, None, "ranks by none"),
    "origin and a schedule": ({"remasking": "origin", "schedule": "shift"}, None, "not by decode.schedule=shift"),
    "parity without holes": ({"parity": True}, None, "add decode.allow_mask_token=true"),
    "parity and threshold": ({**PUBLISHED, "threshold": 0.5}, None, "no threshold and no early_stop"),
    "parity and early stop": ({**PUBLISHED, "early_stop": True}, None, "no threshold and no early_stop"),
    "LLaDA, top_p": ({"top_p": 0.9}, check_llada, "decode.top_p=0.9 belongs to Dream's sampler"),
    "LLaDA, top_k": ({"top_k": 9}, check_llada, "decode.top_k=9 belongs to Dream's sampler"),
    "LLaDA, alg_temp": ({"alg_temp": 0.1}, check_llada, "decode.alg_temp=0.1 belongs to Dream's sampler"),
    "LLaDA, eps": ({"eps": 0.1}, check_llada, "decode.eps=0.1 ends the time grid"),
    "LLaDA, parity, origin": (
        {**PUBLISHED, "remasking": "origin"},
        check_llada,
        "no schedule=none with remasking=orig",
    ),
    "LLaDA, parity, grid": ({**PUBLISHED, "schedule": "time_grid"}, check_llada, "no schedule=time_grid"),
    "LLaDA, parity, no steps": ({**PUBLISHED, "step_ratio": 0.01}, check_llada, "with at least one step"),
    "LLaDA, parity, steps twice": (
        {**PUBLISHED, "step_ratio": 0.5, "step_per_block": 4},
        check_llada,
        "cannot run step_ratio=0.5 with step_per_block=4",
    ),
    "Dream, eps of a schedule": ({"eps": 0.1, "schedule": "shift"}, check_dream, "decode.eps=0.1 ends the time grid"),
    "Dream, eps of a threshold": ({"eps": 0.1, "threshold": 0.5}, check_dream, "decode.eps=0.1 ends the time grid"),
    "Dream, parity, blocks": ({**PUBLISHED, "block_length": 8}, check_dream, "no blocks, and decode.block_length=8"),
    "Dream, parity, random": ({**PUBLISHED, "remasking": "random"}, check_dream, "no decode.remasking=random"),
    "Dream, parity, a long ratio": (
        {**PUBLISHED, "step_ratio": 1.0, "step_per_block": 8},
        check_dream,
        "time grid has 8 steps (decode.step_per_block), and decode.step_ratio asks for 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    options, check, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        config = DecodeConfig(**options)
        assert check is not None, "the config alone refuses it"
        check(config)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_model_refuses_what_its_sampler_lacks() -> None:
    with pytest.raises(UserError, match="top_p=0.9 belongs to Dream's sampler"):
        tiny_model().generate(prompts(), DecodeConfig(top_p=0.9))
    with pytest.raises(UserError, match="no blocks"):
        tiny_model(lm={"family": "dream"}).generate(prompts(), DecodeConfig(block_length=8, **PUBLISHED))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="sub_batch"):
        DecodeConfig(sub_batch=4)  # type: ignore[call-arg]  # what is tested


@torch.no_grad()
@pytest.mark.parametrize("option", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_shipped_option_runs_on_both_models(model: Lavida, option: str) -> None:
    """An answer of six tokens; only those that repeat the published samplers may leave a mask."""
    folder = Path("conf") / "decode"
    knobs = yaml.safe_load((folder / "default.yaml").read_text()) | yaml.safe_load(
        (folder / f"{option}.yaml").read_text()
    )
    decode = DecodeConfig(**{**{k: v for k, v in knobs.items() if k != "defaults"}, "max_new_tokens": A})
    out = model.generate(prompts(), decode)
    assert out.ids_BA.shape == (2, A) and 1 <= out.forwards <= decode.steps
    assert decode.parity or not (out.ids_BA == model.config.lm.mask_token_id).any()


SAME_ON_BOTH: list[dict[str, Any]] = [
    {"remasking": name, **more} for name in REMASKING for more in ({}, {"step_ratio": 0.5}, {"temperature": 0.5})
] + [
    {"schedule": "time_grid", "eps": 0.1},
    {"schedule": "cosine", "step_per_block": 3},
    {"block_length": 3, "threshold": 0.2},
    {"early_stop": True, "prefix_cache": False},
    {"allow_mask_token": True},
    {"top_k": None},
]


@torch.no_grad()
@pytest.mark.parametrize("knobs", SAME_ON_BOTH, ids=str)
def test_options_of_both_models_give_the_same_answer_again(model: Lavida, knobs: dict[str, Any]) -> None:
    mask_id = model.config.lm.mask_token_id
    answers = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        drafts = [[5, mask_id, 6], []]
        out = model.generate(prompts(), DecodeConfig(max_new_tokens=A, **knobs), drafts=drafts, generator=generator)
        assert out.ids_BA[0, [0, 2]].tolist() == [5, 6]
        answers.append(out.ids_BA.tolist())
    assert answers[0] == answers[1]
    assert "allow_mask_token" in knobs or mask_id not in answers[0][0] + answers[0][1]


@torch.no_grad()
@pytest.mark.slow
def test_compiled_steps_give_the_same_ids_on_both(model: Lavida) -> None:
    """One model for all options, since it keeps what it has compiled."""
    for knobs in ({}, {"temperature": 0.7}, {"remasking": "margin", "step_ratio": 0.5}, PUBLISHED):
        ids = [
            model.generate(
                prompts(),
                DecodeConfig(max_new_tokens=A, engine=engine, **knobs),  # type: ignore[arg-type]
                drafts=[[5], []],
                generator=torch.Generator().manual_seed(2),
            ).ids_BA.tolist()
            for engine in ("eager", "compile")
        ]
        assert ids[0] == ids[1], knobs


def test_both_names_of_a_rule_are_one_rule() -> None:
    for name, ours in REMASKING.items():
        assert DecodeConfig(remasking=name).rule == DecodeConfig(remasking=ours).rule
    assert DecodeConfig(remasking="maskgit_plus", threshold=0.5).rule.remasking == "low_confidence"
