"""Bytes of a training step from shapes alone, for a Llama-like model in one process.

Three parts stay from step to step and one goes with the step:

learner        hypernetwork and policy, their gradients and Adam's two moments (fp32);
protection     of every editable module two [I, I] matrices (fp32), where the solver protects, and a
               third where it knows the scatter of phrasings; one [O, O] where steps follow the
               natural gradient;
ledger         of every editable module a copy of W_0 and the sum of its shifts (fp32);
step           activations above the lowest editable module, factors, logits.

``benchmarks/memory.py`` compares ``step_bytes`` with measured memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama, the editable modules and the sizes of one training step.

    first: the lowest editable layer. modules: gate and up projections, ``I`` = hidden and ``O`` =
    intermediate. bytes: of one weight. rank, blocks: of the hypernetwork. gate: width of the
    policy. tokens: in the reward's sequences. answers: those of them that are predicted.
    part: the share of the sequences that is measured at a time (``at_once``).
    edit_tokens: ``T``. fused: fused operators, which keep less for the backward pass.
    """

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    first: int
    heads: int = 4
    kv_heads: int = 4
    modules: int = 12
    bytes: int = 4
    rank: int = 64
    blocks: int = 2
    gate: int = 256
    tokens: int = 420
    answers: int = 50
    part: float = 1.0
    edit_tokens: int = 21
    fused: bool = True


def model_bytes(s: Shape) -> int:
    """Count the frozen weights' bytes; embeddings untied."""
    kv = s.hidden * s.kv_heads // s.heads
    layer = 2 * s.hidden * (s.hidden + kv) + 3 * s.hidden * s.intermediate + 2 * s.hidden
    return s.bytes * (s.layers * layer + 2 * s.vocab * s.hidden + s.hidden)


def step_bytes(s: Shape) -> dict[str, int]:
    """Return what training needs beside the model, at the step's peak, by part.

    learner: four fp32 numbers (value, gradient, two moments) for each parameter of the
    hypernetwork, ``blocks (2 D r + r + 2 M D)`` with ``D = I + O``, and of the policy,
    ``D gate + M^2 gate + 2 M D``.
    ledger: a copy of W_0 and an fp32 accumulator for each editable module.
    activations, for each token and layer from the lowest editable module on, in the model's dtype:
    with fused operators two residuals, q, k, v and the pair that the gate multiplies, 3 H + 2 H_kv
    + 2 width; with PyTorch's own 3 of the width, q, k, v and the output once more, padded (a
    quarter of the reward is padding), and two residuals in fp32. In an edited layer also the input
    of gate and up.
    factors: signals, normalised and pseudo signals of ``M x T`` rows of ``D``, about
    ``4 + 3 blocks`` of them in fp32 with their gradients.
    logits: rows of the vocabulary in fp32: logits, log-probabilities, the reference's and the
    gradients of the first two; of a reward in parts, those of the part and two that stay.
    """
    d, m, t = s.hidden + s.intermediate, s.modules, s.edit_tokens
    net = s.blocks * (2 * d * s.rank + s.rank + 2 * m * d)
    policy = d * s.gate + m * m * s.gate + 2 * m * d
    kv = s.hidden * s.kv_heads // s.heads
    if s.fused:
        row = s.bytes * (3 * s.hidden + 2 * kv + 2 * s.intermediate)
    else:
        row = s.bytes * (5.5 * s.hidden + 2 * kv + 3 * s.intermediate) + 4 * 2 * s.hidden
    edited = (m // 2) * s.hidden * s.bytes
    return {
        "learner": 16 * (net + policy),
        "ledger": m * s.hidden * s.intermediate * (4 + s.bytes),
        "activations": int(s.part * s.tokens * ((s.layers - s.first) * row + edited)),
        "factors": 4 * m * t * d * (4 + 3 * s.blocks),
        "logits": int(4 * (2 + 3 * s.part) * s.answers * s.vocab),
    }


def protection_bytes(i: list[int], phrasing: bool, curved: Sequence[int] = ()) -> tuple[int, int]:
    """(resident, while it is fitted) of modules with ``i`` inputs each: moment and precision in
    fp32, the scatter of phrasings where there is one, and the curvature of ``curved`` outputs each
    where steps follow it; and beside them what they are made of, twice (by module and stacked),
    one of them scaled, and in fp64 one module's matrix, its factor and its inverse."""
    square = sum(n * n for n in i)
    measured = 1 + phrasing
    outputs = sum(n * n for n in curved)
    resident = 4 * (1 + measured) * square + 4 * outputs
    return resident, 4 * (2 * measured + 1) * square + 24 * max(i) ** 2 + 8 * outputs
