"""What the kernels reach on this GPU: the commit beside a copy, the shift beside PyTorch.

    python -m hiedit_kernels.measure              # 12 modules of 4096 x 14336, bf16; under a minute
    TRITON_INTERPRET=1 python -m hiedit_kernels.measure --quick       # that it runs, without a GPU

commit   microseconds, and bytes moved per second over those of ``Tensor.copy_`` in the same run. An
         element moves acc twice, W_0 and W once: 12 bytes in bf16. ``half`` is the same launch with
         every second module masked: its microseconds over those of the whole are to be 1/2.
shift    forward and backward of ``out + ((x A^T) * scale) B^T``, each sequence with rank rows of
         its own, over the same in PyTorch. Above 1, the kernel pays.

Every backend is compared with its reference first, the commit bit for bit: where one differs,
nothing is reported of it. Times are medians, taken in alternation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from hiedit_kernels import reference
from torch import Tensor

from hiedit.ledger import dispatch
from hiedit.ledger.accumulate import commit_, commit_group_
from hiedit.ledger.update import Update


def updates(count: int, out: int, inner: int, rank: int, device) -> list[Update]:
    """Modules in bf16, each with a shift."""
    g = torch.Generator(device).manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=g, device=device)

    made = []
    for _ in range(count):
        base = draw(out, inner).bfloat16()
        A, B = draw(rank, inner), draw(out, rank) * 1e-6
        made.append(Update(torch.zeros_like(base, dtype=torch.float32), A, B, None, base + 0, base))
    return made


def check_commit(backend: str, device) -> None:
    """Raises SystemExit unless the bits of a small group are those of the definition."""
    group = updates(2, 61, 203, 5, device)
    mask = torch.tensor([1, 0], device=device)
    parts = ("acc", "A", "B", "scale", "weight", "base")
    wanted = [
        Update(*(None if (t := getattr(u, name)) is None else t.cpu().clone() for name in parts))
        for u in group
    ]
    u = wanted[0]
    commit_(u.weight, u.base, u.acc, u.A, u.B, backend="reference")
    commit_group_(group, mask, backend=backend)
    for found, right in zip(group, wanted, strict=True):
        same = torch.equal(found.acc.cpu(), right.acc)
        if not (same and torch.equal(found.weight.cpu(), right.weight)):
            raise SystemExit(f"{backend}: not the bits of the reference; no speed is reported")


def medians(works: dict[str, Callable[[], object]], repeats: int, device) -> dict[str, float]:
    """Seconds of each, in alternation; the first round (compiling, tuning) does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def commits(args, device) -> None:
    usable = [
        b for b in ("triton", "cuda") if not dispatch.problem(b, torch.empty(0, device=device))
    ]
    for backend in usable:
        check_commit(backend, device)
    half = torch.arange(args.modules, device=device) % 2
    for rank in args.ranks:
        group = updates(args.modules, args.out, args.inner, rank, device)
        source, target = torch.empty_like(group[0].acc), group[0].acc.clone()
        works = {"copy": lambda s=source, t=target: t.copy_(s)}
        for name in usable:
            works[name] = lambda g=group, b=name: commit_group_(g, backend=b)
            works[f"{name} half"] = lambda g=group, b=name: commit_group_(g, half, backend=b)
        found = medians(works, args.repeats, device)
        speed = 2 * source.nbytes / found["copy"]
        print(f"commit, rank {rank}: copy {speed / 1e9:.0f} GB/s")
        for name in usable:
            moved = args.modules * args.out * args.inner * 12 / found[name]
            print(f"  {name:8} {found[name] * 1e6:9.0f} us  {moved / speed:6.1%} of the copy"
                  f"  half {found[f'{name} half'] / found[name]:.2f}")  # fmt: skip


def shifts(args, device) -> None:
    from hiedit_kernels import shift

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    N, S, r = args.sequences, args.tokens, args.rank_each

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype).requires_grad_()

    out, x = draw(N, S, args.out), draw(N, S, args.inner)
    A, B = draw(N * r, args.inner), draw(args.out, N * r)
    rows = torch.arange(N, device=device).repeat_interleave(S)
    scale = torch.eye(N, device=device, dtype=dtype).repeat_interleave(r, dim=1)

    def run(function):
        y = function(out, x, A, B, scale, rows)
        return y, *torch.autograd.grad(y.sum(), [x, A, B])

    for one, other in zip(run(shift.shifted), run(reference.shifted), strict=True):
        error = ((one - other).float().norm() / other.float().norm()).item()
        if not error < (2e-2 if dtype == torch.bfloat16 else 1e-5):
            raise SystemExit(f"shift: {error:.1e} off its reference; no speed is reported")
    works = {"triton": lambda: run(shift.shifted), "pytorch": lambda: run(reference.shifted)}
    found = medians(works, args.repeats, device)
    ratio = found["pytorch"] / found["triton"]
    print(f"shift, {N} sequences of {S} tokens, rank {r} each:")
    print(f"  triton   {found['triton'] * 1e6:9.0f} us, {ratio:.2f} times as fast as PyTorch")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default, text in [
        ("modules", 12, "editable modules"), ("out", 4096, "rows of a weight"),
        ("inner", 14336, "columns of a weight"), ("repeats", 20, "timed rounds"),
        ("sequences", 20, "sequences of the shift"), ("tokens", 64, "tokens of each"),
        ("rank-each", 8, "rank rows of each"),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--ranks", default="8,32", help="ranks of a commit (8,32)")
    parser.add_argument("--quick", action="store_true", help="seconds: small, to see that it runs")
    args = parser.parse_args(arguments)
    args.ranks = [int(rank) for rank in args.ranks.split(",")]
    if args.quick:
        args.modules, args.out, args.inner, args.repeats, args.ranks = 2, 32, 64, 1, [2]
        args.sequences, args.tokens, args.rank_each = 2, 3, 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := dispatch.problem("triton", torch.empty(0, device=device)):
        parser.error(f"triton {reason}")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "interpreted, on the CPU")
    commits(args, device)
    shifts(args, device)


if __name__ == "__main__":
    main()
