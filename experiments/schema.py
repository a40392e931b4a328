"""The typed schema of the configs: numbers, names and their types.

Importing this module registers the schemas and the resolvers with Hydra. It imports nothing heavy, so that `--help`
answers at once. Plug-in groups (model, selector, context, relevance, data, cache, logger) are checked by their
constructors (`experiments.plugins`).
"""

import itertools
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from experiments.job_names import job_name, study_folder

VERSION_BASE = "1.3"
CONF = Path(__file__).resolve().parent.parent / "conf"


Dtype = StrEnum("Dtype", ["float32", "bfloat16", "float16"])
Attention = StrEnum("Attention", ["sdpa", "math", "flash"])
"""Kernels of the language model's attention: torch's choice, plain matrix products, or the flash-attn package."""
Schedule = StrEnum("Schedule", ["none", "shift", "cosine", "linear", "logit_normal", "time_grid"])
Remasking = StrEnum(
    "Remasking", ["low_confidence", "margin", "entropy", "random", "origin", "maskgit_plus", "topk_margin"]
)
"""The last two are Dream's names of low_confidence and margin."""
Engine = StrEnum("Engine", ["eager", "compile", "graph"])
Time = StrEnum("Time", ["uniform", "logit_normal", "mode"])
Weighting = StrEnum("Weighting", ["none", "inverse_time"])
Strategy = StrEnum("Strategy", ["single", "ddp", "fsdp"])
"""One process; a copy of everything in each; or a copy of what is trained and a part of the base in each."""
Precision = StrEnum("Precision", ["32-true", "16-mixed", "bf16-mixed"])
"""Lightning's names of those in which the weights keep the dtype that they were loaded in."""
Profiler = StrEnum("Profiler", ["none", "torch"])
Stage = StrEnum("Stage", ["adapt", "gate", "vision", "text", "align", "base"])
"""What train.py trains: an adapter, a relevance head; all others make the tiny model's base."""
SubsetLoss = StrEnum("SubsetLoss", ["subset_regression", "subset_mil", "joint", "straight_through"])
Codes = StrEnum("Codes", ["words", "random"])


@dataclass
class Decode:
    """How an answer is denoised; the fields of `lavida_adapter.DecodeConfig`."""

    max_new_tokens: int | None = None
    """None takes the dataset's."""
    block_length: int | None = None
    step_ratio: float | None = None
    step_per_block: int | None = None
    schedule: Schedule = Schedule.none
    shift: float = 1 / 3
    eps: float = 1e-3
    remasking: Remasking = Remasking.low_confidence
    temperature: float = 0.0
    top_p: float | None = None
    top_k: Any = "model"
    """model (what the language model's published sampler uses), a number, or null for all tokens."""
    alg_temp: float = 0.0
    prefix_cache: bool = True
    allow_mask_token: bool = False
    parity: bool = False
    threshold: float | None = None
    early_stop: bool = False
    engine: Engine = Engine.eager


@dataclass
class Run:
    """The keys that eval.py and train.py share."""

    study: str = MISSING
    seed: int = 0
    budget: Any = "base"
    """base | wide | full (counts named by the model), matched (what LaViDa itself would use), or a number."""
    device: str = "auto"
    attention: Attention = Attention.sdpa
    dtype: Dtype = Dtype.float32
    threads: int | None = None
    profiler: Profiler = Profiler.none
    """torch: a trace of the first batches or steps in the job's folder, and on a GPU a snapshot of its memory."""
    resume: bool = False
    overwrite: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    selector: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    """What takes the place of the tokens that the selector would rank last."""
    relevance: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


@dataclass
class Eval(Run):
    batch_size: int = 16
    limit: int | None = None
    """Evaluate this many samples, drawn with the seed; the row is marked."""
    shards: int = 1
    """Jobs that share one dataset; `shard` says which part this one answers."""
    shard: int = 0
    workers: int = 0
    """Processes that decode pictures and cut them into views ahead of time; with 0 each batch does so itself."""
    shots: int = 8
    """Samples whose picture and kept tokens the report shows."""
    adapter: str | None = None
    """Folder of a LoRA adapter; or a name in `adapters/` beside the weights, `own` being the selector's."""
    shuffle_questions: bool = False
    """Rank tokens by another sample's question: the control of every selector that knows the question."""
    decode: Decode = field(default_factory=Decode)
    cache: dict[str, Any] = field(default_factory=dict)
    """A cache selector, which shortens the prefix cache."""


@dataclass
class Optim:
    """The fields of `lavida_adapter.lightning_module.OptimConfig`."""

    steps: int = MISSING
    lr: float = MISSING
    warmup: int = 0
    lr_floor: float = 0.1
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of vision_tower, mm_projector, image_newline, transformer or selector, where not `lr`."""


@dataclass
class Subsets:
    """The fields of `lavida_adapter.relevance_training.SubsetConfig`."""

    loss: SubsetLoss = MISSING
    per_question: int = 4
    explore: float = 0.25
    tilt: float = 0.0
    regression: float = 0.2
    softness: float = 0.5


@dataclass
class Head:
    """Options of `shirg.relevance_head.RelevanceHead` that the model does not decide."""

    hidden: int = 32
    question: bool = True


@dataclass
class Objective:
    """The fields of `lavida_adapter.ObjectiveConfig`."""

    time: Time = Time.uniform
    complementary: bool = True
    weighting: Weighting = Weighting.none
    prefix_mask: bool = False
    extra_padding: int = 128
    answer_tokens: int | None = None
    alignment: float = 0.0
    adaptive_k: float = 0.0
    subsets: Subsets | None = None
    """What the stage "gate" fits a relevance head to; objective=joint, for example, sets it."""


@dataclass
class Grow:
    """The fields of `lavida_adapter.lora_growth.Growth`."""

    start: int = 16
    patience: int = 200
    gain: float = 0.01


@dataclass
class Lora:
    """The fields of `lavida_adapter.LoraConfig`."""

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    train_whole: list[str] = field(default_factory=list)
    grow: Grow | None = None


@dataclass
class MultiBudget:
    """Selectors that an adapter is trained for, beside the run's own: one of them at each step."""

    budgets: list[Any] = field(default_factory=list)
    """One is drawn at each step; "pooled" is LaViDa's own tokens. Empty: the selector's own."""
    geometries: list[str] = field(default_factory=list)
    """Taken in turn; budgets in numbers shrink with the number of tokens. Empty: the selector's own."""


@dataclass
class Trainer:
    strategy: Strategy = Strategy.single
    """Several processes are started by torchrun or srun."""
    num_nodes: int = 1
    workers: int = 0
    """Processes that draw batches ahead of time, for each process that trains."""
    precision: Precision = Precision["32-true"]
    """32-true computes in the dtype of the weights, too."""
    clip: float = 1.0
    gradient_checkpointing: bool = False
    """Layers keep their input alone and run again in the backward pass."""
    detect_anomaly: bool = False
    """Ends the training at the first NaN of a backward pass, and says which operation made it; slow."""
    log_every: int = 25
    checkpoint_every: int = 200


@dataclass
class Train(Run):
    stage: Stage = Stage.adapt
    batch_size: int = MISSING
    weights: str | None = None
    """Folder for what was trained, whole weights or an adapter; None is a folder in the job's own."""
    optim: Optim = field(default_factory=Optim)
    objective: Objective = field(default_factory=Objective)
    lora: Lora = field(default_factory=Lora)
    head: Head = field(default_factory=Head)
    """The relevance head of the stage "gate"."""
    mix: MultiBudget = field(default_factory=MultiBudget)
    trainer: Trainer = field(default_factory=Trainer)
    pictures: dict[str, int] = field(default_factory=dict)
    """Pictures of each family in a step of the stages "vision" and "align"."""
    text: dict[str, Any] = field(default_factory=dict)
    """The curriculum of the stage "text"."""
    codes: Codes = Codes.words
    """What stands for a word in the contexts of the stage "text" and in what "align" teaches the projector: the word's
    embedding, or a vector of a fixed random table."""
    check: dict[str, Any] = field(default_factory=dict)
    """Questions that a gate asks."""
    unseen: dict[str, Any] = field(default_factory=dict)
    """Questions about words that the training leaves out, for the stage "gate"."""
    gate: dict[str, float] = field(default_factory=dict)
    """Least value of each figure that the stage must reach."""
    plan: bool = False
    """Prints what the run would train and need; trains and writes nothing."""


def local_folder(path: str) -> Path | None:
    """The folder that a path names, relative to the working directory or to the repository; None if there is none."""
    return next((folder for folder in (Path(path), CONF.parent / path) if os.path.isdir(folder)), None)


def tasks_per_node(strategy: str, gpus_per_node: int | None) -> int:
    """Tasks of a SLURM job on each node: one for each GPU where several processes train, else one."""
    return 1 if strategy == Strategy.single or gpus_per_node is None else gpus_per_node


def describe_groups(command: str) -> str:
    """The config groups of a command and one line about each option, for `--help`: the second comment of each file."""
    lines = []
    config = OmegaConf.load(CONF / f"{command}.yaml")
    assert isinstance(config, DictConfig)
    for entry in config["defaults"]:
        group, default = next(iter(entry.items())) if not isinstance(entry, str) else (entry, None)
        if default is not None and not group.startswith("override"):
            lines.append(f"{group} (default {default})")
            for path in sorted((CONF / group).glob("*.yaml")):
                lines.append(f"  {path.stem:<18} {description(path)}".rstrip())
    sweeps = [path for path in sorted((CONF / "sweep").glob("*.yaml")) if f"\n{command}:" in path.read_text()]
    lines += ["sweep (stands for several jobs)", *(f"  {path.stem:<18} {description(path)}" for path in sweeps)]
    return "\n".join(lines)


def description(path: Path) -> str:
    """The second comment of a config file, not counting Hydra's own; the first one is the command that runs it."""
    head = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    comments = [line[1:].strip() for line in head if not line.startswith("# @package")]
    return comments[1] if len(comments) > 1 else ""


def register() -> None:
    """Makes schemas and resolvers known; safe to call twice."""
    store = ConfigStore.instance()
    for name, node in (("eval", Eval), ("train", Train)):
        store.store(group="schema", name=name, node=node, provider="experiments")
    OmegaConf.register_new_resolver("job_name", job_name, replace=True)
    OmegaConf.register_new_resolver("study_folder", study_folder, replace=True)
    OmegaConf.register_new_resolver("tasks_per_node", tasks_per_node, replace=True)
    OmegaConf.register_new_resolver("describe_groups", describe_groups, replace=True)


register()
