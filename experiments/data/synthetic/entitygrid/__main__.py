"""Writes the EntityGrid-style probe as pictures and rows: `python -m experiments.data.synthetic.entitygrid DIR`.

Knobs of `data=entitygrid` may follow: `split=val canvas=[384,384] sizes=[28]`. Each split is a folder with images/,
metadata.jsonl and manifest.json, whose digests `data.source=disk` checks.
"""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from experiments.data.synthetic.entitygrid.entity_dataset import EntityGrid
from experiments.data.synthetic.entitygrid.entitygrid_files import write
from experiments.schema import CONF


def main(arguments: list[str]) -> int:
    if not arguments or "=" in arguments[0]:
        print(__doc__)
        return 1
    defaults = OmegaConf.load(CONF / "data" / "entitygrid.yaml")
    knobs = OmegaConf.to_container(OmegaConf.merge(defaults, OmegaConf.from_dotlist(arguments[1:])), resolve=True)
    assert isinstance(knobs, dict)
    try:
        data = EntityGrid(**{str(k): v for k, v in knobs.items() if k != "_target_"})
        folder = write(data, Path(arguments[0]))
    except (TypeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written  {folder}: {len(data)} questions; read it with data.source=disk data.root={arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
