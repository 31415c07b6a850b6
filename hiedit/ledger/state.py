"""The committed edits of one model in memory: ``W = round(W_0 + acc)``.

The accumulators are fp32 and added to in canonical order (edit, then rank row), so the weights
are a pure function of the base weights and the committed edits (docs/ledger.md).

What holds whatever is committed: an edit changes all of its modules or none, and no NaN or Inf
reaches a weight. A non-finite factor is easy to see; a finite pair can still overflow, in the
product or in the weight's dtype (65504 in fp16). Looking at every result would cost a pass over
memory that is as large as the commit itself, so a bound on ``|W_0| + |acc|`` is carried along,
which costs a maximum over the factors, and only where it does not settle the matter is the result
tried out beside the weights first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hiedit.backbone.modules import EditableModule
from hiedit.ledger.accumulate import DTYPES, Update, accumulate_, commit_group_, materialize_
from hiedit.ledger.errors import NotFiniteError
from hiedit.types import Shift, Shifts

# Rank rows of consecutive shifts that `rebuild` adds in one pass over an accumulator: enough that
# the pass is limited by arithmetic and not by memory. No effect on the result.
BLOCK_ROWS = 256


class DeltaState:
    """Accumulators over the editable modules of one model.

    base: by name, the weights before any edit, same layout and dtype as the model's.
    acc: by name, fp32, same layout, the sum of all committed shifts; made at a module's first
    edit, so modules that no edit touches cost nothing.
    edits: how many times ``commit`` was called since the base weights.
    """

    def __init__(self, modules: Mapping[str, EditableModule]):
        self.modules = modules
        self.base: dict[str, Tensor] = {}
        self.acc: dict[str, Tensor] = {}
        self.edits = 0
        self._peak: dict[str, float] = {}  # by name, at least max |W_0| + max |acc|

    @torch.no_grad()
    def commit(self, shifts: Shifts) -> None:
        """Adds ``shifts`` to the weights: to all of their modules, or, if it raises, to none.

        A module that the mask leaves out (every scale 0) costs nothing.

        Raises:
            ValueError: for a module that is not editable, a shape that does not fit it, a factor
                that is not finite or a sum that the weight's dtype cannot hold; nothing was
                changed.
        """
        shifts = self._here(shifts)
        sizes = self._sizes(shifts)
        shifts = {name: shifts[name] for name in sizes}
        made = self._make(name for name in shifts if name not in self.acc)
        peaks = {}
        for name, shift in shifts.items():
            base, acc, peak = made.get(name) or self._held(name)
            peaks[name] = peak + sizes[name]
            if not peaks[name] <= _limit(base):  # true for NaN as well
                peaks[name] = self._try(name, shift, base, acc, sizes[name])
        self._hold(made)
        self._peak.update(peaks)
        for names, conv1d in self._alike(shifts):
            updates = [self._update(name, shifts[name]) for name in names]
            start, end = self.modules[names[0]].span
            commit_group_(updates, start=start, end=end, conv1d=conv1d)
        for name in shifts:
            self.modules[name].written()
        self.edits += 1

    @torch.no_grad()
    def rebuild(
        self,
        names: Iterable[str],
        shifts: Iterable[Shifts],
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Makes the modules ``names`` what committing ``shifts`` alone would have made them.

        For reverts, restores and reopening: same bits as base weights and one ``commit`` after
        the other. Other modules, also those in ``shifts``, stay as they are, and so does
        ``edits``. A module that nothing was added to gets its base weight back, bit for bit, and
        its accumulator is given up. The new accumulators are made beside the old ones (4 bytes
        per element of ``names`` meanwhile): an error, also one that ``shifts`` raises as it is
        read, leaves everything as it was.

        Args:
            names: modules to compute anew.
            shifts: in canonical order; consumed once, a few hundred rank rows held at a time.
            start: by name, the accumulator to begin with (fp32, the weight's layout; copied)
                instead of zeros: a snapshot of the edits before ``shifts``.

        Raises:
            ValueError: as ``commit``, or for a ``start`` that does not fit.
        """
        names = list(dict.fromkeys(names))
        found: dict[str, tuple[Tensor, Tensor, float]] = {}
        for name in names:
            self._check_module(name)
            if start is not None and name in start:
                found[name] = self._begin(name, start[name])
        waiting: dict[str, list[Shift]] = {name: [] for name in names}
        for edit in shifts:
            named = self._here({name: shift for name, shift in edit.items() if name in waiting})
            for name, size in self._sizes(named).items():
                base, acc, peak = found.get(name) or self._begin(name)
                found[name] = base, acc, peak + size
                waiting[name].append(named[name])
                if sum(shift.rank for shift in waiting[name]) >= BLOCK_ROWS:
                    self._add(acc, name, waiting[name])
                    waiting[name] = []
        for name, rest in waiting.items():
            if rest:
                self._add(found[name][1], name, rest)
        for name, (base, acc, peak) in found.items():
            if not peak <= _limit(base):
                found[name] = base, acc, self._checked(name, base, acc)
        self._replace(names, found)

    @torch.no_grad()
    def reset(self) -> None:
        """The base weights again, bit for bit."""
        for name, base in self.base.items():
            self.modules[name].stored.copy_(base)
            self.modules[name].written()
            self.acc[name].zero_()
            self._peak[name] = self._top(name, base)
        self.edits = 0

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Have the model be the unedited one in the block; tensors are swapped, nothing is
        copied."""
        edited = {name: self.modules[name].held() for name in self.base}
        try:
            for name, base in self.base.items():
                self.modules[name].store(base)
            yield
        finally:
            for name, weight in edited.items():
                self.modules[name].store(weight)

    def growth(self) -> dict[str, float]:
        """Return, by module, the Frobenius norm of the accumulated shift over that of the base
        weight."""

        def norm(name: str, t: Tensor) -> float:
            return math.sqrt(self.modules[name].total(float(t.float().norm()) ** 2))

        return {
            name: norm(name, self.acc[name]) / max(norm(name, base), 1e-12)
            for name, base in self.base.items()
        }

    def accumulated(self) -> dict[str, Tensor]:
        """Return, by module that anything was added to, the sum of its shifts, of the weight's
        layout."""
        held = {
            name: acc
            for name, acc in self.acc.items()
            if self.modules[name].largest(float(bool(acc.any())))
        }
        return {name: self.modules[name].whole(acc) for name, acc in held.items()}

    def _held(self, name: str) -> tuple[Tensor, Tensor, float]:
        return self.base[name], self.acc[name], self._peak[name]

    def _make(self, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor, float]]:
        """(base, zero accumulator, peak) of modules at their first edit, not yet held."""
        return {name: self._begin(name) for name in names}

    def _hold(self, made: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
        for name, (base, acc, peak) in made.items():
            self.base[name], self.acc[name], self._peak[name] = base, acc, peak

    def _begin(self, name: str, start: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """(base, a new accumulator, peak) of a module; the base is copied if it was not yet."""
        module = self.modules[name]
        weight = module.stored
        base = self.base[name] if name in self.base else weight.clone()
        if start is None:
            return base, torch.zeros_like(weight, dtype=torch.float32), self._top(name, base)
        i, o = module.shape
        expected = (i, o) if module.conv1d else (o, i)
        if start.shape != expected or start.dtype != torch.float32:
            raise ValueError(
                f"the starting accumulator of {name} is {start.dtype} {tuple(start.shape)}: it "
                f"must be torch.float32 {expected}"
            )
        acc = torch.empty_like(weight, dtype=torch.float32).copy_(module.part(start))
        return base, acc, self._top(name, base) + self._top(name, acc)

    def _top(self, name: str, t: Tensor) -> float:
        """max |t| of a part of the module, over all ranks that hold one."""
        return self.modules[name].largest(_largest(t))

    def _check_module(self, name: str) -> None:
        if name not in self.modules:
            known = ", ".join(self.modules)
            raise ValueError(f"{name} is not an editable module; these are: {known}")
        weight = self.modules[name].stored
        if weight.dtype not in DTYPES or not weight.is_contiguous():
            raise ValueError(
                f"the weight of {name} is {weight.dtype} with strides {weight.stride()}: it must "
                f"be contiguous and one of {DTYPES}"
            )

    def _check_shift(self, name: str, shift: Shift) -> None:
        self._check_module(name)
        module, A, B = self.modules[name], shift.A, shift.B
        rank = shift.rank
        if A.shape != (rank, module.in_features) or B.shape != (module.out_features, rank):
            raise ValueError(
                f"the shift of {name} has A {tuple(A.shape)} and B {tuple(B.shape)}: A must be "
                f"[r, {module.in_features}] and B [{module.out_features}, r]"
            )
        if shift.scale is not None and shift.scale.shape != (rank,):
            raise ValueError(
                f"the shift of {name} has scale {tuple(shift.scale.shape)}: it must be [{rank}]"
            )
        given = [t.dtype for t in (A, B, shift.scale) if t is not None]
        if any(dtype not in DTYPES for dtype in given):
            raise ValueError(f"the shift of {name} is of {given}: factors must be of {DTYPES}")

    def _here(self, shifts: Shifts) -> Shifts:
        """The same on the devices of their modules: what was stored comes from the CPU."""

        def moved(name: str, shift: Shift) -> Shift:
            self._check_module(name)
            device = self.modules[name].stored.device
            parts = (shift.A, shift.B, shift.scale)
            return Shift(*(None if t is None else t.to(device) for t in parts))

        return {name: moved(name, shift) for name, shift in shifts.items()}

    def _sizes(self, shifts: Shifts) -> dict[str, float]:
        """Return, by name, at least the largest magnitude of any element of a shift; those without
        a rank row that takes part are left out. Raises where one is unfit. The device is waited for
        once.
        """
        for name, shift in shifts.items():
            self._check_shift(name, shift)
        found = iter(_largest_of([t for s in shifts.values() for t in (s.A, s.B, s.scale)]))
        sizes = {}
        for name, shift in shifts.items():
            a, b, s = next(found), next(found), next(found)
            if not math.isfinite(a + b + s):
                raise NotFiniteError(f"the shift of {name} is not finite; nothing was changed")
            left = b * s  # rounded to fp32 in the accumulation, where it could become infinite
            size = math.inf if left > _limit(torch.float32) else shift.rank * left * a
            if shift.rank > 0 and s != 0:
                sizes[name] = size
        return sizes

    def _alike(self, names: Iterable[str]) -> list[tuple[list[str], bool]]:
        """``names`` in groups that one launch can commit, and whether they are Conv1D."""
        groups: dict[tuple, list[str]] = {}
        for name in names:
            module = self.modules[name]
            key = module.conv1d, module.shape, module.stored.dtype, module.stored.device
            groups.setdefault(key, []).append(name)
        return [(group, key[0]) for key, group in groups.items()]

    def _update(self, name: str, shift: Shift) -> Update:
        weight, base = self.modules[name].stored, self.base[name]
        return Update(self.acc[name], shift.A, shift.B, shift.scale, weight, base)

    def _try(self, name: str, shift: Shift, base: Tensor, acc: Tensor, size: float) -> float:
        """The peak after ``shift`` where the bound that was carried along is too coarse."""
        peak = self._top(name, base) + self._top(name, acc) + size
        if peak <= _limit(base):
            return peak
        trial = acc.clone()
        self._add(trial, name, [shift])
        return self._checked(name, base, trial)

    def _checked(self, name: str, base: Tensor, acc: Tensor) -> float:
        """max |W_0| + max |acc| if their rounded sum is finite; made beside the weight, so slow."""
        weight = materialize_(torch.empty_like(base), base, acc)
        peaks = [self._top(name, t) for t in (base, acc, weight)]
        if not all(map(math.isfinite, peaks)):
            raise NotFiniteError(
                f"{name}: the weight plus the shifts is not finite in {base.dtype} "
                f"(largest base weight {peaks[0]:.3g}, largest sum of shifts {peaks[1]:.3g}); "
                "nothing was changed"
            )
        return peaks[0] + peaks[1]

    def _add(self, acc: Tensor, name: str, shifts: Sequence[Shift]) -> None:
        """Adds consecutive shifts at once: the order of rank rows is all that matters."""
        A = torch.cat([shift.A.float() for shift in shifts])
        B = torch.cat([shift.B.float() for shift in shifts], 1)
        ones = [A.new_ones(s.rank) if s.scale is None else s.scale.float() for s in shifts]
        module = self.modules[name]
        start, end = module.span
        accumulate_(acc, A, B, torch.cat(ones), start=start, end=end, conv1d=module.conv1d)

    def _replace(
        self, names: Iterable[str], found: Mapping[str, tuple[Tensor, Tensor, float]]
    ) -> None:
        """``found`` becomes the state of ``names``; those without are the base weights again."""
        for name in names:
            if name not in found and name not in self.base:
                continue
            weight = self.modules[name].stored
            if name in found:
                self._hold({name: found[name]})
                materialize_(weight, self.base[name], self.acc[name])
            else:
                weight.copy_(self.base[name])
                del self.base[name], self.acc[name], self._peak[name]
            self.modules[name].written()


def _largest(t: Tensor) -> float:
    """max |t|; NaN or inf where t has one, 0 where it is empty. No copy of t is made."""
    return _largest_of([t])[0]


def _largest_of(tensors: Sequence[Tensor | None]) -> list[float]:
    """``_largest`` of each, 1 for None, in one transfer from the device."""
    ends = [end.float() for t in tensors if t is not None and t.numel() for end in torch.aminmax(t)]
    values = iter(torch.stack([end.to(ends[0].device) for end in ends]).tolist() if ends else [])
    found = []
    for t in tensors:
        if t is None or not t.numel():
            found.append(1.0 if t is None else 0.0)
        else:
            low, high = next(values), next(values)
            found.append(max(-low, high) if not math.isnan(low) else math.nan)
    return found


def _limit(of: Tensor | torch.dtype) -> float:
    """A bound up to here proves the sum finite: the half leaves room for every rounding."""
    dtype = of if isinstance(of, torch.dtype) else of.dtype
    return torch.finfo(dtype).max / 2
