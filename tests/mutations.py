"""Faults planted one by one in a copy of the sources, and the test that must catch each: `make mutants`.

A test suite is worth what it catches. Each fault here is a slip that somebody could make, or that an earlier attempt at
this method did make; the table printed at the end names what noticed it.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("shirg", "baselines", "lavida_adapter", "experiments", "tests", "conf", "pyproject.toml")
CONTRACT = "tests/test_contract.py::test_"


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    """Text that occurs once in the file."""
    new: str
    caught_by: str
    """A test, as pytest names it."""


FAULTS = (
    Fault(
        "an index is one too large",
        "shirg/selection.py",
        "index_BT=index_BT.masked_fill(~mask_BT, -1),",
        "index_BT=(index_BT + 1).masked_fill(~mask_BT, -1),",
        CONTRACT + "kept_tokens_are_source_tokens_each_once_in_reading_order[shirg-grid2]",
    ),
    Fault(
        "a step of the neighbourhood has the wrong sign",
        "shirg/scoring.py",
        "EDGES = ((0, 1), (1, 0), (1, 1), (1, -1))",
        "EDGES = ((0, 1), (1, 0), (1, 1), (1, 1))",
        "tests/shirg/test_scoring.py::test_neighbour_term_equals_the_loop[grid1-feature_l2-4]",
    ),
    Fault(
        "rows between two blocks are not compared",
        "shirg/scoring.py",
        "token_RC[first : first + step + 1]",
        "token_RC[first : first + step]",
        "tests/shirg/test_scoring.py::test_neighbour_term_equals_the_loop[grid1-feature_l2-4]",
    ),
    Fault(
        "the neighbour term loses its sign",
        "shirg/terms.py",
        "score_BP + self.neighbor.sign * weights.neighbor * distance_BP",
        "score_BP + weights.neighbor * distance_BP",
        "tests/shirg/test_gate.py::test_equals_the_plain_reading[grid2--1]",
    ),
    Fault(
        "statistics are those of the whole batch",
        "shirg/scoring.py",
        "std_B1 = ((centred_BM.square() * weight_BM).sum(-1, keepdim=True) / count_B1).sqrt()",
        "std_B1 = ((centred_BM.square() * weight_BM).sum() / count_B1.sum()).sqrt()",
        CONTRACT + "a_picture_does_not_depend_on_its_batch_mates[shirg]",
    ),
    Fault(
        "padding enters the statistics",
        "shirg/scoring.py",
        "weight_BM = valid_BM.float()\n    count_B1",
        "weight_BM = torch.ones_like(values_BM)\n    count_B1",
        "tests/shirg/test_scoring.py::test_padding_never_enters_the_statistics",
    ),
    Fault(
        "tokens stay in the order of their scores",
        "shirg/selection.py",
        "order_BT = torch.sort(place_BT, dim=-1, stable=True).indices",
        "order_BT = torch.arange(t).expand_as(place_BT)",
        CONTRACT + "kept_tokens_are_source_tokens_each_once_in_reading_order[shirg-grid2]",
    ),
    Fault(
        "scores are rounded to float16",
        "shirg/gate.py",
        "seats, ranks_global)\n            assert_finite",
        "seats, ranks_global).half().float()\n            assert_finite",
        "tests/shirg/test_scoring.py::test_scores_tell_apart_what_half_precision_cannot",
    ),
    Fault(
        "of equal scores the last wins",
        "shirg/selection.py",
        "return torch.sort(scores_BN, dim=-1, descending=True, stable=True).indices[:, :k]",
        "return torch.sort(scores_BN.flip(1), dim=-1, stable=True).indices.flip(1)[:, :k]",
        "tests/shirg/test_gate.py::test_equal_scores_go_to_the_first_in_reading_order",
    ),
    Fault(
        "padding may be kept",
        "shirg/ranking.py",
        'best_BX = stable_topk(score_BX.masked_fill(~usable_BX, float("-inf")), token_BX.shape[1])',
        "best_BX = stable_topk(score_BX, token_BX.shape[1])",
        CONTRACT + "kept_tokens_are_source_tokens_each_once_in_reading_order[shirg-grid2]",
    ),
    Fault(
        "the encoder's states are scaled in place",
        "shirg/scoring.py",
        "copy_RCD = torch.unflatten(tokens_ND.index_select(",
        "copy_RCD = torch.unflatten(tokens_ND.mul_(0.5).index_select(",
        CONTRACT + "what_is_given_stays_as_it_is[shirg]",
    ),
    Fault(
        "a score has a random part",
        "shirg/gate.py",
        "seats, ranks_global)\n            assert_finite",
        "seats, ranks_global)\n            scores_BP += 0.01 * torch.rand_like(scores_BP)\n            assert_finite",
        CONTRACT + "repeats_bit_for_bit[shirg]",
    ),
    Fault(
        "a tile is known by the number of its view",
        "shirg/tables.py",
        "key_V = origin_V2[:, 0] * cols + origin_V2[:, 1] + rows",
        "key_V = torch.arange(len(origin_V2), device=origin_V2.device) + rows",
        CONTRACT + "the_numbering_of_views_means_nothing[everything-views0]",
    ),
    Fault(
        "the winner of a cell is one column off",
        "shirg/seats.py",
        "column_BM = columns - torch.where(is_best, first, 0).amax(-1)",
        "column_BM = columns - torch.where(is_best, first, 0).amax(-1) + 1",
        "tests/shirg/test_family.py::test_a_cell_goes_to_its_most_relevant_token",
    ),
    Fault(
        "the scaffold is left out",
        "shirg/gate.py",
        "        if side:\n",
        "        if side > 99:\n",
        CONTRACT + "budgets_are_exact[shirg-60]",
    ),
    Fault(
        "the scaffold counts nothing towards the budget",
        "shirg/gate.py",
        "return total - taken, count_B - taken",
        "return total, count_B",
        CONTRACT + "budgets_are_exact[shirg-60]",
    ),
    Fault(
        "scaffold windows begin one cell late",
        "shirg/geometry.py",
        "cell = torch.arange(cells, device=device) * windows",
        "cell = torch.arange(1, cells + 1, device=device) * windows",
        "tests/shirg/test_coverage.py::test_means_are_exact_areas[grid0-global-4]",
    ),
    Fault(
        "a region's best token gets no precedence",
        "shirg/ranking.py",
        "return scores_BP + chosen_BP * (2 * spread_B1 + 1)",
        "return scores_BP + chosen_BP * 1e-3",
        "tests/shirg/test_family.py::test_equals_the_plain_reading[shirg_x]",
    ),
    Fault(
        "the global view is never ranked",
        "shirg/gate.py",
        "- self.merge.count(layout) < k for n in usable)",
        "- self.merge.count(layout) < 0 for n in usable)",
        "tests/shirg/test_gate.py::test_underflow",
    ),
    Fault(
        "kept tokens carry no gradient",
        "shirg/selection.py",
        "tokens_BTD=gather_tokens(features.tokens_BND, index_BT) * mask",
        "tokens_BTD=gather_tokens(features.tokens_BND, index_BT).detach() * mask",
        CONTRACT + "gradient_reaches_kept_tokens_alone[shirg]",
    ),
    Fault(
        "the mass of every source is prescribed",
        "baselines/topv.py",
        "return u_BGS, v_BGS",
        "return share((v_BGS[..., None, :] @ kernel_BGSS).squeeze(-2)), v_BGS",
        "tests/baselines/test_topv.py::test_importances_differ[total]",
    ),
    Fault(
        "a Gram matrix is mirrored one block too far",
        "baselines/similarity.py",
        "strip[..., end - first :].transpose(-1, -2)",
        "strip[..., end - first :].flip(-1).transpose(-1, -2)",
        "tests/baselines/test_similarity.py::test_gram_is_the_product[3]",
    ),
    Fault(
        "SAINT drops what resembles the others least",
        "baselines/saint.py",
        "left_BGS = take((-degree(k_BGSD, left_BGS))",
        "left_BGS = take((degree(k_BGSD, left_BGS))",
        "tests/baselines/test_rivals.py::test_choices_are_those_of_the_loops[15-per_view-grid0]",
    ),
)


def run(tests: list[str], at: Path) -> tuple[bool, str]:
    """Whether all tests pass in a copy of the sources, and what failed first."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", *tests]
    done = subprocess.run(command, cwd=at, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode > 1 or (done.returncode and not lines):
        raise RuntimeError(f"pytest could not run {tests}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0, lines[0].partition(" ")[2] if lines else ""


def main() -> int:
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        sound, failed = run(sorted({fault.caught_by for fault in FAULTS}), copy)
        if not sound:
            print(f"without a fault fails {failed}")
            return 1
        for fault in FAULTS:
            path = copy / fault.file
            text = path.read_text()
            path.write_text(text.replace(fault.old, fault.new))
            passed, failed = run([fault.caught_by], copy)
            path.write_text(text)
            missed += [fault.name] * passed
            print(f"{fault.name} ({fault.file}): {'NOT CAUGHT' if passed else failed.partition(' - ')[0]}", flush=True)
    print(f"{len(FAULTS) - len(missed)} of {len(FAULTS)} faults caught; the same tests pass without them")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
