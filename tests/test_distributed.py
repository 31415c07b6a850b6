"""Training on a real Ray cluster: the same numbers as in one process, whatever happens to it.

What is expected of two workers is computed without Ray, from the same parts (``in_one_process``).
The workers are the real ones, but for an order to fail that a test may leave in a directory.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from processes import alive, wait_until
from rays import (
    MODEL,
    SEED,
    TRAIN,
    TWO,
    in_one_process,
    learned,
    ordered_worker,
    timeless,
    trajectory,
)
from worlds import quick, quick_run, same

from hiedit.experiment import load_backbone
from hiedit.methods import build_method
from hiedit.parallel import WorkerDied
from hiedit.rl.checkpoint import Checkpoints, Interrupted
from hiedit.runconfig import DistributionConfig
from hiedit.world import world_requests

pytestmark = pytest.mark.usefixtures("one_thread")

ray = pytest.importorskip("ray", reason="distributed training needs ray")

from hiedit.distributed.controller import Controller  # noqa: E402
from hiedit.distributed.learner import LearnerActor  # noqa: E402
from hiedit.distributed.pool import WorkerPool  # noqa: E402
from hiedit.distributed.trainer import RayTrainer  # noqa: E402
from hiedit.distributed.transport import pack_snapshot, unpack  # noqa: E402


@pytest.fixture(scope="module")
def base():
    return load_backbone(MODEL)


@pytest.fixture(scope="module")
def requests():
    return tuple(world_requests("train")[:30])


# One worker, through the interface that a run uses


def test_one_worker_has_the_bits_of_training_in_one_process(cluster, base, requests):
    local = build_method(base, quick("hiedit"), requests, seed=SEED)
    history = local.trainer(TRAIN, SEED).run(requests, TRAIN, SEED)
    remote = build_method(base, quick("hiedit"), requests, seed=SEED)
    assert not same(learned(remote), learned(local))
    versions = []
    trainer = RayTrainer(remote, MODEL, DistributionConfig("ray"), versions.append)
    told, pids = [], []

    def on_step(step):
        told.append(step)
        if not pids:
            pids.extend(ray.get([h.ready.remote() for h in trainer.controller.pool.handles]))

    distributed = trainer.run(requests, TRAIN, SEED, on_step)
    assert timeless(distributed) == timeless(history) and told == distributed
    assert same(learned(remote), learned(local))
    counts = trainer.counts
    assert (counts.version, counts.faults, counts.dropped) == (5, 0, 0)
    assert [step for steps in versions for step in steps] == told
    assert [len(steps) for steps in versions] == [2, 2, 2, 2, 2, 1]
    status = trainer.status()
    assert status["rate"] > 0 and (status["workers"], status["version"]) == (1, 5)
    wait_until(lambda: not any(alive(pid) for pid in pids), "the worker outlived its run")


# Two workers: what is expected


@pytest.fixture(scope="module")
def setting(base, requests):
    """A method as it begins, what two workers make of it, and where everybody begins."""
    method = build_method(base, quick("hiedit"), requests, seed=SEED)
    rays = RayTrainer(method, MODEL, TWO)
    setups, parts = rays.setups(TRAIN, SEED), rays.parts()
    learner = method.trainer(TRAIN, SEED).learner
    begin = learner.state()
    rollout = build_method(base, quick("hiedit"), requests, seed=SEED).rollout
    for part in ("selector", "updater"):  # what was measured twice may differ in a last bit
        getattr(rollout, part).load_state_dict(getattr(method.rollout, part).state_dict())
    trajectories = [trajectory(rollout, requests, i) for i in range(2)]
    states = [one.state() for one in trajectories]
    expected = in_one_process(learner, trajectories)
    return dict(setups=setups, parts=parts, learner=begin, states=states, expected=expected)


# Two workers, for real


@pytest.fixture(scope="module")
def crew(cluster, setting, requests, tmp_path_factory):
    """(pool, learner, orders): started once; every test begins them anew."""
    orders = tmp_path_factory.mktemp("orders")
    pool = WorkerPool(
        TWO, setting["setups"], ray.put(setting["parts"]), ray.put(requests), ordered_worker(orders)
    )
    whole = dataclasses.replace(setting["setups"][0], train=TRAIN)
    learner = ray.remote(num_cpus=0)(LearnerActor).remote(whole, setting["parts"], "cpu")
    pool.start()
    yield pool, learner, orders
    pool.stop()
    ray.kill(learner)


def controlled(crew, setting, config=TWO, checkpoints=None, **options):
    """A controller whose workers and learner stand at the beginning."""
    pool, learner, orders = crew
    for path in orders.iterdir():
        path.unlink()
    pool.config = config
    ray.get(learner.load.remote(pack_snapshot(setting["learner"])))
    controller = Controller(config, pool, learner, checkpoints=checkpoints, **options)
    controller.states = [ray.put(pack_snapshot(state)) for state in setting["states"]]
    controller._resumed = {0, 1}
    return controller


def check(controller, version, setting):
    """The run came out as two workers in one process do."""
    expected, losses = setting["expected"]
    assert [step.loss for step in controller.history] == losses
    assert [step.edit for step in controller.history] == list(range(1, 12))
    assert same(unpack(version), expected)


def test_two_workers_whatever_the_order_of_arrival(crew, setting):
    for slow in (0, 1):
        controller = controlled(crew, setting)
        (crew[2] / f"{slow}-0").write_text("slow")
        check(controller, controller.run(), setting)
        assert controller.counts.faults == 0 and controller.counts.version == 3


def test_workers_that_fail_are_replaced_and_nothing_else_changes(crew, setting):
    """SIGKILL and ray.kill half-way through a segment, NaN, and one that hangs."""
    pool, _, orders = crew
    said = []
    config = dataclasses.replace(TWO, timeout=8.0)
    controller = controlled(crew, setting, config, say=said.append)
    for place, order in (("0-0", "die"), ("1-0", "wait"), ("0-1", "nan"), ("1-1", "hang")):
        (orders / place).write_text(order)
    before = list(pool.handles)

    def kill():
        wait_until(lambda: (orders / "waiting-1").exists(), "worker 1 never waited", 60.0)
        (orders / "waiting-1").unlink()
        ray.kill(before[1])

    killer = threading.Thread(target=kill)
    killer.start()
    version = controller.run()
    killer.join()
    check(controller, version, setting)
    assert controller.counts.faults == 4 and controller.counts.workers == 2
    assert sorted(text.split(";")[0] for text in said) == [
        "worker 0 died",
        "worker 0 returned gradients that are not finite",
        "worker 1 did not finish within distribution.timeout=8 s",
        "worker 1 died",
    ]


def test_after_so_many_attempts_there_is_an_error_and_a_checkpoint(crew, setting, tmp_path):
    config = dataclasses.replace(TWO, retries=0)
    controller = controlled(crew, setting, config, Checkpoints(tmp_path))
    (crew[2] / "1-1").write_text("always-nan")
    with pytest.raises(
        WorkerDied, match="worker 1 returned .* not finite, after 1 attempts.*edits-00000004"
    ):
        controller.run()
    (crew[2] / "1-1").unlink()
    again = Checkpoints(tmp_path, resume=True)
    check(*resumed(crew, setting, again), setting)


def resumed(crew, setting, checkpoints):
    """(controller, version) of the run that goes on from the newest checkpoint."""
    controller = controlled(crew, setting, checkpoints=checkpoints)
    parts, about = checkpoints.load()
    ray.get(crew[1].load.remote(pack_snapshot(parts["learner"])))
    controller.load(parts, about)
    return controller, controller.run()


def test_a_signal_gives_up_the_segments_and_writes_a_checkpoint(crew, setting, tmp_path):
    controller = controlled(crew, setting, checkpoints=Checkpoints(tmp_path))
    controller.on_step = lambda step: step.edit == 4 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM.*edits-00000004"):
        controller.run()
    check(*resumed(crew, setting, Checkpoints(tmp_path, resume=True)), setting)


@pytest.mark.parametrize("bound", [0, 4])
def test_gradients_beyond_the_bound_of_staleness_are_dropped(crew, setting, bound):
    config = dataclasses.replace(TWO, mode="async", max_staleness=bound)
    controller = controlled(crew, setting, config)
    (crew[2] / "1-0").write_text("slow")
    controller.run()
    counts = controller.counts
    assert [step.edit for step in controller.history] == list(range(1, 12))
    assert counts.version + counts.stale == 5  # the full segments of both
    if bound == 0:
        assert counts.stale > 0 and counts.version < 5
    else:
        assert counts.stale == 0 and counts.version == 5


# The driver dies


DRIVER = """
    import dataclasses, sys, ray, torch
    torch.set_num_threads(1)
    sys.path[:0] = {path!r}
    from rays import MODEL, SEED, TRAIN, TWO
    from worlds import quick
    from hiedit.distributed.trainer import RayTrainer
    from hiedit.experiment import load_backbone
    from hiedit.methods import build_method
    from hiedit.rl.checkpoint import Checkpoints
    from hiedit.world import world_requests
    requests = tuple(world_requests("train")[:30])
    method = build_method(load_backbone(MODEL), quick("hiedit"), requests, seed=SEED)
    trainer = RayTrainer(method, MODEL, dataclasses.replace(TWO, address={address!r}))
    def on_step(step):
        pids = ray.get([h.ready.remote() for h in trainer.controller.pool.handles])
        print("step", step.edit, *pids, flush=True)
    trainer.run(requests, TRAIN, SEED, on_step, Checkpoints({place!r}, every=1))
"""


def test_a_driver_that_was_killed_goes_on_where_it_was(crew, setting, cluster, tmp_path, root):
    code = textwrap.dedent(DRIVER).format(
        path=[str(root / "tests"), str(root)], address=cluster, place=str(tmp_path)
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root
    )
    try:
        lines = (line.split() for line in driver.stdout if line.startswith("step"))
        pids = next(line for line in lines if int(line[1]) > 4)[2:]  # in the second version
        driver.send_signal(signal.SIGKILL)
    finally:
        driver.kill()
        driver.wait()
    checkpoints = Checkpoints(tmp_path, resume=True)
    edits = [step["edit"] for step in checkpoints.load()[1]["history"]]
    assert 4 <= len(edits) < 11
    check(*resumed(crew, setting, checkpoints), setting)
    wait_until(lambda: not any(alive(int(pid)) for pid in pids), "workers outlived their driver")


# What is wrong before anything was started


def test_too_little_room_is_an_error(cluster, base, requests):
    method = build_method(base, quick("hiedit"), requests, seed=SEED)
    config = DistributionConfig("ray", workers=64)
    with pytest.raises(ValueError, match="workers=64 .* need 64 CPU: the cluster has 5"):
        RayTrainer(method, MODEL, config).run(requests, TRAIN, SEED)


def test_without_ray_there_is_a_remedy_and_no_model(monkeypatch, tmp_path):
    from hiedit import distributed
    from hiedit import run as running
    from hiedit.distributed.executors import execute

    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(running, "load_backbone", None)
    with pytest.raises(ImportError, match=r"pip install 'hiedit\[ray\]'"):
        execute(quick_run(tmp_path, distribution=TWO), [quick("hiedit")])
    with pytest.raises(ValueError, match="distribution.kind=ray: hiedit.distributed.executors"):
        running.run(quick_run(tmp_path, distribution=TWO), [quick("hiedit")])
