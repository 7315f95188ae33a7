"""How responses are sampled: together or alone, merged or not, in groups, to every stop."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastppo.errors import UserError
from fastppo.models.lora import (
    active_layers,
    merge_active_adapters,
    merge_is_exact,
    merged_weight_bytes,
)
from fastppo.ops.decoder_layer import DecoderLayer
from fastppo.ops.few_rows import FewRows
from fastppo.ops.native_library import OBSTACLE
from fastppo.ppo import sampler, trainer
from fastppo.ppo.rollout import (
    cache_budget,
    cache_bytes,
    number_of_slots,
    sample,
    should_merge_adapter,
)
from fastppo.ppo.row_batches import split_prompts
from fastppo.ppo.sampling import Sampling
from fastppo.templates import get_template
from fastppo.types import Prompt
from tests.tiers import slow_unless

TEXTS = ["Hi", "What is rain?", "A line on tea, please.", "Tell me of the sea and of bread."]


@pytest.fixture
def answer(template, tokenizer):
    """Responses to texts, as (ids, log-probs) by row."""

    def make(made, texts=tuple(TEXTS), seed=0, role="actor", own=template, **settings):
        prompts = [
            Prompt(own.encode_prompt([{"role": "user", "content": text}], ""), text)
            for text in texts
        ]
        chosen = Sampling(**{"max_new_tokens": 8, "do_sample": False, **settings})
        with made.use(role):
            found = sample(
                made, prompts, sampling=chosen, template=own, tokenizer=tokenizer, seed=seed
            )
        rows = zip(found.input_ids_BT, found.prompt_lengths, found.lengths, strict=True)
        ids = [row[p:n].tolist() for row, p, n in rows]
        return ids, found.sampler_logprob_N.split(found.response_lengths), found

    return make


@pytest.mark.parametrize(
    ("role", "merge"),
    slow_unless(
        lambda role, merge: merge == (role == "actor"),
        product(["actor", "reference"], [False, True]),
    ),
)
def test_greedy_generation_is_the_same_alone_and_in_a_batch(tiny_roles, answer, merge, role):
    made = tiny_roles()
    together, _, _ = answer(made, role=role, merge_adapter=merge, max_new_tokens=24)
    alone = [
        answer(made, [text], role=role, merge_adapter=merge, max_new_tokens=24)[0][0]
        for text in TEXTS
    ]
    assert together == alone
    assert len({tuple(ids) for ids in together}) > 1


@pytest.mark.skipif(OBSTACLE is not None, reason=f"no native kernels: {OBSTACLE}")
def test_every_layer_of_a_step_of_decoding_reads_its_weight_once(tiny_roles, answer, monkeypatch):
    """Merged, so that adapters are no layers of their own."""
    made, rows, linear, layer = tiny_roles(), [], FewRows.__call__, DecoderLayer.__call__
    made.one_token_cache()

    def counted(self, x):
        if x.shape[1] == 1:
            rows.append(x.shape[0])
        return linear(self, x)

    def counted_layer(self, x, *others):
        rows.extend([x.shape[0]] * 7)
        return layer(self, x, *others)

    answer(made, merge_adapter=True)  # the first time a layer's own code runs too
    monkeypatch.setattr(FewRows, "__call__", counted)
    monkeypatch.setattr(DecoderLayer, "__call__", counted_layer)
    ids, logprobs, _ = answer(made, merge_adapter=True)
    # Seven of a layer, and the head.
    layers = 7 * made.base.config.num_hidden_layers + 1
    steps = [sum(len(row) > step for row in ids) for step in range(1, max(map(len, ids)))]
    heads = [1] * len(TEXTS)  # after each prompt
    assert rows == heads + [active for active in steps for _ in range(layers)]
    assert not any("forward" in vars(m) for m in made.base.modules() if type(m) is torch.nn.Linear)
    monkeypatch.setattr(FewRows, "suits", lambda *_: False)
    monkeypatch.setattr(DecoderLayer, "suits", lambda *_: False)
    plain, plain_logprobs, _ = answer(made, merge_adapter=True)
    assert ids == plain
    for a, b in zip(logprobs, plain_logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(OBSTACLE is not None, reason=f"no native kernels: {OBSTACLE}")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"disable_gradient_checkpointing": True},
        {"disable_gradient_checkpointing": True, "activation_offloading": "offload"},
        {"activation_offloading": "checkpoint+offload", "critic": "shared"},
        {"lora_layers": 1},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "critic": "shared"},
    ],
    ids=lambda changes: ", ".join(changes) or "defaults",
)
def test_a_run_samples_by_the_native_layers_however_it_trains(state, monkeypatch, changes):
    """What keeps, drops or moves a layer's activations is in its forward, also without gradient."""
    counts, layer, step = {"layers": 0, "steps": 0}, DecoderLayer.__call__, sampler.Forward.step

    def counted(name, original):
        def call(*given):
            counts[name] += 1
            return original(*given)

        return call

    monkeypatch.setattr(DecoderLayer, "__call__", counted("layers", layer))
    monkeypatch.setattr(sampler.Forward, "step", counted("steps", step))
    run = trainer.step_update(state(**{"disable_gradient_checkpointing": False, **changes}))
    assert counts["steps"] > 1
    # In the first step a layer is run once more, to be compared with its own code.
    layers = run.roles.base.config.num_hidden_layers
    assert counts["layers"] == (counts["steps"] + 1) * layers


@pytest.mark.skipif(OBSTACLE is not None, reason=f"no native kernels: {OBSTACLE}")
def test_a_layer_that_computes_otherwise_keeps_its_own_code(tiny_roles, answer, monkeypatch):
    """As Granite's, whose modules have the same names and whose residuals have a factor."""
    made = tiny_roles()
    first = made.base.model.layers[0]
    own = type(first).forward

    def scaled(self, hidden_states, **others):
        return own(self, hidden_states, **others) * (0.5 if self is first else 1.0)

    monkeypatch.setattr(type(first), "forward", scaled)
    found, native = [], DecoderLayer.__call__
    monkeypatch.setattr(
        DecoderLayer, "__call__", lambda self, *given: found.append(self) or native(self, *given)
    )
    ids, logprobs, _ = answer(made, merge_adapter=True)
    steps = max(map(len, ids)) - 1
    calls = [found.count(layer) for layer in dict.fromkeys(found)]
    others = made.base.config.num_hidden_layers - 1
    assert calls == [1] + [steps + 1] * others  # the first layer was tried once
    monkeypatch.setattr(DecoderLayer, "suits", lambda *_: False)
    plain, plain_logprobs, _ = answer(made, merge_adapter=True)
    assert ids == plain
    for a, b in zip(logprobs, plain_logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_small_cache_takes_few_prompts_at_a_time_and_changes_no_answer(
    tiny_roles, answer, rows, monkeypatch
):
    made = tiny_roles()
    whole, logprobs, found = answer(made, do_sample=True)
    monkeypatch.setattr(sampler, "SLACK", 3)
    width = max(found.prompt_lengths) + 8 + 3
    room = rows * width * cache_bytes(made) / 2**30
    calls = []
    made.base.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    fewer, fewer_logprobs, again = answer(made, kv_cache_gib=room, do_sample=True)
    assert max(batch for batch, tokens in calls if tokens == 1) == rows
    assert fewer == whole
    assert again.texts == found.texts
    for a, b in zip(fewer_logprobs, logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_slots_are_as_many_as_the_budget_has_whole_rows_for(monkeypatch):
    monkeypatch.setattr(sampler, "SLACK", 4)
    prompts = [Prompt([1] * n, "") for n in (50, 10, 40, 12)]
    wide = 60 + 4  # the longest prompt, its response, and room for rows that enter later
    assert number_of_slots(prompts, 10, 2, float("inf")) == 4
    assert number_of_slots(prompts, 10, 2, float("inf"), most=3) == 3
    assert number_of_slots(prompts, 10, 2, 4 * 60 * 2) == 4  # none enters later
    assert number_of_slots(prompts, 10, 2, 4 * 60 * 2 - 1) == 4 * 60 // wide
    assert number_of_slots(prompts, 10, 2, 2 * wide * 2) == 2
    assert number_of_slots(prompts, 10, 2, 2 * wide * 2, most=2) == 2
    assert number_of_slots(prompts, 10, 2, 2 * wide * 2 - 1, most=2) == 1
    assert number_of_slots(prompts, 10, 2, 1.0) == 1


def test_prompts_are_split_by_bytes_similar_lengths_together():
    prompts = [Prompt([1] * n, "") for n in (50, 10, 40, 12)]
    assert split_prompts(prompts, 10, 2, float("inf")) == [[0, 1, 2, 3]]
    assert split_prompts(prompts, 10, 2, 100.0) == [
        [1, 3],
        [2],
        [0],
    ]  # 2 x 22 x 2 is within, 3 x 50 x 2 not
    assert split_prompts(prompts, 10, 2, 1.0) == [[1], [3], [2], [0]]


def test_the_cache_is_counted_as_it_is(tiny_roles):
    """Keys and values of a token, by what transformers' own cache holds after a forward."""
    made = tiny_roles()
    cache = made.base(torch.ones(2, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 2 * 5 * cache_bytes(made)


def test_a_cpu_has_no_limit_and_a_gpu_what_weights_and_optimiser_leave(tiny_roles, monkeypatch):
    made = tiny_roles()
    assert cache_budget(made, Sampling(8)) == float("inf")
    assert cache_budget(made, Sampling(8, kv_cache_gib=0.5)) == 2**29
    made.device = torch.device("cuda")
    properties = type("Properties", (), {"total_memory": 24 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert 0.79 < cache_budget(made, Sampling(8)) / (22.75 * 2**30) < 0.8
    assert should_merge_adapter(made, Sampling(8))  # float32, and the copies are small


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_merged_weights_sample_what_the_adapters_say(tiny_roles, answer, changes):
    made = tiny_roles(**changes)
    plain, plain_logprobs, _ = answer(made, merge_adapter=False)
    fast, fast_logprobs, _ = answer(made, merge_adapter=True)
    assert fast == plain
    for a, b in zip(fast_logprobs, plain_logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert answer(made, role="reference", merge_adapter=True)[0] != fast  # nothing stayed merged


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}])
def test_after_a_rollout_every_weight_is_as_it_was_to_the_bit(tiny_roles, answer, changes):
    made = tiny_roles(**changes)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in made.model.named_parameters()}
    flags = {name: p.requires_grad for name, p in made.model.named_parameters()}
    for seed in range(3):
        answer(made, merge_adapter=True, do_sample=True, seed=seed)
    for name, parameter in made.model.named_parameters():
        place, value = before[name]
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == flags[name]
    assert all(not layer.merged for layer in active_layers(made.model))


def test_a_rollout_that_fails_leaves_nothing_merged(tiny_roles):
    made = tiny_roles()
    layers = active_layers(made.base)
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    assert layers

    def fail():
        with merge_active_adapters(made.base):
            assert all(layer.merged for layer in layers)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    for layer, weight in zip(layers, before, strict=True):
        assert not layer.merged
        assert torch.equal(layer.get_base_layer().weight, weight)


def test_weights_are_merged_where_nothing_is_lost_and_the_copies_fit(tiny_roles, monkeypatch):
    made = tiny_roles()
    weights = sum(layer.get_base_layer().weight.nbytes for layer in active_layers(made.base))
    assert merged_weight_bytes(made.base) == weights > 0
    assert should_merge_adapter(made, Sampling(8))
    assert not should_merge_adapter(made, Sampling(8, merge_adapter=False))
    memory = type("Memory", (), {"total": 4 * weights - 1})
    monkeypatch.setattr("fastppo.ppo.rollout.psutil.virtual_memory", lambda: memory)
    assert not should_merge_adapter(made, Sampling(8))
    monkeypatch.undo()
    with made.use("reference"):
        assert not should_merge_adapter(made, Sampling(8))  # there is nothing to merge
    made.model.to(torch.bfloat16)
    assert not merge_is_exact(made.base)
    assert not should_merge_adapter(made, Sampling(8))
    assert should_merge_adapter(made, Sampling(8, merge_adapter=True))  # asked for


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"finetuning_type": "full"}, "finetuning_type: full has no adapter to merge"),
        ({"quantization_bit": 4}, "quantised weights take no merge"),
    ],
)
def test_a_merge_that_cannot_be_is_refused(config, changes, said):
    with pytest.raises(ValueError, match=f"rollout_merge_adapter: {said}.*leave it"):
        config(rollout_merge_adapter=True, critic="shared", **changes)


def test_bf16_rounds_away_the_small_changes_of_a_new_adapter():
    """Why merging is not the default there: an addition of 1/1000 is gone."""
    weight = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    assert torch.equal(weight + torch.full_like(weight, 1e-3), weight)


def test_a_static_cache_changes_no_answer(tiny_roles, answer):
    made = tiny_roles()
    assert answer(made, cache_implementation="static")[0] == answer(made)[0]


def test_a_static_cache_is_refused_where_nothing_compiles_it(config):
    sampling = Sampling.of(config(cache_implementation="static"))
    with pytest.raises(UserError, match=r"cache_implementation: static .* leave it out"):
        sampling.check(torch.device("cpu"))
    sampling.check(torch.device("cuda"))


def test_a_stop_that_is_no_token_ends_a_response_as_a_string(tiny_roles, answer, tokenizer):
    """The greedy answer is cut behind the token that completes it, and counts as ended."""
    made = tiny_roles()
    own = get_template("chatml", tokenizer)
    assert own.stop_strings == ()
    texts = ["Hi", "What is rain?"]
    plain, _, _ = answer(made, texts, own=own, max_new_tokens=24)
    assert len(plain[0]) == 24
    text = tokenizer.decode(plain[0])
    wanted = next(c for c in text[2:] if c.isascii() and c.isalnum() and c not in text[:2])
    own.stop_strings = (wanted,)
    cut, _, found = answer(made, texts, own=own, max_new_tokens=24)
    for ids, whole, ended in zip(cut, plain, found.terminated, strict=True):
        assert ids == whole[: len(ids)]
        assert wanted not in tokenizer.decode(ids[:-1])
        assert ended == (wanted in tokenizer.decode(ids) or ids[-1] in own.stop_ids)
    assert found.terminated[0]
    assert 2 < len(cut[0]) < 24


def test_a_template_keeps_the_stops_that_its_tokenizer_has_not(tokenizer, monkeypatch):
    from fastppo.templates import formats

    slots = formats.TEMPLATES["chatml"]
    changed = type(slots)(**{**slots.__dict__, "stop": (*slots.stop, "<|nobody_has_this|>")})
    monkeypatch.setitem(formats.TEMPLATES, "chatml", changed)
    made = get_template("chatml", tokenizer)
    assert made.stop_strings == ("<|nobody_has_this|>",)
    assert made.eos_id in made.stop_ids
