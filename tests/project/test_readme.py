"""The README: what it tells people to type is what continuous integration runs, and works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sparse_compile.cli import main
from sparse_compile.options import Options
from tests.snippets import SNIPPETS, blocks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def marked(name: str) -> str:
    """The command between the markers ``<!-- ci:name -->`` and ``<!-- /ci:name -->``."""
    block = re.findall(
        rf"<!-- ci:{name} -->\n```\w*\n(.*?)\n```\n<!-- /ci:{name} -->", README, re.S
    )
    assert len(block) == 1, f"one {name} command in the README"
    return str(block[0])


def test_ci_runs_the_readme_s_own_test_command(tmp_path: Path) -> None:
    """Run .ci/run in a folder where ``python3``, and so all that follows, does nothing."""
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text(script)
    (tmp_path / "README.md").write_text(README)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").write_text(
        "#!/bin/sh\n"
        'echo "python3 $*" >> "$LOG"\n'
        "mkdir -p .venv/bin; for tool in pip python sparse-compile; do\n"
        """  printf '#!/bin/sh\\necho ".venv/bin/%s $*" >> "$LOG"\\n' $tool > .venv/bin/$tool\n"""
        "  chmod +x .venv/bin/$tool; done\n"
    )
    (tools / "python3").chmod(0o755)
    log = tmp_path / "log"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(log)}
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ran = log.read_text().splitlines()
    told = [" ".join(shlex.split(part)) for part in marked("test").split("&&")]
    assert ran[: len(told)] == told


@pytest.mark.parametrize("name", ["demo", "test"])
def test_commands_set_up_a_fresh_machine(name: str) -> None:
    parts = [shlex.split(part) for part in marked(name).split("&&")]
    assert parts[0] == ["python3", "-m", "venv", ".venv"]
    assert parts[1][:5] == [".venv/bin/pip", "install", "-c", "constraints.txt", "-e"]
    assert (ROOT / "constraints.txt").is_file()
    assert parts[-1][0] == {"demo": ".venv/bin/sparse-compile", "test": ".venv/bin/python"}[name]


def test_every_option_is_in_the_table() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", README, re.M))
    defaults = Options()
    for option in fields(Options):
        shown = table.pop(option.name)
        assert eval(shown) == getattr(defaults, option.name), option.name
    assert not table


def test_every_command_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M)
    assert set(shown) == {"demo", "explain", "code", "doctor"}
    for command in shown:
        assert f"sparse-compile {command}" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("document", SNIPPETS)
def test_python_in_documents_runs(document: str) -> None:
    """Block after block in one scope, on the CPU, each then checked for what it promises."""
    written, expected = blocks(document), SNIPPETS[document]
    assert len(written) == len(expected), "tests/snippets.py has an entry for each block"
    scope: dict[str, Any] = {}
    for number, (block, (start, check)) in enumerate(zip(written, expected, strict=True)):
        scope |= start()
        exec(compile(block, f"{document}, block {number}", "exec"), scope)
        check(scope)


def test_every_document_is_run() -> None:
    documents = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    documents -= {"docs/MODELS.md"}  # generated: tests/models
    assert {"README.md", *documents} == set(SNIPPETS)
