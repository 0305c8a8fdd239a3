"""LoRA by hand, against the formula and against its own promises."""

import pytest
import torch
from torch import nn

from common import UserError, attach, collate


@pytest.fixture()
def layer(s2):
    """A wrapped linear layer whose B is not zero any more."""
    torch.manual_seed(0)
    layer = s2.LoRALinear(nn.Linear(6, 4), r=3, alpha=12)
    nn.init.normal_(layer.lora_B)
    return layer


def test_b_of_zero_is_the_identity(s2):
    base = nn.Linear(6, 4)
    layer, x = s2.LoRALinear(base, r=3, alpha=12), torch.randn(2, 5, 6)
    assert torch.equal(layer(x), base(x)) and layer.lora_A.abs().sum() > 0
    assert layer.lora_A.abs().max() <= 6**-0.5  # Kaiming-uniform with a = sqrt(5)


def test_output_is_pefts_formula_and_merged_equals_unmerged(layer):
    x = torch.randn(2, 5, 6)
    by_formula = layer.base(x) + (12 / 3) * (x @ layer.lora_A.T) @ layer.lora_B.T
    merged = layer.base.weight + (12 / 3) * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer(x), by_formula, atol=1e-6)
    assert torch.allclose(layer(x), nn.functional.linear(x, merged, layer.base.bias), atol=1e-5)


def test_adapter_is_float32_on_a_bfloat16_base_and_rounded_once(s2):
    torch.manual_seed(0)
    layer = s2.LoRALinear(nn.Linear(6, 64, dtype=torch.bfloat16), r=2, alpha=2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 6, dtype=torch.bfloat16)
    exact = layer.base(x).float() + x.float() @ layer.lora_A.T @ layer.lora_B.T
    out = layer(x)
    assert out.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    assert ((out.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # half a step


def test_targets_are_all_but_the_head_or_those_named_and_others_are_refused(s2):
    w = s2.add_lora(s2.toy_model("toy-llama", 50), ["all"], 2, 2)
    assert len(w) == 4 * 7 * 2 and not any("lm_head" in name for name in w)
    w = s2.add_lora(s2.toy_model("toy-qwen2", 50), ["q_proj", "v_proj"], 2, 2)
    assert len(w) == 4 * 2 * 2 and all("q_proj" in n or "v_proj" in n for n in w)
    with pytest.raises(UserError, match="c_attn.*down_proj.*q_proj"):
        s2.add_lora(s2.toy_model("toy-llama", 50), ["c_attn"], 2, 2)


def batch_of(model, seed=0):
    """A random batch for a toy model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (3, 9), generator=generator).tolist()
    return collate([(x, [-100] * 4 + x[4:]) for x in ids], 0, "cpu")


def test_training_changes_the_adapter_and_no_bit_of_the_base(s2):
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    w = s2.add_lora(model, ["all"], 4, 8)
    start = s2.copy_of(w)
    batch = collate([([1, 5, 6, 7], [-100, -100, 6, 7])], 0, "cpu")
    c = {"weight_decay": 0.1}
    steps = list(s2.train(model, w, s2.sft_rule, [(batch, None)] * 3, 3, 1e-2, c, "test"))
    assert [step for step, _ in steps] == [1, 2, 3]
    after = {k.replace(".base.", "."): v for k, v in model.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(not torch.equal(start[k], w[k]) for k in w)


@pytest.mark.parametrize(
    "dtype, merged, close", [(torch.float32, True, 1e-5), (torch.bfloat16, False, 0.0)]
)
def test_attached_adapter_equals_the_wrapped_layers(s2, dtype, merged, close):
    torch.manual_seed(0)
    model = s2.toy_model("toy-gemma2", 50).to(dtype).eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batch = batch_of(model)
    plain = model(input_ids=batch["input_ids"]).logits
    w = {
        name: torch.randn(p.shape) * 0.05
        for name, p in s2.add_lora(s2.toy_model("toy-gemma2", 50), ["all"], 4, 8).items()
    }
    with attach(model, w, 8 / 4):
        attached = model(input_ids=batch["input_ids"]).logits
        same = [torch.equal(x, before[name]) for name, x in model.state_dict().items()]
        assert all(same) != merged  # in bfloat16 the weights must not take the adapter in
    with pytest.raises(ZeroDivisionError), attach(model, w, 8 / 4):
        raise ZeroDivisionError
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, plain)
    wrapped = s2.add_lora(model, ["all"], 4, 8)
    with torch.no_grad():
        for name, p in wrapped.items():
            p.copy_(w[name])
    assert torch.allclose(model(input_ids=batch["input_ids"]).logits, attached, rtol=0, atol=close)
    assert not torch.allclose(attached, plain, atol=1e-2)


def test_an_adapter_runs_beside_a_layer_that_rounds_its_own_weights(s2):
    class Ternary(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.sign().T

    torch.manual_seed(0)
    model = torch.nn.Sequential(Ternary(6, 5, bias=False))
    wrapped = s2.LoRALinear(model[0], 2, 4.0)
    torch.nn.init.normal_(wrapped.lora_B)
    x, adapter = torch.randn(3, 6), {"0.lora_A": wrapped.lora_A, "0.lora_B": wrapped.lora_B}
    wanted = wrapped(x)
    with attach(model, adapter, wrapped.scale):
        assert torch.allclose(model(x), wanted, atol=1e-5)


def test_merged_model_answers_as_the_wrapped_one_and_is_plain_again(s2):
    model = s2.toy_model("toy-llama", 40).eval()
    names = [name for name, _ in model.named_parameters()]
    w = s2.add_lora(model, ["all"], 4, 8.0)
    with torch.no_grad():
        for p in w.values():
            p.normal_(std=0.05)
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        s2.merge(model)
        after = model(input_ids=ids).logits
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.allclose(before, after, atol=1e-4) and before.std() > 0.1


def test_gradient_in_a_whole_model_is_that_of_merged_weights(s2):
    torch.manual_seed(0)
    plain, model = (s2.toy_model("toy-llama", 50).eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    batch, w = batch_of(model), s2.add_lora(model, ["all"], 4, 8)
    for p in w.values():
        nn.init.normal_(p, std=0.05)
    grads, _ = s2.gradient(lambda b: s2.answer_loss(model, b), list(w.values()), batch)
    grads = dict(zip(w, grads))
    names = [name.removesuffix(".lora_A") for name in w if name.endswith(".lora_A")]
    merged = [plain.get_submodule(name).weight for name in names]
    with torch.no_grad():
        for name, weight in zip(names, merged):
            weight.add_(8 / 4 * w[f"{name}.lora_B"] @ w[f"{name}.lora_A"])
    for name, G in zip(names, torch.autograd.grad(s2.answer_loss(plain, batch), merged)):
        A, B = w[f"{name}.lora_A"], w[f"{name}.lora_B"]  # W + 2 B A: the chain rule
        assert torch.allclose(grads[f"{name}.lora_A"], 2 * B.T @ G, rtol=1e-3, atol=1e-6), name
        assert torch.allclose(grads[f"{name}.lora_B"], 2 * G @ A.T, rtol=1e-3, atol=1e-6), name


def test_answer_loss_is_the_mean_over_answer_tokens(s2):
    torch.manual_seed(0)
    model = s2.toy_model("toy-llama", 50).eval()
    examples = [
        ([1, 5, 6, 7, 8, 2], [-100, -100, -100, 7, 8, 2]),
        ([1, 9, 10, 2], [-100, 9, 10, 2]),
    ]
    total, count = 0.0, 0
    for ids, labels in examples:  # one row at a time, no padding, all logits
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total, count = total - logp[t - 1, ids[t]].item(), count + 1
    loss = s2.answer_loss(model, collate(examples, 0, "cpu"))
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert loss.dtype == torch.float32
