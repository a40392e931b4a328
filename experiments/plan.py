"""`train.py ... plan=true`: what a run would train, how many steps it has and how much memory it needs.

docs/method.md, "Planning a run". The model is built without weights, so that the plan of the published checkpoint
needs neither its files nor a GPU. Nothing is trained and nothing is written.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from baselines import Pooled
from experiments import build, cli
from experiments.data.sample import Dataset, Sample
from experiments.study.job import is_bad_input
from experiments.study.record import local_folder
from experiments.training.mixing import build_mix, tokens_of
from experiments.training.sharded import frozen_linears
from experiments.training.stages import make_trainable, objective_config
from lavida_adapter.footprint import Shape, footprint
from lavida_adapter.geometries import geometry_layout
from lavida_adapter.prompt import training_example
from lavida_adapter.targets import part_of
from lavida_adapter.views import pooled_count
from shirg import Selector

if TYPE_CHECKING:
    from lavida_adapter import Lavida

PUBLISHED = "jacklishufan/lavida-llada-v1.0-instruct"
"""The checkpoint whose sizes are the defaults of `LavidaConfig`."""
ROWS = 126349
"""What is left of its embedding when it is loaded: the tokenizer's length (docs/lavida.md, "Constants")."""
OPTIMISER = 4 + 4 + 8
"""Bytes of a trained parameter: itself, its gradient, and AdamW's two moments, all float32."""
SAMPLES = 8
GPUS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class FourCharacters:
    """Stands in for a tokenizer that is not here: a token for every four characters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * math.ceil(len(text) / 4)}


def show(cfg: DictConfig) -> None:
    """Prints the plan, or one sentence for bad input, and takes away the empty folder that Hydra made for the job."""
    try:
        plan(cfg)
    except (ValueError, OSError) as error:
        if not is_bad_input(error):
            raise
        cli.fail(str(error))
    finally:
        folder = Path(HydraConfig.get().runtime.output_dir)
        for empty in (folder, *(p for p in folder.parents if p != Path.cwd() and p.is_relative_to(Path.cwd()))):
            with suppress(OSError):
                empty.rmdir()


def plan(cfg: DictConfig) -> None:
    """Prints the plan of a run.

    Raises:
        ValueError: for a stage that has no plan.
        FileNotFoundError: a checkpoint that is neither here nor the published one.
    """
    if cfg.stage not in ("adapt", "base"):
        raise ValueError(f"plan=true: stage={cfg.stage} makes the tiny model's base in minutes and has no plan")
    model = skeleton(cfg)
    parts = build.build_parts(cfg)
    stream = build.build_stream(cfg, parts)
    selector = build.build_selector(cfg, model.config.budgets, model.config)
    with torch.device("meta"):
        print("trained")
        make_trainable(cfg, model, selector)
    mix = build_mix(cfg, model, selector)
    selectors = [selector] if mix is None else [s for turn in mix.turns for s in turn]
    samples = [stream(place) for place in range(SAMPLES)]
    for line in (
        *parameters(model, selector),
        *schedule(cfg, parts),
        *memory(cfg, model, selector, selectors, samples),
    ):
        print(line)


def skeleton(cfg: DictConfig) -> "Lavida":
    """The model of `model=...` on the meta device: names, shapes and dtypes without numbers."""
    from lavida_adapter import Lavida, LavidaConfig
    from lavida_adapter.checkpoint import load_tokenizer, n_rows, read_config

    path = cfg.model.get("path")
    if path is None:
        return build.build_model(cfg, torch.device("meta"))
    folder = local_folder(str(path))
    if folder is not None:
        tokenizer = load_tokenizer(folder)
        config, rows = read_config(folder), n_rows(tokenizer)
    elif path == PUBLISHED:
        config, tokenizer, rows = LavidaConfig(), FourCharacters(), ROWS
    else:
        raise FileNotFoundError(f"plan=true downloads nothing, and model.path={path} is not a folder here; give one")
    with torch.device("meta"):
        model = Lavida(replace(config, lm=replace(config.lm, vocab_size=rows)), tokenizer)
    return model.to(getattr(torch, str(cfg.dtype))).eval().requires_grad_(False)


def parameters(model: "Lavida", selector: Selector) -> Iterator[str]:
    named = [*model.model.named_parameters(), *((f"selector.{n}", p) for n, p in selector.named_parameters())]
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    total = sum(p.numel() for _, p in named)
    yield f"  together {trained:,} of {total:,} parameters ({trained / total:.3%})"
    frozen: dict[str, int] = {}
    for name, p in named:
        frozen[part_of(name)] = frozen.get(part_of(name), 0) + (0 if p.requires_grad else p.numel())
    yield "frozen   " + "  ".join(f"{part} {n:,}" for part, n in frozen.items() if n)


def schedule(cfg: DictConfig, parts: Mapping[str, Dataset]) -> Iterator[str]:
    samples = cfg.optim.steps * cfg.batch_size
    held = ", ".join(f"{len(part):,} in {part.name}" for part in parts.values())
    if len(parts) == 1:
        n = sum(map(len, parts.values()))
        held += f": {samples / n:.2f} epochs of {math.ceil(n / cfg.batch_size):,} steps"
    yield f"steps    {cfg.optim.steps:,} of {cfg.batch_size} samples on any number of GPUs"
    yield f"data     {samples:,} samples from the {held}"


def memory(
    cfg: DictConfig, model: "Lavida", selector: Selector, selectors: list[Selector], samples: Sequence[Sample]
) -> Iterator[str]:
    """The estimate, one line for each number of GPUs that divides the batch."""
    objective, config = objective_config(cfg), model.config
    prompt, answer = text_tokens(model, samples)
    answer = max(answer, objective.answer_tokens or 0) + max(0, objective.extra_padding - 1)
    largest = max(selectors, key=lambda s: picture_tokens(s, model))
    picture = picture_tokens(largest, model)
    own = largest.geometry == "lavida_tiles"
    views, px = (config.budgets["full"] // config.vision.side**2, config.vision.image_size)
    if not own:
        layout = geometry_layout(config, largest.geometry)
        views, px = layout.n_views, layout.canvas_px[0]
    shape = Shape(
        rows=1,
        views=views,
        view_px=px,
        projected=picture if largest.stage == "pre" else tokens_of(model, largest.geometry),
        picture=picture,
        prompt=prompt,
        answer=answer,
    )
    narrow = str(cfg.dtype) == "bfloat16" or str(cfg.trainer.precision).startswith("bf16")
    dtype = torch.bfloat16 if narrow else torch.float32
    guess = ", text by four characters a token" if isinstance(model.tokenizer, FourCharacters) else ""
    copies = "two copies" if objective.complementary else "one copy"
    yield (
        f"sample   {picture:,} picture tokens + {prompt} of text + {answer} of answer and padding, {copies} "
        f"(the most of {len(samples)} samples{guess})"
    )
    trained = OPTIMISER * sum(p.numel() for m in (model, selector) for p in m.parameters() if p.requires_grad)
    stored = model.dtype.itemsize
    base = stored * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    shared = stored * sum(p.numel() for layer in frozen_linears(model) for p in layer.parameters())
    model.to(dtype)
    row = []
    for recompute in (False, True):
        model.checkpoint_gradients(recompute)
        found = footprint(model, shape, objective, dtype)
        row.append(found.kept + found.passing)
    unit, name = (2**30, "GiB") if base + cfg.batch_size * row[0] > 2**30 else (2**20, "MiB")
    yield f"memory   an estimate, in {name} for each GPU; (in brackets with trainer.gradient_checkpointing=true)"
    yield "         GPUs  rows   base  trained         activations               total    trainer=fsdp"
    for gpus in (n for n in GPUS if not cfg.batch_size % n):
        rows = cfg.batch_size // gpus
        cells = [base, trained, rows * row[0], rows * row[1]]
        cells += [x + trained + rows * kept for x in (base, base - shared + shared / gpus) for kept in row]
        b, t, plain, again, total, less, sharded, least = (f"{x / unit:,.1f}" for x in cells)
        yield (
            f"         {gpus:4d}  {rows:4d}  {b:>5}  {t:>7}  {plain:>8} ({again:>6})  {total:>8} ({less:>6})  "
            f"{sharded:>8} ({least:>6})"
        )
    kind = str(dtype).removeprefix("torch.")
    yield (
        f"formula  base: frozen parameters x {stored} bytes, linear layers shared out under fsdp; trained: {OPTIMISER} "
        "bytes a parameter (itself, its gradient and AdamW's two moments in float32); activations: rows x what "
        f"autograd keeps of one row's forward pass in {kind}, counted on tensors without memory, and what comes on "
        "top in the backward pass: the gradient of the logits, and a block that runs again. Not in it: what the "
        "driver takes, fragmentation, buckets of ddp, layers that fsdp has gathered"
    )


def picture_tokens(selector: Selector, model: "Lavida") -> int:
    """The most tokens that a picture can put into a prompt."""
    config, geometry = model.config, selector.geometry
    canvases = config.image_grid_pinpoints if config.image_aspect_ratio == "anyres" else ()
    pooled = max((pooled_count(canvas, config) for canvas in canvases), default=config.budgets["full"])
    if geometry == "lavida_tiles":
        rows = max((h // config.vision.image_size for _, h in canvases), default=1) * config.vision.side
    else:
        rows = geometry_layout(config, geometry).canvas[0]
    if isinstance(selector.budget, int):
        return selector.budget + (rows if getattr(selector, "newline", "none") == "row" else 0)
    if selector.budget == "matched" or isinstance(selector, Pooled):
        return pooled
    return tokens_of(model, geometry) + rows


def text_tokens(model: "Lavida", samples: Sequence[Sample]) -> tuple[int, int]:
    """The longest prompt, without its picture, and the longest answer."""
    examples = [
        training_example(model.tokenizer, s.prompt, s.target or s.answers[0], model.config, history=s.history)
        for s in samples
    ]
    return max(len(e.prompt) for e in examples) - 1, max(len(e.answer) for e in examples)
