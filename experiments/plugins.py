"""Plug-ins: the object that an option's `_target_` names, built from the values of the config.

This is the only file that calls `hydra.utils.instantiate`. An option that does not exist, a value of another type and
a value that the constructor refuses raise one sentence that names the group and what it takes.
"""

import importlib
import inspect
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.errors import ConfigError, instead, is_user_error, nearest
from experiments.schema import CONF


def build_plugin(
    cfg: DictConfig, group: str, kinds: Sequence[type | str], fixed: Mapping[str, Any] | None = None
) -> Any:
    """The object of a config group.

    Args:
        kinds: base classes, one of which it has, or methods, all of which it has. Nothing else is built, because a
            constructor runs any code.
        fixed: replaces values of the config.

    Raises:
        ConfigError: no `_target_`, one of another kind, an unknown option, a value of the wrong type, or a ValueError
            or TypeError of the constructor. An error that the constructor raises on purpose is passed on as it is.
    """
    node = OmegaConf.select(cfg, group)
    if "_target_" not in node:
        raise ConfigError(f"{group}: the config has no _target_; choose an option, for example {group}=NAME")
    values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    path = values.pop("_target_")
    options = {str(k): v for k, v in values.items()} | dict(fixed or {})
    target = _find_class(path, group)
    if not _is_of(target, kinds):
        needed = " or ".join(map(_name_of, kinds))
        raise ConfigError(f"{group}._target_={path} is of another kind: it must be or have {needed}")
    check_options(group, target, options, _defaults(group, path))
    try:
        return instantiate({"_target_": path, **options}, _convert_="all", _recursive_=False)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None:
            raise
        if isinstance(cause, ValueError | TypeError) and not is_user_error(cause):
            raise ConfigError(f"{group}: {target.__name__} cannot be built: {_one_line(cause)}") from cause
        raise cause from None


def _find_class(path: Any, group: str) -> type:
    """The class of a dotted name, whose module is imported; Hydra's own function would log what is wrong as well."""
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # what a module raises while it is imported is its own affair
        raise ConfigError(
            f"{group}._target_={path}: {module or path} cannot be imported ({_one_line(error)})"
        ) from error
    if not isinstance(found, type):
        raise ConfigError(f"{group}._target_={path}: {module} has no class {name}; give the dotted name of one")
    return found


def _name_of(kind: type | str) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _is_of(target: type, kinds: Sequence[type | str]) -> bool:
    classes = tuple(kind for kind in kinds if isinstance(kind, type))
    methods = [kind for kind in kinds if isinstance(kind, str)]
    # Every class can be called, which makes an object: what counts is what its own code defines.
    has_all = all(any(name in vars(base) for base in target.__mro__[:-1]) for name in methods)
    return issubclass(target, classes) if classes else has_all


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _defaults(group: str, target: str) -> Mapping[str, Any]:
    """The values in the file of the option that builds this target."""
    return next((option for option in _options(group.partition(".")[0]) if option.get("_target_") == target), {})


@cache
def _options(group: str) -> list[dict[str, Any]]:
    """The options of a config group that are files here."""
    loaded = [OmegaConf.to_container(OmegaConf.load(path)) for path in sorted((CONF / group).glob("*.yaml"))]
    return [{str(k): v for k, v in option.items()} for option in loaded if isinstance(option, dict)]


def check_options(group: str, target: type, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Compares values with the parameters of a constructor and with the option's own file.

    Raises:
        ConfigError: an option that the constructor does not have, or a value of another type.
    """
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if not takes_any and (unknown := sorted(options.keys() - parameters.keys())):
        what = f"{group}.{unknown[0]}: {target.__name__} has no such option"
        raise ConfigError(what + instead(unknown[0], parameters, f"it has {', '.join(parameters)}"))
    _compare_types(group, options, defaults)
    for name, value in options.items():
        if name in parameters and not _fits(value, hint := parameters[name].annotation):
            near = nearest(value, map(str, get_args(hint))) if isinstance(value, str) else None
            guess = f"; did you mean {near}?" if near is not None else ""
            raise ConfigError(f"{group}.{name}={value!r} is not {_describe(hint)}{guess}")


def _compare_types(where: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses text where the option's file has a number or a boolean; nested values have no annotation to check."""
    for name, default in defaults.items():
        value = given.get(name)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            _compare_types(f"{where}.{name}", value, default)
        elif isinstance(default, bool) and isinstance(value, str):
            raise ConfigError(f"{where}.{name}={value!r} is not true or false")
        elif isinstance(default, int | float) and isinstance(value, str):
            raise ConfigError(f"{where}.{name}={value!r} is not a number")


MOST = 2.0**63
"""Largest value of any number in a config: far beyond all that mean something, and its products fit into float32."""


def check_finite(value: Any, key: str = "") -> None:
    """Refuses numbers that are none (NaN), infinite or absurdly large, anywhere in a config.

    Raises:
        ConfigError: names the key.
    """
    if isinstance(value, Mapping):
        for name, part in value.items():
            check_finite(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            check_finite(part, key)
    elif isinstance(value, float) and not abs(value) <= MOST:
        raise ConfigError(f"{key}={value}: give a number between -2^63 and 2^63")


_LISTS, _MAPPINGS = (list, Sequence), (dict, Mapping)


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
    if origin in _LISTS:
        return isinstance(value, list | tuple) and all(_fits(part, get_args(hint)[0]) for part in value)
    if origin in _MAPPINGS:
        return isinstance(value, Mapping) and all(_fits(part, get_args(hint)[1]) for part in value.values())
    return True


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin in _LISTS:
        return f"a list of {_describe(get_args(hint)[0]).removeprefix('a ')}s"
    if origin in _MAPPINGS:
        return f"names with {_describe(get_args(hint)[1])} each"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
