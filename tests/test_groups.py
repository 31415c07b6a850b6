"""Training on Ray with workers of two ranks each: real actors around one sharded model.

One run trains, loses a rank half-way, edits and measures; a second one trains undisturbed on the
group that the first left, and a third goes on from a checkpoint of the second. The first is also
compared with training in one process.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
from rays import timeless
from safetensors.torch import load_file
from worlds import quick, quick_run, same

from hiedit.config import EvaluateConfig, TrainConfig
from hiedit.data.stream import StreamConfig
from hiedit.distributed.executors import execute
from hiedit.run import run
from hiedit.runconfig import DistributionConfig

pytest.importorskip("ray", reason="distributed training needs ray")
pytest.importorskip("deepspeed", reason="sharded models need deepspeed")

from hiedit.distributed.grouped import GroupedJob  # noqa: E402
from hiedit.distributed.rank import RankWorker  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PAIR = DistributionConfig("ray", ranks_per_worker=2, timeout=120.0, checkpoint_every=1)


def settings(directory: Path, **changes):
    changes = {"stream": StreamConfig(length=2)} | changes
    changes |= {"train": TrainConfig(edits=2, stream_lengths=[2])}
    return quick_run(directory, evaluate=EvaluateConfig(points=1, batch=32, examples=0), **changes)


def deadly(place: Path):
    """Ranks of which the second kills itself in its second segment, if there is ``place``."""

    class DeadlyRank(RankWorker):
        def segment(self, version, state=None):
            if self.rank == 1 and self.trajectory.position == 1 and place.exists():
                place.unlink()
                step = self.trajectory.run

                def half(*given):
                    step(*given)
                    os.kill(os.getpid(), signal.SIGKILL)

                self.trajectory.run = half
            return super().segment(version, state)

    return DeadlyRank


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """(result, history) in one process."""
    out = tmp_path_factory.mktemp("local")
    result = run(settings(out), [quick("hiedit")])[0]
    return result, load_file(out / "editors" / "hiedit" / "editor.safetensors")


@pytest.fixture(scope="module")
def grouped(cluster, tmp_path_factory):
    """A run that lost a rank, and the training of one that did not."""
    out, order = tmp_path_factory.mktemp("grouped"), tmp_path_factory.mktemp("orders") / "die"
    order.touch()
    job, method = GroupedJob(deadly(order)), quick("hiedit")
    try:
        config = settings(out, distribution=PAIR)
        said = []
        result = run(config, [method], task=job)[0]
        faults, pool = job.counts.faults, job._pool
        editor = load_file(out / "editors" / "hiedit" / "editor.safetensors")
        history = job.history
        again = dataclasses.replace(config, run_dir=str(out / "again"))
        built, place = pool.build(method), out / "again" / "editors" / "hiedit"
        job._trained(again, method, built, said.append)
        undisturbed = load_file(place / "editor.safetensors"), job.history, job.counts.faults
        # As if that run had died after its first edit.
        shutil.rmtree(out / "again" / "checkpoints" / "hiedit" / "edits-00000002")
        job._trained(dataclasses.replace(again, resume=True), method, built, said.append)
        return {
            "result": result,
            "died": not order.exists(),
            "faults": [faults, undisturbed[2]],
            "editors": [editor, undisturbed[0], load_file(place / "editor.safetensors")],
            "histories": [history, undisturbed[1], job.history],
            "versions": job.counts.version,
        }
    finally:
        job.close()


def test_a_group_that_lost_a_rank_comes_out_as_one_that_did_not(grouped):
    assert grouped["died"] and grouped["faults"] == [1, 0]
    died, undisturbed, _ = map(timeless, grouped["histories"])
    assert died == undisturbed and len(died) == 2
    assert same(*grouped["editors"][:2])


def test_groups_go_on_from_a_checkpoint(grouped):
    _, undisturbed, resumed = map(timeless, grouped["histories"])
    assert resumed == undisturbed and grouped["versions"] == 2
    assert same(*grouped["editors"][1:])


def test_a_group_learns_and_measures_what_one_process_does(grouped, local):
    result, editor = local
    found = grouped["result"]
    assert found.scores == result.scores and found.before == result.before
    assert found.layers_per_edit == result.layers_per_edit
    assert found.train_edits == result.train_edits == 2
    assert found.kl == pytest.approx(result.kl, rel=1e-2)
    learned = grouped["editors"][0]
    assert sorted(learned) == sorted(editor)
    for name, value in editor.items():
        distance = float((learned[name].double() - value.double()).norm())
        assert distance <= 1e-3 * max(1.0, float(value.double().norm())), name


def test_too_little_room_for_groups(cluster, tmp_path):
    config = dataclasses.replace(PAIR, workers=3)
    with pytest.raises(ValueError, match="workers=3 of 2 ranks .* need 6 CPU: the cluster has 5"):
        execute(settings(tmp_path, distribution=config), [quick("hiedit")])


def test_without_deepspeed_there_is_a_remedy_and_no_group(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "ray" or None)
    with pytest.raises(ImportError, match=r"pip install 'hiedit\[deepspeed\]'"):
        execute(settings(tmp_path, distribution=PAIR), [quick("hiedit")])
