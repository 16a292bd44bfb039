"""SelectedSpec: what determines the generated code of attention over selected keys."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from sparse_compile.expr import MaskExpr
from sparse_compile.spec import EmptyRows


@dataclass(frozen=True)
class SelectedSpec:
    """What attention over selected keys means, apart from its shapes, dtypes and the selection.

    A query attends to a key that its selection has *and* its mask allows. The :attr:`text` travels
    in the graph as an argument of the operators.

    Attributes:
        mask: who may attend to whom, besides the selection.
        unit_q: consecutive queries that share a selection.
        unit_kv: consecutive keys that are selected together.
        empty_rows: what a query without any key yields.
        where: where it stands in the user's code, outermost frame first, for comments.
    """

    mask: MaskExpr
    unit_q: int = 1
    unit_kv: int = 64
    empty_rows: EmptyRows = EmptyRows.ZERO
    where: tuple[str, ...] = ()

    def __hash__(self) -> int:
        # Specs are looked up at every call; the text is made once.
        return hash(self.text)

    @functools.cached_property
    def text(self) -> str:
        """A stable one-line JSON spelling; :meth:`parse` reads it back."""
        fields = {
            "mask": self.mask.text,
            "units": [self.unit_q, self.unit_kv],
            "empty_rows": self.empty_rows.value,
            "where": list(self.where),
        }
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> SelectedSpec:
        """The spec that :attr:`text` spelled.

        >>> from sparse_compile.expr import KV, Q
        >>> spec = SelectedSpec(MaskExpr(KV <= Q), where=("model.py:12",))
        >>> SelectedSpec.parse(spec.text) == spec
        True
        """
        fields = json.loads(text)
        unit_q, unit_kv = fields["units"]
        return SelectedSpec(
            MaskExpr.parse(fields["mask"]),
            unit_q,
            unit_kv,
            EmptyRows(fields["empty_rows"]),
            tuple(fields["where"]),
        )
