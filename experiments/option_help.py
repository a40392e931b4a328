"""`python eval.py --help selector=shirg`: the keys of an option, their defaults, allowed values and what they mean.

Nothing is written down twice. Keys and defaults are those of the composed config, allowed values stand in the comments
of the option's YAML file or in the annotations of the class that it builds, meanings in the docstrings of that class.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from experiments.errors import ConfigError, instead
from experiments.override_grammar import quote
from experiments.schema import CONF, VERSION_BASE, Run, description

TYPED = {
    "decode": "lavida_adapter.DecodeConfig",
    "lora": "lavida_adapter.LoraConfig",
    "objective": "lavida_adapter.ObjectiveConfig",
    "trainer": "experiments.schema.Trainer",
}
"""Classes whose fields are the keys of groups that name no `_target_`."""
HELP = ("--help", "-h")
_COMMENTED = re.compile(r"( *)([\w.]+):(?: +[^#]*)?(?:\s#\s*(.*))?$")


def wants(argv: Sequence[str]) -> bool:
    """Whether a command line asks for the help of groups or options, and not for that of the whole command."""
    return bool({*HELP} & {*argv}) and any(word not in HELP for word in argv)


def help_of(command: str, argv: Sequence[str]) -> str:
    """The help of each group (`selector`) or option (`selector=shirg`) that a command line names.

    Raises:
        ConfigError: a word that is neither.
    """
    words = [word for word in argv if word not in HELP]
    return "\n\n".join("\n".join(_help_of(command, word)) for word in words)


def _help_of(command: str, word: str) -> Iterator[str]:
    group, equals, option = word.partition("=")
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    if group not in groups:
        raise ConfigError(f"--help {word}: there is no such group of options{instead(group, groups)}")
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if not equals:
        yield f"{group}: --help {group}=OPTION lists the keys of one"
        yield from (f"  {name:<18} {description(CONF / group / f'{name}.yaml')}".rstrip() for name in options)
        return
    if option not in options:
        raise ConfigError(f"{word}: there is no such option{instead(option, options)}")
    path = CONF / group / f"{option}.yaml"
    yield word
    yield from _wrapped(description(path), "")
    if group == "sweep":
        yield from (f"  {line}" for line in path.read_text().splitlines() if not line.startswith("#"))
        return
    for key, value, remark, meaning in entries(command, group, option):
        yield from [""] if remark or meaning else []
        yield from _wrapped(f"{key}={value}" + (f"  # {remark}" if remark else ""), "  ", "      ")
        yield from _wrapped(meaning, "      ")


def _wrapped(text: str, indent: str, later: str | None = None) -> list[str]:
    width = get_terminal_size().columns
    more = indent if later is None else later
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )


def entries(command: str, group: str, option: str) -> Iterator[tuple[str, str, str, str]]:
    """Key, default, allowed values and meaning of each key of an option."""
    path = CONF / group / f"{option}.yaml"
    is_global = "@package _global_" in path.read_text()
    if is_global:  # an option that sets keys of other groups
        node = OmegaConf.create({key: value for key, value in _content(path).items() if key != "defaults"})
    else:
        with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name=command):
            node = compose(command, overrides=[f"{group}={option}"])[group]
    prefix = "" if is_global else group
    remarks = comments(group, option)
    target = node.get("_target_") or TYPED.get(group)
    described = _class_of(target) if target else None
    allowed, meanings = ({}, {}) if described is None else (_allowed(described), _meanings(described))
    told: set[str] = set()
    for name, value, kind in _leaves(node):
        about = name if name in meanings else name.partition(".")[0]
        known = meanings.get(about, "") if about not in told else ""
        told.add(about)
        yield f"{prefix}.{name}".lstrip("."), value, remarks.get(name) or allowed.get(name) or kind, known


def _content(path: Path) -> dict[str, Any]:
    """What a YAML file of the configuration says, unresolved."""
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and allowed values by type of everything below a node."""
    unresolved = OmegaConf.to_container(node, resolve=False)
    assert isinstance(unresolved, dict)
    for name, given in ((str(name), given) for name, given in unresolved.items() if name != "_target_"):
        key = f"{prefix}{name}"
        if isinstance(given, dict) and given:
            yield from _leaves(node[name], f"{key}.")
        elif OmegaConf.is_interpolation(node, name):
            yield key, _resolved(node, name, given), _field_docstrings(Run).get(given.strip("${}"), "")
        else:
            value = given if OmegaConf.is_missing(node, name) else node[name]
            kind = " | ".join(each.name for each in type(value)) if isinstance(value, Enum) else ""
            yield key, _text(value), "true | false" if isinstance(value, bool) else kind


def _resolved(node: DictConfig, name: str, given: str) -> str:
    """What a reference stands for; itself where that is known in a running job only."""
    try:
        return _text(node[name])
    except InterpolationResolutionError:
        return given


def _text(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, ListConfig | DictConfig):
        return str(OmegaConf.to_container(value)).replace("'", "").replace(", ", ",")
    if isinstance(value, Enum):
        return str(value.name)
    if isinstance(value, str):
        return quote(value).replace("\n", "\\n")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def comments(group: str, option: str) -> dict[str, str]:
    """The comment behind each key in the option's file, and in those that it is built on."""
    path = CONF / group / f"{option}.yaml"
    found: dict[str, str] = {}
    for base in _content(path).get("defaults", []):
        if isinstance(base, str) and base != "_self_" and (path.parent / f"{base}.yaml").is_file():
            found |= comments(group, base)
    above: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        if match := _COMMENTED.match(line):
            indent = len(match[1])
            above = [(depth, name) for depth, name in above if depth < indent] + [(indent, match[2])]
            if match[3]:
                found[".".join(name for _, name in above)] = match[3]
    return found


def _class_of(target: str) -> type:
    module, _, name = target.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _allowed(described: type) -> dict[str, str]:
    """The values of each parameter of a class whose annotation lists all of them."""
    try:
        hints = get_type_hints(described.__init__)  # type: ignore[misc]
    except NameError:  # a class of another library, with annotations for type checkers alone
        return {}
    return {name: " | ".join(map(str, get_args(hint))) for name, hint in hints.items() if get_origin(hint) is Literal}


def _meanings(described: type) -> Mapping[str, str]:
    """What the docstring of a class says about each argument, and those below its fields; a subclass's words count."""
    found: dict[str, str] = {}
    for each in reversed(described.__mro__[:-1]):
        if each.__module__.partition(".")[0] in ("torch", "lightning"):
            continue
        block = re.search(r"\n *Args:\n(.*?)(\n\n|\Z)", each.__doc__ or "", re.DOTALL)
        for match in re.finditer(r"^ {4}(?: {4})?(\w+): (.*(?:\n {9,}.*)*)", block[1] if block else "", re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
        found |= _field_docstrings(each)
    return found


def _field_docstrings(each: type) -> dict[str, str]:
    """The strings below the fields of a class, which Python itself does not keep."""
    body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for entry, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and is_text:
            found[entry.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return found
