"""The attention call: backends agree, masks mean what they say."""

import pytest
import torch
from torch import Tensor

from lavida_adapter.llada import attend, attention_mask
from tests.lavida_adapter.tiny import noise

PADDING = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
VISUAL = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)


def qkv(kv_heads: int, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return noise(2, 4, 6, 8, seed=1), noise(2, kv_heads, keys, 8, seed=2), noise(2, kv_heads, keys, 8, seed=3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, attention_mask(PADDING, None), attention_mask(PADDING, VISUAL)])
def test_sdpa_equals_math(kv_heads: int, mask: Tensor | None) -> None:
    q, k, v = qkv(kv_heads)
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, mask, "math"), rtol=0, atol=1e-5)


def test_math_is_softmax_attention_over_the_keys_that_may_be_seen() -> None:
    q, k, v = qkv(2)
    out = attend(q, k, v, attention_mask(PADDING, None), "math")
    for b, head, row in ((0, 0, 0), (0, 3, 5), (1, 2, 1)):
        n = int(PADDING[b].sum())
        weight = torch.softmax(k[b, head // 2, :n] @ q[b, head, row] / 8**0.5, dim=0)
        torch.testing.assert_close(out[b, head, row], weight @ v[b, head // 2, :n], rtol=0, atol=1e-5)


def test_attention_mask_without_pictures_is_the_padding_of_the_keys() -> None:
    assert attention_mask(None, None) is None
    mask = attention_mask(PADDING, None)
    assert mask is not None
    assert torch.equal(mask, PADDING[:, None, None, :])


@pytest.mark.parametrize("padding", [None, PADDING])
def test_image_first_mask_position_by_position(padding: Tensor | None) -> None:
    mask = attention_mask(padding, VISUAL)
    assert mask is not None
    assert mask.shape == (2, 1, 6, 6)
    for b in range(2):
        for query in range(6):
            for key in range(6):
                real = padding is None or bool(padding[b, key])
                picture_only = bool(VISUAL[b, query])
                expected = query == key or (real and (bool(VISUAL[b, key]) or not picture_only))
                assert bool(mask[b, 0, query, key]) == expected, (b, query, key)


def test_flash_refuses_a_mask_before_it_is_imported() -> None:
    q, k, v = qkv(4)
    with pytest.raises(ValueError, match="the flash backend takes no mask"):
        attend(q, k, v, attention_mask(PADDING, None), "flash")


def test_unknown_backends() -> None:
    q, k, v = qkv(4)
    with pytest.raises(ValueError, match="attention backend 'cudnn': choose sdpa, math or flash"):
        attend(q, k, v, None, "cudnn")  # type: ignore[arg-type]  # what is tested
