"""Gradient estimators of the high level: from logits, sampled masks and their losses to a loss
whose gradient is that of the expected true loss. Pure functions; they know no model.

Shapes: ``S`` draws, ``E`` edits, ``L`` modules, ``k`` modules to choose. A draw is int64
[S, E, L]: 0 where a module was left out, its place (1 to k) where it was the n-th chosen (1 for
all of a Bernoulli draw), -1 throughout for an edit that takes no part. The edits of a step share
one loss, so their log-probabilities add up.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def masks_of(draws: Tensor) -> Tensor:
    """[S, E, L] in {0, 1}."""
    return (draws > 0).float()


def draw_plackett_luce(logits: Tensor, k: int, samples: int, generator=None) -> Tensor:
    """``k`` modules one after another without replacement, each with probability proportional to
    ``exp(logit)``: the largest of Gumbel-perturbed logits in order (Kool et al. 2019, Gumbel
    top-k). logits: [E, L] -> draws [S, E, L]."""
    shape = (samples, *logits.shape)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).to(logits.device)
    uniform = uniform.clamp(min=1e-300)
    # A logit that is not finite would be chosen always or never, whatever the other modules say.
    sound = logits.detach().double().nan_to_num(nan=0.0, posinf=50.0, neginf=-50.0)
    index = (sound - (-uniform.log()).log()).topk(k, dim=-1).indices
    place = torch.arange(1, k + 1, device=logits.device).expand(index.shape)
    return torch.zeros(shape, dtype=torch.int64, device=logits.device).scatter(-1, index, place)


def every_subset(total: int, k: int, edits: int) -> Tensor:
    """All choices of ``k`` among ``total`` modules, as draws [S, E, L] in ascending order."""
    subsets = torch.tensor(list(itertools.combinations(range(total), k)))  # [S, k]
    draws = torch.zeros(len(subsets), total, dtype=torch.int64)
    draws.scatter_(1, subsets, torch.arange(1, k + 1).expand(subsets.shape))
    return draws[:, None].expand(-1, edits, -1)


def plackett_luce_log_prob(logits: Tensor, draws: Tensor) -> Tensor:
    """[S]: log-probability of the draws in their order. The loss of a mask does not depend on the
    order, so its expectation over orders is that over subsets, and so is its gradient."""
    place = draws.clamp(min=0)
    z = logits.expand(draws.shape)
    total = z.new_zeros(draws.shape[:2])
    for n in range(1, int(place.max()) + 1 if place.numel() else 1):
        chosen = place == n
        left = (place == 0) | (place >= n)
        rest = z.masked_fill(~left, -torch.inf).logsumexp(-1)
        step = z.masked_fill(~chosen, 0.0).sum(-1) - rest
        total = total + torch.where(chosen.any(-1), step, torch.zeros_like(step))
    return total.sum(-1)


def draw_bernoulli(logits: Tensor, samples: int, generator=None) -> Tensor:
    """Every module on its own with probability ``sigmoid(logit)``. [E, L] -> draws [S, E, L]."""
    uniform = torch.rand(samples, *logits.shape, generator=generator, dtype=torch.float64)
    sound = logits.detach().double().nan_to_num(nan=0.0)
    return (uniform.to(logits.device) < sound.sigmoid()).long()


def bernoulli_log_prob(logits: Tensor, draws: Tensor) -> Tensor:
    """[S]: log-probability of the draws."""
    signed = torch.where(draws > 0, logits, -logits)
    return torch.where(draws >= 0, F.logsigmoid(signed), 0.0).sum((-2, -1))


def sound_losses(losses: Tensor) -> Tensor:
    """A mask that broke the model (NaN, infinity) counts as the worst of the others."""
    finite = losses.isfinite()
    worst = losses[finite].max() if bool(finite.any()) else losses.new_zeros(())
    return torch.where(finite, losses, worst)


def disadvantage(losses: Tensor, baseline: str, mode: Tensor | None = None) -> Tensor:
    """[S]: how much worse each draw did than its baseline, which its own draw has no part in.

    losses: [S]. baseline: ``self_critical``, the loss ``mode`` [] of the mask that editing would
    take (Rennie et al. 2017); ``leave_one_out``, the mean of the other draws (Kool et al. 2019).
    """
    if baseline == "self_critical":
        return losses - mode
    return (losses - losses.mean()) * (len(losses) / (len(losses) - 1))


def score_function_loss(log_prob: Tensor, disadvantages: Tensor) -> Tensor:
    """Scalar whose gradient is that of the expected loss (Williams 1992). Both: [S]."""
    return (disadvantages.detach() * log_prob).mean()


def regression_loss(logits: Tensor, draws: Tensor, losses: Tensor) -> Tensor:
    """Counterfactual credit by regression: half the variance of what an additive model leaves
    unexplained, ``-loss = sum_l m_l z_l + constant``; an unbiased estimate of it from S draws.

    Where module effects add up, ``z_l`` becomes module ``l``'s own; the mean over the draws takes
    the constant away. Needs S >= 2 draws from a distribution that does not depend on the logits.
    """
    residual = (masks_of(draws) * logits).sum((-2, -1)) + losses.detach()
    return 0.5 * (residual - residual.mean()).square().sum() / (len(residual) - 1)


def ranking_loss(logits: Tensor, draws: Tensor, losses: Tensor) -> Tensor:
    """Counterfactual credit by rank: over all pairs of draws, the logistic loss of putting the
    better mask first by its summed logits (Bradley and Terry 1952); needs no units."""
    value = (masks_of(draws) * logits).sum((-2, -1))
    better = losses.detach()[:, None] < losses.detach()[None, :]
    if not bool(better.any()):
        return 0.0 * value.sum()
    return F.softplus(value[None, :] - value[:, None])[better].mean()


def inclusion(logits: Tensor, k: int | None) -> Tensor:
    """[E, L]: probability that a module is chosen: ``sigmoid`` without ``k``; with it, that of a
    Plackett-Luce draw, ``1 - exp(-t e^z)`` with ``t`` such that the sum is ``k`` (modules arriving
    at exponential times, Rosen 1997: exact as L grows; ``t`` is taken as a constant)."""
    if k is None:
        return logits.sigmoid()
    z = logits.detach().double()
    low, high = -z.amax(-1) - 20, -z.amin(-1) + 20  # of log t
    for _ in range(60):
        middle = 0.5 * (low + high)
        many = -torch.expm1(-(z + middle[:, None]).exp())
        over = many.sum(-1) > k
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return -torch.expm1(-(logits + low.to(logits.dtype)[:, None]).exp())


def entropy(logits: Tensor, k: int | None) -> Tensor:
    """[E]: mean binary entropy of the modules' inclusion, relative to a policy that knows nothing
    (1), down to one that always takes the same modules (0)."""
    p = inclusion(logits, k).clamp(1e-6, 1 - 1e-6)
    share = 0.5 if k is None else k / logits.shape[-1]
    most = -(share * math.log(share) + (1 - share) * math.log1p(-share)) if share < 1 else 0.0
    found = -(p * p.log() + (1 - p) * (1 - p).log()).mean(-1)
    return found / most if most else torch.ones_like(found)


def entropy_floor_loss(logits: Tensor, k: int | None, floor: float) -> Tensor:
    """Scalar: how far the edits' entropies lie below ``floor``; without gradient above it."""
    return (floor - entropy(logits, k)).clamp(min=0).mean()
