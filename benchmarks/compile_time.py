"""How long the first training step of a model takes to compile, against Inductor, from cold caches.

python -m benchmarks.compile_time --out benchmarks/results/compile_time.json
python -m benchmarks.compile_time --survey --threads 1 --repeats 1 --keep --out FILE

The second measures the models of the survey, which are smaller, instead of those of this file, and
goes on where an interrupted run ended.

Every measurement is a process of its own with empty caches; backends alternate, so that a busy
machine disturbs both alike. Processor seconds, which count the compilers that Inductor starts, say
more than the wall clock where other programs run. ``explain`` is timed in its own process, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.environment import settings, write_json
from benchmarks.models.exactness import values
from benchmarks.models.zoo import ENTRIES, version

Row = dict[str, Any]
#: What one process measures.
BACKENDS = ("inductor", "sparse_compile")
EXPLAIN = "explain"

_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 64}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, num_hidden_layers=8, use_cache=False),
    "bert": lambda: transformers.BertConfig(**_TEXT, **_NO_DROPOUT, num_hidden_layers=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED, num_hidden_layers=12, use_cache=False
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_TEXT,
        **dict.fromkeys(("cls_token_id", "bos_token_id"), 1),
        **dict.fromkeys(("sep_token_id", "eos_token_id"), 2),
        num_hidden_layers=8,
        local_attention=64,
    ),
    "swin": lambda: transformers.SwinConfig(
        embed_dim=48, depths=[2, 2, 2, 2], num_heads=[3, 6, 12, 24], drop_path_rate=0.0
    ),
}


def model_of(name: str) -> nn.Module:
    """A model with random weights, in training mode."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(_CONFIGS[name](), attn_implementation="sdpa")
    assert isinstance(model, nn.Module)
    return model.train()


def inputs_of(name: str) -> dict[str, Tensor]:
    """Two images, or two texts of 256 tokens of which one is padded."""
    torch.manual_seed(1)
    if name == "swin":
        return {"pixel_values": torch.randn(2, 3, 224, 224)}
    attended = torch.ones(2, 256, dtype=torch.long)
    attended[1, 200:] = 0
    return {"input_ids": torch.randint(3, 1000, (2, 256)), "attention_mask": attended}


def step(model: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    model(**inputs)[0].float().square().mean().backward()


def session_seconds() -> float:
    """Processor seconds of every process of this session, with those that ended."""
    ticks, session = 0, os.getsid(0)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # It ended meanwhile.
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def subject(name: str, survey: bool) -> tuple[nn.Module, dict[str, Any], Callable[[Any], Any]]:
    """A model in training mode, what it is called with, and a step of the model compiled."""
    if not survey:
        model, inputs = model_of(name), inputs_of(name)
        return model, inputs, partial(step, inputs=inputs)
    entry = ENTRIES[name]
    model = entry.build(entry.implementations[-1], False).train()
    inputs = entry.inputs("right" if "right" in entry.paddings else "none")
    return model, inputs, lambda call: values(call, model, inputs, True)


def measure(name: str, what: str, survey: bool = False) -> Row:
    """Seconds of the first training step, or of ``explain``, in this process."""
    model, inputs, stepped = subject(name, survey)
    row: Row = {"model": name, "what": what}
    wall, cpu = time.perf_counter(), session_seconds()
    if what == EXPLAIN:
        import sparse_compile

        report = sparse_compile.explain(model, **inputs)
        row |= {"sites": len(report.sites), "rewritten": sum(s.rewritten for s in report.sites)}
    else:
        stepped(torch.compile(model, backend=what))
    return row | {"wall_s": time.perf_counter() - wall, "cpu_s": session_seconds() - cpu}


def in_fresh_process(name: str, what: str, threads: int, survey: bool = False) -> Row:
    """:func:`measure` in a process and a session of its own, without anything cached."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "benchmarks.compile_time", "--measure", name, what]
        command += ["--survey"] * survey
        done = subprocess.run(
            command,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            start_new_session=True,
        )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def summary(rows: Sequence[Row]) -> list[Row]:
    """For each model the medians of both backends, their ratio, and the median of ``explain``."""
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        line: Row = {"model": name}
        for clock in ("wall_s", "cpu_s"):
            for what in (*BACKENDS, EXPLAIN):
                times = [r[clock] for r in rows if (r["model"], r["what"]) == (name, what)]
                line[f"{what}_{clock}"] = statistics.median(times)
            ours, theirs = line[f"sparse_compile_{clock}"], line[f"inductor_{clock}"]
            line[f"ratio_{clock[:-2]}"] = ours / theirs
        found.append(line)
    return found


def printed(line: Row) -> str:
    times = "  ".join(
        f"{what} {line[f'{what}_wall_s']:6.1f} s ({line[f'{what}_cpu_s']:6.1f} s cpu)"
        for what in (*BACKENDS, EXPLAIN)
    )
    ratio = f"ratio {line['ratio_wall']:.2f} ({line['ratio_cpu']:.2f} cpu)"
    return f"{line['model']:10}  {times}  {ratio}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="names of models; all")
    parser.add_argument("--survey", action="store_true", help="the models of the survey")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "WHAT"), help="in this process")
    parser.add_argument("--out", help="path of the JSON file")
    parser.add_argument(
        "--keep", action="store_true", help="what the file has, and measure the rest"
    )
    return parser.parse_args(argv)


def names(args: argparse.Namespace) -> list[str]:
    """Of the models to measure."""
    every = [n for n in ENTRIES if version(ENTRIES[n].package)] if args.survey else list(_CONFIGS)
    unknown = set(args.only or ()) - set(every)
    if unknown:
        raise SystemExit(f"unknown models {sorted(unknown)}; known are {', '.join(every)}")
    return args.only or every


def known(path: str | None) -> list[Row]:
    """The rows that a file has; none if there is no file.

    >>> known(None)
    []
    """
    if not path or not Path(path).exists():
        return []
    found: list[Row] = json.loads(Path(path).read_text())["rows"]
    return found


def main() -> None:
    args = arguments()
    if args.measure:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(*args.measure, args.survey)))
        return

    def measured(name: str) -> list[Row]:
        runs = [what for _ in range(args.repeats) for what in (*BACKENDS, EXPLAIN)]
        return [in_fresh_process(name, what, args.threads, args.survey) for what in runs]

    rows = known(args.out) if args.keep else []
    left = [name for name in names(args) if name not in {row["model"] for row in rows}]
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(measured, left):
            rows += found
            print(printed(summary(found)[0]), flush=True)
            if args.out:
                write_json(args.out, rows, summary=summary(rows), config=settings(args))


if __name__ == "__main__":
    main()
