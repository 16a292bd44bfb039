"""Tokens that are the nodes of a tree: PrefixTree, DraftTree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, N_KV, N_Q, B, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import UPPER_LEFT, Align, bad, optional, position, whole
from sparse_compile.patterns.data import HoldsData, along, frozen, is_tensor, shape_of
from sparse_compile.patterns.euler import ancestors, euler_tour, parents_of_segments


def _checked_tour(where: str, times: Any) -> Any:
    return frozen(where, times, (1, 2), "Write [tokens] or [batch, tokens].", least=1)


@dataclass(frozen=True, repr=False, eq=False)
class PrefixTree(HoldsData, Pattern):
    """A token attends to itself and to its ancestors in a tree of tokens.

    What is shared stands once: rollouts that continue one prompt, or turns that branch off, are
    paths of the tree, and each sees exactly what it would see alone. A token is told by when an
    Euler tour enters and leaves it, and ``q`` attends to ``kv`` where
    ``tin[kv] <= tin[q] < tout[kv]``. Several roots are several trees, packed. Prefix trees are
    packed like this in training on branching trajectories (Wang et al. 2025, Tree Training,
    https://arxiv.org/abs/2511.00413), and tree attention is that of SpecInfer (Miao et al. 2023,
    https://arxiv.org/abs/2305.09781).

    Args:
        tout: for each token, the time after its last descendant was entered; [tokens] or
            [batch, tokens], a tensor or tuples. Each token that is entered takes one unit of time.
        tin: when each token is entered; its place, unless given: tokens stand in depth-first order.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> prompt_and_two = PrefixTree.of_segments((2, 2, 1), parents=(-1, 0, 0))
    >>> prompt_and_two
    PrefixTree((5, 5, 4, 4, 5))
    >>> prompt_and_two.dense(5, 5)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    """

    tout: Annotated[Any, _checked_tour]
    tin: Annotated[Any, optional(_checked_tour)] = None
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tin is not None and shape_of(self.tin) != shape_of(self.tout):
            raise bad(
                f"PrefixTree: tin has the sizes {list(shape_of(self.tin))}, but tout has "
                f"{list(shape_of(self.tout))}",
                "Write both for the same tokens.",
            )

    @staticmethod
    def of_parents(parents: Any, align: str = UPPER_LEFT) -> PrefixTree:
        """The tree in which each token follows another one.

        Args:
            parents: of each token the place of the one before it, -1 for a root; [tokens] or
                [batch, tokens], a tensor, which is read at once, or tuples.
            align: as for the class.

        >>> PrefixTree.of_parents((-1, 0, 0, 1)).dense(4, 4)[0, 0, 3].int().tolist()
        [1, 1, 0, 1]
        """
        rows = parents.tolist() if hasattr(parents, "tolist") else parents
        rows = frozen("PrefixTree: parents", rows, (1, 2), "Write [tokens] or [batch, tokens].", 1)
        flat = isinstance(rows[0], int)
        tours = [euler_tour("PrefixTree", row) for row in ((rows,) if flat else rows)]
        tin, tout = (tuple(times) for times in zip(*tours, strict=True))
        in_order = all(times == tuple(range(len(times))) for times in tin)
        data = [times[0] if flat else times for times in (tout, tin)]
        if is_tensor(parents):
            data = [parents.new_tensor(times) for times in data]
        return PrefixTree(data[0], None if in_order else data[1], align)

    @staticmethod
    def of_segments(
        lengths: Sequence[int], parents: Sequence[int], align: str = UPPER_LEFT
    ) -> PrefixTree:
        """The tree of runs of tokens, such as a prompt and its rollouts, that stand one by one.

        Args:
            lengths: tokens of each segment.
            parents: of each segment the one that it continues, -1 for none.
            align: as for the class.
        """
        return PrefixTree.of_parents(parents_of_segments(lengths, parents), align)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Every key must be a token of the tree, and every query one of the keys."""
        *leading, tokens = shape_of(self.tout)
        if tokens != n_kv or n_q > n_kv:
            raise bad(
                f"PrefixTree: a tree of {tokens} tokens does not fit {n_q} queries and {n_kv} keys",
                f"Write a tree of {n_kv} tokens, and as many queries or fewer.",
            )
        if leading and leading[0] not in (1, batch):
            raise bad(
                f"PrefixTree: {leading[0]} trees for a batch of {batch}",
                f"Write {batch} trees, or one.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``tin[kv] <= tin[q] < tout[kv]``."""
        leading = [along(B, size) for size in shape_of(self.tout)[:-1]]
        tout, place = tables.holding(self.tout), position(self.align)
        key, query = KV, place
        if self.tin is not None:
            tin = tables.holding(self.tin)
            key, query = tin(*leading, KV), tin(*leading, place)
        return sympy.And(sympy.Le(key, query), sympy.Lt(query, tout(*leading, KV)))


def _checked_sees(where: str, sees: Any) -> Any:
    instead = "Write [drafts, drafts] or [batch, drafts, drafts]."
    sees = frozen(where, sees, (2, 3), instead, least=1)
    if len({*shape_of(sees)[-2:]}) > 1:
        raise bad(f"{where} has the sizes {list(shape_of(sees))}", instead)
    return sees


def _checked_context(where: str, context: Any) -> Any:
    if not hasattr(context, "__len__"):
        return whole(where, context, 0)
    return frozen(where, context, (1,), "Write an int, or one length for each batch entry.")


@dataclass(frozen=True, repr=False, eq=False)
class DraftTree(HoldsData, Pattern):
    """Drafts that are verified at once: each attends to the committed context and its ancestors.

    The queries are the drafts, and so are the keys after the context. From SpecInfer (Miao et al.
    2023, https://arxiv.org/abs/2305.09781), Medusa (Cai et al. 2024,
    https://arxiv.org/abs/2401.10774) and EAGLE-2 (Li et al. 2024,
    https://arxiv.org/abs/2406.16858), whose tree masks ``sees`` can be.

    Args:
        sees: which draft attends to which, [drafts, drafts] or [batch, drafts, drafts]; a tensor or
            tuples of bools.
        context: how many keys are committed: an int, or one for each batch entry as a tensor or
            tuple. The drafts stand behind them, and what is behind the drafts, as in a cache with
            room, is hidden. All keys before the last ones, unless given.

    >>> drafts = DraftTree.of_parents((-1, -1, 0))
    >>> drafts.dense(3, 5)[0, 0].int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]
    """

    sees: Annotated[Any, _checked_sees]
    context: Annotated[Any, optional(_checked_context)] = None

    @staticmethod
    def of_parents(parents: Any, context: Any = None) -> DraftTree:
        """The tree in which each draft follows another one, or the context.

        Args:
            parents: of each draft the one before it, -1 for the last token of the context; [drafts]
                or [batch, drafts], a tensor or tuples. Of a tensor the tree is worked out where it
                is, without waiting for it.
            context: as for the class.

        >>> DraftTree.of_parents((-1, 0)).sees
        ((1, 0), (1, 1))
        """
        instead = "Write [drafts] or [batch, drafts]."
        parents = frozen("DraftTree: parents", parents, (1, 2), instead, least=1)
        return DraftTree(ancestors("DraftTree", parents), context)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """The queries must be the drafts, and there must be room for them behind the context."""
        *leading, drafts, _ = shape_of(self.sees)
        if drafts != n_q or n_q > n_kv:
            raise bad(
                f"DraftTree: a tree of {drafts} drafts does not fit {n_q} queries and {n_kv} keys",
                f"Write a tree of {n_q} drafts, and keys for them and for the context.",
            )
        sizes = [(leading, "trees"), ([*shape_of(self.context)], "contexts")]
        for size, name in sizes:
            if size and size[0] not in (1, batch):
                raise bad(
                    f"DraftTree: {size[0]} {name} for a batch of {batch}",
                    f"Write {batch} {name}, or one.",
                )
        if isinstance(self.context, int) and self.context + drafts > n_kv:
            raise bad(
                f"DraftTree: a context of {self.context} keys and {drafts} drafts, but there are "
                f"{n_kv} keys",
                f"Write a context of {n_kv - drafts} or less.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv < context``, or ``sees[q, kv - context]``."""
        behind: sympy.Basic = sympy.true
        if self.context is None:
            context = N_KV - N_Q
        else:
            context = self.context
            if not isinstance(context, int):
                context = tables.holding(context)(along(B, shape_of(context)[0]))
            behind = sympy.Lt(KV, context + N_Q)
        leading = [along(B, size) for size in shape_of(self.sees)[:-2]]
        draft = sympy.Max(KV - context, 0)
        sees = sympy.Ne(tables.holding(self.sees, "bool")(*leading, Q, draft), 0)
        drafts = sympy.And(sympy.Ge(KV, context), behind, sees)
        return sympy.Or(sympy.Lt(KV, context), drafts)
