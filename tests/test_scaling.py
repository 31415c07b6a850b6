"""The scaling benchmark runs on real Ray and refuses wrong bits; its model is what it says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scaling  # noqa: E402
from benchmarks.scaling_model import Inputs, Option, ceiling, edits_per_second, half_way  # noqa: E402

GIVEN = Inputs(2.0, 0.0, 4e8, 4e8, 0.0, 1e9, 1e12, 1e12, 1e12, per_node=8)


def test_the_model_by_hand():
    """Ten edits of 2 s; 0.4 s for each worker's gradient, 0.4 s for each node's version."""
    ten = Option("", 10)
    assert edits_per_second(1, ten, GIVEN) == pytest.approx(10 / 20.8, rel=1e-3)
    assert edits_per_second(8, ten, GIVEN) == pytest.approx(80 / (20 + 3.2 + 0.4), rel=1e-3)
    assert edits_per_second(64, ten, GIVEN) == pytest.approx(640 / (20 + 25.6 + 3.2), rel=1e-3)
    assert ceiling(ten, GIVEN) == pytest.approx(10 / (0.4 + 0.05), rel=1e-3)
    loose = Option("", 10, asynchronous=True)
    assert edits_per_second(8, loose, GIVEN) == pytest.approx(80 / 20.8, rel=1e-3)
    assert edits_per_second(64, loose, GIVEN) == pytest.approx(10 / 0.4, rel=1e-3)


def test_what_the_model_says_moves_the_ceiling():
    one = Option("", 1)
    assert ceiling(replace(one, steps=10), GIVEN) == pytest.approx(10 * ceiling(one, GIVEN))
    assert 1.7 < ceiling(replace(one, halved=True), GIVEN) / ceiling(one, GIVEN) < 2
    assert ceiling(one, replace(GIVEN, edit=9.0)) == ceiling(one, GIVEN)
    assert half_way(one, replace(GIVEN, edit=9.0)) > half_way(one, GIVEN) > 1
    slow = replace(GIVEN, variation=0.5)
    assert edits_per_second(1, one, slow) == edits_per_second(1, one, GIVEN)
    assert edits_per_second(8, one, slow) < edits_per_second(8, one, GIVEN)
    assert ceiling(one, GIVEN) > edits_per_second(100_000, one, GIVEN) > 0.99 * ceiling(one, GIVEN)


def test_it_runs_and_reports(cluster, threads, capsys):
    threads(1)
    scaling.main(["--quick", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "one worker has the bits of training in this process" in said
    (line,) = [line.split() for line in said.splitlines() if line.startswith("2 ")]
    one, two, ratio, cpu_one, cpu_two = map(float, line[1:6])
    assert min(one, two, cpu_one, cpu_two) > 0
    assert ratio == pytest.approx(two / one, abs=0.05)
    shares = [float(cell.rstrip("%")) for cell in line[6:11]]
    assert sum(shares) == pytest.approx(100, abs=0.5) and shares[0] > 10
    up, down, state = map(float, line[11:])
    assert up > 0 and down > up / 2 and state > 0
    assert "100 edits per update" in said


def test_wrong_bits_are_refused(threads):
    threads(1)
    backbone, model, method, requests, preserve = scaling.prepared_method(1)
    built = scaling.build_method(backbone, method, requests, preserve, scaling.SEED)
    learned = scaling.learned_state(
        {"selector": built.rollout.selector, "updater": built.rollout.updater}
    )
    trainer = SimpleNamespace(method=built)
    crew = SimpleNamespace(trainer=trainer, run=lambda row, edits: (None, 0.0, learned))
    with pytest.raises(SystemExit, match="one worker differs .*; no speed is reported"):
        scaling.check(crew, backbone, method, requests, preserve, 1)
