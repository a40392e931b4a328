"""What the commands on a finished study refuse: one sentence on standard error, exit code 1."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from experiments import compare
from experiments.bench import __main__ as bench
from experiments.bench import profile_cache
from experiments.data.synthetic.entitygrid import __main__ as entitygrid
from experiments.report import __main__ as report
from experiments.report import dashboard, overlay

Main = Callable[[Sequence[str]], None]


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (report.main, "FOLDER/absent", "no such folder"),
        (report.main, "FOLDER", "holds no job"),
        (compare.main, "FOLDER adapter=own", "no finished evaluations in this folder"),
        (compare.main, "STUDY adapter=own", "no finished evaluation has adapter=own"),
        (compare.main, "STUDY adapter", "adapter: there are no finished evaluations in this folder"),
        (dashboard.main, "STUDY", "give entity=NAME"),
        (dashboard.main, "STUDY entity=us color=red", "nothing else but project=NAME"),
        (dashboard.main, "FOLDER entity=us", "there is no evaluated job in it"),
        (overlay.main, "question=x", "image has no value; give image=..."),
        (overlay.main, "image=IMAGE", "question has no value; give question=..."),
        (overlay.main, "image=absent.png question=x", "image=absent.png: there is no such file"),
        (overlay.main, "image=IMAGE question=x shirg", "shirg: give key=value"),
        (overlay.main, "image=IMAGE question=x selector=foo", "selector=foo: there is no such option; choose one of"),
        (overlay.main, "image=IMAGE question=x selector=random selector.foo=1", "selector.foo: selector=random has no"),
        (overlay.main, "image=IMAGE question=x bugdet=3", "bugdet: there is no such key"),
        (overlay.main, "image=IMAGE question=x boxes=[[1,2,3]]", "boxes=[[1,2,3]]: give [[x0,y0,x1,y1],...]"),
        (overlay.main, "image=IMAGE question=x out=panels.txt", "out=panels.txt: give a name that ends in .png"),
    ],
)
def test_one_sentence(
    main: Main,
    arguments: str,
    words: str,
    study: Path,
    tmp_path: Path,
    tiny_weights: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (90, 60)).save(tmp_path / "picture.png")
    for name, path in (("IMAGE", tmp_path / "picture.png"), ("STUDY", study), ("FOLDER", tmp_path)):
        arguments = arguments.replace(name, str(path))
    model = ["model=tiny", f"model.path={tiny_weights}"] if main is overlay.main else []
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments.split(), *model])
    (line,) = capfd.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: ") and words in line


@pytest.mark.parametrize("command", [report, compare, dashboard, overlay, bench, profile_cache, entitygrid])
def test_an_unknown_option_is_one_sentence_and_exit_code_1(
    command: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--nonsense", "x", "y=1"])
    (line,) = capfd.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: ") and line.endswith("--help` lists what there is")
