"""Every shipped method with its defaults on a real model: what it keeps, what it rejects.

    python -m benchmarks.every_method --model smollm2-135m --records RECORDS --edits 30 --train 4

RECORDS is a directory with train.json and stream.json (or --stream FILE). Methods that learn are
trained on ``--train`` edits first. Each edits the same stream from the unedited model, one edit
at a time, with the guard at its defaults. LS: agreement with the unedited model on as many tokens
as the gold answer has; rejected, of the stream's edits. Rows are printed as they come, so a run
that is stopped has not measured in vain.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from hiedit.catalogue import choices, configured_model, load_method
from hiedit.config import EvaluateConfig, TrainConfig
from hiedit.data.stream import StreamConfig
from hiedit.evaluation.lifelong import StreamProbe
from hiedit.evaluation.results import append_results
from hiedit.experiment import load_backbone, load_data, run_method
from hiedit.runconfig import DatasetConfig, ModelConfig

HEADERS = ("method", "ES", "GS", "LS", "rejected", "passes", "s/edit", "total s")


def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    known = configured_model(args.model)
    backbone = load_backbone(
        ModelConfig(args.model, args.model, known.get("modules"), known.get("dtype", "auto"))
    )
    dataset = DatasetConfig("records", args.records, args.stream, skip_bad_rows=True)
    data = load_data(dataset, StreamConfig(length=args.edits, shuffle=False))
    probe = StreamProbe(backbone, data.stream)
    evaluate = EvaluateConfig(points=1, examples=0, guard=True)
    train = TrainConfig(edits=args.train, stream_lengths=[max(1, args.train)])
    print(_line(HEADERS), flush=True)
    for name in args.methods or _shipped():
        start = time.perf_counter()
        try:
            result, _, _ = run_method(backbone, data, probe, load_method(name), train, evaluate)
        except ValueError as error:  # one that needs what is not here does not end the others
            print(_line((name, f"not run: {error}")), flush=True)
            continue
        scores, spent = result.scores, time.perf_counter() - start
        cells = (f"{100 * value:.1f}" for value in (scores.ES, scores.GS, scores.LS))
        numbers = f"{result.passes_per_edit:.1f}", f"{result.seconds_per_edit:.1f}"
        rejected = f"{result.rejected} of {result.edits}"
        print(_line((name, *cells, rejected, *numbers, f"{spent:.0f}")), flush=True)
        if args.out:
            append_results(args.out, [result])


def _shipped() -> list[str]:
    """All methods but the one that names a trained editor of the user's."""
    return [name for name in choices("method") if name != "static-frequency"]


def _line(cells) -> str:
    return "  ".join(f"{cell:>9}" if i else f"{cell:<22}" for i, cell in enumerate(cells))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--records", required=True, help="directory, or training records")
    parser.add_argument("--stream", help="records to edit, where RECORDS is a file")
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument("--train", type=int, default=4, help="edits of each method that learns")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--out", help="directory of a results.json to add to")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
