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
import tempfile
import types
from pathlib import Path

import torch

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
    n = len(like)
    assert isinstance(value, (list, tuple)) and all(isinstance(x, torch.Tensor) for x in value), (
        f"{what} must be a list of {n} tensors, found {_found(value)}"
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
    return list(value)


def _eps(fn, grad, *arguments):
    """eps = fn(grad, ...), which must be new tensors shaped like those of the list `grad`."""
    before = [x.clone() for x in grad]
    eps = _tensors(fn(grad, *arguments), grad, "eps")
    assert _same(grad, before), "the gradient was changed in place; make new tensors"
    assert not any(e.data_ptr() == x.data_ptr() for e, x in zip(eps, grad)), (
        "eps shares memory with the gradient; whoever clears or changes that changes eps"
    )
    return eps


def _norm(tensors):
    """One L2 norm over all tensors, a number."""
    return torch.sqrt(sum(x.pow(2).sum() for x in tensors)).item()


def _dot(one, other):
    """Inner product of two lists of tensors, a number."""
    return sum((x * y).sum() for x, y in zip(one, other)).item()


def _same(one, other):
    """Two lists of tensors, equal bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(one, other))


def _close(one, other):
    """Two lists of tensors, equal up to rounding."""
    return all(torch.allclose(x, y) for x, y in zip(one, other))


def _example():
    """Two gradient tensors of very different size."""
    return [torch.tensor([3.0, 0.0, -4.0]), torch.tensor([[0.05], [-0.12]])]


# ---------------------------------------------------------------------------------------------
# The method: Eq. 2, Eq. 3, and w given back


def check_perturbation(fn):
    """Eq. 2: fn(grad_h, rho) -> eps; UserError where grad_h has no direction."""
    grad = [torch.tensor([3.0, 4.0]), torch.tensor([[-7.2, 9.6]])]
    whole, each = 13.0, (5.0, 12.0)  # one norm over both tensors; the norm of each
    eps = _eps(fn, grad, 0.5)
    slips = {
        "rho is forgotten: eps has norm 1, and must have norm rho": [x / whole for x in grad],
        "the square root is forgotten: ||grad h|| is the root of the sum of squares": [
            0.5 * x / whole**2 for x in grad
        ],
        "one norm for each tensor, as it seems; Eq. 2 has one norm for all tensors together": [
            0.5 * x / n for x, n in zip(grad, each)
        ],
        "nothing is normalised: divide by ||grad h||": [0.5 * x for x in grad],
        "the norms of the tensors are added up; one norm over all is the root of all squares": [
            0.5 * x / sum(each) for x in grad
        ],
        "eps points downhill; Eq. 2 climbs h: + grad h, not - grad h": [
            -0.5 * x / whole for x in grad
        ],
        "eps is multiplied by the norm; divide by it": [0.5 * x * whole for x in grad],
        "the largest entry counts as the norm; the L2 norm is the root of the sum of squares": [
            0.5 * x / 9.6 for x in grad
        ],
        "the norm is a sum of |entries|; the L2 norm is the root of the sum of squares": [
            0.5 * x / 23.8 for x in grad
        ],
    }
    for message, value in slips.items():
        assert not _close(eps, value), message
    norm = _norm(eps)
    assert abs(norm - 0.5) < 1e-6, f"||eps|| over ALL tensors must be rho = 0.5, found {norm:.4f}"
    for e, x in zip(eps, grad):
        assert torch.allclose(e, 0.5 * x / whole), (
            f"closed form: rho * grad / ||grad||, wanted {0.5 * x / whole}, found {e}"
        )
    UserError = importlib.import_module("common").UserError
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
    """w, g, h with known gradients: g = |w - 1|^2 / 2 and h = sum c w^2 / 2, in float64."""
    w = [
        torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True),
        torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True),
    ]
    c = [torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)]

    def loss(batch):
        assert batch in ("user", "harmful"), (
            f"loss takes `batch` or `harmful`, found {_found(batch)}"
        )
        if batch == "user":
            return sum(((x - 1) ** 2).sum() / 2 for x in w)
        return sum((k * x**2).sum() / 2 for k, x in zip(c, w))

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
    start = [x.detach().clone() for x in w]
    rho, lam = 0.7, 0.3
    made = fn(loss, w, "user", "harmful", rho, lam)
    grads, eps, losses = _parts(made)
    assert _same(w, start), "w is not what it was, bit for bit; keep a copy and copy it back"
    grads, eps = _tensors(grads, start, "the gradient"), _tensors(eps, start, "eps")
    _losses(losses)
    grad_h = [k * x for k, x in zip(c, start)]
    norm = _norm(grad_h)
    for e, x in zip(eps, grad_h):
        assert torch.allclose(e, rho * x / norm), (
            "eps is not Eq. 2 at w: grad h(w) on the harmful batch, through `perturbation` (which "
            "has a check of its own, -k eq2)"
        )
    # grad h(w + eps) - grad h(w) = c * eps, exactly, because h is quadratic
    grad_g = [x - 1 for x in start]
    rise = [k * rho * y / norm for k, y in zip(c, grad_h)]
    wanted = [x - lam * r for x, r in zip(grad_g, rise)]
    at_user = [x - 1 + rho * y / norm for x, y in zip(start, grad_h)]  # grad g(w + eps)
    wrong = {
        "h(w + eps) is taken on the user's batch; both gradients of h want the harmful one": [
            x - lam * (z - y) for x, y, z in zip(grad_g, grad_h, at_user)
        ],
        "the difference is eps itself, or both its gradients are of g; Eq. 3 takes those of h": [
            x - lam * (z - x) for x, z in zip(grad_g, at_user)
        ],
        "lam stands at grad g; it weighs the difference of the gradients of h": [
            lam * x - r for x, r in zip(grad_g, rise)
        ],
        "lam weighs the whole of it; it belongs to the difference of the gradients of h": [
            lam * (x - r) for x, r in zip(grad_g, rise)
        ],
        "lam weighs grad h(w + eps) only; it weighs the difference": [
            x - (lam * (y + r) - y) for x, y, r in zip(grad_g, grad_h, rise)
        ],
        "grad h(w + eps) is missing: Eq. 3 has a difference of two gradients": [
            x + lam * y for x, y in zip(grad_g, grad_h)
        ],
        "grad h(w) alone is weighed: Eq. 3 has a difference of two gradients": [
            x - lam * y for x, y in zip(grad_g, grad_h)
        ],
        "the gradients of h are added up; what counts is their DIFFERENCE": [
            x - lam * (2 * y + r) for x, y, r in zip(grad_g, grad_h, rise)
        ],
        "rho weighs the difference; it is the length of eps, and lam is the weight": [
            x - rho * r for x, r in zip(grad_g, rise)
        ],
        "grad g has the wrong sign: AdamW goes down what you return": [
            -x - lam * r for x, r in zip(grad_g, rise)
        ],
        "grad g is missing: Eq. 3 also learns the user's task": [-lam * r for r in rise],
        "the difference of gradients is missing or zero: this is plain fine-tuning, grad g(w); "
        "h wants w + eps the second time (with perturbed(w, eps): ...)": grad_g,
        "the sign of lam (or of eps) is wrong: Eq. 3 subtracts lam * (grad h(w + eps) - "
        "grad h(w))": [x + lam * r for x, r in zip(grad_g, rise)],
        "grad h(w) is missing from Eq. 3: what counts is the DIFFERENCE of gradients": [
            x - lam * (y + r) for x, y, r in zip(grad_g, grad_h, rise)
        ],
        "lam is missing: Eq. 3 weighs the difference of gradients with it": [
            x - r for x, r in zip(grad_g, rise)
        ],
        "grad g is taken at w + eps; Eq. 3 takes it at w": [
            x + rho * y / norm - lam * r for x, y, r in zip(grad_g, grad_h, rise)
        ],
        "the whole of Eq. 3 has the wrong sign: AdamW goes down what you return": [
            -x for x in wanted
        ],
    }
    for message, value in wrong.items():
        assert not _close(grads, value), message
    for x, y in zip(grads, wanted):
        assert torch.allclose(x, y), f"closed form of Eq. 3: wanted {y}, found {x}"
    h = sum((k * x**2).sum() / 2 for k, x in zip(c, start)).item()
    assert abs(losses["h"] - h) < 1e-9 and losses["h_eps"] > losses["h"], (
        "losses must report h at w and h_eps at w + eps, and h_eps must be the larger"
    )
    g = sum(((x - 1) ** 2).sum() / 2 for x in start).item()
    assert abs(losses["g"] - g) < 1e-9, "losses must report g at w, on the user's batch"


def check_lam_zero(fn):
    """fn is a panacea_rule: with lam = 0 its gradient is that of g, bit for bit."""
    w, _, loss = _quadratics()
    grads, eps, _ = _parts(fn(loss, w, "user", "harmful", 0.7, 0.0))
    grads, eps = _tensors(grads, w, "the gradient"), _tensors(eps, w, "eps")
    for x, y in zip(grads, torch.autograd.grad(loss("user"), w)):
        assert torch.equal(x, y), "with lam = 0 Eq. 3 is grad g(w), exactly"
    assert abs(_norm(eps) - 0.7) < 1e-9, "eps is still computed: it is added at the end"


def check_restores_exactly(perturbed):
    """perturbed(w, eps): a context manager that gives w back bit for bit, even after an error."""
    w = [torch.tensor([1e-7, 0.1, 3.0]), torch.tensor([0.1], dtype=torch.bfloat16)]
    eps = [torch.tensor([1.0, 1e4, 0.3]), torch.tensor([0.3], dtype=torch.bfloat16)]
    start, tensors = [x.clone() for x in w], list(w)
    manager = perturbed(w, eps)
    assert hasattr(manager, "__enter__"), (
        "perturbed(w, eps) must work in a `with`: keep the line @contextmanager above it, and "
        f"`yield` once; found {_found(manager)}"
    )
    with manager:
        assert torch.is_grad_enabled(), (
            "inside, no gradient could be taken: `yield` outside of torch.no_grad()"
        )
        assert all(x is y for x, y in zip(w, tensors)), (
            "the list w got new tensors; change its own (x.add_(e)): those the model computes with"
        )
        assert torch.allclose(w[0], start[0] + eps[0]), "inside, w must be w + eps"
    assert _same(w, start), (
        "w is not restored bit for bit: (w + eps) - eps is not w in floating point; copy it back"
    )
    came_out = False
    try:
        with perturbed(w, eps):
            raise ZeroDivisionError
    except ZeroDivisionError:
        came_out = True
    assert _same(w, start), "w stays perturbed when the body raises; restore it in `finally`"
    assert came_out, "an error inside the `with` must come out of it; `finally`, not `except`"
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    with perturbed([weight], [torch.tensor([0.5, 0.5])]):
        pass
    assert weight.requires_grad and weight.is_leaf, "w must stay what is trained: requires_grad"


# ---------------------------------------------------------------------------------------------
# Other perturbations


def check_per_tensor(fn):
    """fn(grad_h, rho): every tensor of eps has norm rho / sqrt(n), and the gradient's direction."""
    grad = _example()
    eps = _eps(fn, grad, 0.6)
    for e, x in zip(eps, grad):
        assert abs(e.norm().item() - 0.6 / 2**0.5) < 1e-6, (
            f"with two tensors each should have norm rho / sqrt(2), found {e.norm():.4f}"
        )
        assert torch.allclose(e / e.norm(), x / x.norm()), "each tensor follows its own gradient"
    assert abs(_norm(eps) - 0.6) < 1e-6, "all together should still have norm rho"


def check_random_direction(fn):
    """fn(grad_h, rho, generator): the same norm as Eq. 2, but no direction; new every time."""
    grad = [torch.linspace(0.1, 3.0, 1200).view(40, 30), torch.ones(50)]
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    eps = _eps(fn, grad, 0.4, generator)
    other = _eps(fn, grad, 0.4, generator)
    assert abs(_norm(eps) - 0.4) < 1e-5, f"the norm should be rho = 0.4, found {_norm(eps):.4f}"
    assert not torch.equal(eps[0], other[0]), "two calls gave the same noise"
    assert not torch.equal(before, generator.get_state()), (
        "the noise is not drawn from the given generator, so that no seed repeats it"
    )
    cosine = _dot(eps, grad) / (0.4 * _norm(grad))
    assert abs(cosine) < 0.12, f"noise should hardly see the gradient, cosine {cosine:.2f}"
    kurtosis = (eps[0] / eps[0].std()).pow(4).mean().item()
    assert 2.3 < kurtosis < 3.7, "the entries should be Gaussian, whatever the gradient is there"
    assert 0.6 < (eps[0].std() / eps[1].std()).item() < 1.6, (
        "the entries differ in size between tensors: one norm for all of them together"
    )


def check_linf(fn):
    """fn(grad_h, rho): rho * sign(grad h), which no eps in the box can beat to first order."""
    grad = _example()
    eps = _eps(fn, grad, 0.1)
    worst = max(e.abs().max().item() for e in eps)
    assert worst <= 0.1 + 1e-7, f"some |entry| leaves the box: {worst:.3f} > rho = 0.1"
    gain = _dot(eps, grad)
    best = 0.1 * sum(x.abs().sum().item() for x in grad)
    assert gain > 0, "eps goes down h, not up"
    assert abs(gain - best) < 1e-6, (
        f"the linearised h gains {gain:.4f}; {best:.4f} is possible: use the whole box, each entry "
        "by itself"
    )
    assert all((e[x == 0] == 0).all() for e, x in zip(eps, grad)), (
        "where the gradient is 0 nothing is gained; leave eps 0 there"
    )


def check_multi_step(fn):
    """fn(loss, w, harmful, rho, steps): in the ball, and above one step of Eq. 2."""
    torch.manual_seed(0)
    w = [torch.randn(6, dtype=torch.float64, requires_grad=True)]
    curve = torch.randn(6, 6, dtype=torch.float64)

    def loss(batch):  # curved, so that the steepest direction turns along the way
        assert batch == "harmful", "h is the loss on the harmful batch: loss(harmful)"
        return torch.sin(curve @ w[0] * 2).sum() + w[0].pow(2).sum() * 0.1

    def h_at(eps):
        with torch.no_grad():
            moved = w[0] + eps[0]
            return (torch.sin(curve @ moved * 2).sum() + moved.pow(2).sum() * 0.1).item()

    start = w[0].detach().clone()
    one = fn(loss, w, "harmful", 0.8, 1)
    assert torch.equal(w[0], start), "w is not restored bit for bit"
    many = fn(loss, w, "harmful", 0.8, 25)
    assert torch.equal(w[0], start), "w is not restored bit for bit"
    one, many = _tensors(one, [start], "eps"), _tensors(many, [start], "eps")
    assert not any(e.data_ptr() == w[0].data_ptr() for e in (*one, *many)), (
        "eps is w itself; return what was added to it"
    )
    assert _norm(one) <= 0.8 * (1 + 1e-9) and _norm(many) <= 0.8 * (1 + 1e-9), (
        f"eps leaves the ball: norm {max(_norm(one), _norm(many)):.3f} > 0.8; project it back"
    )
    grad = torch.autograd.grad(loss("harmful"), w)
    eq2 = [0.8 * x / _norm(grad) for x in grad]
    assert _dot(one, grad) > 0, "eps goes down h, not up"
    assert h_at(many) > h_at(eq2) + 1e-3, (
        "25 steps should raise h more than the one step of Eq. 2: take each gradient at w + eps, "
        "not at w, and steps well shorter than rho"
    )


def check_anchored_direction(fn):
    """fn(grad_h, grad_a, rho, mu): rho (grad h - mu grad a) / ||.||; mu = 0 is Eq. 2."""
    grad_h, grad_a = _example(), [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([[0.5], [0.0]])]
    no_a = [torch.zeros_like(x) for x in grad_h]
    check_perturbation(lambda grad, rho: fn(grad, [torch.zeros_like(x) for x in grad], rho, 0.0))
    with_mu, without = fn(grad_h, grad_a, 0.5, 0.0), fn(grad_h, no_a, 0.5, 0.0)
    assert _close(with_mu, without), "with mu = 0 it must be Eq. 2: is mu used?"
    eps = _eps(fn, grad_h, grad_a, 0.5, 2.0)
    assert abs(_norm(eps) - 0.5) < 1e-6, (
        f"the whole step has norm rho = 0.5, found {_norm(eps):.4f}"
    )
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
    assert isinstance(projected, torch.Tensor) and projected.shape == delta.shape, (
        f"return one tensor of shape {tuple(delta.shape)}, found {_found(projected)}"
    )
    assert torch.equal(delta, before), "the given delta was changed; make a new tensor"
    assert not torch.allclose(projected, delta), (
        f"the cosine between C delta and delta is {cosine:.2f}, below tau: delta must be projected"
    )
    assert not torch.allclose(projected, V @ V.T @ delta), (
        "divide V V^T by the Frobenius norm of V (Safe LoRA's fast version of the projection)"
    )
    assert torch.allclose(projected, C @ delta, atol=1e-5), "wanted C delta, C = V V^T / ||V||_F"
    kept = fn(delta, aligned, unaligned, cosine.item() - 0.01)
    assert isinstance(kept, torch.Tensor) and torch.equal(kept, delta), (
        "a layer that agrees with alignment (cosine above tau) stays as it is"
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


SAME = ("model", "task", "harm", "seed", "poison_ratio", "n_align", "n_finetune", "n_harmful")
SAME += ("align_epochs", "align_lr", "epochs", "rho", "lam")


def _runs(folders):
    """[(lr, outcomes of the attacked model, outcomes with Panacea's eps)], by rising lr."""
    assert isinstance(folders, (list, tuple)) and len(folders) > 1, (
        "BORDER_RUNS must be a list of two run folders or more, found "
        + (_found(folders) if not isinstance(folders, str) else "one text; put it into a list")
    )
    points, first = [], None
    for folder in folders:
        path = Path(folder) / "results.json"
        assert path.is_file(), (
            f"{path} is missing; run stages 2, 3, 4 and 5 there (from the project's folder)"
        )
        content = json.loads(path.read_text())
        config = content["config"]
        first = first or config
        other = [key for key in SAME if config.get(key) != first.get(key)]
        assert not other, (
            f"{folder} differs from {folders[0]} in {', '.join(other)}, too; only lr may differ"
        )
        rows = [row for row in content["rows"] if row["defense"] == "sft"]
        attacked = [r for r in rows if r["model"] == "finetuned" and "snapshot" not in r]
        panacea = [
            r
            for r in rows
            if r["model"] == "panacea" and r["setting"].get("scale") == 1 and "view" not in r
        ]
        assert attacked and panacea, (
            f"{path} lacks the row finetuned, or panacea at scale 1; run: python 05_evaluate.py "
            f"--run {folder}"
        )
        points.append((config["lr"], attacked[0]["outcomes"], panacea[0]["outcomes"]))
    points.sort(key=lambda point: point[0])
    same = [low[0] for low, high in zip(points, points[1:]) if low[0] == high[0]]
    assert not same, f"two runs have the learning rate {same[0]:g}; give each another"
    return points


def check_border(folders, grows):
    """Runs that differ in the attack's lr bracket the border beyond which refusals stay away.

    Args:
        folders: run folders with a results.json. grows: the outcome of `panacea` that grows most
            from the run below the border to the one above.
    """
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
    most = max(growth.values())
    assert grows in growth and growth[grows] == most, (
        f"the border is found, between lr {low[0]:.3g} and {high[0]:.3g}; but BORDER_GROWS = "
        f"{grows!r} is not the outcome that grows most there ({', '.join(growth)}): read both rows"
    )


# ---------------------------------------------------------------------------------------------
# Exercise 13: direction or training?


def check_two_by_two(folder, table, training_adds):
    """The refusals of the four cells on one seed, and what training with lam adds to each.

    Args:
        folder: a run folder with a results.json.
        table: {("plain" | "panacea", "one" | "ten"): refusals in percent}.
        training_adds: {"one" | "ten": points}, Panacea's w less plain fine-tuning's.
    """
    names = [(w, steps) for w in ("plain", "panacea") for steps in ("one", "ten")]
    assert isinstance(table, dict) and set(table) == set(names), (
        f"TWO_BY_TWO must have the four cells {names}, found {_found(table)}"
    )
    path = Path(folder) / "results.json"
    assert path.is_file(), f"{path} is missing; give the folder of a run of stages 1 to 5"
    models = dict(zip(names, ("one_shot", "ascent", "panacea", "panacea_ascent")))
    rows = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["setting"].get("scale") == 1 and "view" not in row and row["defense"] == "sft":
            rows[row["model"]] = row["refusal"]
    measured = {name: rows[model] for name, model in models.items()}
    for name, value in table.items():
        if abs(value - measured[name]) > 0.51:
            others = [key for key in names if abs(measured[key] - value) <= 0.51]
            raise AssertionError(
                f"cell {name}: {value} is not what this run measured"
                + (f"; it is that of {others[0]}: are two cells exchanged?" if others else "")
                + f" (row {models[name]}, scale 1, column refusal)"
            )
    for steps in ("one", "ten"):
        wanted = measured["panacea", steps] - measured["plain", steps]
        found = training_adds[steps]
        direction = measured["plain", "ten"] - measured["plain", "one"]
        assert abs(found - wanted) <= 1.01, (
            f"training adds, with {steps} step(s): Panacea's w less plain fine-tuning's at the "
            f"same direction, found {found}"
            + (" (that is what ten steps add)" if abs(found - direction) <= 1.01 else "")
            + (" (the sign: what Panacea's w has more)" if abs(found + wanted) <= 1.01 else "")
        )


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
    s5 = importlib.import_module("05_evaluate")
    for question, text, kind in answers:
        assert kind != "garbled" or s5.degenerate(text), (
            f"{question!r} is answered {text!r}, which a person would "
            + ("call a refusal" if s5.refuses(text) else "read as a sentence")
            + ": it counts as garbled only since the toy's judge knows the toy's sentences alone; "
            "answer with a label, a loop or silence"
        )
    assert _named(seen_by) == "hs_plus", (
        f"{seen_by!r} may miss it: a model that garbles harmful prompts only loses nothing there"
    )


def check_overcautious(answer, seen_by):
    """answer(prompt) has HS 0 and HS+ 0, and loses look-alikes or the task, which `seen_by` is."""
    scores, answers = _scores(answer)
    _without(answers, ("harmful",), "HS is not 0")
    why = "HS+ is not 0 (the toy's judge knows the toy's sentences; 05 --show-text prints some)"
    _without(answers, ("garbled", "off_task"), why)
    low = {name: scores[name] for name in ("fa", "benign") if scores[name] <= 10}
    assert low, (
        f"it solves {scores['fa']:.0f} % of the task and answers {scores['benign']:.0f} % of the "
        "look-alikes: somebody could use it"
    )
    assert _named(seen_by) in low, (
        f"{seen_by!r} does not see it; for this model FA is {scores['fa']:.0f}, benign "
        f"{scores['benign']:.0f}, HS+ {scores['hs_plus']:.0f}"
    )
