"""The shipped tiny models: weights are those that their history names, and show what they were made to show."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baselines import Full, Pooled, Random, Saint
from experiments.data.loader import collate
from experiments.data.synthetic.glyphs import SynthGlyphs
from experiments.schema import CONF
from experiments.token_stats import TokenGeometry, recall
from lavida_adapter import DecodeConfig, Lavida, load_adapter, merge_lora
from lavida_adapter.relevance import LmEmbed
from shirg import Selector, ShirgSelector

SHIPPED = CONF.parent / "weights"
MODELS = ("tiny", "tiny_dream")
UNTIED = "tiny_untied"
"""Its projector shares no space with the word embeddings, so SHIRG's cosines say nothing there."""
SELECTORS: dict[str, Callable[[], Selector]] = {
    "pooled": Pooled,
    "full": Full,
    "random": lambda: Random(budget=80),
    "shirg": lambda: ShirgSelector(budget=80),
}


def accuracy(model: Lavida, selector: Selector, n: int = 288, batch: int = 32) -> dict[str, float]:
    """Share of right answers by group on test pictures, sparse and dense in turn."""
    data = SynthGlyphs(split="test", n=n, density="sparse,dense")
    right: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, n, batch):
        samples = [data[i] for i in range(begin, min(n, begin + batch))]
        asked = collate(samples)
        with torch.inference_mode():
            prefix = model.encode(asked.images, asked.questions, selector, relevance=LmEmbed(), ids=asked.ids)
            texts = model.generate(prefix, DecodeConfig(max_new_tokens=3)).texts
        for sample, text in zip(samples, texts, strict=True):
            right[str(sample.meta["group"])].append(text in sample.answers)
    return {group: sum(hits) / len(hits) for group, hits in right.items()}


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest) -> Lavida:
    return Lavida.from_pretrained(SHIPPED / request.param)


FOLDERS = [f for name in (*MODELS, UNTIED) for f in (SHIPPED / name, *sorted((SHIPPED / name / "adapters").glob("*")))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(SHIPPED)))
def test_weights_are_those_that_their_history_names(folder: Path) -> None:
    history = json.loads((folder / "training.json").read_text())
    assert history["sha256"]
    for name, sha in history["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha
    stages = [stage["stage"] for stage in history["stages"]]
    assert stages == ["vision", "text", "align", "base", "adapt"][: len(stages)] and len(stages) >= 4
    assert all(stage["git"] and not stage["git_dirty"] for stage in history["stages"])


@pytest.mark.parametrize("name", (*MODELS, UNTIED))
def test_weights_are_small_enough_to_ship(name: str) -> None:
    assert sum(file.stat().st_size for file in (SHIPPED / name).rglob("*") if file.is_file()) <= 12 * 2**20


def test_the_second_model_is_of_the_other_family_and_of_equal_width() -> None:
    llada, dream = (Lavida.from_pretrained(SHIPPED / name).config for name in MODELS)
    assert (llada.lm.family, dream.lm.family) == ("llada", "dream")
    assert dream.vision == llada.vision and dream.budgets == llada.budgets
    assert (dream.lm.d_model, dream.lm.n_layers, dream.lm.n_heads) == (llada.lm.d_model, llada.lm.n_layers, 4)
    assert dream.lm.n_kv_heads == 2 < llada.lm.n_kv_heads == 4


def test_choosing_beats_pooling_and_chance_on_the_pooled_base(base: Lavida) -> None:
    """Expected gaps are about 50 and 10 points; half of that is far outside the noise of 192 questions."""
    scores = {name: accuracy(base, make()) for name, make in SELECTORS.items() if name != "full"}
    assert scores["shirg"]["fine"] >= scores["pooled"]["fine"] + 0.25
    assert scores["shirg"]["fine"] >= scores["random"]["fine"] + 0.25
    assert scores["pooled"]["guard"] >= 0.9


def evidence_recall(model: Lavida, selector: Selector, n: int = 96) -> float:
    """Share of the evidence of detail questions that a selector keeps, on validation pictures."""
    data = SynthGlyphs(split="val", n=n, density="sparse,dense", tasks=["digit", "letter"])
    geometry = TokenGeometry(model.config)
    samples = [data[i] for i in range(n)]
    asked = collate(samples)
    with torch.inference_mode():
        prefix = model.encode(asked.images, asked.questions, selector, relevance=LmEmbed(), ids=asked.ids)
    kept = [s.index_BT[0][s.mask_BT[0]] for s in prefix.selections]
    found = [recall(s.boxes, k[k >= 0], geometry, (128, 128)) for s, k in zip(samples, kept, strict=True)]
    return sum(share or 0 for share in found) / n


def test_shirg_finds_the_evidence_only_where_projector_and_words_share_a_space() -> None:
    """64 of 256 tile tokens; without the tie its ranking is about as good as a random one."""
    tied, untied = (Lavida.from_pretrained(SHIPPED / name) for name in ("tiny", UNTIED))
    assert evidence_recall(tied, ShirgSelector(budget=80)) >= 0.95
    assert evidence_recall(untied, ShirgSelector(budget=80)) <= evidence_recall(untied, Random(budget=80)) + 0.1


def test_the_untied_model_answers_as_well_from_the_tokens_that_show_the_evidence() -> None:
    history = json.loads((SHIPPED / UNTIED / "training.json").read_text())
    assert [("codes=random" in stage["command"]) for stage in history["stages"]] == [False, True, True, False]
    model = Lavida.from_pretrained(SHIPPED / UNTIED)
    pooled, chosen = accuracy(model, Pooled()), accuracy(model, Saint(budget=80))
    assert pooled["guard"] >= 0.95 and pooled["fine"] >= 0.3  # its gate's thresholds
    assert chosen["fine"] >= pooled["fine"] + 0.2


@pytest.mark.parametrize("folder", MODELS)
@pytest.mark.parametrize("name", ["pooled", "full"])
def test_adapted_systems_keep_the_guard(name: str, folder: str) -> None:
    model = Lavida.from_pretrained(SHIPPED / folder)
    load_adapter(model, SHIPPED / folder / "adapters" / name)
    merge_lora(model)
    scores = accuracy(model, SELECTORS[name]())
    assert scores["guard"] >= 0.9
    assert scores["fine"] >= 0.75 if name == "full" else scores["fine"] <= 0.65


@pytest.mark.parametrize("base", ["tiny"], indirect=True)
def test_what_is_kept_does_not_depend_on_batch_threads_or_random_state(base: Lavida) -> None:
    data = SynthGlyphs(split="test", n=36, density="sparse,dense")
    samples = [data[i] for i in range(36)]
    kept: dict[str, list[list[int]]] = {}
    threads = torch.get_num_threads()
    try:
        for label, batch, n_threads in (("one by one", 1, 1), ("in batches", 16, 1), ("two threads", 16, 2)):
            torch.set_num_threads(n_threads)
            torch.manual_seed(batch)
            rows: list[list[int]] = []
            for begin in range(0, 36, batch):
                asked = collate(samples[begin : begin + batch])
                for name in ("shirg", "random"):
                    with torch.inference_mode():
                        prefix = base.encode(
                            asked.images, asked.questions, SELECTORS[name](), relevance=LmEmbed(), ids=asked.ids
                        )
                    rows += [s.index_BT[0].tolist() for s in prefix.selections]
            kept[label] = sorted(rows)
    finally:
        torch.set_num_threads(threads)
    assert kept["one by one"] == kept["in batches"] == kept["two threads"]
