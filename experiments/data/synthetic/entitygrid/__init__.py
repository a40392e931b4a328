"""`data=entitygrid`: one entity at every place of a picture, to measure what cutting it costs (docs/data.md)."""

from experiments.data.synthetic.entitygrid.entity_dataset import EntityGrid

__all__ = ["EntityGrid"]
