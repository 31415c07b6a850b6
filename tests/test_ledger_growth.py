"""What an edit costs in a ledger that has grown, and which snapshots are kept.

The full measurement, of 10,000 edits, is benchmarks/ledger_growth.py; its figures are in
docs/ledger.md.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from ledgers import entry, new_state, stored

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ledger_growth import measure, table  # noqa: E402
from hiedit.ledger import Ledger, snapshots  # noqa: E402


def test_growth(tmp_path, capsys, threads):
    threads(1)
    shape = (64, 32)
    growth = measure(tmp_path, 500, shape, pairs=120)
    with capsys.disabled():
        print(f"\n{table(growth, shape)}")
    assert growth.ratio < 1.4  # 1.1 in the full run; a busy machine needs room
    assert growth.reopen < 5 and growth.reopen_compacted < 5
    assert sum(growth.folded.values()) < sum(growth.compacted.values()) / 3
    assert sum(growth.compacted.values()) < sum(growth.bytes.values())


def test_snapshots_are_few_and_spread_by_age(tmp_path):
    """However many were made, a few are left: the newest, and older ones to revert old edits."""
    with Ledger(tmp_path, state := new_state()) as ledger:
        for number in range(1, 61):
            ledger.commit([entry(state, number)])
            ledger.snapshot()
        kept = [snapshot.upto for snapshot in snapshots.valid(ledger._store)]
        assert len(kept) == len(stored(tmp_path, "snapshots")) == snapshots.KEPT
        assert kept[:2] == [60, 59] and kept[-1] < 45
        ledger.revert([60])
        assert [s.upto for s in snapshots.valid(ledger._store)] == kept[1:]
        ledger.restore([60])
        assert [s.upto for s in snapshots.valid(ledger._store)] == kept


def test_a_revert_reads_only_what_it_needs(tmp_path, monkeypatch):
    with Ledger(tmp_path, state := new_state()) as ledger:
        for number in range(1, 21):
            if number == 16:
                ledger.snapshot()
            given = entry(state, number, touched=3, rank=1)
            if number in (17, 18):  # of different modules
                name = f"layers.{number - 17}.mlp"
                given = replace(given, shifts={name: given.shifts[name]})
            ledger.commit([given])
        read = []  # not the edits before the snapshot, nor those of other modules
        shifts = ledger._store.shifts
        monkeypatch.setattr(ledger._store, "shifts", lambda e: read.append(e) or shifts(e))
        ledger.revert([18])
        assert read == [16, 19, 20]


def test_only_the_modules_of_a_reverted_edit_are_rebuilt(tmp_path):
    with Ledger(tmp_path, state := new_state()) as ledger:
        ledger.commit([entry(state, 1, touched=3, rank=2), entry(state, 2, touched=1, rank=2)])
        (touched,) = ledger.record(2).layers
        before = dict(state.acc)
        ledger.revert([2])
        for name in state.modules:
            assert (state.acc[name] is before[name]) == (name != touched)


def test_snapshots_come_by_themselves(tmp_path):
    """After 64 edits at the earliest, and in closing if the replay would take longer."""
    model = {"modules": 2, "inputs": 4, "outputs": 3}
    with Ledger(tmp_path, state := new_state(**model)) as ledger:
        edits = [entry(state, n, touched=2, rank=4) for n in range(1, 70)]
        for count, given in enumerate(edits, 1):
            ledger.commit([given])
            made = len(snapshots.valid(ledger._store))
            assert made == (count >= snapshots.FEWEST_EDITS), count
    with Ledger(tmp_path, state := new_state(**model)) as ledger:
        assert torch.is_tensor(next(iter(state.acc.values())))
        ledger.commit([entry(state, 99, rank=1) for _ in range(snapshots.FEWEST_EDITS)])
        assert len(snapshots.valid(ledger._store)) == 1
    with Ledger.read(tmp_path) as reader:
        assert len(snapshots.valid(reader)) == 2  # made in closing
