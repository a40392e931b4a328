"""The projector: two linear layers with an exact GELU between them, from the tower's width to the language model's."""

from torch import nn


def build_projector(vision_width: int, lm_width: int) -> nn.Sequential:
    """`mlp2x_gelu`, applied to every token on its own; keys 0 and 2 as in the published checkpoint."""
    return nn.Sequential(nn.Linear(vision_width, lm_width), nn.GELU(), nn.Linear(lm_width, lm_width))
