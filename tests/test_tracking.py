"""Tracking with the real MLflow on a real SQLite file; one database for the whole session."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hiedit import provenance, tracking
from hiedit.evaluation.results import CurvePoint, MethodResult, Scores
from hiedit.tracking import MlflowTracker, NoTracker, make_tracker

ROOT = Path(__file__).parent.parent
pytest.importorskip("mlflow", reason="MLflow is not installed")


def result(method, seed, es, **more):
    values = {
        "scores": Scores(es, es - 0.1, 0.8, None, 0.98, 0.9, 0.89),
        "retention": Scores(es - 0.05, 0.5, 0.75),
        "curve": (CurvePoint(100, Scores(0.99, 0.9, 0.9)), CurvePoint(200, Scores(es, 0.8, 0.8))),
        "by_age": ((0, Scores(1.0)), (100, Scores(0.9))),
        "kl": math.nan,
        "layers_per_edit": 6.0,
        "layer_frequency": {"model.layers.2.mlp.gate_proj": 0.75},
        "config": {"updater": {"rank": 64}},
        "stream": f"stream{seed}",
    }
    return MethodResult(method, seed, 200, **(values | more))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("a run with spaces")


@pytest.fixture(scope="session")
def client(folder):
    mlflow = tracking._import_mlflow()
    return mlflow.MlflowClient(tracking.sqlite_uri(folder / "mlflow.db"))


@pytest.fixture
def track(folder, monkeypatch):
    """Makes trackers of the tests' database; what they say is in ``track.said``."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(**options):
        return make_tracker("mlflow", directory=folder, say=make.said.append, **options)

    make.said = []
    return make


def runs(client, experiment):
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], order_by=["attributes.start_time"])


def by_role(client, experiment, role):
    return [r for r in runs(client, experiment) if r.data.tags["role"] == role]


def test_a_job_with_its_methods(track, client, folder, tmp_path):
    plot = tmp_path / "plots" / "curve.png"
    plot.parent.mkdir()
    plot.write_bytes(b"png")
    results = [
        result(m, s, es) for s in (0, 1) for m, es in (("rledit", 0.8), ("hiedit", 0.9 + s / 20))
    ]
    config = {"method": {"name": "hiedit", "modules": ["a", "b"], "none": None, "lr": 1e-5}}
    with track(experiment="job", run_name="demo", seed=3) as tracker:
        tracker.params(config)
        for step in range(1, 6):
            tracker.metrics(step, {"train/loss": 1 / step, "train/held": step > 2})
        tracker.artifact(plot)
        tracker.artifact(plot.parent)
        tracker.results(results, baseline="rledit")

    (job,) = by_role(client, "job", "job")
    assert job.info.status == "FINISHED" and job.info.run_name == "demo"
    assert job.data.params == {
        "method.name": "hiedit",
        "method.modules": '["a", "b"]',
        "method.none": "null",
        "method.lr": "1e-05",
    }
    assert job.data.tags["seed"] == "3" and "version.torch" in job.data.tags
    assert "| hiedit |" in job.data.tags["mlflow.note.content"]
    history = client.get_metric_history(job.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(s, 1 / s) for s in range(1, 6)]
    names = {a.path for a in client.list_artifacts(job.info.run_id)}
    assert names == {"config.json", "curve.png", "plots"}
    stored = client.download_artifacts(job.info.run_id, "config.json", str(tmp_path))
    assert json.loads(Path(stored).read_text()) == config
    assert (folder / "mlartifacts" / job.info.run_id).is_dir()

    children = by_role(client, "job", "method")
    assert {(r.data.tags["method"], r.data.tags["seed"]) for r in children} == {
        (m, s) for m in ("rledit", "hiedit") for s in ("0", "1")
    }
    ours = next(
        r for r in children if r.data.tags["stream"] == "stream1" and "gain/ES" in r.data.metrics
    )
    assert ours.info.status == "FINISHED"
    assert ours.data.tags["mlflow.parentRunId"] == job.info.run_id
    assert ours.data.params["updater.rank"] == "64" and ours.data.params["method"] == "hiedit"
    numbers = ours.data.metrics
    assert numbers["eval/ES"] == pytest.approx(0.95) and numbers["gain/ES"] == pytest.approx(0.15)
    assert numbers["eval/retention_ES"] == pytest.approx(0.9)
    assert numbers["layers/model.layers.2.mlp.gate_proj"] == 0.75
    curve = client.get_metric_history(ours.info.run_id, "eval/ES")
    assert [(m.step, round(m.value, 6)) for m in curve] == [(100, 0.99), (200, 0.95)]
    assert [m.step for m in client.get_metric_history(ours.info.run_id, "age/ES")] == [0, 100]
    assert "eval/kl" not in numbers
    command = track.said[-1]
    assert " ui --backend-store-uri 'sqlite:///" in command and command.endswith("127.0.0.1")


def test_results_twice_stay_one_run(track, client):
    with track(experiment="twice") as tracker:
        tracker.results([result("hiedit", 0, 0.8)])
        tracker.results([result("hiedit", 0, 0.9), result("ft", 0, 0.5)])
    children = by_role(client, "twice", "method")
    assert sorted(r.data.metrics["eval/ES"] for r in children) == [0.5, 0.9]


def test_training_curves_belong_to_the_run_of_their_method(track, client):
    with track(experiment="training", seed=0) as tracker:
        for step in (1, 2):
            tracker.metrics(step, {"train/loss": 1 / step}, method="hiedit")
            tracker.metrics(step, {"train/loss": 2.0}, method="rledit")
        tracker.results([result("hiedit", 0, 0.9), result("hiedit", 1, 0.8)])
    children = {r.info.run_name: r for r in by_role(client, "training", "method")}
    assert set(children) == {"hiedit, seed 0, 200 edits", "hiedit, seed 1, 200 edits", "rledit"}
    trained = children["hiedit, seed 0, 200 edits"].data.metrics
    assert trained["train/loss"] == 0.5 and trained["eval/ES"] == pytest.approx(0.9)
    assert "train/loss" not in children["hiedit, seed 1, 200 edits"].data.metrics
    assert {r.info.status for r in runs(client, "training")} == {"FINISHED"}
    with pytest.raises(OSError), track(experiment="training fails") as tracker:
        tracker.metrics(1, {"train/loss": 1.0}, method="hiedit")
        raise OSError
    assert {r.info.status for r in runs(client, "training fails")} == {"FAILED"}


def test_an_exception_marks_the_run_as_failed(track, client):
    with pytest.raises(RuntimeError, match="diverged"), track(experiment="fails") as tracker:
        tracker.metrics(7, {"train/loss": 2.5})
        raise RuntimeError("diverged")
    (run,) = runs(client, "fails")
    assert run.info.status == "FAILED" and run.data.tags["error"] == "RuntimeError: diverged"
    assert run.data.metrics == {"train/loss": 2.5}
    with pytest.raises(KeyboardInterrupt), track(experiment="fails"):
        raise KeyboardInterrupt
    assert {r.info.status for r in runs(client, "fails")} == {"FAILED", "KILLED"}


def test_not_finite_values_are_skipped_and_counted(track, client):
    with track(experiment="finite") as tracker:
        tracker.metrics(1, {"a": math.nan, "b": math.inf, "c": None, "d": 1})
        assert tracker.skipped == 2
        with pytest.raises(ValueError, match="'train/x' is 'high'"):
            tracker.metrics(2, {"train/x": "high"})
    (run,) = runs(client, "finite")
    assert run.data.metrics == {"d": 1.0} and run.data.tags["metrics_not_finite"] == "2"
    assert any("2 metric values were not finite" in line for line in track.said)


def test_long_values_are_cut_and_keys_made_valid(track, client):
    long = "x" * 7000

    @dataclasses.dataclass
    class Config:
        text: str = long
        odd: dict = dataclasses.field(default_factory=lambda: {"a[0]*{1-2}": Path("p"), "e": {}})

    with track(experiment="long") as tracker:
        tracker.params(Config())
        tracker.params({f"key{i}": i for i in range(250)})
        tracker.metrics(1, {"a[0]": 1, "../up": 2, "k" * 300: 3})
        assert tracker.failures == 0
    (run,) = runs(client, "long")
    params = run.data.params
    assert len(params["text"]) == 6000 and len(params) == 253
    assert params["text"].endswith(f"sha256:{hashlib.sha256(long.encode()).hexdigest()}")
    assert params["odd.a_0___1-2_"] == "p" and params["odd.e"] == "{}"
    assert run.data.metrics["a_0_"] == 1 and run.data.metrics["up"] == 2
    assert sorted(map(len, run.data.metrics)) == [2, 4, 250]


def test_metrics_are_written_in_batches(track, client, monkeypatch):
    calls = []
    with track(experiment="batches") as tracker:
        send = tracker._client.log_batch
        monkeypatch.setattr(
            tracker._client, "log_batch", lambda *a, **k: calls.append(k) or send(*a, **k)
        )
        for step in range(1500):
            tracker.metrics(step, {"train/loss": 0.5})
    assert [len(k["metrics"]) for k in calls if k.get("metrics")] == [1000, 500]
    (run,) = runs(client, "batches")
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 1500


def test_a_failing_store_does_not_end_the_run(track, monkeypatch):
    with pytest.warns(UserWarning, match=r"failed \(OSError: gone\); the run goes on"):
        with track(experiment="store") as tracker:

            def gone(*_, **__):
                raise OSError("gone")

            monkeypatch.setattr(tracker._client, "log_batch", gone)
            monkeypatch.setattr(tracker._client, "log_text", gone)
            tracker.params({"a": 1})
            for step in range(2500):
                tracker.metrics(step, {"train/loss": 0.5})
            assert tracker.failures == 2  # the first batch is not tried again at every step
            tracker.results([result("hiedit", 0, 0.9)])
    assert any("calls to MLflow" in line and "incomplete" in line for line in track.said)


def test_missing_artifacts_and_deleted_experiments_are_errors(track, client, tmp_path):
    with track(experiment="deleted") as tracker, pytest.raises(FileNotFoundError, match="nothing"):
        tracker.artifact(tmp_path / "nothing.json")
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    with pytest.raises(ValueError, match="mlflow experiments restore -x"):
        track(experiment="deleted").__enter__()


def test_modes(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert isinstance(make_tracker("off"), NoTracker)
    assert isinstance(make_tracker(False), NoTracker)
    auto = make_tracker("auto", directory=tmp_path)
    assert isinstance(auto, MlflowTracker) and auto.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert make_tracker(True, uri="runs/x.db").uri == f"sqlite:///{Path.cwd()}/runs/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@host:5000")
    assert make_tracker("auto").uri.endswith("host:5000")
    assert tracking.ui_command(make_tracker("auto").uri) == "http://host:5000"
    with pytest.raises(ValueError, match="'wandb' is not one of auto, mlflow, off"):
        make_tracker("wandb")
    with make_tracker("off") as tracker:
        tracker.params({})
        tracker.metrics(0, {})
        tracker.artifact("nowhere")
        tracker.results([])


def test_mlflow_is_imported_when_a_run_starts():
    code = """
import sys
from hiedit.tracking import make_tracker
make_tracker("mlflow")
assert not {"mlflow", "torch", "matplotlib", "rich", "scipy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_telemetry_is_off_unless_the_user_says_otherwise(monkeypatch):
    for name in tracking.NO_TELEMETRY:
        monkeypatch.delenv(name, raising=False)
    mlflow = tracking._import_mlflow()
    assert mlflow.environment_variables.MLFLOW_DISABLE_TELEMETRY.get() is True
    assert os.environ["DO_NOT_TRACK"] == "true"
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    tracking._import_mlflow()
    assert mlflow.environment_variables.MLFLOW_DISABLE_TELEMETRY.get() is False


def test_the_commit_of_a_foreign_repository_is_not_reported(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    copy = tmp_path / "provenance.py"
    copy.write_text("")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    monkeypatch.setattr(provenance, "__file__", str(copy))
    assert "git_commit" not in provenance.environment_tags.__wrapped__()
    subprocess.run([*git, "add", "."], check=True)
    tags = provenance.environment_tags.__wrapped__()
    assert len(tags["git_commit"]) == 40 and tags["git_dirty"] == "true"


def test_two_runs_may_begin_at_once_on_no_database(tmp_path):
    """Each process would create MLflow's tables, and the second to do so fail."""
    program = (
        "import sys; from hiedit.tracking import make_tracker\n"
        "with make_tracker('mlflow', directory=sys.argv[1]): pass"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=180)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
