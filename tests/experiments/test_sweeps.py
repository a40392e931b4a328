"""`sweep=` and `run=` are written out before Hydra sees them; the configs of a sweep are composed once each."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.build import compose_eval
from experiments.errors import ConfigError
from experiments.jobs.results import VERSION
from experiments.override_grammar import quote
from experiments.schema import CONF, VERSION_BASE
from experiments.sweeps import SWEEPS, ComposedConfigs, ComposeOnce, expand, sweep_overrides, system_of
from tests.experiments.conftest import Command


def trained(folder: Path, *overrides: str, stage: str = "adapt", status: str = "ok") -> Path:
    folder.mkdir(parents=True)
    result = {
        "version": VERSION,
        "verb": "train",
        "status": status,
        "overrides": list(overrides),
        "training": {"stage": stage, "artifact": "outputs/elsewhere/adapter"},
    }
    (folder / ("adapter" if stage == "adapt" else "weights")).mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_sweep_becomes_a_multirun() -> None:
    assert expand("eval", ["sweep=main_table", "limit=8"]) == [
        ["-m", "limit=8", "study=main_table", "experiment=B0,B1,S1,S2,P1,P2", "adapter=null,own"]
    ]


def test_what_is_given_by_hand_replaces_what_the_sweep_brings() -> None:
    (line,) = expand("eval", ["-m", "sweep=main_table", "experiment=B0,P1", "study=mine"])
    assert line == ["-m", "experiment=B0,P1", "study=mine", "adapter=null,own"]


def test_a_sweep_may_be_several_products() -> None:
    lines = expand("eval", ["sweep=equal_budget", "adapter=null"])
    assert ["selector=pooled,full,global_only" in line for line in lines] == [True, False, False]
    assert "shuffle_questions=True" in lines[2]
    assert all("adapter=null" in line and "adapter=null,random" not in line for line in lines)


def test_debug_stands_for_a_small_run() -> None:
    (line,) = expand("eval", ["selector=pooled", "debug=true", "threads=2", "-m"])
    small = ["study=debug", "overwrite=true", "limit=8", "batch_size=2", "workers=0", "decode.engine=eager"]
    assert line == ["selector=pooled", "threads=2", *small, "-m"], "the options stay behind the overrides"
    assert expand("eval", ["debug=false", "limit=3"]) == [["limit=3"]]
    (line,) = expand("train", ["debug=true"])
    assert {"optim.steps=3", "trainer.detect_anomaly=true", "study=debug"} <= set(line)
    for line in expand("eval", ["sweep=equal_budget", "debug=true"]):
        assert "limit=8" in line and "study=debug" in line and "study=equal_budget" not in line
    with pytest.raises(ConfigError, match="debug=yes: give debug=true"):
        expand("eval", ["debug=yes"])


def test_a_line_without_shorthand_stays_as_it_is() -> None:
    words = ["-m", "selector=pooled,full", "--cfg", "job"]
    assert expand("eval", words) == [words]


def _first(override: Override) -> str:
    """The override with the first of its values."""
    value = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
    return f"{override.key_or_group}={override.get_value_element_as_str() if value is None else value}"


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_point_of_every_sweep_composes(path: Path) -> None:
    for command in ("train", "eval"):
        try:
            products = sweep_overrides(command, path.stem)
        except ValueError:
            continue
        for product in products:
            parsed = OverridesParser.create().parse_overrides(product)
            first = [_first(o) for o in parsed if "glob(" not in str(o.input_line)]
            with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name=command):
                config = compose(command, overrides=first)
            assert config.study == path.stem


def test_a_run_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    folder = trained(
        tmp_path / "train_a", "selector=shirg", "selector.neighbour.sign=1", "lora.rank=8", "seed=3", "study=s"
    )
    assert expand("eval", [f"run={folder}", "data.n=9"]) == [
        ["data.n=9", "selector=shirg", "selector.neighbour.sign=1", f"adapter={folder}/adapter"]
    ]
    folder = trained(tmp_path / "train_b", "selector=saint", "context=even", "context.evidence=9")
    (line,) = expand("eval", [f"run={folder}"])
    assert line[:3] == ["selector=saint", "context=even", "context.evidence=9"]


def test_a_head_is_evaluated_over_the_relevance_that_it_corrects(tmp_path: Path) -> None:
    assert system_of(["stage=gate", "relevance/base=siglip_text", "relevance.base.path=DIR", "optim.lr=1"]) == [
        "selector=shirg_learned",
        "relevance=learned",
        "relevance/base=siglip_text",
        "relevance.base.path=DIR",
    ]
    head = trained(tmp_path / "train_h", "stage=gate", stage="gate")
    with pytest.raises(ConfigError, match="there is no relevance head in it: give relevance.path=DIR"):
        expand("eval", [f"run={head}"])


def test_runs_by_pattern(tmp_path: Path) -> None:
    for name, selector in (("train_b", "shirg"), ("train_a", "pooled")):
        trained(tmp_path / name, f"selector={selector}")
    trained(tmp_path / "eval_c")
    lines = expand("eval", [f"run={tmp_path}/*"])
    assert [line[0] for line in lines] == ["selector=pooled", "selector=shirg"]


def test_a_run_is_the_one_in_the_folder_wherever_that_was_moved(tmp_path: Path) -> None:
    """The recorded path may be another training's by now."""
    (tmp_path / "outputs/elsewhere/adapter").mkdir(parents=True)
    trained(tmp_path / "here/train_a", "selector=shirg")
    moved = (tmp_path / "here").rename(tmp_path / "a, (moved) one") / "train_a"
    (line,) = expand("eval", [f"run={moved}"])
    assert line == ["selector=shirg", f"adapter='{moved}/adapter'"]
    assert compose_eval(*line).adapter == f"{moved}/adapter"


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("adapt", "no adapter in it: give adapter=DIR (they were written to outputs/elsewhere/adapter)"),
        ("base", "not an adapter: use model.path=DIR (they were written to outputs/elsewhere/adapter)"),
    ],
)
def test_what_was_written_elsewhere_is_not_guessed(tmp_path: Path, stage: str, sentence: str) -> None:
    folder = trained(tmp_path / "train_a", stage=stage)
    (folder / ("adapter" if stage == "adapt" else "weights")).rmdir()
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        expand("eval", [f"run={folder}"])


@pytest.mark.parametrize(
    "text",
    ["a/b", "run (1)", "a=b", "é/图", "it's", "a\\'b", "end\\", "a,b", "[x]", "1e3", "null", "-x", "../up", 'a"b'],
)
def test_any_text_is_a_value(text: str) -> None:
    value = OverridesParser.create().parse_override(f"adapter={quote(text)}").value()
    assert (str(value), isinstance(value, str) or "'" in quote(text)) == (text, True)
    assert compose_eval(f"adapter={quote(text)}").adapter == text


@pytest.mark.parametrize(
    "word",
    [
        "selector._target_=logging.FileHandler",
        "++selector._target_=baselines.controls.Random",
        "selector={_target_: zipfile.ZipFile}",
        "selector.scaffold={_target_: zipfile.ZipFile}",
        "experiment=../../elsewhere/evil",
        "+selector='../evil'",
        "recipe=../evil",
        "model.path=${oc.env:SECRET}",
    ],
)
def test_a_record_decides_what_code_runs_only_if_it_is_trusted(tmp_path: Path, word: str) -> None:
    folder = trained(tmp_path / "train_a", "selector.budget=80", word)
    with pytest.raises(ConfigError, match=re.escape(f"its record asks for {word}, which may run any Python code")):
        expand("eval", [f"run={folder}"])
    if "recipe" not in word:
        (line,) = expand("eval", [f"run={folder}", "trust=true", "limit=3"])
        assert line == ["limit=3", "selector.budget=80", word, f"adapter={folder}/adapter"]


def test_other_keys_of_a_record_are_not_repeated(tmp_path: Path) -> None:
    folder = trained(tmp_path / "train_a", "data._target_=x.Y", "hydra.callbacks.x._target_=x.Y", "logger=../x")
    assert expand("eval", [f"run={folder}"]) == [[f"adapter={folder}/adapter"]]


@pytest.mark.parametrize("words", [["trust=true"], ["run=x", "trust=yes"], ["rescore=x", "trust=true"]])
def test_trust_is_about_a_run(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"trust=true goes with run=FOLDER"):
        expand("eval", words)


JOBS = [["selector=shirg", "budget=70"], ["selector=random", "cache=fastv"]]


@pytest.fixture
def loader() -> Iterator[ConfigLoaderImpl]:
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE, job_name="eval"):
        found = GlobalHydra.instance().config_loader()
        assert isinstance(found, ConfigLoaderImpl)
        yield found


def master_of(loader: ConfigLoaderImpl) -> DictConfig:
    return loader.load_configuration("eval", ["selector=shirg,random"], RunMode.MULTIRUN)


def test_a_kept_config_is_the_composed_one(loader: ConfigLoaderImpl, monkeypatch: pytest.MonkeyPatch) -> None:
    master = master_of(loader)
    expected = [loader.load_sweep_config(master, job) for job in JOBS]
    ComposeOnce().on_multirun_start(master)
    keeping = GlobalHydra.instance().config_loader()
    first = [keeping.load_sweep_config(master, job) for job in JOBS]
    with monkeypatch.context() as patch:
        patch.delattr(ConfigLoaderImpl, "load_sweep_config")
        second = [keeping.load_sweep_config(master, job) for job in JOBS]
    for configs in (first, second):
        assert configs == expected
        assert [OmegaConf.to_yaml(config) for config in configs] == [OmegaConf.to_yaml(config) for config in expected]
        assert all(OmegaConf.is_struct(config) and not OmegaConf.is_readonly(config.hydra) for config in configs)
        assert OmegaConf.get_type(configs[0]) is OmegaConf.get_type(expected[0])
    second[0].budget = 1  # as jobs do
    assert keeping.load_sweep_config(master, JOBS[0]) == expected[0]


def test_a_launcher_does_not_send_the_other_jobs(loader: ConfigLoaderImpl) -> None:
    master, keeping = master_of(loader), ComposedConfigs(loader)
    before = len(pickle.dumps(keeping))
    composed = keeping.load_sweep_config(master, JOBS[0])
    assert len(pickle.dumps(keeping)) <= before
    assert pickle.loads(pickle.dumps(keeping)).load_sweep_config(master, JOBS[0]) == composed


def test_a_mistake_in_any_job_is_found_before_the_first(command: Command) -> None:
    ended = command("eval", "-m", "selector=pooled,nosuch", "study=s")
    assert ended.code == 1 and "ok " not in ended.out
    assert ended.err[-1].startswith("error: selector=nosuch: there is no such option")
