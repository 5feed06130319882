"""Whole runs of the product, each in a fresh process on one thread, several side by side."""

import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import client_app
import server_app
from fedbt_app.config import RunConfig, defaults
from fedbt_app.wire.local_grid import LocalGrid, simulated

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One run to do: `values` are changes to the default configuration, by dashed keys."""

    key: tuple[Any, ...]
    values: dict[str, Any]
    folder: Path
    clients: int = 4


def run_all(
    runs: Sequence[Job], processes: int, work: Callable[[Job], Result]
) -> Iterator[tuple[Job, Result]]:
    """Do `work` on all and yield each with its result, as they finish; a failure stops the rest."""
    # Many clients in turn in one process: keep freed memory. Handed back, the dense gradient of the
    # embeddings would be paged in anew each step, a tenth of BERT-FL's time.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
        max_tasks_per_child=1,
    )
    with pool:
        waiting: dict[Future[Result], Job] = {pool.submit(work, run): run for run in runs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: killed, it cannot tell."""

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def do(run: Run, grid: type[LocalGrid] = LocalGrid) -> dict[str, Any]:
    """Do one run in this process and return its report; its model stays, the clients' pools go."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    pools = run.folder / "pools"
    folders = {"output-dir": str(run.folder), "pool-dir": str(pools)}
    values = {**defaults(), **folders, **run.values}
    nodes = grid(client_app.app, values, simulated(run.clients))
    try:
        return server_app.run(nodes, RunConfig.load(values))
    finally:
        shutil.rmtree(pools, ignore_errors=True)
