"""A batch answers like its rows alone: other canvases, other question lengths, with and without the cache."""

from itertools import product

import pytest
import torch
from torch import Tensor

from baselines import Full, Pooled, Random
from lavida_adapter import DecodeConfig, Lavida, Prefix
from lavida_adapter.prompt import IMAGE, training_example
from lavida_adapter.relevance import LmEmbed, NoRelevance, Relevance
from shirg import Selector, ShirgSelector
from tests.lavida_adapter.tiny import SIZES, picture, tiny_model

QUESTIONS = ("digit red", "What is in the top left corner of this page?", "x", "letter K", "how many shapes are there?")
N = 6


@pytest.fixture(params=["full", "image_first"])
def model(request: pytest.FixtureRequest) -> Lavida:
    return tiny_model(prefix_attention=request.param)


def prefixes(model: Lavida, selector: Selector, rows: list[int]) -> Prefix:
    ids = [f"sample {i}" for i in rows]
    images = [picture(SIZES[i]) for i in rows]
    return model.encode(images, [QUESTIONS[i] for i in rows], selector, ids=ids)


@torch.no_grad()
def first_logits(model: Lavida, prefix: Prefix, *, cached: bool) -> Tensor:
    masks = torch.full((len(prefix.n_tokens), N), model.config.lm.mask_token_id)
    answer = model.lm.embedding(masks)
    states = model.lm.decode(answer, model.prefill(prefix)) if cached else model.forward_whole(prefix, answer)
    return model.lm.logits(states)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("selector", [Pooled(), Full(), Random(budget=7)], ids=lambda s: type(s).__name__)
def test_rows_of_a_batch_equal_rows_alone(model: Lavida, selector: Selector, cached: bool) -> None:
    together = prefixes(model, selector, [0, 1, 2, 3, 4])
    assert len(set(together.n_tokens)) >= 4
    assert not together.mask_BP.all()
    config = DecodeConfig(max_new_tokens=N, prefix_cache=cached)
    logits, answers = first_logits(model, together, cached=cached), model.generate(together, config)
    assert answers.forwards == N
    assert repr(answers) == f"Generation(texts={answers.texts!r}, forwards={N}, steps={answers.steps!r})"
    for i in range(5):
        alone = prefixes(model, selector, [i])
        n = alone.n_tokens[0]
        assert (together.n_tokens[i], together.n_visual[i]) == (n, alone.n_visual[0])
        torch.testing.assert_close(together.embeds_BPD[i, :n], alone.embeds_BPD[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[i], first_logits(model, alone, cached=cached)[0], rtol=0, atol=1e-5)
        one = model.generate(alone, config)
        assert answers.ids_BA[i].tolist() == one.ids_BA[0].tolist()
        assert answers.texts[i] == one.texts[0]
        assert torch.equal(together.selections[i].index_BT, alone.selections[0].index_BT)


@torch.no_grad()
def test_questions_and_pictures_matter() -> None:
    """What makes the test above able to fail: other questions and other pictures give other logits."""
    model = tiny_model()
    logits = first_logits(model, prefixes(model, Pooled(), [0, 1, 2, 3, 4]), cached=True)
    for i, j in product(range(5), repeat=2):
        assert i == j or (logits[i] - logits[j]).abs().max() > 1e-2


@torch.no_grad()
def test_the_cache_is_not_an_approximation_but_another_mask(model: Lavida) -> None:
    """Without the cache the prompt sees the answer, so the logits differ, in padded batches too."""
    prefix = prefixes(model, Pooled(), [0, 1])
    difference = first_logits(model, prefix, cached=True) - first_logits(model, prefix, cached=False)
    assert (difference.abs().amax(dim=(1, 2)) > 1e-3).all()


@torch.no_grad()
def test_without_a_cache_image_first_still_keeps_the_picture_to_itself() -> None:
    """The two kinds of prefix attention differ at every step, also where prompt and answer run together."""
    full, image_first = tiny_model(prefix_attention="full"), tiny_model(prefix_attention="image_first")
    for cached in (True, False):
        one, other = (first_logits(m, prefixes(m, Pooled(), [1]), cached=cached) for m in (full, image_first))
        assert (one - other).abs().max() > 1e-2


def test_another_question_keeps_other_tokens_only_where_relevance_reads_it() -> None:
    model = tiny_model()
    selector = ShirgSelector(budget=40, scaffold={"size": 0})

    def kept(question: str, relevance: Relevance) -> list[int]:
        chosen = model.encode([picture((40, 40))], [question], selector, relevance=relevance).selections[0]
        index: list[int] = chosen.index_BT[0].tolist()
        return index

    assert kept("digit red", LmEmbed()) != kept("letter K", LmEmbed())
    assert kept("digit red", NoRelevance()) == kept("letter K", NoRelevance())


def test_prompts_answer_and_questions_rank() -> None:
    """The suffix of a dataset is read by the language model but not by the relevance."""
    model = tiny_model()
    image = picture((40, 40))
    plain = model.encode([image], ["digit red"], Pooled())
    suffixed = model.encode([image], ["digit red"], Pooled(), prompts=["digit red, in one word"])
    assert suffixed.n_tokens[0] > plain.n_tokens[0]
    assert suffixed.n_visual == plain.n_visual


HISTORY = ("digit red", "It is 7.")


@torch.no_grad()
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_turns_before_a_question_are_read_as_in_training_and_rank_nothing(family: str, drop: bool) -> None:
    """Token by token; what is lost behind a picture is all that an evaluated prompt has less than a trained one."""
    model = tiny_model(lm={"family": family}, drop_token_after_image=drop)
    selector = ShirgSelector(budget=40, scaffold={"size": 0})
    image = picture((40, 40))

    def encode(histories: list[tuple[str, ...]] | None) -> Prefix:
        return model.encode([image] * 2, ["letter K"] * 2, selector, relevance=LmEmbed(), histories=histories)

    plain, told = encode(None), encode([(), HISTORY])
    ids = list(training_example(model.tokenizer, "letter K", "K", model.config, history=HISTORY).prompt)
    at = ids.index(IMAGE)
    if drop:
        del ids[at + 1]
    assert told.n_tokens == (plain.n_tokens[0], len(ids) - 1 + told.n_visual[1])
    assert told.n_tokens[1] > plain.n_tokens[1] and told.n_visual == plain.n_visual == (40, 40)
    visual_P = told.visual_BP[1]
    assert visual_P.nonzero().flatten().tolist() == list(range(at, at + 40))
    text = told.embeds_BPD[1][told.mask_BP[1] & ~visual_P]
    assert torch.equal(text, model.lm.embedding(torch.tensor(ids[:at] + ids[at + 1 :])))
    for mine, before in zip(told.selections, plain.selections, strict=True):
        assert torch.equal(mine.index_BT, before.index_BT)
    assert (first_logits(model, told, cached=True) - first_logits(model, plain, cached=True))[1].abs().max() > 1e-2


def test_a_history_that_is_none() -> None:
    model, image = tiny_model(), picture((40, 40))
    with pytest.raises(ValueError, match="encode got 1 pictures, 1 questions, 1 ids, 1 prompts, 2 histories: give one"):
        model.encode([image], ["x"], Pooled(), histories=[(), ()])
    with pytest.raises(ValueError, match="a conversation of 2 turns does not end with the user"):
        model.encode([image], ["x"], Pooled(), histories=[("digit red",)])


def test_a_context_that_is_too_short() -> None:
    model = tiny_model(lm={"max_sequence_length": 90})
    prefix = prefixes(model, Pooled(), [0])
    length = prefix.n_tokens[0]
    assert model.generate(prefix, DecodeConfig(max_new_tokens=90 - length)).ids_BA.shape[1] == 90 - length
    with pytest.raises(ValueError, match="prompt 'sample 0' and its answer need 91 positions, the model has 90"):
        model.generate(prefix, DecodeConfig(max_new_tokens=91 - length))
