"""How programs make scores, change them, mask them, and make weights and outputs of them."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.fuzz.idiom import Idiom


@dataclass(frozen=True)
class Product:
    """A way to write the two products of attention.

    Attributes:
        before: statements, on q [B, H, NQ, D], k and v [B, H, NK, ...].
        scores: the scores.
        layout: their axes: ``"bhqk"``, ``"nqk"`` (batch and heads in one), ``"bgrqk"``, and of
            programs of another rank ``"bqk"``, ``"qk"``, ``"bwhqk"``.
        out: the output, of the weights ``w``.
        grouped: whether it takes keys and values with fewer heads.
        ranks: of q that it takes.
    """

    scores: str
    out: str
    layout: str = "bhqk"
    before: tuple[str, ...] = ()
    grouped: bool = False
    ranks: tuple[int, ...] = (4,)
    weight: float = 1.0


#: Batch and heads in one axis.
MERGED = ("q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v))",)
_TOKENS_FIRST = ("q, k, v = (x.transpose(1, 2) for x in (q, k, v))",)
_GROUPED = ("q = q.reshape(B, G, H // G, NQ, D)",)
_OUT_OF_MERGED = "torch.bmm(w, v).view(B, H, NQ, E)"
_ANY = (4, 2, 3, 5)

PRODUCTS: dict[str, Product] = {
    "matmul": Product("torch.matmul(q, k.transpose(-2, -1))", "torch.matmul(w, v)", ranks=_ANY),
    "operators": Product("q @ k.mT", "w @ v", ranks=_ANY, weight=2),
    "permuted": Product("q @ k.permute(0, 1, 3, 2)", "torch.matmul(w, v).contiguous()"),
    "einsum": Product(
        'torch.einsum("bhqd,bhkd->bhqk", q, k)', 'torch.einsum("bhqk,bhkd->bhqd", w, v)'
    ),
    "einsum of letters": Product(
        'torch.einsum("b h i d, b h j d -> b h i j", q, k)',
        'torch.einsum("b h i j, b h j d -> b h i d", w, v)',
    ),
    "einsum, tokens first": Product(
        'torch.einsum("bqhd,bkhd->bhqk", q, k)',
        'torch.einsum("bhqk,bkhd->bqhd", w, v)',
        before=_TOKENS_FIRST,
    ),
    "einsum of the rest": Product(
        'torch.einsum("...qd,...kd->...qk", q, k)',
        'torch.einsum("...qk,...kd->...qd", w, v)',
        ranks=_ANY,
    ),
    "bmm": Product("torch.bmm(q, k.transpose(1, 2))", _OUT_OF_MERGED, layout="nqk", before=MERGED),
    "bmm, viewed": Product(
        "torch.bmm(q, k.mT).view(B, H, NQ, NK)",
        "torch.bmm(w.view(B * H, NQ, NK), v).view(B, H, NQ, E)",
        before=MERGED,
    ),
    "baddbmm": Product(
        "torch.baddbmm(q.new_empty(B * H, NQ, NK), q, k.mT, beta=0, alpha=0.5)",
        _OUT_OF_MERGED,
        layout="nqk",
        before=MERGED,
    ),
    "grouped einsum": Product(
        'torch.einsum("bgrqd,bgkd->bgrqk", q, k)',
        'torch.einsum("bgrqk,bgkd->bgrqd", w, v).reshape(B, H, NQ, E)',
        layout="bgrqk",
        before=_GROUPED,
        grouped=True,
    ),
    "grouped matmul": Product(
        "q @ k.unsqueeze(2).mT",
        "(w @ v.unsqueeze(2)).reshape(B, H, NQ, E)",
        layout="bgrqk",
        before=_GROUPED,
        grouped=True,
    ),
}

#: Those that take one head of keys for all.
BROADCASTING = ("matmul", "operators", "permuted", "einsum of the rest")

#: Without scores of its own: a mask and biases are given to it.
SDPA = {
    "sdpa": "F.scaled_dot_product_attention(q, k, v{mask}{scale}{gqa})",
    "sdpa by keywords": "F.scaled_dot_product_attention(query=q, key=k, value=v, "
    "dropout_p=0.0{mask}{scale}{gqa})",
    "module": "F.multi_head_attention_forward(\n"
    "    *(x.transpose(1, 2).flatten(2).transpose(0, 1) for x in (q, k, v)),\n"
    "    *(H * D, H, w_in, None, None, None, False, 0.0, w_out, None),\n"
    "    need_weights={weights}{mask},\n"
    ")[0]",
}
#: What the call of a module reads besides.
OF_MODULE = ("w_in", "w_out")

#: How keys and values get as many heads as the queries have.
REPEATED = {
    "repeat_interleave": "k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))",
    "expand": "k, v = (\n    x[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(B, H, NK, -1) "
    "for x in (k, v)\n)",
    "repeat": "k, v = (x.unsqueeze(2).repeat(1, 1, H // G, 1, 1).flatten(1, 2) for x in (k, v))",
    "index": "k, v = (x[:, torch.arange(H) // (H // G)] for x in (k, v))",
}

#: On queries or keys, before their product.
SCALES = {
    "q": "q = q * D**-0.5",
    "both": "q, k = q * D**-0.25, k * D**-0.25",
    "normalised": "q, k = F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1)",
}

#: Statements on the scores. Those with ``{{x}}`` get a tensor, in the axes of the scores.
STEPS = {
    "times": Idiom("s = s * 0.25", weight=4),
    "divided": Idiom("s = s / math.sqrt(D)", weight=2),
    "in place": Idiom("s *= 0.25"),
    "divided in place": Idiom("s = s.div_(D**0.5)"),
    "number": Idiom("s = s + {w}"),
    "softcap": Idiom("s = {w} * torch.tanh(s / {w})", weight=3),
    "softcap by steps": Idiom("s = s / {w}.0\ns = s.tanh()\ns = s * {w}.0"),
    "tanh": Idiom("s = torch.tanh(s)"),
    "relu": Idiom("s = F.relu(s)"),
    "sigmoid": Idiom("s = s.sigmoid() * 3"),
    "silu": Idiom("s = F.silu(s)"),
    "temperature": Idiom("s = s * {x}", "h", ("temperature",)),
    "temperature divides": Idiom("s = s / {x}", "h", ("temperature",)),
    "scalar": Idiom("s = s * scalar", "", ("scalar",)),
    "clamped temperature": Idiom("s = s * {x}.clamp(max=1.5).exp()", "h", ("temperature",)),
    "temperature of queries": Idiom("s = s * {x}", "bq", ("of_queries",)),
    "number of a tensor": Idiom("s = s * number", "", ("number",)),
}
CURVES = ("softcap", "softcap by steps", "tanh", "relu", "sigmoid", "silu")

_BUCKETS = """
far = 16 + (torch.log((j - i).abs().float() / 8 + 1e-6) / math.log(16) * 8).long()
at = torch.where((j - i).abs() < 8, (j - i).abs(), far.clamp(8, 15)) + (j > i) * 16
F.embedding(at.clamp(max=31), buckets).permute(2, 0, 1).unsqueeze(0)
"""

_BLOOM = """
place = (pad_long.cumsum(-1) - 1) * pad_long
slopes.view(1, H, 1, 1) * place[:, None, None]
"""

#: What is added to scores: floating tensors.
BIASES = {
    "alibi": Idiom("slopes[None, :, None, None] * (j - i)", "hqk", ("slopes",), 3),
    "alibi of both sides": Idiom("slopes.view(1, H, 1, 1) * -(j - i).abs()", "hqk", ("slopes",)),
    "alibi of keys": Idiom("slopes[None, :, None, None] * j", "hk", ("slopes",)),
    "alibi computed": Idiom("2.0 ** -torch.arange(1, H + 1).view(1, H, 1, 1) * (j - i)", "hqk"),
    "alibi of tokens": Idiom(_BLOOM, "bhk", ("slopes", "pad_long")),
    "distance": Idiom("-0.{w} * (i - j).abs()"),
    "integers": Idiom("steps", "qk", ("steps",)),
    "table": Idiom("table[:, j - i + NQ + NK].unsqueeze(0)", "hqk", ("table",), 2),
    "clipped": Idiom("table[None, :, (j - i).clamp(-{w}, {w}) + NQ + NK]", "hqk", ("table",)),
    "embedding": Idiom(
        "F.embedding((j - i).clamp(-12, 12) + 12, near).permute(2, 0, 1)[None]", "hqk", ("near",)
    ),
    "buckets": Idiom(_BUCKETS, "hqk", ("buckets",), 2),
    "index": Idiom(
        "near[index.view(-1)].view(NQ, NK, H).permute(2, 0, 1).contiguous()[None]",
        "hqk",
        ("near", "index"),
    ),
    "pairs": Idiom("bias_pairs", "qk", ("bias_pairs",)),
    "pairs of heads": Idiom("bias_heads", "hqk", ("bias_heads",), 2),
    "keys": Idiom("bias_keys", "bk", ("bias_keys",)),
    "all": Idiom("bias_all", "bhqk", ("bias_all",)),
    "curve of a bias": Idiom("16 * torch.sigmoid(bias_heads)", "hqk", ("bias_heads",)),
    "regions": Idiom("torch.zeros(NQ, NK).masked_fill(i // {c} != j // {c}, -100.0)"),
}
ADDED = {
    "plus": "s = s + {x}",
    "in place": "s += {x}",
    "add": "s = torch.add(s, {x}, alpha=0.5)",
    "minus": "s = s - {x}",
}

#: The score of hidden keys.
FILLS = {
    "infinity": "-INF",
    "least": "torch.finfo(q.dtype).min",
    "number": "-1e4",
    "hundred": "-100.0",
}
#: Statements by which scores ``s`` lose hidden keys: of ``{m}``, what is kept, and ``{fill}``.
HIDING = {
    "masked_fill": "s = s.masked_fill(~{m}, {fill})",
    "masked_fill of not": "s = s.masked_fill({m}.logical_not(), {fill})",
    "masked_fill of zero": "s = s.masked_fill({m} == 0, {fill})",
    "where": "s = torch.where({m}, s, {fill})",
    "where of tensors": "s = torch.where({m}, s, torch.full([], {fill}, dtype=s.dtype))",
    "method where": "s = s.where({m}, s.new_full((), {fill}))",
    "in place": "s.masked_fill_(~{m}, {fill})",
    "by index": "s[~({m}).expand(s.shape)] = {fill}",
    "added": "s = s + torch.where({m}, 0.0, {fill}).to(s.dtype)",
    "added zeros": "s = s + s.new_zeros(({m}).shape).masked_fill(~{m}, {fill})",
    "added in place": "s += torch.zeros(({m}).shape, dtype=s.dtype).masked_fill_(~{m}, {fill})",
    "inverted": "s = s + (1.0 - {m}.to(s.dtype)) * {fill}",
    "inverted integers": "s = s + (1 - {m}.long()) * {fill}",
    "inverted, filled": "inverted = 1.0 - {m}.to(s.dtype)\n"
    "s = s + inverted.masked_fill(inverted.to(torch.bool), {fill})",
}
#: Those that multiply the fill, which infinity does not bear.
MULTIPLYING = ("inverted", "inverted integers")
REPLACING = (
    *("masked_fill", "masked_fill of not", "masked_fill of zero"),
    *("where", "where of tensors", "method where", "in place", "by index"),
)
IN_PLACE = ("in place", "by index", "added in place")
#: Statements on scores that are masked.
LATE = {
    "scaled": "s = s * D**-0.5",
    "maximum": "s = s - s.amax(-1, keepdim=True)",
    "detached maximum": "s = s - s.max(dim=-1, keepdim=True).values.detach()",
    "floor": "s = torch.max(s, torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype))",
}
SOFTMAX = {
    "method": "w = s.softmax(-1)",
    "function": "w = F.softmax(s, dim=-1)",
    "in fp32": "w = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)",
    "of fp32": "w = F.softmax(s.float(), dim=-1).type_as(q)",
}
#: Statements on the weights, of the mask ``{m}`` if there is one.
WEIGHTS = {
    "dropout of nothing": "w = F.dropout(w, p=0.0, training=True)",
    "dropout in inference": "w = F.dropout(w, p=0.1, training=False)",
    "nan_to_num": "w = torch.nan_to_num(w, nan=0.0)",
    "masked again": "w = w.masked_fill(~{m}, 0.0)",
    "contiguous": "w = w.contiguous()",
}
OUTPUTS = {
    "joined": "out = out.transpose(1, 2).reshape(B, NQ, H * E)",
    "twice": "out = out + out.tanh()",
}


def fitted(value: str, axes: str, layout: str) -> str:
    """A value of two or four axes, so that it broadcasts against scores of a layout."""
    if axes in ("qk", ""):
        return value
    value = value if value.isidentifier() else f"({value})"
    if layout == "bgrqk":
        return f"{value}.unflatten(1, (G, H // G))" if "h" in axes else f"{value}.unsqueeze(2)"
    if layout == "nqk":
        return f"{value}.expand(B, H, -1, -1).flatten(0, 1)"
    if layout == "nqk, whole":
        return f"{value}.expand(B, H, NQ, NK).flatten(0, 1)"
    if layout == "qk":
        return f"{value}[0, 0]"
    if layout == "bqk":
        return f"{value}[:, 0]"
    if layout == "bwhqk":
        return f"{value}[:, None]"
    return value
