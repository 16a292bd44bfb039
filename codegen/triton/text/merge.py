"""Kernels that put together what others left in parts: of split lines, of learned tensors."""

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
    """Add up the parts of split lines; GRAD is [B, n_$AXIS, heads, DIM]."""
    $SHAPE
    sub, h, b = tl.program_id(0) % SUBTILES, tl.program_id(1), tl.program_id(2)
    heads, batch = tl.num_programs(1), tl.num_programs(2)
    merge = merges + tl.program_id(0) // SUBTILES * 3
    number, slot, parts = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    $ROWS
    row = row.to(tl.int64)
    GRAD += (b.to(tl.int64) * n_$AXIS * heads + h) * DIM
    total = tl.zeros([TILE, PAD], tl.float32)
    if SECTION > 0:
        total += load_tile(GRAD, first, row, n_$AXIS, heads * DIM, DIM, PAD).to(tl.float32)
    for part in range(0, parts):
        total += load_part(PART, slot + part, sub, h, b, heads, batch, TILE, PAD, SUBTILES)
    store_tile(GRAD, total, first, row, n_$AXIS, heads * DIM, DIM, PAD)
'''

LEARNED = '''\
$SIGNATURE
    """Add up what backward_learned left of a lookup, each time in the same order.

    SUM is [B, Hq, tiles, width] or alike. Along each of the first three axes kept_* groups of
    added_* neighbours stand, which are added up; groups that all belong to one number are told as
    one. ENDS: behind the n_x numbers of a row stand what belongs to the first of them, and to the
    last.
    """
    block, kept = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h, r = kept // kept_r // kept_h, kept // kept_r % kept_h, kept % kept_r
    x = (block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n_added, ROWS):
        added = (first + tl.arange(0, ROWS))[:, None]
        row_b = b * added_b + added // added_r // added_h
        row_h = h * added_h + added // added_r % added_h
        row = (row_b * kept_h * added_h + row_h) * kept_r * added_r
        row += r * added_r + added % added_r
        at = SUM + row.to(tl.int64) * width
        total += tl.load(at + x, mask=(added < n_added) & (x < n_x), other=0.0)
        if ENDS:
            total += tl.load(at + n_x + x * 0, mask=(added < n_added) & (x == 0), other=0.0)
            last = (added < n_added) & (x == n_x - 1)
            total += tl.load(at + n_x + 1 + x * 0, mask=last, other=0.0)
    place = b.to(tl.int64) * step_b + h.to(tl.int64) * step_h + r.to(tl.int64) * step_r + step_0
    place += x.to(tl.int64) * step_x
    tl.store(GRAD + place, tl.sum(total, 0)[None, :].to(GRAD.dtype.element_ty), mask=x < n_x)
'''
