"""Whole models prepared side by side, each peer in a process of its own, and timed one at a time.

Compiling takes most of the time of such a comparison, and needs the GPU for a few calls only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import torch

from benchmarks import fp32_attention
from benchmarks.attempts import Budget, attempted
from benchmarks.turns import Turns
from benchmarks.whole_models import (
    Problem,
    Row,
    Setting,
    best_way,
    row_of,
    stands_aside,
    truth_of,
)

#: Makes a problem; processes that are started can be told of it.
Maker = Callable[[], Problem]


@dataclass(frozen=True)
class _Pool:
    """Processes for one call each, some at a time: what one leaves on the GPU ends with it."""

    slots: BoundedSemaphore

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """What a function of a module returns; None if its process died."""
        context = get_context("spawn")
        with self.slots:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(sender, function, *given))
            process.start()
            sender.close()
            try:
                return receiver.recv()
            except EOFError:
                return None
            finally:
                process.join()


def _answer(sender: connection.Connection, function: Callable[..., Any], *given: Any) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # there are processes enough
    fp32_attention.register()
    sender.send(function(*given))


def compared_together(
    makers: dict[str, Maker],
    setting: Setting,
    jobs: int,
    note: Callable[[Row], None] = lambda row: None,
) -> Iterator[tuple[Problem, list[Row]]]:
    """Problems and the rows of their peers, as soon as those of a problem are known.

    Args:
        makers: of the problems, by name.
        setting: how they are measured.
        jobs: processes at a time.
        note: gets each row when it is known.
    """
    pool = _Pool(BoundedSemaphore(jobs))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(makers)) as threads:
        if not setting.turns.path:
            setting = replace(setting, turns=Turns(str(Path(folder, "turns"))))
        running = [
            threads.submit(_problem, pool, make, setting, str(Path(folder, name)), note)
            for name, make in makers.items()
        ]
        for done in as_completed(running):
            yield done.result()


def _problem(
    pool: _Pool, make: Maker, setting: Setting, truth: str, note: Callable[[Row], None]
) -> tuple[Problem, list[Row]]:
    """A problem: its truth, then all peers that stand for themselves, then those that stand in."""
    problem = make()
    pool.call(_keep_truth, make, setting, truth)
    rows: dict[int, Row] = {}

    def measured(number: int) -> None:
        peer = problem.peers[number]
        died: Row = {"model": problem.name, "peer": peer.name, "no_forward": "its process died"}
        # Each way in a process of its own: what fails on a GPU may leave nothing that works.
        rows[number] = best_way(
            peer,
            lambda one: (
                pool.call(_measured, make, number, peer.ways.index(one.ways[0]), setting, truth)
                or died
            ),
            lambda: True,
        )
        note(rows[number])

    numbers = range(len(problem.peers))
    with ThreadPoolExecutor(len(numbers) or 1) as threads:
        list(threads.map(measured, [n for n in numbers if not problem.peers[n].after]))
    for number in numbers:
        if number not in rows and not stands_aside(problem.peers[number], list(rows.values())):
            measured(number)
    return problem, [rows[number] for number in sorted(rows)]


def _keep_truth(make: Maker, setting: Setting, file: str) -> None:
    """Compute the truth of a problem, or why that is not possible, and write it to a file."""
    problem = make()
    # One after the other, but beside peers that are prepared: a truth that waited for all of these
    # would let its own peers wait.
    turns = setting.turns
    one_by_one = Turns(f"{turns.path}.truths")
    with one_by_one.alone(), turns.shared():
        found = attempted(lambda: truth_of(problem, setting), Budget(setting.seconds))
    if found[1] == "out of memory":  # others may have held it
        with turns.alone():
            found = attempted(lambda: truth_of(problem, setting), Budget(setting.seconds))
    torch.save(found, file)


def _measured(make: Maker, number: int, way: int, setting: Setting, file: str) -> Row:
    """A peer of a problem and one of its ways, by their numbers."""
    truth, why = None, "its process died"
    if Path(file).exists():
        truth, why = torch.load(file, weights_only=False)
    problem, budget = make(), Budget(setting.seconds)
    peer = problem.peers[number]
    peer = replace(peer, ways=(peer.ways[way],))
    return row_of(problem, peer, setting, truth, why, budget)
