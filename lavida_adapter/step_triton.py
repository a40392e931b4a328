"""The Triton kernels of a denoising step; the only file of this package that imports Triton.

Attention (`lavida_adapter.prefix_attention`): the keys of a prompt are divided among `SPLITS` programs, because one
program for each head leaves most of a GPU idle (flash decoding, arXiv 2311.01282, section 3). Heads that share keys are
rows of one matrix, so that keys are read once for all of them.

Candidates (`lavida_adapter.sampling`): a row of logits is read once.

Packed caches (`lavida_adapter.cache_compression.quantize`): numbers are unpacked where attention reads them.
"""

import triton
import triton.language as tl


@triton.jit
def _add_keys(q, k, v, seen, peak, total, sums, scale):
    """One step of the online softmax over a tile of keys; `peak` and `total` are of exponents to the base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    # Where no key has been seen yet, -inf - -inf would be NaN.
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(peak - finite)
    sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return higher, total * shrink + tl.sum(p, axis=1), sums


@triton.jit
def attend_kernel(
    q,
    k,
    v,
    own_k,
    own_v,
    seen,
    end,
    out,
    part_sums,
    part_peak,
    part_total,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_slot,
    v_batch,
    v_head,
    v_slot,
    own_k_batch,
    own_k_head,
    own_k_token,
    own_v_batch,
    own_v_head,
    own_v_token,
    seen_batch,
    n_queries,
    n_own,
    kv_heads,
    groups,
    scale,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (prompt and key head, rows of queries, split). With one split it writes `out`, otherwise the parts."""
    pair, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, head = pair // kv_heads, pair % kv_heads
    n_rows = groups * n_queries
    row = block * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDE)
    exists = (row < n_rows)[:, None] & (at < WIDTH)[None, :]
    q_head_of_row, token = head * groups + row // n_queries, row % n_queries
    x = tl.load(
        q + batch * q_batch + (q_head_of_row * q_head + token * q_token)[:, None] + at[None, :], mask=exists, other=0.0
    )
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    seen += batch * seen_batch
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    # How many slots are used is read on the device: one recorded launch serves every length.
    n_slots = tl.load(end + batch)
    each = tl.cdiv(tl.cdiv(n_slots, KEYS), SPLITS) * KEYS
    first = split * each
    for start in range(first, tl.minimum(first + each, n_slots), KEYS):
        slot = start + tl.arange(0, KEYS)
        # Keys are not loaded by what `seen` says: they would have to wait for it.
        counts = tl.load(seen + slot, mask=slot < n_slots, other=0).to(tl.int1)
        inside = (slot < n_slots)[:, None] & (at < WIDTH)[None, :]
        keys = tl.load(k + slot[:, None] * k_slot + at[None, :], mask=inside, other=0.0)
        values = tl.load(v + slot[:, None] * v_slot + at[None, :], mask=inside, other=0.0)
        peak, total, sums = _add_keys(x, keys, values, counts, peak, total, sums, scale)
    if split == SPLITS - 1:  # the last split has the fewest slots
        own_key = own_k + batch * own_k_batch + head * own_k_head
        own_value = own_v + batch * own_v_batch + head * own_v_head
        for start in range(0, n_own, KEYS):
            slot = start + tl.arange(0, KEYS)
            counts = slot < n_own
            inside = counts[:, None] & (at < WIDTH)[None, :]
            keys = tl.load(own_key + slot[:, None] * own_k_token + at[None, :], mask=inside, other=0.0)
            values = tl.load(own_value + slot[:, None] * own_v_token + at[None, :], mask=inside, other=0.0)
            peak, total, sums = _add_keys(x, keys, values, counts, peak, total, sums, scale)
    if SPLITS == 1:
        target = ((batch * n_queries + token) * kv_heads * groups + q_head_of_row) * WIDTH
        result = sums / total[:, None]
        tl.store(out + target[:, None] + at[None, :], result.to(out.dtype.element_ty), mask=exists)
    else:
        line = (pair * SPLITS + split) * n_rows + row
        tl.store(part_sums + line[:, None] * WIDTH + at[None, :], sums, mask=exists)
        tl.store(part_peak + line, peak, mask=row < n_rows)
        tl.store(part_total + line, total, mask=row < n_rows)


@triton.jit
def merge_kernel(
    part_sums,
    part_peak,
    part_total,
    out,
    n_queries,
    kv_heads,
    groups,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds the parts of all splits: program (prompt and key head, rows of queries)."""
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    n_rows = groups * n_queries
    row = block * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDE)
    here = row < n_rows
    exists = here[:, None] & (at < WIDTH)[None, :]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(SPLITS):
        line = (pair * SPLITS + split) * n_rows + row
        peak = tl.maximum(peak, tl.load(part_peak + line, mask=here, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    for split in range(SPLITS):
        line = (pair * SPLITS + split) * n_rows + row
        share = tl.exp2(tl.load(part_peak + line, mask=here, other=0.0) - peak)
        total += share * tl.load(part_total + line, mask=here, other=1.0)
        sums += share[:, None] * tl.load(part_sums + line[:, None] * WIDTH + at[None, :], mask=exists, other=0.0)
    token, q_head = row % n_queries, head * groups + row // n_queries
    target = ((batch * n_queries + token) * kv_heads * groups + q_head) * WIDTH
    result = sums / total[:, None]
    tl.store(out + target[:, None] + at[None, :], result.to(out.dtype.element_ty), mask=exists)


@triton.jit
def likeliest_kernel(logits, token, probability, row_stride, width, WIDE: tl.constexpr):
    """One row: its largest logit, and the softmax there, 1 / sum exp(logit - largest), in float64."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    best = tl.full([1], float("-inf"), tl.float32)
    best_at = tl.zeros([1], tl.int32)
    total = tl.zeros([WIDE], tl.float64)
    for start in range(0, width, WIDE):
        at = start + tl.arange(0, WIDE)
        x = tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32)
        top = tl.max(x, axis=0, keep_dims=True)
        here = start + tl.argmax(x, axis=0, tie_break_left=True, keep_dims=True)
        best_at = tl.where(top > best, here, best_at)  # of equal ones the first
        higher = tl.maximum(top, best)
        # Before the first finite logit -inf - -inf would be NaN.
        finite = tl.where(higher == float("-inf"), 0.0, higher).to(tl.float64)
        total = total * tl.exp(best.to(tl.float64) - finite) + tl.exp(x.to(tl.float64) - finite)
        best = higher
    one = tl.arange(0, 1)
    tl.store(token + row + one, best_at.to(tl.int64))
    tl.store(probability + row + one, 1.0 / tl.sum(total, axis=0, keep_dims=True))


@triton.jit
def unpack_int8_kernel(
    codes,
    low,
    scale,
    out,
    n_slots,
    heads,
    groups,
    out_batch,
    out_head,
    out_slot,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (prompt and slot, part of its numbers): codes [B, P, H, Dh] times scale plus low [B, P, groups]."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * WIDE + tl.arange(0, WIDE)
    exists = at < heads * WIDTH
    of_group = token * groups + at // GROUP
    code = tl.load(codes + token * heads * WIDTH + at, mask=exists, other=0).to(tl.float32)
    times = tl.load(scale + of_group, mask=exists, other=0.0).to(tl.float32)
    plus = tl.load(low + of_group, mask=exists, other=0.0).to(tl.float32)
    target = (token // n_slots) * out_batch + (token % n_slots) * out_slot + at // WIDTH * out_head + at % WIDTH
    tl.store(out + target, (code * times + plus).to(out.dtype.element_ty), mask=exists)


@triton.jit
def unpack_fp8_kernel(
    codes,
    scale,
    out,
    n_slots,
    heads,
    out_batch,
    out_head,
    out_slot,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (prompt and head, part of its numbers): e4m3 codes [B, H, P, Dh] as bytes, times scale [B, H].

    GPUs before Ada cannot convert these numbers, so their bits become a float16 whose exponent is 8 too small.
    """
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * WIDE + tl.arange(0, WIDE)
    exists = at < n_slots * WIDTH
    code = tl.load(codes + head * n_slots * WIDTH + at, mask=exists, other=0).to(tl.int16)
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    x = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    x = tl.where((code & 0x7F) == 0x7F, float("nan"), x) * tl.load(scale + head)
    target = (head // heads) * out_batch + (head % heads) * out_head + at // WIDTH * out_slot + at % WIDTH
    tl.store(out + target, x.to(out.dtype.element_ty), mask=exists)
