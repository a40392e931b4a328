"""The list of planted faults still fits the sources; `make mutants` plants them."""

import ast
import re

import pytest

from tests.mutations import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    source = (ROOT / fault.file).read_text()
    assert source.count(fault.old) == 1, f"{fault.file} has changed: adapt the fault"
    changed = source.replace(fault.old, fault.new)
    assert changed != source
    ast.parse(changed)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_test_exists(fault: Fault) -> None:
    file, name = re.fullmatch(r"(tests/[\w/]+\.py)::(test_\w+)(?:\[.+\])?", fault.caught_by).groups()
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions
