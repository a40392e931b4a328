"""`data=entitygrid`: one entity at every place of a cut picture, to see what the cuts cost (docs/data.md)."""

from experiments.data.synthetic.entitygrid.entity_dataset import EntityGrid

__all__ = ["EntityGrid"]
