"""Specs of plain values and a mask as one line of JSON, which travels in a graph, and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from sparse_compile.expr import MaskExpr


def to_json(spec: Any) -> str:
    """The fields of a frozen dataclass; infinities are written as Python's ``json`` reads them."""
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return json.dumps({**fields, "mask": spec.mask.text}, separators=(",", ":"))


def from_json(text: str) -> dict[str, Any]:
    """The fields that :func:`to_json` spelled, by name."""
    fields = {name: tuples(value) for name, value in json.loads(text).items()}
    return {**fields, "mask": MaskExpr.parse(fields["mask"])}


def tuples(value: Any) -> Any:
    """Nested lists as nested tuples.

    >>> tuples([1, [2, 3]])
    (1, (2, 3))
    """
    return tuple(map(tuples, value)) if isinstance(value, list) else value
