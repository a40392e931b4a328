"""Options shared by all tests."""

import os
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once: no test depends on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The suite draws the same inputs each time, so that it passes or fails by the code alone;
# `pytest --hypothesis-profile=search` draws new ones.
settings.register_profile("suite", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=None,
        help="folder of golden numbers to check instead of the copy under tests/golden (give one test folder with it)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread: golden numbers were made with one, and two test processes share two cores."""
    torch.set_num_threads(1)
