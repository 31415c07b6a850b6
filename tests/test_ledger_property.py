"""The ledger's invariant: the same edits in effect give the same bits, whichever path led there."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ledgers import assert_same, entry, expected, fill, in_effect, new_state, weights

from hiedit import extension
from hiedit.ledger import Ledger, snapshots

BACKENDS = ["reference", "cpp"] if extension.load().available else ["reference"]
numbers = st.integers(0, 10**6)
STEPS = st.one_of(
    st.tuples(st.just("commit"), st.lists(numbers, min_size=1, max_size=4)),
    st.tuples(st.just("commit one by one"), st.lists(numbers, min_size=1, max_size=4)),
    st.tuples(st.just("revert"), st.randoms(use_true_random=False)),
    st.tuples(st.just("restore"), st.randoms(use_true_random=False)),
    st.tuples(st.sampled_from(["snapshot", "reopen"]), st.none()),
    st.tuples(st.just("compact"), st.none() | st.integers(0, 6)),
    st.tuples(st.just("arithmetic"), st.tuples(st.sampled_from(BACKENDS), st.integers(1, 2))),
)
MODELS = st.fixed_dictionaries(
    {"dtype": st.sampled_from([torch.float32, torch.bfloat16]), "conv1d": st.booleans()}
)


def choose(ledger, status: str, draw: random.Random) -> list[int]:
    """A random subset, in random order, of the edits with this status."""
    ids = [record.id for record in ledger.history() if record.status == status]
    return draw.sample(ids, draw.randint(min(1, len(ids)), len(ids)))


def take(step, argument, ledger: Ledger, directory, model) -> Ledger:
    """One step; returns the ledger, which is a new one after a reopening."""
    state = ledger.state
    if step == "commit":
        ledger.commit([entry(state, number) for number in argument])
    elif step == "commit one by one":
        for number in argument:
            ledger.commit([entry(state, number)])
    elif step == "revert":
        ledger.revert(choose(ledger, "active", argument))
    elif step == "restore":
        ledger.restore(choose(ledger, "reverted", argument))
    elif step == "snapshot":
        ledger.snapshot()
    elif step == "compact":
        ledger.compact(keep=argument)
    elif step == "arithmetic":
        os.environ["HIEDIT_BACKEND"] = argument[0]
        torch.set_num_threads(argument[1])
    elif step == "reopen":
        ledger.close()
        return Ledger(directory, new_state(**model))
    return ledger


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would outlast the timeout
)
@given(model=MODELS, steps=st.lists(STEPS, min_size=6, max_size=16))
def test_same_edits_same_bits(model, steps):
    threads = torch.get_num_threads()
    often = {"FEWEST_EDITS": 3, "WORK_PER_ELEMENT": 1}  # so that short streams have snapshots too
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ),
        mock.patch.multiple(snapshots, **often),
    ):
        directory = Path(folder) / "ledger"
        ledger = Ledger(directory, new_state(**model))
        try:
            for step, argument in steps:
                ledger = take(step, argument, ledger, directory, model)
                assert_same(weights(ledger.state), expected(in_effect(ledger), **model))
            assert ledger.verify().ok
            ledger = take("reopen", None, ledger, directory, model)
            assert_same(weights(ledger.state), expected(in_effect(ledger), **model))
            ledger.revert(choose_all(ledger))
            if not any(record.status == "folded" for record in ledger.history()):
                assert_same(weights(ledger.state), weights(new_state(**model)))
        finally:
            ledger.close()
            torch.set_num_threads(threads)


def choose_all(ledger) -> list[int]:
    return [record.id for record in ledger.history() if record.status == "active"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_all_reverted_is_the_base_model(tmp_path, dtype, conv1d):
    """Negative zeros of the base included, in one call and one by one."""
    model = {"dtype": dtype, "conv1d": conv1d}
    fill(tmp_path, 9, **model)
    state = new_state(**model)
    base = weights(state)
    with Ledger(tmp_path, state) as ledger:
        edited = weights(state)
        assert any(not torch.equal(edited[name], base[name]) for name in base)
        ledger.revert(range(1, 10))
        assert_same(weights(state), base)
        ledger.restore([9, 1, 5, 2, 8, 3, 7, 4, 6])
        assert_same(weights(state), edited)
        for edit in (5, 1, 9, 2, 8, 3, 7, 4, 6):
            ledger.revert([edit])
        assert_same(weights(state), base)


def test_the_expectation_depends_on_every_edit():
    """The tests above compare with it: it must notice one edit more, and their order."""
    full = expected(range(1, 9))
    for other in ([*range(1, 9), 9], range(2, 9), [8, *range(1, 8)]):
        assert any(not torch.equal(full[name], bits) for name, bits in expected(other).items())
