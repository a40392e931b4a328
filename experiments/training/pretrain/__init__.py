"""How the tiny model gets its base: a vision tower, a language model and their alignment.

docs/method.md, "The tiny testbed". Stand-ins for SigLIP's and LLaDA's own pretraining, which the published checkpoint
has behind it.
"""

from experiments.training.pretrain.text_stage import TextPretraining
from experiments.training.pretrain.vision_stage import Align, VisionPretraining

__all__ = ["Align", "TextPretraining", "VisionPretraining"]
