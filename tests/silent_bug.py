"""Exercise 9: a training loop that runs, and is wrong. Read its log, not its code.

Run: python tests/silent_bug.py             the log of the loop with the bug
     python tests/silent_bug.py --sound     the log of the same loop without it, to compare

rho is 0.3. `first_order` is rho * ||grad h(w)||: what h(w + eps) - h(w) is for a small eps of
Eq. 2; h is curved upwards here, so that the true difference is somewhat larger.
"""

import sys

import torch

RHO, LAM, LR = 0.3, 0.05, 0.05


def _norm(tensors):
    return torch.sqrt(sum(x.pow(2).sum() for x in tensors))


def _next_step(loss, w, batch, harmful, sound):
    """One step of plain gradient descent by Eq. 3, in place; its line of the log."""
    g, h = loss(batch), loss(harmful)
    grad_g, grad_h = torch.autograd.grad(g, w), torch.autograd.grad(h, w)
    before = [x.detach().clone() for x in w]
    eps = [RHO * y / _norm(grad_h) for y in grad_h]
    with torch.no_grad():
        for x, e in zip(w, eps):
            x.add_(e)
    h_eps = loss(harmful)
    grad_h_eps = torch.autograd.grad(h_eps, w)
    with torch.no_grad():
        for x, old, from_g, from_h, from_h_eps in zip(w, before, grad_g, grad_h, grad_h_eps):
            if sound:
                x.copy_(old)
            x.sub_(LR * (from_g - LAM * (from_h_eps - from_h)))
    entry = {"g": g, "h": h, "h_eps": h_eps, "eps_norm": _norm(eps)}
    entry["first_order"] = RHO * _norm(grad_h)
    return {name: value.item() for name, value in entry.items()}


def log_of(steps=10, sound=False):
    """A list of {"step", "g", "h", "h_eps", "eps_norm", "first_order"}, one for each step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y, z = x @ torch.randn(8, generator=generator), x @ torch.randn(8, generator=generator)
    w = [torch.zeros(8, requires_grad=True), torch.zeros(1, requires_grad=True)]

    def loss(target):
        return ((x @ w[0] + w[1] - target) ** 2).mean()

    return [{"step": step, **_next_step(loss, w, y, z, sound)} for step in range(1, steps + 1)]


if __name__ == "__main__":
    for entry in log_of(sound="--sound" in sys.argv[1:]):
        numbers = [f"{name} {value:.3f}" for name, value in entry.items() if name != "step"]
        print(f"step {entry['step']:2d}  " + "  ".join(f"{text:>17}" for text in numbers))
