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
    """Encoders by weight shape, concatenated over modules, and a linear gate (docs/methods.md).

    The gate's weights start small, so that the first choices follow its bias. Features of each
    module (``Signals.state``, ``features`` of them) reach the logits through weights that start at
    zero: a module's own through weights that all modules share, everyone's through a matrix.
    ``prior`` [F] are fixed weights of the same features, not standardised: where the logits start,
    for the rest to correct.
    """

    def __init__(
        self,
        names: list[str],
        groups: Mapping[tuple[int, int], list[str]],
        hidden: int,
        clamp: float = 8.0,
        features: int = 0,
        prior: Sequence[float] | None = None,
    ):
        super().__init__()
        self.encoders = nn.ModuleList(Encoder(g, s, hidden, clamp) for s, g in groups.items())
        order = [n for g in groups.values() for n in g]
        self.register_buffer("order", torch.tensor([order.index(n) for n in names]))
        self.gate = nn.Linear(hidden * len(names), len(names))
        nn.init.normal_(self.gate.weight, std=0.1 / (hidden * len(names)) ** 0.5)
        nn.init.zeros_(self.gate.bias)
        self.state_norm = None
        if features:
            self.state_norm = RunningNorm(len(names), features, clamp, pooled=True)
            self.own = nn.Parameter(torch.zeros(features))
            self.others = nn.Parameter(torch.zeros(len(names), len(names) * features))
        fixed = None if prior is None else torch.tensor(prior)
        self.register_buffer("prior", fixed, persistent=False)  # follows from the configuration

    def observe(self, signals: Signals) -> None:
        """Update the normalisers (the published code never does)."""
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
        if self.prior is not None:
            start = signals.state @ self.prior
            logits = logits + torch.where(start.isfinite(), start, NEVER)
        state = self.state_norm(signals.state.transpose(0, 1)).transpose(0, 1)  # [E, L, F]
        state = torch.where(state.isfinite(), state, 0.0)
        return logits + state @ self.own + state.flatten(1) @ self.others.T
