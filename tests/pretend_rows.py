"""What a GPU would have to do, counted for every selector, relevance, cache method, decoding, engine and objective.

    python -m tests.pretend_rows docs/results/gpu/pretend_cuda.json

writes the rows of this commit into the file; tests/test_pretend_cuda.py compares with the file's last commit. Models
have random weights in bfloat16 and are small in everything but their structure: waits and launches do not depend on
width.
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import yaml

import lavida_adapter.model as model_module
from lavida_adapter import DecodeConfig, External, Lavida, LmEmbed, NoRelevance, ObjectiveConfig, Prefix, TrainBatch
from lavida_adapter.cache_compression import adaptive_k, dart, fastv, layer_retention, pyramiddrop, quantize, redvtp
from lavida_adapter.cache_compression.compressor import CachePacker, CacheSelector
from lavida_adapter.cache_compression.sparsevlm import SparseVLM
from lavida_adapter.learned_relevance import Learned
from lavida_adapter.relevance import Relevance
from lavida_adapter.views import layout_on, own_layout
from shirg import Selector, ShirgSelector
from tests.lavida_adapter.tiny import picture, tiny_config, tiny_model, tokenizer
from tests.pretend_cuda import CUDA, Recorder
from tests.pretend_machine import move, pretend
from tests.test_contract import ALL

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
BUDGET, A, LAYERS, WORDS = 60, 6, 3, 1009
"""Tokens of a picture and of an answer, layers, and the vocabulary: no other dimension has its size."""
VIEW = 38
"""Pixels of a view: 6 x 6 tokens of 6 pixels, and two pixels left over."""
CANVASES = tuple((VIEW * columns, VIEW * rows) for columns, rows in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
SIZES = ((76, 76), (100, 75), (150, 60))
"""Pictures of a batch; the third has another canvas than the first two."""
QUESTIONS = ("what is in the middle?", "which letter is it?", "how many?")
FAMILIES: dict[str, dict[str, Any]] = {"llada": {"n_kv_heads": 4}, "dream": {"family": "dream", "n_kv_heads": 2}}


@cache
def model_of(family: str, layers: int = LAYERS, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Lavida:
    """A model on the pretended device, to be made while that is there."""
    lm = {"n_layers": layers, "vocab_size": WORDS, **FAMILIES[family]}
    config = tiny_config(lm=lm, vision={"image_size": VIEW}, image_grid_pinpoints=CANVASES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Lavida(config, tokenizer(family)).to(dtype).eval().requires_grad_(False)
    if device == "cuda":
        move(model)
    return model


@contextmanager
def machine(*, triton: bool = True) -> Iterator[Recorder]:
    """A pretended GPU; layouts that the project keeps by device are forgotten at its end."""
    with pretend(WORDS, triton=triton) as recorder, torch.no_grad():
        try:
            yield recorder
        finally:
            layout_on.cache_clear()


def counted(recorder: Recorder) -> Row:
    """The counts since the last reset, and where the host waited."""
    return {
        "waits": recorder.n_waits,
        "launches": recorder.n_launches,
        "mixed": sum(recorder.mixed.values()),
        "float64": sum(recorder.float64.values()),
        "vocabulary": recorder.widest,
        "where": [f"{n} {what} at {line}" for (what, line), n in sorted(recorder.waits.items())],
    }


def encode(model: Lavida, selector: Selector, batch: int, relevance: Relevance | None, *, shared: bool) -> Prefix:
    images = [picture(size) for size in SIZES[:batch]]
    if shared:
        images = images[:1] * batch
    boxes = [[(0.2, 0.2, 0.5, 0.5)]] * batch
    return model.encode(images, QUESTIONS[:batch], selector, relevance=relevance, boxes=boxes)


def encode_row(
    name: str, batch: int, relevance: Relevance | None = None, *, shared: bool = False, triton: bool = True
) -> Row:
    """A warm batch from pictures to its prefix. `shared`: all questions ask about one picture."""
    case = ALL[name]
    selector = case.build(**case.options)
    if selector.uses_relevance and relevance is None:
        relevance = LmEmbed()
    with machine(triton=triton) as recorder:
        model = model_of("llada")
        move(selector)
        if isinstance(relevance, Learned):
            move(relevance.head)
        for _ in range(2):
            recorder.reset()
            encode(model, selector, batch, relevance, shared=shared)
        return counted(recorder)


def learned() -> Learned:
    """A head on top of lm_embed; it is made on the CPU, as weights are that are loaded."""
    provider = Learned(base=LmEmbed())
    with torch.random.fork_rng():
        provider.fresh(tiny_model(vision={"image_size": VIEW}, image_grid_pinpoints=CANVASES), {"hidden": 4})
    return provider


def external() -> External:
    """A number for every token of the pictures of a batch, by their ids."""
    config = tiny_config(vision={"image_size": VIEW}, image_grid_pinpoints=CANVASES)
    tokens = [own_layout(size, config).n_tokens for size in SIZES]
    return External(scores={str(i): torch.linspace(0, 1, n) for i, n in enumerate(tokens)})


RELEVANCES: dict[str, Callable[[], Relevance]] = {
    "none": NoRelevance,
    "lm_embed": LmEmbed,
    "external": external,
    "learned": learned,
}


def decode_options(name: str) -> dict[str, Any]:
    """The options of a file of conf/decode, with those of the file that it changes."""
    given = yaml.safe_load((ROOT / "conf" / "decode" / f"{name}.yaml").read_text())
    own = {option: value for option, value in given.items() if option != "defaults"}
    return {**(decode_options("default") if name != "default" else {}), **own}


DECODINGS: dict[str, dict[str, Any]] = {
    **{path.stem: decode_options(path.stem) for path in sorted((ROOT / "conf" / "decode").glob("*.yaml"))},
    "entropy": {"remasking": "entropy"},
    "margin": {"remasking": "margin"},
    "random": {"remasking": "random"},
    "origin": {"remasking": "origin"},
    "temperature": {"temperature": 0.7},
    "blocks": {"block_length": 3},
    "no_cache": {"prefix_cache": False},
    "top_p": {"top_p": 0.9, "top_k": None, "temperature": 0.5},
    "alg_temp": {"alg_temp": 0.3},
}
NOT_OF = {"llada": {"dream_parity", "top_p", "alg_temp"}, "dream": {"parity"}}
ENGINES = ("graph", "compile")


def decoding(name: str, engine: str = "eager") -> DecodeConfig:
    return DecodeConfig(**{**DECODINGS[name], "max_new_tokens": A, "engine": engine})


@cache
def prefix_of(family: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> Prefix:
    case = ALL["norm_topk"]
    return encode(model_of(family, dtype=dtype), case.build(**case.options), batch, None, shared=False)


def decode_row(family: str, name: str, batch: int, engine: str = "eager", layers: int = LAYERS) -> Row:
    """An answer with eager steps, or a second one with recorded steps, after those were recorded."""
    plain = patch.object(torch, "compile", lambda function, **_: function) if engine == "compile" else nullcontext()
    with machine() as recorder, plain:
        model, prefix = model_of(family, layers), prefix_of(family, batch)
        try:
            if engine == "eager":
                return answer_row(model, prefix, recorder, decoding(name))
            first = answer_row(model, prefix, recorder, decoding(name, engine))
            recorder.reset()
            return {**answer_row(model, prefix, recorder, decoding(name, engine)), "captured": first["captured"]}
        finally:
            model.release_engines()


def answer_row(model: Lavida, prefix: Prefix, recorder: Recorder, decode: DecodeConfig, method: Any = None) -> Row:
    """The counts of `generate`; `step_waits` and `step_launches` are the most of one of its steps."""
    recorder.reset()
    with marked_steps(recorder):
        model.generate(
            prefix,
            decode,
            cache_selector=method if isinstance(method, CacheSelector) else None,
            cache_packer=method if isinstance(method, CachePacker) else None,
            generator=torch.Generator(CUDA).manual_seed(0),
        )
    steps = steady_steps(recorder.order)
    return {
        **counted(recorder),
        "captured": sum(recorder.captured.values()),
        "refused": sum(recorder.captured_waits.values()),
        "steps": recorder.order.count("step"),
        "step_waits": max(step.count("wait") for step in steps),
        "step_launches": max(step.count("launch") for step in steps),
    }


@contextmanager
def marked_steps(recorder: Recorder) -> Iterator[None]:
    """Writes into the recorder's order where each step begins, and where the last one ends."""
    denoise = model_module.denoise

    def marked(logits_of: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def step(*inputs: Any) -> Any:
            recorder.order.append("step")
            return logits_of(*inputs)

        found = denoise(step, *args, **options)
        recorder.order.append("end")
        return found

    with patch.object(model_module, "denoise", marked):
        yield


def steady_steps(order: list[str]) -> list[list[str]]:
    """What happens from the beginning of one step to that of the next, for all steps but the first and the last."""
    begins = [i for i, what in enumerate(order) if what == "step"]
    return [order[a + 1 : b] for a, b in zip(begins[1:], begins[2:], strict=False)]


CACHES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "adaptive_k": lambda: adaptive_k.AdaptiveK(budget=30),
    "cast": quantize.Cast,
    "dart": lambda: dart.DART(budget=30),
    "fastv": lambda: fastv.FastV(budget=30),
    "fp8": quantize.Fp8,
    "int8": quantize.Int8,
    "layer_retention": lambda: retention(),
    "pyramiddrop": lambda: pyramiddrop.PyramidDrop(budget=30),
    "redvtp": lambda: redvtp.RedVTP(budget=30),
    "sparsevlm": lambda: SparseVLM(budget=30),
}


def retention() -> layer_retention.LayerRetention:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps({"forget": [0.1, 0.3, 0.5]}))
        return layer_retention.LayerRetention(profile=str(path))


def cache_row(family: str, name: str, batch: int, layers: int = LAYERS) -> Row:
    """An answer over a smaller cache."""
    with machine() as recorder:
        model = model_of(family, layers)
        return answer_row(model, prefix_of(family, batch), recorder, decoding("default"), CACHES[name]())


def layer_row(count: Callable[[int], Row]) -> Row:
    """What one layer of a step launches, and records where steps are recorded: three layers less two."""
    more, less = count(LAYERS), count(LAYERS - 1)
    return {f"{key} of a layer": more[key] - less[key] for key in ("step_launches", "captured")}


OBJECTIVES: dict[str, dict[str, Any]] = {
    "lavida": {},
    "prefix_mask": {"prefix_mask": True},
    "one_copy": {"complementary": False},
    "inverse_time": {"weighting": "inverse_time"},
    "logit_normal": {"time": "logit_normal"},
    "mode": {"time": "mode"},
    "alignment": {"alignment": 0.1},
    "adaptive_k": {"adaptive_k": 0.1},
}
TRAINED = ("mm_projector", "image_newline", "transformer.blocks", "transformer.wte", "layers.", "embed_tokens")


def training_row(family: str, name: str, batch: int) -> Row:
    """A warm loss with its backward pass; the projector, the newline and the language model are trained."""
    objective = ObjectiveConfig(extra_padding=4, **OBJECTIVES[name])
    head = {"adaptive": {"mode": "head"}} if name == "adaptive_k" else {}
    selector = ShirgSelector(budget=BUDGET, scaffold={"size": 2}, **head)
    answers, ids = ("a", "bc", "def")[:batch], ("1", "2", "3")[:batch]
    data = TrainBatch([picture(size) for size in SIZES[:batch]], QUESTIONS[:batch], answers, ids)
    with machine() as recorder, torch.enable_grad():
        model = model_of(family)
        named = [(key, p) for key, p in model.named_parameters() if "vision_tower" not in key]
        trained = [p for key, p in named if any(part in key for part in TRAINED)]
        move(selector)
        try:
            for parameter in trained:
                parameter.requires_grad_(True)
            for _ in range(2):
                recorder.reset()
                generator = torch.Generator(CUDA).manual_seed(0)
                model.loss(data, selector, objective, generator, relevance=LmEmbed()).backward()
            assert all(p.grad is not None for p in trained), "every trained weight has a gradient"
            return counted(recorder)
        finally:
            for parameter in trained:
                parameter.requires_grad_(False)
                parameter.grad = None


def encode_rows(batch: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    for name in ALL:
        yield f"encode {name} b{batch}", partial(encode_row, name, batch)
    for name, make in RELEVANCES.items():
        yield f"relevance {name} b{batch}", lambda make=make: encode_row("shirg", batch, make())


def answer_rows(family: str, batch: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    for name in DECODINGS:
        if name not in NOT_OF[family]:
            yield f"decode {family} {name} b{batch}", partial(decode_row, family, name, batch)
    for name in CACHES:
        yield f"cache {family} {name} b{batch}", partial(cache_row, family, name, batch)
    for engine in ENGINES:
        for name in ("default", "threshold", "early_stop"):
            yield f"{engine} {family} {name} b{batch}", partial(decode_row, family, name, batch, engine)


def layer_rows(family: str) -> Iterator[tuple[str, Callable[[], Row]]]:
    for engine in ("eager", *ENGINES):
        count = partial(decode_row, family, "default", 1, engine)
        yield f"layer {family} {engine}", partial(layer_row, count)
    for name in ("cast", "fp8", "int8"):
        yield f"layer {family} {name}", partial(layer_row, partial(cache_row, family, name, 1))


def rows() -> Mapping[str, Callable[[], Row]]:
    """Every row by its name."""
    found = dict((*encode_rows(1), *encode_rows(3)))
    found["encode shirg b3, one picture"] = partial(encode_row, "shirg", 3, shared=True)
    found["encode shirg b1, no Triton"] = partial(encode_row, "shirg", 1, triton=False)
    for family in FAMILIES:
        found |= dict((*answer_rows(family, 1), *answer_rows(family, 3), *layer_rows(family)))
        for name in OBJECTIVES:
            found[f"train {family} {name} b3"] = partial(training_row, family, name, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    whole = json.loads(file.read_text()) if file.exists() else {}
    whole[commit.stdout.strip()] = {
        name: {key: value for key, value in measure().items() if key != "where"} for name, measure in rows().items()
    }
    file.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
