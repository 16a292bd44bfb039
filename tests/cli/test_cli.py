"""The command line: what it prints; a wrong call gets one clear line and no traceback."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_compile.cli import main
from sparse_compile.cli.doctor import Check, examine_machine

FACTORIES = """
import torch
from torch import nn
from tests.inspect.test_report import TwoKinds, example


def build():
    return TwoKinds(), (example(),)


def with_keywords():
    return TwoKinds(), (), {"x": example()}


def only_dense():
    return nn.TransformerEncoderLayer(8, 2, 8), (torch.ones(1, 4, 8),)


class NoArguments(nn.Module):
    def forward(self):
        return torch.ones(3)


def only_model():
    return NoArguments()


def three():
    return 3


def needs(x):
    return x


def forgot():
    return nn.Linear(2, 2)


def bare():
    return nn.Linear(2, 2), torch.ones(1, 2)


def listed():
    return nn.Linear(2, 2), (torch.ones(1, 2),), [1]


def four():
    return nn.Linear(2, 2), (), {}, None


def breaks():
    raise ValueError("size must be even")


value = 3
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own folder, with a module that is not installed."""
    (tmp_path / "zoo.py").write_text(FACTORIES)
    (tmp_path / "torn.py").write_text("import no_such_library\n")
    (tmp_path / "syntax.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *sys.path])
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path / "kernels"))
    for name in ("zoo", "torn", "syntax"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("factory", ["build", "with_keywords"])
def test_explain_prints_the_report(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"zoo:{factory}"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 attentions rewritten" in out
    assert "[0] local, " in out


def test_explain_a_model_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "zoo:only_model"]) == 0
    assert "no attention found" in capsys.readouterr().out


def test_explain_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "zoo:build", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [site["rewritten"] for site in read["sites"]] == [True, False]


def test_explain_with_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "zoo:build", "--options", '{"dense": "rewrite"}']) == 0
    assert "2 of 2 attentions rewritten" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("factory", "parts"),
    [
        ("zoo", ["'zoo' names no factory", "zoo:build"]),
        ("", ["'' names no factory", "package.module:build"]),
        (":build", ["':build' names no factory"]),
        ("zo:build", ["no module named 'zo'", "current directory"]),
        ("zoo.py:build", ["no module named 'zoo.py'", "without .py"]),
        ("no.such.module:build", ["no module named 'no'"]),
        ("torn:build", ["importing 'torn' raised", "no_such_library", 'python -c "import torn"']),
        ("syntax:build", ["importing 'syntax' raised SyntaxError"]),
        ("zoo:biuld", ["no 'biuld'", "Did you mean zoo:build?"]),
        ("zoo:xyzzyx", ["no 'xyzzyx'", "Its functions: bare, breaks, build"]),
        ("zoo:value", ["zoo:value is an int, not a function"]),
        ("zoo:needs", ["missing a required argument: 'x'", "defaults"]),
        ("zoo:three", ["returned an int, not a model", "(model, args, kwargs)"]),
        ("zoo:four", ["not a model", "(model, args, kwargs)"]),
        ("zoo:bare", ["the args", "a Tensor", "(model, (x,))"]),
        ("zoo:listed", ["the kwargs", "a list", "{'mask': mask}"]),
        ("zoo:forgot", ["missing a required argument: 'input'", "(model, (x,))"]),
        ("zoo:breaks", ["raised ValueError: size must be even", "import zoo as m; m.breaks()"]),
    ],
)
@pytest.mark.parametrize("command", ["explain", "code"])
def test_bad_factories(
    command: str, factory: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, factory]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparse_compile: ")
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demmo"], ["unknown command 'demmo'", "Did you mean demo?"]),
        (["xyzzy"], ["unknown command 'xyzzy'", "demo, explain, code, doctor"]),
        ([], ["command"]),
        (["explain"], ["factory"]),
        (["demo", "--n", "0"], ["'0' is not a positive number"]),
        (["demo", "--n", "many"], ["'many' is not a positive number"]),
        (["demo", "--device", "tpu"], ["'tpu'"]),
        (["code", "zoo:build", "--arch", "hopper"], ["'hopper' is no GPU architecture", "sm_90"]),
        (["code", "zoo:build", "--site", "7"], ["no attention 7", "the last is 1"]),
        (["code", "zoo:build", "--site", "1"], ["no kernel is generated", "causal"]),
        (["explain", "zoo:build", "--options", "dense"], ["--options", "a JSON object"]),
        (["explain", "zoo:build", "--options", "[1]"], ["--options", "a JSON object"]),
        (["explain", "zoo:build", "--options", '{"dens": 1}'], ["Did you mean 'dense'?"]),
        (["explain", "zoo:build", "--options", '{"dense": 1}'], ["'sdpa' or 'rewrite'"]),
    ],
)
def test_bad_calls(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize("command", [[], ["demo"], ["explain"], ["code"], ["doctor"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: sparse-compile")
    if command:
        assert "--json" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparse_compile 0.")


def test_code_prints_the_file_that_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["code", "zoo:build", "--arch", "sm_80"]) == 0
    first, source = capsys.readouterr().out.split("\n", 1)
    path = Path(first.removeprefix("# "))
    assert path.read_text().strip() == source.strip()
    ast.parse(source)
    assert "@triton.jit" in source


def test_code_json_and_site(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["code", "zoo:build", "--site", "0", "--json"]) == 0
    (kernel,) = json.loads(capsys.readouterr().out)
    assert kernel["site"] == 0
    assert kernel["name"] in kernel["path"]
    assert Path(kernel["path"]).read_text() == kernel["source"]


def test_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert code == 0, checks
    assert set(checks) >= {"torch", "GPU", "entry point", "kernel cache", "Inductor on CPU"}


def test_doctor_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr("torch.compiler.list_backends", lambda: ["inductor"])
    made = iter(examine_machine())
    problems = []
    for check in made:
        if check.name == "kernel generation":
            break  # what follows compiles, and is tested above
        problems += [check] if not check.ok else []
    assert [check.name for check in problems] == ["entry point", "kernel cache"]
    assert "pip install" in problems[0].advice
    assert "SPARSE_COMPILE_CACHE_DIR" in str(problems[1]).splitlines()[1]


def test_doctor_line() -> None:
    assert str(Check("torch", True, "2.13.0")) == "ok       torch             2.13.0"
    line, advice = str(Check("torch", False, "1.0", "pip install torch")).splitlines()
    assert line.startswith("problem  torch")
    assert advice.strip() == "pip install torch"


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparse_compile.cli", "explian"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "sparse-compile: unknown command 'explian'. Did you mean explain?"
    )
