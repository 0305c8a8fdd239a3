"""What a GPU asks of the stages, as far as a machine without one can tell."""

import weakref

import pytest
import torch
from conftest import stage

import common


def test_the_model_has_left_when_the_judge_comes(story, monkeypatch):
    folder, out = story
    s5, s6, models = stage("05_evaluate"), stage("06_layer_analysis"), []

    class Judge(common.ToyJudge):
        def flagged(self, questions, answers):
            assert models[-1]() is None, "the model is still there"
            return super().flagged(questions, answers)

    def load_model(*args):
        model, tokenizer = common.load_model(*args)
        models.append(weakref.ref(model))
        return model, tokenizer
    for module in (s5, s6):
        monkeypatch.setattr(module, "load_model", load_model)
        monkeypatch.setattr(module, "make_judge", lambda name, data, device: Judge(data))
        monkeypatch.setattr(common.Run, "save", lambda *_, **__: {})  # leave the story as it is
        monkeypatch.setattr(common.Run, "save_json", lambda *_: None)
        monkeypatch.setattr(module, "draw", lambda *_: None)
        module.main(["--run", str(folder), "--device", "cpu",
                     *(["--only", "aligned", "finetuned"] if module is s5 else [])])
    assert len(models) == 2


@pytest.mark.parametrize("cuda, mps, wanted", [(True, True, "cuda"), (False, True, "mps"),
                                               (False, False, "cpu")])
def test_auto_prefers_cuda_then_mps(cuda, mps, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    assert common.pick_device("auto").type == wanted
    assert common.pick_device("cpu").type == "cpu"


def test_a_batch_that_does_not_fit_is_halved(tiny_data, capsys):
    data = torch.load(tiny_data / "01_data.pt", weights_only=True)
    tokenizer = common.load_tokenizer(data)
    torch.manual_seed(0)
    model, sizes = common.toy_model("toy-llama", len(data["vocab"])).eval(), []
    prompts = [row["prompt"] for row in data["test_harmful"]]
    wanted, whole = common.generate(model, tokenizer, prompts, 5), model.generate

    def generate(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(input_ids=input_ids, **options)
    model.generate = generate
    assert common.generate(model, tokenizer, prompts, 5, batch_size=8) == wanted
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert "answering 2 prompts at a time" in capsys.readouterr().err
