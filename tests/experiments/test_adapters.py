"""`adapter=`: a path, a name beside the weights, or the selector's own."""

from pathlib import Path

import pytest

from experiments.jobs.results import adapter_path


@pytest.fixture
def model(tmp_path: Path) -> dict[str, str]:
    for name in ("pooled", "shirg"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    return {"path": str(tmp_path)}


def test_names_lie_beside_the_weights(model: dict[str, str]) -> None:
    assert adapter_path(None, model, "shirg") is None
    assert adapter_path("own", model, "shirg") == f"{model['path']}/adapters/shirg"
    assert adapter_path("pooled", model, "shirg") == f"{model['path']}/adapters/pooled"
    assert adapter_path("somewhere/else", model, "shirg") == "somewhere/else"


def test_an_adapter_that_is_not_there(model: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"there is no adapter saint in .* \(pooled, shirg\); train one: python"):
        adapter_path("own", model, "saint")
    with pytest.raises(ValueError, match="it has none"):
        adapter_path("own", {"path": "org/model"}, "shirg")
