"""Jobs in processes of their own: order, messages, errors, deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import alive, wait_until

from hiedit.parallel import WorkerDied, run_jobs


def slow_first(index, send):
    send(("began", index))
    time.sleep(0.5 if index == 0 else 0.0)
    return index * 10, os.getpid()


def failing(index, send):
    send(("began", index))
    if index == 1:
        raise ValueError("modules: 'nope' is no module")
    return index


def killed(index, send):
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return index


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_messages_arrive(workers):
    messages = []
    done = run_jobs(slow_first, [(i,) for i in range(3)], workers, messages.append)
    assert [result for result, _ in done] == [0, 10, 20]
    assert sorted(messages) == [("began", i) for i in range(3)]
    assert (os.getpid() in {pid for _, pid in done}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_comes_through_with_its_message(workers):
    with pytest.raises(ValueError, match="^modules: 'nope' is no module$"):
        run_jobs(failing, [(i,) for i in range(3)], workers)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_killed_worker_is_a_clear_error():
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match="was killed, perhaps because memory ran out: try fewer"):
        run_jobs(killed, [(i,) for i in range(3)], 2)
    assert time.monotonic() - begin < 60


def endless(send):
    send(os.getpid())
    time.sleep(1000)


def test_an_interrupt_ends_the_processes_at_once():
    pids = []

    def interrupt(pid):
        pids.append(pid)
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(endless, [(), ()], 2, interrupt)
    assert pids and time.monotonic() - begin < 60
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


DRIVER = """
import sys
sys.path.insert(0, "tests")
from hiedit.parallel import run_jobs
from test_parallel import endless

run_jobs(endless, [(), ()], 2, lambda pid: print(pid, flush=True))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="no /proc on this platform")
def test_a_killed_driver_leaves_no_process(root):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        pids = [int(driver.stdout.readline()) for _ in range(2)]
        pids = {*pids, *children(driver.pid)}  # and who carries the messages
        assert len(pids) >= 3 and all(map(alive, pids))
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not any(map(alive, pids)), "the driver is gone, not all of its own", 30.0)


def children(pid: int) -> set[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for path in found for child in path.read_text().split()}
