"""A model that does not pool: every selector's tokens are counted, and what the comparison is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from experiments import build
from experiments.data.sample import Sample
from experiments.schema import CONF
from experiments.token_stats import TokenGeometry, check_counts, count_sources
from lavida_adapter import Lavida
from lavida_adapter.prompt import prompt_ids
from shirg import UserError
from tests.lavida_adapter.tiny import picture

SIZES = [(60, 60), (64, 48), (90, 30)]
SELECTORS = sorted(path.stem for path in (CONF / "selector").glob("*.yaml") if path.stem != "external")
VIEW = ["image_size=132", "patch_size=11"]
"""One view of 12 x 12 tokens."""


@pytest.fixture(scope="module", params=["resize", "pad"])
def model(request: pytest.FixtureRequest) -> Lavida:
    sizes = [f"model.config.vision.{option}" for option in VIEW]
    own = [f"+model.config.image_aspect_ratio={request.param}", "model.config.image_grid_pinpoints=[[132,132]]"]
    return build.build_model(
        build.compose_eval("model=small", "+model.mm_pool=false", *sizes, *own), torch.device("cpu")
    )


def counts(model: Lavida, name: str, budget: str) -> list[int]:
    """Vision tokens of a prompt about each picture; as many as the selector owes, or this raises."""
    cfg = build.compose_eval(f"selector={name}", f"budget={budget}")
    selector = build.build_selector(cfg, model.config.budgets, model.config)
    relevance = build.build_relevance(cfg, selector)
    geometry = TokenGeometry(model.config, selector.geometry)
    images, boxes = [picture(size) for size in SIZES], [[(0.1, 0.1, 0.4, 0.4)]] * len(SIZES)
    prefix = model.encode(images, ["what"] * len(SIZES), selector, relevance=relevance, boxes=boxes)
    for chosen, n, size in zip(prefix.selections, prefix.n_visual, SIZES, strict=True):
        check_counts(selector, count_sources(chosen), n, geometry, size, "")
    return list(prefix.n_visual)


def in_view(size: tuple[int, int]) -> int:
    """Tokens of a 12 x 12 view, padded to a square, whose centre lies in the picture."""
    (w, h), middles = size, [(11 * i + 5.5) / 132 for i in range(12)]
    share = h / max(w, h)
    return 12 * sum((1 - share) / 2 <= y < (1 + share) / 2 for y in middles)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_gives_what_it_owes(model: Lavida, name: str) -> None:
    """Without pooling "base" is all there is, and a matched budget has no place for the newline."""
    padded = model.config.image_aspect_ratio == "pad"
    have = [in_view(size) if padded else 144 for size in SIZES]
    if name == "pooled":
        assert counts(model, name, "base") == [145] * 3
    elif name in ("full", "global_only"):
        assert counts(model, name, "base") == [n + (name == "full") for n in have]
    elif name == "shirg":  # 64 windows of 1.5 x 1.5 tokens: none for a window that is padding alone
        assert counts(model, name, "matched") == ([144, 136, 80] if padded else have)
    elif name.startswith("shirg_"):  # they have budgets and geometries of their own
        assert padded or len(counts(model, name, "matched")) == 3
    elif name in ("holov", "llava_scissor"):  # what they keep can be less than a budget
        assert all(n <= most for n, most in zip(counts(model, name, "matched"), have, strict=True))
    else:
        assert counts(model, name, "matched") == have


@pytest.mark.parametrize("name", ["random", "shirg", "cdpruner"])
def test_a_share_of_base_drops_tokens(model: Lavida, name: str) -> None:
    assert dict(model.config.budgets) == {"base": 144, "wide": 144, "full": 144}
    if model.config.image_aspect_ratio == "resize":
        assert counts(model, name, "3/4 base") == [108] * 3
    elif name == "shirg":
        assert counts(model, name, "3/4 base") == [108, 100, 76]
    else:
        with pytest.raises(
            UserError, match="budget 108 is larger than the 48 tokens of picture '2' that are not padding"
        ):
            counts(model, name, "3/4 base")


@pytest.mark.parametrize(("name", "counts_on_it"), [("shirg", False), ("random", True)])
def test_a_prompt_leaves_room_for_what_a_picture_takes_for_sure(model: Lavida, name: str, counts_on_it: bool) -> None:
    """In a padded view a scaffold may have fewer tokens than its budget; without padding it has all."""
    cfg = build.compose_eval(f"selector={name}", "budget=base", "relevance=none")
    pipeline = build.build_pipeline(cfg, model, build.build_decode(cfg, 4), {})
    room = min(model.config.tokenizer_model_max_length, model.config.lm.max_sequence_length - 4)
    text = "a" * (room - len(prompt_ids(model.tokenizer, "", model.config)) - 100)
    n_text = len(prompt_ids(model.tokenizer, text, model.config)) - 1
    assert room - 144 < n_text < room
    question: dict[str, Any] = {"question": text, "prompt": text, "answers": ("b",), "size": None}
    sample = Sample(id="s", dataset="d", split="test", load_image=lambda: picture((8, 8)), **question)
    if counts_on_it or model.config.image_aspect_ratio == "resize":
        with pytest.raises(UserError, match=f"s: {n_text} tokens of text, at least 144 of the picture"):
            pipeline.check(sample)
    else:
        pipeline.check(sample)


@pytest.mark.parametrize(("switch", "pooled", "kept"), [("null", 80, 80), ("false", 320, 80)])
def test_the_switch_of_the_model(eval_here: Callable[..., Path], switch: str, pooled: int, kept: int) -> None:
    """Four tiles of 8 x 8 tokens and the base view, with newlines for the mosaic's rows."""
    common = ("data.n=6", f"model.mm_pool={switch}", "study=switch")
    rows = pq.read_table(eval_here(*common, "selector=pooled") / "samples.parquet").to_pylist()
    rows_of_mosaic = 8 if switch == "null" else 16
    assert {row["n_visual"] for row in rows} == {pooled + rows_of_mosaic}
    rows = pq.read_table(eval_here(*common, "selector=random", "budget=80") / "samples.parquet").to_pylist()
    assert {row["n_visual"] for row in rows} == {kept}
