"""What a GPU asks of the stages, as far as a machine without one can tell."""

import weakref

import torch
from conftest import stage

import common


def test_the_model_has_left_when_the_judge_comes(story, monkeypatch):
    folder, out = story
    s5, s6, models = stage("05_evaluate"), stage("06_layer_analysis"), []

    class Judge(common.PotionJudge):
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
        monkeypatch.setattr(module, "draw", lambda *_, **__: None)
        module.main(
            [
                "--run",
                str(folder),
                "--device",
                "cpu",
                *(["--only", "aligned", "finetuned"] if module is s5 else []),
            ]
        )
    assert len(models) == 2


def test_auto_takes_the_accelerator_that_torch_finds(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    for found, wanted in (
        (torch.device("cuda"), "cuda"),
        (torch.device("mps"), "mps"),
        (None, "cpu"),
    ):
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available, found=found: found
        )
        assert common.pick_device("auto").type == wanted
        assert common.pick_device("cpu").type == "cpu"
