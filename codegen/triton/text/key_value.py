"""The backward kernel of keys: GRAD_K and GRAD_V."""

KERNEL = '''\
$SIGNATURE
    """GRAD_K and GRAD_V, summed over the query heads that share them.

    Lines are blocks of keys, and tiles are transposed.
    """
    $SHAPE
    number, lo, hi, slot, sub, kv_head, b = work(items, n_items, heavy, kv_heads, batch, SUBTILES)
    K = head(K, b, kv_head, k_stride_b, k_stride_h)
    V = head(V, b, kv_head, v_stride_b, v_stride_h)
    place = b.to(tl.int64) * n_kv * kv_heads + kv_head
    GRAD_K += place * HEAD_DIM
    GRAD_V += place * VALUE_DIM
    k_row, v_row = kv_heads * HEAD_DIM, kv_heads * VALUE_DIM  # rows of all heads
    factor = $FACTOR
    $SECTIONS
'''

SECTION = """\
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
    store_tile(GRAD_K, grad_k, first, row$WIDE, n_kv, k_row, HEAD_DIM, HEAD_PAD)
    store_tile(GRAD_V, grad_v, first, row$WIDE, n_kv, v_row, VALUE_DIM, VALUE_PAD)
else:
    store_part(PART_GRAD_K, grad_k, slot, sub, kv_head, b, kv_heads, batch, SUBTILES)
    store_part(PART_GRAD_V, grad_v, slot, sub, kv_head, b, kv_heads, batch, SUBTILES)
"""

STEP = """\
query = $LOAD_Q
lse = $LOAD_LSE
score = tl.dot(key, query.T$PRECISION)
$SCORE
$MASK
weight = tl.exp2(score * factor - lse[None, :])
$DROP
grad_out = $LOAD_GRAD_OUT
grad_v = tl.dot($KEPT.to(grad_out.dtype), grad_out, grad_v$PRECISION)
delta = $LOAD_DELTA
grad_weight = tl.dot(value, grad_out.T$PRECISION)
$DROP_GRAD
grad_score = weight * (grad_weight - delta[None, :])
$SLOPE
grad_k = tl.dot(grad_score.to(query.dtype), query, grad_k$PRECISION)
"""

START = """\
grad_k = tl.zeros([TILE_N, HEAD_PAD], tl.float32)
grad_v = tl.zeros([TILE_N, VALUE_PAD], tl.float32)
"""

#: What earlier sections found is added at the end.
CONTINUE = START

#: At the end: to start from these would keep too much in registers.
EARLIER = """\
# What earlier sections found for these keys.
earlier = load_tile(GRAD_K, first, row$WIDE, n_kv, k_row, HEAD_DIM, HEAD_PAD)
grad_k += earlier.to(tl.float32)
earlier = load_tile(GRAD_V, first, row$WIDE, n_kv, v_row, VALUE_DIM, VALUE_PAD)
grad_v += earlier.to(tl.float32)
"""

#: The end is the same for all.
STORE = ""
