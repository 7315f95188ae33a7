"""Loading a model changes nothing but that model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from fastppo import toy
from fastppo.models.load import load_base


def test_threads_that_load_at_once_leave_embeddings_tied(config, tmp_path, monkeypatch):
    """transformers has another `tie_weights` in place of its own while it makes a model.

    The first load ends here while the second is at it, where both may have replaced that function;
    the second would then put back the first's.
    """
    monkeypatch.setattr(PreTrainedModel, "tie_weights", PreTrainedModel.tie_weights)
    toy.write_model(tmp_path / "tied", tie_word_embeddings=True)
    settings = config(model_name_or_path=str(tmp_path / "tied"))
    both_load, one_has_loaded, begun = Event(), Event(), []
    own = LlamaForCausalLM.__init__

    def make(self, *args, **kwargs):
        begun.append(self)
        if len(begun) == 1:
            both_load.wait(0.3)  # which they do not, where one waits for the other
        else:
            both_load.set()
            one_has_loaded.wait(60)
        own(self, *args, **kwargs)

    def load(_):
        model = load_base(settings, torch.device("cpu"))
        one_has_loaded.set()
        return model

    monkeypatch.setattr(LlamaForCausalLM, "__init__", make)
    with ThreadPoolExecutor(2) as threads:
        models = list(threads.map(load, range(2)))
    for model in [*models, load(None)]:
        assert model.lm_head.weight is model.model.embed_tokens.weight
