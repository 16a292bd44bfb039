"""The loop of a program over the blocks of one view: the same in every kernel."""

#: Before the tile is loaded, so that the numbers are there when its loads are under way.
LISTS = """\
blocks_$V, n_partial_$V, n_blocks_$V = line(
    start_$V$OWN, counts_$V, index_$V, room_$V, lines_$V,
    (b % batches_$V) * heads_$V + h % heads_$V, number,
)
"""

#: After that, for the first view, whose blocks are visited at once.
FIRST_BLOCK = """\
first_block_$V = block_at(blocks_$V, tl.maximum(lo, 0), n_blocks_$V)
"""

# One loop, so that its pipeline fills once; whether a block is FULL is the same for all threads.
VIEW = """\
# $TITLE
$BEFORE

# PARTIAL blocks, where the mask decides entry by entry; then FULL ones.
begin, end = tl.maximum(lo, 0), tl.minimum(hi, n_blocks_$V)
$BEGIN
for i in range(begin * STEPS, end * STEPS):
    $WHERE
    $NEXT
    $STEP
lo, hi = lo - n_blocks_$V, hi - n_blocks_$V
"""
