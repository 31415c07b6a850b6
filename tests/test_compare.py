"""Comparing methods cell by cell: keys, resuming after a kill, tuning, tables from cells alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from hiedit.catalogue import load_method
from hiedit.compare import grid, measure
from hiedit.compare.analysis import Comparison, auc, comparisons, truth_scores
from hiedit.compare.cells import Cell, cell_path, read_cell, write_cell
from hiedit.compare.config import CompareConfig, ExperimentConfig, apply
from hiedit.compare.driver import compare
from hiedit.compare.figures import plot_differences
from hiedit.compare.grid import choose, measure_cells, setup_of, tune_cells
from hiedit.compare.probing import correlations, spearman
from hiedit.compose import compose
from hiedit.evaluation.statistics import Paired, holm, permutation_test

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = ("seconds", "cpu_seconds", "wall_seconds", "train_seconds", "seconds_per_edit")


def small(directory, *overrides) -> CompareConfig:
    arguments = ["experiment=selection-small", f"run_dir={directory}", "jobs=1", *overrides]
    return compose(arguments, CompareConfig, "compare")


def cells_of(directory) -> dict[str, dict]:
    """The results by file name, without what the clock says."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in TIMES}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    paths = sorted((directory / "cells").glob("*.json"))
    return {path.name: timeless(json.loads(path.read_text())) for path in paths}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread):
    directory = tmp_path_factory.mktemp("compare")
    compare(small(directory))
    return directory


# ---- a whole experiment, small


def test_an_experiment_leaves_a_cell_for_every_measurement(finished):
    config = small(finished).experiment
    chosen = choose(config, str(finished))
    assert {key[1] for key in chosen} == set(config.methods)
    assert chosen["world", "no-edit", 2] == {} == chosen["world", "random", 4]
    assert chosen["world", "hiedit", 4]["updater.eta"] in (0.1, 0.4)
    cells = [*tune_cells(config), *measure_cells(config, chosen)]
    assert len(tune_cells(config)) == 2
    assert all(read_cell(finished, cell) is not None for cell in cells)
    assert len(cells_of(finished)) == len({c.key for c in cells}) + 1  # and the probe
    report = json.loads((finished / "report.json").read_text())
    assert report["missing"] == []
    assert {(r["method"], r["seed"], r["edits"]) for r in report["rows"]} == {
        (m, s, h) for m in config.methods for s in (0, 1) for h in (2, 4)
    }
    control = [r for r in report["rows"] if r["method"] == "no-edit"]
    assert all(r["LS"] == 1 and r["layers_per_edit"] == 0 for r in control)
    edited = [r for r in report["rows"] if r["method"] != "no-edit"]
    assert all(r["layers_per_edit"] == 2 and r["passes_per_edit"] >= 1 for r in edited)
    assert {c["baseline"] for c in report["comparisons"]} == {"random"}
    assert all(c["paired"]["n"] == 2 for c in report["comparisons"])
    tried = report["tuning"]
    assert [t["method"] for t in tried] == ["hiedit", "hiedit"]
    for horizon in ("2", "4"):
        best = max(t["scores"][horizon] for t in tried)
        (chosen,) = (t for t in tried if int(horizon) in t["chosen"])
        assert chosen["scores"][horizon] == best
        assert f"**{100 * best:.1f}**" in (finished / "report.md").read_text()
    plots = ("world_by_edits.png", "world_differences.png", "probes_world_hiedit.png")
    for name in ("report.md", *plots):
        assert (finished / name).stat().st_size > 100


def test_the_plot_of_differences_has_a_mark_for_every_comparison():
    def against(baseline, horizon, difference):
        paired = Paired(baseline, 2, difference, difference - 0.02, difference + 0.02, 0.1, 0.5)
        return Comparison("world", horizon, "hiedit", baseline, paired, 0.1)

    tests = [against("random", 2, 0.04), against("dense", 2, -0.01), against("random", 4, 0.06)]
    (axes,) = plot_differences(tests).axes
    marks = [mark for mark in axes.get_lines() if mark.get_linestyle() == "None"]
    middles = [sorted(m.get_xdata()) for m in marks if m.get_marker() in ("o", "s")]
    assert [[round(float(x), 6) for x in xs] for xs in middles] == [[-1.0, 4.0], [6.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["random", "dense"]
    assert plot_differences([]) is None


def test_what_is_there_is_not_run_again_and_the_report_can_be_redone(finished, monkeypatch):
    before = (finished / "report.md").read_text()
    (finished / "report.md").unlink()
    refuse = pytest.fail
    monkeypatch.setattr(measure, "measure", lambda *_: refuse("a cell was run"))
    monkeypatch.setattr(measure, "load_world", lambda *_: refuse("a model was loaded"))
    compare(small(finished))
    assert (finished / "report.md").read_text() == before
    (finished / "report.md").unlink()
    compare(small(finished, "report=true"))
    assert (finished / "report.md").read_text() == before


def test_a_report_names_what_is_missing(finished, tmp_path, capsys):
    with pytest.raises(ValueError, match="not yet tuned: world hiedit tune 2.4 edits, seed 100"):
        compare(small(tmp_path, "report=true"))
    compare(small(finished, "report=true", "experiment.seeds=[0,1,7]"))
    assert "world random measure 2+4 edits, seed 7" in capsys.readouterr().out


def test_a_damaged_cell_counts_as_missing(finished, tmp_path):
    config = small(finished).experiment
    cell = tune_cells(config)[0]
    result = read_cell(finished, cell)
    write_cell(tmp_path, cell, result)
    assert read_cell(tmp_path, cell) == result
    text = cell_path(tmp_path, cell).read_text()
    cell_path(tmp_path, cell).write_text(text[:-40])
    assert read_cell(tmp_path, cell) is None
    other = dataclasses.replace(cell, seed=5)  # the file of another cell under this one's name
    cell_path(tmp_path, other).write_text(text)
    assert read_cell(tmp_path, other) is None


def test_a_point_on_the_way_is_what_a_run_to_there_gives(finished, tmp_path):
    """So one stream serves all lengths."""
    config = small(finished).experiment
    cell = next(c for c in measure_cells(config, choose(config, str(finished)))
                if c.label == "hiedit" and c.horizons[-1] == 4)  # fmt: skip
    short = dataclasses.replace(cell, horizons=(2,))
    direct = measure.run_cell(short, str(tmp_path), lambda message: None)
    whole = measure.run_cell(
        dataclasses.replace(cell, horizons=(2, 4)), str(tmp_path), lambda message: None
    )
    ours, theirs = ({k: v for k, v in r["points"][0].items() if k not in TIMES}
                    for r in (direct, whole))  # fmt: skip
    assert ours == theirs
    assert direct["choices"]["masks"] == whole["choices"]["masks"][:2]
    assert direct["train_seconds"] > 0 == whole["train_seconds"]  # one editor for both


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_killed_experiment_goes_on_with_the_same_numbers(finished, tmp_path, root):
    command = [sys.executable, "launch/compare.py", "experiment=selection-small", "jobs=1",
               f"run_dir={tmp_path}", "experiment.probes.edits=0"]  # fmt: skip
    two, one = (os.environ | {"OMP_NUM_THREADS": n} for n in "21")  # on which nothing depends
    process = subprocess.Popen(command, cwd=root, env=two, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(cells_of(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = cells_of(tmp_path)
    assert 2 <= len(left) < len(cells_of(finished)) - 1 and process.returncode == -signal.SIGKILL
    done = subprocess.run(command, cwd=root, env=one, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"of {len(cells_of(tmp_path)) - 2} cells to run" in done.stdout
    probes = {name for name, c in cells_of(finished).items() if c["cell"]["phase"] == "probe"}
    wanted = {n: c for n, c in cells_of(finished).items() if n not in probes}
    assert cells_of(tmp_path) == wanted


def test_a_cell_runs_on_one_thread_whatever_its_process_has(tmp_path, monkeypatch, threads):
    threads(2)
    seen = []

    def measured(*_):
        seen.append(torch.get_num_threads())
        return {"label": "random", "points": []}

    monkeypatch.setattr(measure, "measure", measured)
    setup = setup_of(ExperimentConfig(methods=["random"]), "world")
    cell = Cell(setup, "measure", 0, (2,), load_method("random"))
    measure.run_cell(cell, str(tmp_path), lambda message: None)
    assert seen == [1] and torch.get_num_threads() == 2


# ---- keys and settings


def test_the_key_follows_what_determines_the_result_and_nothing_else():
    config = ExperimentConfig(methods=["random"])
    setup = setup_of(config, "world")
    cell = Cell(setup, "measure", 0, (2, 4), load_method("random"))
    rename = dataclasses.replace(cell.method, name="chance")
    others = dataclasses.replace(
        setup, heterogeneous=dataclasses.replace(config.heterogeneous, steps=3)
    )
    same = [
        dataclasses.replace(cell, method=rename),
        dataclasses.replace(cell, setup=others),  # of a world that this cell does not see
    ]
    assert {c.key for c in same} == {cell.key}
    different = [
        dataclasses.replace(cell, seed=1),
        dataclasses.replace(cell, phase="tune"),
        dataclasses.replace(cell, horizons=(4,)),
        dataclasses.replace(cell, method=apply(cell.method, {"updater.eta": 0.2}, "x")),
        dataclasses.replace(cell, setup=dataclasses.replace(setup, world="heterogeneous")),
        dataclasses.replace(cell, setup=dataclasses.replace(setup, batch=4)),
        dataclasses.replace(cell, extra=(("samples", 1),)),
    ]
    assert len({c.key for c in [cell, *different]}) == len(different) + 1
    assert dataclasses.replace(cell, horizons=(4,)).editor_key == cell.editor_key
    assert dataclasses.replace(cell, seed=1).editor_key != cell.editor_key


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["experiment.sedes=[0]"], ["experiment.sedes", "experiment.seeds"]),
        (["experiment=selecton"], ["selecton", "'selection'"]),
        (["experiment.methods=[rndom]"], ["rndom", "random"]),
        (["experiment.worlds=[moon]"], ["moon", "heterogeneous"]),
        (["experiment.seeds=[100]"], ["tuning.seeds", "100"]),
        (
            ["+experiment.tuning.methods.random={updater.etta: [1]}"],
            ["updater.etta", "updater.eta"],
        ),
        (["experiment.horizons=[]"], ["experiment.horizons"]),
        (
            [
                "+experiment.tuning.methods.dense={selector.modules: {subsets: 3, of: 'l{1-2}'}}",
            ],
            ["dense.selector.modules", "subsets", "2 modules"],
        ),
        (
            ["+experiment.catalogue.hiedit-3.horizons=200"],
            ["experiment.catalogue.hiedit-3.horizons", "200"],
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(overrides, parts):
    with pytest.raises(ValueError) as error:
        compose(overrides, CompareConfig, "compare")
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_shipped_experiment_is_valid_and_tunes_what_a_method_has():
    config = compose(["experiment=selection"], CompareConfig, "compare").experiment
    eta, rho = (len(config.tuning.grid[k]) for k in ("updater.eta", "objective.rho"))
    assert eta * rho > 1 and len(config.settings("hiedit")) == 1  # as shipped
    for label in ("hiedit-3", "random-3", "static-3", "dense"):
        assert len(config.settings(label)) == eta * rho, label
    assert len(config.settings("static")) == eta and config.settings("no-edit") == [{}]
    assert len(config.seeds) >= 5 and set(config.baselines) <= set(config.methods)
    assert config.composition("dense").selector.kind == "all"
    hiedit = dataclasses.asdict(config.composition("hiedit-3"))
    for label in ("random-3", "static-3", "dense"):
        other = dataclasses.asdict(config.composition(label))
        assert {k for k in other if other[k] != hiedit[k]} == {"name", "selector"}


def test_the_best_setting_of_each_horizon_is_chosen(monkeypatch):
    config = ExperimentConfig(methods=["static"], horizons=[2, 4])
    tuning = dataclasses.replace(config.tuning, grid={"updater.eta": [0.1, 0.2, 0.3]}, seeds=[7, 8])
    config = dataclasses.replace(config, tuning=tuning)
    table = {(0.1, 2): 0.5, (0.2, 2): 0.7, (0.3, 2): 0.7, (0.1, 4): 0.6, (0.2, 4): 0.2,
             (0.3, 4): 0.5}  # fmt: skip

    def stored(_, cell):
        off = 0.1 if cell.seed == 7 else -0.1
        values = [(h, table[cell.method.updater.eta, h] + off) for h in cell.horizons]
        return {"points": [{"edits": h, "scores": dict.fromkeys(("ES", "GS", "LS"), v)}
                           for h, v in values]}  # fmt: skip

    monkeypatch.setattr(grid, "read_cell", stored)
    chosen = choose(config, "nowhere")
    assert chosen == {("world", "static", 2): {"updater.eta": 0.2},
                      ("world", "static", 4): {"updater.eta": 0.1}}  # fmt: skip
    cells = measure_cells(config, chosen)
    assert {c.horizons for c in cells} == {(2,), (4,)} and len(cells) == 2 * len(config.seeds)
    tuning = dataclasses.replace(tuning, per_horizon=False)
    shared = choose(dataclasses.replace(config, tuning=tuning), "nowhere")
    assert shared == {("world", "static", h): {"updater.eta": 0.3} for h in (2, 4)}  # mean 0.6


def test_every_fixed_set_of_a_size_can_be_tried():
    overrides = ["experiment=selection-heterogeneous", "experiment.methods=[best-pair]",
                 "experiment.learned=best-pair", "experiment.baselines=[]"]  # fmt: skip
    config = compose(overrides, CompareConfig, "compare").experiment
    pairs = [tuple(s["selector.modules"]) for s in config.settings("best-pair")]
    assert len(set(pairs)) == len(pairs) == 28 and all(len(set(pair)) == 2 for pair in pairs)
    assert ("model.layers.4.mlp.gate_proj", "model.layers.7.mlp.up_proj") in pairs
    modules = {c.method.selector.modules[0] for c in tune_cells(config)}
    assert len(tune_cells(config)) == 28 and len(modules) == 7
    assert {c.method.selector.kind for c in tune_cells(config)} == {"static"}


def test_a_method_can_be_kept_from_the_longer_streams():
    config = ExperimentConfig(
        methods=["static", "hiedit", "random"],
        horizons=[2, 4, 8],
        catalogue={
            "static": {"method": "static", "horizons": [4, 2, 16]},
            "hiedit": {"method": "hiedit", "horizons": []},
        },
    )
    tuning = dataclasses.replace(config.tuning, grid={"updater.eta": [0.1, 0.2]})
    tuned = tune_cells(dataclasses.replace(config, tuning=tuning))
    assert {(c.label, c.horizons) for c in tuned} == {("static", (2, 4)), ("random", (2, 4, 8))}
    chosen = choose(config, "nowhere")  # nothing to tune
    assert {key[1:] for key in chosen} == {
        ("static", 2), ("static", 4), ("random", 2), ("random", 4), ("random", 8)
    }  # fmt: skip
    measured = {(c.label, c.horizons) for c in measure_cells(config, chosen)}
    assert measured == {("static", (2, 4)), ("random", (2, 4, 8))}


# ---- statistics


def test_holm_and_the_permutation_test():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": None}
    found = holm(p)
    assert found["a"] == pytest.approx(0.03) and found["d"] is None
    assert found["c"] == found["b"] == pytest.approx(0.06)  # a later one is never smaller
    from scipy import stats

    a, b = [0.5, 0.61, 0.7, 0.4, 0.9, 0.2], [0.4, 0.6, 0.5, 0.45, 0.6, 0.1]
    wanted = stats.permutation_test((a, b), lambda x, y: (x - y).mean(),
                                    permutation_type="samples", n_resamples=10_000)  # fmt: skip
    assert permutation_test(a, b) == pytest.approx(wanted.pvalue)
    assert permutation_test([1.0] * 5, [0.0] * 5) == 2 / 32
    assert permutation_test([1.0] * 8, [0.0] * 8) < 0.01
    assert permutation_test(a, a) == 1 and permutation_test([1.0], [0.0]) is None
    assert permutation_test(list(range(20)), [0] * 20) < 1e-3


def test_comparisons_pair_streams_and_correct_for_their_number():
    config = ExperimentConfig(
        methods=["random", "hiedit", "static"], baselines=["random", "static"], horizons=[2]
    )
    gains = [0.2, 0.21, 0.19, 0.22, 0.2, 0.2]
    rows = []
    for seed, gain in enumerate(gains):
        for method, value in (("random", 0.5), ("hiedit", 0.5 + gain), ("static", 0.5)):
            rows.append({"world": "world", "edits": 2, "method": method, "seed": seed,
                         "stream": str(seed), "avg": value})  # fmt: skip
    rows.append({**rows[0], "seed": 99, "stream": "99"})  # without a partner: not counted
    first, second = comparisons(config, rows)
    assert first.paired.n == 6 and first.paired.difference == pytest.approx(sum(gains) / 6)
    assert first.relative == pytest.approx(sum(gains) / 6 / 0.5)
    assert first.t_holm == pytest.approx(2 * first.paired.t_p)
    assert first.paired.permutation_p == 2 / 64 and second.permutation_holm == 4 / 64


def test_choices_are_scored_against_the_truth():
    assert auc([0.9, 0.1, 0.8, 0.2], [True, False, True, False]) == 1
    assert auc([1, 1, 0, 0], [True, False, True, False]) == 0.5 and auc([1.0], [True]) is None
    result = {
        "modules": ["a", "b", "c"],
        "choices": {
            "relations": ["r", "s"],
            "masks": ["110", "011"],
            "logits": [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]],
        },
    }
    found = truth_scores(result, {"r": ("a",), "s": ("c",)})
    assert found["logits_auc"] == 0.5 and found["choice_auc"] == 0.75
    assert found["precision"] == 0.5 and found["recall"] == 1


def test_rank_correlations_by_relation():
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None and spearman([1, 2], [None, 1]) is None
    probe = [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]
    names = ("effect", "tracing at the subject token", "tracing at the last token")
    result = {"relations": ["r", "s"], "logits": [[1.0, 2.0, 3.0]] * 2} | {n: probe for n in names}
    found = correlations(result)["effect"]
    assert found["r"]["mean"] == 1 and found["s"]["mean"] == -1
    assert found["all"]["mean"] == 0 and found["all"]["n"] == 2
    assert found["all"]["low"] == -1 and found["all"]["high"] == 1
    assert found["of_means"] is None  # the means are all equal
