"""How programs say who may attend to whom: each value is bool, True where a pair may attend."""

from __future__ import annotations

from benchmarks.fuzz.idiom import Idiom

_VMAP = """
def sees(b, i, j):
    return (j <= i) & pad[b, j]

by_key = torch.vmap(sees, (None, None, 0))
by_query = torch.vmap(by_key, (None, 0, None))
by_batch = torch.vmap(by_query, (0, None, None))
by_batch(torch.arange(B), i[:, 0], j)[:, None]
"""

_PACKED = """
starts_here = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
sequence = starts_here.cumsum(-1)[:, None, None]
(sequence[..., NK - NQ :].mT == sequence) & (j <= i)
"""

_CHUNKS = """
before = (left_long.cumsum(-1) == 0).sum(-1)[:, None, None, None]
((j - before) // {c} == (i - before) // {c}) & (j <= i)
"""

_GLOBAL = """
m = torch.zeros(NQ, NK, dtype=torch.bool)
m[:, :{g}] = True
m[:{g}] = True
m |= (i - j).abs() <= {w}
m
"""

_LOOP = """
m = torch.zeros(NQ, NK, dtype=torch.bool)
for a in range(0, NK, 16):
    m[a : a + 16, a : a + 16] = True
m
"""

_FILLED = """
m = torch.ones(NQ, NK, dtype=torch.bool)
m.masked_fill_(j > i, False)
m[:, torch.arange(NK) % {d} == 1] = False
m.fill_diagonal_(True)
m
"""

_SEQUENCES = """
at = torch.bucketize(torch.arange(NK), starts, right=True)
at[NK - NQ :, None] == at
"""

_REPEATED = """
blocks = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]])
m = blocks.repeat_interleave(-(-NQ // 4), 0).repeat_interleave(-(-NK // 4), 1)
m[:NQ, :NK].bool()
"""

#: Of places alone.
PLACES = {
    "arange": Idiom("j <= i", weight=6),
    "arange of one": Idiom("torch.arange(NK)[None] <= torch.arange(NQ)[:, None] + (NK - NQ)"),
    "tril": Idiom("torch.ones(NQ, NK, dtype=torch.bool).tril(NK - NQ)", weight=2),
    "tril of floats": Idiom("torch.tril(torch.ones(NQ, NK)) != 0"),
    "triu": Idiom("~torch.triu(torch.ones(NQ, NK, dtype=torch.bool), diagonal=1)"),
    "triu of infinities": Idiom("torch.full((NQ, NK), -INF).triu(1) == 0"),
    "numpy": Idiom("torch.from_numpy(numpy.tril(numpy.ones((NQ, NK), dtype=bool)))"),
    "window": Idiom("(i - j < {w}) & (j <= i)", weight=3),
    "window of both sides": Idiom("(i - j).abs() <= {w}", weight=2),
    "band": Idiom(
        "torch.ones(NQ, NK, dtype=torch.bool).tril({g}) & torch.ones(NQ, NK).triu(-{w}).bool()"
    ),
    "chunks": Idiom("(i // {c} == j // {c}) & (j <= i)"),
    "blocks": Idiom("j // {c} <= torch.div(i, {c}, rounding_mode='floor')"),
    "dilated": Idiom("((i - j) % {d} == 0) & (j <= i)"),
    "strided": Idiom("(j <= i) & ((i - j < {c}) | (j % {c} == {c} - 1))"),
    "global and window": Idiom("(j < {g}) | (i < {g}) | ((i - j).abs() <= {w})"),
    "global in place": Idiom(_GLOBAL),
    "sink and window": Idiom("(j <= i) & ((i - j < {w}) | (j < {g}))"),
    "prefix": Idiom("(j < {c}) | (j <= i)"),
    "bits": Idiom("(i & {d}) == (j & {d})"),
    "rows are empty": Idiom("(j <= i) & (i % {d} == 0)"),
    "loop": Idiom(_LOOP),
    "filled in place": Idiom(_FILLED),
    "repeated": Idiom(_REPEATED),
    "chosen": Idiom("torch.where(i < {c}, j <= i, (i - j).abs() < {w})"),
}

#: Of tensors, of a value for each token or each sequence.
TOKENS = {
    "padding": Idiom("pad[:, None, None, :]", "bk", ("pad",), 2),
    "padding at the left": Idiom("left[:, None, None]", "bk", ("left",), 2),
    "padding at the right": Idiom("right_long[:, None, None].bool()", "bk", ("right_long",), 2),
    "padding of integers": Idiom("pad_long[:, None, None, :] != 0", "bk", ("pad_long",)),
    "padding is one": Idiom("left_long[:, None, None, :] == 1", "bk", ("left_long",)),
    "padding of floats": Idiom("pad_float[:, None, None, :] > 0.5", "bk", ("pad_float",)),
    "padding by view": Idiom("right.view(B, 1, 1, NK)", "bk", ("right",)),
    "padding by index": Idiom(
        "left[torch.arange(B)[:, None, None, None], torch.arange(NK)]", "bk", ("left",), 2
    ),
    "padding of pairs": Idiom(
        "(pad_long[:, None, NK - NQ :, None] * pad_long[:, None, None]) > 0", "bqk", ("pad_long",)
    ),
    "padding is full": Idiom("full_long[:, None, None].to(torch.bool)", "bk", ("full_long",)),
    "lengths": Idiom("j < lengths[:, None, None, None]", "bk", ("lengths",)),
    "documents": Idiom(
        "doc[:, None, NK - NQ :, None] == doc[:, None, None, :]", "bqk", ("doc",), 3
    ),
    "documents before": Idiom(
        "(doc_int[:, None, NK - NQ :, None] >= doc_int[:, None, None]) & (j <= i)",
        "bqk",
        ("doc_int",),
    ),
    "ends": Idiom(
        "ends.cumsum(-1)[:, None, NK - NQ :, None] == ends.cumsum(-1)[:, None, None]",
        "bqk",
        ("ends",),
    ),
    "packed": Idiom(_PACKED, "bqk", ("positions",)),
    "sequences": Idiom(_SEQUENCES, "qk", ("starts",)),
    "chunks after padding": Idiom(_CHUNKS, "bqk", ("left_long",)),
    "prefix of each": Idiom("(j < prefix[:, None, None, None]) | (j <= i)", "bqk", ("prefix",)),
    "global tokens": Idiom(
        "ends[:, None, None] | ends[:, None, NK - NQ :, None] | ((i - j).abs() <= {w})",
        "bqk",
        ("ends",),
    ),
    "offset of a cache": Idiom("j <= torch.arange(NQ)[:, None] + offset", "qk", ("offset",)),
    "first tokens": Idiom("pad_long.cumsum(-1)[:, None, None] <= {c}", "bk", ("pad_long",)),
    "vmap": Idiom(_VMAP, "bqk", ("pad",)),
}

#: Another mask for each head.
HEADS = {
    "windows of heads": Idiom("(i - j).abs() <= windows[None, :, None, None]", "hqk", ("windows",)),
    "kinds of heads": Idiom(
        "torch.where(torch.arange(H).view(1, H, 1, 1) % 2 == 0, j <= i, (i - j).abs() <= {w})",
        "hqk",
    ),
}

#: Tensors of all pairs.
TENSORS = {
    "buffer": Idiom("buffer[:, :, NK - NQ : NK, :NK]", "11qk", ("buffer",)),
    "tensor of pairs": Idiom("of_pairs", "qk", ("of_pairs",)),
    "tensor of batches": Idiom("of_batch", "bqk", ("of_batch",)),
    "tensor of heads": Idiom("of_heads", "hqk", ("of_heads",)),
    "tensor of all": Idiom("of_all", "bhqk", ("of_all",)),
    "scattered": Idiom(
        "torch.zeros(B, 1, NQ, NK, dtype=torch.bool).scatter(-1, chosen, True)", "bqk", ("chosen",)
    ),
}

MASKS = {**PLACES, **TOKENS, **HEADS, **TENSORS}

#: How a mask is joined to what there is: by statements on ``keep``.
JOINED = {
    "and": "keep = keep & ({m})",
    "logical_and": "keep = torch.logical_and(keep, {m})",
    "multiplied": "keep = keep * ({m})",
    "and not not": "keep = keep & ~(~({m}))",
    "or": "keep = keep | ({m})",
    "where": "keep = torch.where({m}, keep, False)",
    "without": "keep = keep & ~({m})",
}
#: Those that mask more: each of the masks could be applied by itself.
NARROWING = ("and", "logical_and", "multiplied", "and not not", "where")
