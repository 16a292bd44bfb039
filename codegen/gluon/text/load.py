"""The role of the warp that loads, and how work is handed out."""

LOAD = '''\
@gluon.jit
def work_of(number, items, n_items, q_heads, batch):
    """The item and the member (b * q_heads + h) with a number.

    Items are sorted, those with most to do first, and each is handed out for all members before the
    next one, so that neighbours in number have as much to do. There are sections of members, since
    what they read together should stay in the cache.
    """
    members = q_heads * batch
    section = number // (n_items * SECTION)
    inside = number - section * (n_items * SECTION)
    size = gl.minimum(SECTION, members - section * SECTION)
    return items + inside // size * 4, section * SECTION + inside % size


@gluon.jit
def note(notes, place, field: gl.constexpr, value):
    """Write a number of the note for a tile."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    notes.index(place * FIELDS + field).store(gl.full([1], value, gl.int32, one))


@gluon.jit
def noted(notes, place, field: gl.constexpr):
    """Read one."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(notes.index(place * FIELDS + field).load(one), 0)


@gluon.jit
def load(tiles, shared, barriers, worklist, lists, sizes, GROUP: gl.constexpr):
    """The warp that loads: for each of the program's tiles a note, queries, and all blocks.

    Order of copies: K0, K1, V0, K2, V1, ... A stage is free again when both K of a step and the V
    that runs with it have been read, which one barrier says.
    """
    Q_TILES, K_TILES, V_TILES = tiles
    queries, keys, values, notes = shared
    query_full, query_empty, key_full, value_full, pair_empty, note_full = barriers
    items, n_items, q_heads, batch = worklist
    start, counts, index, room, lines, batches, heads = lists
    # Who has the first of a round has the last of the next one: all get as much to do.
    programs = gl.num_programs(0)
    number = gl.program_id(0)
    mirrored = 2 * (programs - number) - 1
    place = 0
    stage = 0
    phase = 1
    query_phase = 1
    while number < n_items * q_heads * batch:
        item, member = work_of(number, items, n_items, q_heads, batch)
        line = gl.load(item)
        h = member % q_heads
        b = member // q_heads
        of = ((b % batches) * heads + h % heads).to(gl.int64)
        count = counts + (of * lines + line) * 2
        n_partial = gl.load(count)
        n_blocks = n_partial + gl.load(count + 1)
        first = gl.load(start + line)
        lo = gl.maximum(gl.load(item + 1), 0)
        hi = gl.minimum(gl.load(item + 2), n_blocks)
        mid = gl.minimum(n_partial, hi)
        note(notes, place, LINE, line)
        note(notes, place, SLOT, gl.load(item + 3))
        note(notes, place, FIRST, first)
        note(notes, place, LO, lo)
        note(notes, place, MID, mid)
        note(notes, place, HI, hi)
        note(notes, place, MEMBER, member)
        mbarrier.arrive(note_full.index(place), count=1)
        place ^= 1
        mbarrier.wait(query_empty, query_phase)
        query_phase ^= 1
        mbarrier.expect(query_full, Q_TILES.block_type.nbytes * GROUPS)
        for group in gl.static_range(GROUPS):
            row = line * (GROUPS * ROWS) + group * ROWS
            part = queries.index(group)
            tma.$TILE_LOAD(Q_TILES, [b, h, row, 0], query_full, part)
        blocks = index + of * room + first
        key_head = h // GROUP
        # Not the stage itself: of two names of one value a loop would carry only one.
        earlier = 0
        earlier_stage = 0
        for at in range(lo, hi):
            kv0 = gl.load(blocks + at) * KEYS
            mbarrier.wait(pair_empty.index(stage), phase)
            mbarrier.expect(key_full.index(stage), K_TILES.block_type.nbytes)
            full = key_full.index(stage)
            tma.$TILE_LOAD(K_TILES, [b, key_head, kv0, 0], full, keys.index(stage))
            if at > lo:
                full = value_full.index(earlier_stage)
                mbarrier.expect(full, V_TILES.block_type.nbytes)
                to = values.index(earlier_stage)
                tma.$TILE_LOAD(V_TILES, [b, key_head, earlier, 0], full, to)
            earlier = kv0
            earlier_stage = stage
            stage, phase = following(stage, phase)
        if hi > lo:
            mbarrier.wait(pair_empty.index(stage), phase)
            full = value_full.index(earlier_stage)
            mbarrier.expect(full, V_TILES.block_type.nbytes)
            to = values.index(earlier_stage)
            tma.$TILE_LOAD(V_TILES, [b, key_head, earlier, 0], full, to)
        number += mirrored
        mirrored = 2 * programs - mirrored
    note(notes, place, MEMBER, -1)
    mbarrier.arrive(note_full.index(place), count=1)
'''
