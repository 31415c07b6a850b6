"""A writer that dies at any moment: nothing acknowledged is lost, nothing is there by half.

What happens is in ledger_deaths.py, which runs once, as a program of its own, for all of these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ledger_deaths import KILLS, OPERATIONS


@pytest.fixture(scope="module")
def happened(tmp_path_factory):
    """By experiment, what it reported, or ``failed`` and the traceback."""
    program = Path(__file__).with_name("ledger_deaths.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path_factory.mktemp("deaths"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a fork keeps only the thread that forks
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def report(happened, name: str) -> dict:
    assert "failed" not in happened[name], happened[name]["failed"]
    return happened[name]


def test_killed_at_random_moments(happened, capsys):
    found = report(happened, "kill_writers")
    with capsys.disabled():
        print(f"[{found}]", end=" ")
    assert found["kills"] == KILLS >= 50
    assert found["acknowledged"] > KILLS  # the writers did get work done,
    assert found["cut off"] > KILLS // 5  # and were killed in the middle of it


def test_dead_before_every_step_of_every_operation(happened, capsys):
    """Before each system call, and before each statement of SQL, that changes something."""
    points = report(happened, "crash_everywhere")
    with capsys.disabled():
        print(f"[deaths: {points}]", end=" ")
    assert points.keys() == OPERATIONS.keys()
    assert all(count >= 4 for count in points.values())


def test_one_writer_and_readers_beside_it(happened):
    found = report(happened, "two_writers")
    assert f"written by process {found['writer']} on " in found["refusal"]
    assert "since 20" in found["refusal"]
    assert (found["before"], found["after"]) == (1, 2)  # a reader sees what comes
    assert found["acknowledged"] == [1, 2]


def test_a_file_that_may_not_grow(happened):
    found = report(happened, "limited")
    assert found["exit"] == 0 and len(found["edits"]) > 3
    assert "commit: could not be written" in found["error"]


def test_a_forked_child_neither_holds_nor_uses_the_ledger(happened):
    assert "opened before this process was forked" in report(happened, "forked")["child"]
