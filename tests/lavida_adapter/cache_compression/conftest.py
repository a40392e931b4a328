"""The models of this folder's tests."""

import pytest

from lavida_adapter import Lavida
from tests.lavida_adapter.cache_compression.prompts import FAMILIES, small


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Lavida:
    return small(request.param)
