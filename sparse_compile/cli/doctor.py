"""doctor: is everything here that compiled models need, and if not, what to do about it."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_REQUIRED = {"torch": "2.11", "triton": "3.6", "sympy": "1.13", "networkx": "3.0"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        name: what was looked at.
        ok: whether it is as it must be.
        found: what is there.
        advice: what to do when it is not ok.
    """

    name: str
    ok: bool
    found: str
    advice: str = ""

    def __str__(self) -> str:
        """One line, and a second one with the advice where there is a problem."""
        line = f"{'ok' if self.ok else 'problem':<9}{self.name:<18}{self.found}"
        return line if self.ok else f"{line}\n{'':<27}{self.advice}"


def examine_machine() -> Iterator[Check]:
    """Every check, as it is made; the last ones take some seconds."""
    yield Check("python", True, platform.python_version())
    for name, least in _REQUIRED.items():
        yield _version(name, least)
    yield _gpu()
    yield _guarded("entry point", _entry_point, "reinstall with: pip install sparse_compile")
    yield _guarded("kernel cache", _cache, "set SPARSE_COMPILE_CACHE_DIR to a folder you may write")
    if importlib.util.find_spec("triton") or _on_gpu():
        yield _guarded("kernel generation", _kernel, f"pip install 'triton>={_REQUIRED['triton']}'")
    yield _guarded(
        "Inductor on CPU", _inductor, "install a C++ compiler, such as g++, or set CXX to one"
    )
    yield _guarded("CPU executor", _cpu_executor, "report this as a bug, with the line above")


def _version(name: str, least: str) -> Check:
    advice = f"pip install '{name}>={least}'"
    try:
        found = str(importlib.import_module(name).__version__)
    except ImportError:
        spared = name == "triton" and not _on_gpu()
        note = "not installed: needed on a GPU only" if spared else "not installed"
        return Check(name, spared, note, advice)
    return Check(name, _numbers(found) >= _numbers(least), found, advice)


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version string, to compare.

    >>> _numbers("2.13.0+cpu") >= _numbers("2.11")
    True
    """
    release = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpu() -> Check:
    if not _on_gpu():
        return Check("GPU", True, "none: attention runs in the CPU executor")
    import torch

    major, minor = torch.cuda.get_device_capability()
    return Check("GPU", True, f"{torch.cuda.get_device_name()}, sm_{major}{minor}")


def _guarded(name: str, look: Callable[[], str], advice: str) -> Check:
    """A check whose failure, of whatever kind, is its finding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Check(name, True, look())
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        return Check(name, False, f"{type(error).__name__}: {first}", advice)


def _entry_point() -> str:
    import torch

    if "sparse_compile" not in torch.compiler.list_backends():
        raise LookupError('torch.compile does not know backend="sparse_compile"')
    return 'torch.compile(model, backend="sparse_compile") is registered'


def _cache() -> str:
    from sparse_compile.codegen.runtime.generated import cache_dir

    path = cache_dir()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return str(path)


def _kernel() -> str:
    from sparse_compile.codegen.triton.aot import compile_ahead_of_time
    from sparse_compile.expr import KV, MaskExpr, Q
    from sparse_compile.spec import AttentionSpec, KernelSpec

    attention = AttentionSpec(MaskExpr((KV <= Q) & (Q - KV < 256)))
    spec = KernelSpec(attention, head_dim=64, value_dim=64, dtype="bfloat16", arch="sm_90")
    compile_ahead_of_time(spec, "sm_90")
    return "a Triton kernel compiles for sm_90"


def _inductor() -> str:
    import torch

    x = torch.arange(-32.0, 32.0)
    result = torch.compile(lambda x: (2 * x + 1).relu())(x)
    if not torch.equal(result, (2 * x + 1).relu()):
        raise ArithmeticError("a compiled function gave another result than eager")
    return "a function compiles and gives the right result"


def _cpu_executor() -> str:
    import torch

    import sparse_compile.ops  # noqa: F401  (registers the operators)
    from sparse_compile import reference
    from sparse_compile.expr import KV, MaskExpr, Q
    from sparse_compile.spec import AttentionSpec

    q = torch.randn(1, 2, 48, 16, generator=torch.Generator().manual_seed(0))
    text = AttentionSpec(MaskExpr(KV <= Q), block_q=16, block_kv=16).text
    shape = 1, 2, 48, 48, 2
    lists = torch.ops.sparse_compile.layout([], "[]", [], *shape, text, q.device, [])
    ours = torch.ops.sparse_compile.attention(q, q, q, [], [], [], lists, 0.25, text)[0]
    truth = reference.attention(q, q, q, torch.ones(48, 48).tril().bool(), 0.25)[0]
    error = float((ours - truth).norm() / truth.norm())
    if error > 1e-5:
        raise ArithmeticError(f"its error is {error:.1e}")
    return f"relative error {error:.1e}"
