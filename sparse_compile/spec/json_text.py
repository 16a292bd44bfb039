"""Specs of plain values and a mask as one line of JSON, which travels in a graph, and back."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, TypeVar

from sparse_compile.expr import MaskExpr

T = TypeVar("T", bound="SpelledInJson")


class SpelledInJson:
    """Base of frozen dataclasses whose fields are plain values and a mask."""

    mask: MaskExpr

    @functools.cached_property
    def text(self: Any) -> str:
        """A stable one-line JSON spelling; :meth:`parse` reads it back.

        Infinities are written as Python's ``json`` reads them.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**fields, "mask": self.mask.text}, separators=(",", ":"))

    @classmethod
    def parse(cls: type[T], text: str) -> T:
        """The spec that :attr:`text` spelled."""
        kind: Any = cls  # mypy takes no type for hashable
        found: T = _parsed(kind, text)
        return found


@functools.lru_cache(maxsize=1024)
def _parsed(kind: type[Any], text: str) -> Any:
    fields = {name: tuples(value) for name, value in json.loads(text).items()}
    return kind(**{**fields, "mask": MaskExpr.parse(fields["mask"])})


def tuples(value: Any) -> Any:
    """Nested lists as nested tuples.

    >>> tuples([1, [2, 3]])
    (1, (2, 3))
    """
    return tuple(map(tuples, value)) if isinstance(value, list) else value
