"""Results: the dataclasses, the files, the table."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hiedit.evaluation import report
from hiedit.evaluation.results import (
    CurvePoint,
    Example,
    MethodResult,
    Scores,
    append_results,
    read_details,
    read_results,
    stream_fingerprint,
    write_results,
)

ROOT = Path(__file__).parent.parent
DESIGN_KEYS = (
    "method, seed, edits, ES, GS, LS, retention_ES, retention_GS, retention_LS, "
    "layers_per_edit, passes_per_edit, seconds_per_edit"
).split(", ")


def result(method="hiedit", seed=0, edits=200, es=0.97, **more):
    values = {
        "scores": Scores(es, 0.84, 0.86, None, 0.98, 0.9, 0.89),
        "before": Scores(0.0, 0.01, 1.0, 0.99, 0.2, 0.2, 1.0),
        "retention": Scores(0.9, 0.8, 0.85),
        "retention_edits": 20,
        "curve": (CurvePoint(100, Scores(0.99, 0.9, 0.9)), CurvePoint(200, Scores(es, 0.84, 0.86))),
        "by_age": ((0, Scores(1.0, 0.9, 0.9)), (100, Scores(0.9, 0.8, 0.8))),
        "kl": 0.125,
        "weight_growth": {"model.layers.2.mlp.gate_proj": 0.01, "model.layers.2.mlp.up_proj": 0.03},
        "layers_per_edit": 6.0,
        "passes_per_edit": 2.4,
        "seconds_per_edit": 0.25,
        "layer_frequency": {"model.layers.2.mlp.gate_proj": 1.0},
        "examples": (Example("The capital of X is", "A", "B", "A", "B", "X's capital:", "C"),),
        "config": {"updater": {"rank": 64}, "modules": ["a", "b"]},
        "stream": "abc",
    }
    return MethodResult(method, seed, edits, **(values | more))


def test_row_begins_with_the_keys_of_the_design():
    row = result().row()
    assert list(row)[: len(DESIGN_KEYS)] == DESIGN_KEYS
    assert row["ES"] == 0.97 and row["retention_GS"] == 0.8 and row["before_LS_gold"] == 0.99
    assert row["weight_growth"] == pytest.approx(0.02) and row["weight_growth_max"] == 0.03
    assert row["immediate_ES"] is None
    empty = MethodResult("no edit", 0, 10, Scores()).row()
    assert list(empty) == list(row)
    assert empty["weight_growth"] is None


@pytest.mark.parametrize("value", [97.0, -0.1, 1.01])
def test_scores_must_be_fractions(value):
    with pytest.raises(ValueError, match=r"Scores\.GS is .*fraction"):
        Scores(GS=value)


def test_scores_clamp_rounding_and_drop_nan():
    assert Scores(ES=1 + 1e-7).ES == 1.0
    assert Scores(ES=math.nan).ES is None
    assert Scores(0.5, 1.0, None).mean() == 0.75


def test_files_give_back_what_was_written(tmp_path):
    results = [result(), result("ft", config={"path": Path("a/b"), "rates": (1, 2)})]
    path = write_results(tmp_path / "run", results)
    assert path == tmp_path / "run" / "results.json"
    assert read_results(path) == read_results(tmp_path / "run") == [r.row() for r in results]
    first, second = read_details(path)
    assert first == results[0]
    assert second == dataclasses.replace(
        results[1], config={"path": str(Path("a/b")), "rates": [1, 2]}
    )
    assert sorted(p.name for p in path.parent.iterdir()) == ["details.json", "results.json"]


def test_not_finite_is_null_and_odd_strings_survive(tmp_path):
    odd = Example('q"\n', None, "São Tomé", "\ud800", "日本")
    path = write_results(
        tmp_path, [result(kl=math.nan, seconds_per_edit=math.inf, examples=(odd,))]
    )
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    row = read_results(path)[0]
    assert row["kl"] is None and row["seconds_per_edit"] is None
    assert read_details(path)[0].examples == (odd,)


def test_append_replaces_the_same_method_seed_and_edits(tmp_path):
    write_results(tmp_path, [result(), result(seed=1)])
    append_results(tmp_path, [result(seed=1, es=0.5), result(edits=500), result("ft")])
    rows = read_results(tmp_path)
    assert [(r["method"], r["seed"], r["edits"], r["ES"]) for r in rows] == [
        ("hiedit", 0, 200, 0.97),
        ("hiedit", 1, 200, 0.5),
        ("hiedit", 0, 500, 0.97),
        ("ft", 0, 200, 0.97),
    ]
    assert [r.row() for r in read_details(tmp_path)] == rows


def test_append_keeps_rows_without_details(tmp_path):
    write_results(tmp_path, [result()])
    (tmp_path / "details.json").unlink()
    append_results(tmp_path, [result("ft")])
    assert [r["method"] for r in read_results(tmp_path)] == ["hiedit", "ft"]
    assert [r.method for r in read_details(tmp_path)] == ["ft"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_results(tmp_path, [result()])
    old = path.read_bytes()

    def crash(*_):
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk is gone"):
        write_results(tmp_path, [result("ft")])
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.name != "posix", reason="file locks need POSIX")
def test_seeds_that_finish_at_once_lose_nothing(tmp_path):
    code = (
        "import sys; from hiedit.evaluation.results import *\n"
        "for edits in range(1, 11):\n"
        "    append_results(sys.argv[1], [MethodResult('m', int(sys.argv[2]), edits, Scores())])"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-S", "-c", code, str(tmp_path), str(seed)], cwd=ROOT)
        for seed in range(3)
    ]
    assert [job.wait(timeout=60) for job in jobs] == [0, 0, 0]
    assert len(read_results(tmp_path)) == len(read_details(tmp_path)) == 30


@pytest.mark.parametrize("text", ["{}", "[1]", "[{"])
def test_a_file_that_is_not_results_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="results.json"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_details(tmp_path)


def test_details_without_a_required_field_are_an_error(tmp_path):
    path = write_results(tmp_path, [result()])
    details = json.loads((tmp_path / "details.json").read_text())
    del details[0]["scores"]
    details[0]["field_of_a_newer_version"] = 1
    (tmp_path / "details.json").write_text(json.dumps(details))
    with pytest.raises(ValueError, match="scores"):
        read_details(path)


def test_fingerprint_tells_streams_apart():
    a, b = Example("p", None, "t", "", ""), Example("q", None, "t", "", "")
    assert stream_fingerprint([a, b]) == stream_fingerprint([a, b])
    assert len({stream_fingerprint(s) for s in ([a, b], [b, a], [a], [])}) == 4


def test_standard_library_is_enough(tmp_path):
    """Without site-packages: results read and print as text, and the rest names its remedy."""
    write_results(tmp_path, [result()])
    code = """
import sys
from hiedit.evaluation import report, results, statistics
from hiedit import plots, tracking
found = results.read_details(sys.argv[1])
report.report(found)
try:
    plots.save_plots(found, sys.argv[1])
except ImportError as error:
    print(error)
with tracking.make_tracker("auto") as tracker:
    tracker.results(found)
try:
    tracking.make_tracker("mlflow")
except ImportError as error:
    print("error:", error)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUTF8": "1"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "97.0" in done.stdout and '"A" → "B"' in done.stdout
    assert "pip install matplotlib" in done.stdout
    assert 'Not tracked: tracking needs MLflow: pip install "hiedit[mlflow]"' in done.stdout
    assert "error: tracking needs MLflow" in done.stdout


def printed(results, width=140, **options):
    from rich.console import Console

    console = Console(width=width, record=True, file=open(os.devnull, "w"), force_terminal=True)
    report.report(results, console=console, **options)
    return console.export_text(), console


def test_table_has_one_row_per_method_with_percentages():
    control = result("no edit", es=0.0, layers_per_edit=0, train_seconds=None)
    text, _ = printed([control, result(train_seconds=130), result("random", es=0.805)])
    lines = text.splitlines()
    assert "before editing" not in text
    row = next(line for line in lines if line.startswith("hiedit"))
    assert row.split() == (
        "hiedit 97.0 84.0 86.0 90.0 80.0 85.0 98.0 90.0 89.0 6 2.4 0.25 130".split()
    )
    assert next(line for line in lines if line.startswith("random")).split()[1] == "80.5"
    assert "efficacy" in text and "the first 20" in text and "200 edits" in text


def test_table_shows_the_values_before_editing_without_a_control():
    text, _ = printed([result()])
    row = next(line for line in text.splitlines() if line.startswith("before editing"))
    assert row.split()[2:5] == ["0.0", "1.0", "100.0"]


def test_best_value_is_bold_and_a_control_does_not_compete():
    control = result("no edit", es=1.0, layers_per_edit=0)
    columns = report.table_columns([control, result(), result("random", es=0.805)])
    assert [c.parts[0][2] for c in columns[1].cells] == ["", "bold", ""]
    assert {style for c in columns[5].cells for _, _, style in c.parts} == {"dim"}
    alone = report.table_columns([result()])
    assert all(part[2] != "bold" for c in alone[1].cells for part in c.parts)


def test_several_seeds_show_mean_and_deviation():
    results = [result(seed=s, es=es) for s, es in enumerate((0.9, 0.95, 1.0))]
    text, _ = printed(results, examples=0)
    rows = text.splitlines()
    index = next(i for i, line in enumerate(rows) if line.startswith("hiedit"))
    assert rows[index].split()[1] == "95.0" and rows[index + 1].split()[0] == "±5.0"
    assert "Mean over 3 seeds" in text
    plain = report.plain_table([*results, result("ft", es=None)])
    assert "hiedit (3 seeds)" in plain and "±5.0" in plain and report.MISSING in plain
    assert "95.0 ±5.0" in report.markdown_table(results)


def test_narrow_terminals_get_two_tables_and_lose_nothing():
    text, _ = printed([result(train_seconds=130), result("random")], width=80)
    assert text.count("method") == 2 and "…" not in text
    assert "98.0" in text and "130" in text


def test_examples_in_words():
    kept = Example("The capital of X is", "A", "B", "A", "B", "X's capital:", "A", "2+2=", "4", "5")
    odd = Example("[bold]p[/]\x1b[2J\n", None, "t", "x", "t" * 200, None, None, "q", "4", "4")
    text, _ = printed([result(examples=(kept, odd, kept))], examples=2)
    assert 'The capital of X is: "A" → "B"\n' in text
    assert 'held-out phrasing   X\'s capital: "A"   ✗' in text
    assert 'unrelated           2+2=: "4" → "5"   ✗' in text
    assert '"4" unchanged' in text
    assert "[bold]p[/]" in text and "\x1b[2J" not in text and '✗ wanted "t"' in text
    assert text.count("The capital of X is") == 1


def test_examples_are_marked_by_the_rule_of_the_table():
    right = Example("X's tongue is", "French", "English", "French", "English. It", "q", "English")
    aside = Example("p", "a", "b", "a", "Bonn", "q", "Beton", "r", "one two", "one three", True)
    lost = Example("p", "a", "b", "a", "b", None, None, "r", "one two", "one two", False)
    text, _ = printed([result(examples=(right, aside, lost))])
    lines = text.splitlines()
    assert next(x for x in lines if "English. It" in x).endswith('"English. It"')
    assert next(x for x in lines if "Bonn" in x).endswith('✗ wanted "b"')
    assert next(x for x in lines if "Beton" in x).endswith("✗")
    assert next(x for x in lines if "one three" in x).endswith('→ "one three"')
    assert next(x for x in lines if '"one two" unchanged' in x).endswith("✗")


def test_no_results_is_an_error():
    with pytest.raises(ValueError, match="no results"):
        report.report([])
