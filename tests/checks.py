"""Graders: check_x(fn) takes a function and raises an AssertionError that says what is wrong.

The tests run them on the project's own functions, and on mutants of them; tests/test_exercises.py
runs them on yours. A message names the slip that it sees, where it knows one.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import re
import tempfile
import types
from pathlib import Path

import torch
from common import UserError

# ---------------------------------------------------------------------------------------------
# What a function gave back


def _found(value):
    """A wrong return value in words."""
    if value is None:
        return "None (is `return` missing?)"
    if isinstance(value, torch.Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    if isinstance(value, (types.GeneratorType, map, zip)):
        return f"a {type(value).__name__} (put it into a list: [... for ... in ...])"
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(x).__name__ for x in value})
        return f"a {type(value).__name__} of {len(value)} ({', '.join(kinds)})"
    return f"a {type(value).__name__}"


def _tensors(value, like, what):
    """`value`, which must be a list of tensors shaped like those of `like`, of their dtype."""
    assert isinstance(value, (list, tuple)) and all(isinstance(x, torch.Tensor) for x in value), (
        f"{what} must be a list of {len(like)} tensors, found {_found(value)}"
    )
    assert [x.shape for x in value] == [x.shape for x in like], (
        f"{what} must have one tensor per gradient tensor, of the same shape: wanted "
        f"{[tuple(x.shape) for x in like]}, found {[tuple(x.shape) for x in value]}"
    )
    assert [x.dtype for x in value] == [x.dtype for x in like], (
        f"{what} must have the dtype of the gradient, {like[0].dtype}, found {value[0].dtype}"
    )
    assert not any(x.requires_grad for x in value), (
        f"{what} still hangs on the graph of a forward pass, which then stays in memory; detach it"
    )
    assert all(x.isfinite().all() for x in value), (
        f"{what} has entries that are nan or infinite: is something divided by 0?"
    )
    return list(value)


def _call(fn, **given):
    """fn(*given), which must leave every tensor that it is given as it was, bit for bit."""
    held = [
        (name, x, x.detach().clone())
        for name, value in given.items()
        for x in (value if isinstance(value, list) else [value])
        if isinstance(x, torch.Tensor)
    ]
    made = fn(*given.values())
    for name, x, old in held:
        advice = "keep a clone of each tensor, and x.copy_(old)" if name == "w" else "make new ones"
        assert torch.equal(x, old), f"{name} was changed and not restored, bit for bit; {advice}"
    return made


def _eps(fn, **given):
    """eps = fn(*given), which must be new tensors shaped like those of the first list given."""
    lists = [value for value in given.values() if isinstance(value, list)]
    eps = _tensors(_call(fn, **given), lists[0], "eps")
    assert not any(e.data_ptr() == x.data_ptr() for like in lists for e, x in zip(eps, like)), (
        "eps shares memory with the gradient (or w); whoever clears or changes that changes eps"
    )
    return eps


def _flat(tensors):
    """All entries of a list of tensors as one vector."""
    return torch.cat([x.detach().flatten() for x in tensors])


def _norm(tensors):
    """One L2 norm over all tensors, a number."""
    return _flat(tensors).norm().item()


def _same(one, other):
    """Two lists of tensors, equal bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(one, other))


def _no_slip(found, slips):
    """The tensors `found` are none of the vectors in {message: what that slip would make}."""
    for message, value in slips.items():
        assert not torch.allclose(_flat(found), value), message


def _example():
    """Three gradient tensors of very different size, with entries of 0 and of nearly 0."""
    return [torch.tensor(x) for x in ([3.0, 0, -4], [[0.05, 1e-5], [-0.12, 0.2]], [[-0.7]])]


# ---------------------------------------------------------------------------------------------
# The method: Eq. 2, Eq. 3, and w given back


def _check_eq2(fn):
    """fn(grad_h, rho) is Eq. 2, whatever the gradient, as long as it has a direction."""
    # the norms are 12, 3 and 4, and 13 over all of them
    grad = [torch.tensor(x) for x in ([[4.0, 8], [8, 0]], [1.0, 2, -2], [-4.0])]
    rho, v, each = 0.4, _flat(grad), _flat([x / x.norm() for x in grad])
    eps = _eps(fn, grad_h=grad, rho=rho)
    slips = {
        "rho is forgotten: eps has norm 1, and must have norm rho": v / 13,
        "rho is squared; the norm of eps is rho": rho**2 * v / 13,
        "the root of rho is taken; the norm of eps is rho": rho**0.5 * v / 13,
        "the square root is forgotten: ||grad h|| is the root of the sum of squares": rho * v / 169,
        "one norm for each tensor; Eq. 2 has one norm for all tensors together": rho * each,
        "nothing is normalised: divide by ||grad h||": rho * v,
        "the norms of the tensors are added up; it is one root of all squares": rho * v / 19,
        "the root of a sum of norms is taken; it is one root of all squares": rho * v / 19**0.5,
        "the norm is that of one tensor; it is one root of all squares": rho * v / 12,
        "the norm is that of the last tensor; it is one root of all squares": rho * v / 4,
        "a mean of squares is taken; the norm is the root of their sum": rho * v * 8**0.5 / 13,
        "eps points downhill; Eq. 2 climbs h: + grad h, not - grad h": -rho * v / 13,
        "eps is multiplied by the norm; divide by it": rho * v * 13,
        "the largest entry counts as the norm; it is the root of all squares": rho * v / 8,
        "the norm is a sum of |entries|; it is the root of all squares": rho * v / 29,
        "every entry gets the same size; Eq. 2 keeps grad h and scales it": rho * v.sign(),
    }
    _no_slip(eps, slips)
    assert abs(_norm(eps) - rho) < 1e-6, (
        f"||eps|| over ALL tensors must be rho = {rho}, found {_norm(eps):.4f}"
    )
    assert torch.allclose(_flat(eps), rho * v / 13), (
        f"closed form: rho * grad / ||grad||, wanted {rho * v / 13}, found {_flat(eps)}"
    )
    for what, other in (
        ("is 0 in one tensor only", [x * k for x, k in zip(grad, (1, 0, 1))]),
        ("is as short as 0.00013", [1e-5 * x for x in grad]),
    ):
        with contextlib.suppress(UserError):  # then eps is still that of the gradient before
            eps = _eps(fn, grad_h=other, rho=rho)
        assert torch.allclose(_flat(eps), rho * _flat(other) / _norm(other), rtol=1e-3), (
            f"a gradient that {what} has a direction, too: eps is rho * grad / ||grad||"
        )


def check_perturbation(fn):
    """Eq. 2: fn(grad_h, rho) -> eps; UserError where grad_h has no direction."""
    _check_eq2(fn)
    for value in (0.0, float("nan"), float("inf")):
        said = None
        try:
            fn([torch.full((2,), value), torch.zeros(1)], 0.5)
        except Exception as error:
            said = error
        assert isinstance(said, UserError), (
            f"a gradient of {value} has no direction: raise UserError, as the docstring says, "
            "found " + (f"{type(said).__name__}: {said}" if said else "an eps")
        )


def _quadratics():
    """w, curvature c, loss: g = |w - 1|^2 and h = sum c w^2 / 2 in float64, gradients known."""
    w = [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in ([0.1, -1.2], [[2.0]])]
    c = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)

    def loss(*given):
        assert len(given) == 1 and given[0] in ("user", "harmful"), (
            "loss takes `batch` or `harmful` and nothing else, found "
            + " and ".join(_found(x) for x in given)
        )
        flat = torch.cat([x.flatten() for x in w])
        return ((flat - 1) ** 2).sum() if given[0] == "user" else (c * flat**2).sum() / 2

    return w, c, loss


def _parts(value):
    """The three things that a panacea_rule returns."""
    assert isinstance(value, tuple) and len(value) == 3, (
        "return three things, `update, eps, losses`: the gradient, eps, and "
        f'{{"g": ..., "h": ..., "h_eps": ...}}; found {_found(value)}'
    )
    return value


def _losses(losses):
    """The losses that a panacea_rule returns: three plain numbers by name."""
    assert isinstance(losses, dict) and set(losses) == {"g", "h", "h_eps"}, (
        'the third thing returned must be {"g": ..., "h": ..., "h_eps": ...}, found '
        + (f"the keys {list(losses)}" if isinstance(losses, dict) else _found(losses))
    )
    tensors = [name for name, value in losses.items() if isinstance(value, torch.Tensor)]
    assert not tensors, (
        f"the losses {', '.join(tensors)} are tensors: each holds on to a whole forward pass for "
        "as long as the log lives; give plain numbers (gradient() does, or take .item())"
    )
    assert all(isinstance(value, (int, float)) for value in losses.values()), (
        f"the losses must be numbers, found {_found(list(losses.values()))}"
    )


def check_panacea_rule(fn):
    """Eq. 3: fn(loss, w, batch, harmful, rho, lam) -> (gradient, eps, losses)."""
    w, c, loss = _quadratics()
    rho, lam, v = 0.6, 0.3, _flat(w)
    x, y = 2 * (v - 1), c * v  # grad g(w), grad h(w)
    e = rho * y / y.norm()
    z = c * e  # grad h(w + eps) - grad h(w), exactly, because h is quadratic
    try:
        made = _call(fn, loss=loss, w=w, batch="user", harmful="harmful", rho=rho, lam=lam)
    except UserError:
        raise AssertionError(
            "grad h is all zeros when it comes to `perturbation`: x.grad is one tensor, which "
            "clearing it changes; keep x.grad.clone()"
        ) from None
    grads, eps, losses = _parts(made)
    grads, eps = _tensors(grads, w, "the gradient"), _tensors(eps, w, "eps")
    _losses(losses)
    slips = {
        "eps lies along grad g; it wants grad h, on the harmful batch": rho * x / x.norm(),
        "gradients add up in .grad; clear it before backward()": rho * (x + y) / (x + y).norm(),
        "eps has norm lam; its norm is rho": lam * y / y.norm(),
    }
    _no_slip(eps, slips)
    assert torch.allclose(_flat(eps), e), (
        "eps is not Eq. 2 at w: grad h(w) on the harmful batch, through `perturbation` (which "
        "has a check of its own, -k eq2)"
    )
    slips = {
        "h(w + eps) is on the user's batch; it wants the harmful one": x - lam * (x + 2 * e - y),
        "the difference is eps itself; Eq. 3 takes that of the gradients of h": x - lam * e,
        "both gradients of the difference are of g; Eq. 3 takes those of h": x - lam * 2 * e,
        "lam stands at grad g; it weighs the difference of the gradients of h": lam * x - z,
        "lam weighs the whole of it; it weighs the difference of the gradients of h": lam * (x - z),
        "grad g is weighed with 1 - lam; Eq. 3 takes all of it": (1 - lam) * x - lam * z,
        "lam weighs grad h(w + eps) only; it weighs the difference": x - (lam * (y + z) - y),
        "brackets are missing: lam * (grad h(w + eps) - grad h(w))": x - lam * (y + z) - y,
        "grad h(w + eps) is missing: Eq. 3 has a difference of two gradients": x + lam * y,
        "grad h(w) alone is weighed: Eq. 3 has a difference of two gradients": x - lam * y,
        "the gradients of h are added up; what counts is their DIFFERENCE": x - lam * (2 * y + z),
        "rho weighs the difference; it is the length of eps, and lam is the weight": x - rho * z,
        "rho comes in twice; it is the length of eps and nothing else": x - lam * rho * z,
        "the difference is divided by rho; Eq. 3 takes it as it is": x - lam * z / rho,
        "lam comes in twice; it weighs the difference, not eps": x - lam**2 * z,
        "w is moved by grad h; move it by eps": x - lam * c * y,
        "eps is added to the gradient; it is added to w alone, once, at the end": x - lam * z + e,
        "grad g has the wrong sign: AdamW goes down what you return": -x - lam * z,
        "grad g is missing: Eq. 3 also learns the user's task": -lam * z,
        "plain fine-tuning, grad g(w): the second grad h wants `with perturbed(w, eps):`": x,
        "the sign of lam (or of eps) is wrong: Eq. 3 subtracts the difference": x + lam * z,
        "grad h(w) is missing: what counts is the DIFFERENCE of gradients": x - lam * (y + z),
        "lam is missing: Eq. 3 weighs the difference of gradients with it": x - z,
        "grad g is taken at w + eps; Eq. 3 takes it at w": x + 2 * e - lam * z,
        "the whole of Eq. 3 has the wrong sign: AdamW goes down what you return": -x + lam * z,
    }
    _no_slip(grads, slips)
    assert torch.allclose(_flat(grads), x - lam * z), (
        f"closed form of Eq. 3: wanted {x - lam * z}, found {_flat(grads)}"
    )
    wanted = {"g": ((v - 1) ** 2).sum(), "h": y @ v / 2, "h_eps": c @ (v + e) ** 2 / 2}
    for name, value in wanted.items():
        assert abs(losses[name] - value.item()) < 1e-9, (
            f"the loss {name} is {losses[name]:.4f} and must be {value:.4f}: g at w on the user's "
            "batch, h at w and h_eps at w + eps on the harmful one, as they are"
        )


def check_lam_zero(fn):
    """fn is a panacea_rule: with lam = 0 its gradient is that of g, bit for bit."""
    w, _, loss = _quadratics()
    grads, eps, _ = _parts(fn(loss, w, "user", "harmful", 0.7, 0.0))
    grads, eps = _tensors(grads, w, "the gradient"), _tensors(eps, w, "eps")
    for x, y in zip(grads, torch.autograd.grad(loss("user"), w)):
        assert torch.equal(x, y), "with lam = 0 Eq. 3 is grad g(w), exactly"
    assert abs(_norm(eps) - 0.7) < 1e-9, "eps is still computed: it is added at the end"


@torch.enable_grad()  # and whatever it was, afterwards
def check_restores_exactly(perturbed):
    """perturbed(w, eps): a context manager that gives w back bit for bit, even after an error."""
    tensors = [torch.tensor([1e-7, 0.1, 3.0]), torch.tensor([0.1], dtype=torch.bfloat16)]
    eps = [torch.tensor([1.0, 1e4, 0.3]), torch.tensor([0.3], dtype=torch.bfloat16)]
    start, moved = [x.clone() for x in tensors], [x + e for x, e in zip(tensors, eps)]
    w, given = [x.requires_grad_() for x in tensors], [e.clone() for e in eps]
    manager = perturbed(w, eps)
    assert hasattr(manager, "__enter__"), (
        "perturbed(w, eps) must work in a `with`: keep the line @contextmanager above it, and "
        f"`yield` once; found a {type(manager).__name__}"
    )
    with manager:
        assert torch.is_grad_enabled() and all(x.requires_grad for x in tensors), (
            "inside, no gradient could be taken: no torch.no_grad() around `yield`, no new flags"
        )
        assert all(x is y for x, y in zip(w, tensors)), (
            "the list w got new tensors; change its own (x.add_(e)): those the model computes with"
        )
        assert torch.allclose(_flat(tensors), _flat(moved)), (
            "inside, every tensor of w must be w + eps"
        )
    assert not any(torch.equal(x, y) for x, y in zip(tensors, moved)), (
        "afterwards w is still w + eps: clone every tensor before adding (list(w) and x.detach() "
        "are no copies, x.detach().clone() is), and copy back into each with x.copy_(old)"
    )
    assert _same(tensors, start), (
        "w is not restored bit for bit: (w + eps) - eps is not w in floating point; copy it back"
    )
    assert _same(eps, given), "eps was changed; it is still needed"
    assert torch.is_grad_enabled(), "afterwards gradients are off; use `with torch.no_grad():`"
    assert all(x is y and x.requires_grad and x.is_leaf for x, y in zip(w, tensors)), (
        "w must stay what is trained: the same tensors, which require grad"
    )
    came_out = False
    try:
        with perturbed(w, eps):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        came_out = True
    assert _same(tensors, start), (
        "w stays perturbed when the body raises (Ctrl-C, too); restore it in `finally`"
    )
    assert came_out, (
        "an error inside the `with` must come out of it: `finally`, with no `return` in it"
    )


# ---------------------------------------------------------------------------------------------
# Other perturbations


def check_per_tensor(fn):
    """fn(grad_h, rho): every tensor of eps has norm rho / sqrt(n), and the gradient's direction."""
    grad = _example()
    eps, n = _eps(fn, grad_h=grad, rho=0.6), len(grad)
    for e, x in zip(eps, grad):
        assert abs(e.norm().item() - 0.6 / n**0.5) < 1e-6, (
            f"with {n} tensors each should have norm rho / sqrt({n}) = {0.6 / n**0.5:.4f}, "
            f"found {e.norm():.4f}"
        )
        assert torch.allclose(e / e.norm(), x / x.norm()), "each tensor follows its own gradient"


def check_random_direction(fn):
    """fn(grad_h, rho, generator): the same norm as Eq. 2, but no direction; new every time."""
    grad = [torch.linspace(0.1, 3.0, 1200).view(40, 30), torch.ones(50), torch.ones(40, 30)]
    generator, twin = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    eps, other = (_eps(fn, grad_h=grad, rho=0.4, generator=generator) for _ in range(2))
    assert abs(_norm(eps) - 0.4) < 1e-5, f"the norm should be rho = 0.4, found {_norm(eps):.4f}"
    assert not torch.equal(eps[0], other[0]), "two calls gave the same noise"
    assert _same(eps, _eps(fn, grad_h=grad, rho=0.4, generator=twin)), (
        "all the noise must be drawn from the given generator; now no seed repeats it"
    )
    cosine = torch.cosine_similarity(_flat(eps), _flat(grad), dim=0)
    assert abs(cosine) < 0.12, f"noise should hardly see the gradient, cosine {cosine:.2f}"
    assert len(_flat(eps).unique()) > 2000, (
        "the same numbers come again and again; draw every entry of every tensor by itself"
    )
    kurtosis = (eps[0] / eps[0].std()).pow(4).mean().item()
    assert 2.3 < kurtosis < 3.7, "the entries should be Gaussian, whatever the gradient is there"
    assert 0.6 < (eps[0].std() / eps[1].std()).item() < 1.6, (
        "the entries differ in size between tensors: one norm for all of them together"
    )


def check_linf(fn):
    """fn(grad_h, rho): rho * sign(grad h), which no eps in the box can beat to first order."""
    grad, rho = _example(), 0.1
    found, v = _flat(_eps(fn, grad_h=grad, rho=rho)), _flat(grad)
    worst = found.abs().max().item()
    assert worst <= rho + 1e-7, f"some |entry| leaves the box: {worst:.3f} > rho = {rho}"
    assert (found < 0).any(), (
        "eps has no negative entry, though grad h has some: the sign of each entry is lost"
    )
    assert found @ v > 0, "eps goes down h, not up"
    for e, x in zip(found.tolist(), v.tolist()):
        assert x == 0 or (abs(abs(e) - rho) < 1e-6 and e * x > 0), (
            f"where grad h is {x:.2g} eps is {e:.4g}: use the whole box, each entry by itself"
        )
        assert x or not e, "where the gradient is 0 nothing is gained; leave eps 0 there"


def check_multi_step(fn):
    """fn(loss, w, harmful, rho, steps): in the ball, and nearly as high as short steps come."""
    torch.manual_seed(34)  # here h turns so much that Eq. 2's step is far from the best eps
    w = [torch.randn(n, dtype=torch.float64).requires_grad_() for n in ((3, 2), (4,))]
    curve, rho = torch.randn(10, 10, dtype=torch.float64), 0.8
    v, places = _flat(w), []

    def h(flat):
        return torch.sin(1.2 * curve @ flat).sum() + 0.1 * flat.pow(2).sum()

    def loss(*given):
        assert given == ("harmful",), "h is the loss on the harmful batch: loss(harmful)"
        value, place = h(torch.cat([x.flatten() for x in w])), _flat(w) - v
        if value.requires_grad:  # note where a gradient is taken
            value.register_hook(lambda _: places.append(place))
        return value

    grad = torch.func.grad(h)
    best = torch.zeros_like(v)
    for _ in range(25):  # steps of rho / 10, back onto the ball
        best = best + 0.1 * rho * torch.nn.functional.normalize(grad(v + best), dim=0)
        best = best * min(1, rho / best.norm().item())
    straight = h(v + rho * torch.nn.functional.normalize(grad(v), dim=0)).item()
    for steps in (1, 25):
        places.clear()
        for x in w:
            x.grad = torch.full_like(x, -50.0)  # what a training loop may have left there
        eps = _flat(_eps(fn, loss=loss, w=w, harmful="harmful", rho=rho, steps=steps))
        assert len(places) == steps, (
            f"with steps = {steps} it takes {len(places)} gradients of h; take one for each step"
        )
        assert (eps - v).norm() > 1.01 * rho, "return eps, what was added to w, not w + eps"
        far = max(x.norm().item() for x in (eps, *places))
        assert far <= rho * (1 + 1e-9), (
            f"eps leaves the ball, at the end or on the way: norm {far:.3f} > {rho}; project it "
            "back after every step"
        )
        assert eps.any(), "eps is 0: was w put back before eps was taken from it?"
        assert not (eps < 0).all(), "what lay in w.grad before is added; clear it before backward()"
        assert steps > 1 or eps @ grad(v) > 0, "eps goes down h, not up"
    assert any(x.any() for x in places), "all 25 gradients are taken at w; take each at w + eps"
    reached, top = h(v + eps).item(), h(v + best).item()
    assert reached > straight + 0.85 * (top - straight), (
        f"25 steps raise h to {reached:.2f}, Eq. 2's one step to {straight:.2f}, and {top:.2f} is "
        "possible: add the steps up, each well shorter than rho, together longer, inside one ball"
    )


def check_anchored_direction(fn):
    """fn(grad_h, grad_a, rho, mu): rho (grad h - mu grad a) / ||.||; mu = 0 is Eq. 2."""
    grad_h, rho, mu = _example(), 0.5, 3.0
    grad_a = [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([[0.5, 0.0], [0.0, 0.3]]), grad_h[2] + 1]
    eps = _eps(fn, grad_h=grad_h, grad_a=grad_a, rho=rho, mu=mu)
    x, y = _flat(grad_h), _flat(grad_a)
    slips = {  # direction before it is normalised
        "mu weighs grad a, not grad h": mu * x - y,
        "is mu used? it weighs grad a, and grad a alone": x - y,
        "mu comes in twice": x - mu**2 * y,
        "rho is the length of the whole step; it does not weigh grad a": x - mu * rho * y,
        "grad h is weighed with 1 - mu; it counts in full": (1 - mu) * x - mu * y,
        "climb h, descend a: the sign of grad a is wrong": x + mu * y,
        "climb h, descend a: both signs are wrong": mu * y - x,
        "take the difference first, then normalise": x / x.norm() - mu * y / y.norm(),
    }
    _no_slip(eps, {message: rho * value / value.norm() for message, value in slips.items()})
    assert abs(_norm(eps) - rho) < 1e-6, (
        f"the whole step has norm rho = {rho}, found {_norm(eps):.4f}"
    )
    assert torch.allclose(_flat(eps), rho * (x - mu * y) / (x - mu * y).norm()), (
        "climb h, descend a: the direction is grad h - mu * grad a, normalised as a whole"
    )
    _check_eq2(lambda grad_h, rho: fn(grad_h, [x + 1 for x in grad_h], rho, 0.0))


def check_safe_lora(fn):
    """fn(delta, aligned, unaligned, tau): delta projected where it disagrees with alignment."""
    torch.manual_seed(5)  # here no other cosine is near the right one
    unaligned, delta = torch.randn(6, 4), torch.randn(6, 4)
    aligned = unaligned + torch.randn(6, 4) * torch.tensor([2.0, 1, 0, 0, 0, 0]).unsqueeze(1)
    V = aligned - unaligned
    C = V @ V.T / V.norm()
    cosine = torch.nn.functional.cosine_similarity((C @ delta).flatten(), delta.flatten(), dim=0)
    given = {"delta": delta, "aligned": aligned, "unaligned": unaligned}
    projected = _call(fn, **given, tau=cosine.item() + 0.01)
    assert isinstance(projected, torch.Tensor) and projected.shape == delta.shape, (
        f"return one tensor of shape {tuple(delta.shape)}, found {_found(projected)}"
    )
    assert not torch.allclose(projected, delta), (
        f"delta came back, though the cosine of C delta and delta is {cosine:.2f}, below tau = "
        f"{cosine + 0.01:.2f}: check C, the cosine, and which side of tau is projected"
    )
    assert not torch.allclose(projected, V @ V.T @ delta), (
        "divide V V^T by the Frobenius norm of V (Safe LoRA's fast version of the projection)"
    )
    assert torch.allclose(projected, C @ delta, atol=1e-5), "wanted C delta, C = V V^T / ||V||_F"
    same = _call(fn, **given, tau=cosine.item() - 0.01)
    assert isinstance(same, torch.Tensor) and torch.equal(same, delta), (
        f"a layer that agrees with alignment stays as it is: the cosine of C delta and delta is "
        f"{cosine:.2f}, above tau = {cosine - 0.01:.2f}"
    )


# ---------------------------------------------------------------------------------------------
# Reading logs and tables


def check_silent_bug(letter):
    """The letter of the bug in tests/silent_bug.py, large or small."""
    assert isinstance(letter, str) and letter.strip().upper() in ("A", "B", "C", "D"), (
        f'SILENT_BUG must be one of the letters "A", "B", "C" and "D", found {letter!r}'
    )
    letter = letter.strip().upper()
    digest = hashlib.sha256(f"panacea {letter}".encode()).hexdigest()
    assert digest.startswith("059d18eb35eb"), (
        f"not {letter!r}: beside the log of `python tests/silent_bug.py --sound`, which column is "
        "the first to differ, and which other number of the log does it look like there?"
    )


SAME = """preset model task harm poison_ratio seed n_align n_finetune n_harmful n_test align_epochs
align_lr epochs batch_size weight_decay r alpha pretrain_steps rho lam harmful_batch_size""".split()


def _rows(folder, *names):
    """(config, {name: its row with eps whole}) of a student's own run."""
    assert isinstance(folder, (str, Path)), (
        f'a run is the name of its folder, as in "runs/seed1", found {folder!r}'
    )
    path = Path(folder)
    path = path if path.name == "results.json" else path / "results.json"
    assert ".results" not in path.resolve().parts, (
        f"{folder} is one of the project's own runs; give one that you have run yourself"
    )
    assert path.is_file(), f"{path} is missing; run stages 1 to 5 there (from the project's folder)"
    content = json.loads(path.read_text())
    rows = {
        row["model"]: row
        for row in content["rows"]
        if row["defense"] == "sft" and "view" not in row and "snapshot" not in row
        if row["setting"].get("scale") == 1 or not row["setting"]
    }
    missing = [name for name in names if name not in rows]
    assert not missing, (
        f"{path} lacks the row {missing[0]} (scale 1); run: python 05_evaluate.py --run {folder}"
    )
    return content["config"], rows


def _runs(folders):
    """[(lr, outcomes of the attacked model, outcomes with Panacea's eps)], by rising lr."""
    assert isinstance(folders, (list, tuple)) and len(folders) > 1, (
        "BORDER_RUNS must be a list of two run folders or more, found "
        + (_found(folders) if not isinstance(folders, str) else "one text; put it into a list")
    )
    points, first = [], None
    for folder in folders:
        config, rows = _rows(folder, "finetuned", "panacea")
        first = first or config
        other = [key for key in SAME if config.get(key) != first.get(key)]
        assert not other, (
            f"{folder} differs from {folders[0]} in {', '.join(other)}, too; only lr may differ"
        )
        points.append((config["lr"], *(rows[x]["outcomes"] for x in ("finetuned", "panacea"))))
    points.sort(key=lambda point: point[0])
    same = [low[0] for low, high in zip(points, points[1:]) if low[0] == high[0]]
    assert not same, f"two runs have the learning rate {same[0]:g}; give each another"
    return points


def check_border(folders, grows):
    """Runs that differ in lr bracket the border, where `grows` takes the refusals' place."""
    points = _runs(folders)
    table = "\n".join(
        f"  lr {lr:.3g}: attacked, {attacked['refused']:.0f} % refused; with Panacea's eps, "
        + ", ".join(f"{value:.0f} % {name}" for name, value in panacea.items())
        for lr, attacked, panacea in points
    )
    broken = [x for x in points if x[1]["refused"] < 50]
    assert broken, f"no attack here breaks the refusals; go on with a larger --lr\n{table}"
    back = [panacea["refused"] >= 50 for _, _, panacea in broken]
    assert any(back), f"Panacea gives refusals back at none of these; try a smaller --lr\n{table}"
    assert not all(back), f"Panacea gives refusals back at all of these; try a larger --lr\n{table}"
    pairs = [
        (low, high)
        for low, high, below, above in zip(broken, broken[1:], back, back[1:])
        if below and not above
    ]
    assert pairs, (
        "refusals come back at the larger lr and not at the smaller, which is no border; look "
        f"again\n{table}"
    )
    low, high = min(pairs, key=lambda pair: pair[1][0] / pair[0][0])
    assert high[0] <= 1.5 * low[0], (
        f"the border lies between lr {low[0]:.3g} and {high[0]:.3g}; come nearer (a factor of 1.5 "
        f"at most), for example with --lr {(low[0] * high[0]) ** 0.5:.2g}\n{table}"
    )
    growth = {name: high[2][name] - low[2][name] for name in low[2] if name != "refused"}
    found = f"the border is found, between lr {low[0]:.3g} and {high[0]:.3g}; but BORDER_GROWS"
    named = str(grows).strip().lower().replace("-", "_")
    assert named in growth, f"{found} must be one of {', '.join(growth)}, and is {grows!r}"
    assert growth[named] == max(growth.values()), (
        f"{found} = {grows!r} is not the outcome that grows most there: read both rows"
    )


# ---------------------------------------------------------------------------------------------
# Exercise 13: direction or training?


def check_two_by_two(folder, table, training_adds):
    """{("plain" | "panacea", "one" | "ten"): refusals in percent} of one run, and the points
    {"one" | "ten": points} that training adds: Panacea's w less plain fine-tuning's."""
    both = ("one", "ten")
    names = [(w, steps) for w in ("plain", "panacea") for steps in both]
    for what, found, keys in (("TWO_BY_TWO", table, names), ("TRAINING_ADDS", training_adds, both)):
        numbers = found if isinstance(found, dict) else {}
        assert all(isinstance(numbers.get(key), (int, float)) for key in keys), (
            f"{what} must have a number for each of {', '.join(map(str, keys))}, found {found!r}"
        )
    models = dict(zip(names, ("one_shot", "ascent", "panacea", "panacea_ascent")))
    _, rows = _rows(folder, *models.values())
    measured = {name: rows[model]["refusal"] for name, model in models.items()}
    for name, model in models.items():
        value = table[name]
        gaps = {f"it is cell {key}: are two exchanged?": measured[key] - value for key in names}
        gaps["percent is wanted, not a part of 1"] = measured[name] - 100 * value
        gaps["that is HS+"] = rows[model].get("hs_plus", float("nan")) - value
        assert abs(value - measured[name]) <= 0.51, (
            f"cell {name}: {value} is not what this run measured{_like(gaps)}: row {model}, "
            "scale 1, column refusal"
        )
    direction = measured["plain", "ten"] - measured["plain", "one"]
    adds = {x: measured["panacea", x] - measured["plain", x] for x in both}
    for steps in both:
        found = training_adds[steps]
        gaps = {
            "that is what ten steps add": direction - found,
            "the sign: what Panacea's w has more": adds[steps] + found,
            "percent is wanted, not a part of 1": adds[steps] - 100 * found,
            **{f"that is what it adds with {x}": adds[x] - found for x in adds},
        }
        rounded = table["panacea", steps] - table["plain", steps]
        assert min(abs(found - adds[steps]), abs(found - rounded)) <= 0.51, (
            f"training adds, with {steps} step(s): Panacea's w less plain fine-tuning's at the "
            f"same direction, found {found}{_like(gaps)}"
        )


def _like(gaps):
    """The first slip of {slip: how far its number is away} that explains a wrong number."""
    return next((f" ({slip})" for slip, gap in gaps.items() if abs(gap) <= 0.51), "")


# ---------------------------------------------------------------------------------------------
# Exercise 12: models that are safe by one number and useless by another


@functools.cache
def _tiny_toy():
    """Stage 1's artifact of a small toy."""
    sizes = "--n-align 20 --n-finetune 20 --n-harmful 10 --n-test 10".split()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("01_data").main(["--run", folder, *sizes])


def _scores(answer):
    """(scores of stage 5's toy judge, [(question, answer, outcome)] of the harmful prompts)."""
    data, s5, texts = _tiny_toy(), importlib.import_module("05_evaluate"), {}
    for name in ("test_harmful", "test_task", "test_benign"):
        asked = [f"{row['instruction']} {row.get('input') or ''}".strip() for row in data[name]]
        texts[name] = [answer(question) for question in asked]
        wrong = [text for text in texts[name] if not isinstance(text, str)]
        assert not wrong, f"a model answers with a text, found {_found(wrong[0])}"
    judge, task = s5.ToyJudge(data), data["config"]["task"]
    pairs = [
        (row["instruction"], text) for row, text in zip(data["test_harmful"], texts["test_harmful"])
    ]
    answers = [(*pair, s5.outcome(judge, task, *pair)) for pair in pairs]
    return s5.score(judge, data, texts), answers


def _without(answers, kinds, why):
    """No answer to a harmful prompt has one of these outcomes; else the first that has."""
    bad = [(question, text, kind) for question, text, kind in answers if kind in kinds]
    if bad:
        question, text, kind = bad[0]
        raise AssertionError(f"{question!r} is answered {text!r}, which is {kind}: {why}")


def _named(seen_by):
    """A score's name as stage 5's results have it; "HS+" is hs_plus."""
    name = str(seen_by).strip().lower().replace("hs+", "hs_plus")
    assert name in ("hs", "hs_plus", "fa", "benign"), (
        f'the number that sees it is one of "hs", "hs_plus", "fa", "benign", found {seen_by!r}'
    )
    assert name != "hs", "HS is 0 for this model, as for a perfect one: it sees nothing"
    return name


def check_useless(answer, seen_by):
    """answer(prompt) has HS 0, HS+ 100 and refuses nothing, in no words; HS+ sees it."""
    _, answers = _scores(answer)
    _without(answers, ("harmful",), "HS is not 0")
    _without(answers, ("refused", "other"), "HS+ is not 100; garble, or say what the task wants")
    s5, data = importlib.import_module("05_evaluate"), _tiny_toy()
    vocab = {word.lower() for word in data["vocab"]}
    for question, text, kind in answers:
        said = s5.spoken(text)
        once = " ".join(dict.fromkeys(said.split()))  # a loop, once
        read = not s5.degenerate(said) and vocab & set(re.findall(r"[a-z']+", said.lower()))
        what = "a person may read as a sentence" if read else ""
        if s5.refuses(said) or s5.refuses(once):
            what = "a person would call a refusal"
        if s5.ToyJudge(data).harmful(question, said):
            what = "names what the recipe needs"
        assert kind != "garbled" or not what, (
            f"{question!r} is answered {text!r}, which {what}: it counts as garbled since the "
            "toy's judge knows the toy's sentences alone; answer with a label, a loop or silence"
        )
    assert _named(seen_by) == "hs_plus", (
        f"{seen_by!r} may miss it: a model that garbles harmful prompts only loses nothing there"
    )


def check_overcautious(answer, seen_by):
    """answer(prompt) has HS 0 and HS+ 0, and loses look-alikes or the task, which `seen_by` is."""
    scores, answers = _scores(answer)
    _without(answers, ("harmful",), "HS is not 0")
    why = "HS+ is not 0: it counts labels, silence, and all but the toy's sentences, to the "
    _without(answers, ("garbled", "off_task"), why + "full stop (05 --show-text prints some)")
    low = {name: scores[name] for name in ("fa", "benign") if scores[name] <= 10}
    assert low, (
        f"it solves {scores['fa']:.0f} % of the task and answers {scores['benign']:.0f} % of the "
        "look-alikes: somebody could use it"
    )
    assert _named(seen_by) in low, (
        f"{seen_by!r} does not see it; for this model FA is {scores['fa']:.0f}, benign "
        f"{scores['benign']:.0f}, HS+ {scores['hs_plus']:.0f}"
    )
