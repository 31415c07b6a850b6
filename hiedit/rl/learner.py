"""The learner: gradients of the reward in, updated hypernetwork and policy out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hiedit.policy.selectors import Selector
from hiedit.rl.checkpoint import Snapshot
from hiedit.rl.observed import Observed, learned_state, load_learned_state, replay
from hiedit.updaters.updater import Updater


def without_moments(state: Snapshot) -> dict[str, Tensor]:
    """Select of a learner's state what belongs to selector and updater."""
    return {n: t for n, t in state.tensors.items() if not n.startswith("adam.")}


@dataclass(frozen=True)
class Contribution:
    """The share of one worker's segment in the next version.

    gradients: by name, summed over the segment's edits; empty where the worker had fewer edits
    left than a version takes. observed: its running statistics, in order. dropped: losses that
    were not finite and left out.
    """

    gradients: Mapping[str, Tensor]
    observed: Sequence[Observed]
    dropped: int = 0


class Gradients:
    """Sums gradients of the reward in the parameters' own ``grad``; a loss that is not finite is
    dropped and counted in ``dropped``."""

    def __init__(self, selector: Selector, updater: Updater):
        self.modules: dict[str, nn.Module] = {"selector": selector, "updater": updater}
        self.dropped = 0

    def backward(self, loss: Tensor) -> None:
        """Add one pass's gradient."""
        if loss.requires_grad and bool(torch.isfinite(loss)):
            loss.backward()
        elif not bool(torch.isfinite(loss)):
            self.dropped += 1

    def named(self) -> dict[str, nn.Parameter]:
        """The learned parameters by name, in a fixed order."""
        return {
            f"{part}.{name}": parameter
            for part, root in self.modules.items()
            for name, parameter in root.named_parameters()
            if parameter.requires_grad
        }

    def take(self) -> tuple[dict[str, Tensor], int]:
        """(gradients by name, losses dropped) since the last call, which begin anew."""
        taken = {n: p.grad for n, p in self.named().items() if p.grad is not None}
        dropped, self.dropped = self.dropped, 0
        for parameter in self.named().values():
            parameter.grad = None
        return taken, dropped


class Learner(Gradients):
    """Adam over the hypernetwork, the log step sizes and the policy, each at its own rate.

    Gradients are summed over ``steps_per_update`` edits, clipped per part (so that a policy's
    large gradient does not silence the updater's) and applied; a non-finite one is dropped and
    counted in ``dropped``.
    """

    def __init__(self, selector: Selector, updater: Updater, clip: float, steps_per_update: int):
        super().__init__(selector, updater)
        self.clip, self.every = clip, steps_per_update
        self.pending, self.version = 0, 0
        steps, net = [], []
        for name, parameter in updater.named_parameters():
            if parameter.requires_grad:
                is_step = name.endswith(("log_eta", "log_lam"))
                (steps if is_step else net).append(parameter)
        gate = [p for p in selector.parameters() if p.requires_grad]
        config = updater.config
        rates = (config.lr, config.lr_step, selector.config.lr)
        self.parts = [part for part in (net, steps, gate) if part]
        groups = [
            {"params": part, "lr": rate}
            for part, rate in zip((net, steps, gate), rates, strict=True)
            if part
        ]
        self.optimizer = torch.optim.Adam(groups) if groups else None

    def edit_done(self) -> bool:
        """Count an edit; every ``steps_per_update`` of them, step. Returns whether it stepped."""
        self.pending += 1
        if self.optimizer is None or self.pending < self.every:
            return False
        self.pending = 0
        return self.step()

    def step(self) -> bool:
        """Clip and apply the gradients; returns False where they were not finite and dropped."""
        for part in self.parts:
            norm = torch.nn.utils.clip_grad_norm_(part, self.clip)
            if not bool(torch.isfinite(norm)):
                self.optimizer.zero_grad(set_to_none=True)
                self.dropped += 1
                return False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.version += 1
        return True

    def update(self, contributions: Sequence[Contribution]) -> bool:
        """One step on the mean of the workers' gradients, added in the order given, and their
        observations one worker after the other. Returns whether it stepped."""
        for contribution in contributions:
            replay(self.modules, contribution.observed)
            self.dropped += contribution.dropped
        given = [c.gradients for c in contributions if c.gradients]
        if self.optimizer is None or not given:
            return False
        for name, parameter in self.named().items():
            parts = [g[name].to(parameter.device) for g in given if name in g]
            parameter.grad = None if not parts else sum(parts[1:], parts[0].clone()) / len(given)
        return self.step()

    def published(self) -> dict[str, Tensor]:
        """A version: copies of all parameters and running statistics, by name."""
        return learned_state(self.modules)

    def state(self) -> Snapshot:
        """A version, all that was fitted before the first one, and what Adam remembers; to be taken
        between two steps."""
        whole = {
            f"{part}.{name}": value.detach().clone()
            for part, root in self.modules.items()
            for name, value in root.state_dict().items()
        }
        moments = {
            f"adam.{name}.{key}": value.detach().clone()
            for name, parameter in self.named().items()
            for key, value in (self.optimizer.state.get(parameter) or {}).items()
        }
        values = {"version": self.version, "dropped": self.dropped}
        return Snapshot(whole | moments, values)

    def load_state(self, state: Snapshot) -> None:
        """Go on from ``state``; a trajectory is to be loaded afterwards, which protects anew.

        Raises:
            ValueError: if it is of another method.
        """
        load_learned_state(self.modules, without_moments(state))
        self.version, self.dropped = state.values["version"], state.values["dropped"]
        if self.optimizer is not None:
            self.optimizer.state.clear()
        for name, parameter in self.named().items():
            keys = (n for n in state.tensors if n.rpartition(".")[0] == f"adam.{name}")
            found = {n.rpartition(".")[2]: state.tensors[n].clone() for n in keys}
            if found:  # Adam counts its steps on the CPU, whatever the parameter's device
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in found.items()
                }
