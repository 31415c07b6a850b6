"""The engineer's path: edit a model, see that it holds, take any of it back, hand it on.

    editor = hiedit.Editor.from_pretrained("my-model", method="closed-form", ledger="edits/")
    ids = editor.edit([hiedit.EditRequest("The capital of France is", "Lyon")])
    editor.revert(ids)

Every edit is on disk before it is acknowledged; the model stays a plain transformers object.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hiedit.backbone.model import Backbone
from hiedit.calibrating import prepared
from hiedit.calibration import calibrated
from hiedit.catalogue import configured_model, load_method
from hiedit.data.neutral import NEUTRAL
from hiedit.edited import COMMITTED, PREDICTED, REJECTED, SKIPPED, Edited, Holding, holding
from hiedit.experiment import WORLD, load_backbone, model_path
from hiedit.guard import Guard, Pair, Prediction, Verdict, predict, settle, unusable
from hiedit.ledger.export import ExportReport, export_adapter, save_merged
from hiedit.ledger.ledger import Ledger
from hiedit.ledger.offline import active_rows
from hiedit.ledger.reader import Reader
from hiedit.ledger.records import ACTIVE, Entry, Record
from hiedit.ledger.state import DeltaState
from hiedit.ledger.verify import Verification
from hiedit.methods import Method, build_method, load_editor, trained_modules
from hiedit.remember import Memory
from hiedit.rl.rollout import Outcome
from hiedit.runconfig import ModelConfig
from hiedit.types import EditBatch, EditRequest
from hiedit.updaters.memory import keys_to_keep, load_lifelong_state, statistics
from hiedit.watch import Watch
from hiedit.world.preserve import preservation_pairs

COMMON_FACTS = 1000  # prompts about countries, cities, elements, ..., for their subjects


class Editor:
    """A model, a method and a ledger. Made by ``from_pretrained``; a context manager.

    guard: limits that every edit must keep; None: the default ones. watched: (prompt, answer) pairs
    that no edit should change; some of their prompts are watched beside everyday ones.
    """

    def __init__(
        self,
        method: Method,
        ledger: str | Path,
        guard: Guard | None = None,
        watched=NEUTRAL,
        open_ledger: Callable[[str | Path, DeltaState], Any] = Ledger,
    ):
        self.guard = guard or Guard()
        self._method, self._rollout = method, method.rollout
        self._env = method.rollout.env
        self._watch = Watch(self._env, [prompt for prompt, _ in watched])
        self._drift: tuple[int, float] | None = None  # of the weights' version
        self._committed = False
        self.ledger = open_ledger(ledger, self._env.state)
        try:
            self._env.rewritten()
            self._memory = Memory(method, self.ledger)
            self._note_edited()
        except BaseException:
            self.ledger.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        method: str = "ultraedit",
        modules: str | Sequence[str] | None = None,
        policy: str | Path | None = None,
        ledger: str | Path = "edits",
        *,
        calibrate: bool = True,
        guard: Guard | None = None,
        preserve: Sequence[Pair] | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        seed: int = 0,
        loader: Callable[[ModelConfig], Backbone] = load_backbone,
        open_ledger: Callable[[str | Path, DeltaState], Any] = Ledger,
    ) -> Editor:
        """Open (or begin) a ledger on a base model and replay its edits.

        Args:
            model: directory, GGUF file or hub name of a causal LM, a name of ``hiedit models``
                (``world`` is embedded), or a model object (then ``tokenizer`` is needed; it is
                frozen and put into evaluation mode).
            method: a training-free method of ``configs/method`` or a YAML file.
            modules: names or patterns; None: the ledger's, those of the trained editor or of
                ``configs/model`` for this path or hub name, or those of the model's calibration.
            calibrate: whether a model whose modules nobody names is measured (once, see
                docs/calibration.md); without, it has a default (MLP output projections between an
                eighth and a half of the depth).
            policy: directory of a trained editor, instead of ``method``.
            ledger: directory of the ledger.
            guard: limits that every edit must keep; None: the default ones, see ``Guard``.
            dtype: of the weights; ``auto``: that of ``configs/model``, else the checkpoint's.
            preserve: (prompt, answer) pairs of knowledge to protect and to watch; None: facts of
                the world for ``world``, else everyday sentences and ``COMMON_FACTS`` of the world.
            loader, open_ledger: load a model by name and open its ledger in another way, as over
                several ranks.

        Raises:
            ValueError: for a path without a model, an unknown module or method, a method that has
                to be trained first, or a ledger of another base model.
            LedgerError: if the ledger is being written to by another process, or is damaged.
        """
        named = isinstance(model, str | Path)
        if not named and tokenizer is None:
            raise ValueError("tokenizer=None: a model object needs its tokenizer")
        config = None if policy else _training_free(method)
        modules = [modules] if isinstance(modules, str) else modules
        known = configured_model(str(model)) if named else {}
        modules = _modules(ledger, modules)
        modules = modules or (trained_modules(policy) if policy else known.get("modules"))
        if named:
            chosen = list(modules) if modules else None
            if dtype == "auto":
                dtype = known.get("dtype", dtype)
            source = ModelConfig(
                Path(model).name, str(model), chosen, dtype, device, trust_remote_code
            )
            backbone = loader(source)
            if tokenizer is not None:
                backbone.tokenizer = tokenizer
        else:
            backbone = Backbone(model, tokenizer, modules)
        world = named and model_path(str(model)) == model_path(WORLD)
        guard = guard or Guard.of(world)
        measurable = calibrate and policy is None and loader is load_backbone
        backbone, found = prepared(backbone, ledger, modules is None and measurable, str(model))
        if preserve is None:
            facts = preservation_pairs()[0]
            preserve = facts if world else (*NEUTRAL, *facts[:COMMON_FACTS])
        if policy:
            parts = load_editor(backbone, policy, seed)
            if parts.config.selector.kind == "shuffled":
                raise ValueError(
                    f"policy={str(policy)!r}: selector.kind='shuffled' edits with the mask of "
                    "another edit, a control for experiments alone; give an editor of kind 'policy'"
                )
        else:
            parts = build_method(backbone, calibrated(config, found), (), preserve, seed)
        return cls(parts, ledger, guard, preserve, open_ledger)

    @property
    def model(self) -> nn.Module:
        """The edited model, a plain transformers object."""
        return self._env.backbone.model

    @property
    def tokenizer(self):
        return self._env.backbone.tokenizer

    @property
    def modules(self) -> list[str]:
        """The editable modules, in the model's order."""
        return self._env.backbone.names

    @property
    def method(self) -> str:
        return self._method.config.name

    @property
    def drift(self) -> float | None:
        """Tell how far all edits in effect have moved the watched prompts from the base model (nats
        per token, see ``Moved``), as last measured; None where that was not since the last
        change."""
        measured = self._drift is not None and self._drift[0] == self._env.version
        return self._drift[1] if measured else None

    def edit(self, requests: Iterable[EditRequest]) -> list[int]:
        """Apply the requests one after another.

        Returns:
            The ids of the edits that now answer them, in order: new ones, and the earlier id where
            the same edit is in effect. A request that the guard rejected has none; that, and an
            answer that contradicts an earlier edit, is a warning (``apply`` has the details).
        """
        ids = []
        for done in self.apply(requests):
            if done.conflicts:
                warnings.warn(
                    f"{done.request.prompt!r} was edited before, with another answer "
                    f"(edit {done.conflicts[-1]})",
                    stacklevel=2,
                )
            if done.status == REJECTED:
                reasons = "; ".join(done.reasons)
                warnings.warn(f"not edited: {done.request.prompt!r}: {reasons}", stacklevel=2)
            if done.id is not None:
                ids.append(done.id)
        return ids

    def apply(self, requests: Iterable[EditRequest], dry_run: bool = False) -> Iterator[Edited]:
        """The same, one report per request as soon as its edit is on disk.

        dry_run: only say what each request would do to the model as it is; nothing is committed,
        so a request does not see the ones before it.
        """
        for request in requests:
            yield self._one(request, dry_run)

    def revert(self, ids: int | Iterable[int]) -> list[int]:
        """Take edits out of the weights: any subset, in any order; raises as ``Ledger.revert``."""
        return self._set(self.ledger.revert, ids)

    def restore(self, ids: int | Iterable[int]) -> list[int]:
        """Put reverted edits back at their places; raises as ``Ledger.restore``."""
        return self._set(self.ledger.restore, ids)

    def history(self) -> list[Record]:
        """Every edit ever committed: what, when, which layers, status."""
        return self.ledger.history()

    def verify(self) -> tuple[Verification, Holding]:
        """The integrity of the ledger, and whether its edits still hold on the model."""
        return self.ledger.verify(), self.holding()

    def holding(self) -> Holding:
        """Ask the model as it is now about every edit in effect."""
        return holding(self._env.backbone, self.history())

    def save_pretrained(self, directory: str | Path, overwrite: bool = False) -> Path:
        """The merged checkpoint, as ``AutoModelForCausalLM.from_pretrained`` loads it."""
        return save_merged(directory, self.model, self.tokenizer, overwrite=overwrite)

    def export_adapter(
        self,
        directory: str | Path,
        rank: int | None = None,
        max_error: float | None = None,
        overwrite: bool = False,
    ) -> ExportReport:
        """The accumulated delta as a PEFT LoRA adapter for the base model; arguments and errors
        as in ``hiedit.ledger.export.export_adapter``."""
        return export_adapter(
            directory,
            self._env.backbone,
            self._env.state,
            active_rows(self.history(), self.ledger.shifts),
            rank,
            max_error,
            overwrite=overwrite,
        )

    def close(self) -> None:
        """Save what the method has learned while editing and let others write to the ledger.

        Where nothing was committed, nothing is saved: a dry run with another method would else
        take the place of the memory of the one that edits.
        """
        try:
            if self._committed:
                self._memory.save()
        finally:
            self.ledger.close()

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _one(self, request: EditRequest, dry_run: bool) -> Edited:
        start = time.perf_counter()
        earlier = self.ledger.find(request.prompt)
        if earlier and earlier[-1].request.target == request.target:
            return Edited(request, SKIPPED, earlier[-1].id, ("the same edit is in effect",))
        conflicts = tuple(r.id for r in earlier if r.request.target != request.target)
        before = statistics(self._rollout.updater) if dry_run else None
        try:
            outcome = self._rollout.propose(EditBatch((request,)))
            odd = unusable(outcome)
            said = Verdict(outcome) if odd else self._settled(outcome)
            local = dry_run or self.guard.max_local_kl is not None
            found = predict(self._env, request, local)
            reasons = tuple(odd or [*said.reasons, *self.guard.objections(found)])
            status, edit = PREDICTED, None
            if not dry_run:
                status = REJECTED if reasons else COMMITTED
                edit = None if reasons else self._commit(request, said, found)
        finally:
            self._env.drop()
            if before is not None:
                load_lifelong_state(self._rollout.updater, before)
        moved = said.moved
        return Edited(
            request, status, edit, reasons, conflicts, found.success, moved and moved.kl,
            tuple(outcome.shifts), outcome.passes, time.perf_counter() - start,
            moved and moved.drift, said.scale, found.local_kl,
        )  # fmt: skip

    def _settled(self, outcome: Outcome) -> Verdict:
        said = settle(self._env, self._watch, self.guard, outcome)
        if said.moved is not None:
            self._drift = self._env.version, said.moved.before
        return said

    def _commit(self, request: EditRequest, said: Verdict, found: Prediction) -> int:
        """Disk first, then the weights, then what the method remembers."""
        outcome, moved = said.outcome, said.moved
        report = {
            "success": found.success, "kl": moved and moved.kl, "passes": outcome.passes,
            "held": outcome.held, "drift": moved and moved.drift, "scale": said.scale,
        }  # fmt: skip
        kept = {}
        if outcome.signals is not None:
            kept = keys_to_keep(self._rollout.updater, outcome.signals, outcome.mask)
        ids: list[int] = []

        def write(shifts):
            ids.extend(self.ledger.commit([Entry(request, shifts, self.method, report, kept)]))

        self._rollout.commit(outcome, write)
        if moved is not None:
            self._watch.accept()
            self._drift = self._env.version, moved.drift
        self._committed = True
        self._memory.committed(ids[0])
        return ids[0]

    def _set(self, change, ids: int | Iterable[int]) -> list[int]:
        changed = change([ids] if isinstance(ids, int) else ids)
        if changed:
            self._env.rewritten()
            self._note_edited()
        return changed

    def _note_edited(self) -> None:
        """Return what may be asked beside an edit follows from the edits in effect alone, so that
        an editor that is opened again asks the same."""
        preserved = self._rollout.preserved
        if preserved.asks:
            preserved.reset()
            preserved.edited(r.request for r in self.history() if r.status == ACTIVE)


def _training_free(method: str):
    config = load_method(method)
    if config.trains:
        raise ValueError(
            f"method={method!r} has to be trained first (hiedit train method={method}); "
            "then give the directory of the trained editor as policy=RUN_DIR/editors/..."
        )
    return config


def _modules(ledger: str | Path, modules: Sequence[str] | None) -> Sequence[str] | None:
    """Those that are asked for, else those of the ledger where there is one already."""
    if modules is not None or not (Path(ledger).expanduser() / "ledger.db").is_file():
        return modules
    with Reader(Path(ledger).expanduser().absolute(), None) as reader:
        return list(reader.modules) or None
