"""A reward measured a few sequences at a time, so that the activations of a few are held at once.

The gradient with respect to the factors is made part by part while the reward is computed, and is
handed on when the reward is differentiated: the hypernetwork's graph is walked once, as ever. The
numbers are those of one batch up to the order of sums; the price is smaller matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hiedit.types import Shift, Shifts

# (shifts, first row, row after the last) -> (scalar loss, a tensor of what is to be known of it)
Measure = Callable[[Shifts, int, int], tuple[Tensor, Tensor]]


def in_parts(
    measure: Measure, bounds: Sequence[tuple[int, int]], shifts: Shifts
) -> tuple[Tensor, Tensor]:
    """(sum of the losses, sum of what is to be known) over the parts ``bounds``, (first row, row
    after the last) each. The first can be differentiated, once, with respect to the factors of
    ``shifts`` and whatever they were made from; the second cannot."""
    factors = [t for s in shifts.values() for t in (s.A, s.B, s.scale) if t is not None]
    return _Parts.apply(measure, bounds, shifts, *factors)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, measure, bounds, shifts, *factors):
        wanted = ctx.needs_input_grad[3:]
        leaves = [f.detach().requires_grad_(w) for f, w in zip(factors, wanted, strict=True)]
        replaced = _with(shifts, leaves)
        moving = [leaf for leaf in leaves if leaf.requires_grad]
        ctx.slopes = [torch.zeros_like(leaf) for leaf in moving]
        losses, known = [], []
        for first, last in bounds:
            with torch.set_grad_enabled(bool(moving)):
                loss, about = measure(replaced, first, last)
                found = torch.autograd.grad(loss, moving, allow_unused=True) if moving else ()
            losses.append(loss.detach())
            known.append(about.detach())
            for total, slope in zip(ctx.slopes, found, strict=True):
                if slope is not None:
                    total += slope
        ctx.wanted = wanted
        known = torch.stack(known).sum(0)
        ctx.mark_non_differentiable(known)
        return torch.stack(losses).sum(), known

    @staticmethod
    def backward(ctx, grad, _):
        slopes = iter(ctx.slopes)
        return None, None, None, *(grad * next(slopes) if w else None for w in ctx.wanted)


def _with(shifts: Shifts, factors: Sequence[Tensor]) -> dict[str, Shift]:
    """``shifts`` with other tensors in place of their own, in the order of ``in_parts``."""
    left = iter(factors)
    return {
        name: Shift(next(left), next(left), None if s.scale is None else next(left))
        for name, s in shifts.items()
    }
