"""Tracking of runs with MLflow, on a local SQLite file unless told otherwise.

One MLflow run holds the job: its configuration, training curves and artifacts. Under it lies one
nested run per method and seed, with ``eval/*`` over the number of edits. Selecting those in
`mlflow ui` and pressing *Compare* (or grouping by the tag ``method``, which averages the seeds)
shows which method is better and by how much; with a baseline named, ``gain/*`` says it outright.

MLflow is imported when a run starts, after its telemetry has been switched off. A failing store
never ends a training: the failure is reported once, counted, and the run goes on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import posixpath
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from hiedit.evaluation.report import markdown_table
from hiedit.evaluation.results import SCORES, MethodResult, number, plain
from hiedit.evaluation.statistics import gains
from hiedit.provenance import cut, digest, environment_tags, flatten

REMEDY = 'tracking needs MLflow: pip install "hiedit[mlflow]"'
MODES = ("auto", "mlflow", "off")
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH = 6000, 8000, 250  # MLflow's own limits
PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000
NO_TELEMETRY = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
FLUSH_SECONDS = 10.0  # an aborted process loses at most this much of its curves


class Tracker(Protocol):
    """A run's account of itself; a context manager. ``MlflowTracker`` has the details."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind, error, trace) -> None: ...
    def params(self, config: Any) -> None: ...
    def metrics(self, step: int, values: Mapping[str, Any], method: str | None = None) -> None: ...
    def artifact(self, path: str | Path) -> None: ...
    def results(self, results: Sequence[MethodResult], baseline: str | None = None) -> None: ...


class NoTracker:
    """Tracks nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None: ...
    def params(self, config: Any) -> None: ...
    def metrics(self, step: int, values: Mapping[str, Any], method: str | None = None) -> None: ...
    def artifact(self, path: str | Path) -> None: ...
    def results(self, results: Sequence[MethodResult], baseline: str | None = None) -> None: ...


class MlflowTracker:
    """Tracks a job in MLflow.

    uri: MLflow's tracking URI; a plain path is taken for a SQLite file. Its artifacts then lie in
        ``mlartifacts`` beside it.
    skipped: metric values left out so far because they were not finite.
    failures: calls to the store that failed so far.
    """

    def __init__(
        self,
        uri: str,
        experiment: str = "hiedit",
        run_name: str | None = None,
        seed: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self.uri = uri if "://" in uri or uri == "databricks" else sqlite_uri(Path(uri))
        self.experiment, self.run_name, self.seed, self.say = experiment, run_name, seed, say
        self.skipped = self.failures = 0
        self.run_id: str | None = None
        self._children: dict[tuple, str] = {}  # nested runs with results, by their key
        self._training: dict[str, str] = {}  # nested runs that wait for results, by method
        self._buffer: list[tuple[str, Any]] = []
        self._flushed = 0.0

    def __enter__(self) -> Self:
        self._mlflow = _import_mlflow()
        with _alone(sqlite_path(self.uri)):
            self._client = self._mlflow.MlflowClient(self.uri)
            self._experiment_id = self._find_experiment()
        self.run_id = self._create_run(self.run_name, self._tags() | {"role": "job"})
        self._flushed = time.monotonic()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.flush()
        tags = {"metrics_not_finite": str(self.skipped)} if self.skipped else {}
        if kind is not None:
            tags["error"] = f"{kind.__name__}: {error}"
        state = "FINISHED" if kind is None else "FAILED"
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            state = "KILLED"
        for run_id in (*self._training.values(), self.run_id):
            self._log(run_id, tags=tags)
            self._guard(functools.partial(self._client.set_terminated, run_id, state))
        if self.skipped:
            self.say(f"{self.skipped} metric values were not finite and are not in MLflow")
        if self.failures:
            where = shown(self.uri)
            self.say(f"{self.failures} calls to MLflow at {where} failed: its run is incomplete")
        self.say(f"Compare runs with:  {ui_command(self.uri)}")

    def params(self, config: Any) -> None:
        """Log ``config`` flattened (``method.updater.rank``), and whole as config.json.

        Values beyond MLflow's limit are cut and end in the SHA-256 of the whole.
        """
        self._log(self.run_id, params=flatten(plain(config)))
        self._text(self.run_id, "config.json", config)

    def metrics(self, step: int, values: Mapping[str, Any], method: str | None = None) -> None:
        """Buffer ``values``, of the job or of the nested run of ``method``.

        None is left out; what is not finite is left out and counted.

        Raises:
            ValueError: for a value that is no number.
        """
        points = self._points(step, values)
        if method is not None and method not in self._training:
            run_id = self._guard(lambda: self._start_child(method, {"method": method}))
            if run_id is None:
                return
            self._training[method] = run_id
        run_id = self.run_id if method is None else self._training[method]
        self._buffer += [(run_id, point) for point in points]
        waited = time.monotonic() - self._flushed
        full = len(self._buffer) >= METRICS_PER_CALL and not self.failures
        # a server that is down answers after long retries: ask it ever more rarely
        if full or waited > FLUSH_SECONDS * min(1 + 6 * self.failures, 60):
            self.flush()

    def flush(self) -> None:
        """Write what ``metrics`` has buffered; kept for the next try if the store fails."""
        for run_id in dict.fromkeys(run_id for run_id, _ in self._buffer):
            points = [point for run, point in self._buffer if run == run_id]
            if self._log(run_id, metrics=points):
                self._buffer = [entry for entry in self._buffer if entry[0] != run_id]
        del self._buffer[: -100 * METRICS_PER_CALL]  # a store that is gone must not fill the memory
        self._flushed = time.monotonic()

    def artifact(self, path: str | Path) -> None:
        """Copy a file, or a directory under its name, to the run's artifacts.

        Raises:
            FileNotFoundError: if there is none.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no such artifact: {path}")
        if path.is_dir():
            self._guard(lambda: self._client.log_artifacts(self.run_id, str(path), path.name))
        else:
            self._guard(lambda: self._client.log_artifact(self.run_id, str(path)))

    def results(self, results: Sequence[MethodResult], baseline: str | None = None) -> None:
        """Log every result to its own nested run; the table becomes the job's description.

        ``eval/*`` are the numbers of its results.json row at the number of edits, and the curve on
        the way there; ``age/*`` the scores by age of the edit; ``layers/*`` the share of edits
        that touched a module. ``baseline`` names the method that ``gain/*`` is measured against,
        with the same seed, number of edits and stream.
        """
        rows = [r.row() for r in results]
        for result in results:
            self._result(result, gains(result.row(), rows, baseline) if baseline else {})
        if results:
            self._log(self.run_id, tags={"mlflow.note.content": markdown_table(results)})

    def _result(self, result: MethodResult, gain: Mapping[str, float]) -> None:
        run_id = self._child(result)
        if run_id is None:
            return
        points = []
        for at in result.curve:
            if at.edits != result.edits:  # the end of the curve is in the row
                values = {f"eval/{m}": getattr(at.scores, m) for m in SCORES}
                points += self._points(at.edits, values)
        row = {k: v for k, v in result.row().items() if k not in ("method", "seed", "stream")}
        values = {f"eval/{k}": v for k, v in row.items()}
        values |= {f"layers/{k}": v for k, v in result.layer_frequency.items()}
        values |= {f"gain/{k}": v for k, v in gain.items()}
        points += self._points(result.edits, values)
        for age, scores in result.by_age:
            points += self._points(age, {f"age/{m}": getattr(scores, m) for m in SCORES})
        self._log(run_id, metrics=points)
        self._text(run_id, "details.json", result)
        self._guard(lambda: self._client.set_terminated(run_id, "FINISHED"))

    def _child(self, result: MethodResult) -> str | None:
        """The nested run of a result: the one of its training, or a new one at the first call."""
        if result.key not in self._children:
            tags = {k: str(getattr(result, k)) for k in ("method", "seed", "edits", "stream")}
            name = f"{result.method}, seed {result.seed}, {result.edits} edits"
            run_id = None
            if self.seed in (None, result.seed):
                run_id = self._training.pop(result.method, None)
            run_id = run_id or self._guard(lambda: self._start_child(name, {}))
            if run_id is None:
                return None
            self._children[result.key] = run_id
            named = tags | {"mlflow.runName": name}
            self._log(run_id, params=flatten(plain(result.config)) | tags, tags=named)
        return self._children[result.key]

    def _start_child(self, name: str, tags: Mapping[str, str]) -> str:
        parent = {"role": "method", "mlflow.parentRunId": self.run_id}
        return self._create_run(name, self._tags() | parent | tags)

    def _points(self, step: int, values: Mapping[str, Any]) -> list[Any]:
        now, points = int(time.time() * 1000), []
        for key, value in values.items():
            if value is None:
                continue
            try:
                finite = number(value)
            except (TypeError, ValueError):
                raise ValueError(f"metric {key!r} is {value!r}: it must be a number") from None
            if finite is None:
                self.skipped += 1
                continue
            points.append(self._mlflow.entities.Metric(_key(key), finite, now, int(step)))
        return points

    def _log(self, run_id: str, metrics=(), params=None, tags=None) -> bool:
        """Write a batch in as few calls as MLflow allows; whether that worked."""
        entities = self._mlflow.entities
        params = [entities.Param(_key(k), cut(v, PARAM_LENGTH)) for k, v in (params or {}).items()]
        tags = [entities.RunTag(_key(k), cut(v, TAG_LENGTH)) for k, v in (tags or {}).items()]

        def write() -> bool:
            send = self._client.log_batch
            for part in _chunks(metrics, METRICS_PER_CALL):
                send(run_id, metrics=part, synchronous=True)
            for part in _chunks(params, PARAMS_PER_CALL):
                send(run_id, params=part, synchronous=True)
            for part in _chunks(tags, PARAMS_PER_CALL):
                send(run_id, tags=part, synchronous=True)
            return True

        return bool(self._guard(write))

    def _text(self, run_id: str, name: str, value: Any) -> None:
        text = json.dumps(plain(value), indent=1)
        self._guard(lambda: self._client.log_text(run_id, text, name))

    def _guard(self, call: Callable[[], Any]) -> Any:
        """``call()``, or None after counting its failure and reporting the first one."""
        try:
            return call()
        except Exception as error:  # whatever a remote store may raise: the run goes on
            self.failures += 1
            if self.failures == 1:
                first = str(error).splitlines()[0] if str(error) else ""
                warnings.warn(
                    f"MLflow at {shown(self.uri)} failed ({type(error).__name__}: {first}); "
                    "the run goes on, its tracking may be incomplete",
                    stacklevel=3,
                )
            return None

    def _find_experiment(self) -> str:
        database = sqlite_path(self.uri)
        root = (database.parent / "mlartifacts").as_uri() if database else None
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return self._client.create_experiment(self.experiment, artifact_location=root)
            except self._mlflow.exceptions.MlflowException:
                # another process may have created it in between
                found = self._client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise ValueError(
                f"the MLflow experiment {self.experiment!r} was deleted: restore it with "
                f"`mlflow experiments restore -x {found.experiment_id}` or name another one"
            )
        return found.experiment_id

    def _create_run(self, name: str | None, tags: Mapping[str, str]) -> str:
        tags = {_key(k): cut(v, TAG_LENGTH) for k, v in tags.items()}
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=name)
        return run.info.run_id

    def _tags(self) -> dict[str, str]:
        seed = {} if self.seed is None else {"seed": str(self.seed)}
        return environment_tags() | seed


def _alone(database: Path | None) -> contextlib.AbstractContextManager:
    """No other process of ours creates the tables of ``database`` meanwhile, or one would fail."""
    if database is None:
        return contextlib.nullcontext()
    from filelock import FileLock  # comes with transformers

    database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(database.with_name(f"{database.name}.lock"))


def make_tracker(
    mode: str | bool = "auto",
    uri: str | None = None,
    experiment: str = "hiedit",
    run_name: str | None = None,
    *,
    directory: str | Path = ".",
    seed: int | None = None,
    say: Callable[[str], None] = print,
) -> MlflowTracker | NoTracker:
    """The tracker of a run.

    mode: ``auto`` tracks where MLflow is installed and says how to get it elsewhere; ``mlflow``
        (or True) insists; ``off`` (or False) does not track.
    uri: None takes $MLFLOW_TRACKING_URI, else the file ``mlflow.db`` in ``directory``. Runs that
        are to be compared belong into one file.

    Raises:
        ValueError: for another mode.
        ImportError: if ``mlflow`` was asked for and is not installed, with the remedy.
    """
    mode = {True: "mlflow", False: "off"}.get(mode, mode)
    if mode not in MODES:
        raise ValueError(f"tracking mode {mode!r} is not one of {', '.join(MODES)}")
    if mode == "off":
        return NoTracker()
    if importlib.util.find_spec("mlflow") is None:
        if mode == "mlflow":
            raise ImportError(REMEDY)
        say(f"Not tracked: {REMEDY}")
        return NoTracker()
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path(directory) / "mlflow.db")
    return MlflowTracker(uri, experiment, run_name, seed, say)


def sqlite_uri(path: Path) -> str:
    """MLflow's URI of a SQLite file."""
    return f"sqlite:///{path.absolute()}"


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI; None for any other store."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(match.group(1)).absolute() if match else None


def ui_command(uri: str) -> str:
    """Return what to type to look at the runs; for a server, its address (without credentials)."""
    if re.match(r"https?://", uri):
        return shown(uri)
    mlflow = "mlflow" if shutil.which("mlflow") else f"{shlex.quote(sys.executable)} -m mlflow"
    return f"{mlflow} ui --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1"


def shown(uri: str) -> str:
    """``uri`` without user name and password."""
    return re.sub(r"//[^@/]*@", "//", uri)


def _import_mlflow() -> Any:
    """MLflow with its telemetry off (unless the user's environment says otherwise) and quiet."""
    for name in NO_TELEMETRY:
        os.environ.setdefault(name, "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 would hold up the training
    try:
        import mlflow
    except ImportError as error:
        raise ImportError(REMEDY) from error
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # migrations report every table
    return mlflow


def _key(name: str) -> str:
    """``name`` with only what MLflow allows in a key, of at most its length."""
    clean = posixpath.normpath(re.sub(r"[^\w/.\- ]", "_", name)).lstrip("/.") or "_"
    return clean if len(clean) <= KEY_LENGTH else f"{clean[: KEY_LENGTH - 13]}-{digest(name)[:12]}"


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
