"""Templates of the kernels whose programs hold a unit of keys."""

#: What a program of a unit of keys starts with.
KEYS = """\
TILE_M: tl.constexpr = $TILE_M
TILE_N: tl.constexpr = $TILE_N
SUBTILES: tl.constexpr = UNIT_KV // TILE_N
program, group, b = tl.program_id(0), tl.program_id(1) + first_group, tl.program_id(2)
own = (b * lists + group // GROUPS_PER_LIST).to(tl.int64)
item = WORK + (own * n_work + program // SUBTILES) * 3
first = tl.load(item) % tl.cdiv(n_kv, UNIT_KV) * UNIT_KV + program % SUBTILES * TILE_N
lo, hi = tl.load(item + 1) * ROWS, tl.load(item + 2) * ROWS
if lo >= hi:
    return
PLACES += own * units * most
kv = first + tl.arange(0, TILE_N)
there = kv < n_kv
K += b.to(tl.int64) * k_stride_b + (group // GROUPS_PER_KEY).to(tl.int64) * k_stride_h
V += b.to(tl.int64) * v_stride_b + (group // GROUPS_PER_KEY).to(tl.int64) * v_stride_h
Q += b.to(tl.int64) * q_stride_b
factor = $FACTOR
"""

#: The rows of a tile: from the place of an entry to the query and the head.
ENTRIES = """\
number = at + tl.arange(0, TILE_M)
entry, row = place, number % ROWS
token, h = entry // most * UNIT_Q + row // MEMBERS, group * MEMBERS + row % MEMBERS
exist = (number < hi) & (token < n_q)
number += TILE_M
place = tl.load(PLACES + number // ROWS, mask=number < hi, other=0)
"""

#: Whether an item of work holds pairs that the mask hides.
PARTLY = """\
earliest = tl.load(PLACES + lo // ROWS) // most * UNIT_Q
latest = tl.load(PLACES + hi // ROWS - 1) // most * UNIT_Q + (UNIT_Q - 1)
latest, end = tl.minimum(latest, n_q - 1), first + TILE_N
must, may = verdict(
    earliest, latest, first, tl.minimum(end, n_kv) - 1, 0, 0, 0, 0, n_q, n_kv$SIZES
)
partly = tl.where(must, end > n_kv, True)
"""

BACKWARD_KEY_VALUE = '''\
$SIGNATURE
    """Add to GRAD_K and GRAD_V, fp32, what the queries that selected a unit of keys send it.

    One program handles some of the queries; tiles are transposed.
    """
    $START
    GRAD_OUT += b.to(tl.int64) * grad_out_stride_b
    LSE += b.to(tl.int64) * q_heads * n_q
    DELTA += b.to(tl.int64) * q_heads * n_q
    key = keys_of(K, kv, k_stride_n, there, HEAD_DIM, HEAD_PAD)
    value = keys_of(V, kv, v_stride_n, there, VALUE_DIM, VALUE_PAD)
    grad_k = tl.zeros([TILE_N, HEAD_PAD], tl.float32)
    grad_v = tl.zeros([TILE_N, VALUE_PAD], tl.float32)
    place_kv = kv
    $BEFORE
    $PARTLY
    ahead = lo + tl.arange(0, TILE_M)
    place = tl.load(PLACES + ahead // ROWS, mask=ahead < hi, other=0)
    for at in range(lo, hi, TILE_M):
        $ENTRIES
        query = rows_of(Q, h, token, q_stride_h, q_stride_n, exist, HEAD_DIM, HEAD_PAD)
        grad_out = rows_of(
            GRAD_OUT, h, token, grad_out_stride_h, grad_out_stride_n, exist, VALUE_DIM, VALUE_PAD
        )
        statistic = h.to(tl.int64) * n_q + token
        lse = tl.load(LSE + statistic, mask=exist, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        delta = tl.load(DELTA + statistic, mask=exist, other=0.0)
        score = tl.dot(key, query.T$PRECISION)
        $MASK
        weight = tl.exp2(score * factor - lse[None, :])
        grad_v = tl.dot(weight.to(grad_out.dtype), grad_out, grad_v$PRECISION)
        grad_weight = tl.dot(value, grad_out.T$PRECISION)
        grad_score = weight * (grad_weight - delta[None, :])
        $SLOPE
        grad_k = tl.dot(grad_score.to(query.dtype), query, grad_k$PRECISION)
    owner = ((b * kv_heads + group // GROUPS_PER_KEY).to(tl.int64) * n_kv + place_kv)[:, None]
    column, width = tl.arange(0, HEAD_PAD)[None, :], tl.arange(0, VALUE_PAD)[None, :]
    inside = there[:, None] & (column < HEAD_DIM)
    tl.atomic_add(GRAD_K + owner * HEAD_DIM + column, grad_k * scale, mask=inside)
    inside = there[:, None] & (width < VALUE_DIM)
    tl.atomic_add(GRAD_V + owner * VALUE_DIM + width, grad_v, mask=inside)
'''

FORWARD_BY_KEY = '''\
$SIGNATURE
    """What the queries that selected a unit of keys get from it, left apart for the kernel merge.

    The keys are loaded once for all of them. PART_OUT is [B, groups, units * most, ROWS, VALUE_DIM]
    with the groups from ``first_group`` on.
    """
    $START
    key = keys_of(K, kv, k_stride_n, there, HEAD_DIM, HEAD_PAD)
    value = keys_of(V, kv, v_stride_n, there, VALUE_DIM, VALUE_PAD)
    places = (b * groups + group - first_group).to(tl.int64) * units * most
    column = tl.arange(0, VALUE_PAD)[None, :]
    $BEFORE
    $PARTLY
    ahead = lo + tl.arange(0, TILE_M)
    place = tl.load(PLACES + ahead // ROWS, mask=ahead < hi, other=0)
    for at in range(lo, hi, TILE_M):
        $ENTRIES
        query = rows_of(Q, h, token, q_stride_h, q_stride_n, exist, HEAD_DIM, HEAD_PAD)
        score = tl.dot(query, key.T$PRECISION)
        $MASK
        peak = tl.max(score, 1) * factor
        reference = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp2(score * factor - reference[:, None])
        total = tl.sum(weight, 1)
        out = tl.dot(weight.to(value.dtype), value$PRECISION)
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN_2)
        here = (places + entry) * ROWS + row
        to = PART_OUT + here[:, None] * VALUE_DIM + column
        inside = exist[:, None] & (column < VALUE_DIM)
        out *= (1.0 / total)[:, None]
        tl.store(to, out.to(PART_OUT.dtype.element_ty), mask=inside)
        tl.store(PART_LSE + here, lse, mask=exist)
'''
