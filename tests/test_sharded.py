"""A model over two real ranks (gloo, the deepspeed launcher) against the same model in one process.

The ranks run ``sharded_checks.py`` once, which also trains and edits by the programs in
``launch/``; the tests read what it measured. A second launch, of plain processes, loses a rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import FRANCE, call, mistake, write

from hiedit.compose import compose
from hiedit.sharded import REMEDY, require_deepspeed
from hiedit.sharded.building import check_builds
from hiedit.sharded.group import Place, meeting_place
from hiedit.sharded.modules import span
from hiedit.sharded.ranks import check_world, join
from hiedit.sharded.settings import offloads, read_settings, settings

pytest.importorskip("deepspeed", reason="sharded models need deepspeed")
ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]


def environment() -> dict[str, str]:
    """Two ranks share this machine; whatever group this process belongs to is not theirs."""
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, on first use
    return outside | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path,
                      "PYTHONPATH": str(ROOT)}  # fmt: skip


def launched(*arguments, timeout: float = 500) -> subprocess.CompletedProcess:
    command = [*LAUNCHER, "--master_port", str(meeting_place()[1]), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment()
    )


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """What two ranks found out, by check."""
    scratch = tmp_path_factory.mktemp("sharded")
    done = launched("tests/sharded_checks.py", scratch / "out.json", scratch)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return json.loads((scratch / "out.json").read_text())


def test_a_training_edit_is_the_unsharded_one(checks):
    found = checks["equality"]
    assert checks["world"] == 2 and found["parameters"] > 10
    # What every rank computes for itself from gathered weights: the same bits.
    assert found["signals"] == found["masks"] == found["shifts"] == 0.0
    # What is summed over ranks: another order.
    assert found["losses"] < 1e-5
    assert found["gradients"] < 2e-5  # over the largest gradient's norm; 1.1e-5 has been seen
    assert found["gradient_norm"] > 1e-3


def test_twenty_edits_leave_the_same_bits(checks):
    found = checks["twenty_edits"]
    assert found["changed"] == 4
    assert found["weights"] and found["accumulators"] and found["reset"] and found["base_weights"]
    assert found["growth"] < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_that_no_number_of_ranks_divides(checks, name):
    found = checks["odd_shapes"][name]
    assert not found["divides"] and found["span"][0] == 0
    assert found["weights"] and found["rebuilt"]


def test_saved_and_exported(checks):
    found = checks["saved"]
    assert found["files"] > 2 and found["largest"] <= max(2 << 20, found["tensor"])
    assert found["merged"]
    assert found["adapter"] < 1e-5


def test_training_goes_on_where_it_was(checks):
    found = checks["resume"]
    assert found["same"] and found["edits"] == 2 and found["tensors"] > 10


def test_bytes_sent_are_near_the_least(checks):
    found = checks["traffic"]
    assert found["forward"] > 2 and found["backward"] > 1
    assert 1.0 <= found["sent"]["gather"] / found["least"] < 1.2
    assert 0 < found["sent"]["factors"] < found["sent"]["gather"] / 100


def test_every_rank_reads_only_its_part(checks):
    found = checks["loading"]
    assert found["read"] <= found["part"] * 1.1  # bytes


def test_hiedit_edit_over_ranks_writes_the_ledger_of_one_process(checks):
    """Two edits by the command, the ledger opened again over the ranks for two more."""
    found = checks["edit_command"]
    assert found["status"] == 0 and found["told"] == ["skipped", "committed", "committed"]
    assert found["ids"] == [1, 2, 2, 3, 4] and found["history"] == ["active"] * 4
    assert found["factors"] and found["segments"] == 4 and found["weights"] and found["verified"]


def test_train_sharded_end_to_end(checks):
    found = checks["trained"]
    assert found["status"] == 0 and found["editor"] == ["editor.safetensors", "method.json"]
    assert [(row["method"], row["edits"]) for row in found["rows"]] == [("hiedit", 2)]


def test_a_rank_that_dies_ends_the_others(tmp_path):
    _, port = meeting_place()
    script = str(ROOT / "tests" / "sharded_death.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said, _ = ranks[0].communicate(timeout=150)
        assert ranks[1].wait(10) == -9
        assert ranks[0].returncode == 3, said
        assert "another rank of this model ended" in said
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights=true"),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_size": 9}},
            "stage3_prefetch_bucket_size=9",
        ),
        ({"zero_optimization": {"stage3_param_persistence_threshold": 1000}}, "below 1000"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 'device="nvme"'),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"optimizer": {"type": "Adam"}}, "optimizer="),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=false"),
        ({"train_batch_size": 8}, "train_batch_size=8"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_deepspeed_config_that_contradicts_ours(given, said):
    with pytest.raises(ValueError) as error:
        settings(given, torch.bfloat16, 1000)
    assert said in str(error.value) and str(error.value).startswith("deepspeed: ")


@pytest.mark.parametrize("name", ["zero3", "zero3-offload"])
def test_the_configs_that_come_along(name):
    values = settings(read_settings(name), torch.bfloat16, 1 << 20)
    assert values["zero_optimization"]["stage"] == 3 and values["bf16"]["enabled"]
    assert offloads(values) == (name == "zero3-offload")
    with pytest.raises(ValueError, match=r"distribution.deepspeed='zero4'.*zero3, zero3-offload"):
        read_settings("zero4")


def test_a_world_size_that_does_not_divide():
    with pytest.raises(ValueError, match="ranks_per_worker=2 does not divide the 3 ranks"):
        check_world(3, 2)
    with pytest.raises(ValueError, match="4 ranks were started"):
        check_world(4, 2)
    check_world(4, 2, workers=2)
    check_world(3, 0)
    with pytest.raises(ValueError, match="rank=2"):
        Place(2, 2)


def test_a_process_that_is_no_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK is not set.*deepspeed --num_accelerators"):
        join()


def test_without_deepspeed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hiedit\[deepspeed\]'"):
        require_deepspeed()
    assert "distribution=local" in REMEDY


def test_a_lock_that_a_killed_build_left_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "shm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    check_builds(["shm", "other"])  # of this moment: somebody may be building
    os.utime(lock, (0, 0))
    check_builds(["other"])
    with pytest.raises(ValueError, match=f"{lock} was left .* minutes ago .*delete the file"):
        check_builds(["shm"])
    builder = subprocess.Popen(["sleep", "60"], cwd=lock.parent)
    try:
        check_builds(["shm"])
    finally:
        builder.kill()
        builder.wait()


def test_edits_over_ranks_that_cannot_be(tmp_path):
    rows = write(tmp_path / "edits.jsonl", FRANCE)
    given = ["edit", "--model", "world", "--ledger", tmp_path / "ledger", "--deepspeed", "zero3"]
    mistake(call(*given, "--input", "-", input=""), "--input - with --deepspeed")
    mistake(call(*given, "--input", rows, "--dry-run"), "--dry-run with --deepspeed")
    assert not (tmp_path / "ledger").exists()


def test_a_mistake_costs_no_launch(tmp_path):
    command = [sys.executable, "launch/train_sharded.py", "model=world", "method.passes.mux=2"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60
    )
    assert done.returncode == 2 and "method.passes.max" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_configuration_of_seventy_billion():
    config = compose(["model=llama-3-70b", "method=hiedit", "distribution=deepspeed"])
    assert config.distribution.deepspeed == "zero3" and config.model.dtype == "bfloat16"


def test_spans_cover_a_weight_once():
    for ranks in (1, 2, 3, 4, 7):
        for numel in (1, 5, 12, 77 * 33):
            size = -(-numel // ranks)

            class Param:
                ds_tensor = type("Part", (), {"ds_numel": size})
                ds_numel = numel

            parts = []
            for rank in range(ranks):
                Param.ds_zero_partition_rank = rank
                parts.append(span(Param))
            covered = [i for start, end in parts for i in range(start, end)]
            assert covered == list(range(numel))
