"""The root configuration of a run: which model, records, stream and method, and where results go.

Only the experiment sees it; every component gets its own part.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from hiedit.checks import at_least, choice
from hiedit.config import EvaluateConfig, MethodConfig, TrainConfig
from hiedit.data.stream import StreamConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class ModelConfig:
    """name: shown in tables. path: a name of ``hiedit models`` (``world`` is embedded), a Hugging
    Face directory, a GGUF file, or a hub name.
    modules: names or patterns (``model.layers.{11-15}.mlp.gate_proj``); null: the default.
    edits_on: where W_0 and the sum of shifts are kept that a commit needs, the model's ``device``
    or the ``host``'s memory (a quarter of an 8B model in bf16 less on the device, slower commits).
    tokens, contexts: where methods with ``updater.tokens=auto`` edit (see ``UpdaterConfig``); null:
    at the subject's last token behind 5 contexts, and for ``world`` at the answer without any.
    """

    name: str = "world"
    path: str = "world"
    modules: list[str] | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    edits_on: str = "device"
    tokens: str | None = None
    contexts: int | None = None

    def __post_init__(self):
        choice("model.dtype", self.dtype, DTYPES)
        choice("model.edits_on", self.edits_on, ("device", "host"))
        if self.tokens is not None:
            choice("model.tokens", self.tokens, ("answer", "all", "subject"))
        if self.contexts is not None:
            at_least("model.contexts", self.contexts, 0)
        if not self.path:
            raise ValueError(
                "model.path is empty: give a model directory, a GGUF file, a hub name, or 'world'"
            )


@dataclass(frozen=True)
class DatasetConfig:
    """path: ``world`` for the embedded facts, ``known`` for those of them that the model knows (it
    is asked first), else a JSON/JSONL file (split by subject into training and stream), or a
    directory that holds ``train.json`` and ``stream.json``, and may hold ``preserve.json``: a list
    of [prompt, answer] to protect (without it: the unrelated prompts of the training records).
    stream_path: a file of its own for the stream. schema: null recognises it from its fields.
    subjects: false looks every subject up in its prompt, whatever the records say.
    """

    name: str = "world"
    path: str = "world"
    stream_path: str | None = None
    schema: str | None = None
    skip_bad_rows: bool = False
    subjects: bool = True

    def __post_init__(self):
        if not self.path:
            raise ValueError(
                f"dataset.path is empty: dataset={self.name} needs dataset.path=FILE_OR_DIRECTORY"
            )


@dataclass(frozen=True)
class TrackingConfig:
    """mode: ``auto`` uses MLflow where it is installed, ``mlflow`` insists, ``off`` does without.
    uri: null is the SQLite file mlflow.db beside the run directory, so that runs compare."""

    mode: str = "auto"
    uri: str | None = None
    experiment: str = "hiedit"

    def __post_init__(self):
        choice("tracking.mode", self.mode, ("auto", "mlflow", "off"))


@dataclass(frozen=True)
class DistributionConfig:
    """The place of training edits. ``local``: in this process. ``ray``: by ``workers`` rollout
    workers, each a lifelong trajectory of its own; ``train.edits`` counts the edits of all.

    mode: ``sync`` waits for every worker (the same numbers for the same seed and workers),
    ``async`` for none: a gradient older than ``max_staleness`` versions is dropped.
    timeout: seconds until a worker that has not finished its segment counts as hung; load_timeout:
    the same for finding it a place and loading its replica. retries: how often a segment is redone
    before the run stops. address: of a Ray cluster; null takes the one
    of the job or of $RAY_ADDRESS, else starts Ray on this machine and stops it at the end.
    num_cpus, num_gpus, threads (of torch): of each worker. learner_gpus: of the learner.
    placement: how Ray spreads the workers over nodes. gradient_dtype: in which gradients travel to
    the learner, which adds them in float32; bfloat16 is half the bytes, and other bits.
    deepspeed: of a model over several ranks: a JSON of configs/deepspeed, or a path.
    ranks_per_worker: of one model. ``kind=deepspeed``: 0 takes as many as were started. ``ray``:
    from 2 on a worker is a group of so many processes around one sharded model; num_cpus, num_gpus
    and threads are then of each rank, placement of the ranks of one group.
    checkpoint_every: versions, 0 for none; keep: how many of the newest stay. These two hold for
    ``local`` as well.
    """

    kind: str = "local"
    workers: int = 1
    mode: str = "sync"
    max_staleness: int = 4
    timeout: float = 600.0
    load_timeout: float = 900.0
    retries: int = 2
    address: str | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    learner_gpus: float = 0.0
    threads: int = 1
    placement: str = "PACK"
    gradient_dtype: str = "float32"
    checkpoint_every: int = 100
    keep: int = 2
    deepspeed: str = "zero3"
    ranks_per_worker: int = 0

    def __post_init__(self):
        choice("distribution.kind", self.kind, ("local", "ray", "deepspeed"))
        choice("distribution.mode", self.mode, ("sync", "async"))
        choice("distribution.placement", self.placement, PLACEMENTS)
        choice("distribution.gradient_dtype", self.gradient_dtype, ("float32", "bfloat16"))
        for key in ("workers", "threads", "keep"):
            at_least(f"distribution.{key}", getattr(self, key), 1)
        for key in ("max_staleness", "retries", "num_gpus", "learner_gpus", "checkpoint_every"):
            at_least(f"distribution.{key}", getattr(self, key), 0)
        at_least("distribution.ranks_per_worker", self.ranks_per_worker, 0)
        for key in ("timeout", "load_timeout", "num_cpus"):
            at_least(f"distribution.{key}", getattr(self, key), 0, strict=True)
        if self.kind != "ray" and self.workers > 1:
            raise ValueError(
                f"distribution.workers={self.workers}: kind={self.kind} trains one trajectory; "
                "set distribution=ray"
            )

    @property
    def grouped(self) -> bool:
        """Tell whether a worker is several processes around one sharded model."""
        return self.kind == "ray" and self.ranks_per_worker > 1

    @property
    def processes(self) -> int:
        """Number of processes of all workers."""
        return self.workers * (self.ranks_per_worker if self.grouped else 1)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from; ``run_dir`` receives results.json, plots and the editor.

    threads: of torch; 0 leaves its default. resume: continue training from the newest checkpoint
    in ``run_dir`` (``hiedit train resume=RUN_DIR`` sets it, and everything else as it was).
    calibrate: where no modules are named, those of the model's calibration are edited, which is
    measured where it is not kept; false: a stated default.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    stream: StreamConfig = field(default_factory=lambda: StreamConfig(length=200))
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    seed: int = 0
    run_dir: str = "runs/train"
    threads: int = 0
    resume: bool = False
    calibrate: bool = True

    def __post_init__(self):
        for key in ("seed", "threads"):
            at_least(key, getattr(self, key), 0)
        if not self.run_dir:
            raise ValueError(f"run_dir={self.run_dir!r}: give the directory for the results")

    @property
    def measuring(self) -> EvaluateConfig:
        """``evaluate`` with what it leaves to the model decided."""
        guard = self.evaluate.guard
        guard = self.model.path != "world" if guard is None else guard
        return dataclasses.replace(self.evaluate, guard=guard)
