"""Graders: check_x(fn) takes your function and explains what is wrong with it.

The tests run them on the project's own functions, and on mutants of them; the exercises in the
README run them on yours.
"""

import torch


def check_perturbation(fn):
    """Eq. 2: fn(grad_h, rho) -> eps."""
    grad = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0, 4.0]])]
    before = [x.clone() for x in grad]
    eps = fn(grad, 0.5)
    assert [e.shape for e in eps] == [x.shape for x in grad], (
        "eps must have one tensor per gradient tensor, of the same shape"
    )
    assert all(torch.equal(x, y) for x, y in zip(grad, before)), (
        "the gradient was changed in place; make new tensors"
    )
    assert not any(e.data_ptr() == x.data_ptr() for e, x in zip(eps, grad)), (
        "eps shares memory with the gradient; whoever clears or changes that changes eps"
    )
    norm = torch.sqrt(sum(e.pow(2).sum() for e in eps)).item()
    assert abs(norm - 0.5) < 1e-6, (
        f"||eps|| over ALL tensors must be rho = 0.5, found {norm:.4f}: "
        "one norm for all tensors together"
    )
    wanted = [torch.tensor([0.3, 0.0]), torch.tensor([[0.0, 0.4]])]
    assert (
        torch.dot(torch.cat([e.flatten() for e in eps]), torch.cat([x.flatten() for x in wanted]))
        > 0
    ), "eps points downhill; Eq. 2 climbs h: + grad h, not - grad h"
    for e, x in zip(eps, wanted):
        assert torch.allclose(e, x), f"closed form: rho * grad / ||grad||, wanted {x}, found {e}"


def _quadratics():
    """w, g, h with known gradients: g = |w - 1|^2 / 2 and h = sum c w^2 / 2, in float64."""
    w = [
        torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True),
        torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True),
    ]
    c = [torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)]

    def loss(batch):
        if batch == "user":
            return sum(((x - 1) ** 2).sum() / 2 for x in w)
        return sum((k * x**2).sum() / 2 for k, x in zip(c, w))

    return w, c, loss


def check_panacea_rule(fn):
    """Eq. 3: fn(loss, w, batch, harmful, rho, lam) -> (gradient, eps, losses)."""
    w, c, loss = _quadratics()
    start = [x.detach().clone() for x in w]
    rho, lam = 0.7, 0.3
    grads, eps, losses = fn(loss, w, "user", "harmful", rho, lam)
    assert all(torch.equal(x, y) for x, y in zip(w, start)), (
        "w is not what it was, bit for bit; keep a copy and copy it back"
    )
    grad_h = [k * x for k, x in zip(c, start)]
    norm = torch.sqrt(sum(x.pow(2).sum() for x in grad_h))
    for e, x in zip(eps, grad_h):
        assert torch.allclose(e, rho * x / norm), "eps is not Eq. 2 at w"
    # grad h(w + eps) - grad h(w) = c * eps, exactly, because h is quadratic
    wanted = [(x - 1) - lam * k * rho * y / norm for x, k, y in zip(start, c, grad_h)]
    wrong = {
        "the sign of lam is wrong: Eq. 3 subtracts lam * (grad h(w + eps) - grad h(w))": [
            (x - 1) + lam * k * rho * y / norm for x, k, y in zip(start, c, grad_h)
        ],
        "grad h(w) is missing from Eq. 3: what counts is the DIFFERENCE of gradients": [
            (x - 1) - lam * k * (x + rho * y / norm) for x, k, y in zip(start, c, grad_h)
        ],
    }
    for message, value in wrong.items():
        assert not all(torch.allclose(x, y) for x, y in zip(grads, value)), message
    for x, y in zip(grads, wanted):
        assert torch.allclose(x, y), f"closed form of Eq. 3: wanted {y}, found {x}"
    h = sum((k * x**2).sum() / 2 for k, x in zip(c, start)).item()
    assert abs(losses["h"] - h) < 1e-9 and losses["h_eps"] > losses["h"], (
        "losses must report h at w and h_eps at w + eps, and h_eps must be the larger"
    )


def check_restores_exactly(perturbed):
    """perturbed(w, eps): a context manager that gives w back bit for bit, even after an error."""
    w = [torch.tensor([1e-7, 0.1, 3.0]), torch.tensor([0.1], dtype=torch.bfloat16)]
    eps = [torch.tensor([1.0, 1e4, 0.3]), torch.tensor([0.3], dtype=torch.bfloat16)]
    start = [x.clone() for x in w]
    with perturbed(w, eps):
        assert torch.allclose(w[0], start[0] + eps[0]), "inside, w must be w + eps"
    assert all(torch.equal(x, y) for x, y in zip(w, start)), (
        "w is not restored bit for bit: (w + eps) - eps is not w in floating point; copy it back"
    )
    try:
        with perturbed(w, eps):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert all(torch.equal(x, y) for x, y in zip(w, start)), (
        "w stays perturbed when the body raises; restore it in `finally`"
    )


def _example():
    """Two gradient tensors of very different size."""
    return [torch.tensor([3.0, 0.0, -4.0]), torch.tensor([[0.05], [-0.12]])]


def _norm(tensors):
    """One L2 norm over all tensors, a number."""
    return torch.sqrt(sum(x.pow(2).sum() for x in tensors)).item()


def check_per_tensor(fn):
    """fn(grad_h, rho): every tensor of eps has norm rho / sqrt(n), and the gradient's direction."""
    grad = _example()
    eps = fn(grad, 0.6)
    for e, x in zip(eps, grad):
        assert abs(e.norm().item() - 0.6 / 2**0.5) < 1e-6, (
            f"with two tensors each should have norm rho / sqrt(2), found {e.norm():.4f}"
        )
        assert torch.allclose(e / e.norm(), x / x.norm()), "each tensor follows its own gradient"
    assert abs(_norm(eps) - 0.6) < 1e-6, "all together should still have norm rho"


def check_lam_zero(fn):
    """fn is a panacea_rule: with lam = 0 its gradient is that of g, bit for bit."""
    w, _, loss = _quadratics()
    grads, eps, _ = fn(loss, w, "user", "harmful", 0.7, 0.0)
    for x, y in zip(grads, torch.autograd.grad(loss("user"), w)):
        assert torch.equal(x, y), "with lam = 0 Eq. 3 is grad g(w), exactly"
    assert abs(_norm(eps) - 0.7) < 1e-9, "eps is still computed: it is added at the end"


def check_random_direction(fn):
    """fn(grad_h, rho, generator): the same norm as Eq. 2, but no direction; new every time."""
    grad = [torch.ones(40, 30), torch.ones(50)]
    generator = torch.Generator().manual_seed(0)
    eps, other = fn(grad, 0.4, generator), fn(grad, 0.4, generator)
    assert [e.shape for e in eps] == [x.shape for x in grad], "wrong shapes"
    assert abs(_norm(eps) - 0.4) < 1e-5, f"the norm should be rho = 0.4, found {_norm(eps):.4f}"
    assert not torch.equal(eps[0], other[0]), "two calls gave the same noise"
    cosine = sum((e * x).sum() for e, x in zip(eps, grad)).item() / (0.4 * _norm(grad))
    assert abs(cosine) < 0.12, f"noise should hardly see the gradient, cosine {cosine:.2f}"
    kurtosis = (eps[0] / eps[0].std()).pow(4).mean().item()
    assert 2.3 < kurtosis < 3.7, "the entries should be Gaussian"


def check_linf(fn):
    """fn(grad_h, rho): rho * sign(grad h), which no eps in the box can beat to first order."""
    grad = _example()
    eps = fn(grad, 0.1)
    worst = max(e.abs().max().item() for e in eps)
    assert worst <= 0.1 + 1e-7, f"some entry leaves the box: {worst:.3f} > rho"
    gain = sum((e * x).sum() for e, x in zip(eps, grad)).item()
    best = 0.1 * sum(x.abs().sum().item() for x in grad)
    assert gain > 0, "eps goes down h, not up"
    assert abs(gain - best) < 1e-6, (
        f"the linearised h gains {gain:.4f}; {best:.4f} is possible: use the whole box"
    )
    assert all((e[x == 0] == 0).all() for e, x in zip(eps, grad)), "sign(0) is 0"


def check_multi_step(fn):
    """fn(loss, w, harmful, rho, steps): in the ball, and above one step of Eq. 2."""
    torch.manual_seed(0)
    w = [torch.randn(6, dtype=torch.float64, requires_grad=True)]
    curve = torch.randn(6, 6, dtype=torch.float64)

    def loss(batch):  # curved, so that the steepest direction turns along the way
        return torch.sin(curve @ w[0] * 2).sum() + w[0].pow(2).sum() * 0.1

    def h_at(eps):
        with torch.no_grad():
            moved = w[0] + eps[0]
            return (torch.sin(curve @ moved * 2).sum() + moved.pow(2).sum() * 0.1).item()

    start = w[0].detach().clone()
    one, many = fn(loss, w, None, 0.8, 1), fn(loss, w, None, 0.8, 25)
    assert torch.equal(w[0], start), "w is not restored bit for bit"
    assert _norm(one) <= 0.8 * (1 + 1e-9) and _norm(many) <= 0.8 * (1 + 1e-9), (
        f"eps leaves the ball: norm {max(_norm(one), _norm(many)):.3f} > 0.8; project it back"
    )
    grad = torch.autograd.grad(loss(None), w)
    eq2 = [0.8 * x / _norm(grad) for x in grad]
    assert h_at(many) > h_at(eq2), "25 steps should raise h more than the one step of Eq. 2"


def check_anchored_direction(fn):
    """fn(grad_h, grad_a, rho, mu): rho (grad h - mu grad a) / ||.||; mu = 0 is Eq. 2."""
    grad_h, grad_a = _example(), [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([[0.5], [0.0]])]
    check_perturbation(lambda grad, rho: fn(grad, [torch.ones_like(x) for x in grad], rho, 0.0))
    eps = fn(grad_h, grad_a, 0.5, 2.0)
    assert abs(_norm(eps) - 0.5) < 1e-6, "the whole step has norm rho"
    d = [x - 2.0 * y for x, y in zip(grad_h, grad_a)]
    for e, x in zip(eps, d):
        assert torch.allclose(e, 0.5 * x / _norm(d)), (
            "climb h, descend a: the direction is grad h - mu * grad a, normalised as a whole"
        )


def check_safe_lora(fn):
    """fn(delta, aligned, unaligned, tau): delta projected where it disagrees with alignment."""
    torch.manual_seed(0)
    unaligned, delta = torch.randn(6, 4), torch.randn(6, 4)
    aligned = unaligned + torch.randn(6, 4) * torch.tensor([2.0, 1, 0, 0, 0, 0]).unsqueeze(1)
    before = delta.clone()
    V = aligned - unaligned
    C = V @ V.T / V.norm()
    cosine = torch.nn.functional.cosine_similarity((C @ delta).flatten(), delta.flatten(), dim=0)
    projected = fn(delta, aligned, unaligned, cosine.item() + 0.01)
    assert torch.equal(delta, before), "the given delta was changed; make a new tensor"
    assert not torch.allclose(projected, delta), (
        f"the cosine between C delta and delta is {cosine:.2f}, below tau: delta must be projected"
    )
    assert not torch.allclose(projected, V @ V.T @ delta), (
        "divide V V^T by the Frobenius norm of V (Safe LoRA's fast version of the projection)"
    )
    assert torch.allclose(projected, C @ delta, atol=1e-5), "wanted C delta, C = V V^T / ||V||_F"
    assert torch.equal(fn(delta, aligned, unaligned, cosine.item() - 0.01), delta), (
        "a layer that agrees with alignment (cosine above tau) stays as it is"
    )


def check_silent_bug(letter):
    """The letter of the bug in tests/silent_bug.py."""
    import hashlib

    digest = hashlib.sha256(f"panacea {letter}".encode()).hexdigest()
    assert digest.startswith("059d18eb35eb"), (
        f"not {letter!r}: compare each step's h with h_eps of the step before, "
        "and eps_norm with rho = 0.3"
    )
