"""The forward kernel: one program computes one tile of queries, or a part of a split one."""

KERNEL = '''\
$SIGNATURE
    """OUT = softmax(scale * Q K^T where mask) V, and its natural log-sum-exp."""
    $SHAPE
    number, lo, hi, slot, sub, h, b = work(items, n_items, heavy, q_heads, batch, SUBTILES)
    Q = head(Q, b, h, q_stride_b, q_stride_h)
    OUT = head(OUT, b, h, out_stride_b, out_stride_h)
    LSE += (b * q_heads + h).to(tl.int64) * n_q
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
q = (first + row)[:, None]
$START
$FIRST_BLOCK

$VIEWS

# A query without any key: 0, and -inf.
empty = total == 0.0
total = tl.where(empty, 1.0, total)
lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN_2)
out = out / total[:, None]
if slot < 0:
    tl.store(LSE + first + row, lse, mask=first + row < n_q)
    store_tile(OUT, out, first, row$WIDE, n_q, out_stride_n, VALUE_DIM, VALUE_PAD)
else:
    store_part(PART_OUT, out, slot, sub, h, b, q_heads, batch, SUBTILES)
    store_part(PART_LSE, lse[:, None], slot, sub, h, b, q_heads, batch, SUBTILES)

"""

STEP = """\
key = $LOAD_K
score = tl.dot(query, key.T$PRECISION)
$SCORE
$MASK
weight, shrink, peak, total = softmax_step(score, peak, total, factor)
$DROP
value = $LOAD_V
out = tl.dot(weight.to(value.dtype), value, out * shrink[:, None]$PRECISION)
"""

START = """\
peak = tl.full([TILE_M], float("-inf"), tl.float32)
total = tl.zeros([TILE_M], tl.float32)
out = tl.zeros([TILE_M, VALUE_PAD], tl.float32)
"""

CONTINUE = """\
# Go on from what earlier sections found for these queries; merge_forward does so for split lines.
exist = tl.where(slot < 0, n_q, 0)
peak = tl.load(LSE + first + row, mask=first + row < exist, other=float("-inf")) * LOG2_E
total = tl.where(peak == float("-inf"), 0.0, 1.0)
out = load_tile(OUT, first, row$WIDE, exist, out_stride_n, VALUE_DIM, VALUE_PAD)
out = out.to(tl.float32)
"""

#: Nothing is left for the end.
EARLIER = STORE = ""
