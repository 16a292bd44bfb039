"""Options of the backend: one frozen value, validated before anything compiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sparse_compile.errors import BadOption, UnknownOption

_BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="sparse_compile", options={...})`` accepts.

    Attributes:
        dense: what to do with an attention whose mask skips nothing that SDPA does not skip itself
            (no mask, or plain causal): ``"sdpa"`` leaves it to, or hands it to, PyTorch's own
            dense kernels without a mask tensor; ``"rewrite"`` uses this library's kernels.
        decide: what decides about an attention whose mask skips something: ``"cost"`` rewrites it
            where that is predicted to be faster than the program as it is; ``"sparse"`` always.
        block: block shape (queries, keys) of the layouts, each one of 16, 32, 64, 128; None lets
            the library choose.
        finite_fill: ``"exact"`` keeps finite fills such as -1e4 what they are, a bias, so such
            masks are not rewritten; ``"minus_inf"`` reads every fill <= -1e4 as minus infinity.
        masks: ``"fresh"`` reads a mask tensor in every call, however it was changed since the last;
            ``"stable"`` promises that mask tensors from outside of the compiled code are changed
            only where PyTorch counts it (``mask[:4] = True``; not through ``mask.data``, numpy or
            shared memory), and reuses what was read until then.
        verify_bytes: a lifted mask is checked against the program's own mask tensor, evaluated
            once while compiling, if that tensor takes at most this many bytes.
        check_promises: whether masks that ``mask(pattern, promise=True)`` promises to be a pattern
            are compared with it in every call. For debugging: it reads the whole masks.
        inductor: options handed to Inductor, which compiles the rest of the graph.

    >>> Options.parse({"finite_fill": "minus_inf"}).finite_fill
    'minus_inf'
    """

    dense: str = "sdpa"
    decide: str = "cost"
    block: tuple[int, int] | None = None
    finite_fill: str = "exact"
    masks: str = "fresh"
    verify_bytes: int = 16 * 2**30
    check_promises: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(options: Mapping[str, Any] | None) -> Options:
        """Validated options.

        Raises:
            UnknownOption: a name that does not exist, with the nearest one that does.
            BadOption: a value that cannot be used, with what can.
        """
        known = {f.name for f in fields(Options)}
        for name in options or {}:
            if name not in known:
                raise UnknownOption(name, known)
        given = dict(options or {})
        if isinstance(given.get("block"), list):
            given["block"] = tuple(given["block"])
        parsed = Options(**given)
        parsed._check()
        return parsed

    def _check(self) -> None:
        _check_choice("dense", self.dense, ("sdpa", "rewrite"))
        _check_choice("decide", self.decide, ("cost", "sparse"))
        _check_choice("finite_fill", self.finite_fill, ("exact", "minus_inf"))
        _check_choice("masks", self.masks, ("fresh", "stable"))
        block_ok = self.block is None or (
            isinstance(self.block, tuple)
            and len(self.block) == 2
            and all(size in _BLOCK_SIZES for size in self.block)
        )
        if not block_ok:
            allowed = "two of 16, 32, 64, 128, as in (128, 64), or None"
            raise BadOption("block", self.block, allowed)
        if isinstance(self.verify_bytes, bool) or not isinstance(self.verify_bytes, int):
            raise BadOption("verify_bytes", self.verify_bytes, "a number of bytes, as in 2**30")
        if not isinstance(self.check_promises, bool):
            raise BadOption("check_promises", self.check_promises, "True or False")
        self._check_inductor()

    def _check_inductor(self) -> None:
        if not isinstance(self.inductor, Mapping):
            raise BadOption("inductor", self.inductor, 'a dict, as in {"max_autotune": True}')
        from torch._inductor import list_options  # public: documented for torch.compile's options

        known = list_options()
        for name in self.inductor:
            if name.replace("-", "_") not in known:
                raise UnknownOption(f"inductor.{name}", [f"inductor.{n}" for n in known])


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadOption(name, value, " or ".join(repr(choice) for choice in allowed))
