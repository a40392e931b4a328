"""Row ends."""

import torch

from shirg import Source, close_rows, keep, stable_topk, used_rows
from tests.features import SIZES, make_features


def test_a_newline_follows_each_row() -> None:
    features = make_features((1, 2), side=3, sizes=[(756, 378), (300, 100)], width=2)
    layout = features.layout
    n_valid = features.valid_BN.sum(-1)
    chosen = keep(features, stable_topk(features.valid_BN.float(), layout.n_tokens), n_valid)
    rows = used_rows(layout, features.valid_BN)
    closed = close_rows(chosen, features, rows)
    assert closed.mask_BT.shape[1] == layout.n_tokens + 3
    for sample in range(2):
        used = closed.mask_BT[sample]
        source, index = closed.source_BT[sample][used].tolist(), closed.index_BT[sample][used].tolist()
        assert all((s == int(Source.NEWLINE)) == (i == -1) for s, i in zip(source, index, strict=True))
        lines: list[list[int]] = [[]]
        for i in index[layout.n_global :]:
            lines.append([]) if i == -1 else lines[-1].append(int(layout.cell_N2[i, 0]))
        assert lines.pop() == []
        assert lines == [[r] * 6 for r in range(3) if bool(rows[sample, r])]
        assert all(i >= 0 for i in index[: layout.n_global]), "the global view has no newlines"
    newline = (closed.source_BT == int(Source.NEWLINE)) & closed.mask_BT
    assert float(closed.tokens_BTD[newline].abs().max()) == 0
    assert bool((closed.box_BT4[newline][:, 0] == 1).all())


def test_rows_of_padding_have_no_newline() -> None:
    features = make_features((2, 2), sizes=[(768, 300), (768, 768)])
    rows = used_rows(features.layout, features.valid_BN)
    assert bool(rows[1].all()) and rows[0].nonzero().flatten().tolist() == list(range(6, 13))
    canvas = features.valid_BN[0, features.layout.order_N[81:]].view(18, 18)
    assert torch.equal(rows[0], canvas.any(1))


def test_a_single_view_is_closed_once_at_its_end() -> None:
    features = make_features((0, 0), side=3, sizes=SIZES[(0, 0)][:1], width=2)
    everything = keep(features, torch.arange(9)[None], torch.tensor([9]))
    closed = close_rows(everything, features, used_rows(features.layout, features.valid_BN))
    assert closed.index_BT.tolist() == [[*range(9), -1]] and bool(closed.mask_BT.all())
