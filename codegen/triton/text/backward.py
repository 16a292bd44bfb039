"""The backward kernels: GRAD_Q by queries, GRAD_K and GRAD_V by keys."""

QUERY = '''\
$SIGNATURE
    """GRAD_Q; and for each query, what backward_key_value needs of it.

    STATISTICS is [2, B, Hq, rows], rows at least n_q: the log-sum-exp in base 2 (+inf where there
    is nothing to weigh), and delta = sum(OUT * GRAD_OUT) - GRAD_LSE.
    """
    $SHAPE
    number, lo, hi, slot, sub, h, b = work(items, n_items, heavy, q_heads, batch, SUBTILES)
    Q = head(Q, b, h, q_stride_b, q_stride_h)
    GRAD_OUT = head(GRAD_OUT, b, h, grad_out_stride_b, grad_out_stride_h)
    place = (b * q_heads + h).to(tl.int64)
    OUT = head(OUT, b, h, out_stride_b, out_stride_h)
    LSE += place * n_q
    GRAD_LSE += place * n_q
    GRAD_Q += place * n_q * HEAD_DIM
    LOG_SUM = STATISTICS + place * rows
    DELTA = LOG_SUM + (batch * q_heads).to(tl.int64) * rows
    $K_BASE
    $V_BASE
    factor = $FACTOR
    $SECTIONS
'''

QUERY_SECTION = """\
# $TITLE
$LISTS
first = $FIRST
row = $ROW
query = load_tile(Q, first, row$WIDE, n_q, q_stride_n, HEAD_DIM, HEAD_PAD)
grad_out = load_tile(
    GRAD_OUT, first, row$WIDE, n_q, grad_out_stride_n, VALUE_DIM, VALUE_PAD
)
$LOAD_STATISTICS
q = (first + row)[:, None]
$START
$FIRST_BLOCK
$STATISTICS

$VIEWS

grad_q *= scale
if slot < 0:
    store_tile(GRAD_Q, grad_q, first, row$WIDE, n_q, HEAD_DIM, HEAD_DIM, HEAD_PAD)
else:
    store_part(PART_GRAD_Q, grad_q, slot, sub, h, b, q_heads, batch, SUBTILES)
"""

QUERY_STEP = """\
key = $LOAD_K
score = tl.dot(query, key.T$PRECISION)
$SCORE
$MASK
weight = tl.exp2(score * factor - lse[:, None])
value = $LOAD_V
grad_weight = tl.dot(grad_out, value.T$PRECISION)
grad_score = weight * (grad_weight - delta[:, None])
$SLOPE
grad_q = tl.dot(grad_score.to(key.dtype), key, grad_q$PRECISION)
"""

KEY_VALUE = '''\
$SIGNATURE
    """GRAD_K and GRAD_V, summed over the query heads that share them.

    Lines are blocks of keys, and tiles are transposed.
    """
    $SHAPE
    number, lo, hi, slot, sub, kv_head, b = work(items, n_items, heavy, kv_heads, batch, SUBTILES)
    K = head(K, b, kv_head, k_stride_b, k_stride_h)
    V = head(V, b, kv_head, v_stride_b, v_stride_h)
    place = (b * kv_heads + kv_head).to(tl.int64) * n_kv
    GRAD_K += place * HEAD_DIM
    GRAD_V += place * VALUE_DIM
    factor = $FACTOR
    $SECTIONS
'''

KEY_VALUE_SECTION = """\
# $TITLE
h = kv_head * GROUP
$LISTS
first = $FIRST
row = $ROW
key = load_tile(K, first, row$WIDE, n_kv, k_stride_n, HEAD_DIM, HEAD_PAD)
value = load_tile(V, first, row$WIDE, n_kv, v_stride_n, VALUE_DIM, VALUE_PAD)
kv = (first + row)[:, None]
$START
$FIRST_BLOCK
part_lo, part_hi = lo, hi
for shared in range(0, GROUP):
    lo, hi = part_lo, part_hi
    $Q_BASE
    $GRAD_OUT_BASE
    $LSE_BASE
    $DELTA_BASE

    $VIEWS

    if GROUP > 1:
        h += 1
        lo, hi = part_lo, part_hi
        $LISTS
        $FIRST_BLOCK

grad_k *= scale
if slot < 0:
    $EARLIER
    store_tile(GRAD_K, grad_k, first, row$WIDE, n_kv, HEAD_DIM, HEAD_DIM, HEAD_PAD)
    store_tile(GRAD_V, grad_v, first, row$WIDE, n_kv, VALUE_DIM, VALUE_DIM, VALUE_PAD)
else:
    store_part(PART_GRAD_K, grad_k, slot, sub, kv_head, b, kv_heads, batch, SUBTILES)
    store_part(PART_GRAD_V, grad_v, slot, sub, kv_head, b, kv_heads, batch, SUBTILES)
"""

KEY_VALUE_STEP = """\
query = $LOAD_Q
lse = $LOAD_LSE
score = tl.dot(key, query.T$PRECISION)
$SCORE
$MASK
weight = tl.exp2(score * factor - lse[None, :])
grad_out = $LOAD_GRAD_OUT
grad_v = tl.dot(weight.to(grad_out.dtype), grad_out, grad_v$PRECISION)
delta = $LOAD_DELTA
grad_weight = tl.dot(value, grad_out.T$PRECISION)
grad_score = weight * (grad_weight - delta[None, :])
$SLOPE
grad_k = tl.dot(grad_score.to(query.dtype), query, grad_k$PRECISION)
"""

QUERY_START = """\
grad_q = tl.zeros([TILE_M, HEAD_PAD], tl.float32)
"""

QUERY_CONTINUE = """\
# Add to what earlier sections found for these queries; merge_query does so for split lines.
exist = tl.where(slot < 0, n_q, 0)
grad_q = load_tile(GRAD_Q, first, row$WIDE, exist, HEAD_DIM, HEAD_DIM, HEAD_PAD)
grad_q = grad_q.to(tl.float32) / scale
"""

KEY_VALUE_START = """\
grad_k = tl.zeros([TILE_N, HEAD_PAD], tl.float32)
grad_v = tl.zeros([TILE_N, VALUE_PAD], tl.float32)
"""

#: At the end: to start from these would keep too much in registers.
KEY_VALUE_EARLIER = """\
# What earlier sections found for these keys.
earlier = load_tile(GRAD_K, first, row$WIDE, n_kv, HEAD_DIM, HEAD_DIM, HEAD_PAD)
grad_k += earlier.to(tl.float32)
earlier = load_tile(GRAD_V, first, row$WIDE, n_kv, VALUE_DIM, VALUE_DIM, VALUE_PAD)
grad_v += earlier.to(tl.float32)
"""

LOAD_STATISTICS = """\
out = load_tile(OUT, first, row$WIDE, n_q, out_stride_n, VALUE_DIM, VALUE_PAD)
lse = tl.load(LSE + first + row, mask=first + row < n_q, other=float("-inf"))
if HAS_GRAD_LSE:
    grad_lse = tl.load(GRAD_LSE + first + row, mask=first + row < n_q, other=0.0)
"""

STATISTICS = """\
delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
if HAS_GRAD_LSE:
    delta -= grad_lse
empty = lse == float("-inf")
delta = tl.where(empty, 0.0, delta)
lse = tl.where(empty, float("inf"), lse * LOG2_E)
tl.store(LOG_SUM + first + row, lse, mask=first + row < rows)
tl.store(DELTA + first + row, delta, mask=first + row < rows)
"""

LOAD_KNOWN = """\
# As an earlier section left them.
lse = tl.load(LOG_SUM + first + row, mask=first + row < n_q, other=float("inf"))
delta = tl.load(DELTA + first + row, mask=first + row < n_q, other=0.0)
"""
