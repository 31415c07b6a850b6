"""Solvers and protection against dense linear algebra, values and gradients, in float64."""

import pytest
import torch
from torch.testing import assert_close

from hiedit.updaters.protection import Protection
from hiedit.updaters.solvers import (
    least_squares,
    outer_product,
    protected_least_squares,
    solve_spd,
)

M, T, I, O = 3, 5, 7, 4  # noqa: E741 (the shape letters of the project)
LIVE = {
    "all-tokens": [[1, 1, 1, 1, 1]] * M,
    "masked-tokens": [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 0]],
}
live_masks = pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Matrices this small only wait for a second thread."""
    threads(1)


def problem(seed=0, dtype=torch.float64):
    """keys, pseudo_keys [M, T, I], grads [M, T, O], eta, lam [M], precision [M, I, I]; leaves."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    root = normal(M, I, I)
    values = {
        "keys": normal(M, T, I),
        "pseudo_keys": normal(M, T, I),
        "grads": normal(M, T, O),
        "eta": normal(M).exp(),
        "lam": normal(M).exp(),
        "precision": root @ root.mT + 0.5 * torch.eye(I, dtype=torch.float64),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def dense_least_squares(p, m, rows):
    """[I, O] of one module from its ``rows`` alone: ``(K^T K + lam I)^-1 K^T D``."""
    keys = p["keys"][m, rows]
    along = (keys * p["pseudo_keys"][m, rows]).sum(-1, keepdim=True)
    wanted = -p["eta"][m] * along * p["grads"][m, rows]
    eye = torch.eye(I, dtype=keys.dtype)
    return torch.linalg.solve(keys.T @ keys + p["lam"][m] * eye, keys.T @ wanted)


def dense_protected(p, m, rows):
    """[I, O], the minimum of ``|K X - D|^2 + lam d tr(X^T P^-1 X)`` from its normal equations."""
    keys = p["keys"][m, rows]
    d = (keys @ p["precision"][m] @ keys.T).diagonal().mean()
    system = keys.T @ keys + p["lam"][m] * d * torch.linalg.inv(p["precision"][m])
    return torch.linalg.solve(system, keys.T @ p["grads"][m, rows])


def low_rank_least_squares(p, live):
    names = ("keys", "pseudo_keys", "grads", "eta", "lam")
    return least_squares(*(p[name] for name in names), live)


def low_rank_protected(p, live):
    return protected_least_squares(
        p["keys"], p["grads"], p["lam"], p["keys"] @ p["precision"], live
    )


FORMS = {
    "least-squares": (low_rank_least_squares, dense_least_squares),
    "protected": (low_rank_protected, dense_protected),
}
forms = pytest.mark.parametrize(("low_rank", "dense"), FORMS.values(), ids=FORMS)


@forms
@live_masks
def test_low_rank_form_equals_the_dense_solution(low_rank, dense, live):
    """Also with masked tokens: the result is that of a solve which never saw them."""
    live = torch.tensor(live, dtype=torch.bool)
    draw = torch.Generator().manual_seed(9)
    weights = torch.randn(M, I, O, generator=draw, dtype=torch.float64)
    found, grads = [], []
    for form in ("low-rank", "dense"):
        p = problem()
        if form == "low-rank":
            a, r = low_rank(p, live)
            assert (r[~live] == 0).all()
            shift = a.mT @ r
        else:
            shift = torch.stack([dense(p, m, live[m]) for m in range(M)])
        (shift * weights).sum().backward()
        found.append(shift.detach())
        grads.append({name: value.grad for name, value in p.items()})
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    for name, grad in grads[1].items():
        if grad is not None:
            got = grads[0][name]
            if name == "precision":  # only its symmetric part means anything
                got, grad = got + got.mT, grad + grad.mT
            assert_close(got, grad, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_protected_solution_is_the_minimum():
    p = {name: value.detach() for name, value in problem().items()}
    a, r = low_rank_protected(p, torch.ones(M, T, dtype=torch.bool))
    gram = p["keys"] @ p["precision"] @ p["keys"].mT
    weight = p["lam"] * gram.diagonal(dim1=1, dim2=2).mean(-1)
    x = (a.mT @ r).requires_grad_()
    misfit = (p["keys"] @ x - p["grads"]).square().sum((1, 2))
    size = (x * torch.linalg.solve(p["precision"], x)).sum((1, 2))
    (misfit + weight * size).sum().backward()
    assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-9)


def test_outer_product_is_a_gradient_step():
    p = problem()
    a, r = outer_product(p["keys"], p["grads"], p["eta"])
    wanted = torch.stack([-p["eta"][m] * p["keys"][m].T @ p["grads"][m] for m in range(M)])
    assert_close(a.mT @ r, wanted)


@forms
@live_masks
def test_gradcheck(low_rank, dense, live):
    live = torch.tensor(live, dtype=torch.bool)
    p = problem(seed=1)

    def shift(*values):
        given = dict(zip(p, values, strict=True))
        given["precision"] = 0.5 * (given["precision"] + given["precision"].mT)
        a, r = low_rank(given, live)
        return a.mT @ r

    assert torch.autograd.gradcheck(shift, tuple(p.values()), atol=1e-4, fast_mode=True)


@forms
def test_many_tokens_do_not_shrink_the_solution(low_rank, dense):
    """A ridge above the rounding error is the ridge, however many tokens share the system."""
    draw = torch.Generator().manual_seed(0)
    p = {
        "keys": torch.randn(1, 246, 64, generator=draw),
        "pseudo_keys": torch.randn(1, 246, 64, generator=draw),
        "grads": torch.randn(1, 246, 5, generator=draw),
        "eta": torch.ones(1),
        "lam": torch.full((1,), 0.1),
        "precision": torch.eye(64)[None],
    }
    assert set(p) == set(problem())
    live = torch.ones(1, 246, dtype=torch.bool)
    single, double = (low_rank({n: x.to(t) for n, x in p.items()}, live)
                      for t in (torch.float32, torch.float64))  # fmt: skip
    found, wanted = (a.mT @ r for a, r in (single, double))
    assert_close(found.double(), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


@forms
@pytest.mark.parametrize("tokens", [2, 48, 512])
def test_repeated_tokens_stay_finite(low_rank, dense, tokens):
    """A singular gram and no ridge to speak of, in the float32 of real edits."""
    p = problem(dtype=torch.float32)
    for name in ("keys", "pseudo_keys", "grads"):
        p[name] = (30 * p[name][:, :1].detach()).repeat(1, tokens, 1).requires_grad_()
    p["lam"] = torch.full((M,), 1e-12)
    a, r = low_rank(p, torch.ones(M, tokens, dtype=torch.bool))
    shift = a.mT @ r
    assert shift.isfinite().all()
    shift.sum().backward()
    assert all(p[name].grad.isfinite().all() for name in ("keys", "grads"))
    if low_rank is low_rank_protected:  # the repeated token gets the change that it asked for
        change = (p["keys"] @ shift)[:, 0]
        assert_close(change, p["grads"][:, 0], rtol=1e-2, atol=1e-1)


@forms
def test_module_without_live_tokens_gets_a_zero_shift(low_rank, dense):
    p = problem(dtype=torch.float32)
    a, r = low_rank(p, torch.zeros(M, T, dtype=torch.bool))
    assert a.isfinite().all() and (r == 0).all()


def test_a_system_that_rounding_made_indefinite_is_rescued():
    """Equal tokens whose gram is off by a few roundings, as some BLAS leave it; the other systems
    of the batch keep their bits, and the gradient stays sound."""
    tokens = 64
    off = torch.ones(2, tokens, tokens) + torch.eye(tokens)
    off[0] = 1.0 - 8 * torch.finfo(torch.float32).eps * torch.eye(tokens)
    assert torch.linalg.cholesky_ex(off).info.tolist() != [0, 0]
    off.requires_grad_()
    target = torch.ones(2, tokens, 3)
    solution = solve_spd(off, target)
    assert torch.equal(solution[1:], solve_spd(off[1:], target[1:]))
    assert_close(off[0] @ solution[0], target[0], rtol=1e-2, atol=1e-2)
    solution.sum().backward()
    assert off.grad.isfinite().all()


def test_indefinite_system_is_nan_for_its_module_alone():
    system = torch.eye(3).repeat(2, 1, 1).requires_grad_()
    signs = torch.tensor([1.0, -1.0])[:, None, None]
    target = torch.arange(6.0).view(1, 3, 2).repeat(2, 1, 1).requires_grad_()
    solution = solve_spd(system * signs, target)
    assert_close(solution[0], target[0])
    assert solution[1].isnan().all()
    solution[0].sum().backward()
    assert system.grad.isfinite().all() and target.grad.isfinite().all()


# Protection


def protection(eps=0.02, absorb=0.05, seed=0):
    """A fitted one, and the preserved keys [M, 40, I] and outputs [M, 40, O] behind it."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 20.0])[:, None, None]
    keys = torch.randn(M, 40, I, generator=draw) * scale
    outputs = torch.randn(M, 40, O, generator=draw, dtype=torch.float64)
    fitted = Protection(M, I, eps, absorb).double()
    fitted.fit(keys.double().mT @ keys.double() / 40, outputs.square().sum(-1).mean(-1))
    return fitted, keys.double(), outputs


def dense_precision(fitted, keys, absorbed=()):
    """``(C / c + eps I)^-1`` with the absorbed (keys, live) added to the moment one by one."""
    moment = keys.mT @ keys / keys.shape[1]
    unit = moment.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    total = moment / unit + fitted.eps * torch.eye(I, dtype=torch.float64)
    for k, live in absorbed:
        for m in range(M):
            rows = k[m, live[m]]
            if len(rows):
                total[m] += fitted.absorb_weight * rows.T @ rows / (len(rows) * unit[m])
    return torch.linalg.inv(total)


def edits(count, seed=3):
    draw = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)[:, None, None]
    for _ in range(count):
        keys = torch.randn(M, T, I, generator=draw, dtype=torch.float64) * scale
        yield keys, torch.rand(M, T, generator=draw) < 0.6


def test_fit_inverts_the_moment_in_units_of_its_mean_diagonal():
    fitted, keys, outputs = protection()
    assert_close(fitted.precision, dense_precision(fitted, keys), rtol=1e-9, atol=1e-9)
    assert_close(fitted.unit, keys.square().mean((1, 2)))
    assert_close(fitted.power, outputs.square().sum(-1).mean(-1))


def test_absorb_equals_the_inverse_of_the_summed_moment():
    fitted, keys, _ = protection()
    seen = list(edits(6))
    for k, live in seen:
        fitted.absorb(k, live)
    assert_close(fitted.precision, dense_precision(fitted, keys, seen), rtol=1e-9, atol=1e-9)
    assert_close(fitted.precision, fitted.precision.mT, rtol=0, atol=0)


def test_absorb_stays_accurate_over_a_long_stream_in_float32():
    fitted, keys, _ = protection()
    wanted = Protection(M, I).double()
    wanted.load_state_dict(fitted.state_dict())
    wanted.reset()
    fitted.float()
    for k, live in edits(300):
        fitted.absorb(k.float(), live)
        wanted.absorb(k, live)
    assert_close(fitted.precision.double(), wanted.precision, rtol=1e-3, atol=1e-4)
    assert (torch.linalg.eigvalsh(fitted.precision) > 0).all()


@pytest.mark.parametrize("case", ["weight-0", "no-tokens", "none-live"])
def test_absorb_of_nothing_changes_nothing(case):
    fitted, _, _ = protection(absorb=0.0 if case == "weight-0" else 0.05)
    before = fitted.precision.clone()
    keys = torch.ones(M, 0 if case == "no-tokens" else T, I, dtype=torch.float64)
    fitted.absorb(keys, torch.full(keys.shape[:2], case == "weight-0"))
    assert_close(fitted.precision, before, rtol=0, atol=0)


def test_absorb_leaves_out_the_module_whose_keys_are_not_finite():
    fitted, keys, _ = protection()
    (k, live) = next(edits(1))
    poisoned = k.clone()
    poisoned[1, 2] = torch.nan
    fitted.absorb(poisoned, torch.ones_like(live))
    wanted = dense_precision(fitted, keys, [(k, torch.ones_like(live))])
    untouched = dense_precision(fitted, keys)
    assert_close(fitted.precision[[0, 2]], wanted[[0, 2]], rtol=1e-9, atol=1e-9)
    assert_close(fitted.precision[1], untouched[1], rtol=1e-9, atol=1e-9)


def test_reset_forgets_the_edits_and_keeps_the_prompts():
    fitted, _, _ = protection()
    before = fitted.precision.clone()
    for k, live in edits(3):
        fitted.absorb(k, live)
    assert not torch.equal(fitted.precision, before)
    fitted.reset()
    assert torch.equal(fitted.precision, before)


def test_loading_and_reset_restore_the_protection():
    fitted, _, _ = protection()
    loaded = Protection(M, I).double()
    loaded.load_state_dict(fitted.state_dict())
    loaded.reset()
    assert torch.equal(loaded.precision, fitted.precision)


def test_the_scatter_of_phrasings_is_part_of_the_precision_and_not_of_the_energy():
    plain, keys, outputs = protection()
    second, power = keys.mT @ keys / 40, outputs.square().sum(-1).mean(-1)
    between = torch.randn(M, 7, I, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    between = between.mT @ between
    fitted = Protection(M, I, phrasing=3.0).double()
    fitted.fit(second, power, between)
    eye = torch.eye(I, dtype=torch.float64)
    unit = second.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    wanted = torch.linalg.inv((second + 3.0 * between) / unit + fitted.eps * eye)
    assert_close(fitted.precision, wanted, rtol=1e-8, atol=1e-9)
    p = problem()
    assert torch.equal(fitted.energy(p["keys"], p["grads"]), plain.energy(p["keys"], p["grads"]))
    loaded = Protection(M, I, phrasing=3.0).double()
    loaded.load_state_dict(fitted.state_dict())
    loaded.reset()
    assert torch.equal(loaded.precision, fitted.precision)


def test_a_shift_rests_on_what_phrasings_share():
    """Two keys of one fact that differ in one direction: the more the scatter weighs, the nearer
    is what the second phrasing gets to what the first one does."""
    eye = torch.eye(I, dtype=torch.float64)[None]
    shared, apart = eye[0, 0], eye[0, 1]
    between = 2.0 * apart[:, None] * apart[None]
    shares = []
    for weight in (0.0, 1.0, 100.0):
        fitted = Protection(1, I, phrasing=weight).double()
        fitted.fit(eye, torch.ones(1, dtype=torch.float64), between[None])
        k = (shared + apart)[None, None]
        directions, _ = protected_least_squares(
            k, torch.ones(1, 1, O, dtype=torch.float64), torch.tensor([0.1]), k @ fitted.precision,
            torch.ones(1, 1, dtype=torch.bool),
        )  # fmt: skip
        given = directions[0] @ torch.stack([shared + apart, shared - apart], -1)
        shares.append(float(given[0, 1] / given[0, 0]))
    assert shares[0] == pytest.approx(0.0, abs=1e-9)
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.95


def test_energy_is_the_mean_change_of_the_outputs_on_preserved_prompts():
    fitted, keys, outputs = protection()
    p = problem()
    a, r = p["keys"], p["grads"]
    changed = (keys @ (a.mT @ r)).square().sum(-1).mean(-1)
    wanted = changed / outputs.square().sum(-1).mean(-1)
    assert_close(fitted.energy(a, r), wanted)
    moment = keys.mT @ keys / keys.shape[1]
    shift = a.mT @ r
    trace = torch.stack([(shift[m].T @ moment[m] @ shift[m]).trace() for m in range(M)])
    assert_close(fitted.energy(a, r), trace / fitted.power)
