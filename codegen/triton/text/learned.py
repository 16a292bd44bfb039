"""The backward kernel of learned tensors: what each score gives to the numbers that it reads.

A program holds a tile of queries and writes to memory that no other one does, so results are the
same bits at each call; :mod:`sparse_compile.codegen.triton.blocks.learned` adds them up.
"""

KERNEL = '''\
$SIGNATURE
    """The gradients of what scores look up, before they are added up.

    $BUFFERS
    """
    $SHAPE
    sub, h, b = tl.program_id(0) % SUBTILES, tl.program_id(1), tl.program_id(2)
    number = tl.program_id(0) // SUBTILES
    Q = head(Q, b, h, q_stride_b, q_stride_h)
    GRAD_OUT = head(GRAD_OUT, b, h, grad_out_stride_b, grad_out_stride_h)
    place = (b * q_heads + h).to(tl.int64)
    LOG_SUM = STATISTICS + place * rows
    DELTA = LOG_SUM + (batch * q_heads).to(tl.int64) * rows
    lo, hi = 0, 2147483647
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
lse = tl.load(LOG_SUM + first + row, mask=first + row < n_q, other=float("inf"))
delta = tl.load(DELTA + first + row, mask=first + row < n_q, other=0.0)
q = (first + row)[:, None]
$START
$FIRST_BLOCK

$VIEWS

$EARLIER
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
"""

#: Of each lookup there is one of the following.
START = CONTINUE = EARLIER = ""

#: For a lookup that names no key: sums over the keys.
QUERIES_BEFORE = "sum_$N = tl.zeros([TILE_M], tl.float32)"
QUERIES = "sum_$N += tl.sum(grad_score * by_$N, 1)"
QUERIES_AFTER = """\
at = SUM_$N + place * n_q + first + row
there = first + row < n_q
tl.store(at, tl.load(at, mask=there, other=0.0) + sum_$N, mask=there)
"""

#: For one that names no query: sums over the queries of the tile.
KEYS = """\
at = SUM_$N + (place * tiles + tl.program_id(0)) * n_kv + kv
earlier = tl.load(at, mask=kv < n_kv, other=0.0)
tl.store(at, earlier + tl.sum(grad_score * by_$N, 0)[None, :], mask=kv < n_kv)
"""

#: For one that reads the distance: sums over the diagonals of the tile, added to those of others.
DISTANCES = """\
rolled = roll_rows(grad_score * by_$N)
column = tl.arange(0, TILE_N)
before = tl.arange(0, TILE_M)[:, None] + column[None, :] < TILE_N
at = SUM_$N + (place * tiles + tl.program_id(0)) * (n_kv + TILE_M + TILE_N) + kv0 + TILE_M + column
far = tl.sum(tl.where(before, 0.0, rolled), 0)
tl.store(at - TILE_N, tl.load(at - TILE_N) + far)
near = tl.sum(tl.where(before, rolled, 0.0), 0)
tl.store(at, tl.load(at) + near)
"""

#: For any other: one number for each pair. Another view may visit pairs that this one hides.
PAIRS = """\
at = SUM_$N + (place * n_q + q) * n_kv + kv
tl.store(at, grad_score * by_$N, mask=(q < n_q) & (kv < n_kv) & (weight != 0.0))
"""
