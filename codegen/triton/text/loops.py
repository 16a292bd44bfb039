"""The loops of a program over the blocks of one view: the same in every kernel."""

VIEW = """\
# $TITLE
member = (b % batches_$V) * heads_$V + h % heads_$V
blocks, n_partial, full_blocks, n_full = line(
    start_$V, counts_$V, index_$V, room_$V, lines_$V, member, number
)
$BEFORE

# PARTIAL blocks: the mask decides entry by entry.
begin, end = tl.maximum(lo, 0), tl.minimum(hi, n_partial)
$PARTIAL_BEGIN
for i in $PARTIAL_RANGE:
    $STEP
    $PARTIAL_NEXT
    $PARTIAL_BODY
lo, hi = lo - n_partial, hi - n_partial

# FULL blocks: no mask, no bounds.
begin, end = tl.maximum(lo, 0), tl.minimum(hi, n_full)
$FULL_BEGIN
for i in range(begin * STEPS, end * STEPS):
    $STEP
    $FULL_NEXT
    $FULL_BODY
lo, hi = lo - n_full, hi - n_full
"""
