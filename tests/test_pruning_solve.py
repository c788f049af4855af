"""The mathematics of pruning, against torch's own least squares and cases with known answers."""

import numpy as np
import pytest
import torch

from edgekit.pruning.metrics import METRICS, Site
from edgekit.pruning.moments import HELD_OUT, Moments
from edgekit.pruning.solve import (
    DAMPS,
    checked_refit,
    inverse,
    leverage,
    refit,
    removal_errors,
    remove_,
    select,
)

N, ROWS, TOKENS = 12, 5, 400


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features ``[tokens, n]`` and a weight ``[rows, n]``, float64."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(N, N, generator=random, dtype=torch.float64)
    x = torch.randn(TOKENS, N, generator=random, dtype=torch.float64) @ mix
    return x, torch.randn(ROWS, N, generator=random, dtype=torch.float64)


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def least_error(x: torch.Tensor, kept: list[int], target: torch.Tensor) -> float:
    """Mean square error of the best linear map from the kept features, by numpy's lstsq."""
    _, residual, *_ = np.linalg.lstsq(x[:, kept].numpy(), target.numpy(), rcond=None)
    return float(residual.sum() / len(x))


@pytest.mark.parametrize("block", [1, 3])
def test_the_cost_of_a_removal_is_the_error_that_least_squares_leaves(block):
    x, w = data()
    errors = removal_errors(w, inverse(gram(x), 1e-12), block)
    for i, error in enumerate(errors.tolist()):
        kept = [j for j in range(N) if j // block != i]
        assert error == pytest.approx(least_error(x, kept, x @ w.T), rel=1e-6)


def test_removing_in_place_equals_refitting_with_lstsq():
    x, w = data()
    moment, refitted = inverse(gram(x), 1e-13), w.clone()
    gone, kept = torch.tensor([2, 7]), [j for j in range(N) if j not in (2, 7)]
    remove_(moment, refitted, gone)
    want = torch.linalg.lstsq(x[:, kept], x @ w.T).solution.T
    torch.testing.assert_close(refitted[:, kept], want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        moment[kept][:, kept], gram(x[:, kept]).inverse(), rtol=1e-6, atol=1e-8
    )
    assert refitted[:, gone].abs().max() == 0


def test_a_refit_without_ridge_equals_lstsq_for_any_target():
    x, w = data()
    target = torch.tanh(x @ w.T)
    got = refit(torch.zeros_like(w), gram(x), target.T @ x / TOKENS, 1e-13)
    want = torch.linalg.lstsq(x, target).solution.T
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_with_uncorrelated_features_a_refit_is_a_quotient_per_column():
    """Orthogonal features: column j is ``E[t x_j] / E[x_j^2]``, whatever the others are."""
    q, _ = torch.linalg.qr(torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(1)))
    x = q.double() * torch.arange(1, N + 1)
    _, w = data()
    target = torch.sin(x @ w.T * 20)
    cross = target.T @ x / TOKENS
    got = refit(w, gram(x), cross, 1e-13)
    want = cross / gram(x).diagonal()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert (got - w).abs().max() > 0.1  # the ridge did not just keep what was there


def test_a_strong_ridge_keeps_the_weights():
    x, w = data()
    got = refit(w, gram(x), torch.zeros_like(w), 1e9)
    torch.testing.assert_close(got, w, rtol=1e-6, atol=1e-6)


def test_a_copy_of_a_neuron_goes_first_and_costs_nothing():
    x, w = data()
    x[:, 8] = -2 * x[:, 3]
    kept = select(w, gram(x), N - 1).tolist()
    assert kept in ([j for j in range(N) if j != 8], [j for j in range(N) if j != 3])
    sub = x[:, kept]
    w2 = refit(w[:, kept], gram(sub), (x @ w.T).T @ sub / TOKENS, 1e-9)
    assert (sub @ w2.T - x @ w.T).abs().max() < 1e-4 * (x @ w.T).abs().max()


def test_of_two_copies_one_stays_when_more_is_removed():
    """One look at all scores would drop both: each is worthless while the other is there."""
    x, w = data()
    x[:, 8] = x[:, 3]
    w[:, 3] = w[:, 8] = 5  # by far the most important direction
    kept = select(w, gram(x), N // 2).tolist()
    assert len({3, 8} & set(kept)) == 1


def test_all_copies_may_go_in_one_round_but_never_both_of_a_pair():
    random = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, 40, generator=random, dtype=torch.float64).repeat_interleave(2, 1)
    w = torch.randn(ROWS, 80, generator=random, dtype=torch.float64)
    assert (select(w, gram(x), 40) // 2).tolist() == list(range(40))


def test_leverage_is_that_of_the_ridge_regression():
    x, _ = data()
    damp = 0.05 * gram(x).diagonal().mean()
    want = (gram(x) @ torch.linalg.inv(gram(x) + damp * torch.eye(N))).diagonal()
    torch.testing.assert_close(leverage(gram(x), 0.05), want, rtol=1e-6, atol=1e-9)


def test_groups_are_chosen_whole():
    x, w = data()
    w[:, 3:6] *= 1e-3
    assert select(w, gram(x), 3, block=3).tolist() == [0, 2, 3]


def test_a_refit_that_fails_on_held_out_tokens_is_not_taken():
    """Forty-eight features and fifty tokens of noise: only the tokens fitted to gain."""
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 50, 48, generator=random, dtype=torch.float64)
    w = torch.randn(ROWS, 48, generator=random, dtype=torch.float64)
    t = x @ w.T + 10 * torch.randn(2, 50, ROWS, generator=random, dtype=torch.float64)
    seen, held = ((gram(a), b.T @ a / 50) for a, b in zip(x, t, strict=True))
    assert torch.equal(checked_refit(w, seen, held), w)
    assert not torch.equal(checked_refit(w, seen, seen), w)


@pytest.mark.parametrize("n_batches", [HELD_OUT - 1, 2 * HELD_OUT])
def test_sums_over_batches_are_refitted_with_every_eighth_held_out(n_batches):
    x, w = data()
    kept, target = torch.tensor([0, 2, 3, 7, 11]), torch.tanh(x @ w.T)
    moments = Moments.like(w)
    each = torch.arange(TOKENS) * n_batches // TOKENS  # the batch of each token
    for batch in range(n_batches):
        moments.add(batch, x[each == batch].float(), target[each == batch].float())
    torch.testing.assert_close(moments.gram(), (x.T @ x).float(), rtol=1e-4, atol=1e-3)
    is_held = each % HELD_OUT == HELD_OUT - 1
    seen, held = (
        (gram(a[:, kept]), b.T @ a[:, kept] / len(a))
        for a, b in ((x[~is_held], target[~is_held]), (x[is_held], target[is_held]))
    )
    if is_held.any():
        want = checked_refit(w[:, kept], seen, held)
    else:
        want = refit(w[:, kept], *seen, DAMPS[-1])
    torch.testing.assert_close(moments.refit(w[:, kept], kept), want.float(), rtol=1e-3, atol=1e-4)


def test_a_map_that_saw_no_token_stays_as_it_is():
    _, w = data()
    assert torch.equal(Moments.like(w).refit(w, torch.arange(N)), w)


def site(**changes) -> Site:
    x, w = data()
    effect = torch.arange(N, dtype=torch.float64) - 4
    makers = torch.linspace(3, 1, N)
    return Site(**{"weight": w, "gram": lambda: gram(x), "mean": x.mean(0), "makers": makers,
                   "effect": effect} | changes)  # fmt: skip


def test_baselines_score_as_their_papers_say():
    x, w = data()
    scores = {name: METRICS[name].scores(site()) for name in METRICS}
    wanda = torch.stack([(w[:, j].abs() * x[:, j].norm() / TOKENS**0.5).mean() for j in range(N)])
    torch.testing.assert_close(scores["wanda"], wanda)
    flap = x.var(0, correction=0) * (w**2).sum(0)
    torch.testing.assert_close(scores["flap"], flap)
    assert scores["taylor"].argmin() == 4
    together = torch.cat((w, torch.linspace(3, 1, N)[None].sqrt().double()))
    torch.testing.assert_close(scores["magnitude"], together.norm(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_drops_what_is_never_active_and_has_no_weight(name):
    x, w = data()
    x[:, 5], w[:, 5] = 0, 0
    effect = torch.ones(N, dtype=torch.float64).index_fill(0, torch.tensor([5]), 0)
    makers = torch.ones(N).index_fill(0, torch.tensor([5]), 0)
    quiet = site(weight=w, gram=lambda: gram(x), mean=x.mean(0), makers=makers, effect=effect)
    assert METRICS[name].kept(quiet, N - 1).tolist() == [j for j in range(N) if j != 5]


def test_an_expert_counts_by_the_energy_of_its_output():
    x, w = data()
    got = METRICS["condition"].total(site())
    assert got == pytest.approx(float((x @ w.T).square().sum() / TOKENS))
