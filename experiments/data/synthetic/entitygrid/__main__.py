"""Writes EntityGrid-style questions as pictures and rows: `python -m experiments.data.synthetic.entitygrid DIR`.

Options of `data=entitygrid` may follow: `split=val canvas=[384,384] sizes=[28]`. Each split is a folder with images/,
metadata.jsonl and manifest.json, whose digests `data.source=disk` checks.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.data.synthetic.entitygrid.entity_dataset import EntityGrid
from experiments.data.synthetic.entitygrid.entitygrid_files import write
from experiments.errors import CommandParser, one_sentence
from experiments.schema import CONF
from shirg import UserError


def main(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="python -m experiments.data.synthetic.entitygrid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder that the split's folder is written into")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="options of conf/data/entitygrid.yaml")
    given = parser.parse_args(arguments)
    with one_sentence():
        data = EntityGrid(**_options(given.options))
        folder = write(data, given.folder)
    print(f"written  {folder}: {len(data)} questions; read it with data.source=disk data.root={given.folder}")


def _options(changes: list[str]) -> dict[str, Any]:
    """The options of conf/data/entitygrid.yaml with these changes.

    Raises:
        UserError: there is no such option.
    """
    defaults = OmegaConf.load(CONF / "data" / "entitygrid.yaml")
    OmegaConf.set_struct(defaults, True)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(defaults, OmegaConf.from_dotlist(changes)), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"data=entitygrid: {str(error).splitlines()[0]}") from None
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items() if key != "_target_"}


if __name__ == "__main__":
    main(sys.argv[1:])
