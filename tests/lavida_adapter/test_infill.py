"""Answers that begin with a draft: their gaps are filled and their text stays."""

import re
from dataclasses import replace

import pytest

from baselines import Pooled
from lavida_adapter import DecodeConfig, Infilled, Lavida
from lavida_adapter.generate import start
from lavida_adapter.infill import INFILL, Gap, make_draft, text_of
from shirg import UserError
from tests.lavida_adapter.tiny import SIZES, picture, tiny_config, tiny_model, tokenizer

MASK = tiny_model().config.lm.mask_token_id


def test_every_row_starts_with_its_own_draft() -> None:
    drafts = [(3, MASK, 1), (), (2, 2)]
    ids_BA = start(3, DecodeConfig(max_new_tokens=4), MASK, drafts)
    assert ids_BA.tolist() == [[3, MASK, 1, MASK], [MASK] * 4, [2, 2, MASK, MASK]]


@pytest.mark.parametrize("cached", [True, False])
def test_drafts_of_a_batch_give_what_each_gives_alone(cached: bool) -> None:
    model, questions = tiny_model(), ["digit red", "letter", "how many shapes are there?"]
    drafts = [(31, MASK, MASK, 32, MASK, 33), (), (40, 41, MASK, MASK)]
    images, decode = [picture(size) for size in SIZES[:3]], DecodeConfig(max_new_tokens=6, prefix_cache=cached)
    together = model.generate(model.encode(images, questions, Pooled()), decode, drafts=drafts)
    assert (together.forwards, together.steps) == (6, (3, 6, 4))
    for i, draft in enumerate(drafts):
        prefix = model.encode(images[i : i + 1], questions[i : i + 1], Pooled())
        ids = together.ids_BA[i].tolist()
        assert ids == model.generate(prefix, decode, drafts=[draft]).ids_BA[0].tolist()
        assert all(found == token for found, token in zip(ids, draft, strict=False) if token != MASK)
        assert MASK not in ids
        assert bool(draft) == (ids != model.generate(prefix, decode).ids_BA[0].tolist())


def test_a_template_becomes_a_draft() -> None:
    """By hand: bytes are tokens, the infill token closes a gap of free length, the end of the turn the text."""
    words, config = tokenizer(), tiny_config()
    infill, end = words.convert_tokens_to_ids(["<|reserved_token_1|>", "<|eot_id|>"])
    draft = make_draft("a [MASK:3]b[GAP][GAP:2]", words, config)
    text = [ord("a"), ord(" "), *[MASK] * 3, ord("b"), *[MASK] * 16, infill, *[MASK] * 2, infill, end]
    assert list(draft.ids) == [*words("a ")["input_ids"], *text[2:5], *words("b")["input_ids"], *text[6:]]
    assert draft.gaps == (Gap(2, 3, False), Gap(6, 16, True), Gap(23, 2, True))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (r"\[GAP] [MASK:1]", "[GAP] x"),
        (r"\[MASK:9][MASK:1]", "[MASK:9]x"),
        (r"\\[MASK:1]", "\\x"),
        (r"\\\[GAP:2] [MASK:1]", r"\[GAP:2] x"),
        (r"\[GAP:none] [MASK:1]", "[GAP:none] x"),
        ("[gap] [Mask:2] [MASKED] [1] [MASK:1]", "[gap] [Mask:2] [MASKED] [1] x"),
        (r"\frac{a}{b} [MASK:1] \n", r"\frac{a}{b} x \n"),
        ("<|eot_id|><image> [MASK:1]", "<|eot_id|><image> x"),
    ],
)
def test_what_looks_like_a_gap_can_be_text(template: str, text: str) -> None:
    words, config = tokenizer(), tiny_config()
    draft = make_draft(template, words, config)
    (gap,) = draft.gaps
    (x,) = words("x")["input_ids"]
    ids = [x if token == MASK else token for token in draft.ids]
    assert draft.filled(ids, words, config) == Infilled(text, ("x",))
    assert (gap.length, ids[gap.start]) == (1, x)


def test_what_is_left_of_a_gap_and_what_is_behind_the_draft_is_no_text() -> None:
    words, config = tokenizer(), tiny_config()
    draft = make_draft("It is [GAP:4]!", words, config)
    (six,) = words("6")["input_ids"]
    fill, eos = words.convert_tokens_to_ids(["<|reserved_token_2|>", "<|endoftext|>"])
    ids = list(draft.ids)
    ids[draft.gaps[0].start : draft.gaps[0].start + 4] = [six, six, fill, fill]
    assert draft.filled([*ids, six, eos], words, config) == Infilled("It is 66!", ("66",))
    assert text_of([six, fill, eos, six], words, config) == "66"


def test_two_gaps_about_a_picture() -> None:
    """The text stays, every slot of the gaps is what a generation from the same draft writes, special tokens go."""
    model, image, decode = tiny_model(), picture(SIZES[1]), replace(INFILL, max_new_tokens=64)
    found = model.infill(image, "The [MASK:3] is in [GAP:5].", Pooled(), question="what?", decode=decode)
    draft = make_draft("The [MASK:3] is in [GAP:5].", model.tokenizer, model.config)
    out = model.generate(model.encode([image], ["what?"], Pooled()), decode, drafts=[draft.ids])
    ids = out.ids_BA[0].tolist()
    assert MASK not in ids
    assert all(token in (MASK, got) for token, got in zip(draft.ids, ids, strict=False))
    assert found == draft.filled(ids, model.tokenizer, model.config)
    assert found.text == f"The {raw(model, ids, draft.gaps[0])} is in {raw(model, ids, draft.gaps[1])}."
    assert "<|" not in found.text and found.gaps[0] == raw(model, ids, draft.gaps[0]).strip()


def raw(model: Lavida, ids: list[int], gap: Gap) -> str:
    text: str = model.tokenizer.decode(ids[gap.start : gap.start + gap.length], skip_special_tokens=True)
    return text


def test_dream_fills_gaps_of_fixed_length() -> None:
    model = tiny_model(lm={"family": "dream"})
    found = model.infill(picture(SIZES[0]), "It is [MASK:3].", Pooled(), decode=DecodeConfig(max_new_tokens=16))
    assert found.text.startswith("It is") and found.text.endswith(".") and len(found.gaps) == 1
    first = model.infill(picture(SIZES[0]), "[MASK:2]!", Pooled(), decode=DecodeConfig(max_new_tokens=8))
    assert first.text.endswith("!")
    with pytest.raises(UserError, match="^Dream has no infill token to end a gap of free length with: write \\[MASK:5"):
        model.infill(picture(SIZES[0]), "It is [GAP].", Pooled())


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("no gap", "the draft 'no gap' has no gap to fill: write [MASK:5] for five tokens, or [GAP]"),
        ("", "the draft '' has no gap to fill"),
        (r"\[GAP]", "has no gap to fill"),
        ("[MASK]", r"the draft's gap [MASK] needs a number of tokens, such as [MASK:5]; \[MASK] is plain text"),
        ("[MASK:0]", "the draft's gap [MASK:0] needs a number of tokens"),
        ("[GAP:-1]", "the draft's gap [GAP:-1] needs a number of tokens, such as [GAP:5]"),
        ("[GAP:]", "the draft's gap [GAP:] needs a number of tokens"),
        ("[MASK:two]", "the draft's gap [MASK:two] needs a number of tokens"),
        ("a [MASK:62]", "the draft has 65 tokens, the answer only 64: raise max_new_tokens"),
    ],
)
def test_unusable_templates_are_refused(template: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        tiny_model().infill(picture(SIZES[0]), template, Pooled(), decode=DecodeConfig(max_new_tokens=64))
