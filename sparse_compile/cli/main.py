"""The command line: ``sparse-compile demo | explain | code | doctor``."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from sparse_compile import __version__
from sparse_compile.cli import factory
from sparse_compile.errors import BadOption, SparseCompileError

_FACTORY = "module:function that returns a model, (model, args) or (model, args, kwargs)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 1 that something is not as it should be, 2 a wrong call."""
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.run
        return command(arguments)
    except SparseCompileError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # piped into head, which has seen enough
        sys.stderr.close()
        return 0
    except SystemExit as stop:  # argparse has printed its help or its error
        return int(stop.code or 0)


class _Parser(argparse.ArgumentParser):
    """Says which command was probably meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong and self.prog == "sparse-compile":
            near = difflib.get_close_matches(wrong[1], _COMMANDS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Write one of {', '.join(_COMMANDS)}."
            message = f"unknown command {wrong[1]!r}. {hint}"
        self.exit(2, f"{self.prog}: {message}\nSee {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparse-compile", description="Attention that costs what its mask says it should."
    )
    parser.add_argument("--version", action="version", version=f"sparse_compile {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, (add_arguments, run) in _COMMANDS.items():
        summary = (run.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.set_defaults(run=run)
    return parser


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=_positive, help="sequence length (8192 tokens; 16384 on a GPU)")
    parser.add_argument("--steps", type=_positive, default=3, help="timed training steps (3)")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run (auto)"
    )


def _demo(arguments: argparse.Namespace) -> int:
    """Compile a decoder in plain PyTorch, check it against eager, time it against Inductor."""
    from sparse_compile.cli import demo

    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        result = demo.run(arguments.n, arguments.steps, arguments.device)
    print(json.dumps(demo.to_dict(result)) if arguments.json else f"\n{result.summary()}")
    return 0 if result.correct else 1


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", help=_FACTORY)
    parser.add_argument(
        "--options", type=_options, help="""options of the backend, as in '{"dense": "rewrite"}'"""
    )


def _explain(arguments: argparse.Namespace) -> int:
    """Print which attention of a model is rewritten, which is not, and why."""
    call = factory.load(arguments.factory)
    from sparse_compile.inspect.explain import explain_with

    report = explain_with(arguments.options)(call.model, *call.args, **call.kwargs)
    print(report.to_json() if arguments.json else report)
    return 0


def _code_arguments(parser: argparse.ArgumentParser) -> None:
    _explain_arguments(parser)
    parser.add_argument("--site", type=int, help="only this attention, numbered as by explain")
    parser.add_argument("--arch", type=_arch, help="GPU to generate for (the one here, else sm_90)")


def _code(arguments: argparse.Namespace) -> int:
    """Print the Triton source generated for a model's attention. Needs no GPU."""
    call = factory.load(arguments.factory)
    from sparse_compile.inspect import kernels

    found = kernels.of_call(call.model, call.args, call.kwargs, arguments.options, arguments.arch)
    if arguments.site is not None:
        if not 0 <= arguments.site < len(found):
            last = f"the last is {len(found) - 1}" if found else "the model has none"
            return _complain(f"there is no attention {arguments.site}; {last}")
        found = (found[arguments.site],)
    shown = list({kernel.path: kernel for kernel in found if kernel.source}.values())
    if not shown:
        reasons = "".join(f"\n  [{kernel.site}] {kernel.reason}" for kernel in found)
        return _complain(f"no kernel is generated for this model{reasons}")
    if arguments.json:
        print(json.dumps([asdict(kernel) for kernel in shown]))
    else:
        print("\n\n".join(f"# {kernel.path}\n{kernel.source}" for kernel in shown))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Check that everything compiled models need is here, and say what to do if not."""
    from sparse_compile.cli.doctor import Check, examine_machine

    checks: list[Check] = []
    for check in examine_machine():
        checks.append(check)
        if not arguments.json:
            print(check, flush=True)
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks]))
    return 0 if all(check.ok for check in checks) else 1


_COMMANDS: dict[str, Any] = {
    "demo": (_demo_arguments, _demo),
    "explain": (_explain_arguments, _explain),
    "code": (_code_arguments, _code),
    "doctor": (lambda parser: None, _doctor),
}


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise BadOption("--options", text, """a JSON object, as in '{"dense": "rewrite"}'""")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _arch(text: str) -> str:
    if not re.fullmatch(r"sm_\d{2,3}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no GPU architecture; write for example sm_90"
        )
    return text


def _complain(message: str) -> int:
    print(f"sparse-compile: {message}", file=sys.stderr)
    return 2
