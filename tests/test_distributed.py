"""Training on a real Ray cluster: the same numbers as in one process, whatever happens to it.

What is expected of two workers is computed without Ray, from the same parts (``in_one_process``).
The workers are the real ones, but for an order to fail that a test may leave in a directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from worlds import MODULES, quick, quick_run, same

from hiedit.config import TrainConfig
from hiedit.experiment import load_backbone
from hiedit.methods import build_method
from hiedit.parallel import WorkerDied
from hiedit.rl.checkpoint import Checkpoints, Interrupted, Snapshot
from hiedit.rl.learner import Contribution, Gradients
from hiedit.rl.objective import Objective
from hiedit.rl.observed import learned_state, load_learned_state, recorded
from hiedit.rl.segment import Trajectory
from hiedit.runconfig import DistributionConfig, ModelConfig
from hiedit.world import world_requests

pytestmark = pytest.mark.usefixtures("one_thread")

# As in a run without a cluster; read when Ray is imported.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
ray = pytest.importorskip("ray", reason="distributed training needs ray")

from hiedit.distributed.controller import Controller  # noqa: E402
from hiedit.distributed.learner import LearnerActor  # noqa: E402
from hiedit.distributed.pool import WorkerPool  # noqa: E402
from hiedit.distributed.trainer import SEED_STEP, RayTrainer, share  # noqa: E402
from hiedit.distributed.transport import pack_snapshot, unpack  # noqa: E402
from hiedit.distributed.worker import RolloutWorker  # noqa: E402

MODEL = ModelConfig(modules=MODULES, dtype="float32", device="cpu")
TRAIN = TrainConfig(edits=11, stream_lengths=[2, 4], steps_per_update=2)  # 6 and 5 of 2 workers
TWO = DistributionConfig("ray", workers=2, timeout=60.0)
SEED = 5


@pytest.fixture(scope="session")
def cluster():
    """One cluster for all tests; its address."""
    quiet = {"include_dashboard": False, "logging_level": "ERROR"}
    context = ray.init("local", num_cpus=5, object_store_memory=200 << 20, **quiet)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def base():
    return load_backbone(MODEL)


@pytest.fixture(scope="module")
def requests():
    return tuple(world_requests("train")[:30])


def timeless(history):
    return [dataclasses.replace(step, seconds=0.0) for step in history]


def learned(method):
    rollout = method.rollout
    return learned_state({"selector": rollout.selector, "updater": rollout.updater})


# One worker, through the interface that a run uses


def test_one_worker_has_the_bits_of_training_in_one_process(cluster, base, requests):
    local = build_method(base, quick("hiedit"), requests, seed=SEED)
    history = local.trainer(TRAIN, SEED).run(requests, TRAIN, SEED)
    remote = build_method(base, quick("hiedit"), requests, seed=SEED)
    assert not same(learned(remote), learned(local))
    trainer = RayTrainer(remote, MODEL, DistributionConfig("ray"))
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
    wait_until(lambda: not any(alive(pid) for pid in pids), "the worker outlived its run")


# Two workers: what is expected


@pytest.fixture(scope="module")
def setting(base, requests):
    """A method as it begins, what two workers make of it, and where everybody begins."""
    method = build_method(base, quick("hiedit"), requests, seed=SEED)
    rays = RayTrainer(method, MODEL, TWO)
    setups, parts = rays._setups(TRAIN, SEED), rays._parts()
    learner = method.trainer(TRAIN, SEED).learner
    begin = learner.state()
    rollout = build_method(base, quick("hiedit"), requests, seed=SEED).rollout
    for part in ("selector", "updater"):  # what was measured twice may differ in a last bit
        getattr(rollout, part).load_state_dict(getattr(method.rollout, part).state_dict())
    trajectories = [trajectory(rollout, requests, i) for i in range(2)]
    states = [one.state() for one in trajectories]
    expected = in_one_process(learner, trajectories)
    return dict(setups=setups, parts=parts, learner=begin, states=states, expected=expected)


def trajectory(rollout, requests, index):
    """Worker ``index`` as it begins."""
    seed = SEED + index * SEED_STEP
    objective = Objective(quick("hiedit").objective, rollout.env.backbone.tokenizer, seed)
    return Trajectory(rollout, objective, requests, share(TRAIN, 2, index), seed)


def in_one_process(learner, trajectories):
    """The final version and the losses, round by round: workers one after the other, on one
    model, whose edits are put back from each one's state."""
    rollout = trajectories[0].rollout
    gradients = Gradients(rollout.selector, rollout.updater)
    states, losses = [one.state() for one in trajectories], []
    for _ in range(3):
        version, contributions = learner.published(), []
        for i, one in enumerate(trajectories):
            one.load_state(states[i])
            load_learned_state(gradients.modules, version)
            with recorded(gradients.modules) as observed:
                steps = one.run(TRAIN.steps_per_update, gradients.backward)
            taken, dropped = gradients.take()
            full = len(steps) == TRAIN.steps_per_update
            contributions.append(Contribution(taken if full else {}, observed, dropped))
            states[i] = one.state()
            losses += [step.loss for step in steps]
        learner.update(contributions)
    rollout.reset()
    return learner.published(), losses


# Two workers, for real


def ordered_worker(directory: Path):
    """Rollout workers that do what they find in ``directory``: a file ``INDEX-SEGMENT`` says how
    to fail there, half-way through the segment, once (``always-...``: whenever one begins)."""

    class OrderedWorker(RolloutWorker):
        def segment(self, version, state=None):
            if state is not None:  # else it goes on where it is
                self.trajectory.load_state(Snapshot(unpack(state), state.values))
            index, number = self.setup.seed // 1_000_003, self.trajectory.position // 2
            path = directory / f"{index}-{number}"
            order = path.read_text() if path.exists() else ""
            if order and not order.startswith("always-"):
                path.unlink()
            run, gradients = self.trajectory.run, self.gradients

            def spoiled(steps, backward):
                done = run(1, backward)
                if order == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if order in ("wait", "hang"):
                    (directory / f"waiting-{index}").touch()
                    time.sleep(1000)
                if order.startswith("slow"):
                    time.sleep(1.5)
                done += run(steps - 1, backward)
                if order.endswith("nan"):
                    next(iter(gradients.named().values())).grad.fill_(float("nan"))
                return done

            if order:
                self.trajectory.run = spoiled
            try:
                return super().segment(version)
            finally:
                self.trajectory.run = run

    return OrderedWorker


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
    import sys, torch
    torch.set_num_threads(1)
    sys.path[:0] = {path!r}
    import test_distributed as t
    from hiedit.rl.checkpoint import Checkpoints
    base = t.load_backbone(t.MODEL)
    requests = tuple(t.world_requests("train")[:30])
    method = t.build_method(base, t.quick("hiedit"), requests, seed=t.SEED)
    trainer = t.RayTrainer(method, t.MODEL, t.dataclasses.replace(t.TWO, address={address!r}))
    def on_step(step):
        pool = trainer.controller.pool
        pids = t.ray.get([h.ready.remote() for h in pool.handles])
        print("step", step.edit, *pids, flush=True)
    trainer.run(requests, t.TRAIN, t.SEED, on_step, Checkpoints({place!r}, every=1))
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

    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(running, "load_backbone", None)
    with pytest.raises(ImportError, match=r"pip install 'hiedit\[ray\]'"):
        running.run(quick_run(tmp_path, distribution=TWO), [quick("hiedit")])


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(true, message, seconds=15.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, message
        time.sleep(0.05)
