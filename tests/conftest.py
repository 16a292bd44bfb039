from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from sparse_compile.options import Options
from tests.tiers import is_slow


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path.stem, item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _own_inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that compile one kernel into one directory may load a file that is half written."""
    with pytest.MonkeyPatch.context() as patch:
        # Torch sets the variable itself at some point, so whether it is set says nothing.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
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


@pytest.fixture(scope="module")
def interpreted_kernels() -> Iterator[None]:
    """The kernels of a module of tests are interpreted, so they run on the CPU."""
    interpreter = pytest.importorskip("tests.interpreter", reason="needs triton")
    with interpreter.interpreting():
        yield
