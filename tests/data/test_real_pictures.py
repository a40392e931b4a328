"""Real charts, pages and photos, where they are given: SHIRG_REAL_SAMPLES=DIR, one dataset a subfolder."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments.data.folder import Folder

ROOT = os.environ.get("SHIRG_REAL_SAMPLES")
DATASETS = sorted(path.parent for path in Path(ROOT).glob("*/metadata.jsonl")) if ROOT else []

pytestmark = [pytest.mark.real, pytest.mark.skipif(not DATASETS, reason="SHIRG_REAL_SAMPLES names no such folder")]


@pytest.mark.parametrize("root", DATASETS, ids=lambda path: path.name)
def test_every_picture_loads(root: Path) -> None:
    data = Folder(root=root)
    samples = [data[i] for i in range(len(data))]
    assert len({sample.id for sample in samples}) == len(samples) > 0
    loaders = {sample.meta["picture"]: sample.load_image for sample in samples}
    for name, load in loaders.items():
        picture = load()
        assert picture.mode == "RGB" and min(picture.size) > 50, name
        assert np.asarray(picture).std() > 5, f"{name} is one flat colour"
    assert all(sample.answers and sample.question for sample in samples)
