"""The high-level policy's network: signals in, one logit per edit and module out.

Shapes: ``E`` edits, ``T`` edit tokens, ``L`` modules, ``M`` of them of one shape, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiedit.backbone.normalise import RunningNorm, stack_group
from hiedit.types import Signals

NEVER = -100.0  # a logit: of a module whose features are not finite, where they decide


class Encoder(nn.Module):
    """One weight shape: normalised ``[K, G]`` with per-module scale and shift, to ``H`` features,
    mean over each edit's tokens."""

    def __init__(self, names: list[str], shape: tuple[int, int], hidden: int, clamp: float):
        super().__init__()
        self.names = names
        m, (i, o) = len(names), shape
        self.key_norm = RunningNorm(m, i, clamp)
        self.grad_norm = RunningNorm(m, o, clamp)
        self.scale = nn.Parameter(torch.ones(m, 1, i + o))
        self.shift = nn.Parameter(torch.zeros(m, 1, i + o))
        self.project = nn.Linear(i + o, hidden)

    def observe(self, signals: Signals) -> None:
        keys, grads = stack_group(signals, self.names)
        self.key_norm.observe(keys)
        self.grad_norm.observe(grads)

    def forward(self, signals: Signals, edits: int) -> Tensor:
        """[E, M, H]."""
        keys, grads = stack_group(signals, self.names)
        x = torch.cat([self.key_norm(keys), self.grad_norm(grads)], -1)
        x = torch.where(x.isfinite(), x, 0.0)  # one module's NaN must not decide for all of them
        x = x * self.scale + self.shift
        h = F.relu(self.project(x))  # [M, T, H]
        summed = h.new_zeros(h.shape[0], edits, h.shape[-1]).index_add(1, signals.edit, h)
        count = torch.bincount(signals.edit, minlength=edits).clamp(min=1)
        return (summed / count[:, None]).transpose(0, 1)


class GateNetwork(nn.Module):
    """Encoders by weight shape, concatenated over modules, and a linear gate (design, section 3).

    The gate's weights start small, so that the first choices follow its bias. Features of each
    module (``Signals.state``) reach the logits through weights that start at zero: a module's
    own through weights that all modules share, everyone's through a matrix. ``features`` [F] are
    what each counts from the start, as it is (not standardised) and for good: a prior that the
    rest learns to correct.
    """

    def __init__(
        self,
        names: list[str],
        groups: Mapping[tuple[int, int], list[str]],
        hidden: int,
        clamp: float = 8.0,
        features: Sequence[float] = (),
    ):
        super().__init__()
        self.encoders = nn.ModuleList(Encoder(g, s, hidden, clamp) for s, g in groups.items())
        order = [n for g in groups.values() for n in g]
        self.register_buffer("order", torch.tensor([order.index(n) for n in names]))
        self.gate = nn.Linear(hidden * len(names), len(names))
        nn.init.normal_(self.gate.weight, std=0.1 / (hidden * len(names)) ** 0.5)
        nn.init.zeros_(self.gate.bias)
        self.state_norm, self.features = None, tuple(features)
        if features:
            self.register_buffer("prior", torch.tensor(features), persistent=False)
            told = len(features)
            self.state_norm = RunningNorm(len(names), told, clamp, pooled=True)
            self.own = nn.Parameter(torch.zeros(told))
            self.others = nn.Parameter(torch.zeros(len(names), len(names) * told))

    def observe(self, signals: Signals) -> None:
        """Update the normalisers (the published code never does: design, section 3)."""
        for encoder in self.encoders:
            encoder.observe(signals)
        if self.state_norm is not None:
            self.state_norm.observe(signals.state.transpose(0, 1))

    def forward(self, signals: Signals, edits: int) -> Tensor:
        """Logits [E, L], columns in the model's order."""
        features = torch.cat([encoder(signals, edits) for encoder in self.encoders], 1)
        logits = self.gate(features[:, self.order].flatten(1))
        if self.state_norm is None:
            return logits
        if any(self.features):
            prior = signals.state @ self.prior
            logits = logits + torch.where(prior.isfinite(), prior, NEVER)
        state = self.standardised(signals.state)
        return logits + state @ self.own + state.flatten(1) @ self.others.T

    def standardised(self, state: Tensor) -> Tensor:
        """Features [E, L, F] by what was observed of each module's; 0 where they are not finite."""
        state = self.state_norm(state.transpose(0, 1)).transpose(0, 1)
        return torch.where(state.isfinite(), state, 0.0)
