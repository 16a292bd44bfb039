"""AttentionSpec and KernelSpec: everything that determines the generated code."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from enum import Enum

from sparse_compile.expr import MaskExpr
from sparse_compile.spec.view import Order, View, natural


class EmptyRows(str, Enum):
    """What a query that may attend to nothing yields; each site keeps its program's own answer.

    Attributes:
        ZERO: 0, as SDPA gives with a bool or -inf mask. No gradient.
        NAN: NaN, as eager softmax gives over a row that ``masked_fill(mask, -inf)`` filled. V's
            gradient is NaN; the scores are overwritten, so Q and K get none.
        NAN_ADDED: NaN, as *adding* -inf gives. The NaN reaches the gradients of Q and K, too.
        MEAN: the mean of V over all keys, as ``masked_fill(mask, finfo.min)`` gives. The scores are
            overwritten, so Q and K get no gradient.
        MEAN_ADDED: the mean of V, as *adding* finfo.min gives. The scores are absorbed by rounding,
            but autograd still sends the softmax gradient through them to Q and K.
    """

    ZERO = "zero"
    NAN = "nan"
    NAN_ADDED = "nan_added"
    MEAN = "mean"
    MEAN_ADDED = "mean_added"


@dataclass(frozen=True)
class AttentionSpec:
    """What one rewritten attention means, apart from its shapes and dtypes.

    Its :attr:`text` travels in the graph as an argument of the operators, so it is part of
    torch.compile's cache keys.

    Attributes:
        mask: who may attend to whom.
        empty_rows: what a fully masked query yields.
        block_q, block_kv: block shape of the layout, in tokens.
        where: where the attention stands in the user's code, outermost frame first, for comments.
        views: disjoint parts of the mask, each in orders in which it is blockwise dense; all with
            the block shape above. None: the whole mask in plain order.
    """

    mask: MaskExpr
    empty_rows: EmptyRows = EmptyRows.ZERO
    block_q: int = 128
    block_kv: int = 128
    where: tuple[str, ...] = ()
    views: tuple[View, ...] = ()

    def __hash__(self) -> int:
        # Specs are looked up at every call; the text is made once.
        return hash(self.text)

    @functools.cached_property
    def parts(self) -> tuple[View, ...]:
        """The views, or the whole mask as one."""
        plain = View(self.mask.predicate, natural(self.block_q), natural(self.block_kv))
        return self.views or (plain,)

    def sections(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """The numbers of the views that share an order of ``axis``, ``"q"`` or ``"kv"``.

        Each section is one launch, and a program works through all views of its section. Sections
        run one after another, each adding to the rows that earlier ones wrote; one that reaches
        every token comes first, if there is any.
        """
        return self._sections[axis]

    @functools.cached_property
    def _sections(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        result = {}
        for axis in ("q", "kv"):
            found: dict[Order, list[int]] = {}
            for number, view in enumerate(self.parts):
                found.setdefault(view.q if axis == "q" else view.kv, []).append(number)
            orders = sorted(found, key=lambda order: not order.is_complete)
            result[axis] = tuple(tuple(found[order]) for order in orders)
        return result

    def part_mask(self, view: View) -> MaskExpr:
        """The predicate of one view, with the tables and sizes of the mask."""
        return self._part_masks[view]

    @functools.cached_property
    def _part_masks(self) -> dict[View, MaskExpr]:
        # Layouts are made from these in calls, so they are put together once.
        tables, n_sizes = self.mask.tables, self.mask.n_sizes
        return {part: MaskExpr(part.predicate, tables, n_sizes) for part in self.parts}

    @functools.cached_property
    def text(self) -> str:
        """A stable one-line JSON spelling; :meth:`parse` reads it back."""
        fields = {
            "mask": self.mask.text,
            "empty_rows": self.empty_rows.value,
            "block": [self.block_q, self.block_kv],
            "where": list(self.where),
            "views": [view.fields for view in self.views],
        }
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> AttentionSpec:
        """The spec that :attr:`text` spelled.

        >>> from sparse_compile.expr import KV, Q
        >>> spec = AttentionSpec(MaskExpr(KV <= Q), where=("model.py:12",))
        >>> AttentionSpec.parse(spec.text) == spec
        True
        """
        fields = json.loads(text)
        return AttentionSpec(
            MaskExpr.parse(fields["mask"]),
            EmptyRows(fields["empty_rows"]),
            block_q=fields["block"][0],
            block_kv=fields["block"][1],
            where=tuple(fields["where"]),
            views=tuple(map(View.of_fields, fields["views"])),
        )


@dataclass(frozen=True)
class KernelSpec:
    """Everything that determines the source of the kernels of one attention. It *is* the cache key.

    Attributes:
        attention: the mask, the block shape and where it came from.
        head_dim: D of Q and K, 1 to 256.
        value_dim: Dv of V and of the output, 1 to 256.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, of Q, K, V and the output.
        arch: what it is tuned for, ``"sm_90"``, or ``"interpreter"``.
        exact: whether the lengths are multiples of the radices of all views, so that the rows of a
            block can be described to the copy engine as a box.
    """

    attention: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: str
    arch: str
    exact: bool = True

    @functools.cached_property
    def name(self) -> str:
        """A readable unique name for its file, such as ``attention_d128_bf16_1f3a9c02``."""
        short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[self.dtype]
        shape = [self.head_dim, self.value_dim, self.dtype, self.arch, self.exact]
        identity = json.dumps([self.attention.text, *shape])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return f"attention_d{self.head_dim}_{short}_{digest}"
