"""The backward kernel of queries: GRAD_Q, and what the other one needs of each query."""

KERNEL = '''\
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
    GRAD_Q += (b.to(tl.int64) * n_q * q_heads + h) * HEAD_DIM
    LOG_SUM = STATISTICS + place * rows
    DELTA = LOG_SUM + (batch * q_heads).to(tl.int64) * rows
    $K_BASE
    $V_BASE
    factor = $FACTOR
    $SECTIONS
'''

SECTION = """\
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
$STORE
"""

STEP = """\
key = $LOAD_K
score = tl.dot(query, key.T$PRECISION)
$SCORE
$MASK
weight = tl.exp2(score * factor - lse[:, None])
value = $LOAD_V
grad_weight = tl.dot(grad_out, value.T$PRECISION)
$DROP
grad_score = weight * (grad_weight - delta[:, None])
$LEARNED
$SLOPE
grad_q = tl.dot(grad_score.to(key.dtype), key, grad_q$PRECISION)
"""

START = """\
grad_q = tl.zeros([TILE_M, HEAD_PAD], tl.float32)
"""

CONTINUE = """\
# Add to what earlier sections found for these queries; merge_query does so for split lines.
exist = tl.where(slot < 0, n_q, 0)
grad_q = load_tile(GRAD_Q, first, row$WIDE, exist, q_heads * HEAD_DIM, HEAD_DIM, HEAD_PAD)
grad_q = grad_q.to(tl.float32) / scale
"""

#: Nothing is left for the end.
EARLIER = ""

STORE = """\
if slot < 0:
    store_tile(GRAD_Q, grad_q, first, row$WIDE, n_q, q_heads * HEAD_DIM, HEAD_DIM, HEAD_PAD)
else:
    store_part(PART_GRAD_Q, grad_q, slot, sub, h, b, q_heads, batch, SUBTILES)
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
