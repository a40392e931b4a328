"""Every case of every rival in the folder of golden numbers is a test; one printed line per rival."""

from collections import defaultdict
from typing import Any

import pytest

from tests.golden_data import parity_folder
from tests.parity.rivals.agreement import Agreement, read_cases

_AGREEMENTS: dict[str, Agreement] = defaultdict(Agreement)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rival_case" in metafunc.fixturenames:
        cases = read_cases(parity_folder(metafunc.config.getoption("--golden"), "rivals"))
        for case in cases:
            case.agreement = _AGREEMENTS[case.kind]
            case.agreement.cases.add(case.name)
        metafunc.parametrize("rival_case", cases, ids=[f"{case.kind}-{case.name}" for case in cases])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _AGREEMENTS:
        return
    folder = parity_folder(terminalreporter.config.getoption("--golden"), "rivals")
    terminalreporter.section(f"parity of the rivals with their official code: {folder}")
    for kind, agreement in sorted(_AGREEMENTS.items()):
        terminalreporter.line(agreement.line(kind))
