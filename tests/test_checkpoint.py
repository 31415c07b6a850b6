"""Checkpoints: whole or absent, the last few kept, and a run that goes on from one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch
from test_segment import same
from test_training import CONFIG, REQUESTS, prepare
from test_training import backbone as backbone  # a fixture
from test_training import base_model as base_model  # a fixture

from hiedit.config import TrainConfig
from hiedit.rl.checkpoint import Checkpoints, Interrupted, Snapshot, StopSignals
from hiedit.rl.observed import learned_state
from hiedit.run import read_config, write_config
from hiedit.runconfig import RunConfig

PARTS = {"learner": Snapshot({"a": torch.arange(3.0), "n": torch.tensor(2)}, {"version": 4})}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def names(checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.directory.iterdir())


# Files


def test_what_is_written_is_read(tmp_path):
    Checkpoints(tmp_path, identity={"seed": 1}).save(7, PARTS, {"history": [1, 2]})
    parts, about = Checkpoints(tmp_path, identity={"seed": 1}, resume=True).load()
    assert same(parts["learner"].tensors, PARTS["learner"].tensors)
    assert parts["learner"].values == {"version": 4} and about["history"] == [1, 2]
    assert Checkpoints(tmp_path, identity={"seed": 1}).load() is None  # nobody asked


def test_the_last_few_are_kept_and_those_of_an_earlier_run_go(tmp_path):
    old = Checkpoints(tmp_path, keep=5)
    old.save(99, PARTS, {})
    checkpoints = Checkpoints(tmp_path, every=3, keep=2)
    for edits in (2, 4, 4, 11):
        checkpoints.save(edits, PARTS, {})
    assert names(checkpoints) == ["edits-00000004", "edits-00000011"]
    assert [v for v in range(8) if checkpoints.due(v)] == [3, 6]
    again = Checkpoints(tmp_path, keep=2, resume=True)
    again.save(12, PARTS, {})
    assert names(again) == ["edits-00000011", "edits-00000012"]


def test_half_a_checkpoint_is_none(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=3, resume=True)
    checkpoints.save(1, PARTS, {})

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(2, PARTS, {})
    assert [path.name for path in checkpoints.paths()] == ["edits-00000001"]
    assert checkpoints.load() is not None
    checkpoints.save(3, PARTS, {})
    assert names(checkpoints) == ["edits-00000001", "edits-00000003"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Checkpoints(tmp_path, identity={"seed": 1, "workers": 2}).save(1, PARTS, {})
    with pytest.raises(ValueError, match="written with workers=2; this run has 3"):
        Checkpoints(tmp_path, identity={"seed": 1, "workers": 3}, resume=True).load()


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = Checkpoints(tmp_path).save(1, PARTS, {})
    whole = (path / "learner.safetensors").read_bytes()
    for name, content in (("learner.safetensors", whole[:20]), ("about.json", b"{")):
        before = (path / name).read_bytes()
        (path / name).write_bytes(content)
        with pytest.raises(ValueError, match="edits-00000001 is damaged.*remove it"):
            Checkpoints(tmp_path, resume=True).load()
        (path / name).write_bytes(before)
    assert Checkpoints(tmp_path, resume=True).load()


# A run in one process


class Stop(Exception):
    pass


def test_a_run_that_died_goes_on_with_the_same_bits(backbone, tmp_path):
    """Killed after every edit in turn; the run with checkpoints equals the one without."""

    def train(resume=False, die_at=None, checkpoints=True):
        parts, trainer = prepare(backbone)
        place = Checkpoints(tmp_path, every=1, resume=resume) if checkpoints else None

        def on_step(step):
            if step.edit == die_at:
                raise Stop

        history = trainer.run(REQUESTS, CONFIG, 0, on_step, place)
        history = [dataclasses.replace(step, seconds=0.0) for step in history]
        rollout = parts.rollout
        return history, learned_state({"s": rollout.selector, "u": rollout.updater})

    expected, state = train(checkpoints=False)
    for die_at in range(1, 7):
        with pytest.raises(Stop):
            train(die_at=die_at)
        history, resumed = train(resume=die_at > 2)  # before the third there is none
        assert history == expected and same(resumed, state), die_at
    history, resumed = train(resume=True)  # nothing is left to do
    assert history == expected and same(resumed, state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_segment_and_writes_a_checkpoint(backbone, tmp_path, number):
    _, trainer = prepare(backbone)
    config = TrainConfig(edits=500, stream_lengths=[4], steps_per_update=2)
    before = signal.getsignal(number)

    def on_step(step):
        if step.edit == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"stopped by {number.name}.*edits-00000004"):
        trainer.run(REQUESTS, config, 0, on_step, Checkpoints(tmp_path, every=1000))
    assert signal.getsignal(number) is before
    about = json.loads((tmp_path / "edits-00000004" / "about.json").read_text())
    assert len(about["history"]) == 4


def test_a_second_ctrl_c_ends_it_at_once():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="resume=.*there is no run"):
        read_config(tmp_path)
    write_config(tmp_path, RunConfig(seed=7))
    config = read_config(tmp_path)
    assert (config.seed, config.run_dir, config.resume) == (7, str(tmp_path), True)
