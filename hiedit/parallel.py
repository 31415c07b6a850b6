"""Several methods at a time on one machine: a process each, progress sent to the driver."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.managers import SyncManager
from typing import Any


class WorkerDied(Exception):
    """A process was ended from outside, as the system does when memory runs out."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    work: Callable[..., Any],
    tasks: Sequence[tuple],
    workers: int,
    on_message: Callable[[Any], None] = lambda message: None,
) -> list[Any]:
    """``work(*task, send)`` for every task in ``workers`` processes; results in the tasks' order.

    Each process gets its share of the cores: two processes of one thread do more small-matrix
    work than one process of two. ``send`` passes a picklable message to ``on_message`` here.
    A task's exception is raised here, and the tasks not yet begun are given up.

    Raises:
        WorkerDied: if a process was killed; the others are ended with it, as they are after a
            KeyboardInterrupt.
    """
    if workers <= 1:
        return [work(*task, on_message) for task in tasks]
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_end_with_the_driver)
    with manager:
        messages = manager.Queue()
        threads = max(1, cores() // workers)
        pool = ProcessPoolExecutor(workers, context, _begin, (threads,))
        others = set(multiprocessing.active_children())
        futures = [pool.submit(_call, work, task, messages) for task in tasks]
        try:
            while not all(f.done() for f in futures):
                _forward(messages, on_message, wait=0.2)
                for future in futures:
                    if future.done() and future.exception():
                        raise future.exception()
            _forward(messages, on_message, wait=0.0)
            return [f.result() for f in futures]
        except (KeyboardInterrupt, SystemExit):  # what they are at may take minutes
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        except BrokenProcessPool:
            raise WorkerDied(
                f"one of {workers} processes was killed, perhaps because memory ran out: "
                "try fewer methods at a time (--jobs) or a smaller model"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _forward(messages, on_message, wait: float) -> None:
    try:
        on_message(messages.get(timeout=wait) if wait else messages.get_nowait())
        while True:
            on_message(messages.get_nowait())
    except queue.Empty:
        return


def _end_with_the_driver() -> None:
    """Also where the driver is killed, which leaves it no time to end its processes: they would
    compute for nobody, for minutes or for ever."""

    def watch() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(threads: int) -> None:
    _end_with_the_driver()
    import torch  # here, so that the command line need not wait for it

    torch.set_num_threads(threads)


def _call(work, task, messages):
    return work(*task, messages.put)
