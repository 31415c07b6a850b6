"""Protection of what a module must not forget: second moments of protected keys.

``P = (C / c + phi S / c + eps I)^-1`` with ``C`` the second moment of the keys on prompts to
preserve (and, as edits are committed, of earlier edits), ``c`` its mean diagonal at the start.
``S``, where ``phi`` is not zero, is the keys' scatter between phrasings of one fact: a shift whose
keys are ``P k`` then rests on what phrasings share (Fisher's discriminant, 1936).
Shapes: ``M`` modules of one shape, ``I`` in features, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Protection(nn.Module):
    """Precision of protected keys for the modules of one shape.

    moment ``C_0 / c``: [M, I, I]. precision ``P``: [M, I, I]. power: [M], mean squared norm of
    the modules' outputs on the preserved prompts. eps: ridge relative to the mean key power.
    The precision is not part of the state dict: ``reset`` after loading one.
    absorb: weight of one edit's keys against one average preserved key.
    phrasing: ``phi``; where it is not zero there is ``scatter`` ``phi S / c``: [M, I, I].
    sinks: [M, s, I], orthonormal directions (zeros where a module has fewer) along which no shift
    may act at all: ``P`` is the limit of protecting them with infinite weight. None without sinks.
    """

    def __init__(
        self,
        modules: int,
        features: int,
        eps: float = 0.02,
        absorb: float = 0.05,
        phrasing: float = 0.0,
    ):
        super().__init__()
        self.phrasing = phrasing
        self.eps, self.absorb_weight = eps, absorb
        eye = torch.eye(features).expand(modules, -1, -1)
        self.register_buffer("moment", eye.clone())
        self.register_buffer("unit", torch.ones(modules))
        self.register_buffer("power", torch.ones(modules))
        self.register_buffer("scatter", torch.zeros_like(self.moment) if phrasing else None)
        self.register_buffer("sinks", None)
        self.register_buffer("precision", eye / (1 + eps), persistent=False)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes ``sinks`` as they come: how many there are is known from the state alone."""
        found = state_dict.get(f"{prefix}sinks")
        self.sinks = None if found is None else found.to(self.moment.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def fit(
        self,
        second_moment: Tensor,
        output_power: Tensor,
        scatter: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """second_moment: [M, I, I] of keys. output_power: [M], mean of ``|y|^2``. scatter:
        [M, I, I], of keys between phrasings of one fact, if they are known. sinks: [M, s, I]."""
        unit = second_moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
        self.unit.copy_(unit)
        self.moment.copy_(second_moment / unit[:, None, None])
        self.power.copy_(output_power)
        if self.scatter is not None and scatter is not None:
            self.scatter.copy_(self.phrasing * scatter / unit[:, None, None])
        self.sinks = sinks
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the edits of the last stream; the preserved prompts stay protected."""
        size = self.moment.shape[-1]
        eye = torch.eye(size, dtype=torch.float64, device=self.moment.device)
        for m in range(len(self.moment)):  # one at a time: in fp64, three such matrices are large
            dense = self.moment[m].double() + self.eps * eye
            if self.scatter is not None:
                dense += self.scatter[m].double()
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(dense))
            if self.sinks is not None:
                inverse = _without(inverse, self.sinks[m].double())
            self.precision[m] = inverse

    @torch.no_grad()
    def absorb(self, keys: Tensor, live: Tensor) -> None:
        """Protect committed edits too: ``P^-1 += w K^T K / (T c)``, by Woodbury.

        keys: [M, T, I]. live: bool [M, T], the tokens whose edit touched the module.
        """
        if self.absorb_weight == 0 or keys.shape[1] == 0:
            return
        count = live.sum(-1).clamp(min=1)
        scale = (self.absorb_weight / (count * self.unit)).sqrt()
        k = keys.masked_fill(~live[:, :, None], 0.0) * scale[:, None, None]
        kp = k @ self.precision
        eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
        # With a root of the system, what is taken away is symmetric by itself, and the precision,
        # by far the largest thing here, is read and written once.
        root, info = torch.linalg.cholesky_ex(eye + kp @ k.mT)
        half = torch.linalg.solve_triangular(root, kp, upper=False)
        sound = (info == 0) & half.isfinite().all(-1).all(-1)
        half = torch.where(sound[:, None, None], half, 0.0)
        torch.baddbmm(self.precision, half.mT, half, alpha=-1, out=self.precision)

    def collision(self, keys: Tensor) -> Tensor:
        """[M, T]: ``1 - eps k^T P k / k^T k`` of keys [M, T, I]. ``P`` is at most ``1 / eps``,
        where nothing protected points along ``k``: 0 there, and near 1 where much does."""
        free = ((keys @ self.precision) * keys).sum(-1) / keys.square().sum(-1).clamp(min=1e-20)
        return (1 - self.eps * free).clamp(0, 1)

    def energy(self, a: Tensor, r: Tensor, index: Sequence[int] | slice = slice(None)) -> Tensor:
        """[M]: mean squared change of the outputs on preserved prompts over their power.

        ``tr(R^T A C_0 A^T R) / power``, for ``delta_W^T = A^T R``; a: [M, T, I], r: [M, T, O].
        index: which modules ``a`` and ``r`` are of, where they are not of all.
        """
        moment = self.moment[index] * self.unit[index, None, None]
        return ((a @ moment @ a.mT) * (r @ r.mT)).sum((-2, -1)) / self.power[index]


def _without(precision: Tensor, directions: Tensor) -> Tensor:
    """``P - P S^T (S P S^T)^-1 S P``: [I, I], zero along the rows of ``directions`` [s, I]; what
    Woodbury's formula tends to as their weight grows. Rows of zeros count for nothing."""
    some = directions[directions.square().sum(-1) > 0.5]
    if not len(some):
        return precision
    ps = precision @ some.T
    kept = precision - ps @ torch.linalg.solve(some @ ps, ps.T)
    return 0.5 * (kept + kept.T)
