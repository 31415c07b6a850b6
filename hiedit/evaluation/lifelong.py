"""A lifelong run: edit a held-out stream step after step, and measure it as it grows."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hiedit.config import EvaluateConfig
from hiedit.data.passages import neutral_texts
from hiedit.data.stream import standing
from hiedit.evaluation.examples import Everyday, Examples
from hiedit.evaluation.perplexity import perplexity
from hiedit.evaluation.results import (
    CurvePoint,
    MethodResult,
    Scores,
    stream_fingerprint,
)
from hiedit.evaluation.stream import Measured, StreamProbe, mean, scores_of
from hiedit.rl.rollout import Rollout
from hiedit.types import EditBatch

Progress = Callable[[int, int], None]


def run_stream(
    rollout: Rollout,
    probe: StreamProbe,
    config: EvaluateConfig,
    *,
    method: str,
    seed: int = 0,
    n_edits: int = 1,
    on_progress: Progress = lambda done, total: None,
) -> MethodResult:
    """Edit the probe's whole stream from the unedited model on and measure; the model is left
    edited (``rollout.reset()`` takes it back).

    seconds_per_edit counts editing alone, not measuring. A request's paraphrases are not edited:
    the metrics are of an editor that was given its prompt.
    """
    requests = probe.requests
    total = len(requests)
    rollout.reset()
    examples = Examples(probe, config.examples)
    everyday = Everyday(probe.backbone, config.everyday)
    marks = sorted({max(1, round(total * (i + 1) / config.points)) for i in range(config.points)})
    texts = neutral_texts(config.neutral)
    read_before = perplexity(probe.backbone, texts)
    curve, masks, at_once = [], [], []
    passes, seconds, processor = 0, 0.0, 0.0
    for first in range(0, total, n_edits):
        some = requests[first : first + n_edits]
        step = EditBatch(tuple(request.unaided() for request in some), first)
        start, busy = time.perf_counter(), time.process_time()
        outcome = rollout.step(step)
        seconds += time.perf_counter() - start
        processor += time.process_time() - busy
        masks.append(outcome.mask.cpu())
        passes += outcome.passes * len(step)
        done = first + len(step)
        if config.immediate:
            at_once.append(probe.edits(range(first, done)))
        while marks and done >= marks[0] and done < total:
            curve.append(CurvePoint(done, probe.measure(done).scores()))
            marks = [m for m in marks if m > done]
        on_progress(done, total)
    final = probe.measure(total)
    curve.append(CurvePoint(total, final.scores()))
    early = max(1, round(total * config.retention_share))
    stands = torch.tensor(standing(requests))
    touched = torch.cat(masks)
    names = rollout.updater.names
    return MethodResult(
        method=method,
        seed=seed,
        edits=total,
        scores=final.scores(),
        before=probe.before.scores(),
        retention=final.scores(slice(0, early)),
        retention_edits=early,
        immediate=_joined(at_once),
        superseded=int((~stands).sum()),
        standing=None if bool(stands.all()) else final.scores(stands),
        curve=tuple(curve),
        by_age=_by_age(final, total),
        kl=mean(final.kl) or 0.0,
        perplexity_before=read_before,
        perplexity_after=perplexity(probe.backbone, texts),
        weight_growth=rollout.env.state.growth(),
        layers_per_edit=float(touched.sum(-1).mean()),
        passes_per_edit=passes / total,
        seconds_per_edit=seconds / total,
        processor_seconds_per_edit=processor / total,
        amortised_seconds_per_edit=seconds / total,
        peak_memory_mb=peak_memory_mb(),
        layer_frequency=dict(zip(names, touched.mean(0).tolist(), strict=True)),
        examples=examples.found(),
        everyday=everyday.found(),
        stream=stream_fingerprint(requests),
    )


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> Scores | None:
    """The scores of all ``parts`` together."""
    return scores_of({k: torch.cat([p[k] for p in parts]) for k in parts[0]}) if parts else None


def _by_age(final: Measured, total: int, buckets: int = 5) -> tuple[tuple[int, Scores], ...]:
    """(age of the bucket's youngest edit, scores), youngest bucket first."""
    size = max(1, -(-total // buckets))
    return tuple(
        (age, final.scores(slice(max(0, total - age - size), total - age)))
        for age in range(0, total, size)
    )


def with_training(result: MethodResult, seconds: float, edits: int) -> MethodResult:
    """``result`` with what training the editor took, divided over the stream as well."""
    return replace(
        result,
        train_seconds=seconds,
        train_edits=edits,
        amortised_seconds_per_edit=(result.seconds_per_edit or 0.0) + seconds / result.edits,
    )


def peak_memory_mb() -> float:
    """Peak memory of the process so far in MiB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
