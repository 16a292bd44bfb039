"""AttentionSpec and KernelSpec: everything that determines the generated code."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from enum import Enum

import sympy

from sparse_compile.errors import SparseCompileError
from sparse_compile.expr import Dropout, MaskExpr, ScoreProgram, renumbered, table_index
from sparse_compile.spec.view import Order, Units, View, natural


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


#: Of the text of a spec; graphs with another are not read.
_VERSION = 2


@dataclass(frozen=True)
class AttentionSpec:
    """What one rewritten attention means, apart from its shapes and dtypes.

    Its :attr:`text` travels in the graph as an argument of the operators, so it is part of
    torch.compile's cache keys.

    Attributes:
        mask: who may attend to whom, where all that may be selected is; it has the tables and the
            sizes of all parts.
        empty_rows: what a fully masked query yields.
        block_q, block_kv: block shape of the layout, in tokens.
        where: where the attention stands in the user's code, outermost frame first, for comments.
        coverage: disjoint parts of the mask. Those of blocks, each in orders in which it is
            blockwise dense and all with the block shape above, come before those of selected units.
            Empty: the whole mask by blocks in plain order.
        score: what happens to the scaled products of q and k before the mask; None: nothing. The
            tables that it reads are among those of the mask.
        dropout: of the weights; None: none is dropped.
    """

    mask: MaskExpr
    empty_rows: EmptyRows = EmptyRows.ZERO
    block_q: int = 128
    block_kv: int = 128
    where: tuple[str, ...] = ()
    coverage: tuple[View | Units, ...] = ()
    score: ScoreProgram | None = None
    dropout: Dropout | None = None

    @staticmethod
    def of_units(mask: MaskExpr, unit_q: int = 1, unit_kv: int = 64) -> AttentionSpec:
        """Attention to selected keys that the mask allows; arguments as in :class:`Units`."""
        return AttentionSpec(mask, coverage=(Units(mask.predicate, unit_q, unit_kv),))

    @staticmethod
    def of_listed_blocks(mask: MaskExpr, block_q: int, block_kv: int) -> AttentionSpec:
        """:meth:`of_units` where both units are blocks that kernels of blocks take."""
        part = View(mask.predicate, natural(block_q), natural(block_kv), listed=True)
        return AttentionSpec(mask, block_q=block_q, block_kv=block_kv, coverage=(part,))

    def with_units(self, mask: MaskExpr, unit_q: int, unit_kv: int) -> AttentionSpec:
        """This, and selected keys that another mask allows, disjoint from this one.

        Args:
            mask: its tables stand behind those of this one; both have the same sizes.
            unit_q, unit_kv: as in :class:`Units`.
        """
        own = len(self.mask.tables)
        moved = renumbered(mask.predicate, {i: own + i for i in range(len(mask.tables))})
        whole = MaskExpr(
            sympy.Or(self.mask.predicate, moved),
            (*self.mask.tables, *mask.tables),
            max(self.mask.n_sizes, mask.n_sizes),
        )
        parts: tuple[View | Units, ...] = (*self.parts, *self.units)
        parts += (Units(moved, unit_q, unit_kv),)
        return replace(self, mask=whole, coverage=parts)

    def __post_init__(self) -> None:
        if self.coverage != (*self.views, *self.units):
            raise ValueError("parts of blocks come before parts of units")

    def __hash__(self) -> int:
        # Specs are looked up at every call; the text is made once.
        return hash(self.text)

    @functools.cached_property
    def views(self) -> tuple[View, ...]:
        """The parts of blocks, where the coverage says them."""
        return tuple(part for part in self.coverage if isinstance(part, View))

    @functools.cached_property
    def units(self) -> tuple[Units, ...]:
        """The parts of selected units."""
        return tuple(part for part in self.coverage if isinstance(part, Units))

    @functools.cached_property
    def parts(self) -> tuple[View, ...]:
        """The parts of blocks: those of the coverage, or the whole mask as one."""
        plain = View(self.mask.predicate, natural(self.block_q), natural(self.block_kv))
        return self.views if self.coverage else (plain,)

    @property
    def unit_q(self) -> int:
        """Queries of a unit, where one part of units is all there is."""
        return self._only_units.unit_q

    @property
    def unit_kv(self) -> int:
        """Keys of a unit, where one part of units is all there is."""
        return self._only_units.unit_kv

    @property
    def _only_units(self) -> Units:
        (part,) = self.units
        return part

    @functools.cached_property
    def blocks(self) -> AttentionSpec:
        """The parts of blocks alone, with the tables up to the last that they read.

        Itself where its parts are of one kind.
        """
        if not (self.units and self.views):
            return self
        alone = self._alone(self.views)
        read = {*map(table_index, alone.mask.lookups), *self._score_tables}
        mask = replace(alone.mask, tables=self.mask.tables[: max(read, default=-1) + 1])
        return replace(alone, mask=mask)

    @functools.cached_property
    def pieces(self) -> tuple[tuple[AttentionSpec, tuple[int, ...]], ...]:
        """What is computed in one go, as specs of their own, and which tables each of them reads.

        All parts of blocks are one piece, and each part of units is.
        """
        if not self.units or len(self.coverage) == 1:
            return ((self, tuple(range(len(self.mask.tables)))),)
        split = [self.blocks] if self.views else []
        split += [self._alone((part,)) for part in self.units]
        return tuple(piece._trimmed() for piece in split)

    @property
    def of_blocks(self) -> AttentionSpec:
        """The whole mask by blocks in plain order."""
        return replace(self, coverage=())

    def _alone(self, parts: tuple[View | Units, ...]) -> AttentionSpec:
        predicate = sympy.Or(*(part.predicate for part in parts))
        mask = MaskExpr(predicate, self.mask.tables, self.mask.n_sizes)
        plain = replace(self, mask=mask, coverage=())
        return plain if plain.parts == parts else replace(plain, coverage=parts)

    def _trimmed(self) -> tuple[AttentionSpec, tuple[int, ...]]:
        mask, used = self.mask.trimmed(self._score_tables)
        numbers = {old: new for new, old in enumerate(used)}
        score = self.score
        if score is not None:
            score = replace(score, value=renumbered(score.value, numbers))
        parts = (
            replace(part, predicate=renumbered(part.predicate, numbers)) for part in self.coverage
        )
        return replace(self, mask=mask, coverage=tuple(parts), score=score), used

    @property
    def _score_tables(self) -> frozenset[int]:
        return self.score.tables if self.score is not None else frozenset()

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
            "version": _VERSION,
            "mask": self.mask.text,
            "empty_rows": self.empty_rows.value,
            "block": [self.block_q, self.block_kv],
            "where": list(self.where),
            "views": [view.fields for view in self.views],
            "units": [part.fields for part in self.units],
            **({} if self.score is None else {"score": self.score.text}),
            **({} if self.dropout is None else {"dropout": self._drops}),
        }
        return json.dumps(fields, separators=(",", ":"))

    @property
    def _drops(self) -> list[float]:
        assert self.dropout is not None
        return [self.dropout.probability, self.dropout.seed]

    @property
    def learned(self) -> tuple[str, ...]:
        """The dtypes of the tensors ``w0, w1, ...``; the seed of a dropout is the last one."""
        own = () if self.score is None else self.score.learned
        return own if self.dropout is None else (*own, "int64")

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> AttentionSpec:
        """The spec that :attr:`text` spelled.

        Raises:
            SparseCompileError: another version of the library spelled it.

        >>> from sparse_compile.expr import KV, Q
        >>> spec = AttentionSpec(MaskExpr(KV <= Q), where=("model.py:12",))
        >>> spec = spec.with_units(MaskExpr(KV > Q), unit_q=1, unit_kv=16)
        >>> AttentionSpec.parse(spec.text) == spec
        True
        """
        fields = json.loads(text)
        if fields.get("version") != _VERSION:
            raise SparseCompileError(
                "sparse_compile: this graph was compiled by another version of the library. "
                "Compile or export the model again."
            )
        views, units = map(View.of_fields, fields["views"]), map(Units.of_fields, fields["units"])
        return AttentionSpec(
            MaskExpr.parse(fields["mask"]),
            EmptyRows(fields["empty_rows"]),
            block_q=fields["block"][0],
            block_kv=fields["block"][1],
            where=tuple(fields["where"]),
            coverage=(*views, *units),
            score=ScoreProgram.parse(fields["score"]) if "score" in fields else None,
            dropout=Dropout(*fields["dropout"]) if "dropout" in fields else None,
        )


def are_blocks(unit_q: int, unit_kv: int, device: str) -> bool:
    """Whether units of a selection are blocks for the kernels of blocks on a type of device.

    These hold a tile of queries and go through its keys, whatever the lists; those of units choose
    by the lists what is outermost, and are faster where few rows share a list.
    """
    return device == "cuda" and {unit_q, unit_kv} <= {64, 128}


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
        shape = self.head_dim, self.value_dim, self.dtype, self.arch, self.exact
        return kernel_name("attention", self.attention, *shape)


def kernel_name(
    kind: str, attention: AttentionSpec, head_dim: int, value_dim: int, dtype: str, *more: str | int
) -> str:
    """A readable unique name for the file of kernels that these determine."""
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    identity = json.dumps([attention.text, head_dim, value_dim, dtype, *more])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{kind}_d{head_dim}_{short}_{digest}"
