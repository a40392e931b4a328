"""Dream's prompts and training texts against the reference, over a tokenizer of words in which newline is a token."""

import re

from lavida_adapter.chat_template import Piece
from lavida_adapter.prompt import answer_pieces, render
from tests.parity.conftest import Golden
from tests.parity.test_vision import split_turn


def words(pieces: tuple[Piece, ...]) -> list[str]:
    return re.findall(r"<\|[^|]+\|>|\n|[^\s<]+", "".join(piece.text for piece in pieces))


def joined(chunks: tuple[tuple[Piece, ...], ...]) -> list[str]:
    return [word for chunk in chunks for word in ("<IMG -200>", *words(chunk))][1:]


def test_no_token_is_lost(dream: Golden, equal) -> None:
    assert dream.config.drop_token_after_image is False
    for case in dream.json("prompt")["prompts"]:
        n_images, first = split_turn(case["turns"][0])
        chunks = render([first, *case["turns"][1:]], dream.config, n_images=n_images)
        equal("Dream's prompt, chunks", [words(chunk) for chunk in chunks], case["toy_tokens_of_each_text_chunk"])
        equal("Dream's prompt, joined", joined(chunks), case["toy_tokens_from_reference_splitter"])


def test_training_texts(dream: Golden, equal) -> None:
    """One round of each conversation; a picture goes to the front of its question."""
    for case in dream.json("prompt")["training_text"]:
        (_, question), (_, answer) = case["rounds"][2 * case["chosen_round"] :][:2]
        chunks = render([split_turn(question)[1]], dream.config, n_images=int(case["has_image"]))
        prompt, targets = joined(chunks), words(answer_pieces(answer, dream.config))
        equal("Dream's training text", [*prompt, *targets], case["toy_tokens"])
        equal("Dream's targets", [0] * len(prompt) + [1] * len(targets), case["is_target"])
