"""One program, eager and compiled: what became of its attention, and whether both are equal."""

from __future__ import annotations

import functools
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models.exactness import in_double, relative_error
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.sites.plan import Plan, Trace

#: Whatever can be rewritten is, in blocks that are small beside these problems.
OPTIONS = {"decide": "sparse", "dense": "rewrite", "block": (16, 16)}
#: Of the inputs: the second call must not see what the first had.
SEEDS = (0, 1)
#: Relative, in fp32, to eager.
BAR = 1e-5
#: What is above the bar may be this much further from fp64 than eager is.
_WORSE = 1.1
#: So may gradients in fp32. Eager keeps the weights of its forward, of scores that are rounded; a
#: backward that keeps a log-sum-exp, as PyTorch's fused one does, makes them again, of these and of
#: a number as large that is rounded as much, independently: twice the variance.
_WORSE_AGAIN = _WORSE * 2**0.5
#: Further from fp64 than this, eager computes something else there: nothing is learnt from it.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
#: A gradient as small as this beside the largest is zero but for rounding.
_NOTHING = 1e-6
#: A learned temperature is the exponential of this at most.
_HOTTEST = 1.5
#: Of the terms that cancel, what is allowed for in half precision, where all of it would hide
#: gradients that are wrong by half.
_HALF = 0.2

Program = Callable[..., Tensor]
Values = dict[str, Tensor | None]


@dataclass(frozen=True)
class Result:
    """What a program showed.

    Attributes:
        left: for each attention why it is as it was; empty: it is rewritten.
        mismatch: which tensor is not what eager computes, and how far it is from it.
        error: the exception that compiling or running raised, and where.
    """

    left: tuple[str, ...] = ()
    mismatch: str = ""
    error: str = ""

    @property
    def wrong(self) -> str:
        """What must not be, in words; empty if all is well."""
        bugs = [reason for reason in self.left if "internal error" in reason]
        return self.error or self.mismatch or "".join(bugs[:1])


class Invalid(Exception):
    """The program does not run in eager."""


def check(text: str, grad: bool, dynamic: bool = False, inductor: bool = False) -> Result:
    """The result of a script as :func:`benchmarks.fuzz.program.source` writes them.

    Args:
        text: the script.
        grad: whether gradients are compared, too.
        dynamic: whether sizes are symbols to the compiler.
        inductor: whether Inductor compiles what is rewritten.

    Raises:
        Invalid: the program does not run in eager.
    """
    names: dict[str, Any] = {}
    exec(compile(text, "<fuzz>", "exec"), names)
    program, seen = names["program"], list[Trace]()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            eager = [values(program, names["inputs"](seed), grad) for seed in SEEDS]
        except Exception as error:
            raise Invalid(_shown(error)) from error
        fast = _compiled(program, seen, dynamic, inductor)
        result = Result()
        try:
            with mock.patch.object(pipeline, "run", functools.partial(_noted, pipeline.run, seen)):
                for seed, own in zip(SEEDS, eager, strict=True):
                    given = names["inputs"](seed)
                    wrong = compared(values(fast, given, grad), own, program, given, grad)
                    result = replace(result, mismatch=result.mismatch or wrong)
        except Exception as error:
            result = replace(result, error=_shown(error))
    return replace(result, left=tuple(_reason(trace) for trace in seen))


def _compiled(program: Program, seen: list[Trace], dynamic: bool, inductor: bool) -> Program:
    if inductor:
        made: Program = torch.compile(
            program,
            backend="sparse_compile",
            options=OPTIONS,  # type: ignore[arg-type]
            dynamic=dynamic,
            fullgraph=True,
        )
        return made
    made = torch.compile(program, backend=_rewritten, dynamic=dynamic, fullgraph=True)
    return made


def _rewritten(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """What the passes make of a graph, run operator after operator."""
    pipeline.run(gm, inputs, Options.parse(OPTIONS))
    return gm.forward


def _noted(run: Callable[..., Any], seen: list[Trace], *args: Any) -> Any:
    traces = run(*args)
    seen += traces
    return traces


def _reason(trace: Trace) -> str:
    return "" if isinstance(trace.decided, Plan) else trace.decided.reason


def values(program: Program, given: dict[str, Tensor], grad: bool) -> Values:
    """The output and, if asked for, the gradients of all inputs that have one."""
    # SDPA's fused backward on the CPU rounds the log-sum-exp of rows that are fully masked away;
    # the plain one is what the program means. Half precision is compared with what people get.
    half = given["q"].dtype.itemsize < 4
    kernels = list(SDPBackend.__members__.values()) if half else [SDPBackend.MATH]
    with sdpa_kernel(kernels), torch.set_grad_enabled(grad):
        out = program(*given.values())
        if not grad:
            return {"output": out}
        wanted = {name: x for name, x in given.items() if x.requires_grad}
        loss = (out * _weights(out)).sum()
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {"output": out.detach(), **dict(zip(wanted, grads, strict=True))}


def _weights(out: Tensor) -> Tensor:
    """The gradient of the output: always the same."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def compared(
    ours: Values, eager: Values, program: Program, given: dict[str, Tensor], grad: bool
) -> str:
    """What differs, and how much; empty if nothing does."""
    truth: Values | None = None
    for name, own in eager.items():
        value = ours[name]
        if value is None or own is None:
            if value is not own and not _is_zero(value) and not _is_zero(own):
                return f"gradient of {name} exists on one side only"
            continue
        if (value.shape, value.dtype) != (own.shape, own.dtype):
            return f"{name}: {value.dtype} {list(value.shape)} is not {own.dtype} {list(own.shape)}"
        if own.dtype is torch.float32 and relative_error(value, own) <= BAR:
            continue
        truth = truth or _in_double(program, given, grad)
        said = _further(name, value, own, truth, given)
        if said:
            return f"{name}: {said}"
    return ""


def _is_zero(value: Tensor | None) -> bool:
    return value is None or not bool(value.any())


def _further(
    name: str, value: Tensor, own: Tensor, truths: Values, given: dict[str, Tensor]
) -> str:
    """How much further from fp64 a value is than eager's own; empty: it is not."""
    if not torch.equal(value.isfinite(), own.isfinite()):
        return f"{_kinds(value)} where eager has {_kinds(own)}"
    truth, rounding = truths[name], torch.finfo(own.dtype).eps / 2
    assert truth is not None
    own_error, error = relative_error(own, truth), relative_error(value, truth)
    again = name != "output" and own.dtype is torch.float32
    worse = _WORSE_AGAIN if again else _WORSE
    if error <= worse * own_error + rounding / 2:  # one more rounding, in norm
        return ""
    norms = {key: _norm(x) for key, x in truths.items() if x is not None}
    if error * norms[name] <= rounding * _cancelled(name, truths, given):
        return ""
    largest = max(norms.values())
    if norms[name] <= _NOTHING * largest and _norm(value) <= 20 * rounding * largest:
        return ""  # which eager may have hit exactly
    if own_error <= _ROUNDING[own.dtype]:
        return f"{error:.1e} from fp64, where eager is {own_error:.1e} from it"
    beside = relative_error(value, own)
    if beside <= _ROUNDING[own.dtype]:
        return ""
    return f"{beside:.1e} from eager, which is {own_error:.1e} from fp64"


def _cancelled(name: str, truths: Values, given: dict[str, Tensor]) -> float:
    """How large the terms are of which a gradient is a sum, and which cancel.

    That of a score is a weight times ``grad . v - grad . out``, where ``out`` has been rounded, and
    goes to q times k. That of what scores are multiplied with, or made of, is a sum of q times its
    gradient, over the rows of all queries: PyTorch's own fused attention is as far off there.
    """
    out, q, k = truths["output"], given["q"], given["k"]
    if name in ("output", "v") or out is None:
        return 0.0
    apart = _norm(out * _weights(out))
    if name in ("q", "k"):
        return apart * _row(k if name == "q" else q)
    beside = _norm(q) * _norm(truths["q"]) if truths["q"] is not None else 0.0
    steep = _steepest(given) if q.dtype is torch.float32 else _HALF
    return max(beside, apart * _norm(q) * _row(k) * steep)


def _row(x: Tensor) -> float:
    """The norm of a row, in the mean."""
    return _norm(x) / (x.numel() / x.shape[-1]) ** 0.5


def _steepest(given: dict[str, Tensor]) -> float:
    """How much scores, and what they hand back, grow by a learned temperature."""
    learned = given.get("temperature")
    return 1.0 if learned is None else learned.detach().clamp(0.0, _HOTTEST).exp().max().item()


def _norm(value: Tensor) -> float:
    return value.detach().double().nan_to_num(0, 0, 0).norm().item()


def _kinds(value: Tensor) -> str:
    return f"{int(value.isnan().sum())} NaN and {int(value.isinf().sum())} infinite"


def _in_double(program: Program, given: dict[str, Tensor], grad: bool) -> Values:
    doubled = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in given.items()
    }
    with in_double():
        return values(program, doubled, grad)


def _shown(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return f"{type(error).__name__} at {place}: {str(error).strip()[:500]}"
