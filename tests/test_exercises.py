"""The exercises: checks of your answers, and proof that each check knows right from wrong."""

import checks
import exercises
import pytest
import torch
from silent_bug import buggy_log

CHECKS = {
    "perturbation": checks.check_perturbation,
    "per_tensor_perturbation": checks.check_per_tensor,
    "panacea_rule": checks.check_panacea_rule,
    "lam_zero": checks.check_lam_zero,
    "random_perturbation": checks.check_random_direction,
    "linf_perturbation": checks.check_linf,
    "multi_step_perturbation": checks.check_multi_step,
    "anchored_direction": checks.check_anchored_direction,
    "safe_lora": checks.check_safe_lora,
}


@pytest.mark.parametrize("name", CHECKS)
def test_your_answer(name):
    answer = getattr(exercises, "panacea_rule" if name == "lam_zero" else name)
    try:
        CHECKS[name](answer)
    except NotImplementedError:
        pytest.skip(f"exercise {name} is not attempted yet")


def test_your_answer_silent_bug():
    if exercises.SILENT_BUG is None:
        pytest.skip("exercise silent_bug is not attempted yet")
    checks.check_silent_bug(exercises.SILENT_BUG)


def test_the_silent_bug_is_in_the_log_and_only_one_letter_passes():
    log = buggy_log()
    assert log[1]["h"] > log[0]["h"] and log[-1]["g"] < log[0]["g"]
    passed = []
    for letter in "ABCD":
        try:
            checks.check_silent_bug(letter)
            passed.append(letter)
        except AssertionError:
            pass
    assert len(passed) == 1


def norm(tensors):
    """One L2 norm over all tensors."""
    return torch.sqrt(sum(x.pow(2).sum() for x in tensors))


def noise(grad, rho, generator):
    """A right answer to exercise 4."""
    z = [torch.randn(x.shape, generator=generator) for x in grad]
    return [rho * x / norm(z) for x in z]


def climb(loss, w, harmful, rho, steps, project=True, restore=True):
    """An answer to exercise 6, with two ways to spoil it."""
    start, eps = w[0].detach().clone(), torch.zeros_like(w[0])
    for _ in range(steps):
        (grad,) = torch.autograd.grad(loss(harmful), w)
        eps = eps + rho * (1 if steps == 1 else 0.15) * grad / grad.norm()
        if project:
            eps = eps * min(1, rho / eps.norm().item())
        with torch.no_grad():
            w[0].copy_(start + eps)
    if restore:
        with torch.no_grad():
            w[0].copy_(start)
    return [eps]


def project(delta, aligned, unaligned, tau, norm=torch.Tensor.norm, below=True):
    """An answer to exercise 8, with two ways to spoil it."""
    V = aligned - unaligned
    new = V @ V.T @ delta / norm(V)
    cosine = torch.nn.functional.cosine_similarity(new.flatten(), delta.flatten(), dim=0)
    return new if (cosine < tau) == below else delta


def combine(grad_h, grad_a, rho, mu):
    """A right answer to exercise 7."""
    d = [x - mu * y for x, y in zip(grad_h, grad_a)]
    return [rho * x / norm(d) for x in d]


RIGHT = {
    checks.check_per_tensor: lambda g, rho: [rho * x / (x.norm() * len(g) ** 0.5) for x in g],
    checks.check_random_direction: noise,
    checks.check_linf: lambda g, rho: [rho * x.sign() for x in g],
    checks.check_multi_step: climb,
    checks.check_anchored_direction: combine,
    checks.check_safe_lora: project,
}
WRONG = [
    (checks.check_per_tensor, lambda g, rho: [rho * x / x.norm() for x in g], "norm rho / sqrt"),
    (checks.check_per_tensor, lambda g, rho: [rho * x / norm(g) for x in g], "norm rho / sqrt"),
    (checks.check_random_direction, lambda g, rho, _: [rho * x / norm(g) for x in g], "same noise"),
    (
        checks.check_random_direction,
        lambda g, rho, gen: [rho * x for x in noise(g, 1.1, gen)],
        "norm should be rho",
    ),
    (checks.check_linf, lambda g, rho: [rho * x / norm(g) for x in g], "whole box"),
    (checks.check_linf, lambda g, rho: [-rho * x.sign() for x in g], "goes down"),
    (checks.check_multi_step, lambda *a: climb(*a, project=False), "leaves the ball"),
    (checks.check_multi_step, lambda *a: climb(*a, restore=False), "not restored"),
    (checks.check_multi_step, lambda loss, w, b, rho, n: climb(loss, w, b, rho, 1), "25 steps"),
    (checks.check_anchored_direction, lambda h, a, rho, mu: combine(h, a, rho, -mu), "descend a"),
    (checks.check_safe_lora, lambda *a: project(*a, norm=lambda V: 1.0), "Frobenius"),
    (checks.check_safe_lora, lambda *a: project(*a, below=False), "below tau"),
    (checks.check_safe_lora, lambda d, a, u, tau: project(d, a, u, 9.0), "stays as it is"),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_a_check_accepts_a_right_answer(check):
    check(RIGHT[check])


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_check_rejects_a_wrong_answer_and_says_why(check, answer, message):
    with pytest.raises(AssertionError, match=message):
        check(answer)


def test_lam_zero_check_rejects_a_rule_that_ignores_lam(s4):
    checks.check_lam_zero(s4.panacea_rule)
    with pytest.raises(AssertionError, match="lam = 0"):
        checks.check_lam_zero(lambda *a: s4.panacea_rule(*a[:-1], 0.1))
