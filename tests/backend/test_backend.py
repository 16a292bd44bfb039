"""The whole road: torch.compile with the backend, in every mode that torch.compile has."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparse_compile
from sparse_compile.cli import main
from sparse_compile.errors import BadOption, UnknownOption
from sparse_compile.inspect.explain import explain_with
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from tests.tolerance import relative_error

WINDOW = 24


def window_mask(n: int, device: torch.device) -> Tensor:
    q, kv = torch.arange(n, device=device)[:, None], torch.arange(n, device=device)[None]
    return (kv <= q) & (q - kv < WINDOW)


class Attention(nn.Module):
    """Sliding-window grouped-query attention, as a user would write it."""

    def __init__(self, dim: int = 48, heads: int = 6, kv_heads: int = 2, eager: bool = False):
        super().__init__()
        self.heads, self.kv_heads, self.width, self.eager = heads, kv_heads, dim // heads, eager
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.width)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        split = [h * self.width for h in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (
            t.view(b, n, -1, self.width).transpose(1, 2) for t in self.qkv(x).split(split, -1)
        )
        mask = window_mask(n, x.device)
        if self.eager:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.width)
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(b, n, -1))


class Stack(nn.Module):
    """Two attentions, optionally under activation checkpointing."""

    def __init__(self, checkpointed: bool = False, eager: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(eager=eager) for _ in range(2)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed:
                x = x + checkpoint(layer, x, use_reentrant=False)
            else:
                x = x + layer(x)
        return x


def outputs_and_grads(fn: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad(set_to_none=True)
    y = fn(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in module.parameters())]


def assert_runs_close_as_eager(
    ours: list[Tensor], eager: list[Tensor], truth: list[Tensor]
) -> None:
    """The half-precision rule on the output and on the vector of all gradients."""
    assert relative_error(ours[0], truth[0]) <= 1.1 * relative_error(eager[0], truth[0])
    mine, theirs, exact = (torch.cat([g.flatten() for g in r[1:]]) for r in (ours, eager, truth))
    assert relative_error(mine, exact) <= 1.1 * relative_error(theirs, exact)


def rewritten_calls(fn: Callable[..., object], *args: object) -> int:
    return sum(site.rewritten for site in sparse_compile.explain(fn, *args).sites)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_equals_eager(checkpointed: bool, eager: bool) -> None:
    model, x = Stack(checkpointed, eager), torch.randn(2, 100, 48)
    assert rewritten_calls(model, x) == 2
    compiled = torch.compile(model, backend="sparse_compile", fullgraph=True)
    for ours, theirs in zip(
        outputs_and_grads(compiled, model, x), outputs_and_grads(model, model, x), strict=True
    ):
        assert relative_error(ours, theirs) <= 1e-5


def test_no_grad_and_module_entry_point() -> None:
    model, x = Stack(), torch.randn(1, 77, 48)
    with torch.no_grad():
        compiled = torch.compile(model, backend=sparse_compile.backend)
        assert relative_error(compiled(x), model(x)) <= 1e-5
    assert "sparse_compile" in torch._dynamo.list_backends()


def test_autocast_matches_dense_autocast() -> None:
    model, x = Stack(), torch.randn(2, 64, 48)
    truth = outputs_and_grads(model.double(), model, x.double())
    model.float()

    def cast(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return fn(x)

        return run

    eager = outputs_and_grads(cast(model), model, x)
    compiled = torch.compile(cast(model), backend="sparse_compile", fullgraph=True)
    ours = outputs_and_grads(compiled, model, x)
    around = outputs_and_grads(cast(torch.compile(model, backend="sparse_compile")), model, x)
    assert rewritten_calls(cast(model), x) == 2
    assert_runs_close_as_eager(ours, eager, truth)
    assert_runs_close_as_eager(around, eager, truth)


def test_one_compile_serves_ten_lengths() -> None:
    model = Stack()
    counter = CompileCounterWithBackend("sparse_compile")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for n in (100, 128, 200, 257, 311, 440, 512, 640, 777, 1000):
        x = torch.randn(1, n, 48)
        for ours, theirs in zip(
            outputs_and_grads(compiled, model, x), outputs_and_grads(model, model, x), strict=True
        ):
            assert relative_error(ours, theirs) <= 1e-5, n
    assert counter.frame_count == 1


class Padded(nn.Module):
    """A mask that reads a buffer: the values may change at any time."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(n, dtype=torch.bool))

    def forward(self, q: Tensor) -> Tensor:
        n = q.shape[2]
        mask = window_mask(n, q.device) & self.keep[None, :n]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_changing_a_mask_buffer_changes_the_result() -> None:
    model, q = Padded(80), torch.randn(1, 2, 80, 16)
    counter = CompileCounterWithBackend("sparse_compile")
    compiled = torch.compile(model, backend=counter)
    assert rewritten_calls(model, q) == 1
    first = compiled(q)
    assert relative_error(first, model(q)) <= 1e-5
    model.keep[10:40] = False
    second = compiled(q)
    assert relative_error(second, model(q)) <= 1e-5
    assert not torch.allclose(first, second)
    model.keep = torch.arange(80) % 3 != 0
    assert relative_error(compiled(q), model(q)) <= 1e-5
    assert counter.frame_count == 1


def attend(mask: Tensor | None = None, **kwargs: object) -> Callable[..., Tensor]:
    return lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=mask, **kwargs)


def _weights_returned(q: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ q.mT).masked_fill(~window_mask(q.shape[2], q.device), -math.inf).softmax(-1)
    return weights @ q, weights


def _added_bool(q: Tensor) -> Tensor:
    return (q @ q.mT + window_mask(q.shape[2], q.device)).softmax(-1) @ q


def _wrong_axis(q: Tensor) -> Tensor:
    scores = (q @ q.mT).masked_fill(~window_mask(q.shape[2], q.device), -1e30)
    return scores.softmax(-2) @ q


def _head_mixing(q: Tensor) -> Tensor:
    mix = torch.ones(q.shape[1], q.shape[1])
    scores = torch.einsum("bhqk,hg->bgqk", q @ q.mT, mix)
    return scores.masked_fill(~window_mask(q.shape[2], q.device), -math.inf).softmax(-1) @ q


def _sigmoid(q: Tensor) -> Tensor:
    scores = (q @ q.mT).masked_fill(~window_mask(q.shape[2], q.device), -math.inf)
    return scores.sigmoid() @ q


def _masked_after_softmax(q: Tensor) -> Tensor:
    return ((q @ q.mT).softmax(-1) * window_mask(q.shape[2], q.device)) @ q


def _masked_before_the_softcap(q: Tensor) -> Tensor:
    scores = (q @ q.mT).masked_fill(~window_mask(q.shape[2], q.device), -math.inf)
    return (torch.tanh(scores / 5) * 5).softmax(-1) @ q


def _scores_used_twice(q: Tensor) -> Tensor:
    scores = q @ q.mT
    masked = scores.masked_fill(~window_mask(q.shape[2], q.device), -math.inf)
    return masked.softmax(-1) @ q + scores.mean()


def _dropout(q: Tensor) -> Tensor:
    mask = window_mask(q.shape[2], q.device)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.5)


def _finite_fill(q: Tensor) -> Tensor:
    mask = window_mask(q.shape[2], q.device)
    return (q @ q.mT).masked_fill(~mask, -100.0).softmax(-1) @ q


def _distance_bias(q: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return (q @ q.mT - (i[:, None] - i[None]).abs() * 0.1).softmax(-1) @ q


def _weights_changed(q: Tensor) -> Tensor:
    weights = (q @ q.mT).masked_fill(~window_mask(q.shape[2], q.device), -math.inf).softmax(-1)
    weights[..., 0] = 0
    return weights @ q


NEAR_MISSES = [
    _weights_returned,
    _added_bool,
    _wrong_axis,
    _head_mixing,
    _sigmoid,
    _masked_after_softmax,
    _masked_before_the_softcap,
    _scores_used_twice,
    _finite_fill,
    _weights_changed,
]


@pytest.mark.parametrize("program", [_dropout, _distance_bias], ids=["dropout", "distance bias"])
def test_what_was_a_near_miss_is_rewritten(program: Callable[[Tensor], object]) -> None:
    q = torch.randn(1, 2, 60, 16)
    report = explain_with({"decide": "sparse"})(program, q)
    assert all(site.rewritten for site in report.sites), str(report)


@pytest.mark.parametrize("program", NEAR_MISSES, ids=lambda f: f.__name__.strip("_"))
def test_near_miss_is_left_alone(program: Callable[[Tensor], object]) -> None:
    seen: list[bool] = []

    def recorder(gm: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        before = str(gm.graph)
        pipeline.run(gm, inputs, Options(decide="sparse"))
        seen.append(before == str(gm.graph))
        return gm.forward

    q = torch.randn(1, 2, 60, 16)
    torch.compile(program, backend=recorder, fullgraph=True)(q)
    assert seen == [True]
    report = sparse_compile.explain(program, q)
    assert not any(site.rewritten for site in report.sites)
    # A sigmoid is no softmax attention at all; everything else that looks like one gets a reason.
    assert all(site.reason for site in report.sites)
    assert report.sites or program is _sigmoid


def test_a_head_dim_beyond_the_kernels_is_left_alone() -> None:
    def program(q: Tensor) -> Tensor:
        mask = window_mask(q.shape[2], q.device)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q = torch.randn(1, 2, 40, 300)
    (site,) = sparse_compile.explain(program, q).sites
    assert not site.rewritten
    assert "300" in site.reason
    compiled = torch.compile(program, backend="sparse_compile")
    assert relative_error(compiled(q), program(q)) <= 1e-5


def test_mask_mutated_after_its_use() -> None:
    def program(q: Tensor) -> tuple[Tensor, Tensor]:
        mask = window_mask(q.shape[2], q.device)
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        mask[:, :5] = True
        return out, F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q = torch.randn(1, 2, 60, 16)
    compiled = torch.compile(program, backend="sparse_compile", fullgraph=True)
    for ours, theirs in zip(compiled(q), program(q), strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_no_quadratic_tensor_in_the_compiled_program() -> None:
    def largest_allocation(fn: Callable[[Tensor], Tensor], x: Tensor) -> int:
        fn(x).sum().backward()
        with torch.profiler.profile(profile_memory=True) as profile:
            fn(x).sum().backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    n = 3001
    model, x = Attention(dim=32, heads=2, kv_heads=1), torch.randn(1, n, 32)
    compiled = torch.compile(model, backend="sparse_compile")
    assert largest_allocation(model, x) >= n * n
    assert largest_allocation(compiled, x) < n * n / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_rule(dtype: torch.dtype) -> None:
    model, x = Stack(), torch.randn(2, 90, 48)
    model.to(dtype)
    rounded = x.to(dtype)
    exact_model = Stack().double()
    exact_model.load_state_dict(model.state_dict())
    truth = outputs_and_grads(exact_model, exact_model, rounded.double())
    eager = outputs_and_grads(model, model, rounded)
    compiled = torch.compile(model, backend="sparse_compile")
    ours = outputs_and_grads(compiled, model, rounded)
    assert_runs_close_as_eager(ours, eager, truth)


def test_unknown_option_suggests_the_right_one() -> None:
    with pytest.raises(UnknownOption, match="Did you mean 'finite_fill'"):
        Options.parse({"finite_fil": "exact"})
    with pytest.raises(UnknownOption, match=r"Did you mean 'inductor\.max_autotune'"):
        Options.parse({"inductor": {"max_autotun": True}})
    compiled = torch.compile(attend(), backend="sparse_compile", options={"blok": (64, 64)})
    with pytest.raises(Exception, match="Did you mean 'block'"):
        compiled(torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize(
    "bad", [{"block": (100, 128)}, {"dense": "maybe"}, {"verify_bytes": 1.5}, {"inductor": 3}]
)
def test_bad_option_values_say_what_to_write(bad: dict[str, object]) -> None:
    with pytest.raises(BadOption, match="Write"):
        Options.parse(bad)


_TWO_PROCESSES = """
    import json, sys, torch
    from torch._dynamo.utils import counters
    from tests.backend.test_backend import Attention
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(1, 103, 48)
    torch.compile(model, backend="sparse_compile")(x).sum().backward()
    print(json.dumps({**counters["aot_autograd"], **counters["inductor"]}))
"""


@pytest.mark.slow
def test_second_process_hits_both_caches() -> None:
    """In the folder of all tests, whose headers are compiled; no other test has this length."""
    runs = []
    for _ in range(2):
        command = [sys.executable, "-c", textwrap.dedent(_TWO_PROCESSES)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    assert runs[0]["autograd_cache_miss"] == 1
    assert runs[1]["autograd_cache_hit"] == 1
    assert runs[1]["fxgraph_cache_hit"] >= 1


def several_masks() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model whose masks have many terms, so that an unstable order would show."""

    class Several(nn.Module):
        def forward(self, q: Tensor, documents: Tensor) -> Tensor:
            i = torch.arange(q.shape[2])
            same = documents[:, None, :, None] == documents[:, None, None, :]
            near = (i[:, None] - i[None]).abs() < 9
            prefix = (i[None] < 4) | (i[:, None] % 7 == 3)
            for mask in (same & near, same & (near | prefix), (i[None] <= i[:, None]) & prefix):
                q = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            return q

    return Several(), (torch.randn(1, 2, 64, 16), torch.arange(64)[None] // 10)


@pytest.mark.slow
def test_two_processes_generate_identical_kernel_files(tmp_path, monkeypatch) -> None:
    """This one, and one whose sets and dictionaries have another order."""
    arguments = ["code", "tests.backend.test_backend:several_masks"]
    arguments += ["--options", '{"decide": "sparse"}']
    folders = [tmp_path / name for name in ("ours", "theirs")]
    with monkeypatch.context() as patch:
        patch.setenv("SPARSE_COMPILE_CACHE_DIR", str(folders[0]))
        assert main(arguments) == 0
    env = {
        **os.environ,
        "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2",
        "SPARSE_COMPILE_CACHE_DIR": str(folders[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "sparse_compile.cli", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = ({path.name: path.read_bytes() for path in f.iterdir()} for f in folders)
    assert len(ours) == 3
    assert ours == theirs
