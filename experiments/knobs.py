"""Whether the knobs of a config are those of the class that it names; what does not fit is refused in one sentence."""

import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin


def check_knobs(group: str, target: type, knobs: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Compares knobs with a constructor and with the option's own file; `group` is how a message names them.

    Raises:
        ValueError: for a knob that the constructor does not have, or a value of another type.
    """
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if not takes_any and (unknown := sorted(knobs.keys() - parameters.keys())):
        raise ValueError(f"{group}.{unknown[0]}: {target.__name__} has no such knob; it has {', '.join(parameters)}")
    _compare_types(group, knobs, defaults)
    for name, value in knobs.items():
        if name in parameters and not _fits(value, hint := parameters[name].annotation):
            raise ValueError(f"{group}.{name}={value!r} is not {_describe(hint)}")


def _compare_types(where: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses a text where the option's own file has a number or a truth value; nested knobs have no annotation."""
    for name, default in defaults.items():
        value = given.get(name)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            _compare_types(f"{where}.{name}", value, default)
        elif isinstance(default, bool) and isinstance(value, str):
            raise ValueError(f"{where}.{name}={value!r} is not true or false")
        elif isinstance(default, int | float) and isinstance(value, str):
            raise ValueError(f"{where}.{name}={value!r} is not a number")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a config value is of the annotated type; annotations beyond plain ones are left to the constructor."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, types.NoneType):
        return isinstance(value, hint)
    return True


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
