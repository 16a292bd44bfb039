"""The loops of a program over the blocks of one view: the same in every kernel."""

#: Before the tile is loaded, so that the numbers are there when its loads are under way.
LISTS = """\
blocks_$V, n_partial_$V, full_blocks_$V, n_full_$V = line(
    start_$V, counts_$V, index_$V, room_$V, lines_$V,
    (b % batches_$V) * heads_$V + h % heads_$V, number,
)
"""

#: After that, for the first view, whose blocks are visited at once.
FIRST_BLOCKS = """\
partial_$V = block_at(blocks_$V, tl.maximum(lo, 0), n_partial_$V)
full_$V = block_at(full_blocks_$V, tl.maximum(lo - n_partial_$V, 0), n_full_$V)
"""

VIEW = """\
# $TITLE
$BEFORE

# PARTIAL blocks: the mask decides entry by entry.
begin, end = tl.maximum(lo, 0), tl.minimum(hi, n_partial_$V)
$PARTIAL_BEGIN
for i in $PARTIAL_RANGE:
    $STEP
    $PARTIAL_NEXT
    $PARTIAL_BODY
lo, hi = lo - n_partial_$V, hi - n_partial_$V

# FULL blocks: no mask, no bounds.
begin, end = tl.maximum(lo, 0), tl.minimum(hi, n_full_$V)
$FULL_BEGIN
for i in range(begin * STEPS, end * STEPS):
    $STEP
    $FULL_NEXT
    $FULL_BODY
lo, hi = lo - n_full_$V, hi - n_full_$V
"""
