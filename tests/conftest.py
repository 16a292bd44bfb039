from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.guards
import torch._inductor.config
from torch.fx import GraphModule

import sparse_compile.backend  # noqa: F401  which is also the name of a function
from sparse_compile.options import Options
from tests.rotation import commits, has_turn
from tests.tiers import is_slow, is_through_inductor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--inductor",
        choices=("some", "all"),
        default="some",
        help="which tests send compiled graphs through Inductor, see tests/tiers.py (some)",
    )


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path.stem, item.name):
            item.add_marker(pytest.mark.slow)
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.markexpr:
        _leave_out(config, items, commits())


def _leave_out(config: pytest.Config, items: list[pytest.Item], turn: int) -> None:
    """See :mod:`tests.rotation`."""
    others = [item for item in items if not has_turn(item.path.stem, item.name, turn)]
    if others:
        config.hook.pytest_deselected(items=others)
        left_out = set(others)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def _own_inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that compile one kernel into one directory may load a file that is half written."""
    with pytest.MonkeyPatch.context() as patch:
        # Torch sets the variable itself at some point, so whether it is set says nothing.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        # No pool of processes that import torch: here and in processes that tests start.
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        patch.setattr(torch._inductor.config, "compile_threads", 1)
        yield


@pytest.fixture(autouse=True, scope="session")
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is compiled ahead of time is shared by tests and workers, and is new in each run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _rarely_collected() -> Iterator[None]:
    """Torch, sympy and transformers leave millions of objects, which a collection visits all."""
    usual = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    yield
    gc.set_threshold(*usual)


@pytest.fixture(autouse=True, scope="session")
def _guards_are_not_timed() -> Iterator[None]:
    """For its telemetry Dynamo flushes the processor's caches at each compilation: 35 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The tensors here are tiny: more threads only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _small_problems_are_rewritten(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problems here are so small that the program is faster as it is: rewrite all the same.

    Tests marked ``priced`` see what users get.
    """
    if request.node.get_closest_marker("priced"):
        return
    parse = Options.parse

    def forced(options: Mapping[str, Any] | None) -> Options:
        return parse({"decide": "sparse", **(options or {})})

    monkeypatch.setattr(Options, "parse", staticmethod(forced))


@pytest.fixture(autouse=True)
def _inductor_where_it_matters(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See :data:`tests.tiers.INDUCTOR_ONE_IN`."""
    test = request.node
    if request.config.getoption("inductor") == "all":
        return
    if not (test.get_closest_marker("inductor") or is_through_inductor(test.path.stem, test.name)):
        module = sys.modules["sparse_compile.backend"]
        monkeypatch.setattr(module, "compile_with_inductor", _as_it_is)


def _as_it_is(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """What AOTAutograd makes of a graph, operator after operator."""
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)
    return compiled


@pytest.fixture(scope="module")
def interpreted_kernels() -> Iterator[None]:
    """The kernels of a module of tests are interpreted, so they run on the CPU."""
    interpreter = pytest.importorskip("tests.interpreter", reason="needs triton")
    with interpreter.interpreting():
        yield
