"""The role of a warpgroup that multiplies: steps, and what becomes of their result."""

MULTIPLY = '''\
@gluon.jit
def step(
    query, keys, values, key_full, value_full, pair_empty, ring, state, scale,
    first, kv0, b, h, sizes, PARTIAL: gl.constexpr,
):
    """One block: its scores, and the output of the block before.

    Both products are started; the output shrinks under the first, and the exponentials are computed
    under the second.
    """
    stage, phase, earlier_stage, earlier_phase = ring
    peak, total, out, weights, shrink = state
    none = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    mbarrier.wait(key_full.index(stage), phase)
    key = keys.index(stage).reshape([KEYS, HEAD_DIM])
    score = warpgroup_mma(query, key.permute([1, 0]), none, use_acc=False, is_async=True)
    out = shrunk(out, shrink)
    mbarrier.wait(value_full.index(earlier_stage), earlier_phase)
    value = values.index(earlier_stage).reshape([KEYS, VALUE_DIM])
    operand = unpacked(weights, query.dtype)
    out = warpgroup_mma(operand, value, out, is_async=True)
    score = warpgroup_mma_wait(1, deps=[score])
    if PARTIAL:
        score = masked(score, first, kv0, b, h, sizes)
    weight, shrink, peak, total = softmax_step(score, peak, total, scale, PARTIAL)
    total = gl.inline_asm_elementwise(
        PIN, "=f,=f,=f,=f,f,f,f,f", [total], dtype=gl.float32, is_pure=False, pack=4
    )
    out, _ = warpgroup_mma_wait(0, deps=[out, operand])
    release(pair_empty.index(stage))
    return peak, total, out, packed(weight), shrink


@gluon.jit
def leave_part(parts, left, out, lse):
    """Leave the part of a split line in its place, as the kernels beside this one do.

    merge_forward collects them.
    """
    PART_OUT, PART_LSE = parts
    gl.store(PART_LSE + left * ROWS + gl.arange(0, ROWS, OF_SCORES), lse)
    row = gl.arange(0, ROWS, OF_OUTPUT)[:, None]
    column = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, OUTPUT))[None, :]
    gl.store(PART_OUT + left * (ROWS * VALUE_DIM) + row * VALUE_DIM + column, out)


@gluon.jit
def multiply(given, NUMBER: gl.constexpr):
    """A warpgroup that multiplies: 64 queries of each of the program's tiles."""
    OUT_TILES, results, LSE, parts, shared, barriers, worklist, lists, sizes, scale = given
    queries, keys, values, notes = shared
    query_full, query_empty, key_full, value_full, pair_empty, note_full = barriers
    items, n_items, q_heads, batch = worklist
    start, counts, index, room, lines, batches, heads = lists
    n_q = sizes[0]
    query = queries.index(NUMBER).reshape([ROWS, HEAD_DIM])
    result = results.index(NUMBER)
    stage = 0
    phase = 0
    query_phase = 0
    place = 0
    note_phase = 0
    mbarrier.wait(note_full.index(0), 0)
    member = noted(notes, 0, MEMBER)
    while member >= 0:
        # All of the note now: the next but one takes its place.
        line = noted(notes, place, LINE)
        slot = noted(notes, place, SLOT)
        lo = noted(notes, place, LO)
        mid = noted(notes, place, MID)
        hi = noted(notes, place, HI)
        h = member % q_heads
        b = member // q_heads
        of = ((b % batches) * heads + h % heads).to(gl.int64)
        blocks = index + of * room + noted(notes, place, FIRST)
        first = line * (GROUPS * ROWS) + NUMBER * ROWS
        peak = gl.full([ROWS], NOTHING, gl.float32, OF_SCORES)
        total = gl.zeros([ROWS, 8], gl.float32, SUMS)
        out = gl.zeros([ROWS, VALUE_DIM], gl.float32, OUTPUT)
        mbarrier.wait(query_full, query_phase)
        query_phase ^= 1
        if hi > lo:
            mbarrier.wait(key_full.index(stage), phase)
            key = keys.index(stage).reshape([KEYS, HEAD_DIM])
            none = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
            score = warpgroup_mma(query, key.permute([1, 0]), none, use_acc=False, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            release(pair_empty.index(stage))
            if mid > lo:
                score = masked(score, first, gl.load(blocks + lo) * KEYS, b, h, sizes)
            weight, shrink, peak, total = softmax_step(score, peak, total, scale, True)
            weights = packed(weight)
            earlier_stage = stage
            earlier_phase = phase
            stage, phase = following(stage, phase)
            for at in range(lo + 1, mid):
                kv0 = gl.load(blocks + at) * KEYS
                peak, total, out, weights, shrink = step(
                    query, keys, values, key_full, value_full, pair_empty,
                    (stage, phase, earlier_stage, earlier_phase),
                    (peak, total, out, weights, shrink), scale, first, kv0, b, h, sizes, True,
                )
                earlier_stage = stage
                earlier_phase = phase
                stage, phase = following(stage, phase)
            for at in range(gl.maximum(mid, lo + 1), hi):
                peak, total, out, weights, shrink = step(
                    query, keys, values, key_full, value_full, pair_empty,
                    (stage, phase, earlier_stage, earlier_phase),
                    (peak, total, out, weights, shrink), scale, first, 0, b, h, sizes, False,
                )
                earlier_stage = stage
                earlier_phase = phase
                stage, phase = following(stage, phase)
            release(query_empty)
            out = shrunk(out, shrink)
            mbarrier.wait(value_full.index(earlier_stage), earlier_phase)
            value = values.index(earlier_stage).reshape([KEYS, VALUE_DIM])
            operand = unpacked(weights, query.dtype)
            out = warpgroup_mma(operand, value, out, is_async=True)
            out, _ = warpgroup_mma_wait(0, deps=[out, operand])
        else:
            release(query_empty)
        # A query without any key: 0, and -inf.
        whole = gl.convert_layout(gl.sum(total, 1), OF_SCORES)
        out = shrunk(out, gl.where(peak == NOTHING, 0.0, 1.0 / whole))
        lse = (peak * scale + gl.log2(whole)) * LN_2
        row = gl.arange(0, ROWS, OF_SCORES)
        if slot < 0:
            # The copy of the tile before has left shared memory.
            tma.store_wait(0)
            gl.$BARRIER()
            result.reshape([ROWS, VALUE_DIM]).store(out.to(query.dtype))
            fence_async_shared()
            gl.$BARRIER()
            if first < n_q:
                tma.$TILE_STORE(OUT_TILES, [b, h, first, 0], result)
            at = LSE + member.to(gl.int64) * n_q + first
            gl.store(at + row, lse, mask=first + row < n_q)
        else:
            left = ((slot.to(gl.int64) * GROUPS + NUMBER) * batch + b) * q_heads + h
            leave_part(parts, left, out, lse)
        place ^= 1
        note_phase ^= place ^ 1
        mbarrier.wait(note_full.index(place), note_phase)
        member = noted(notes, place, MEMBER)
    tma.store_wait(0)
'''
