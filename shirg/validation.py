"""Errors that are raised on purpose, and the checks that options and scores share.

A `UserError` says in one sentence what is wrong, where, and what to do. Commands print it and exit with 1. Every other
exception is a bug and keeps its traceback. A selector outside this project raises it too, from `shirg`.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

OptionGroup = TypeVar("OptionGroup")


class UserError(ValueError):
    """What was asked for cannot be done; the message says what is wrong, where, and what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""

    def __str__(self) -> str:
        # FileNotFoundError would print an error number, and there is none.
        return str(self.args[0])


class OptionBlock:
    """Options that belong together; printed by those that differ from their defaults."""

    def __repr__(self) -> str:
        default = type(self)()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def one_of(name: str, value: object, literal: Any) -> None:
    """Checks that `value` is one of the values of a `Literal` type.

    Raises:
        UserError: it is not; the message lists the values.
    """
    allowed = get_args(literal)
    if value not in allowed:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(map(str, allowed))}")


def option_group(name: str, given: Mapping[str, Any] | None, kind: type[OptionGroup]) -> OptionGroup:
    """The dataclass `kind` with the given fields; the other fields keep their defaults.

    Raises:
        TypeError: a field that `kind` does not have.
    """
    assert is_dataclass(kind)
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(given or {}) - set(known))
    if unknown:
        raise TypeError(f"{name} has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    return kind(**dict(given or {}))


def assert_finite(scores_BN: Tensor, valid_BN: Tensor, name: str) -> None:
    """Checks that every valid token has a finite score; on a GPU without waiting for the device.

    Raises:
        RuntimeError: a score is NaN or infinite; on a GPU at the next synchronisation.
    """
    torch._assert_async(
        (scores_BN.isfinite() | ~valid_BN).all(),
        f"{name}: the score of a token is not finite; look for NaN, inf or values beyond 1e18 in the features and in "
        "the relevance",
    )
