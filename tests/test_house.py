"""The rules of the house that a machine can check (CONTRIBUTING.md)."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shirg", "baselines", "lavida_adapter", "experiments")
ENTRIES = ("train", "eval")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("lavida", "method", "data", "report", "app", "structure", "findings")),
)
PAGES = (*DOCUMENTS, "docs/any_vlm.md")
"""Also the page whose options are arguments of Python."""
PLACEHOLDERS = ("x", "glob", "contrast")
"""Of the names table, of a sweep over a whole group, and the selector that CONTRIBUTING.md adds."""
GROUPS = "|".join(
    (
        "model",
        "selector",
        "context",
        "relevance",
        "data",
        "lora",
        "decode",
        "cache",
        "objective",
        "trainer",
        "logger",
        "stage",
        "recipe",
        "experiment",
        "ablation",
        "sweep",
        "hydra/launcher",
    )
)


def modules() -> list[str]:
    found = [path.relative_to(ROOT).with_suffix("") for p in PACKAGES for path in (ROOT / p).rglob("*.py")]
    dotted = [".".join(path.parts).removesuffix(".__init__") for path in found if path.name != "__main__"]
    for library, needed_by in (("triton", "_triton"), ("lmms_eval", "lmms_model"), ("gradio", "web_page")):
        if find_spec(library) is None:
            dotted = [name for name in dotted if not name.endswith(needed_by)]
    return sorted(dotted) + [entry for entry in ENTRIES if (ROOT / f"{entry}.py").exists()]


@cache
def tracked() -> list[Path]:
    """Files of the repository: committed, or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def sources() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def configs() -> list[Path]:
    return sorted((ROOT / "conf").rglob("*.yaml"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Top-level names of what a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: relative import"
            names.add(str(node.module).split(".")[0])
    return frozenset(names)


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> list[Requirement]:
    optional = project()["optional-dependencies"]
    return [Requirement(r) for r in sum((optional[extra] for extra in extras), list(project()["dependencies"]))]


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


FIRST_EDITION = {
    "shirg": "Budget Geometry Pooling Role Selection Selector ShirgGate Source Stage TokenLayout "
    "VisionFeatures area_weights assert_finite close_rows crops_layout fovea_layout gather_tokens "
    "join keep matched_count_B most_pooled pooled_count_B regions single_layout stable_topk subdivide "
    "tables tiles_layout unpad_bounds used_rows",
    "baselines": "CDPruner DivPrune Full GlobalOnly NormTopK Oracle Pooled Random Saint SaintVote ToMe TopV "
    "UniformGrid VisPruner VisionZip",
    "lavida_adapter": "AdaptiveK CachePacker CacheSelector Cast DecodeConfig FastV Fp8 Generation Int8 Lavida "
    "LavidaConfig LayerRetention LladaConfig LoraConfig ObjectiveConfig Prefix RedVTP TrainBatch "
    "VisionConfig add_lora load_adapter merge_lora save_adapter",
}


@pytest.mark.parametrize("package", FIRST_EDITION)
def test_names_of_the_first_edition_can_be_imported(package: str) -> None:
    module = importlib.import_module(package)
    for name in FIRST_EDITION[package].split():
        assert hasattr(module, name) and name in module.__all__, name


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "__init__.py").exists()
    assert (ROOT / package / "py.typed").exists()


def test_import_directions() -> None:
    """The contracts of pyproject.toml, by the same command as `make lint`."""
    command = "from importlinter.cli import lint_imports_command as run; run()"
    result = subprocess.run([sys.executable, "-c", command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"{len(contracts)} kept, 0 broken" in result.stdout


@pytest.mark.parametrize(("package", "friends"), [("shirg", {"shirg"}), ("baselines", {"baselines", "shirg"})])
def test_selectors_need_torch_alone(package: str, friends: set[str]) -> None:
    allowed = friends | {"torch"} | sys.stdlib_module_names
    for path in (ROOT / package).rglob("*.py"):
        if path.parent.name == "kernels" and path.stem.endswith("_triton"):
            assert imported(path) == {"triton"}, path.relative_to(ROOT)
            continue
        assert imported(path) <= allowed, f"{path.relative_to(ROOT)} imports {sorted(imported(path) - allowed)}"


def test_entry_points_are_imported_by_nobody() -> None:
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        assert not imported(path) & set(ENTRIES), path.relative_to(ROOT)


def test_every_import_is_a_declared_dependency() -> None:
    distributions = importlib.metadata.packages_distributions()
    declared = {r.name.lower().replace("_", "-") for r in requirements("gpu", "slurm", "viz", "app", "lmms", "dev")}
    known = {*PACKAGES, *ENTRIES, "tests"} | sys.stdlib_module_names
    for path in sources():
        local = {p.stem for p in path.parent.glob("*.py")} if "tests" in path.parts else set()
        for name in imported(path) - known - local:
            owners = {d.lower().replace("_", "-") for d in distributions.get(name, [name])}
            assert owners & declared, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    for requirement in requirements("slurm", "viz", "app", "dev"):
        if requirement.name == "shirg":  # an extra that takes another one in
            continue
        pin = pins.get(requirement.name.lower())
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pin), f"{requirement} excludes the pinned {pin}"


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_lines_of_documents_are_short() -> None:
    """Tables that the program wrote, in docs/results, are data; the README beside them is a document."""
    written = ROOT / "docs/results"
    pages = [p for p in tracked() if p.suffix == ".md" and (p.name == "README.md" or written not in p.parents)]
    assert len(pages) > 10
    long = [f"{p.relative_to(ROOT)}:{n}" for p in pages for n, line in enumerate(lines_of(p), 1) if len(line) > 200]
    assert not long


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"(?<![\w.}])/(?:home|Users|root|work|tmp|mnt)/|\.\./shared|\bspec/|\bdesign\.md\b")
    for path in tracked():
        for number, line in enumerate((text_of(path) or "").splitlines(), 1):
            assert not machine.search(line), f"{path.relative_to(ROOT)}, line {number}: {line.strip()[:120]}"


@pytest.mark.parametrize("path", configs(), ids=lambda p: str(p.relative_to(ROOT / "conf")))
def test_every_config_says_how_to_run_it(path: Path) -> None:
    """First comment: the command. Second: one sentence, which `--help` prints."""
    comments: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comments.append(line.removeprefix("#").strip())
    assert len(comments) >= 2, "needs two comment lines: the command, then what this is"
    assert re.match(r"(?:python (?:(?:eval|train)\.py|-m experiments)|make|torchrun)\b", comments[0]), comments[0]
    assert not comments[1].startswith("python"), comments[1]
    assert isinstance(yaml.safe_load(path.read_text()) or {}, dict)


@pytest.mark.parametrize("name", (*DOCUMENTS, "Makefile"))
def test_documents_name_options_that_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for group, values in re.findall(rf"(?<![\w.])({GROUPS})=([a-z]\w*(?:,[a-z]\w*\b(?!=))*)", text):
        for value in values.split(","):
            assert value in PLACEHOLDERS or (ROOT / "conf" / group / f"{value}.yaml").exists(), f"{group}={value}"
    for path in re.findall(r"(?<![\w.])selector\.([\w.]+)=", text):
        assert any(has(yaml.safe_load(p.read_text()), path) for p in (ROOT / "conf/selector").glob("*.yaml")), path


def has(node: Any, path: str) -> bool:
    """Whether a dotted path exists in a config."""
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return True


def headings(document: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", (ROOT / document).read_text(), flags=re.MULTILINE)


def test_every_selector_has_its_section() -> None:
    assert {path.stem for path in (ROOT / "conf" / "selector").glob("*.yaml")} <= set(headings("docs/method.md"))


def test_citations_of_the_documents_exist() -> None:
    """`docs/method.md, "Scaffold" and "Order"` in a source file names headings of that page."""
    cited = 0
    for path in sources():
        for document, names in re.findall(r'(docs/\w+\.md), ((?:"[^"\n]+"(?:, and |, | and )?)+)', path.read_text()):
            for title in re.findall(r'"([^"]+)"', names):
                assert title in headings(document), f'{path.relative_to(ROOT)} cites {document}, "{title}"'
                cited += 1
    assert cited > 10


@pytest.mark.parametrize("name", PAGES)
def test_documents_name_files_that_exist(name: str) -> None:
    homes = "|".join((*PACKAGES, "conf", "docs", "tests"))
    for path in re.findall(rf"`((?:{homes})/[\w./-]*)`", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", PAGES)
def test_documents_name_tests_that_exist(name: str) -> None:
    for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / name).read_text()):
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            titles = headings(str(linked.relative_to(ROOT)))
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
