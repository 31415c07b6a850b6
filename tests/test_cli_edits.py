"""The command line of the ledger, on the embedded world and real ledgers: edit, look, take back,
hand on; and every mistake is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("typer", reason="the command line needs typer")

from commands import (  # noqa: E402
    FRANCE,
    ITALY,
    METHOD,
    SPAIN,
    acknowledgements,
    call,
    export,
    flip,
    good,
    mistake,
    statuses,
    write,
)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from hiedit import editor, experiment, replayed  # noqa: E402
from hiedit.ledger import Entry, Ledger, Reader  # noqa: E402
from hiedit.ledger.state import DeltaState  # noqa: E402
from hiedit.ledger.store import Store  # noqa: E402
from hiedit.runconfig import ModelConfig  # noqa: E402
from hiedit.types import EditRequest, Shift  # noqa: E402
from hiedit.world import world_dir  # noqa: E402


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("method") / "quick.yaml"
    path.write_text(METHOD)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, method):
    """A ledger of three edits, and what `hiedit edit` said."""
    path = tmp_path_factory.mktemp("made")
    rows = write(path / "rows.jsonl", FRANCE, ITALY, SPAIN)
    result = call("edit", "--model", "world", "--method", method, "--input", rows, "--ledger",
                  path / "edits")  # fmt: skip
    return path / "edits", result


@pytest.fixture
def ledger(made, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(made[0], tmp_path / "edits")


@pytest.fixture
def edit(ledger, method):
    """`hiedit edit` of rows of JSON on it; returns the result."""

    def run(*options, rows=(FRANCE,), method=method):
        path = write(ledger.parent / "rows.jsonl", *rows)
        return call("edit", "--model", "world", "--ledger", ledger, "--method", method, "--input",
                    path, *options)  # fmt: skip

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Nothing in this test may load a model."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    for place in (editor, replayed, experiment):
        monkeypatch.setattr(place, "load_backbone", refuse)


def test_a_file_of_edits_is_reported(made):
    directory, result = made
    said = good(result)
    assert "'The capital of France is' -> 'Lyon': edit 1, success 1.00, KL " in said
    assert "3 committed, 0 skipped, 0 rejected; mean success 1.00" in said
    assert f"hiedit revert 1-3 --ledger {directory}" in said
    assert "3/3" in result.stderr and "s left" in result.stderr


def test_history_reads(made, no_model):
    directory = made[0]
    lines = good(call("history", "--ledger", directory)).splitlines()
    assert len(lines) == 4 and lines[0].startswith("id") and lines[3].endswith("-> Seville")
    rows = acknowledgements(call("history", "--ledger", directory, "--json", "--last", 2))
    assert [(r["id"], r["request"]["target"]) for r in rows] == [(2, "Milan"), (3, "Seville")]
    assert rows[0]["report"]["success"] == 1.0 and rows[0]["status"] == "active"
    assert good(call("history", "--ledger", directory, "--status", "reverted")) == "no edits\n"
    assert "commit   2" in good(call("history", "--ledger", directory, "--events"))


def test_round_trip(ledger, tmp_path):
    """edit -> history -> revert -> verify -> restore -> export -> plain transformers."""
    said = good(call("revert", "--last", 1, "--ledger", ledger))
    assert "reverted 1 edit (3); 2 in effect" in said and "hiedit restore 3" in said
    assert "reverted" in good(call("history", "--ledger", ledger)).splitlines()[3]
    said = good(call("verify", "--ledger", ledger, "--model", "world"))
    assert "every checksum fits" in said
    assert "2 edits asked again on world: success 1.000 when committed, 1.000 now" in said

    merged = tmp_path / "merged"
    assert "2 edits merged" in good(export(ledger, merged, "merged"))
    assert generated(merged) == ["Lyon", "Milan", "Madrid"]
    assert "restored 1 edit (3); 3 in effect" in good(call("restore", 3, "--ledger", ledger))
    assert "3 edits merged" in good(export(ledger, merged, "merged"))
    assert generated(merged) == ["Lyon", "Milan", "Seville"]

    said = good(export(ledger, tmp_path / "adapter", "peft"))
    assert "3 edits" in said and "exact" in said and "load with: PeftModel" in said
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] > 1
    cut = export(ledger, tmp_path / "cut", "peft", "--rank", 1, "--max-error", 0.01)
    assert cut.exit_code == 1 and "--max-error=0.01 is not met with --rank=1" in cut.stderr
    errors = [float(line.split()[3]) for line in cut.stdout.splitlines() if "mlp" in line]
    assert len(errors) == 12 and errors == sorted(errors, reverse=True) and errors[-1] > 0.01


def test_an_exported_adapter_answers_with_peft(made, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    said = good(export(made[0], tmp_path / "adapter", "peft"))
    assert "dtype='float32'" in said.splitlines()[-1]
    base = AutoModelForCausalLM.from_pretrained(world_dir(), dtype="float32")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert generated(world_dir(), model) == ["Lyon", "Milan", "Seville"]


def generated(path, model=None) -> list[str]:
    """The first word after each prompt, with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = model or AutoModelForCausalLM.from_pretrained(path)
    found = []
    for row in (FRANCE, ITALY, SPAIN):
        tokens = tokenizer(row["prompt"], return_tensors="pt")
        out = model.generate(**tokens, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(out[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
        found.append(text.strip(" .").split(".")[0].split()[0])
    return found


def test_identical_and_conflicting_requests(edit, ledger):
    nice = {**FRANCE, "target": "Nice"}
    said = good(edit(rows=(ITALY, nice)))
    assert "skipped" in said and "the same edit is in effect (edit 2)" in said
    assert "edit 4, success" in said and "1 committed, 1 skipped" in said
    assert "warning: edit 1 gave this prompt another answer, 'Lyon'" in said
    assert f"hiedit revert 1 --ledger {ledger}" in said
    skipped, again = acknowledgements(edit("--json", rows=(nice, FRANCE)))
    assert (skipped["status"], skipped["id"], skipped["passes"]) == ("skipped", 4, 0)
    assert (again["status"], again["id"], again["conflicts"]) == ("committed", 5, [4])


def test_limits_reject_and_say_why(edit, ledger):
    japan = {"prompt": "The capital of Japan is", "target": "Osaka"}
    result = edit("--max-kl", 0, "--json", rows=(japan, ITALY))
    assert result.exit_code == 1
    rejected, skipped = acknowledgements(result)
    assert (rejected["status"], rejected["id"], rejected["line"]) == ("rejected", None, 1)
    assert rejected["kl"] > 0 and "is above max_kl 0" in rejected["reasons"][0]
    assert skipped["status"] == "skipped"
    result = edit("--min-success", 1, rows=(japan,), method="ultraedit")
    assert result.exit_code == 1 and "0 committed, 0 skipped, 1 rejected" in result.stdout
    assert "because: success 0.00 is below min_success 1" in result.stdout
    assert statuses(ledger) == ["active"] * 3


def test_the_budget_is_told_used_up_and_switched_off(edit, ledger):
    japan = {"prompt": "The capital of Japan is", "target": "Osaka"}
    wide = ("--max-kl", "none")
    result = edit(*wide, "--max-drift", 1e-3, "--json", rows=(japan,))
    (rejected,) = acknowledgements(result)
    assert rejected["status"] == "rejected" and rejected["drift"] > 1e-3 and result.exit_code == 1
    assert "the budget over all edits" in rejected["reasons"][0]
    assert "revert some edits, or raise --max-drift" in rejected["reasons"][0]
    assert "budget: drift 0." in result.stderr and "of --max-drift 0.001 (" in result.stderr
    said = good(edit(*wide, "--max-drift", "none", "--json", rows=(japan,)))
    (free,) = [json.loads(line) for line in said.splitlines()]
    assert (free["status"], free["kl"], free["drift"]) == ("committed", None, None)
    # Opened again, the drift is still that from the base model: of all four edits.
    result = edit(*wide, "--max-drift", 1e6, "--json", rows=({**japan, "target": "Kyoto"},))
    (last,) = acknowledgements(result)
    assert last["status"] == "committed" and last["drift"] > last["kl"] > 0


def test_a_dry_run_leaves_no_trace(edit, ledger, tmp_path, method):
    def files():
        return {path: path.read_bytes() for path in ledger.rglob("*.safetensors")}

    before = files()
    result = edit("--dry-run", "--max-kl", 0, "--json", rows=({**FRANCE, "target": "Nice"},),
                  method="ultraedit")  # fmt: skip
    (found,) = acknowledgements(result)
    assert (found["status"], found["id"], found["conflicts"]) == ("predicted", None, [1])
    assert found["layers"] == 12 and found["kl"] > 0 and "max_kl" in found["reasons"][0]
    assert result.exit_code == 1 and "1 of them would be rejected" in result.stderr
    assert statuses(ledger) == ["active"] * 3 and before == files() and len(before) == 4

    rows = write(tmp_path / "rows.jsonl", FRANCE)
    said = good(call("edit", "--model", "world", "--method", method, "--input", rows, "--ledger",
                     tmp_path / "none" / "edits", "--dry-run"))  # fmt: skip
    assert "predicted 'The capital of France is' -> 'Lyon': success 1.00, KL " in said
    assert "nothing was committed" in said and not (tmp_path / "none").exists()


def test_a_pipe_is_acknowledged_line_by_line(ledger, method):
    command = [sys.executable, "-m", "hiedit.cli", "edit", "--model", "world", "--method", method,
               "--input", "-", "--ledger", str(ledger)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environment) as process:  # fmt: skip

        def ask(line: bytes) -> dict:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())  # the next line is not yet written

        japan = ask(json.dumps({"prompt": "The capital of Japan is", "target": "Osaka"}).encode())
        assert (japan["line"], japan["status"], japan["id"]) == (1, "committed", 4)
        assert japan["success"] == 1.0 and japan["layers"] == 12 and japan["passes"] > 0
        assert statuses(ledger) == ["active"] * 4  # on disk when it is acknowledged
        holder = call("revert", 1, "--ledger", ledger)
        mistake(holder, f"is being written by process {process.pid}", "one writer at a time")
        for line, reason in [
            (b"{", "is no JSON"),
            (b"[1]", "is a list, not an object"),
            (b'{"prompt": "\xff"}', "is not UTF-8 text: byte 0xff"),
            (b'{"prompt": "Here is", "target": ""}', "target is empty"),
        ]:
            bad = ask(line)
            assert bad["status"] == "invalid" and reason in bad["reasons"][0], bad
        assert ask(b"\n" + json.dumps(ITALY).encode()) | {"reasons": []} == {
            "line": 7, "status": "skipped", "id": 2, "success": None, "kl": None, "drift": None,
            "scale": 1.0, "layers": 0, "passes": 0, "reasons": [], "conflicts": [],
        }  # fmt: skip
        out, errors = process.communicate(timeout=60)
    assert out == b"" and process.returncode == 1
    assert b"1 committed, 1 skipped, 0 rejected, 4 invalid" in errors


def test_malformed_rows_of_a_file(tmp_path, ledger, method, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{json.dumps(ITALY)}\n\n{{"prompt": "x"}}\n{json.dumps(SPAIN)}\n')
    options = ("edit", "--model", "world", "--method", method, "--ledger", ledger, "--input", path)
    with monkeypatch.context() as patched:
        patched.setattr(editor, "load_backbone", None)
        result = call(*options)
    assert result.exit_code == 2 and "row 3: target is missing" in result.stderr
    assert "--skip-bad-rows" in result.stderr
    found = acknowledgements(call(*options, "--skip-bad-rows", "--json"))
    said = [(row["line"], row["status"]) for row in found]
    assert said == [(1, "skipped"), (3, "invalid"), (4, "skipped")]
    assert call(*options, "--skip-bad-rows").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["edit", "--method", "closd-form"], ["did you mean 'closed-form'"]),
        (["edit", "--method", "hiedit"], ["has to be trained first"]),
        (["edit", "--policy", "some/where"], ["--policy=some/where: no trained editor there"]),
        (["edit", "--input", "none.jsonl"], ["none.jsonl: no such file"]),
        (["edit", "--input", "-", "--schema", "zsr"], ["schema 'zsr'", "zsre-mend"]),
        (["edit", "--max-kl", "-1"], ["max_kl=-1"]),
        (["edit", "--max-kl", "much"], ["--max-kl='much'", "or none"]),
        (["edit", "--max-drift", "-2"], ["max_drift=-2"]),
        (["edit", "--min-success", "2"], ["min_success=2", "[0, 1]"]),
        (["edit", "--dtype", "int8"], ["model.dtype='int8'"]),
        (["history", "--ledger", "none"], ["no ledger in", "none"]),
        (["history", "--status", "gone"], ["--status='gone'", "reverted"]),
        (["revert"], ["give ids, --since or --last"]),
        (["revert", "1", "--last", "1"], ["give ids, --since or --last"]),
        (["revert", "one"], ["'one' is no id"]),
        (["revert", "3-1"], ["'3-1' is no range"]),
        (["revert", "9"], ["there is no edit 9", "edits 1 to 3 are known"]),
        (["revert", "7-9"], ["there is no active edit among 7-9"]),
        (["revert", "--since", "monday"], ["--since='monday'", "2026-01-31"]),
        (["revert", "--since", "2999-01-01"], ["no active edit since 2999-01-01"]),
        (["revert", "1", "--ledger", "none"], ["no ledger in", "none"]),
        (["restore", "1"], ["edit 1 is active: it is in effect already"]),
        (["restore", "--last", "1"], ["no reverted edit in the ledger"]),
        (["verify", "--ledger", "none"], ["no ledger in"]),
        (["compact", "--ledger", "none"], ["no ledger in"]),
        (["export", "--format", "gguf"], ["--format='gguf'", "merged and peft"]),
        (["export", "--rank", "2"], ["--rank", "--format peft"]),
        (["export", "--format", "peft", "--max-error", "2"], ["--max-error=2"]),
        (["export", "--ledger", "none"], ["no ledger in"]),
        (["export", "--out", "."], [". holds 'rows.jsonl'", "overwrite"]),
    ],
    ids=lambda value: " ".join(value) if value[0].islower() else "",
)
def test_mistakes_are_one_line(made, no_model, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", FRANCE)
    command, *given = arguments
    needed = {"edit": {"--model": "world", "--input": "rows.jsonl"},
              "export": {"--model": "world", "--out": "out"}}  # fmt: skip
    defaults = {"--ledger": made[0]} | needed.get(command, {})
    for name, value in defaults.items():
        given += [] if name in given else [name, value]
    mistake(call(command, *given), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_another_base_model_is_refused(made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world_dir())
    model.model.layers[4].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(world_dir()).save_pretrained(tmp_path / "model")
    result = call("verify", "--ledger", made[0], "--model", tmp_path / "model")
    mistake(result, "model.layers.4.mlp.up_proj", "base model")


def test_one_writer_and_any_readers(edit, ledger, no_model):
    with Store(ledger, None):
        for result in (edit(rows=(SPAIN,)), call("revert", 1, "--ledger", ledger),
                       call("compact", "--ledger", ledger)):  # fmt: skip
            mistake(result, f"is being written by process {os.getpid()}")
        good(call("history", "--ledger", ledger))
        good(call("verify", "--ledger", ledger))
    good(call("revert", 1, "--ledger", ledger))


def test_damage_is_named(ledger):
    good(call("revert", 2, "--ledger", ledger))
    segment = sorted((ledger / "segments").iterdir())[1]
    flip(segment)
    result = call("verify", "--ledger", ledger, "--model", "world")
    assert result.exit_code == 1 and f"damaged: {segment}" in result.stdout
    assert "edits (2,)" in result.stdout and "asked again" not in result.stdout
    mistake(call("restore", 2, "--ledger", ledger), segment.name, "is damaged", "edit 2")
    assert statuses(ledger) == ["active", "reverted", "active"]
    (ledger / "ledger.db").write_bytes(b"no database at all" * 300)
    result = call("verify", "--ledger", ledger)
    assert result.exit_code == 1 and "damaged: " in result.stdout


def test_an_edit_that_was_lost_is_named(ledger):
    """A later edit, of another prompt, that takes the shifts of edit 1 out again."""
    with Reader(ledger, None) as reader:
        modules = list(reader.modules)
        opposite = {n: Shift(s.A, -s.B) for n, s in reader.shifts(1).items()}
    backbone = experiment.load_backbone(ModelConfig(modules=modules, dtype="float32", device="cpu"))
    with Ledger(ledger, DeltaState(backbone.modules)) as opened:
        opened.commit([Entry(EditRequest("Something else is", "x"), opposite)])
    result = call("verify", "--ledger", ledger, "--model", "world")
    assert result.exit_code == 1 and "4 edits asked again" in result.stdout
    assert "success 0.750 when committed, 0.500 now" in result.stdout
    assert "no longer as when committed: 1\n" in result.stdout
