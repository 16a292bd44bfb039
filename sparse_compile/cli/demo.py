"""The demo: one training step of a plain decoder, compiled, checked and timed against Inductor."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.cli.demo_model import Decoder, DecoderConfig, next_token_loss
from sparse_compile.inspect.explain import Examined, examine
from sparse_compile.inspect.kernels import of_call
from sparse_compile.inspect.report import Report
from sparse_compile.layout import picture

#: Relative error against eager that single precision may have.
TOLERANCE = 1e-5
#: Seconds after which no further step is timed, on a machine that is slow or busy.
_TIMING_BUDGET = 45.0
#: Prints a line at once, also into a file or a pipe.
_say = functools.partial(print, flush=True)
_CPU = DecoderConfig()
_CUDA = replace(_CPU, layers=4, hidden=1024, heads=16, kv_heads=4, window=512)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured. Errors are relative, the largest over the tensors named.

    Attributes:
        device: where it ran.
        n: sequence length.
        rewritten, sites: attentions rewritten, and found.
        output_error, gradient_error: of the compiled step, against eager in fp32.
        inductor_error: the larger of the two for ``torch.compile`` with Inductor.
        step_seconds, inductor_seconds: median time of a training step.
        kernels: files of the generated kernels.
    """

    device: str
    n: int
    rewritten: int
    sites: int
    output_error: float
    gradient_error: float
    inductor_error: float
    step_seconds: float
    inductor_seconds: float
    kernels: tuple[str, ...]

    @property
    def speed_up(self) -> float:
        """How many times faster the step is than with Inductor."""
        return self.inductor_seconds / self.step_seconds

    @property
    def correct(self) -> bool:
        """Whether everything was rewritten, and errors are rounding errors."""
        allowed = max(TOLERANCE, 1.1 * self.inductor_error)
        largest = max(self.output_error, self.gradient_error)
        return self.rewritten == self.sites > 0 and largest <= allowed

    def summary(self) -> str:
        """The last lines of the demo, for people."""
        lines = [
            f"found      {self.rewritten} of {self.sites} attentions rewritten",
            f"error      outputs {self.output_error:.1e}, gradients {self.gradient_error:.1e}, "
            f"Inductor {self.inductor_error:.1e} (largest relative, against eager in fp32)",
            f"step       {_seconds(self.step_seconds)}, torch.compile with Inductor "
            f"{_seconds(self.inductor_seconds)} (forward, loss and backward)",
            f"speed-up   {self.speed_up:.2f}x over Inductor, {self._verdict()}",
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.correct:
            return "but this run is WRONG: see the lines above"
        if self.speed_up < 0.95:
            return "which is SLOWER: at this length there is too little to skip"
        return (
            "with the same results" if self.speed_up > 1.05 else "which is no gain at this length"
        )


def run(n: int | None = None, steps: int = 3, device: str = "auto") -> DemoResult:
    """Run the demo, and print its progress line by line.

    Args:
        n: sequence length; default 8192, and 16384 on a GPU.
        steps: timed training steps of each program.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = torch.device(device).type == "cuda"
    n = n or (16384 if on_gpu else 8192)
    model, tokens = _workload(_CUDA if on_gpu else _CPU, n, device)
    _say(f"A decoder in plain PyTorch, {_describe(model, n, device)}; one training step.\n")
    sites, graphs = examine(model, (tokens,), {})
    report = Report(tuple(site.report() for site in sites), graphs)
    _say(f"{report}\n")
    _show_layout(sites)
    kernels = _show_kernels(model, tokens)
    return _measure(model, tokens, steps, report, kernels)


def _workload(config: DecoderConfig, n: int, device: str) -> tuple[Decoder, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(config)
        tokens = torch.randint(0, config.vocabulary, (1, n))
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return model.to(device, dtype), tokens.to(device)


def _describe(model: Decoder, n: int, device: str) -> str:
    config = model.config
    dtype = str(model.head.weight.dtype).removeprefix("torch.")
    return (
        f"{config.layers} layers, {config.heads} heads sharing {config.kv_heads} key heads, "
        f"window {config.window}, {n} tokens, {dtype} on {device}"
    )


def _show_layout(sites: tuple[Examined, ...]) -> None:
    for site in sites:
        layout = site.layout()
        if layout is not None:
            _say("Blocks of the score matrix (█ full, ▒ partly masked, · never visited):")
            _say(picture(layout.views[0], width=32) + "\n")
            return


def _show_kernels(model: Decoder, tokens: Tensor) -> tuple[str, ...]:
    found = of_call(model, (tokens,), {})
    paths = tuple(dict.fromkeys(kernel.path for kernel in found if kernel.path))
    if paths:
        _say("Generated Triton kernels:")
        _say("".join(f"    {path}\n" for path in paths))
    return paths


def _measure(
    model: Decoder, tokens: Tensor, steps: int, report: Report, kernels: tuple[str, ...]
) -> DemoResult:
    _say("Eager, in fp32, for the reference ...")
    exact = copy.deepcopy(model).float()
    truth = _step(exact, exact, tokens)
    programs = {
        "sparse_compile": torch.compile(model, backend="sparse_compile"),
        "Inductor": torch.compile(model),
    }
    errors = {}
    for name, program in programs.items():
        _say(f"Compiling with {name} ...")
        began = time.perf_counter()
        result = _step(program, model, tokens)
        errors[name] = _errors(result, truth)
        seconds, (output, gradient) = time.perf_counter() - began, errors[name]
        _say(f"    {seconds:.1f} s, largest error: output {output:.1e}, gradient {gradient:.1e}")
    del truth, exact
    times = _interleaved(programs, model, tokens, steps)
    return DemoResult(
        device=str(tokens.device),
        n=tokens.shape[1],
        rewritten=report.rewritten,
        sites=len(report.sites),
        output_error=errors["sparse_compile"][0],
        gradient_error=errors["sparse_compile"][1],
        inductor_error=max(errors["Inductor"]),
        step_seconds=statistics.median(times["sparse_compile"]),
        inductor_seconds=statistics.median(times["Inductor"]),
        kernels=kernels,
    )


def _step(program: Callable[..., Any], model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """One training step; the logits, then every gradient."""
    model.zero_grad(set_to_none=True)
    logits = program(tokens)
    torch.autograd.backward(next_token_loss(logits, tokens))
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _errors(result: list[Tensor], truth: list[Tensor]) -> tuple[float, float]:
    """``||result - truth|| / ||truth||``: of the output, and the largest of the gradients."""
    errors = [
        float((mine.double() - exact.double()).norm() / exact.double().norm())
        for mine, exact in zip(result, truth, strict=True)
    ]
    return errors[0], max(errors[1:])


def _interleaved(
    programs: dict[str, Callable[..., Any]], model: nn.Module, tokens: Tensor, steps: int
) -> dict[str, list[float]]:
    """Seconds of each step; the programs take turns, so that both meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(1, steps + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            _step(program, model, tokens)
            times[name].append(time.perf_counter() - began)
        line = ", ".join(f"{name} {_seconds(taken[-1])}" for name, taken in times.items())
        _say(f"Step {number} of {steps}: {line}")
        if sum(map(sum, times.values())) > _TIMING_BUDGET and number < steps:
            _say("    that took long: the remaining steps are left out")
            break
    return times


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def to_dict(result: DemoResult) -> dict[str, Any]:
    """The result with its derived fields, for JSON."""
    return {**asdict(result), "speed_up": result.speed_up, "correct": result.correct}
