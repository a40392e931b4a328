"""The families of language models, and everything in which they differ.

Code outside this table, the model classes and the readers of published files never asks which family a model is of.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lavida_adapter.dream import Dream
from lavida_adapter.language_model import LanguageModel
from lavida_adapter.llada import Llada
from lavida_adapter.lm_config import FamilyName


@dataclass(frozen=True)
class Family:
    """A published language model that LaViDa was trained on."""

    language_model: type[LanguageModel]


FAMILIES: Mapping[FamilyName, Family] = {
    "llada": Family(Llada),
    "dream": Family(Dream),
}
