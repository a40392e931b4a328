"""A case of a rival's golden file: its parameters, its tensors, and comparisons that are counted."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Agreement:
    """What was compared with one rival, over all of its cases."""

    cases: set[str] = field(default_factory=set)
    comparisons: int = 0
    differing: int = 0
    exact: set[str] = field(default_factory=set)
    deviations: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The largest deviation and the tolerance of what is compared with one."""

    def line(self, kind: str) -> str:
        found = [f"{what} within {worst:.2g} (tolerance {limit:g})" for what, (worst, limit) in self.deviations.items()]
        figure = "; ".join(([f"{', '.join(sorted(self.exact))} exact"] if self.exact else []) + found)
        if self.differing:
            figure = f"{self.differing} COMPARISONS DIFFER; {figure}"
        return f"{kind:12}{len(self.cases):4} cases {self.comparisons:4} comparisons   {figure or 'nothing compared'}"


@dataclass
class RivalCase:
    """One case. Whoever checks it has to read every tensor: one that is left over is a variant that no check knows."""

    kind: str
    name: str
    given: dict[str, Any]
    """The case's entry in the JSON file."""
    tensors: dict[str, Tensor]
    agreement: Agreement = field(default_factory=Agreement)
    _read: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(name)
        return self.tensors[name]

    def variants(self, output: str) -> list[str]:
        """The x of all tensors x.`output`."""
        return sorted(name[: -len(output) - 1] for name in self.tensors if name.endswith(f".{output}"))

    def same(self, what: str, ours: Any, theirs: Any) -> None:
        """Asserts equality."""
        self.agreement.comparisons += 1
        self.agreement.differing += ours != theirs
        self.agreement.exact.add(what)
        assert ours == theirs, f"{self.kind}, case {self.name}, {what}: {ours!r} is not {theirs!r}"

    def close(self, what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
        """Asserts |ours - theirs| <= tolerance."""
        where = f"{self.kind}, case {self.name}, {what}"
        self.agreement.comparisons += 1
        fits = ours.shape == theirs.shape
        deviation = float((ours.double() - theirs.double()).abs().max()) if fits and ours.numel() else 0.0
        worst, _ = self.agreement.deviations.get(what, (0.0, tolerance))
        # A NaN is larger than nothing: it must not be lost in max().
        self.agreement.deviations[what] = (max(worst, deviation) if deviation == deviation else deviation, tolerance)
        good = fits and deviation <= tolerance
        self.agreement.differing += not good
        assert fits, f"{where}: {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        assert good, f"{where}: deviates by {deviation:.3g}, tolerance {tolerance:g}"

    def assert_all_read(self) -> None:
        left = sorted(set(self.tensors) - self._read)
        assert not left, f"{self.kind}, case {self.name}: no check reads the tensors {', '.join(left)}"


def read_cases(folder: Path) -> list[RivalCase]:
    """All cases of all rivals in a folder of pairs NAME.json, NAME.safetensors.

    Raises:
        AssertionError: for half a pair, a file without cases, and a tensor of no case.
    """
    stems = {suffix: {p.stem for p in folder.glob(f"*.{suffix}")} for suffix in ("json", "safetensors")}
    alone = stems["json"] ^ stems["safetensors"]
    assert not alone, f"{folder}: give both NAME.json and NAME.safetensors of {', '.join(sorted(alone))}"
    found = []
    for stem in sorted(stems["json"]):
        described = json.loads((folder / f"{stem}.json").read_text())
        tensors, kind = load_file(folder / f"{stem}.safetensors"), described.get("name", stem)
        cases = described.get("cases", {})
        assert cases, f"{folder / stem}.json has no cases"
        of = {name: _of_case(name, tensors) for name in cases}
        orphans = set(tensors) - {f"{name}.{key}" for name, own in of.items() for key in own}
        assert not orphans, f"{stem}.safetensors: tensors of no case: {', '.join(sorted(orphans))}"
        for name, given in cases.items():
            found.append(RivalCase(kind, name, given, of[name]))
    return found


def _of_case(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


Check = Callable[[RivalCase], None]


def check_case(case: RivalCase, checks: Sequence[dict[str, Check]]) -> None:
    """Runs the check of the case's rival.

    Raises:
        AssertionError: no check knows the rival or one of its tensors, nothing was compared, or a comparison fails.
    """
    known = {kind: check for group in checks for kind, check in group.items()}
    assert case.kind in known, f"no check knows {case.kind!r}; they know {', '.join(sorted(known))}"
    before = case.agreement.comparisons
    known[case.kind](case)
    assert case.agreement.comparisons > before, f"{case.kind}, case {case.name}: nothing was compared"
    case.assert_all_read()
