"""What an edit costs when the ledger has grown: time, disk, reopening, compaction.

    python benchmarks/ledger_growth.py                      # 10,000 edits, 12 modules of 64x32
    python benchmarks/ledger_growth.py --edits 2000 --out 344 --in 128

Every edit changes 6 of 12 modules with rank 2 to 4 and is committed by itself, on disk before the
next one. The machine may slow down meanwhile, so the price of an edit in the large ledger is taken
in alternation with edits in a second one that has about 100; the two ledgers are on the same disk.
At the end the large ledger is verified: no figure is reported of one that is not whole.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hiedit.backbone.modules import EditableModule  # noqa: E402
from hiedit.ledger import Entry, Ledger  # noqa: E402
from hiedit.ledger.state import DeltaState  # noqa: E402
from hiedit.types import EditRequest, Shift  # noqa: E402

MODULES, CHOSEN = 12, 6
EARLY = 100  # edits in the small ledger when the comparison begins


@dataclass(frozen=True)
class Growth:
    """Seconds and bytes; early and late are medians of one commit each, in alternation."""

    edits: int
    early: float
    late: float
    windows: tuple[tuple[int, float], ...]
    reopen: float
    replay: float
    bytes: dict[str, int]
    compact: float
    compacted: dict[str, int]
    folded: dict[str, int]
    reopen_compacted: float

    @property
    def ratio(self) -> float:
        return self.late / self.early


def new_state(out: int, inputs: int, dtype=torch.bfloat16) -> DeltaState:
    g = torch.Generator().manual_seed(0)
    found = {}
    for index in range(MODULES):
        name = f"model.layers.{index}.mlp.gate_proj"
        layer = nn.Linear(inputs, out, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(out, inputs, generator=g) * 0.02)
        found[name] = EditableModule(name, layer, inputs, out, False)
    return DeltaState(found)


def entry(state: DeltaState, number: int) -> Entry:
    g = torch.Generator().manual_seed(number)
    names = list(state.modules)
    shifts = {}
    for index in torch.randperm(MODULES, generator=g)[:CHOSEN].sort().values.tolist():
        module = state.modules[names[index]]
        rank = int(torch.randint(2, 5, (), generator=g))
        A = torch.randn(rank, module.in_features, generator=g)
        B = torch.randn(module.out_features, rank, generator=g) * 1e-4
        shifts[names[index]] = Shift(A, B)
    request = EditRequest(
        f"The capital of country number {number} is", f"City {number}",
        paraphrases=(f"Country {number} has as its capital", f"Which is the capital of {number}?"),
    )  # fmt: skip
    report = {"success": 1.0, "kl": 0.0123, "passes": 2}
    return Entry(request, shifts, method="hiedit", report=report)


def commit(ledger: Ledger, number: int) -> float:
    edit = entry(ledger.state, number)
    begin = time.perf_counter()
    ledger.commit([edit])
    return time.perf_counter() - begin


def sizes(directory: Path) -> dict[str, int]:
    """Bytes by kind of file."""
    found: dict[str, int] = {}
    for path in directory.rglob("*"):
        if path.is_file():
            kind = path.parent.name if path.parent != directory else "database"
            found[kind] = found.get(kind, 0) + path.stat().st_size
    return found


def reopen(directory: Path, shape: tuple[int, int]) -> tuple[float, DeltaState]:
    state = new_state(*shape)
    begin = time.perf_counter()
    Ledger(directory, state).close()
    return time.perf_counter() - begin, state


def measure(folder: Path, edits: int, shape: tuple[int, int], pairs: int = 500) -> Growth:
    """Grows a ledger in ``folder`` to ``edits`` edits and measures it there."""
    directory, window = folder / "large", max(edits // 10, 1)
    with Ledger(directory, new_state(*shape)) as ledger:
        taken = [commit(ledger, number) for number in range(edits - pairs // 2)]
        with Ledger(folder / "small", new_state(*shape)) as small:
            for number in range(EARLY):
                commit(small, number)
            both = [(commit(small, n), commit(ledger, n)) for n in range(edits, edits + pairs)]
        bits = {name: m.weight.detach().clone() for name, m in ledger.state.modules.items()}
        assert ledger.verify().ok
    windows = [(at + window, statistics.median(taken[at : at + window]))
               for at in range(0, len(taken) - window // 2, window)]  # fmt: skip
    size = sizes(directory)
    seconds, state = reopen(directory, shape)

    def unchanged(state):
        return all(torch.equal(state.modules[name].weight, bits[name]) for name in bits)

    assert unchanged(state)
    whole = new_state(*shape)
    with Ledger.read(directory) as reader:
        begin = time.perf_counter()
        whole.rebuild(list(whole.modules), reader.active())
        replay = time.perf_counter() - begin
    assert unchanged(whole)
    with Ledger(directory, new_state(*shape)) as ledger:
        begin = time.perf_counter()
        ledger.compact()
        compact = time.perf_counter() - begin
    packed = sizes(directory)
    with Ledger(directory, new_state(*shape)) as ledger:
        ledger.compact(keep=edits // 10)
        assert ledger.verify().ok
    again, state = reopen(directory, shape)
    assert unchanged(state)
    early, late = (statistics.median(column) for column in zip(*both, strict=True))
    return Growth(edits, early, late, tuple(windows), seconds, replay, size, compact, packed,
                  sizes(directory), again)  # fmt: skip


def table(growth: Growth, shape: tuple[int, int]) -> str:
    def per_edit(size):
        total = sum(size.values())
        parts = ", ".join(f"{kind} {count / 2**20:.1f} MiB" for kind, count in size.items())
        return f"{total / growth.edits / 1024:.1f} KiB an edit ({parts})"

    lines = [
        f"{growth.edits} edits, {CHOSEN} of {MODULES} modules of {shape[0]}x{shape[1]}, rank 2-4",
        "median milliseconds of a commit, by edit: "
        + "  ".join(f"{upto}: {1e3 * value:.2f}" for upto, value in growth.windows),
        f"commit around edit {EARLY}: {1e3 * growth.early:.3f} ms, around edit {growth.edits}: "
        f"{1e3 * growth.late:.3f} ms, in alternation: ratio {growth.ratio:.3f}",
        f"reopening: {growth.reopen:.2f} s with snapshots, {growth.replay:.2f} s for a replay of "
        "every edit",
        f"disk: {per_edit(growth.bytes)}",
        f"compact: {growth.compact:.2f} s, then {per_edit(growth.compacted)}",
        f"compact(keep={growth.edits // 10}): {per_edit(growth.folded)}, reopening "
        f"{growth.reopen_compacted:.2f} s",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--out", type=int, default=64, help="out features of a module")
    parser.add_argument("--in", type=int, default=32, dest="inputs", help="in features")
    parser.add_argument("--directory", help="where to put the ledgers; default: a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # such modules are too small for more
    folder = Path(tempfile.mkdtemp(prefix="ledger-growth-", dir=arguments.directory))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shape = (arguments.out, arguments.inputs)
            print(table(measure(folder, arguments.edits, shape), shape))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
