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

#: For one that reads the distance: sums over the diagonals of the tile. What belongs before the
#: first place of a distance is added up apart, and so is what belongs behind the last.
DISTANCES_BEFORE = """\
early_$N, late_$N = tl.zeros([TILE_N], tl.float32), tl.zeros([TILE_N], tl.float32)
"""
DISTANCES = """\
rolled = roll_rows(grad_score * by_$N)
column = tl.arange(0, TILE_N)
before = tl.arange(0, TILE_M)[:, None] + column[None, :] < TILE_N
row_of = SUM_$N + (place * tiles + tl.program_id(0)) * (places_$N + 2)
at = kv0 - first + offset_$N + column
for half in tl.static_range(2):
    sums = tl.sum(tl.where(before == (half == 1), rolled, 0.0), 0)
    there = at + (half - 1) * TILE_N
    inside = (there >= 0) & (there < places_$N)
    tl.store(row_of + there, tl.load(row_of + there, mask=inside, other=0.0) + sums, mask=inside)
    early_$N += tl.where(there < 0, sums, 0.0)
    late_$N += tl.where(there >= places_$N, sums, 0.0)
"""
DISTANCES_AFTER = """\
row_of = SUM_$N + (place * tiles + tl.program_id(0)) * (places_$N + 2) + places_$N
tl.store(row_of, tl.load(row_of) + tl.sum(early_$N, 0))
tl.store(row_of + 1, tl.load(row_of + 1) + tl.sum(late_$N, 0))
"""

#: For any other: one number for each pair. Another view may visit pairs that this one hides.
PAIRS = """\
at = SUM_$N + (place * n_q + q) * n_kv + kv
tl.store(at, grad_score * by_$N, mask=(q < n_q) & (kv < n_kv) & (weight != 0.0))
"""
