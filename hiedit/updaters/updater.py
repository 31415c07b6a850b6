"""The low-level policy: from signals and a mask to one shift per chosen module.

Shapes: ``M`` modules of one shape, ``T`` edit tokens, ``E`` edits, ``L`` modules in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hiedit.backbone.moments import KeyMoments
from hiedit.backbone.normalise import stack_group
from hiedit.types import Shift, Shifts, Signals
from hiedit.updaterconfig import UpdaterConfig
from hiedit.updaters.averaging import averaged, share_at
from hiedit.updaters.group import ShapeGroup
from hiedit.updaters.natural import joint_length, within


@dataclass
class _Part:
    """One group's share of ``Updater.forward``.

    index: the modules that get a shift. scale: [M, T], the mask by token. keys, grads, pseudo: of
    the edit. sound: bool [M], what is finite. system: bool [M, T], the tokens that are solved for.
    directions: [M, T, I], ``P`` times the pseudo-keys, where they are known.
    """

    group: ShapeGroup
    index: list[int]
    scale: Tensor
    keys: Tensor
    grads: Tensor
    pseudo: tuple[Tensor, Tensor]
    sound: Tensor
    system: Tensor
    directions: Tensor | None = None


class Updater(nn.Module):
    """Signals and mask in, shifts out; remembers what earlier edits and preserved prompts need.

    groups: module names by (I, O), as ``Backbone.shape_groups`` gives them. The columns of a mask
    follow ``names``, the model's own order.
    """

    def __init__(
        self,
        names: list[str],
        groups: Mapping[tuple[int, int], list[str]],
        config: UpdaterConfig,
    ):
        super().__init__()
        self.names, self.config = list(names), config
        self.groups = nn.ModuleList(ShapeGroup(g, shape, config) for shape, g in groups.items())
        self._columns = [
            torch.tensor([self.names.index(n) for n in group.names]) for group in self.groups
        ]

    @property
    def learned(self) -> bool:
        return self.config.learned

    def observe(self, signals: Signals) -> None:
        """Update the running statistics with one edit's signals."""
        for group in self.groups:
            keys, grads = stack_group(signals, group.names)
            group.key_norm.observe(keys)
            group.grad_norm.observe(grads)

    def forward(self, signals: Signals, mask: Tensor, every: bool = False, used: int = 0) -> Shifts:
        """The shifts under ``mask`` [E, L]; its gradient flows through the shifts' scale.

        Modules that no edit touches are left out, unless ``every`` (a policy in training needs to
        see what the modules it left out would have done). used: passes that the edits have had,
        undone ones included. Raises nothing on non-finite signals: the shift of such a module is
        left out, so NaN never reaches a weight.
        """
        if self.config.kind == "none":
            return {}
        shifts: dict[str, Shift] = {}
        parts = [
            part
            for group, columns in zip(self.groups, self._columns, strict=True)
            if (part := self._part(group, columns, signals, mask, every, used)) is not None
        ]
        joint = self._together(parts, signals) if self.config.step == "natural" else None
        for part in parts:
            given = part.keys, part.grads, part.system, signals.edit, part.pseudo
            a, r = part.group.solve(*given, joint, part.directions)
            finite = (part.sound & _finite(a.detach(), r.detach())).tolist()
            for m in part.index:
                if finite[m]:
                    shifts[part.group.names[m]] = Shift(a[m], r[m].T, part.scale[m].to(a.dtype))
        return {n: shifts[n] for n in self.names if n in shifts}

    def _part(
        self,
        group: ShapeGroup,
        columns: Tensor,
        signals: Signals,
        mask: Tensor,
        every: bool,
        used: int,
    ) -> _Part | None:
        """Return what ``group`` is solved from; None where it gets no shift."""
        scale = mask[:, columns.to(mask.device)].T[:, signals.edit]  # [M, T]
        live = scale.detach() != 0
        touched = live.any(-1).tolist()  # one wait for the device, not M
        index = [m for m, on in enumerate(touched) if on or every]
        if not index:
            return None
        keys, grads = stack_group(signals, group.names)
        sound = _finite(keys, grads)
        if not bool(sound.all()):
            # Zeros in place of NaN: the modules share parameters, whose gradients must stay sound.
            keys, grads = (torch.where(sound[:, None, None], x, 0.0) for x in (keys, grads))
        config = self.config
        of_keys, of_grads = (
            share_at(share, used, config.average_passes)
            for share in (config.average_keys, config.average_gradients)
        )
        keys = averaged(keys, signals.edit, signals.subject, of_keys)
        grads = averaged(grads, signals.edit, signals.subject, of_grads)
        # A module that no edit touches is solved as if all did; the others as in editing.
        system = live | ~live.any(-1, keepdim=True)
        return _Part(group, index, scale, keys, grads, group.pseudo(keys, grads), sound, system)

    def _together(self, parts: list[_Part], signals: Signals) -> Tensor | None:
        """[E]: what the parts' natural gradients are divided by, once they have taken the
        pseudo-gradients' place: their length over the modules that an edit touches (over all where
        it touches none), or more where the trust region, which is as many times as large as the
        answer has tokens, ends earlier."""
        if not parts:
            return None
        edit = signals.edit
        lengths, costs, live = [], [], []
        for part in parts:
            keys, grads = part.pseudo
            rows, length, cost, part.directions = part.group.joint(keys, grads, edit)
            part.pseudo = keys, rows
            lengths.append(length.detach())
            costs.append(cost.detach() * part.group.log_eta.detach().exp().square()[:, None])
            on = (part.scale.detach() != 0).to(length.dtype)
            live.append(length.new_zeros(length.shape).index_add(1, edit, on) > 0)
        touched = torch.cat(live)
        length = joint_length(torch.cat(lengths), touched)
        if self.config.trust_region is None:
            return length
        most = self.config.trust_region
        if signals.answer is not None:
            most = most * signals.answer.clamp(min=1)
        return torch.maximum(length, within(torch.cat(costs), touched, most))

    def absorb(self, signals: Signals, mask: Tensor) -> None:
        """Protect the keys of an edit that was committed under ``mask`` [E, L]."""
        mask = self.protects(mask)
        for group, columns in zip(self.groups, self._columns, strict=True):
            if group.protection is not None:
                keys, _ = stack_group(signals, group.names)
                live = mask[:, columns.to(mask.device)].T[:, signals.edit] != 0
                group.protection.absorb(keys, live)

    def protects(self, mask: Tensor) -> Tensor:
        """[E, L]: where the keys of edits committed under ``mask`` [E, L] are protected, see
        ``UpdaterConfig.absorb_in``; nowhere for an edit that touched nothing."""
        if self.config.absorb_in == "touched":
            return mask
        return (mask != 0).any(-1, keepdim=True).to(mask.dtype).expand_as(mask)

    @torch.no_grad()
    def collision(self, signals: Signals) -> Tensor:
        """[E, L]: how much an edit's keys point where keys are protected, in [0, 1], mean over its
        tokens; see ``Protection.collision``. 0 for modules without protection."""
        edits = len(signals.loss)
        found = signals.loss.new_zeros(edits, len(self.names))
        count = torch.bincount(signals.edit, minlength=edits).clamp(min=1)
        for group, columns in zip(self.groups, self._columns, strict=True):
            if group.protection is not None:
                keys, _ = stack_group(signals, group.names)
                per_token = group.protection.collision(keys).to(found.dtype)  # [M, T]
                summed = per_token.new_zeros(len(per_token), edits)
                summed = summed.index_add(1, signals.edit, per_token)
                found[:, columns.to(found.device)] = (summed / count).T
        return found

    def energy(self, shifts: Shifts, through_mask: bool = True) -> Tensor:
        """[L]: each masked shift's energy on preserved prompts, ``tr(dW C_0 dW^T)`` over the power
        of the module's outputs there; 0 where there is no shift or no protection.

        through_mask: whether its gradient reaches the mask.
        """
        energies = dict.fromkeys(self.names)
        for group in self.groups:
            index = [m for m, n in enumerate(group.names) if n in shifts]
            if group.protection is None or not index:
                continue
            a = torch.stack([shifts[group.names[m]].A for m in index])
            b = torch.stack([_scaled(shifts[group.names[m]], through_mask) for m in index])
            for m, value in zip(index, group.protection.energy(a, b.mT, index), strict=True):
                energies[group.names[m]] = value
        zero = next(self.parameters()).new_zeros(())
        return torch.stack([zero if e is None else e for e in energies.values()])

    def reset(self) -> None:
        """Begin a new stream: earlier edits are no longer protected."""
        for group in self.groups:
            if group.protection is not None:
                group.protection.reset()

    @property
    def wants_power(self) -> bool:
        """Tell whether steps are relative to outputs that are still to be measured."""
        return any(group.power is not None for group in self.groups)

    def fit_power(self, power: Mapping[str, Tensor]) -> None:
        """power: by module, the mean squared norm of its outputs []."""
        for group in self.groups:
            group.power.copy_(torch.stack([power[n] for n in group.names]))

    def _protected(self, moments: KeyMoments) -> Tensor:
        """[I, I]: what of a module's keys is kept away from."""
        found = moments.moment
        if self.config.preserve_subjects and moments.subjects is not None:
            found = found + self.config.preserve_subjects * moments.subjects
        if self.config.own_weight and moments.own is not None:
            found = found + self.config.own_weight * moments.own
        return found

    def fit_curvature(self, curvature: Mapping[str, Tensor]) -> None:
        """curvature: by module, the Fisher information of its outputs [O, O]."""
        for group in self.groups:
            group.natural.fit(torch.stack([curvature[n] for n in group.names]))

    def _power(self, moments: KeyMoments) -> Tensor:
        """[]: what counts as the square of a typical output."""
        robust = self.config.step in ("relative", "natural") and moments.typical is not None
        return moments.typical if robust else moments.power

    def fit_protection(
        self,
        moments: Mapping[str, tuple],
        scatter: Mapping[str, Tensor] | None = None,
    ) -> None:
        """moments: by module, ``KeyMoments`` (or the first of its fields). scatter: by module, that
        of keys between phrasings of one fact [I, I]."""
        for group in self.groups:
            if group.protection is None:
                continue
            second = torch.stack([self._protected(KeyMoments(*moments[n])) for n in group.names])
            power = torch.stack([self._power(KeyMoments(*moments[n])) for n in group.names])
            between = torch.stack([scatter[n] for n in group.names]) if scatter else None
            sinks = _padded([KeyMoments(*moments[n]).sinks for n in group.names])
            group.protection.fit(second, power, between, sinks)


def _padded(bases: list[Tensor | None]) -> Tensor | None:
    """[M, s, I]: the modules' sinks, zeros where one has fewer; None if none has any."""
    found = [basis for basis in bases if basis is not None]
    if not found:
        return None
    most = max(map(len, found))
    out = found[0].new_zeros(len(bases), most, found[0].shape[1])
    for m, basis in enumerate(bases):
        if basis is not None:
            out[m, : len(basis)] = basis
    return out


def _scaled(shift: Shift, through_mask: bool) -> Tensor:
    """B [O, r] with the rank rows' scale in it."""
    if shift.scale is None:
        return shift.B
    return shift.B * (shift.scale if through_mask else shift.scale.detach())


def _finite(a: Tensor, b: Tensor) -> Tensor:
    """bool [M]: all of ``a`` and ``b`` [M, T, .] is finite, and small enough for a finite sum.

    NaN and infinity reach a sum, which takes a fortieth of the time of ``isfinite`` on the CPU.
    """
    return a.sum((1, 2)).isfinite() & b.sum((1, 2)).isfinite()
