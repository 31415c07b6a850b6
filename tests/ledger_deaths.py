"""Processes that write to a ledger and die; the program behind test_ledger_kill.py.

It has imported everything once, forks a writer per death and checks the ledger after each: a
process per death would spend its time on importing torch. Results go to standard output as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from ledgers import assert_same, entry, expected, in_effect, new_state, weights

from hiedit.ledger import Entry, Ledger, LedgerError, LedgerLocked, snapshots
from hiedit.types import EditRequest

KILLS = 54

# What a ledger should hold: by id, the number of the edit (see ledgers.entry) and its status.
Contents = dict[int, tuple[int, str]]


def contents(ledger: Ledger) -> Contents:
    return {r.id: (r.report["number"], r.status) for r in ledger.history()}


def after(before: Contents, what: str, argument) -> Contents:
    """What an operation makes of the contents."""
    if what == "commit":
        first = max(before, default=0) + 1
        return before | {first + i: (number, "active") for i, number in enumerate(argument)}
    if what in ("revert", "restore"):
        status = "reverted" if what == "revert" else "active"
        return before | {i: (before[i][0], status) for i in argument}
    if what == "compact" and argument is not None:
        old = sorted(before)[: max(len(before) - argument, 0)]
        becomes = {"active": "folded", "reverted": "dropped"}
        return before | {i: (before[i][0], becomes.get(before[i][1], before[i][1])) for i in old}
    return before


def apply(ledger: Ledger, what: str, argument) -> None:
    if what == "commit":
        ledger.commit([entry(ledger.state, number) for number in argument])
    elif what in ("revert", "restore"):
        getattr(ledger, what)(argument)
    elif what == "compact":
        ledger.compact(keep=argument)
    elif what == "snapshot":
        ledger.snapshot()
    elif what == "attachment":
        ledger.save_attachment("keys", 1, {"x": torch.full((3,), float(argument))}, "v")
    elif what == "refused":
        ledger.commit([too_large(ledger.state)])


def too_large(state) -> Entry:
    """An edit of finite factors that would make weights infinite, so it has to be taken back."""
    name, shift = next(iter(entry(state, 1, touched=3, rank=2).shifts.items()))
    large = type(shift)(shift.A.float() * 1e20, shift.B.float() * 1e20)
    return Entry(EditRequest("large", "infinite"), {name: large}, report={"number": -1})


def check(directory: Path, *allowed: Contents) -> Contents:
    """Opens the ledger as the next process does; its contents, which are among the allowed."""
    state = new_state()
    with Ledger(directory, state) as ledger:
        found = contents(ledger)
        assert found in allowed, (found, allowed)
        assert_same(weights(state), expected(in_effect(ledger)))
        report = ledger.verify()
        assert report.ok, report.problems
        used = {row for table in ("segments", "snapshots", "attachments")
                for row in ledger._store.db.execute(f"SELECT file FROM {table}")}  # fmt: skip
        query = "SELECT id FROM segments EXCEPT SELECT segment FROM edits"
        assert not ledger._store.db.execute(query).fetchall()  # a file without an edit
    assert len(list(directory.rglob("*.safetensors*"))) == len(used)  # nothing is left about
    return found


def fork(work) -> int:
    """Runs ``work`` in a child, which ends with it."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def kill_writers(directory: Path, kills: int = KILLS) -> dict:
    draw, now = random.Random(7), {}
    acknowledged = cut_off = 0
    for kill in range(kills):
        receive, send = os.pipe()
        writer = fork(lambda seed=kill, send=send: write_for_ever(directory, seed, send))
        os.close(send)
        with os.fdopen(receive) as pipe:
            text = [pipe.readline() for _ in range(2 * draw.randint(0, 4))]  # begun, done, ...
            time.sleep(draw.uniform(0, 0.02))
            os.kill(writer, signal.SIGKILL)
            assert os.waitpid(writer, 0)[1] == signal.SIGKILL, "the writer failed by itself"
            lines = [json.loads(line) for line in text + pipe.readlines()]
        for kind, *operation in lines:
            if kind == "done":
                now = after(now, *operation)
                acknowledged += 1
        pending = lines and lines[-1][0] == "begun"
        cut_off += bool(pending)
        now = check(directory, now, *([after(now, *lines[-1][1:])] if pending else []))
    return {"kills": kills, "acknowledged": acknowledged, "cut off": cut_off, "edits": len(now)}


def write_for_ever(directory: Path, seed: int, send: int) -> None:
    """Random operations, each announced before and acknowledged after."""
    draw = random.Random(seed)
    snapshots.FEWEST_EDITS, snapshots.WORK_PER_ELEMENT = 5, 1
    ledger = Ledger(directory, new_state())
    while True:
        found = contents(ledger)
        with_status = {s: [i for i, (_, other) in found.items() if other == s]
                       for s in ("active", "reverted")}  # fmt: skip
        what = draw.choice(["commit"] * 4 + ["revert", "restore", "snapshot", "compact"])
        argument = None
        if what == "commit":
            argument = [draw.randrange(10**6) for _ in range(draw.randint(1, 3))]
        elif what in ("revert", "restore"):
            ids = with_status["active" if what == "revert" else "reverted"]
            argument = draw.sample(ids, min(len(ids), draw.randint(1, 3)))
        elif what == "compact":
            argument = draw.choice([None, None, 8])
        for kind in ("begun", "done"):
            if kind == "done":
                apply(ledger, what, argument)
            os.write(send, (json.dumps([kind, what, argument]) + "\n").encode())


OPERATIONS = {
    "commit": [11, 12, 13],
    "revert": [2, 4],
    "restore": [3],
    "snapshot": None,
    "attachment": 5,
    "pack": None,
    "compact": 2,
    "refused": None,
}


def crash_everywhere(directory: Path) -> dict:
    base = directory / "base"
    with Ledger(base, new_state()) as ledger:
        apply(ledger, "commit", [1])
        apply(ledger, "commit", [2, 3])
        ledger.snapshot()
        for number in (4, 5, 6):
            apply(ledger, "commit", [number])
        apply(ledger, "attachment", 9)
        ledger.revert([3])
    now = check(base, {i: (i, "reverted" if i == 3 else "active") for i in range(1, 7)})
    points = {}
    for name, argument in OPERATIONS.items():
        what = "compact" if name == "pack" else name
        allowed = [now, after(now, what, argument)]
        if name == "refused":  # the last edit's place is taken, but it is not in effect
            allowed.append(now | {max(now) + 1: (-1, "dropped")})
        for point in range(1000):
            copy = directory / f"{name}-{point}"
            shutil.copytree(base, copy)
            writer = fork(lambda c=copy, w=what, a=argument, p=point: die_at(c, w, a, p))
            ended = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
            assert ended in (0, 9), f"{name}, step {point}: the writer failed by itself"
            check(copy, *(allowed[1:] if ended == 0 else allowed))
            shutil.rmtree(copy)
            if ended == 0:
                points[name] = point
                break
    return points


def die_at(directory: Path, what: str, argument, point: int) -> None:
    """Performs an operation and dies before its step number ``point``."""
    ledger = Ledger(directory, new_state())
    left = iter(range(point))

    def step(*_):
        if next(left, None) is None:
            os._exit(9)

    def dying(function):
        return lambda *a, **k: (step(), function(*a, **k))[1]

    for name in ("write", "fsync", "rename", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    reading = ("SELECT", "PRAGMA")
    ledger._store.db.set_trace_callback(lambda sql: sql.startswith(reading) or step())
    try:
        apply(ledger, what, argument)
    except ValueError:
        assert what == "refused"
    os._exit(0)


def two_writers(directory: Path) -> dict:
    """A second writer while the first one writes, readers beside it, and its death."""
    orders, order = os.pipe()
    answer, answers = os.pipe()

    def first():
        ledger = Ledger(directory, new_state())
        while True:
            os.write(answers, json.dumps(ledger.commit([entry(ledger.state, 1)])).encode())
            os.read(orders, 1)

    writer = fork(first)
    os.close(answers)  # so that reading ends if the writer does
    found = {"writer": writer, "acknowledged": json.loads(os.read(answer, 99))}
    try:
        Ledger(directory, new_state())
    except LedgerLocked as error:
        found["refusal"] = str(error)
    with Ledger.read(directory) as reader:
        found["before"] = len(reader.history())
        os.write(order, b".")
        found["acknowledged"] += json.loads(os.read(answer, 99))
        found["after"] = len(reader.history()) if reader.verify().ok else -1
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    check(directory, {1: (1, "active"), 2: (1, "active")})  # the lock died with its process
    return found


def limited(directory: Path) -> dict:
    """The operating system refuses to let a file grow: here SQLite's log."""
    answer, answers = os.pipe()

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        ledger = Ledger(directory, new_state())
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        for number in range(1, 1000):
            try:
                ledger.commit([entry(ledger.state, number)])
            except LedgerError as error:
                again = in_effect(ledger)
                assert_same(weights(ledger.state), expected(again))
                os.write(answers, json.dumps([again, str(error)]).encode())
                return

    done = os.waitstatus_to_exitcode(os.waitpid(fork(write), 0)[1])
    os.close(answers)
    numbers, error = json.loads(os.read(answer, 60_000))
    check(directory, {n: (n, "active") for n in numbers})
    return {"exit": done, "edits": numbers, "error": error}


def forked(directory: Path) -> dict:
    """A child that outlives its parent's ledger: it may neither use it nor hold its lock."""
    answer, answers = os.pipe()
    ledger = Ledger(directory, new_state())

    def child():
        try:
            ledger.commit([entry(ledger.state, 1)])
            os.write(answers, b"it committed")
        except LedgerError as error:
            os.write(answers, str(error).encode())
        signal.pause()

    process = fork(child)
    os.close(answers)
    said = os.read(answer, 999).decode()
    ledger.close()
    check(directory, {})
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return {"child": said}


def main(directory: Path) -> None:
    warnings.simplefilter("ignore")
    found = {}
    for run in (kill_writers, crash_everywhere, two_writers, limited, forked):
        (directory / run.__name__).mkdir()
        try:
            found[run.__name__] = run(directory / run.__name__)
        except Exception:
            found[run.__name__] = {"failed": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
