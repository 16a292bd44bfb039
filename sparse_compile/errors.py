"""One class per mistake. Each message says what was wrong, where, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseCompileError(Exception):
    """Base of every error this library raises on purpose."""


class UnknownOption(SparseCompileError):
    """An option name that does not exist."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known options: {', '.join(known)}."
        super().__init__(f"sparse_compile: unknown option {name!r}. {hint}")


class BadOption(SparseCompileError):
    """An option whose value cannot be used."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"sparse_compile: option {name}={value!r} is not valid. Write {allowed}.")


class BadShape(SparseCompileError):
    """Query, key, value or mask shapes that do not fit together."""


class BadDevice(SparseCompileError):
    """Tensors of one attention on several devices, or on one that computes nothing."""


class UnsupportedDtype(SparseCompileError):
    """A dtype that no kernel handles."""

    def __init__(self, dtype: object) -> None:
        super().__init__(
            f"sparse_compile: attention in {dtype} is not supported. "
            "Cast q, k and v to float32, float16 or bfloat16."
        )


class NoKernel(SparseCompileError):
    """No generator makes the kernels of an attention that run on this device."""

    def __init__(self, name: str, refused: Iterable[tuple[str, str]]) -> None:
        reasons = "; ".join(f"{generator}: {reason}" for generator, reason in refused)
        super().__init__(f"sparse_compile: no kernel for {name} runs here. {reasons}.")


class PatternMisuse(SparseCompileError, TypeError):
    """Patterns combined or used in a way that has no meaning, such as with ``and``."""


class BadPattern(SparseCompileError, ValueError):
    """A pattern whose parameters make no sense, or do not fit the lengths it is used with."""


class Inexpressible(BadPattern):
    """A mask_mod or score_mod that does what no predicate or score program can say."""


class RestrictionFailed(SparseCompileError):
    """An attention that the user restricted to a pattern, and that cannot be rewritten."""


class BrokenPromise(SparseCompileError):
    """A mask that the user promised to be a pattern, and that is not."""


class BadFactory(SparseCompileError):
    """A ``pkg.module:factory`` that the command line cannot import or call."""


class NothingToSparsify(SparseCompileError):
    """A model without attention that is sparse by hand."""


class WeightsNeeded(SparseCompileError):
    """Attention weights are asked for or dropped, where they are never made."""


class StaysDense(UserWarning):
    """Attention with a sparse mask that compiled code computes densely, and what would change that.

    To silence it: ``warnings.simplefilter("ignore", sparse_compile.errors.StaysDense)``.
    """
