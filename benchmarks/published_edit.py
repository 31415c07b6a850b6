"""Editing without training, done straightforwardly: the baselines of ``edit_step.py``.

One sequence at a time; keys and value gradients from hooks; ``loss.backward()`` computes the
edited modules' dense weight gradients; every shift is a dense matrix that is added to the weight
in the model's own dtype.

- ``PublishedEditor``: gate, hypernetwork and solver of the published procedure (published.py).
- ``DenseProtected``: our protected least squares in several passes, precision and shift dense.

Shapes: ``T`` edit tokens, ``I``/``O`` features, ``E`` edits in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import PublishedTrainer, StepCounts
from hiedit.config import MethodConfig
from hiedit.types import IGNORE

if TYPE_CHECKING:
    from benchmarks.models import TokenisedEdit


class PublishedEditor(PublishedTrainer):
    """The published procedure with what it has learned, here nothing: ``edit`` commits.

    A batch is captured sequence by sequence and solved at once, like MALMEN's.
    """

    def edit(self, edits: Sequence[TokenisedEdit]) -> None:
        self.counts = StepCounts()
        self.capture(edits)
        with torch.no_grad():
            self.mask, _ = self._choose()
        everything = self._predict()
        chosen = (self.names[i] for i in self.mask.nonzero()[:, 0])
        self._add({name: everything[name] for name in chosen}, 1)

    def capture(self, edits: Sequence[TokenisedEdit]) -> None:
        """Signals of the whole batch, by module in ``_load``."""
        if len(edits) == 1:
            return self._capture(edits[0].edit)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.names}
        for edit in edits:
            self._capture(edit.edit)
            for name in self.names:
                parts[name].append(self._load(name))
        for name, pairs in parts.items():
            keys, grads = zip(*pairs, strict=True)
            self._store(name, torch.cat(keys), torch.cat(grads))


class DenseProtected:
    """``closed-form``: U = P K^T, V = (K P K^T + lam d I)^-1 D, pass after pass until the answer
    holds; an edit that is done joins the protected keys by inverting the I x I moment anew.

    moments: by module (C_0 / c [I, I], c [], mean squared output norm []), as our own fit them.
    """

    def __init__(
        self,
        model: nn.Module,
        moments: Mapping[str, tuple[Tensor, Tensor, Tensor]],
        config: MethodConfig,
    ):
        self.model, self.config = model.requires_grad_(False), config
        found = dict(model.named_modules())
        self.weights = {n: found[n].weight.requires_grad_(True) for n in moments}
        self.modules = {n: found[n] for n in moments}
        self.unit = {n: unit for n, (_, unit, _) in moments.items()}
        self.power = {n: power for n, (_, _, power) in moments.items()}
        eps = config.updater.eps
        self.inverse = {n: c + eps * torch.eye(len(c), device=c.device)
                        for n, (c, _, _) in moments.items()}  # fmt: skip
        self.precision = {n: torch.linalg.inv(c) for n, c in self.inverse.items()}
        self.passes = 0

    def edit(self, edit: TokenisedEdit) -> None:
        """Passes until the answer holds, each undone and halved where it raised the loss."""
        passes, self.passes = self.config.passes, 0
        keys: dict[str, Tensor] = {}
        last, size, before = {}, 1.0, None
        while True:
            loss, confidence, signals = self._forward(edit)
            if before is not None and not float(loss.detach()) <= before:
                self._add(last, -size)
                size *= 0.5
                if size <= 0.1:
                    break
                self._add(last, size)
                self.passes += 1
                continue
            if confidence > passes.target_probability or self.passes >= passes.max:
                break
            loss.backward()
            for weight in self.weights.values():
                weight.grad = None
            keys = {name: k for name, (k, _) in signals.items()}
            last, size, before = (
                {n: self.shift(n, *s) for n, s in signals.items()},
                1.0,
                float(loss.detach()),
            )
            self._add(last, 1)
            self.passes += 1
        self._protect(keys)

    def _forward(self, edit: TokenisedEdit):
        """Loss, smallest answer probability, signals (gradients filled by the backward)."""
        ids, labels = edit.edit
        target = labels[0, 1:]
        answer = target != IGNORE
        at = answer.nonzero()[:, 0]
        if self.config.updater.tokens == "all":
            at = torch.arange(int(at[-1]) + 1, device=ids.device)
        signals: dict[str, list[Tensor]] = {}

        def hook_of(name):
            def hook(module, inputs, output):
                signals[name] = [inputs[0][0, at].detach().float()]
                output.register_hook(lambda grad: signals[name].append(grad[0, at].float()))

            return hook

        hooks = [m.register_forward_hook(hook_of(n)) for n, m in self.modules.items()]
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        logits, target = logits[answer].float(), target[answer]
        chosen = logits.detach().softmax(-1).gather(1, target[:, None])
        return F.cross_entropy(logits, target), float(chosen.min()), signals

    @torch.no_grad()
    def shift(self, name: str, keys: Tensor, grads: Tensor) -> Tensor:
        """[O, I]; keys: [T, I], grads: [T, O]."""
        c, precision = self.config.updater, self.precision[name]
        target = -c.eta * grads * (self.power[name].sqrt() / grads.norm(dim=-1).max())
        u = keys @ precision
        gram = u @ keys.T
        eye = torch.eye(len(keys), device=keys.device)
        v = torch.linalg.solve(gram + c.lam * gram.diagonal().mean() * eye, target)
        return v.T @ u

    @torch.no_grad()
    def _protect(self, keys: Mapping[str, Tensor]) -> None:
        for name, k in keys.items():
            weight = self.config.updater.absorb / (len(k) * self.unit[name])
            self.inverse[name] += weight * k.T @ k
            self.precision[name] = torch.linalg.inv(self.inverse[name])

    @torch.no_grad()
    def _add(self, shifts: Mapping[str, Tensor], scale: float) -> None:
        for name, shift in shifts.items():
            self.weights[name].data.add_(shift.to(self.weights[name].dtype), alpha=scale)
