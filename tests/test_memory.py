"""What a 24 GB card needs: a gradient whose activations are not kept, and few copies of w."""

import pytest
import torch
from benchmark import peak_bytes

import common
from common import checkpoint_layers, collate


@pytest.fixture()
def task(s2, s4):
    """(loss, w, user's examples, harmful examples) on a small random model; lengths differ."""
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    w = s4.add_lora(model, ["all"], 4, 8)
    for x in w.values():
        torch.nn.init.normal_(x, std=0.1)
    rng = torch.Generator().manual_seed(1)

    def example(prompt, answer):
        ids = torch.randint(4, 50, (prompt + answer,), generator=rng).tolist()
        return ids, [-100] * prompt + ids[prompt:]

    sets = [[example(3 + i % 2, 1 + i) for i in range(n)] for n in (7, 5)]
    return model, (lambda batch: s4.answer_loss(model, batch)), list(w.values()), *sets


def close(first, second):
    """Two lists of gradients agree up to rounding."""
    scale = max(x.abs().max() for x in first)
    return all((x - y).abs().max() < 1e-5 * scale for x, y in zip(first, second))


def test_gradient_checkpointing_gives_the_same_gradient(s2, s4, task):
    model, loss, w, user, harmful = task
    user, harmful = collate(user, 0, "cpu"), collate(harmful, 0, "cpu")
    c = {
        "vaccine_rho": 2.0,
        "repnoise_alpha": 0.5,
        "repnoise_beta": 0.1,
        "booster_lam": 1.0,
        "booster_alpha": 0.1,
    }

    def all_rules():
        grads = [s4.panacea_rule(loss, w, user, harmful, 0.3, 0.5)[0]]
        for rule in s2.RULES.values():
            torch.manual_seed(0)
            grads.append(rule(model, w, user, harmful, c)[0])
        return grads

    plain = all_rules()
    calls = []
    checkpoint_layers(model)
    layer = model.model.layers[0]
    inner = layer.forward.args[0]
    layer.forward = common.partial(
        layer.forward.func,
        lambda *a, **k: (calls.append(1), inner(*a, **k))[1],
        use_reentrant=False,
    )
    assert all(close(x, y) for x, y in zip(plain, all_rules()))
    # eleven passes, each again going backward; but Vaccine's first stops above the first layer
    assert len(calls) == 11 + 10


@pytest.mark.slow
def test_panaceas_peak_is_plain_fine_tunings_plus_three_adapters(s2, s4):
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    w = s4.add_lora(model, ["all"], 64, 64)  # a large adapter, so that copies of it show
    adapter = sum(4 * x.numel() for x in w.values())
    c = {"weight_decay": 0.1, "lr": 1e-3, "rho": 0.1, "lam": 0.1}
    batch = collate([([1, 5, 6, 7], [-100, -100, 6, 7])] * 2, 0, "cpu")

    def plain():
        list(s2.train(model, w, s2.sft_rule, [(batch, None)] * 4, 4, 1e-3, c, "sft"))

    def ours():
        s4.train(lambda b: s4.answer_loss(model, b), w, [(batch, batch)] * 4, 4, c)

    peaks = []
    for job in (plain, plain, ours):  # the first only warms up
        for x in w.values():
            x.grad = None
        peaks.append(peak_bytes(job))
    more = (peaks[2] - peaks[1]) / adapter
    assert 1 < more < 3.1, f"{more:.2f} adapters more than plain fine-tuning"
