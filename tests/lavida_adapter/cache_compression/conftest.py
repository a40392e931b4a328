"""The model of this folder's tests."""

import pytest

from lavida_adapter import Lavida
from tests.lavida_adapter.cache_compression.prompts import small


@pytest.fixture
def model() -> Lavida:
    """Three layers with grouped keys."""
    return small()
