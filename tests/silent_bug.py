"""Exercise 9: a training loop that runs, converges, and is wrong. Read its log, not its code.

Run: python tests/silent_bug.py
"""

import torch


def _next_step(loss, w, batch, harmful, rho, lam):
    grads, h = {}, {}
    for name, data in (("g", batch), ("h", harmful)):
        h[name] = loss(data)
        grads[name] = torch.autograd.grad(h[name], w)
    norm = torch.sqrt(sum(x.pow(2).sum() for x in grads["h"]))
    with torch.no_grad():
        for x, y in zip(w, grads["h"]):
            x.add_(rho * y / norm)
    h["h_eps"] = loss(harmful)
    grads["h_eps"] = torch.autograd.grad(h["h_eps"], w)
    with torch.no_grad():
        for x, g, y, y_eps in zip(w, grads["g"], grads["h"], grads["h_eps"]):
            x.sub_(0.05 * (g - lam * (y_eps - y)))
    return {k: v.item() for k, v in h.items()} | {"eps_norm": rho}


def buggy_log(steps=10):
    """The log of `steps` steps: a list of {"step", "g", "h", "h_eps", "eps_norm"}."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y, z = x @ torch.randn(8, generator=generator), x @ torch.randn(8, generator=generator)
    w = [torch.zeros(8, requires_grad=True), torch.zeros(1, requires_grad=True)]

    def loss(target):
        return ((x @ w[0] + w[1] - target) ** 2).mean()

    return [{"step": step, **_next_step(loss, w, y, z, 0.3, 0.05)} for step in range(1, steps + 1)]


if __name__ == "__main__":
    for entry in buggy_log():
        print(
            "  ".join(f"{k} {v:7.3f}" if k != "step" else f"step {v:3d}" for k, v in entry.items())
        )
