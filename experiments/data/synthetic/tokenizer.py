"""The tiny models' tokenizers: bytes, a language model's control tokens, and whole words for the synthetic tasks.

Bytes make any text round-trip; the words keep the tiny prompts short: "digit red" and "letter K" are two tokens each,
"where red disc" is three; an answer is one token, or two characters of one token each.
"""

from dataclasses import dataclass
from functools import partial

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.data.synthetic import text_context
from experiments.data.synthetic.board import KINDS
from experiments.data.synthetic.glyphs.scene import ASPECTS, CHARS, COLOURS, SHAPES, TASKS
from shirg import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a language model under their published names."""

    bos: str
    mask: str
    special: tuple[str, ...]
    joined: tuple[str, ...]
    """What the chat template writes around a text, one token each: the tiny model's contexts are short, and every
    further token makes look-up harder to learn."""
    eos: str = "<|endoftext|>"


CONTROL = {
    "llada": ControlTokens(
        bos="<|startoftext|>",
        mask="<|mdm_mask|>",
        special=(
            "<|startoftext|>",
            "<|endoftext|>",
            "<|reserved_token_1|>",
            "<|reserved_token_2|>",
            "<|mdm_mask|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        joined=tuple(f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ROLES),
    ),
    "dream": ControlTokens(
        bos="<|beginoftext|>",
        mask="<|mask|>",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
        joined=(*(f"<|im_start|>{role}\n" for role in ROLES), "<|im_end|>\n"),
    ),
}
"""By the family of the language model."""
BLANK = " "
"""The token of an empty cell where glyphs are written as words."""


@dataclass(frozen=True)
class GlyphTokens:
    """Token ids by char, colour, shape, task and aspect id; entry 0 of the first three is BLANK."""

    char: tuple[int, ...]
    colour: tuple[int, ...]
    shape: tuple[int, ...]
    task: tuple[int, ...]
    aspect: tuple[int, ...]
    blank: int


def build_tokenizer(family: str = "llada") -> PreTrainedTokenizerFast:
    """A fresh tokenizer; it adds no BOS or EOS itself. Token ids below 256 are the bytes."""
    control = CONTROL[family]
    core = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokens = (*control.special, *control.joined)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    # A task word owns the space behind it: stripping the space instead would lose it when decoding.
    core.add_tokens([AddedToken(f"{task} ", normalized=False) for task in TASKS])
    core.add_tokens([_whole(word) for word in dict.fromkeys((*ASPECTS, *COLOURS[1:], *SHAPES[1:]))])
    # Behind the words of the glyph task, so that those keep their ids. A kind follows a colour and owns the space.
    core.add_tokens([AddedToken(f"{task} ", normalized=False) for task in text_context.TASKS])
    core.add_tokens([AddedToken(f" {kind}", normalized=False) for kind in KINDS])
    core.add_tokens(
        [_whole(word) for word in (text_context.THING, text_context.YES, text_context.NO, *text_context.PLACES)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=control.bos,
        eos_token=control.eos,
        pad_token=control.eos,
        mask_token=control.mask,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _whole(word: str) -> AddedToken:
    return AddedToken(word, single_word=True, normalized=False)


def glyph_tokens(tokenizer: PreTrainedTokenizerFast) -> GlyphTokens:
    """The one token of each char, colour, shape, task and aspect; raises when a word is not one token."""

    one = partial(_one_token, tokenizer)
    return GlyphTokens(
        char=tuple(one(char or BLANK) for char in CHARS),
        colour=tuple(one(colour or BLANK) for colour in COLOURS),
        shape=tuple(one(shape or BLANK) for shape in SHAPES),
        task=tuple(one(f"{task} ") for task in TASKS),
        aspect=tuple(one(aspect) for aspect in ASPECTS),
        blank=one(BLANK),
    )


def word_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The one token of each word that names a stamp of the task families."""
    texts = {word: word for word in (*CHARS[1:], *COLOURS[1:], *SHAPES[1:], *text_context.PLACES)}
    texts |= {kind: f" {kind}" for kind in KINDS}
    return {word: _one_token(tokenizer, text) for word, text in texts.items()}


def _one_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"{text!r} is {len(ids)} tokens; the synthetic tasks need a tokenizer of build_tokenizer()")
    return int(ids[0])


def _byte_symbols() -> list[str]:
    """What byte-level BPE writes for each byte: itself if it is visible, else the next free character from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
