"""`ray job submit` as a user does it, on the suite's cluster: one job succeeds, one fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import alive, wait_until
from worlds import MODULES

pytest.importorskip("ray", reason="jobs need ray")
pytest.importorskip("hydra", reason="launch/train.py needs hydra")

QUICK = [
    f"model.modules=[{','.join(repr(m) for m in MODULES)}]",
    "model.dtype=float32",
    "method.selector.effect_edits=2",
    "method.updater.preserve=40",
    "method.updater.rank=8",
    "method.passes.max=2",
    "train.edits=4",
    "train.stream_lengths=[2]",
    "stream.length=2",
    "evaluate.points=1",
    "tracking.mode=off",
    "distribution.workers=2",
]


def submit(root, tmp_path, *overrides) -> subprocess.Popen:
    place = {
        "RAY": str(Path(sys.executable).with_name("ray")),
        "HIEDIT_RUNS": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [str(root / "launch" / "submit.sh"), *overrides],
        env=os.environ | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_job_succeeds_or_fails_and_says_so(cluster, root, tmp_path):
    good = submit(root, tmp_path, "method=hiedit", *QUICK)
    bad = submit(root, tmp_path, "method=hiedit", "distribution.workers=0")
    said, _ = bad.communicate(timeout=200)
    assert bad.returncode == 1 and "failed" in said, said
    lines = [line for line in said.splitlines() if line.strip()]
    assert lines[-1].startswith("error: distribution.workers=0: it must be >= 1"), said
    assert "Traceback" not in said
    said, _ = good.communicate(timeout=250)
    assert good.returncode == 0 and "succeeded" in said, said
    assert "workers 2, version 2" in said
    (run,) = tmp_path.iterdir()
    (row,) = json.loads((run / "results.json").read_text())
    assert (row["method"], row["edits"], row["train_edits"]) == ("hiedit", 2, 4)
    config = json.loads((run / "config.json").read_text())
    assert config["distribution"]["kind"] == "ray"


def test_a_second_head_is_refused_and_the_first_one_stays(cluster, root):
    import ray

    place = {"RAY": str(Path(sys.executable).with_name("ray"))}
    again = subprocess.run(
        [str(root / "launch" / "submit.sh"), "start"],
        env=os.environ | place,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "a head runs already" in again.stderr
    assert ray.cluster_resources()["CPU"] == 5


def marked(mark: str) -> list[int]:
    """Processes whose environment has ``mark``."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (place / "environ").read_bytes() and alive(int(place.name)):
                found.append(int(place.name))
    return found


def test_sigterm_checkpoints_and_leaves_no_process_of_its_own_ray(root, tmp_path):
    """A run that started Ray by itself, ended while its workers train."""
    mark = f"HIEDIT_TEST_MARK={tmp_path}"
    training = [value for value in QUICK if not value.startswith("train.edits")]
    run = subprocess.Popen(
        [sys.executable, "launch/train.py", "method=hiedit", "distribution=ray", *training,
         "train.edits=400", f"run_dir={tmp_path / 'run'}"],
        cwd=root,
        env=os.environ | dict([mark.split("=", 1)]) | {"PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        next(line for line in run.stderr if "hiedit: train" in line)
        assert len(marked(mark)) > 4  # the driver, Ray's, a learner, two workers
        run.send_signal(signal.SIGTERM)
        said = run.stderr.read()
        assert run.wait() == 128 + signal.SIGTERM, said
    finally:
        run.kill()
    last = [line for line in said.splitlines() if line.strip()][-1]
    assert last.startswith("error: stopped by SIGTERM; the checkpoint is"), said
    assert f"resume={tmp_path / 'run'}" in last and "Traceback" not in said
    assert list((tmp_path / "run" / "checkpoints" / "hiedit").glob("edits-*/about.json"))
    wait_until(lambda: not marked(mark), f"left behind: {marked(mark)}", 30.0)
