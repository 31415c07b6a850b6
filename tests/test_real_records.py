"""Real edit records, read and run; skipped where they are not at hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from worlds import quick, quick_run

from hiedit.data import RecordError, load_records
from hiedit.evaluation.results import SCORES, read_results
from hiedit.run import run
from hiedit.runconfig import DatasetConfig

pytest.importorskip("datasets", reason="reading files needs datasets")


def real(data_dir: Path, name: str) -> Path:
    path = data_dir / name
    if not path.exists():
        pytest.skip(f"no real records: {name} is not in {data_dir}")
    return path


@pytest.mark.parametrize(
    ("name", "schema", "good", "bad"),
    [
        ("counterfact/train.json", "counterfact-flat", 10_000, 0),
        ("counterfact/stream.json", "counterfact-flat", 6_000, 0),
        ("counterfact/rome_schema.json", "counterfact-rome", 600, 0),
        ("zsre/train.json", "zsre-mend", 998, 2),  # rows 535 and 724 have no new answer
        ("zsre/stream.json", "zsre-mend", 537, 0),
        ("qaedit/stream.json", "qaedit", 500, 0),
    ],
)
def test_real_files(data_dir, name, schema, good, bad):
    path = real(data_dir, name)
    if bad:
        with pytest.raises(RecordError, match=f"{bad} of {good + bad} rows"):
            load_records(path)
    records = load_records(path, skip_bad_rows=True)
    assert (records.schema, len(records), records.skipped_rows) == (schema, good, bad)
    for request in records.requests:
        assert (
            request.paraphrases == request.heldout
            and request.subject in request.prompt
            or (schema == "qaedit")
        )
        assert all(place.answer for place in request.locality)
        assert not any("nq question" in place.prompt for place in request.locality)


def test_real_rows_as_the_two_schemas_of_rledit(data_dir, tmp_path):
    rows = json.loads(real(data_dir, "zsre/stream.json").read_text(encoding="utf-8"))[:50]
    names = ("src", "rephrase", "loc", "loc_ans", "portability")
    rledit = [{**{name: row[name] for name in names}, "ans": row["alt"]} for row in rows]
    fever = [
        {
            "prompt": row["src"],
            "equiv_prompt": [row["rephrase"]],
            "alt": "SUPPORTS",
            "unrel_prompt": row["loc"],
            "unrel_ans": None,
        }
        for row in rows
    ]
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text(json.dumps(rledit))
    other.write_text(json.dumps(fever))
    assert load_records(one).schema == "zsre-rledit"
    records = load_records(other)
    assert records.schema == "fever-rledit" and len(records) == 50
    assert records.requests[0].locality[0].answer is None


@pytest.mark.parametrize(("name", "skipped"), [("counterfact", 0), ("zsre", 2)])
def test_training_and_a_stream_on_real_records(data_dir, tmp_path, capsys, name, skipped):
    """The world's model does not know them: everything runs, and every number is one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dataset = DatasetConfig(name, str(real(data_dir, name)), skip_bad_rows=True)
    try:
        (result,) = run(quick_run(tmp_path / "run", dataset=dataset), [quick("hiedit")])
    finally:
        torch.set_num_threads(threads)
    said = f"({skipped} malformed rows skipped)"
    assert (said in capsys.readouterr().out) == bool(skipped)
    (row,) = read_results(tmp_path / "run")
    # no gold answer was given before; and zsRE's neighbours have other answers than the edit's old
    absent = {"LS_gold"} | ({"LS_prob", "LS_pos"} if name == "zsre" else set())
    for scores in (result.scores, result.before, result.retention):
        for metric in SCORES:
            value = getattr(scores, metric)
            assert (value is None) if metric in absent else 0 <= value <= 1, metric
    assert result.before.LS == result.before.LS_tf == 1
    for key in (
        "kl",
        "perplexity_before",
        "perplexity_after",
        "weight_growth",
        "seconds_per_edit",
        "passes_per_edit",
        "layers_per_edit",
    ):
        assert row[key] is not None and math.isfinite(row[key]), key
    assert row["layers_per_edit"] > 0 and row["train_edits"] == 3


def test_bad_rows_stop_a_run_unless_they_may_be_skipped(data_dir, tmp_path):
    dataset = DatasetConfig("zsre", str(real(data_dir, "zsre")))
    with pytest.raises(RecordError, match="2 of 1000 rows"):
        run(quick_run(tmp_path, dataset=dataset), [quick("no-edit")])
