"""The chat template of each language model: how turns are written, and which control tokens its tokenizer has.

docs/lavida.md, "Prompt" and "Dream". A template is rendered as pieces and not by the tokenizer, because the
texts of a dataset must stay text: a control token is recognised in a piece of the template only.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """A part of a prompt."""

    text: str
    is_template: bool
    """Whether the text of a control token is that token; in a dataset's text it is ordinary text."""


@dataclass(frozen=True)
class ChatTemplate:
    """How one family writes a conversation."""

    model: str
    """The language model whose tokenizer has the control tokens."""
    start: str
    """Before the first turn."""
    header: str
    """The beginning of a turn, with "{role}" for "system", "user" or "assistant"."""
    end: str
    """The end of a turn."""
    mask: str
    eos: str
    control: tuple[str, ...]
    """All control tokens that the tokenizer must have."""
    strips: bool
    """Whether contents lose the whitespace around them."""
    infill: str | None = None
    """Ends a gap of free length in a draft; None for a language model that no checkpoint was trained to infill."""
    fill: str | None = None
    """What the surplus slots of such a gap are filled with."""

    def head(self, role: str) -> str:
        return self.header.format(role=role)

    def content(self, text: str) -> str:
        """A content as the template writes it."""
        return text.strip() if self.strips else text

    def turn(self, role: str, text: str) -> tuple[Piece, ...]:
        """A whole turn; the text is a dataset's."""
        head, text = self.head(role), self.content(text)
        if text[:1].isspace():
            # The line break that ends the header may be one token with the whitespace after it.
            head, text = head.removesuffix("\n"), "\n" + text
        return Piece(head, True), Piece(text, False), Piece(self.end, True)


LLADA = ChatTemplate(
    model="LLaDA",
    start="<|startoftext|>",
    header="<|start_header_id|>{role}<|end_header_id|>\n\n",
    end="<|eot_id|>",
    mask="<|mdm_mask|>",
    eos="<|endoftext|>",
    control=(
        "<|startoftext|>",
        "<|endoftext|>",
        "<|mdm_mask|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    strips=True,
    infill="<|reserved_token_1|>",
    fill="<|reserved_token_2|>",
)
DREAM = ChatTemplate(
    model="Dream",
    start="",
    header="<|im_start|>{role}\n",
    end="<|im_end|>\n",
    mask="<|mask|>",
    eos="<|endoftext|>",
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
    strips=False,
)
