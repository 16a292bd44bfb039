"""Kernels that put together the parts of split lines."""

FORWARD = '''\
$SIGNATURE
    """Merge the parts of split lines by their log-sum-exps.

    merges is int32 [split lines, 3]: line, first slot, number of parts.
    """
    $SHAPE
    sub, h, b = tl.program_id(0) % SUBTILES, tl.program_id(1), tl.program_id(2)
    heads, batch = tl.num_programs(1), tl.num_programs(2)
    merge = merges + tl.program_id(0) // SUBTILES * 3
    number, slot, parts = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    $ROWS
    OUT = head(OUT, b, h, out_stride_b, out_stride_h)
    LSE += (b * heads + h).to(tl.int64) * n_q
    row = row.to(tl.int64)
    lse = tl.full([TILE], float("-inf"), tl.float32)
    out = tl.zeros([TILE, VALUE_PAD], tl.float32)
    if SECTION > 0:
        lse = tl.load(LSE + first + row, mask=first + row < n_q, other=float("-inf"))
        out = load_tile(OUT, first, row, n_q, out_stride_n, VALUE_DIM, VALUE_PAD)
        out = out.to(tl.float32)
    for part in range(0, parts):
        more_lse = load_part(PART_LSE, slot + part, sub, h, b, heads, batch, TILE, 1, SUBTILES)
        more = load_part(PART_OUT, slot + part, sub, h, b, heads, batch, TILE, VALUE_PAD, SUBTILES)
        out, lse = combine(out, lse, more, tl.reshape(more_lse, [TILE]))
    tl.store(LSE + first + row, lse, mask=first + row < n_q)
    store_tile(OUT, out, first, row, n_q, out_stride_n, VALUE_DIM, VALUE_PAD)
'''

SUM = '''\
$SIGNATURE
    """Add up the parts of split lines; GRAD is [B, heads, n_$AXIS, DIM]."""
    $SHAPE
    sub, h, b = tl.program_id(0) % SUBTILES, tl.program_id(1), tl.program_id(2)
    heads, batch = tl.num_programs(1), tl.num_programs(2)
    merge = merges + tl.program_id(0) // SUBTILES * 3
    number, slot, parts = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    $ROWS
    row = row.to(tl.int64)
    GRAD += (b * heads + h).to(tl.int64) * n_$AXIS * DIM
    total = tl.zeros([TILE, PAD], tl.float32)
    if SECTION > 0:
        total += load_tile(GRAD, first, row, n_$AXIS, DIM, DIM, PAD).to(tl.float32)
    for part in range(0, parts):
        total += load_part(PART, slot + part, sub, h, b, heads, batch, TILE, PAD, SUBTILES)
    store_tile(GRAD, total, first, row, n_$AXIS, DIM, DIM, PAD)
'''
