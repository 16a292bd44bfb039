"""The kernel: shared memory, barriers and roles."""

KERNEL = '''\
$SIGNATURE
    """OUT = softmax(scale * Q K^T where mask) V, and its natural log-sum-exp."""
    queries = gl.allocate_shared_memory(Q.dtype, [GROUPS, 1, 1, ROWS, HEAD_DIM], Q.layout)
    keys = gl.allocate_shared_memory(Q.dtype, [STAGES, 1, 1, KEYS, HEAD_DIM], K.layout)
    values = gl.allocate_shared_memory(Q.dtype, [STAGES, 1, 1, KEYS, VALUE_DIM], V.layout)
    results = gl.allocate_shared_memory(Q.dtype, [GROUPS, 1, 1, ROWS, VALUE_DIM], OUT.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    notes = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], plain)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    query_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    query_empty = gl.allocate_shared_memory(gl.int64, [1], layout)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    pair_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    note_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    threads: gl.constexpr = GROUPS * 128  # that multiply
    mbarrier.init(query_full, count=1)
    mbarrier.init(query_empty, count=threads)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(pair_empty.index(stage), count=threads)
    for place in gl.static_range(2):
        mbarrier.init(note_full.index(place), count=1)
    fence_async_shared()

    shared = (queries, keys, values, notes)
    barriers = (query_full, query_empty, key_full, value_full, pair_empty, note_full)
    worklist = (items, n_items, q_heads, batch)
    lists = (start_0, counts_0, index_0, room_0, lines_0, batches_0, heads_0)
    sizes = ($SIZES)
    parts = (PART_OUT, PART_LSE)
    factor = scale * LOG2_E
    given = (OUT, results, LSE, parts, shared, barriers, worklist, lists, sizes, factor)
    gl.warp_specialize(
        [
            $ROLES
            (load, ((Q, K, V), shared, barriers, worklist, lists, sizes, GROUP)),
        ],
        [$WARPS],
        [$REGISTERS],
    )
'''
