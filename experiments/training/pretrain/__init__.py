"""How the tiny model gets its base: a vision tower, a language model and their alignment.

These stages replace SigLIP's and LLaDA's own pretraining for the tiny model (docs/method.md, "The tiny testbed").
"""

from experiments.training.pretrain.text_stage import TextPretraining
from experiments.training.pretrain.vision_stage import Align, VisionPretraining

__all__ = ["Align", "TextPretraining", "VisionPretraining"]
