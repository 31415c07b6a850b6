"""Damaged files and full disks: named, refused, and never in the way of the rest."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from pathlib import Path

import pytest
import torch
from ledgers import assert_same, entry, expected, fill, in_effect, new_state, stored, weights

from hiedit.ledger import DamagedError, Ledger, LedgerError, drop_damaged, snapshots


def flip(path: Path, at: int = -1) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_segment_is_named_and_the_rest_stays_readable(tmp_path, damage):
    fill(tmp_path, 5)
    path = stored(tmp_path)[2]
    if damage == "flipped":
        flip(path, path.stat().st_size - 9)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 3)
    else:
        path.unlink()
    state = new_state()
    with pytest.raises(DamagedError, match=f"{path.name}.*it holds edit 3.*drop_damaged") as error:
        Ledger(tmp_path, state)
    assert error.value.ids == (3,) and error.value.file == path
    assert_same(weights(state), weights(new_state()))
    with Ledger.read(tmp_path) as reader:
        assert [p.ids for p in reader.verify().problems if p.file == path] == [(3,)]
        for edit in (1, 2, 4, 5):
            assert reader.shifts(edit)
        with pytest.raises(DamagedError, match=path.name):
            reader.shifts(3)
    assert drop_damaged(tmp_path) == (3,)
    state = new_state()
    with Ledger(tmp_path, state) as ledger:
        assert ledger.verify().ok and ledger.record(3).status == "dropped"
    assert_same(weights(state), expected([1, 2, 4, 5]))


def test_one_damaged_edit_of_a_pack(tmp_path):
    fill(tmp_path, 5)
    with Ledger(tmp_path, new_state()) as ledger:
        ledger.compact()
        place = ledger._store._held(4).place
    (path,) = stored(tmp_path)
    flip(path, place.start + 5)
    with Ledger.read(tmp_path) as reader:
        assert [problem.ids for problem in reader.verify().problems] == [(4,)]
        assert all(reader.shifts(edit) for edit in (1, 2, 3, 5))
    assert drop_damaged(tmp_path) == (4,)
    with Ledger(tmp_path, state := new_state()) as ledger:
        ledger.compact()  # gets rid of the damaged bytes
        assert ledger.verify().ok
    assert_same(weights(state), expected([1, 2, 3, 5]))


def test_a_damaged_header_is_found_and_harmless(tmp_path):
    fill(tmp_path, 2)
    flip(stored(tmp_path)[0], 20)
    with Ledger(tmp_path, state := new_state()) as ledger:
        (problem,) = ledger.verify().problems
        assert problem.file == stored(tmp_path)[0] and "header" in problem.what
    assert_same(weights(state), expected([1, 2]))


def test_damage_is_found_before_a_revert_changes_anything(tmp_path):
    fill(tmp_path, 4)
    with Ledger(tmp_path, state := new_state()) as ledger:
        ledger.commit([entry(state, 5, touched=3, rank=2)])
        flip(stored(tmp_path)[4])
        before = weights(state)
        with pytest.raises(DamagedError, match="it holds edit 5"):
            ledger.revert([2])
        assert_same(weights(state), before)
        assert ledger.record(2).status == "active"
        ledger.revert([5])  # itself it may go: its factors are not needed for that
        assert_same(weights(state), expected([1, 2, 3, 4]))


def test_a_damaged_snapshot_is_replaced_by_a_replay(tmp_path):
    fill(tmp_path, 4)
    with Ledger(tmp_path, new_state()) as ledger:
        ledger.snapshot()
    (path,) = stored(tmp_path, "snapshots")
    flip(path)
    state = new_state()
    with pytest.warns(RuntimeWarning, match=f"{path.name} is damaged.*replayed instead"):
        ledger = Ledger(tmp_path, state)
    assert_same(weights(state), expected([1, 2, 3, 4]))
    ledger.close()
    with Ledger.read(tmp_path) as reader:
        assert [problem.file for problem in reader.verify().problems] == [path]
    assert drop_damaged(tmp_path) == () and not stored(tmp_path, "snapshots")


def test_a_snapshot_that_is_not_the_sum_is_found(tmp_path):
    """Whole by its checksum, wrong all the same."""
    fill(tmp_path, 3)
    with Ledger(tmp_path, state := new_state()) as ledger:
        state.acc[next(iter(state.acc))].view(-1)[0] += 1
        assert [str(p.file) for p in ledger.verify().problems] == [str(tmp_path)]
        ledger.snapshot()
        files_of = [problem.file for problem in ledger.verify().problems]
        assert stored(tmp_path, "snapshots")[0] in files_of


def test_the_snapshot_of_folded_edits_is_required(tmp_path):
    fill(tmp_path, 4)
    with Ledger(tmp_path, new_state()) as ledger:
        ledger.compact(keep=1)
    (path,) = stored(tmp_path, "snapshots")
    flip(path)
    for attempt in (lambda: Ledger(tmp_path, new_state()), lambda: drop_damaged(tmp_path)):
        with pytest.raises(DamagedError, match=f"{path.name}.*folded into it"):
            attempt()


def test_a_damaged_database_is_named(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "ledger.db").write_bytes(b"not a database at all" * 500)
    for attempt in (lambda: Ledger(tmp_path, new_state()), lambda: Ledger.read(tmp_path)):
        with pytest.raises(DamagedError, match="ledger.db is damaged"):
            attempt()


# A full disk.


class FullDisk:
    """From system call number ``first`` on, writing raises ENOSPC, until ``freed``."""

    def __init__(self, monkeypatch, first: int):
        self.left, self.freed, self.monkeypatch = first, False, monkeypatch
        for name in ("write", "fsync", "rename"):
            monkeypatch.setattr(os, name, self.full(getattr(os, name)))

    def full(self, call):
        def checked(*arguments):
            if not self.freed and self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= not self.freed
            return call(*arguments)

        return checked


def test_a_full_disk_at_every_write_of_a_file(tmp_path, monkeypatch):
    with Ledger(tmp_path, state := new_state()) as ledger:
        ledger.commit([entry(state, 1)])
        before, present = weights(state), stored(tmp_path)
        for first in range(100):
            with monkeypatch.context() as patch:
                disk = FullDisk(patch, first)
                try:
                    ledger.commit([entry(state, 2), entry(state, 3)])
                    break
                except LedgerError as error:
                    assert "No space left on device" in str(error)
                    assert "earlier is intact" in str(error)
                disk.freed = True
                assert_same(weights(state), before)
                assert len(ledger.history()) == 1 and stored(tmp_path) == present
        assert first >= 5
        assert [record.id for record in ledger.history()] == [1, 2, 3]
        assert_same(weights(state), expected([1, 2, 3]))
        assert ledger.verify().ok


@pytest.mark.parametrize("what", ["commit", "revert", "attachment"])
def test_a_full_disk_at_the_transaction(tmp_path, what):
    """SQLite itself says so: the database may not grow by another page."""
    fill(tmp_path, 3)
    with Ledger(tmp_path, state := new_state()) as ledger:
        operations = {
            "commit": lambda: ledger.commit([entry(state, 10 + n) for n in range(40)]),
            "revert": lambda: [(ledger.revert([2]), ledger.restore([2])) for _ in range(200)],
            "attachment": lambda: ledger.save_attachment(
                "x", 1, {f"{n}" * 40: torch.ones(1) for n in range(300)}, "v"
            ),
        }
        db = ledger._store.db
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="is full.*earlier is intact"):
            operations[what]()
        db.execute("PRAGMA max_page_count = 1000000")
        assert_same(weights(state), expected(in_effect(ledger)))
        assert len(ledger.history()) == 3 == len(stored(tmp_path))
        assert not stored(tmp_path, "attachments")
        ledger.restore([r.id for r in ledger.history() if r.status == "reverted"])
        operations[what]()
        assert_same(weights(state), expected(in_effect(ledger)))
        assert ledger.verify().ok


def test_a_snapshot_that_fails_does_not_fail_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "FEWEST_EDITS", 1)
    monkeypatch.setattr(snapshots, "WORK_PER_ELEMENT", 1)
    monkeypatch.setattr(snapshots, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with Ledger(tmp_path, state := new_state()) as ledger, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.warns(RuntimeWarning, match="snapshot: could not be written"):
            assert ledger.commit([given := entry(state, 1, touched=3, rank=4)]) == [1]
        other = new_state()
        other.commit(given.shifts)
        assert_same(weights(state), weights(other))
        assert not stored(tmp_path, "snapshots")


# Acknowledged means on disk.


def test_the_order_in_which_things_reach_the_disk(tmp_path, monkeypatch):
    """No test here can cut the power; what is flushed, and when, can be watched."""
    steps = []

    def watched(name, call):
        def inner(*arguments):
            found = call(*arguments)
            if name == "fsync":
                steps.append("fsync " + kinds[stat.S_IFMT(os.fstat(arguments[0]).st_mode)])
            else:
                steps.append(name)
            return found

        return inner

    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory"}
    with Ledger(tmp_path, state := new_state()) as ledger:
        db = ledger._store.db
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        for name in ("write", "fsync", "rename"):
            monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
        db.set_trace_callback(lambda sql: steps.append(sql.split()[0]))
        monkeypatch.setattr(state, "commit", watched("weights", state.commit))
        ledger.commit([entry(state, 1)])
    order = [s for s in steps if s != "write" and s != "SELECT"]
    on_disk = ["fsync file", "rename", "fsync directory"]
    recorded = ["BEGIN", "INSERT", "INSERT", "INSERT", "COMMIT"]
    assert order[: len(on_disk + recorded) + 1] == [*on_disk, *recorded, "weights"]
    assert "write" not in steps[steps.index("fsync file") :]
