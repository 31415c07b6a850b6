"""Running statistics of signals, for all modules of one shape at once.

Shapes: ``M`` modules of one shape, ``T`` edit tokens, ``D`` features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hiedit.types import Signals


def stack_group(signals: Signals, names: list[str]) -> tuple[Tensor, Tensor]:
    """(K [M, T, I], G [M, T, O]) of the modules ``names``, which share a shape."""
    return (
        torch.stack([signals.keys[n] for n in names]),
        torch.stack([signals.grads[n] for n in names]),
    )


class RunningNorm(nn.Module):
    """Mean and standard deviation per module and feature over all tokens seen so far.

    Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    The statistics are part of the state dict: a trained editor goes on where training ended.
    Before anything was observed, ``forward`` is the identity. pooled: one deviation per feature
    for all modules, each around its own mean; a feature that hardly ever moves in some module then
    does not become all that is seen of it when it moves a little.
    """

    def __init__(
        self, modules: int, features: int, clamp: float | None = 8.0, pooled: bool = False
    ):
        super().__init__()
        self.clamp, self.pooled = clamp, pooled
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(modules, features))
        self.register_buffer("m2", torch.zeros(modules, features))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """x: [M, T, D]; a batch with a non-finite value is left out."""
        mean = x.mean(1)
        # NaN and infinity reach the mean; to look at every value would cost more than all the rest.
        if x.shape[1] and bool(mean.isfinite().all()):
            self.add(x.shape[1], mean, (x - mean[:, None]).square().sum(1))

    @torch.no_grad()
    def add(self, tokens: int, mean: Tensor, spread: Tensor) -> None:
        """Count a batch of ``tokens`` by its mean [M, D] and its spread [M, D], the sum of squared
        distances from that mean: all that ``observe`` makes of it."""
        total = self.count + tokens
        delta = mean - self.mean
        self.mean += delta * (tokens / total)
        self.m2 += spread + delta.square() * (self.count * tokens / total)
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """[M, D], floored relative to the module's largest so that a dead feature stays finite."""
        if self.count < 2:
            return torch.ones_like(self.m2)
        variance = self.m2 / (self.count - 1)
        if self.pooled:
            variance = variance.mean(0, keepdim=True).expand_as(variance)
        std = variance.float().sqrt()
        floor = 1e-3 * std.amax(-1, keepdim=True)
        return std.maximum(floor).clamp(min=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """x: [M, T, D] -> standardised, clamped to ``clamp`` standard deviations."""
        if self.count < 2:
            return x
        x = (x - self.mean[:, None]) / self.std[:, None]
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
