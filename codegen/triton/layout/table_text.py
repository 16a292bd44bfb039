"""Templates of the kernel that bounds table lookups over blocks and over spans of blocks."""

LOOKUP = '''\
@triton.jit
def read_$NAME($NAME, $HALF, n_q, n_kv, $PARAMETERS):
    """Least and greatest $TEXT of each block, and behind them of each span of blocks.

    The upper bounds begin ``$HALF`` entries after the lower ones.
    """
    run, row = tl.program_id(0), tl.program_id(1)
    n, blocks = n_$AXIS, blocks_of_$AXIS(n_$AXIS)
    runs, rows = tl.cdiv(blocks, SPAN), $ROWS
    if (run < runs) & (row < rows):
        $ENTRIES
        to = $NAME + row.to(tl.int64) * (blocks + runs)
        run_low, run_high = tl.full([], $MOST, $DTYPE), tl.full([], $LEAST, $DTYPE)
        for first in range(0, SPAN, $STEP):
            # Blocks that do not exist count as the last one, tokens as a neighbour that does.
            block = tl.minimum(run * SPAN + first + tl.arange(0, $STEP), blocks - 1)
            $BASE
            j = tl.minimum(tl.arange(0, $PADDED), $LAST)
            $OFFSET
            token = base[:, None] + offset[None, :]
            token = tl.where(token < n, token, tl.minimum(base, n - 1)[:, None])
            $PLACE
            entry = tl.load(entries + place.to(tl.int64) * $STRIDE).to($DTYPE)
            low, high = tl.min(entry, 1), tl.max(entry, 1)
            tl.store(to + block, low)
            tl.store(to + $HALF + block, high)
            run_low = tl.minimum(run_low, tl.min(low, 0))
            run_high = tl.maximum(run_high, tl.max(high, 0))
        tl.store(to + blocks + run, run_low)
        tl.store(to + $HALF + blocks + run, run_high)


'''

TABLES = '''\
$SIGNATURE
    """The bounds of the lookups along one coordinate, each by the programs of one ``which``."""
    which = tl.program_id(2)
    $CALLS


'''
