"""The command line of the ledger where no model is needed, and what it stands on: changes without
a model, and a replay beside a writer."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("typer", reason="the command line needs typer")

import torch  # noqa: E402
from commands import call, good, mistake, statuses  # noqa: E402
from ledgers import assert_same, entry, expected, fill, new_state, weights  # noqa: E402

from hiedit.cli.shared import ranges  # noqa: E402
from hiedit.ledger import Entry, Ledger, Reader  # noqa: E402
from hiedit.ledger.offline import change, compacted, replay  # noqa: E402
from hiedit.types import EditRequest, Shift  # noqa: E402


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("edit", ["--input -", "Each line is acknowledged", "Exit status", "--max-kl"]),
        ("history", ["beside a writer", "--status active"]),
        ("revert", ["Needs no model", "12 17-20", "--since"]),
        ("restore", ["--since 2026-01-31"]),
        ("export", ["--format peft", "--max-error"]),
        ("verify", ["Exit status", "--model world"]),
        ("compact", ["--keep 1000"]),
    ],
)
def test_help_teaches(monkeypatch, command, parts):
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(good(call(command, "--help")).replace("│", " ").split())
    assert "Example" in text and all(part in text for part in parts), text


def test_many_edits_are_asked_for(tmp_path):
    directory = tmp_path / "edits"
    fill(directory, 14)
    asked = call("revert", "2-20", "--ledger", directory, input="n\n")
    assert asked.exit_code == 1 and "revert 13 edits (2-14)?" in asked.stderr
    mistake(call("revert", "2-20", "--ledger", directory), "--yes")
    assert statuses(directory) == ["active"] * 14
    good(call("revert", "2-20", "--ledger", directory, input="y\n"))
    assert statuses(directory) == ["active"] + ["reverted"] * 13
    assert "restored 2 edits (13-14)" in good(call("restore", "--last", 2, "--ledger", directory))
    good(call("restore", "--since", 3, "--yes", "--ledger", directory))
    good(call("revert", "--since", "2026-01-31", "--yes", "--ledger", directory))
    assert statuses(directory) == ["reverted"] * 14


def test_compact_asks_before_it_folds(tmp_path):
    directory = tmp_path / "edits"
    fill(directory, 8)
    assert "8 -> 1 segment" in good(call("compact", "--ledger", directory))
    refused = call("compact", "--keep", 3, "--ledger", directory, input="n\n")
    assert refused.exit_code == 1 and "5 edits can then never be reverted" in refused.stderr
    assert "folded 1-5" in good(call("compact", "--keep", 3, "--yes", "--ledger", directory))
    mistake(call("revert", 2, "--ledger", directory), "folded it into the base snapshot")
    state = new_state()
    with Ledger.read(directory) as reader:
        replay(reader, state)
    assert_same(weights(state), expected(range(1, 9)))


def test_a_change_without_a_model_gives_the_same_bits(tmp_path):
    fill(tmp_path, 6)
    assert change(tmp_path, "revert", [4, 2, 2]) == [2, 4]
    state = new_state()
    with Ledger(tmp_path, state) as ledger:
        assert_same(weights(state), expected([1, 3, 5, 6]))
        beside = new_state()
        with Ledger.read(tmp_path) as reader:
            assert [r.id for r in replay(reader, beside)] == [1, 2, 3, 4, 5, 6]
            with pytest.raises(ValueError, match="has edits already"):
                replay(reader, beside)
            with pytest.raises(ValueError, match="base model"):
                replay(reader, new_state(seed=1))
        assert_same(weights(beside), weights(state))
        ledger.commit([entry(state, 7)])
    change(tmp_path, "restore", [2])
    with Ledger(tmp_path, new_state()) as ledger:
        assert_same(weights(ledger.state), expected([1, 2, 3, 5, 6, 7]))


def test_a_replay_beside_a_compaction_begins_again(tmp_path):
    fill(tmp_path, 6)
    other = threading.Thread(target=compacted, args=(tmp_path,))

    class Late(Reader):
        """Has seen the record when a compaction moves all factors."""

        def layers(self, *arguments):
            found = super().layers(*arguments)
            if not other.ident:
                other.start()
                while (tmp_path / "segments" / found_files[-1]).exists():
                    time.sleep(0.01)
            return found

    state = new_state()
    with Late(tmp_path, None) as reader:
        found_files = sorted(path.name for path in (tmp_path / "segments").iterdir())
        replay(reader, state)
    other.join()
    assert len(list((tmp_path / "segments").iterdir())) == 1
    assert_same(weights(state), expected(range(1, 7)))


def test_a_revert_that_makes_a_weight_infinite_is_undone_at_opening(tmp_path):
    def opened():
        return Ledger(tmp_path, new_state(1, dtype=torch.float16))

    with opened() as ledger:
        (name,) = ledger.state.modules
        module = ledger.state.modules[name]
        for sign in (-1, 1, 1):
            A = torch.ones(1, module.in_features)
            B = torch.full((module.out_features, 1), sign * 6e4)
            ledger.commit([Entry(EditRequest(f"{sign}", "x"), {name: Shift(A, B)})])
        before = weights(ledger.state)
    change(tmp_path, "revert", [1])
    with pytest.warns(RuntimeWarning, match="would have made a weight infinite"):
        ledger = opened()
    with ledger:
        assert_same(weights(ledger.state), before)
    assert statuses(tmp_path) == ["active"] * 3


def test_ids_are_printed_as_they_are_taken():
    assert ranges([]) == "" and ranges([3]) == "3"
    assert ranges([7, 1, 2, 3, 9, 8]) == "1-3 7-9"


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from hiedit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "pip install 'hiedit[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
