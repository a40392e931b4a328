"""Selectors that SHIRG is compared with: controls, and published pruning and merging methods."""

from baselines.cdpruner import CDPruner
from baselines.controls import Full, GlobalOnly, NormTopK, Random
from baselines.divprune import DivPrune
from baselines.even_context import EvenContext
from baselines.hiprune import HiPrune
from baselines.holov import HoloV
from baselines.llava_scissor import LlavaScissor
from baselines.oracle import Oracle
from baselines.otprune import OTPrune
from baselines.pooled import Pooled
from baselines.saint import Saint, SaintVote
from baselines.tome import ToMe
from baselines.topv import TopV
from baselines.uniform_grid import UniformGrid
from baselines.visionzip import VisionZip
from baselines.vispruner import VisPruner

__all__ = [
    "CDPruner",
    "DivPrune",
    "EvenContext",
    "Full",
    "GlobalOnly",
    "HiPrune",
    "HoloV",
    "LlavaScissor",
    "NormTopK",
    "OTPrune",
    "Oracle",
    "Pooled",
    "Random",
    "Saint",
    "SaintVote",
    "ToMe",
    "TopV",
    "UniformGrid",
    "VisPruner",
    "VisionZip",
]
