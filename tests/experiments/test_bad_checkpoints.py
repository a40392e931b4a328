"""A checkpoint that cannot be loaded ends eval.py with one sentence and exit code 1."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.experiments.conftest import finish, result_of, start


@pytest.fixture
def weights(tiny_weights: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_weights, tmp_path / "weights"))


def one_sentence(weights: Path, cwd: Path) -> str:
    code, _, err = finish(start("eval", f"model.path={weights}", "selector=pooled", "limit=1", "study=s", cwd=cwd))
    assert (code, len(err)) == (1, 1), err
    (job,) = (cwd / "outputs/s").glob("*/result.json")
    result = result_of(job.parent)
    assert result["status"] == "failed"
    assert err[0] == f"error: {result['reason']}"
    return err[0]


def test_a_pickle_is_refused_with_its_reason(weights: Path, tmp_path: Path) -> None:
    (weights / "model.safetensors").unlink()
    torch.save({"model.image_newline": torch.zeros(16)}, weights / "pytorch_model.bin")
    assert one_sentence(weights, tmp_path) == (
        f"error: {weights} holds pickled weights only (pytorch_model.bin): loading a pickle can run any code, so it is "
        "refused; convert the checkpoint to safetensors"
    )


def test_tensors_that_do_not_fit_are_all_named(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights / "model.safetensors")
    del tensors["model.mm_projector.2.bias"]
    tensors["model.image_newline"] = torch.zeros(15)
    save_file(tensors, weights / "model.safetensors")
    assert one_sentence(weights, tmp_path) == (
        f"error: the tensors in {weights} do not fit its config.json: 1 missing: model.mm_projector.2.bias; "
        "1 of the wrong shape: model.image_newline is [15], expected [16]"
    )
