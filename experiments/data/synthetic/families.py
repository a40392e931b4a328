"""The families of synthetic tasks, by the name of their dataset without "synth_"."""

from experiments.data.synthetic.chart import SynthChart
from experiments.data.synthetic.doc import SynthDoc
from experiments.data.synthetic.grid import SynthGrid
from experiments.data.synthetic.shapes import SynthShapes
from experiments.data.synthetic.task import SynthTask

FAMILIES: dict[str, type[SynthTask]] = {
    "chart": SynthChart,
    "doc": SynthDoc,
    "grid": SynthGrid,
    "shapes": SynthShapes,
}
