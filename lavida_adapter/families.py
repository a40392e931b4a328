"""The families of language models, and everything in which they differ.

Code outside this table, the model classes and the readers of published files never asks which family a model is of.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lavida_adapter import chat_template
from lavida_adapter.chat_template import ChatTemplate
from lavida_adapter.dream import Dream
from lavida_adapter.dream_published import DREAM_SAMPLER
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.llada import Llada
from lavida_adapter.lm_config import FamilyName
from lavida_adapter.sampling import LLADA_SAMPLER, Sampler

_QWEN_PRETOKENS = "|".join(
    (
        r"(?i:'(?:[sdmt]|re|ve|ll))",  # the end of a contraction
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with one character that is no digit before it
        r"\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line breaks after it
        r"\s*[\r\n]+",  # line breaks, with the space before them
        r"\s+(?!\S)",  # space, but for the last character before a word
        r"\s+",
    )
)


@dataclass(frozen=True)
class Family:
    """A published language model that LaViDa was trained on."""

    language_model: type[LanguageModel]
    sampler: Sampler
    """Its rules of decoding."""

    template: ChatTemplate
    renamed: tuple[tuple[str, str], ...] = ()
    """Modules in our tree and in the published one, where they differ; the first that holds a name counts."""
    pretokens: str | None = None
    """The pattern that cuts a text before byte-pair merging; None: no published copy comes without a tokenizer.json."""

    def published_name(self, name: str) -> str:
        """The name of a tensor or module of `LavidaModules` in the published model."""
        for own, published in self.renamed:
            if name == own or name.startswith(f"{own}."):
                return published + name.removeprefix(own)
        return name


FAMILIES: Mapping[FamilyName, Family] = {
    "llada": Family(Llada, LLADA_SAMPLER, chat_template.LLADA),
    "dream": Family(
        Dream,
        DREAM_SAMPLER,
        chat_template.DREAM,
        (("model.transformer.lm_head", "lm_head"), ("model.transformer", "model")),
        _QWEN_PRETOKENS,
    ),
}
