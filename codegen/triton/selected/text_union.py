"""Template of the forward for neighbouring units of queries, over the union of their lists."""

from sparse_compile.codegen.triton.selected.text import SCAN

#: What a program of neighbouring units starts with.
UNIT = """\
TILE_M: tl.constexpr = $TILE_M
TILE_N: tl.constexpr = $TILE_N
NEIGHBOURS: tl.constexpr = $NEIGHBOURS
place, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
own = (b * lists + group // GROUPS_PER_LIST).to(tl.int64) * unions + place
hi = tl.load(COUNT + own) * UNIT_KV
if tl.load(BALANCE) >= 0:
    return
row = tl.arange(0, TILE_M)
neighbour = row // ROWS
token = place * (NEIGHBOURS * UNIT_Q) + row // MEMBERS
h = group * MEMBERS + row % MEMBERS
exist = (neighbour < NEIGHBOURS) & (token < n_q)
INDEX += own * most
NAMES += own * most
lo = 0
$KEY_HEAD
Q += b.to(tl.int64) * q_stride_b
factor = $FACTOR
$QUERY
"""

#: Which units named the keys of a tile, read one tile ahead as the lists are: around the lines that
#: place the keys, where a unit fills tiles and where a tile holds several units.
FIRST_WHOLE = "names = tl.load(NAMES, mask=lo < hi, other=0)"
NAMED_WHOLE = "named = ((names >> neighbour) & 1)[:, None] != 0"
NEXT_WHOLE = "names = tl.load(NAMES + after // UNIT_KV, mask=after < hi, other=0)"
FIRST_GATHERED = "names = tl.load(NAMES + number // UNIT_KV, mask=number < hi, other=0)"
NAMED_GATHERED = "named = (names[None, :] >> neighbour[:, None]) & 1 != 0"
NEXT_GATHERED = FIRST_GATHERED

#: At the start of a program of the forward by query, which is launched as well.
YIELD = """\
# Below zero where unions of lists cost less than the lists; None where that was not asked.
if BALANCE is not None:
    if tl.load(BALANCE) < 0:
        return  # forward_union does it
"""

FORWARD_UNION = (
    '''\
$SIGNATURE
    """As forward: a program holds $NEIGHBOURS neighbouring units, and reads what one of them lists.

    $DESCRIBED
    INDEX and COUNT are those of unions, int32 [B, lists, unions, most] and [B, lists, unions]; bit
    g of NAMES, like INDEX, is set where the g-th unit listed the entry. BALANCE, one int64, is
    below zero where this is the faster way; else this kernel does nothing, and forward does it.
    """
    $UNIT
'''
    + SCAN
    + """\
    OUT += b.to(tl.int64) * out_stride_b
    store_rows(OUT, out, heads, token, out_stride_h, out_stride_n, exist, VALUE_DIM)
    tl.store(LSE + (b * q_heads + heads).to(tl.int64) * n_q + token, lse, mask=exist)
"""
)
