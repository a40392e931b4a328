"""What cannot be asked for: each case ends with exit code 1 and one sentence that has these key words."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.jobs.results import VERSION
from experiments.rescore import parse
from experiments.sweeps import expand
from tests.data import official
from tests.experiments.conftest import Command, result_of

Eval = Callable[..., Path]
COMMANDS = {
    "option": ("selector=foo", "selector=foo: no such option .* cdpruner, divprune"),
    "key": (
        "selector=random selector.foo=1",
        "selector.foo: selector=random no such option; it has budget, geometry",
    ),
    "swept key": ("-m selector=random,pooled selector.seed=1", "selector.seed: selector=pooled no such option; none"),
    "key of eval.py": ("bach_size=3", "bach_size: no such key; did you mean batch_size"),
    "number": ("batch_size=many", "batch_size=many: 'many' not be converted to Integer"),
    "enum": ("decode.schedule=slow", r"decode.schedule=slow: expected one of \[none, shift, cosine"),
    "sweep": ("sweep=main", "sweep=main does not exist eval.py .*main_table"),
    "sweep and run": ("sweep=main_table run=x", "give one of them, once"),
    "run": ("run=nowhere", "no result.json"),
    "runs": ("run=nowhere/*", "no folder of a job of train.py"),
    "rescored twice": ("rescore=a rescore=b", "rescore=FOLDER data.metrics="),
    "rescored and run": ("rescore=a selector=full", "nothing else"),
    "no metrics": ("rescore=a data.metrics=[]", "give a list of metrics"),
    "one metric": ("rescore=a data.metrics=anls", r"give a list of metrics \[exact_match,anls\]"),
    "metrics twice": ("rescore=a data.metrics=[anls] data.metrics=[anls]", "each once"),
    "broken metrics": ("rescore=a data.metrics=[anls", r"data.metrics=\[anls: "),
    "rescored nothing": ("rescore=nowhere/*", r"rescore=nowhere/\*: no folder of a job of eval.py"),
}
FULL = "selector=full"
JOBS = {
    "budget of random": ("selector=random budget=321", "budget 321 320 vision tokens"),
    "budget of shirg": ("selector=shirg budget=337", "budget 337 .* 320 tokens"),
    "name of a budget": ("budget=most", r"budget=most: base \(80\).*full \(320\).*matched .* number of tokens"),
    "nested number": ("selector=shirg selector.weights.similarity=high", "weights.similarity='high' not a number"),
    "literal": ("selector=shirg selector.norm=best", "selector.norm='best' one of zscore, minmax, rank, none"),
    "added option": ("selector=random +selector.foo=1", "selector.foo: Random no such option; it has budget, seed"),
    "weights": ("model.path=./weights/absent", "model.path=./weights/absent: no weights .*make tiny"),
    "sizes": ("model=small +model.config.lm.depth=3", "model.config: 'depth'"),
    "language model": (
        "model=small +model.config.lm.family=qwen",
        "model.config.lm.family=qwen: one of llada, dream",
    ),
    "version of nothing": ("model=small +model.revision=main", "model.revision: a model of random weights"),
    "version of a folder": (
        "model.path=./weights/tiny +model.revision=main",
        "model.revision=main: .*weights/tiny is a local folder",
    ),
    "second tower": (
        "model.path=./weights/tiny +model.vision_path=./weights/tiny",
        "model.vision_path=.*weights/tiny: .* has a vision tower of its own",
    ),
    "switch": ("selector=pooled model.prefix_attention=sideways", "prefix_attention .*sideways"),
    "adapter": ("adapter=outputs/absent", "outputs/absent holds no adapter"),
    "a long adapter": (f"adapter=/{'a' * 5000}", f"/{'a' * 199} holds no adapter"),
    "a long path": (f"model.path={'a' * 5000}", f"model.path={'a' * 200}: no such checkpoint folder"),
    "device": ("device=cuda:99", r"device=cuda:99: this machine has \d+ CUDA devices"),
    "limit": ("limit=0", "limit=0: positive number"),
    "batch": ("batch_size=0", "batch_size=0: a number from 1"),
    "batch of all": ("batch_size=1000000000000", "batch_size=1000000000000: from 1 to 1,048,576"),
    "no thread": ("threads=0", "threads=0: a number from 1 to 1,024"),
    "a thread too few": ("threads=-1", "threads=-1: a number from 1"),
    "threads": ("threads=100000", "threads=100000: a number from 1 to 1,024"),
    "seed": (f"seed={2**70}", f"seed={2**70}: a number from 0"),
    "seed below 0": ("seed=-1", "seed=-1: a number from 0"),
    "shots": ("shots=-1", "shots=-1: a number from 0"),
    "samples": ("data.n=1000000000", "data.n=1000000000 is too many to draw"),
    "block": ("decode.max_new_tokens=16 decode.block_length=3", "decode.block_length=3 decode.max_new_tokens=16"),
    "metric": ("data.metrics=[entity_recall]", "scores no answers: text metric"),
    "headline": (
        "data.metrics=[cider_d]",
        "data.metrics: cider_d depends on all answers; single answers first",
    ),
    "relevance": ("relevance=external relevance.path=absent.safetensors", "absent.safetensors: no such file"),
    "shard": ("shards=2 shard=2", "numbered from 0 to shards - 1"),
    "shards": ("data.n=25 limit=null shards=26", "only 25 samples"),
    "shuffle": ("shuffle_questions=true selector=divprune", "shuffle_questions=true changes nothing"),
    "shuffle, no relevance": ("shuffle_questions=true selector=shirg relevance=none", "changes nothing"),
    "workers": ("workers=-1", "workers=-1: a number from 0 to 256"),
    "mandatory": ("data=folder", "data.root has no value; give data.root="),
    "context of a selector without a budget": ("selector=pooled context=even", "Pooled has no budget .* context=none"),
    "context of another budget for each picture": (
        "selector=saint context=even budget=matched",
        "Saint has budget=matched, which follows the picture",
    ),
    "context without a place": (
        "selector=saint context=even context.evidence=80",
        "context.evidence=80: Saint chooses 80 tokens at this budget .* lower context.evidence",
    ),
    "evidence": ("selector=saint context=even context.evidence=1.5", "context.evidence=1.5: a number of tokens, or a"),
    "text for evidence": ("selector=saint context=even context.evidence=many", "context.evidence='many' not a number"),
    "context option": (
        "selector=saint context=even +context.share=3",
        "context.share: EvenContext no such option; it has selector, evidence",
    ),
    "cache budget": (f"{FULL} cache=fastv cache.layer=0 cache.budget=337", "budget 337 larger than the 336"),
    "cache layer": (f"{FULL} cache=fastv", "layer=1: layers 0 to 0"),
    "no prefix cache": (f"{FULL} cache=fastv decode.prefix_cache=false", "FastV shortens the prefix cache"),
    "one step": (f"{FULL} cache=redvtp decode.step_per_block=1", "RedVTP takes only one: .* more steps .*cache=none"),
    "one step that fills something": (
        f"{FULL} model=tiny_dream_scratch cache=redvtp",
        "RedVTP takes only one: choose a longer answer .* another decode.schedule or cache=none",
    ),
    "no step": (
        f"{FULL} model=tiny_dream_scratch cache=fastv decode.max_new_tokens=1",
        "FastV is for the denoising steps the answer to prompt 'test-.* takes none",
    ),
    "name of a cache budget": (f"{FULL} cache=fastv budget=most", r"budget=most: give base \(80\)"),
    "cache literal": (f"{FULL} cache=fastv cache.queries=all", "cache.queries='all' one of last, text"),
    "cache option": (f"{FULL} cache=redvtp +cache.layer=1", "cache.layer: RedVTP no such option; it has budget"),
    "other literal": (f"{FULL} cache=redvtp cache.positions=1", "cache.positions=1 one of retain, reindex"),
    "no cache": (
        f"{FULL} cache=redvtp cache._target_=baselines.controls.Random ~cache.positions",
        "cache._target_=baselines.controls.Random CacheSelector",
    ),
    "file as a selector": (
        "selector=pooled selector._target_=logging.FileHandler +selector.filename=made",
        "selector._target_=logging.FileHandler shirg.Selector",
    ),
    "file as data": ("selector=pooled data._target_=logging.FileHandler", "another kind __len__ or __getitem__"),
    "class behind our own module": (
        "selector=pooled selector._target_=experiments.atomic_files.Journal",
        "selector._target_=experiments.atomic_files.Journal shirg.Selector",
    ),
    "relevance that cannot rank": ("selector=shirg relevance._target_=zipfile.ZipFile", "another kind __call__"),
    "no selector": (
        "selector=pooled selector._target_=lavida_adapter.relevance.LmEmbed",
        "selector._target_=lavida_adapter.relevance.LmEmbed shirg.Selector",
    ),
}


def has(key_words: str, sentence: str) -> bool:
    """Whether the sentence has all parts of `key_words` in this order; " " stands for anything."""
    return re.search(key_words.replace(" ", ".*"), sentence) is not None


@pytest.mark.parametrize(("words", "sentence"), COMMANDS.values(), ids=COMMANDS)
def test_command_lines(words: str, sentence: str, command: Command, tmp_path: Path) -> None:
    ended = command("eval", *words.split())
    assert (ended.code, ended.out, len(ended.err)) == (1, "", 1)
    assert ended.err[0].startswith("error: ") and has(sentence, ended.err[0]), ended.err[0]
    assert not list(tmp_path.glob("outputs/*/*"))


def test_sweeps_of_the_other_command() -> None:
    with pytest.raises(ValueError, match="sweep=main_table is for eval.py; the sweeps of train.py are lora_rank"):
        expand("train", ["sweep=main_table"])
    with pytest.raises(ValueError, match="run= is for eval.py"):
        expand("train", ["run=x"])
    assert parse(["rescore=a", "data.metrics=[anls,exact_match]"]).metrics == ("anls", "exact_match")


@pytest.mark.parametrize(
    ("status", "stage", "sentence"),
    [
        ("failed", "adapt", "status failed: train it first"),
        ("ok", "base", "whole weights, not an adapter: .*model.path="),
    ],
)
def test_runs_without_an_adapter(status: str, stage: str, sentence: str, tmp_path: Path) -> None:
    training = {"stage": stage, "artifact": f"{tmp_path}/weights"}
    record = {"version": VERSION, "verb": "train", "status": status, "overrides": [], "training": training}
    (tmp_path / "result.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=sentence):
        expand("eval", [f"run={tmp_path}"])


def refused(eval_here: Eval, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence of a job that fails, which its record has as well if it had begun."""
    folder = eval_here(*words, ok=False)
    (line,) = capfd.readouterr().err.strip().splitlines()
    if (folder / "result.json").exists():
        result = result_of(folder)
        assert result["status"] == "failed" and line == f"error: {' '.join(result['reason'].split())}"
        assert (folder / "error.txt").exists()
    else:
        assert not folder.exists() or [path.name for path in folder.iterdir()] == [".lock"]
    return line


@pytest.mark.parametrize(("words", "sentence"), JOBS.values(), ids=JOBS)
def test_values(words: str, sentence: str, eval_here: Eval, capfd: pytest.CaptureFixture[str]) -> None:
    limit = [] if "limit=" in words else ["limit=4"]
    line = refused(eval_here, capfd, *limit, *words.split())
    assert line.startswith("error: ") and has(sentence, line), line


def test_data_without_boxes_or_enough_answers(
    eval_here: Eval, picture_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plain = ("data=folder", f"data.root={picture_folder('plain')}")
    assert "has no boxes: pass boxes=" in refused(eval_here, capfd, "selector=oracle", *plain)
    read = official.write("docvqa", "disk", tmp_path / "pages")
    line = refused(eval_here, capfd, *read, "limit=8", "selector=pooled", "data.metrics=[vqa_accuracy]")
    assert "soft accuracy needs the answers of 4 or more people, and a sample has 2" in line


def test_checkpoints(tiny_weights: Path, eval_here: Eval, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = Path(shutil.copytree(tiny_weights, tmp_path / "weights"))
    words = (f"model.path={weights}", "selector=pooled", "limit=1", "overwrite=true")
    tensors = load_file(weights / "model.safetensors")
    del tensors["model.mm_projector.2.bias"]
    tensors["model.image_newline"] = torch.zeros(15)
    save_file(tensors, weights / "model.safetensors")
    assert refused(eval_here, capfd, *words) == (
        f"error: the tensors in {weights} do not fit its config.json: 1 missing: model.mm_projector.2.bias; "
        "1 of the wrong shape: model.image_newline is [15], expected [16]"
    )
    (weights / "model.safetensors").unlink()
    torch.save({"model.image_newline": torch.zeros(16)}, weights / "pytorch_model.bin")
    assert has("pickled weights only .*pytorch_model.bin.* convert .* safetensors", refused(eval_here, capfd, *words))
