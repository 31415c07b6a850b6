"""Selectors: which of the ``L`` editable modules each of ``E`` edits touches."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hiedit.config import SelectorConfig
from hiedit.policy import estimators
from hiedit.policy.gate import GateNetwork
from hiedit.types import Action, Signals

GAIN_OVER_ROOT_ENERGY = {"gain": 1.0, "cost": -0.5}  # weights of features, which are logs


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """scores: [E, L] -> [E, L] in {0, 1} with the ``k`` largest of each row."""
    index = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, index, 1.0)


def straight_through_top_k(logits: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """The top-k mask, with the gradient of a relaxation (Bengio et al. 2013, straight-through).

    The relaxation is ``sigmoid((z - threshold) / temperature)`` with the threshold midway between
    the k-th and the next logit, so that its sum is near ``k``; the forward value is exactly 0 or 1.
    logits: [E, L] -> [E, L].
    """
    hard = top_k_mask(logits.detach(), k)
    if k < logits.shape[-1]:
        ranked = logits.detach().sort(dim=-1, descending=True).values
        threshold = 0.5 * (ranked[:, k - 1] + ranked[:, k])
    else:
        threshold = logits.detach().amin(-1)
    soft = torch.sigmoid((logits - threshold[:, None]) / temperature)
    return hard + (soft - soft.detach())  # in this order nothing is rounded


class Selector(nn.Module):
    """Chooses masks as its configuration says; ``random`` and the estimators that sample draw from
    a generator of its own.

    A policy that samples executes a draw while it trains (the first that takes any module) and
    its mode while it edits: the top k, or for ``bernoulli`` every module more likely in than out,
    one at least.

    names: the editable modules in the model's order. groups: the same by (I, O).

    Raises:
        ValueError: if ``k`` exceeds the number of modules or ``modules`` names an unknown one.
    """

    def __init__(
        self,
        names: list[str],
        groups: Mapping[tuple[int, int], list[str]],
        config: SelectorConfig,
        seed: int = 0,
    ):
        super().__init__()
        self.names, self.config = list(names), config
        total = len(self.names)
        self.k = total if config.kind == "all" else (config.k or max(1, total // 2))
        if self.k > total:
            raise ValueError(
                f"method.selector.k={self.k}: the model has {total} editable modules; "
                f"valid are 1 to {total}"
            )
        self.generator = torch.Generator().manual_seed(seed)
        self.gate = None
        if config.learned:
            told, prior = len(config.features), None
            if config.init == "gain":
                prior = [GAIN_OVER_ROOT_ENERGY.get(feature, 0.0) for feature in config.features]
            self.gate = GateNetwork(self.names, groups, config.hidden, features=told, prior=prior)
        self._before: Tensor | None = None  # [1, L], the policy's mask for the edit before
        static = torch.zeros(total)
        for name in config.modules or ():
            if name not in self.names:
                raise ValueError(
                    f"method.selector.modules: {name!r} is not editable here; "
                    f"valid are {', '.join(self.names)}"
                )
            static[self.names.index(name)] = 1.0
        self.register_buffer("static_mask", static)
        if self.gate is not None:  # how often it chose a module, see ``methods.record_choices``
            self.register_buffer("frequency", torch.zeros(total))

    @property
    def learned(self) -> bool:
        return self.gate is not None

    @property
    def scores_masks(self) -> bool:
        """Tell whether its estimator wants sampled masks scored."""
        return self.learned and self.config.estimator != "straight_through"

    def reset(self) -> None:
        """Begin a new stream."""
        self._before = None

    @property
    def wants_effects(self) -> bool:
        """Tell whether single-module effects must be given before the first choice."""
        c = self.config
        return (c.kind == "static" and not c.modules) or (c.learned and c.init == "effects")

    def set_effects(self, effects: Tensor) -> None:
        """effects: [L], larger is better; the static set, or where the policy's logits start. A
        module whose effect is not finite (its shift broke the model) counts as the worst."""
        finite = effects.isfinite()
        worst = effects[finite].min() if bool(finite.any()) else effects.new_zeros(())
        effects = torch.where(finite, effects, worst)
        if self.config.kind == "static":
            self.static_mask.copy_(top_k_mask(effects[None], self.k)[0])
        elif self.gate is not None:
            std = effects.std() if len(effects) > 1 else effects.new_ones(())
            spread = (effects - effects.mean()) / std.clamp(min=1e-9)
            c = self.config
            if c.estimator == "counterfactual" and c.credit == "regress":
                spread = effects - effects.mean()  # what is regressed has a unit
            with torch.no_grad():
                self.gate.gate.bias.copy_(c.init_scale * spread)

    def set_static(self, mask: Tensor) -> None:
        """mask: [L] in {0, 1}, from now on that of every edit."""
        self.static_mask.copy_(mask)

    def observe(self, signals: Signals) -> None:
        if self.gate is not None:
            self.gate.observe(signals)

    def forward(
        self, signals: Signals, explore: bool = False, gains: Tensor | None = None
    ) -> Action:
        """The mask of every edit in ``signals``, and the policy's logits where there is one.

        explore: whether this is training, where a policy that samples executes a draw. gains:
        [E, L], what ``gain`` ranks by.
        """
        edits, total = signals.loss.shape[0], len(self.names)
        device = signals.loss.device
        kind = self.config.kind
        if self.gate is not None:
            return self._policy(signals, edits, explore)
        if kind == "all":
            return Action(torch.ones(edits, total, device=device))
        if kind in ("static", "static_frequency", "best_subset"):
            return Action(self.static_mask.to(device).expand(edits, -1))
        if kind == "random":
            scores = torch.rand(edits, total, generator=self.generator).to(device)
        elif kind == "gain":
            scores = gains.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        else:
            scores = gradient_norms(signals, self.names).nan_to_num(nan=-1.0, posinf=-1.0)
        return Action(top_k_mask(scores, self.k))

    def again(self, signals: Signals, action: Action) -> Action:
        """The choice that was made on ``signals``, with a graph for another pass."""
        if not self.learned:
            return action
        logits = self.gate(signals, signals.loss.shape[0])
        if self.scores_masks or not torch.is_grad_enabled():
            return Action(action.mask, logits, action.draws)
        return Action(straight_through_top_k(logits, self.k, self.config.temperature), logits)

    def mode(self, logits: Tensor) -> Tensor:
        """[E, L]: the mask that editing takes."""
        if self.config.estimator == "bernoulli":
            return torch.maximum((logits > 0).to(logits.dtype), top_k_mask(logits, 1)).detach()
        return top_k_mask(logits.detach(), self.k)

    def loss(self, action: Action, losses: Tensor, mode: Tensor | None = None) -> Tensor:
        """Scalar whose gradient trains the policy.

        losses: [S], of the action's draws on the true objective. mode: [], of the mode's.
        """
        c, logits, draws = self.config, action.logits, action.draws
        k = None if c.estimator == "bernoulli" else self.k
        if k is None:
            losses = losses + c.sparsity * estimators.masks_of(draws).sum((-2, -1))
            if mode is not None:
                mode = mode + c.sparsity * self.mode(logits)[(draws[0] >= 0).all(-1)].sum()
        losses = estimators.sound_losses(losses)
        if c.estimator == "counterfactual":
            credit = {"regress": estimators.regression_loss, "rank": estimators.ranking_loss}
            return credit[c.credit](logits, draws, losses)
        if mode is not None and not bool(mode.isfinite()):
            mode = losses.max()
        log_prob = {
            "plackett_luce": estimators.plackett_luce_log_prob,
            "bernoulli": estimators.bernoulli_log_prob,
        }[c.estimator](logits, draws)
        worse = estimators.disadvantage(losses, c.baseline, mode)
        floor = estimators.entropy_floor_loss(logits, k, c.entropy_floor)
        return estimators.score_function_loss(log_prob, worse) + c.entropy_weight * floor

    def _policy(self, signals: Signals, edits: int, explore: bool) -> Action:
        logits = self.gate(signals, edits)
        if explore and self.scores_masks:
            return self._explore(logits)
        if self.config.kind == "shuffled" and not explore:
            own = self.mode(logits)
            first = self.mode(self.gate.gate.bias[None]) if self._before is None else self._before
            self._before = own[-1:]
            return Action(torch.cat([first, own[:-1]]), logits)
        if self.scores_masks:
            return Action(self.mode(logits), logits)
        return Action(straight_through_top_k(logits, self.k, self.config.temperature), logits)

    def _explore(self, logits: Tensor) -> Action:
        c = self.config
        if c.estimator == "bernoulli":
            draws = estimators.draw_bernoulli(logits, c.samples, self.generator)
        elif c.estimator == "plackett_luce":
            draws = estimators.draw_plackett_luce(logits, self.k, c.samples, self.generator)
        else:
            edits, total = logits.shape
            if math.comb(total, self.k) <= c.samples:
                draws = estimators.every_subset(total, self.k, edits).to(logits.device)
            else:
                even = torch.zeros_like(logits)
                draws = estimators.draw_plackett_luce(even, self.k, c.samples, self.generator)
            return Action(self.mode(logits), logits, draws)
        masks = estimators.masks_of(draws)
        used = masks.sum((-2, -1)) > 0
        mask = masks[int(used.int().argmax())] if bool(used.any()) else self.mode(logits)
        return Action(mask, logits, draws)


def gradient_norms(signals: Signals, names: list[str]) -> Tensor:
    """[E, L]: per edit and module, a bound on the weight gradient's norm, ``sum_t |k_t| |g_t|``."""
    edits = signals.loss.shape[0]
    columns = []
    for name in names:
        per_token = signals.keys[name].norm(dim=-1) * signals.grads[name].norm(dim=-1)
        columns.append(per_token.new_zeros(edits).index_add(0, signals.edit, per_token))
    return torch.stack(columns, -1)
