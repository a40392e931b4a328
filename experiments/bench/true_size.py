"""`python -m experiments.bench.true_size`: one process of the GPU bench, at the published sizes with random weights.

The weights are made on the device in bfloat16, the pictures on the spot: nothing is downloaded, and Hydra is not
needed. `experiments.bench.gpu` starts these processes, one for each group of measurements, so that a kernel that breaks
one process leaves the others alone. `make true-size` starts one on a CPU. Every row is written to the JSON file as soon
as it is measured.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments.bench import (
    attention_kernels,
    captured_selectors,
    encode_stages,
    kernel_times,
    stage_times,
    unequal_stage,
)
from experiments.bench.recorder import Bench, Recorder, machine, short
from experiments.data.synthetic.tokenizer import build_tokenizer
from experiments.errors import CommandParser
from experiments.profiling import measure_limits, use_device
from lavida_adapter import DreamConfig, LanguageModelConfig, Lavida, LavidaConfig, LladaConfig, VisionConfig
from lavida_adapter.prompt import prompt_ids
from lavida_adapter.views import make_views

SIDE = 1024
"""Pixels of a picture's side: a square fills the largest canvas, so that no token is padding."""
N_TEXT = 84
"""Text tokens of a prompt, the length of LaViDa's own prompts with a question of one line."""
N_ANSWER, N_STEPS = 32, 30

LMS: dict[str, LanguageModelConfig] = {"llada": LladaConfig(), "dream": DreamConfig()}

PARTS: dict[str, Callable[[Bench], None]] = {
    "systems": stage_times.measure_systems,
    "reference": stage_times.measure_reference,
    "steps": stage_times.measure_steps,
    "encoding": encode_stages.measure_encoding,
    "selectors": captured_selectors.measure_selectors,
    "kernel": captured_selectors.measure_kernel,
    "attention": attention_kernels.measure_attention,
    "kernels": kernel_times.measure_kernels,
    "unequal": unequal_stage.measure_unequal,
}


def published(lm: str) -> LavidaConfig:
    """LaViDa at its published size; no system prompt, since the built-in tokenizer makes a token of each byte."""
    return LavidaConfig(lm=LMS[lm], system_prompt="", trained=False)


def toy(lm: str) -> LavidaConfig:
    """The same structure at toy width, for a rehearsal on a CPU."""
    narrow = replace(
        LMS[lm], d_model=24, n_heads=4, n_kv_heads=4 if lm == "llada" else 2, n_layers=2, mlp_hidden_size=32
    )
    few = replace(narrow, vocab_size=2000, mask_token_id=1999, eos_token_id=1998, pad_token_id=1998)
    vision = VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8
    )
    canvases = ((64, 128), (128, 64), (128, 128))
    return LavidaConfig(vision=vision, lm=few, system_prompt="", trained=False, image_grid_pinpoints=canvases)


SIZES = {"published": published, "toy": toy}


def random_model(config: LavidaConfig, device: torch.device, dtype: torch.dtype) -> Lavida:
    """A model whose weights are drawn on the device itself."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Lavida(config, build_tokenizer())
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def picture(seed: int) -> Image.Image:
    """Soft noise: neighbouring tokens resemble each other, as in a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def question_of(model: Lavida) -> str:
    """A question that brings the prompt's text to N_TEXT tokens."""
    short = len(prompt_ids(model.tokenizer, "?", model.config)) - 1  # the placeholder of the picture is no text
    return "?" * max(N_TEXT - short + 1, 1)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m experiments.bench.true_size", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="where the JSON goes")
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"some of {', '.join(PARTS)}")
    add("--lm", choices=LMS, default="llada", help="the language model")
    add("--engines", type=lambda text: text.split(","), default=["eager", "graph"], help="eager, graph, compile")
    add("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16], help="batch sizes")
    add("--rounds", type=int, default=7, help="how often each system has its turn; fewer at larger batches")
    add(
        "--pictures",
        type=lambda text: [Path(part) for part in text.split(",")],
        help="files, a turn each, for made ones",
    )
    add("--answer", type=int, default=N_ANSWER, help="new tokens")
    add("--steps", type=int, default=N_STEPS, help="denoising steps")
    add("--seconds", type=float, default=180.0, help="when to stop; what is not measured by then is recorded as such")
    add("--size", choices=SIZES, default="published", help="toy: a rehearsal")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    add("--commit", help="the commit that is measured, where there is no git checkout")
    given = parser.parse_args(arguments)
    if given.pictures and len(given.pictures) < max(given.batch):
        parser.error(f"--pictures: {len(given.pictures)} pictures for a batch of {max(given.batch)}")
    if missing := [str(path) for path in given.pictures or () if not path.is_file()]:
        parser.error(f"--pictures: {missing[0]} does not exist")
    return given


def pictures_of(given: argparse.Namespace) -> list[Image.Image]:
    """The files, or as many made pictures as the largest batch has rows."""
    if not given.pictures:
        return [picture(seed) for seed in range(max(given.batch))]
    return [Image.open(path).convert("RGB") for path in given.pictures]


def limits_of(device: torch.device, dtype: torch.dtype) -> Mapping[str, Any]:
    with torch.inference_mode():
        found = measure_limits(device, dtype).report()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def main(arguments: list[str]) -> None:
    began = time.monotonic()
    given = parse(arguments)
    device, dtype = use_device(given.device), getattr(torch, given.dtype)
    head = {
        "command": short(shlex.join(["python", "-m", "experiments.bench.true_size", *arguments])),
        "machine": machine(device, given.commit),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "pictures": [path.name for path in given.pictures or ()],
        "sizes": {
            "lm": given.lm,
            "size": given.size,
            "dtype": given.dtype,
            "answer": given.answer,
            "steps": given.steps,
        },
    }
    recorder = Recorder(given.out, head, began + given.seconds)
    recorder.note("limits_before", limits_of(device, dtype))
    model = random_model(SIZES[given.size](given.lm), device, dtype)
    views = [make_views(image, model.config) for image in pictures_of(given)]
    bench = Bench(
        model=model,
        lm=given.lm,
        views=views,
        question=question_of(model),
        batches=given.batch,
        engines=given.engines,
        rounds=given.rounds,
        n_answer=given.answer,
        n_steps=given.steps,
        recorder=recorder,
    )
    recorder.note("ready_s", time.monotonic() - began)
    for part in given.parts:
        with torch.inference_mode():
            PARTS[part](bench)
    del bench, model, views
    recorder.note("limits_after", limits_of(device, dtype))
    recorder.note("machine_after", machine(device, given.commit))
    recorder.note("seconds", time.monotonic() - began)


if __name__ == "__main__":
    main(sys.argv[1:])
