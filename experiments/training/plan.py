"""`train.py ... plan=true`: prints what a run would train, its steps and its memory (docs/method.md, "Planning a run").

The model is built without weights, so the plan of the published checkpoint needs neither its files nor a GPU. Nothing
is trained and no file is written.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from baselines import Pooled
from experiments import build
from experiments.data.loader import Batches
from experiments.data.sample import Dataset, Sample
from experiments.errors import one_sentence
from experiments.schema import local_folder
from experiments.training.multi_budget import build_schedule, tokens_of
from experiments.training.stages import lora_config, make_trainable, objective_config, optim_config
from lavida_adapter import DreamConfig, LanguageModelConfig, Lavida, LavidaConfig, LladaConfig
from lavida_adapter.checkpoint import read_config
from lavida_adapter.lightning_module import LavidaModule
from lavida_adapter.lora import part_of, rank_growth
from lavida_adapter.memory_estimate import Shape, footprint
from lavida_adapter.objective import ObjectiveConfig
from lavida_adapter.prompt import training_example
from lavida_adapter.sharding import units
from lavida_adapter.tokenizer_files import load_tokenizer, n_rows
from lavida_adapter.views import geometry_layout, pooled_count
from shirg import MissingFileError, Selector, UserError

PUBLISHED: Mapping[str, LanguageModelConfig] = {
    "jacklishufan/lavida-llada-v1.0-instruct": LladaConfig(vocab_size=126349),
    "jacklishufan/lavida-llada-1.0-fim": LladaConfig(vocab_size=126349),
    "hbXNov/lavida-llada-reason": LladaConfig(vocab_size=126349),
    "jacklishufan/lavida-dream-v1.0-instruct": DreamConfig(vocab_size=151667),
}
"""The published checkpoints, with as many rows of the embedding as the tokenizer has (docs/lavida.md)."""
OPTIMISER = 4 + 4 + 8
"""Bytes per trained parameter: the parameter, its gradient and AdamW's two moments, all float32."""
SAMPLES = 8
"""How many samples are looked at for the longest text."""
GPUS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class FourCharacters:
    """A substitute for a tokenizer whose files are not here: one token for every four characters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * math.ceil(len(text) / 4)}


def show(cfg: DictConfig) -> None:
    """Prints the plan, or one sentence for bad input, and removes the empty folder that Hydra made for the job."""
    try:
        with one_sentence():
            plan(cfg)
    finally:
        folder = Path(HydraConfig.get().runtime.output_dir)
        for empty in (folder, *(p for p in folder.parents if p != Path.cwd() and p.is_relative_to(Path.cwd()))):
            with suppress(OSError):
                empty.rmdir()


def plan(cfg: DictConfig) -> None:
    """Prints the plan of a run.

    Raises:
        UserError: a stage that has no plan, or input that the run itself would refuse.
        MissingFileError: a checkpoint that is neither here nor a published one.
    """
    if cfg.stage not in ("adapt", "base"):
        what = "trains a small relevance head" if cfg.stage == "gate" else "makes the tiny model's base in minutes"
        raise UserError(f"plan=true: stage={cfg.stage} {what} and has no plan")
    model = skeleton(cfg)
    parts = build.build_parts(cfg)
    stream = build.build_stream(cfg, parts)
    selector = build.build_selector(cfg, model.config.budgets, model.config)
    batches = Batches(stream, cfg.batch_size)
    with torch.device("meta"):
        print("trained")
        make_trainable(cfg, model, selector)
    mix = build_schedule(cfg, model, selector)
    # These raise for options that the run would refuse.
    LavidaModule(model, selector, None, objective_config(cfg), optim_config(cfg), cfg.seed).configure_optimizers()
    if cfg.stage == "adapt":
        rank_growth(lora_config(cfg), model, selector)
    selectors = [selector] if mix is None else [s for turn in mix.turns for s in turn]
    samples = [batches.stream(place) for place in range(SAMPLES)]
    for line in (
        *parameters(model, selector),
        *schedule(cfg, parts),
        *memory(cfg, model, selector, selectors, samples),
    ):
        print(line)


def skeleton(cfg: DictConfig) -> Lavida:
    """The model of `model=...` on the meta device: names, shapes and dtypes without numbers."""
    path = cfg.model.get("path")
    if path is None:
        return build.build_model(cfg, torch.device("meta"))
    folder = local_folder(str(path))
    if folder is not None:
        config = build.switched(read_config(folder), cfg.model)
        tokenizer = load_tokenizer(folder, config)
        config = replace(config, lm=replace(config.lm, vocab_size=n_rows(tokenizer)))
    elif path in PUBLISHED:
        config, tokenizer = LavidaConfig(lm=PUBLISHED[path]), FourCharacters()
    else:
        raise MissingFileError(f"plan=true downloads nothing, and model.path={path} is not a folder here; give one")
    with torch.device("meta"):
        model = Lavida(config, tokenizer)
    return model.to(getattr(torch, str(cfg.dtype))).eval().requires_grad_(False)


def parameters(model: Lavida, selector: Selector) -> Iterator[str]:
    """Trained parameters in total, and frozen ones part by part."""
    named = [*model.model.named_parameters(), *((f"selector.{n}", p) for n, p in selector.named_parameters())]
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    total = sum(p.numel() for _, p in named)
    yield f"  together {trained:,} of {total:,} parameters ({trained / total:.3%})"
    frozen: dict[str, int] = {}
    for name, p in named:
        frozen[part_of(name)] = frozen.get(part_of(name), 0) + (0 if p.requires_grad else p.numel())
    yield "frozen   " + "  ".join(f"{part} {n:,}" for part, n in frozen.items() if n)


def schedule(cfg: DictConfig, parts: Mapping[str, Dataset]) -> Iterator[str]:
    """Steps and samples; epochs for a single dataset."""
    samples = cfg.optim.steps * cfg.batch_size
    held = ", ".join(f"{len(part):,} in {part.name}" for part in parts.values())
    if len(parts) == 1:
        n = sum(map(len, parts.values()))
        held += f": {samples / n:.2f} epochs of {math.ceil(n / cfg.batch_size):,} steps"
    yield f"steps    {cfg.optim.steps:,} of {cfg.batch_size} samples on any number of GPUs"
    yield f"data     {samples:,} samples from the {held}"


def memory(
    cfg: DictConfig, model: Lavida, selector: Selector, selectors: list[Selector], samples: Sequence[Sample]
) -> Iterator[str]:
    """The memory estimate: one line for each number of GPUs that divides the batch."""
    objective = objective_config(cfg)
    shape = largest_row(model, objective, selectors, samples)
    narrow = str(cfg.dtype) == "bfloat16" or str(cfg.trainer.precision).startswith("bf16")
    dtype = torch.bfloat16 if narrow else torch.float32
    guess = ", text by four characters a token" if isinstance(model.tokenizer, FourCharacters) else ""
    copies = "two copies" if objective.complementary else "one copy"
    yield (
        f"sample   {shape.picture:,} picture tokens + {shape.prompt} of text + {shape.answer} of answer and padding, "
        f"{copies} (the most of {len(samples)} samples{guess})"
    )
    trained = OPTIMISER * sum(p.numel() for m in (model, selector) for p in m.parameters() if p.requires_grad)
    base = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    split = [sum(layer.weight.nbytes for layer in layers) for _, layers in units(model)]
    model.to(dtype)
    row = []
    for recompute in (False, True):
        model.checkpoint_gradients(recompute)
        found = footprint(model, shape, objective, dtype)
        row.append(found.kept + found.passing)
    unit, name = (2**30, "GiB") if base + cfg.batch_size * row[0] > 2**30 else (2**20, "MiB")
    yield f"memory   an estimate, in {name} for each GPU; (in brackets with trainer.gradient_checkpointing=true)"
    yield f"         {'GPUs':>4} {'rows':>5} {'base':>6} {'trained':>8}" + "".join(
        f" {title:>20}" for title in ("activations", "total", "with trainer=fsdp")
    )
    for gpus in (n for n in GPUS if not cfg.batch_size % n):
        rows = cfg.batch_size // gpus
        cells = [base, trained, rows * row[0], rows * row[1]]
        # Under fsdp a unit is gathered while the one before it still computes.
        whole = max(map(sum, pairwise(split)), default=sum(split))
        shards = base if gpus == 1 else base - sum(split) * (1 - 1 / gpus) + whole
        cells += [x + trained + rows * kept for x in (base, shards) for kept in row]
        b, t, plain, again, total, less, sharded, least = (f"{x / unit:,.2f}" for x in cells)
        yield (
            f"         {gpus:4d} {rows:5d} {b:>6} {t:>8} {plain:>11} {f'({again})':>8} {total:>11} {f'({less})':>8} "
            f"{sharded:>11} {f'({least})':>8}"
        )
    kind = str(dtype).removeprefix("torch.")
    yield (
        f"formula  base: frozen parameters in {cfg.dtype}, under fsdp the linear layers of blocks in shards and two "
        f"neighbouring blocks, or the last block and the head, whole; trained: {OPTIMISER} bytes a parameter (itself, "
        f"its gradient, AdamW's two moments, all float32); activations: rows x what autograd keeps of one row's "
        f"forward pass in {kind}, counted on tensors without "
        "memory, and what comes on top in the backward pass: the gradient of the logits, and a block that runs again. "
        "Not in it: what the driver takes, fragmentation, buckets of ddp, what a selector needs while it scores"
    )


def largest_row(
    model: Lavida, objective: ObjectiveConfig, selectors: Sequence[Selector], samples: Sequence[Sample]
) -> Shape:
    """The largest row that the selectors and these samples give."""
    config = model.config
    prompt, answer = text_tokens(model, samples)
    selector = max(selectors, key=lambda s: picture_tokens(s, model))
    picture = picture_tokens(selector, model)
    views, px = config.budgets["full"] // config.vision.side**2, config.vision.image_size
    if selector.geometry != "lavida_tiles":
        layout = geometry_layout(config, selector.geometry)
        views, px = layout.n_views, layout.canvas_px[0]
    return Shape(
        rows=1,
        views=views,
        view_px=px,
        projected=picture if selector.stage == "pre" else tokens_of(model, selector.geometry),
        picture=picture,
        prompt=prompt,
        answer=max(answer, objective.answer_tokens or 0) + max(0, objective.extra_padding - 1),
    )


def picture_tokens(selector: Selector, model: Lavida) -> int:
    """The largest number of tokens that a picture can have in a prompt."""
    config, geometry = model.config, selector.geometry
    canvases = config.image_grid_pinpoints if config.image_aspect_ratio == "anyres" else ()
    pooled = max(pooled_count(canvas, config) for canvas in canvases or [(1, 1)])
    if geometry == "lavida_tiles":
        rows = max((h // config.vision.image_size for _, h in canvases), default=1) * config.vision.side
    else:
        rows = geometry_layout(config, geometry).canvas[0]
    if isinstance(selector.budget, int):
        return selector.budget + (rows if getattr(selector, "newline", "none") == "row" else 0)
    if selector.budget == "matched" or isinstance(selector, Pooled):
        return pooled
    return tokens_of(model, geometry) + rows


def text_tokens(model: Lavida, samples: Sequence[Sample]) -> tuple[int, int]:
    """The longest prompt, without its picture, and the longest answer."""
    examples = [
        training_example(model.tokenizer, s.prompt, s.to_learn, model.config, history=s.history) for s in samples
    ]
    return max(len(e.prompt) for e in examples) - 1, max(len(e.answer) for e in examples)
