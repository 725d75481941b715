"""Processes that form a process group (gloo) and run functions for the tests; they are started once and serve all of them.

They end without finalizing Python, as multiprocessing's children do: torch's gloo threads may still hold tensors that Python has seen,
and letting go of one while the interpreter finalizes ends the process by SIGABRT (DDP, torch 2.13: one exit in ten).
"""

from __future__ import annotations

import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp

#: Processes are forked from one that has imported what takes seconds to import, and has computed nothing.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["peft", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "lowrank_kernels"])

#: Seconds that a rank waits for the others, who may still be importing on a busy machine. One that raises ends them all at once.
TIMEOUT = 240


def _serve(rank: int, world: int, meeting: str, tasks: Any, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    # They meet by a file: a port that was free may be taken by then.
    store = torch.distributed.FileStore(meeting, world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            answers.put((rank, function(rank, world, *arguments), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class Ranks:
    """``ranks(function, *arguments, world=2)`` runs ``function(rank, world, *arguments)`` on every rank; returns the results by rank."""

    def __init__(self) -> None:
        self._groups: dict[int, tuple[list[Any], list[Any], Any]] = {}
        self._folder = tempfile.TemporaryDirectory()

    def _group(self, world: int) -> tuple[list[Any], list[Any], Any]:
        if world not in self._groups:
            tasks, answers = [CONTEXT.Queue() for _ in range(world)], CONTEXT.Queue()
            meeting = tempfile.mktemp(dir=self._folder.name)
            arguments = [(rank, world, meeting, tasks[rank], answers) for rank in range(world)]
            processes = [CONTEXT.Process(target=_serve, args=a, daemon=True) for a in arguments]
            for process in processes:
                process.start()
            self._groups[world] = processes, tasks, answers
        return self._groups[world]

    def __call__(self, function: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
        processes, tasks, answers = self._group(world)
        for inbox in tasks:
            inbox.put((function, arguments))
        results: dict[int, Any] = {}
        for _ in processes:
            try:
                rank, result, error = answers.get(timeout=TIMEOUT)
            except queue.Empty:
                rank, result, error = -1, None, "no answer"
            if error:  # the others may be waiting for it: end them all, the next call starts new ones
                for process in processes:
                    process.kill()
                del self._groups[world]
                raise AssertionError(f"rank {rank}: {error}")
            results[rank] = result
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        """End the processes."""
        for processes, tasks, _ in self._groups.values():
            for inbox in tasks:
                inbox.put(None)
            for process in processes:
                process.join(timeout=20)
                if process.is_alive():
                    process.kill()
        self._folder.cleanup()
