"""No selector makes a tensor on the device from numbers of the host: that copy waits for all that runs there."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from shirg import Selector
from tests.cases import Case
from tests.features import SIZES, features_for
from tests.test_contract import ALL


class Copies(TorchFunctionMode):
    """Records calls like torch.tensor([...], device=...)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor) and "device" in (kwargs or {}):
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_copied_from_the_host(name: str) -> None:
    case: Case = ALL[name]
    selector: Selector = case.build(**case.options)
    features = features_for(selector, (2, 2), sizes=SIZES[(2, 2)])
    selector(features)  # tables of the geometry are made once
    with Copies() as copies:
        selector(features)
    assert copies.found == []


def test_such_a_copy_is_seen() -> None:
    with Copies() as copies:
        torch.tensor([1.0], device="cpu")
        torch.tensor([1.0]).to("cpu", non_blocking=True)
    assert copies.found == [[1.0]]
