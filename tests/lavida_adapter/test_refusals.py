"""Wrong options, inputs and training: each case raises UserError with a sentence that has these words."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from baselines import Pooled
from lavida_adapter import DecodeConfig, LavidaConfig, LoraConfig, ObjectiveConfig, add_lora
from lavida_adapter.attention import attend
from lavida_adapter.generate import denoise, start
from lavida_adapter.lightning_module import OptimConfig
from lavida_adapter.lora import check_parts, expand
from lavida_adapter.loss import rows_loss
from lavida_adapter.prefix import splice
from lavida_adapter.prompt import IGNORE, IMAGE, training_example
from lavida_adapter.relevance import External, LmEmbed, RelevanceContext, SiglipText
from lavida_adapter.schedules import tokens_per_step
from lavida_adapter.views import cut, make_views, ready
from shirg import ShirgSelector, UserError
from tests.features import make_features
from tests.lavida_adapter.cache_compression.prompts import made_prefix, small
from tests.lavida_adapter.tiny import VIEW, noise, picture, tiny_config, tiny_model, tokenizer
from tests.lavida_adapter.training_runs import stage

TARGETS = ("mm_projector.{0,2}", "transformer.blocks.*.q_proj")
LAYERS = [f"t.layers.{i}.{leaf}" for i in range(4) for leaf in ("q", "k")]
ONE_LAYER = LoraConfig(rank=3, targets=("mm_projector.0",))

Case = tuple[Callable[[], object], list[str]]


def adapting(target: str) -> Callable[[], object]:
    return lambda: add_lora(tiny_model(), LoraConfig(rank=2, targets=("mm_projector.0", target)))


def whole(*names: str, **options: Any) -> Callable[[], object]:
    return lambda: add_lora(tiny_model(), LoraConfig(rank=0, train_whole=names, **options))


def schedule(**options: Any) -> Callable[[], object]:
    return lambda: OptimConfig(**{"steps": 10, "lr": 1.0} | options)


def rates(**of_parts: float) -> Callable[[], object]:
    return lambda: stage(optim=OptimConfig(steps=4, lr=0.02, rates=of_parts)).configure_optimizers()


def twice_adapted() -> None:
    model = tiny_model()
    for _ in range(2):
        add_lora(model, ONE_LAYER)


def nothing_to_train() -> None:
    module = stage()
    module.model.requires_grad_(False)
    module.configure_optimizers()


COORDS = {"coord_embed": "sincos_linear", "coord_width": 16}
SCHEDULE = ["training needs steps >= 1, lr > 0, 0 <= warmup <= steps and 0 <= lr_floor"]

PATTERNS: dict[str, Case] = {
    "a character of regular expressions": (lambda: expand("a+0.x", ["a.0.x"]), ["'a+0.x' names nothing"]),
    "more than all layers": (
        lambda: expand("t.layers.{:4/3}.q", LAYERS),
        ["the share {:4/3} in 't.layers.{:4/3}.q' is more than all layers"],
    ),
    "an empty range": (lambda: expand("t.layers.{1-0}.q", LAYERS), ["the range {1-0} in 't.layers.{1-0}.q' is empty"]),
    "no such leaf": (
        lambda: expand("t.layers.{:4/26}.v", LAYERS),
        ["'t.layers.0.v' names nothing in this model; the nearest names are t.layers.0."],
    ),
    "no such list of layers": (
        lambda: expand("t.layer.{:4/26}.q", LAYERS),
        ["'t.layer.:4/26.q' names nothing in this model; the nearest names are t.layers"],
    ),
    "a share of nothing": (lambda: expand("t.layers.{:0/26}.q", LAYERS), ["'t.layers.:0/26.q' names nothing"]),
    "a layer too many": (
        lambda: expand("t.layers.{3-4}.q", LAYERS),
        ["'t.layers.4.q' names nothing in this model; the nearest names are t.layers.3.q"],
    ),
    "no such part": (
        lambda: check_parts("lora.ranks", ["selector", "projector"]),
        ["lora.ranks.projector: no such part, the nearest is mm_projector; the parts are"],
    ),
}
LORA: dict[str, Case] = {
    "a layer that is not linear": (
        adapting("mm_projector.1"),
        ["'mm_projector.1' names nothing in this model; the nearest names are mm_projector."],
    ),
    "a name that is near": (adapting("projector.0"), ["lora: 'projector.0' names nothing", "are mm_projector.0"]),
    "a name of the checkpoint": (adapting("model.mm_projector.0"), ["lora: 'model.mm_projector.0' names nothing"]),
    "a range too long": (adapting("transformer.blocks.{0-2}.q_proj"), ["'transformer.blocks.2.q_proj' names nothing"]),
    "one of two": (adapting("transformer.blocks.*.{q_proj,query}"), ["'transformer.blocks.*.query' names nothing"]),
    "an embedding": (adapting("transformer.wte"), ["lora: 'transformer.wte' names nothing"]),
    "a leaf alone": (adapting("q_proj"), ["lora: 'q_proj' names nothing"]),
    "an empty name": (adapting(""), ["lora: '' names nothing"]),
    "a parameter that is not there": (whole("image_newlin"), ["lora: 'image_newlin' names nothing", "image_newline"]),
    "nothing to train": (whole(), ["lora: nothing would be trained"]),
    "targets at rank 0": (whole(targets=TARGETS), ["lora: nothing would be trained"]),
    "trained in two ways": (
        lambda: add_lora(tiny_model(), LoraConfig(rank=2, targets=TARGETS, train_whole=("mm_projector",))),
        ["lora.targets and lora.train_whole both name mm_projector.0, mm_projector.2"],
    ),
    "an adapter on another": (twice_adapted, ["the model has LoRA layers already: merge them"]),
    "a rank below 0": (lambda: LoraConfig(rank=-1), ["lora.rank=-1, lora.dropout=0.0: give a rank >= 0"]),
    "dropout of everything": (
        lambda: LoraConfig(rank=2, targets=TARGETS, dropout=1.0),
        ["lora.dropout=1.0: give a rank >= 0 and a dropout in"],
    ),
    "alpha 0": (lambda: LoraConfig(rank=2, targets=TARGETS, alpha=0.0), ["lora.alpha=0.0: give a positive number"]),
    "no targets": (lambda: LoraConfig(rank=64), ["lora.rank=64 has no lora.targets", "lora.rank=0"]),
    "a rank of what has none": (
        lambda: stage(LoraConfig(rank=3, targets=("mm_projector.0",), ranks={"vision_tower": 2})),
        ["lora.ranks.vision_tower: lora.targets has no layer of it"],
    ),
    "a selector's layer left out": (
        lambda: stage(ONE_LAYER, ShirgSelector(budget=10, **COORDS)),  # type: ignore[arg-type]
        ["would not be trained, selector.coords.linear: add it to lora.targets"],
    ),
    "a layer of another selector": (
        lambda: stage(LoraConfig(rank=3, targets=("selector.coords.linear",)), Pooled()),
        ["lora: 'selector.coords.linear' names nothing in this model"],
    ),
}
TRAINING: dict[str, Case] = {
    **{
        f"{name}={value}": (schedule(**{name: value}), SCHEDULE)
        for name, value in (
            ("steps", 0),
            ("lr", 0),
            ("lr", math.nan),
            ("warmup", 11),
            ("warmup", -1),
            ("lr_floor", 1.1),
        )
    },
    "a rate of what is frozen": (
        rates(vision_tower=1e-3),
        ["optim.rates.vision_tower: nothing of it is trained; take it out, or train it"],
    ),
    "a rate of no part": (rates(projector=1e-3), ["optim.rates.projector: no such part, the nearest is mm_projector"]),
    "betas": (schedule(betas=(2.0, 3.0)), ["optim.betas=[2.0, 3.0]: give two numbers in [0, 1)"]),
    "one beta": (schedule(betas=(0.9,)), ["optim.betas=[0.9]: give two numbers in [0, 1)"]),
    "a weight decay below 0": (schedule(weight_decay=-1.0), ["optim.weight_decay=-1.0: give a number >= 0"]),
    "a rate of 0": (rates(mm_projector=0.0), ["give rates above 0"]),
    "no gradient at all": (nothing_to_train, ["nothing requires a gradient: there is nothing to train"]),
    "float16": (
        lambda: stage(dtype=torch.float16),
        ["dtype=float16 loses small gradients in training: choose dtype=bfloat16"],
    ),
}


def config(**fields: Any) -> Callable[[], object]:
    return lambda: LavidaConfig.from_dict(fields)


CONFIG: dict[str, Case] = {
    **{
        f"{name}={value}": (config(**{name: value}), [f"config: {name}={value!r}; choose one of "])
        for name, value in (
            ("image_aspect_ratio", "square"),
            ("mm_patch_merge_type", "spatial"),
            ("mm_spatial_pool_mode", "cubic"),
            ("prefix_attention", "causal"),
        )
    },
    "heads that do not divide": (config(n_heads=48, n_kv_heads=48), ["divisible by the number of heads"]),
    "groups that do not divide": (config(n_kv_heads=5), ["n_heads=32 is not a multiple of n_kv_heads=5"]),
    "half a view": (
        config(image_grid_pinpoints=[[384, 700]]),
        ["canvas (384, 700) is not made of whole 384-pixel views"],
    ),
    "no canvas": (config(image_grid_pinpoints=[]), ["image_grid_pinpoints is empty"]),
    "a canvas of one number": (config(image_grid_pinpoints=[[384]]), ["image_grid_pinpoints=[[384]] is not a list"]),
    "canvases in short": (config(image_grid_pinpoints="(1x1),...,(6x6)"), ["is not a list of"]),
    "another tower": (config(mm_hidden_size=768), ["mm_hidden_size=768 but the tower is 1152 wide"]),
    "a tower of one layer": (config(vision_config={"num_hidden_layers": 1}), ["at least 2 layers"]),
    "tower heads": (
        config(vision_config={"hidden_size": 100}, mm_hidden_size=100),
        ["divisible by the number of heads"],
    ),
}


def decode(**options: Any) -> Callable[[], object]:
    return lambda: DecodeConfig(**options)


STEPS = ["leave no step for a block of 16 tokens"]
DECODING: dict[str, Case] = {
    "no tokens": (decode(max_new_tokens=0), ["decode.max_new_tokens=0: give at least 1"]),
    **{
        f"blocks of {n}": (decode(block_length=n), [f"decode.block_length={n} does not divide", "max_new_tokens=16"])
        for n in (3, 128, 0, -4)
    },
    "steps given twice": (decode(step_ratio=0.5, step_per_block=4), ["both set the number of steps: give one of them"]),
    "too small a ratio": (decode(step_ratio=0.05), ["step_ratio=0.05, step_per_block=None", *STEPS]),
    "no steps": (decode(step_per_block=0), STEPS),
    "steps below 0": (decode(step_per_block=-1), STEPS),
    **{
        f"step_ratio={ratio}": (decode(step_ratio=ratio), [f"decode.step_ratio={ratio}: give a share of the block"])
        for ratio in (1.5, 0.0, math.nan)
    },
    "no such schedule": (decode(schedule="fast"), ["decode.schedule='fast': choose one of none, shift"]),
    "threshold 0": (decode(threshold=0.0), ["decode.threshold=0.0: give a probability, above 0 and at most 1"]),
    "threshold and steps": (
        decode(threshold=0.9, step_ratio=0.5),
        ["decode.threshold", "leave out step_ratio, step_per_block and schedule"],
    ),
    "threshold of no probability": (
        decode(threshold=0.9, remasking="margin"),
        ["decode.remasking=margin does not rank by it: choose low_confidence"],
    ),
    "no such engine": (decode(engine="fast"), ["decode.engine='fast': choose one of eager, compile, graph"]),
    "compiled without a cache": (
        decode(engine="compile", prefix_cache=False),
        ["decode.engine=compile", "decode.prefix_cache=false has none"],
    ),
    "shift 0": (decode(shift=0.0), ["decode.shift=0.0: give a positive number"]),
    "no such rule": (decode(remasking="entrophy"), ["decode.remasking='entrophy': choose one of low_confidence"]),
    **{f"temperature {t}": (decode(temperature=t), [f"decode.temperature={t}: give 0"]) for t in (-0.1, math.inf)},
    "a schedule of no steps": (lambda: tokens_per_step(4, 0), ["0 denoising steps per block; raise step_ratio"]),
    "a schedule by no name": (lambda: tokens_per_step(4, 2, "sine"), ["decode.schedule='sine': choose one of none"]),
    **{
        f"a schedule of shift {s}": (lambda s=s: tokens_per_step(4, 2, "shift", s), [f"decode.shift={s}: give"])
        for s in (0.0, -1.0, math.nan, math.inf)
    },
    "a draft that is too long": (
        lambda: start(2, DecodeConfig(max_new_tokens=4), 5, [(1,), (1,) * 5]),
        ["the draft has 5 tokens, the answer only 4: raise max_new_tokens"],
    ),
    "a draft for one of two prompts": (
        lambda: start(2, DecodeConfig(max_new_tokens=4), 5, [(1,)]),
        ["1 drafts for 2 prompts: give one for each prompt"],
    ),
    "early stop without an eos": (
        lambda: denoise(lambda ids, _: ids, torch.zeros(1, 16), DecodeConfig(early_stop=True), 5),
        ["decode.early_stop=true needs the model's eos token"],
    ),
    "graphs on a CPU": (
        lambda: small().generate(made_prefix(), DecodeConfig(max_new_tokens=4, engine="graph")),
        ["decode.engine=graph replays CUDA graphs: use decode.engine=compile or eager"],
    ),
    "padding before a token": (
        lambda: small().prefill(replace(made_prefix(), mask_BP=made_prefix().mask_BP.flip(-1))),
        ["a prefix has padding before a token (mask_BP): pad prompts at their end"],
    ),
    "no such backend": (
        lambda: attend(*[noise(1, 2, 3, 8)] * 3, None, "cudnn"),  # type: ignore[arg-type]  # what is tested
        ["attention backend 'cudnn': choose sdpa, math or flash"],
    ),
}


def cut_twice() -> None:
    image = Image.new("RGB", (40, 30))
    ready(cut(image, tiny_config(), "fovea"), tiny_config(), "single_672")


def splicing(row: list[int], max_length: int = 5) -> Callable[[], object]:
    return lambda: splice([[IMAGE, 4], row], [noise(1, 4)] * 2, nn.Embedding(6, 4), max_length=max_length)


def encoding(n: int, questions: list[str], model: Any = None, **more: Any) -> Callable[[], object]:
    return lambda: tiny_model(**(model or {})).encode([picture((40, 40))] * n, questions, Pooled(), **more)


def scoring(provider: Callable[[], Any], **context: Any) -> Callable[[], object]:
    """A provider's scores of two pictures with 45 tokens each."""
    features = make_features((2, 2), side=3, sizes=((60, 40), (40, 40)), tokens=noise(2, 45, 8))
    given = {"projected": lambda: noise(2, 45, 4), "questions": [torch.arange(2)] * 2, "embedding": nn.Embedding(5, 4)}
    return lambda: provider()(features, RelevanceContext(**given | context))


INPUTS: dict[str, Case] = {
    **{
        f"mode {mode}": (
            lambda mode=mode: make_views(Image.new(mode, (10, 10)), LavidaConfig()),
            [f"needs an RGB picture, got mode {mode}: convert it first"],
        )
        for mode in ("L", "RGBA", "P", "CMYK", "1")
    },
    "an empty picture": (
        lambda: make_views(Image.new("RGB", (0, 5)), LavidaConfig()),
        ["empty picture of 0 x 5 pixels"],
    ),
    "another geometry": (cut_twice, ["a picture was cut for another geometry than single_672"]),
    **{
        f"tap {tap!r}": (
            lambda tap=tap: tiny_model().model.vision_tower(noise(1, 3, VIEW, VIEW), [tap]),
            [f"has no tap {tap!r}: use one of keys, attention", "with @layer in 0..1"],
        )
        for tap in ("keys", "keys@", "keys@2", "keys@-3", "values@0", "keys@first", "@0", "", "keys@1.0", "keys@-0.5")
    },
    "no picture": (encoding(0, []), ["encode got 0 pictures, 0 questions, 0 ids, 0 prompts: give one of each"]),
    "too few questions": (encoding(2, ["a"]), ["encode got 2 pictures, 1 questions, 2 ids, 1 prompts"]),
    "too few ids": (encoding(1, ["a"], ids=[]), ["encode got 1 pictures, 1 questions, 0 ids, 1 prompts"]),
    "too many prompts": (encoding(1, ["a"], prompts=["a", "b"]), ["encode got 1 pictures, 1 questions, 1 ids, 2"]),
    "a prompt that is too long": (
        encoding(1, ["digit red"], {"tokenizer_model_max_length": 40}),
        ["prompt 0 of the batch has ", " of them for the picture, more than the model's 40: lower the budget"],
    ),
    "a row without a picture": (splicing([1, 2]), ["prompt 1 of the batch holds 0 pictures, expected exactly one"]),
    "a row with two pictures": (
        splicing([IMAGE, 1, IMAGE]),
        ["prompt 1 of the batch holds 2 pictures, expected exactly one"],
    ),
    "a row that is too long": (
        splicing([IMAGE, 1, 2, 3], 3),
        ["prompt 1 of the batch has 4 tokens, 1 of them for the picture, more than the model's 3"],
    ),
    **{
        f"answer {answer!r}": (
            lambda answer=answer: training_example(tokenizer(), "digit red", answer, tiny_config()),
            ["the training example 'digit red' has an empty answer: drop it"],
        )
        for answer in ("", " \n")
    },
    "no such aggregation": (lambda: LmEmbed(agg="sum"), ["relevance.agg='sum': choose one of mean, max, pooled"]),  # type: ignore[arg-type]
    "an empty question": (
        scoring(LmEmbed, questions=[torch.arange(2), torch.arange(0)]),
        ["relevance=lm_embed needs a question", "use relevance=none"],
    ),
    "a sample without scores": (
        scoring(lambda: External(scores={"picture-0": noise(45)})),
        ["relevance=external has no scores for sample 'picture-1'"],
    ),
    "scores of another canvas": (
        scoring(lambda: External(scores={"picture-0": noise(45), "picture-1": noise(44)})),
        ["the scores of sample 'picture-1' have shape (44,), its canvas has 45 tokens"],
    ),
    "scores from nowhere": (External, ["relevance=external needs relevance.path"]),
    "scores given twice": (lambda: External(path="here", scores={}), ["relevance=external needs relevance.path"]),
    "scores that are not there": (
        lambda: External(path="absent.safetensors"),
        ["relevance.path=absent"],
    ),
    "scores in no file of tensors": (lambda: External(path=__file__), ["is not a readable safetensors file"]),
    "a SigLIP that is not there": (
        lambda: SiglipText(path="./absent"),
        ["no SigLIP checkpoint"],
    ),
    "a tolerance below 0": (lambda: SiglipText(path="x", tolerance=-1), ["relevance.tolerance=-1: give a number >= 0"]),
}


def objective(**options: Any) -> Callable[[], object]:
    return lambda: ObjectiveConfig(**options)


def row_without_target() -> None:
    model, draws = tiny_model(), torch.Generator().manual_seed(0)
    rows_loss(model, [[1, IMAGE, 2]], [[IGNORE] * 3], [noise(3, 32)], ObjectiveConfig(), draws)


OBJECTIVE: dict[str, Case] = {
    "time": (objective(time="cosine"), ["objective.time='cosine': choose one of uniform, logit_normal, mode"]),
    "weighting": (objective(weighting="1/t"), ["objective.weighting='1/t': choose one of none, inverse_time"]),
    "padding below 0": (objective(extra_padding=-1), ["objective.extra_padding=-1: give 0 or more"]),
    "answers of no token": (objective(answer_tokens=0), ["objective.answer_tokens=0: give at least 1, or null"]),
    **{
        f"weight {name}={weight}": (objective(**{name: weight}), [f"objective.{name}={weight}: give a weight >= 0"])
        for name, weight in (("alignment", -0.1), ("alignment", math.nan), ("adaptive_k", math.inf))
    },
    "a row without a target": (
        row_without_target,
        ["training row 0 has no target token: its answer was empty or cut away"],
    ),
}
CASES = PATTERNS | LORA | TRAINING | CONFIG | DECODING | INPUTS | OBJECTIVE


@pytest.mark.parametrize("case", CASES)
def test_refusals(case: str) -> None:
    wrong, words = CASES[case]
    with pytest.raises(UserError) as error:
        wrong()
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []
