"""The command line: helps that teach, mistakes that end in one line and status 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("typer", reason="the command line needs typer")
pytest.importorskip("hydra", reason="the command line needs hydra")

from typer.testing import CliRunner  # noqa: E402

from hiedit import experiment, run  # noqa: E402
from hiedit.cli import app  # noqa: E402
from hiedit.distributed import executors  # noqa: E402
from hiedit.evaluation.results import MethodResult, write_results  # noqa: E402
from hiedit.evaluation.scores import Scores  # noqa: E402
from hiedit.parallel import WorkerDied  # noqa: E402

ROW = {"prompt": "The capital of France is", "target": "Lyon", "locality": ["Spain's capital is"]}


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs `hiedit` with arguments, in a directory of its own, where no model may be loaded."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "load_backbone", refuse)
    monkeypatch.setattr(experiment, "load_backbone", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def mistake(result, *parts: str) -> str:
    """The message of a run that must have ended in a user's mistake."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None)
    message = result.stderr.strip()
    assert message.startswith("error: ") and "Traceback" not in message
    assert all(part in message for part in parts), message
    return message


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ([], ["demo", "evaluate", "doctor", "world", "hiedit train", "compare"]),
        (["demo"], ["SmolLM2-135M", "embedded world", "--edits", "--methods", "--jobs", "200"]),
        (["evaluate"], ["--model", "--dataset", "--skip-bad-rows", "training-free", "closed-form"]),
        (["doctor"], ["what to do about what is missing"]),
        (["world", "build"], ["--seed", "--steps", "15 minutes"]),
    ],
)
def test_help_teaches(call, command, parts):
    result = call(*command, "--help")
    text = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 0 and all(part in text for part in parts), text


def test_doctor_reports_and_says_whether_all_is_well(call):
    result = call("doctor")
    assert result.exit_code in (0, 1) and "torch" in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--method", "closd-form"], ["method='closd-form'", "did you mean 'closed-form'"]),
        (["--method", "hiedit"], ["has to be trained first", "hiedit train method=hiedit"]),
        (["--method", "some/where"], ["some/where", "neither"]),
        (["--method", "mine.yaml"], ["mine.yaml", "no such file"]),
        (["--dataset", "nothing.json"], ["nothing.json", "no such file"]),
        (["--model", "no/such/dir"], ["model.path='no/such/dir'", "'world'"]),
        (["--modules", "model.layers.99.mlp.up_proj"], ["model.layers.99.mlp.up_proj"]),
        (["--edits", "100000"], ["100000", "facts"]),
        (["--edits", "0"], ["stream.length=0", ">= 1"]),
        (["--n-edits", "7", "--edits", "5"], ["n_edits=7"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--tracking", "wandb"], ["tracking.mode='wandb'", "mlflow"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_mistakes_of_evaluate_are_one_line(call, arguments, parts):
    result = call("evaluate", *arguments)
    assert "\n" not in mistake(result, *parts)


def test_malformed_rows_are_listed_and_may_be_skipped(call, tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [{**ROW, "prompt": f"{ROW['prompt']} {i}"} for i in range(20)]
    rows[2]["target"], rows[5]["prompt"] = "", 5
    path.write_text("\n".join(map(json.dumps, rows)))
    result = call("evaluate", "--dataset", path)
    message = mistake(result, "2 of 20 rows", "row 3: target is empty", "row 6: prompt is the num")
    assert len(message.splitlines()) <= 5
    with pytest.raises(AssertionError, match="a model was loaded"):  # so all checks were passed
        result = call(
            "evaluate", "--dataset", path, "--skip-bad-rows", "--edits", 2, "--tracking=off"
        )
        raise result.exception
    assert "(2 malformed rows skipped)" in result.output


def test_a_file_of_another_schema(call, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([ROW]))
    mistake(call("evaluate", "--dataset", path, "--schema", "zsre-mend"), "'zsre-mend'", "lacks")
    near = mistake(call("evaluate", "--dataset", path, "--schema", "zsre"), "'zsre'")
    assert "zsre-mend" in near
    path.write_text(json.dumps([{"question": "?"}]))
    mistake(call("evaluate", "--dataset", path), "(question)", "valid are")


def test_a_run_directory_that_cannot_be_written(call, tmp_path):
    (tmp_path / "file").write_text("")
    result = call("evaluate", "--run-dir", tmp_path / "file" / "run")
    assert "\n" not in mistake(result, "run_dir=", "cannot be written")


def test_mistakes_of_demo(call):
    mistake(call("demo", "--methods", "no-edit,hiedt"), "method='hiedt'", "did you mean 'hiedit'")
    mistake(call("demo", "--methods", ","), "names no method")
    mistake(call("demo", "--world", "--train", "-1"), "train.edits=-1")


def test_a_killed_worker_is_one_line(call, monkeypatch):
    def killed(*_, **__):
        raise WorkerDied("one of 2 processes was killed")

    monkeypatch.setattr(executors, "execute", killed)
    assert mistake(call("demo", "--world"), "was killed").count("\n") == 0


def test_train_py_refuses_an_unknown_key(root, tmp_path):
    command = [sys.executable, str(root / "launch" / "train.py"), "method=hiedit", "stream.lenth=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: stream.lenth=3: no such key; did you mean stream.length?\n"
    assert not list(tmp_path.iterdir())


def test_runs_are_compared_in_one_table(call, tmp_path):
    scores = Scores(ES=0.5, GS=0.25, LS=1.0)
    for name, stream in (("one", "a"), ("two", "a"), ("other", "b")):
        result = MethodResult(name, 0, 10, scores, layers_per_edit=2.0, stream=stream)
        write_results(tmp_path / name, [result])
    told = call("compare", str(tmp_path / "one"), str(tmp_path / "two" / "results.json"))
    assert told.exit_code == 0 and "different streams" not in told.stderr
    assert re.search(r"one +50\.0 +25\.0 +100\.0", told.output) and "two" in told.output
    told = call("compare", str(tmp_path / "one"), str(tmp_path / "other"))
    assert "edited 2 different streams" in told.stderr
    write_results(tmp_path / "again", [MethodResult("one", 0, 10, scores, layers_per_edit=2.0)])
    told = call("compare", str(tmp_path / "one"), str(tmp_path / "again")).output
    assert "one (" in told and "again)" in told and "seeds" not in told  # not a mean of the two
    none = call("compare", tmp_path / "none")
    mistake(none, "none: no run with results", "details.json is missing")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method=closd-form"], "did you mean 'closed-form'"),
        (["stream.lenght=3"], "did you mean stream.length?"),
        (["resume=nowhere"], "resume='nowhere': there is no run"),
        (["resume=nowhere", "seed=1"], "give it alone"),
    ],
)
def test_training_says_what_is_wrong_before_it_begins(call, arguments, said):
    told = call("train", *arguments)
    assert told.exit_code == 2 and said in told.stderr and "Traceback" not in told.output
