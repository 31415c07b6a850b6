"""The store: what is refused, what survives damage, who may read and write."""

from __future__ import annotations

import gc
import os
import shutil
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ledgers import assert_same, entry, expected, fill, new_state, stored, weights
from safetensors.torch import load_file

from hiedit.ledger import DamagedError, Entry, Ledger, LedgerError, drop_damaged
from hiedit.ledger.errors import NotFiniteError
from hiedit.types import EditRequest, Locality, Shift


def flip(path: Path, at: int = -1) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# What goes in comes out.


def test_everything_comes_back(tmp_path):
    request = EditRequest(
        "Wer ist \ud800 \x00 „é“", "ein Ziel", ("p1", "p2"), (Locality("l", "a"), Locality("m")),
        ("h",), subject="s", old_target="o", relation="P36",
    )  # fmt: skip
    state = new_state()
    given = replace(
        entry(state, 1), request=request, method="hiedit", report={"kl": 0.5, "list": [1, None]},
        memory={"keys": torch.arange(6.0).reshape(2, 3).bfloat16(), "flag": torch.tensor(True),
                "none": torch.zeros(0, 4), "long": torch.arange(3)},
    )  # fmt: skip
    with Ledger(tmp_path, state) as ledger:
        assert ledger.commit([given]) == [1]
    with Ledger.read(tmp_path) as reader:
        (record,) = reader.history()
        assert record.request == request and record.method == "hiedit"
        assert record.report == {"kl": 0.5, "list": [1, None]} and record.status == "active"
        shifts, memory = reader.shifts(1), reader.memory(1)
    assert record.layers == tuple(shifts) and set(shifts) <= set(given.shifts)
    assert record.ranks == tuple(shift.rank for shift in shifts.values())
    for name, shift in shifts.items():
        torch.testing.assert_close(shift.dense(), given.shifts[name].dense().float())
    assert memory.keys() == given.memory.keys()
    for name, tensor in memory.items():
        assert tensor.dtype == given.memory[name].dtype and torch.equal(tensor, given.memory[name])


def test_masked_rows_are_not_stored(tmp_path):
    state = new_state(modules=2, inputs=4, outputs=3)
    one, two = state.modules
    A, B = torch.randn(3, 4), torch.randn(3, 3)
    masked = Shift(torch.randn(2, 5), torch.randn(4, 2), torch.zeros(2))
    shifts = {two: masked, one: Shift(A, B, torch.tensor([0.3, 0.0, 1.7]))}
    with Ledger(tmp_path, state) as ledger:
        ledger.commit([Entry(EditRequest("p", "t"), shifts)])
        assert ledger.record(1).layers == (one,) and ledger.record(1).ranks == (2,)
        assert two not in state.acc  # a module that no edit touches costs nothing
        found = ledger.shifts(1)[one]
        assert torch.equal(found.B, B[:, [0, 2]] * torch.tensor([0.3, 1.7]))
    direct = new_state(modules=2, inputs=4, outputs=3)
    direct.commit(shifts)
    assert_same(weights(state), weights(direct))


def test_segments_are_plain_safetensors(tmp_path):
    fill(tmp_path, 1)
    (path,) = stored(tmp_path)
    tensors = load_file(path)
    with Ledger.read(tmp_path) as reader:
        for name, shift in reader.shifts(1).items():
            assert torch.equal(tensors[f"1/{name}/A"], shift.A)
            assert torch.equal(tensors[f"1/{name}/B"], shift.B)


def test_find_by_prompt(tmp_path):
    state = new_state()
    with Ledger(tmp_path, state) as ledger:
        ledger.commit([entry(state, n) for n in (1, 2, 1)])
        assert [record.id for record in ledger.find("prompt 1")] == [1, 3]
        ledger.revert([1])
        assert [record.id for record in ledger.find("prompt 1")] == [3]
        ledger.compact(keep=0)
        assert [record.id for record in ledger.find("prompt 1")] == [3]  # folded: in effect
        assert ledger.find("prompt") == []


def test_attachments(tmp_path):
    with Ledger(tmp_path, new_state()) as ledger:
        assert ledger.load_attachment("statistics", "v1") is None
        ledger.save_attachment("statistics", 3, {"mean": torch.ones(2)}, "v1")
        ledger.save_attachment(
            "statistics", 5, {"mean": torch.zeros(2), "n": torch.tensor(7)}, "v1"
        )
        assert ledger.load_attachment("statistics", "v2") is None
        with pytest.raises(ValueError, match=r"attachment '\.\./x'"):
            ledger.save_attachment("../x", 1, {}, "v1")
    (path,) = stored(tmp_path, "attachments")  # the first one is gone
    with Ledger.read(tmp_path) as reader:
        found = reader.load_attachment("statistics", "v1")
        assert found.upto == 5 and found.tensors["n"] == 7
        assert torch.equal(found.tensors["mean"], torch.zeros(2))
        flip(path)
        assert [problem.file for problem in reader.verify().problems] == [path]
        with pytest.raises(DamagedError, match=path.name):
            reader.load_attachment("statistics", "v1")


# What is refused, before anything changes.


def changed(state, number: int, name: str, **factors) -> Entry:
    given = entry(state, number, touched=3, rank=2)
    shifts = {**given.shifts, name: replace(given.shifts[name], **factors)}
    return replace(given, shifts=shifts)


REFUSED = {
    "not finite": lambda s: changed(s, 5, "layers.1.mlp", A=torch.full((2, 8), torch.inf)),
    "a factor is float32": lambda s: changed(s, 5, "layers.1.mlp", A=torch.ones(2, 8).double()),
    r"\(\(2, 9\), \(6, 2\), \(2,\)\).*\(\(2, 8\), \(6, 2\), \(2,\)\)": lambda s: changed(
        s, 5, "layers.1.mlp", A=torch.ones(2, 9)
    ),
    r"scale.*\(3,\)": lambda s: changed(s, 5, "layers.1.mlp", scale=torch.ones(3)),
    "'layers.9.mlp' is not an editable module.*layers.0.mlp": lambda s: replace(
        entry(s, 5), shifts={"layers.9.mlp": Shift(torch.ones(1, 7), torch.ones(5, 1))}
    ),
    r"report\['kl'\] is nan": lambda s: replace(entry(s, 5), report={"kl": float("nan")}),
    "complex64": lambda s: replace(entry(s, 5), memory={"x": torch.ones(1, dtype=torch.cfloat)}),
    "takes hiedit.ledger.Entry": lambda s: entry(s, 5).shifts,
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_entries_change_nothing(tmp_path, message):
    state = fill(tmp_path, 2)
    state = new_state()
    with Ledger(tmp_path, state) as ledger:
        before, size = weights(state), stored(tmp_path)
        pattern = "factors must be float32" if message == "a factor is float32" else message
        with pytest.raises(ValueError, match=pattern):
            ledger.commit([entry(state, 4), REFUSED[message](state)])
        assert_same(weights(state), before)
        assert len(ledger.history()) == 2 and stored(tmp_path) == size
        assert ledger.commit([entry(state, 4)]) == [3]


def test_an_edit_that_would_overflow_is_taken_back(tmp_path):
    """Finite factors whose product is not: only the weights can tell."""
    state = fill(tmp_path, 2)
    state = new_state()
    with Ledger(tmp_path, state) as ledger:
        huge = Shift(torch.full((1, 8), 1e30), torch.full((6, 1), 1e30))
        bad = replace(entry(state, 9), shifts={"layers.1.mlp": huge})
        with pytest.raises(ValueError, match="not finite"):
            ledger.commit([entry(state, 8), bad])
        assert_same(weights(state), expected([1, 2]))
        assert [r.status for r in ledger.history()] == ["active"] * 2 + ["dropped"] * 2
        assert ledger.commit([entry(state, 3)]) == [5] and ledger.verify().ok
    state = new_state()
    Ledger(tmp_path, state).close()
    assert_same(weights(state), expected([1, 2, 3]))


def test_recovery_goes_by_the_kind_of_an_error_not_by_its_words(tmp_path, monkeypatch):
    """A process that died after storing an edit that overflows; the message is another one now."""
    fill(tmp_path, 2)
    huge = Shift(torch.full((1, 8), 1e30), torch.full((6, 1), 1e30))
    state = new_state()

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_take_back", dies)
        ledger = Ledger(tmp_path, state)
        with pytest.raises(KeyboardInterrupt):
            ledger.commit([replace(entry(state, 9), shifts={"layers.1.mlp": huge})])
        ledger.close()
    monkeypatch.setattr(NotFiniteError, "__str__", lambda self: "too large")
    state = new_state()
    with pytest.warns(RuntimeWarning, match="the commit of edits 3 was undone"):
        ledger = Ledger(tmp_path, state)
    ledger.close()
    assert_same(weights(state), expected([1, 2]))


@pytest.mark.parametrize(
    ("what", "ids", "message"),
    [
        ("revert", [4, 9], "there is no edit 9: edits 1 to 5 are known"),
        ("revert", [4, 3], "edit 3 is reverted: it is reverted already"),
        ("revert", [4, 2], "edit 2 is folded: a compaction folded it"),
        ("restore", [3, 4], "edit 4 is active: it is in effect already"),
        ("restore", [1], "edit 1 is dropped: its factors were removed for good"),
        ("revert", ["4"], "'4' is not the id of an edit"),
        ("revert", [True], "True is not the id of an edit"),
    ],
)
def test_refused_ids_change_nothing(tmp_path, what, ids, message):
    state = new_state()
    with Ledger(tmp_path, state) as ledger:
        ledger.commit([entry(state, n) for n in range(1, 6)])
        ledger.revert([1])
        ledger.compact(keep=3)
        ledger.revert([3])
        before, history = weights(state), ledger.history()
        with pytest.raises(ValueError, match=message):
            getattr(ledger, what)(ids)
        assert_same(weights(state), before)
        assert ledger.history() == history
        assert getattr(ledger, what)([]) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"seed": 1}, "weights of layers.0.mlp are not those of the base model"),
        ({"dtype": torch.bfloat16}, "layers.0.mlp is bfloat16 .* dtype=float32"),
        ({"conv1d": True}, r"layers.0.mlp is Conv1D 7x5 .* Linear 5x7"),
        ({"inputs": 9}, "layers.0.mlp is Linear 5x9 .* Linear 5x7"),
        ({"modules": 2}, "it does not name layers.2.mlp.*same .layers.0.mlp, layers.1"),
        ({"modules": 4}, "it also names layers.3.mlp"),
    ],
)
def test_another_base_model_is_refused(tmp_path, model, message):
    fill(tmp_path, 1)
    state = new_state(**model)
    with pytest.raises(ValueError, match=message):
        Ledger(tmp_path, state)
    assert_same(weights(state), weights(new_state(**model)))
    Ledger(tmp_path, new_state()).close()  # the refusal let go of the lock


def test_an_edited_model_is_refused(tmp_path):
    edited = fill(tmp_path, 1)
    with pytest.raises(ValueError, match="1 edits already"):
        Ledger(tmp_path, edited)
    edited.edits = 0  # as of a merged checkpoint
    with pytest.raises(ValueError, match="as it was before any edit"):
        Ledger(tmp_path, edited)


def test_a_later_format_is_refused(tmp_path):
    fill(tmp_path, 1)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("UPDATE meta SET value = '7' WHERE key = 'format'")
    for attempt in (lambda: Ledger(tmp_path, new_state()), lambda: Ledger.read(tmp_path)):
        with pytest.raises(LedgerError, match="has format 7 .* up to 1: use a later hiedit"):
            attempt()


def test_no_ledger_to_read(tmp_path):
    with pytest.raises(ValueError, match="no ledger in"):
        Ledger.read(tmp_path)
    with pytest.raises(ValueError, match="no ledger in"):
        drop_damaged(tmp_path / "none")
    assert not list(tmp_path.iterdir())  # looking made nothing


# Who may read and write.


def test_a_reader_while_files_are_moved(tmp_path):
    """A compaction deletes the file that a reader was about to open."""
    fill(tmp_path, 3)
    with Ledger.read(tmp_path) as reader, Ledger(tmp_path, new_state()) as ledger:
        held = reader._held(2)
        wanted = reader.shifts(2)
        ledger.compact()
        assert not held.path.exists()
        assert reader._read(2, held)
        assert all(torch.equal(s.A, wanted[n].A) for n, s in reader.shifts(2).items())


def read_as_nobody(directory: Path) -> int:
    """How many edits a user who may only read finds; in a child where this process is root."""
    if os.geteuid():
        with Ledger.read(directory) as reader:
            return len(reader.history()) if reader.verify().ok else -1
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            with Ledger.read(directory) as reader:
                os._exit(len(reader.history()) if reader.verify().ok else 100)
        finally:
            os._exit(101)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_reading_where_one_may_not_write(tmp_path_factory):
    directory = Path("/tmp" if not os.geteuid() else tmp_path_factory.mktemp("read"))
    directory = directory / f"hiedit-read-only-{os.getpid()}"
    try:
        fill(directory, 3)
        for path in directory.rglob("*"):
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
        directory.chmod(0o555)
        assert read_as_nobody(directory) == 3
        assert not (directory / "ledger.db-wal").exists()
    finally:
        directory.chmod(0o755)
        shutil.rmtree(directory)


def test_after_close_it_cannot_be_used(tmp_path):
    ledger = Ledger(tmp_path, state := new_state())
    ledger.close()
    ledger.close()
    for call in (
        ledger.history,
        lambda: ledger.commit([entry(state, 1)]),
        lambda: ledger.revert([]),
    ):
        with pytest.raises(LedgerError, match="it is closed; open it again"):
            call()


def test_orphans_are_removed_and_foreign_files_are_not(tmp_path):
    fill(tmp_path, 2)
    segment = stored(tmp_path)[0]
    orphan = segment.with_name("00000009-0123456789ab.safetensors")
    half = segment.with_name("00000009-0123456789ac.safetensors.tmp")
    note = segment.with_name("README.txt")
    for path in (orphan, half, note):
        shutil.copy(segment, path)
    Ledger(tmp_path, new_state()).close()
    assert not orphan.exists() and not half.exists() and note.exists() and segment.exists()


def test_a_ledger_that_was_forgotten_lets_go_of_its_lock(tmp_path):
    Ledger(tmp_path, new_state())
    gc.collect()
    Ledger(tmp_path, new_state()).close()
