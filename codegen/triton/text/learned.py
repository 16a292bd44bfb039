"""The backward kernel of queries where learned tensors want gradients as well.

It is :mod:`sparse_compile.codegen.triton.text.query`, and leaves what each score gives to the
numbers that it reads. A program holds a tile of queries, goes through all of their keys, and writes
to memory that no other one does, so results are the same bits at each call;
:mod:`sparse_compile.codegen.triton.blocks.gradients` adds them up.
"""

from sparse_compile.codegen.triton.text import query

KERNEL = '''\
$SIGNATURE
    """GRAD_Q and STATISTICS as backward_query; the gradients of what scores look up, in parts.

    $BUFFERS
    """
    $SHAPE
    sub, h, b = tl.program_id(0) % SUBTILES, tl.program_id(1), tl.program_id(2)
    number = tl.program_id(0) // SUBTILES
    Q = head(Q, b, h, q_stride_b, q_stride_h)
    GRAD_OUT = head(GRAD_OUT, b, h, grad_out_stride_b, grad_out_stride_h)
    place = (b * q_heads + h).to(tl.int64)
    OUT = head(OUT, b, h, out_stride_b, out_stride_h)
    LSE += place * n_q
    GRAD_LSE += place * n_q
    GRAD_Q += (b.to(tl.int64) * n_q * q_heads + h) * HEAD_DIM
    LOG_SUM = STATISTICS + place * rows
    DELTA = LOG_SUM + (batch * q_heads).to(tl.int64) * rows
    lo, hi = 0, 2147483647
    $K_BASE
    $V_BASE
    factor = $FACTOR
    $SECTIONS
'''

SECTION, STEP, START = query.SECTION, query.STEP, query.START
EARLIER = query.EARLIER

CONTINUE = """\
# Add to what earlier sections found for these queries.
grad_q = load_tile(GRAD_Q, first, row$WIDE, n_q, q_heads * HEAD_DIM, HEAD_DIM, HEAD_PAD)
grad_q = grad_q.to(tl.float32) / scale
"""

STORE = """\
store_tile(GRAD_Q, grad_q, first, row$WIDE, n_q, q_heads * HEAD_DIM, HEAD_DIM, HEAD_PAD)
"""

#: Of each lookup there is one of the following. For one that names no key: sums over the keys.
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

#: For one whose index is a key and what no pair changes: the same, by the places of its numbers.
APART_BEFORE = """\
early_$N, late_$N = tl.zeros([1, TILE_N], tl.float32), tl.zeros([1, TILE_N], tl.float32)
"""
APART = """\
sums = tl.sum(grad_score * by_$N, 0)[None, :]
row_of = SUM_$N + (place * tiles + tl.program_id(0)) * (places_$N + 2)
there = kv + apart_$N
inside = (there >= 0) & (there < places_$N) & (kv < n_kv)
tl.store(row_of + there, tl.load(row_of + there, mask=inside, other=0.0) + sums, mask=inside)
early_$N += tl.where(there < 0, sums, 0.0)
late_$N += tl.where((there >= places_$N) & (kv < n_kv), sums, 0.0)
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
PLACES_AFTER = """\
row_of = SUM_$N + (place * tiles + tl.program_id(0)) * (places_$N + 2) + places_$N
tl.store(row_of, tl.load(row_of) + tl.sum(early_$N))
tl.store(row_of + 1, tl.load(row_of + 1) + tl.sum(late_$N))
"""

#: For any other: one number for each pair. Another view may visit pairs that this one hides.
PAIRS = """\
at = SUM_$N + (place * n_q + q) * n_kv + kv
tl.store(at, grad_score * by_$N, mask=(q < n_q) & (kv < n_kv) & (weight != 0.0))
"""
