"""What bites where several roles share weights: recomputation, modes, dropout, dtypes, dispatch."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from fastppo.errors import UserError
from fastppo.models.batch import make_batch
from fastppo.models.load import attention_implementation, causal_lm, disable_dropout, trunk
from fastppo.ops import linear_token_logprobs
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.rollout import Sampling, sample
from fastppo.ppo.update import Totals, clip_and_step, forward_backward, mini_batches, update
from fastppo.rm import train as reward_model
from tests.tiny import hidden_as, named, stir

KINDS = ["lora", "dora", "lora norm,lm_head", "sft with modules_to_save", "freeze", "full"]
KINDS += ["full shared", "full model", "critic other", "freeze model"]
FEW = ["lora", "lora norm,lm_head", "full", "freeze model"]


def gradients(made, batch, role):
    """Of the log-probs under the role's head, or of the value where it is the critic."""
    everything = [p for place in made.places.values() for p in place.trainable]
    for parameter in everything:
        parameter.grad = None
    with made.use(role):
        hidden_ND = batch.packing.gather(made.hidden(batch.input_ids_BT, batch.mask_BT))
        if role == "critic":
            made.value(hidden_ND).square().sum().backward()
        else:
            head = made.lm_head
            hidden_ND = hidden_ND.to(head.weight_VD.dtype)
            result = linear_token_logprobs(hidden_ND, head.weight_VD, batch.token_N)
            result.logprob_N.sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in everything]


@pytest.mark.parametrize(
    "order",
    [pytest.param(("actor", "critic"), marks=pytest.mark.slow), ("critic", "actor")],
    ids="-".join,
)
@pytest.mark.parametrize(
    "made", named(KINDS, *FEW, disable_gradient_checkpointing=False), indirect=True
)
def test_09_checkpointing_changes_no_gradient_of_any_role(made, rollout, order):
    for seed, role in enumerate(("actor", "critic")):
        stir(made.trainable_parameters(role), seed)
    batch = make_batch(rollout, range(4))
    calls = []
    made.model.get_submodule(
        next(n for n, _ in made.model.named_modules() if n.endswith("layers.1.mlp"))
    ).register_forward_pre_hook(lambda *_: calls.append(1))
    made.train()
    bases = {causal_lm(made.places[role].model) for role in order}
    found = []
    for checkpointed in (True, False):
        if not checkpointed:
            for base in bases:
                base.activation_offload.__exit__()
        calls.clear()
        found.append([gradients(made, batch, role) for role in order])
        recomputed = len(calls) > (2 if made.places["critic"].model is made.model else 1)
        assert recomputed == checkpointed
    for with_it, without in zip(*found, strict=True):
        assert any(g is not None for g in without)
        for a, b in zip(with_it, without, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(
    "made", named(["lora", "full"], disable_gradient_checkpointing=False), indirect=True
)
def test_09_the_update_ends_a_roles_backward_before_it_enters_the_next(
    made, config, rollout, experience_of
):
    """Else layers would be recomputed with the other role's adapter."""
    settings = config(vf_coef=1.0)
    trained = [p for role in ("actor", "critic") for p in made.trainable_parameters(role)]
    for seed, role in enumerate(("actor", "critic")):
        stir(made.trainable_parameters(role), seed)
    experience = experience_of(made, rollout, settings)
    (mini,) = mini_batches(experience, settings, seed=0)
    made.train()
    found = []
    for checkpointed in (True, False):
        if not checkpointed:
            for base in {causal_lm(made.places[role].model) for role in ("actor", "critic")}:
                base.activation_offload.__exit__()
        for parameter in trained:
            parameter.grad = None
        batch = make_batch(rollout, mini.rows)
        forward_backward(made, experience, batch, mini, settings, Totals())
        found.append([parameter.grad.clone() for parameter in trained])
    assert all(grad.abs().max() > 0 for grad in found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("made", named(KINDS, *FEW), indirect=True)
def test_one_update_moves_both_trained_roles_and_nothing_else(made, config, rollout, experience_of):
    settings = config(vf_coef=1.0)
    for seed, role in enumerate(("actor", "critic")):
        stir(made.trainable_parameters(role), seed)
    everything = {
        p: p.detach().clone() for place in made.places.values() for p in parameters_of(place)
    }
    experience = experience_of(made, rollout, settings)
    update(made, experience, settings, make_optimizer(settings, made), seed=0)
    moved = {p for p, before in everything.items() if not torch.equal(p, before)}
    trained = {p for role in ("actor", "critic") for p in made.trainable_parameters(role)}
    assert moved <= trained
    for role in ("actor", "critic"):
        own = [p for p in made.trainable_parameters(role) if p in everything]
        assert not own or sum(p in moved for p in own) > 0.9 * len(own)


def parameters_of(place):
    return list(place.model.parameters())


@pytest.mark.parametrize("made", named(["lora", "full"]), indirect=True)
def test_sampling_keeps_its_kv_cache_after_an_update_with_checkpointing(
    made, template, tokenizer, rollout
):
    """In training mode with checkpointing transformers drops the cache: whole rows again."""
    made.train()
    widths = []
    made.trunk.register_forward_pre_hook(
        lambda _m, _a, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with made.use("actor"):
        sample(
            made,
            rollout.prompts,
            sampling=Sampling(max_new_tokens=5, min_new_tokens=5),
            template=template,
            tokenizer=tokenizer,
            seed=0,
        )
    prompts = [len(prompt.ids) for prompt in rollout.prompts]
    assert widths == [1, *prompts, 1, 1, 1, 1]  # the first asks what the cache is


def test_generation_is_given_every_sampling_field(tiny_roles, template, tokenizer, rollout):
    """transformers fills what is unset from the model's own file; none of these may arrive."""
    made = tiny_roles()
    fields = {"typical_p": 0.2, "min_p": 0.5, "epsilon_cutoff": 0.3, "eta_cutoff": 0.3}
    fields |= {"no_repeat_ngram_size": 1, "repetition_penalty": 1.9, "top_k": 2, "top_p": 0.1}
    fields |= {"temperature": 0.1, "bad_words_ids": [[70]], "suppress_tokens": [71, 72]}
    fields |= {
        "forced_eos_token_id": 7,
        "min_new_tokens": 7,
        "exponential_decay_length_penalty": (1, 9.0),
    }
    texts = []
    for own in ({}, fields):
        made.base.generation_config = GenerationConfig(do_sample=True, **own)
        with made.use("actor"):
            texts.append(
                sample(
                    made,
                    rollout.prompts,
                    sampling=Sampling(max_new_tokens=8),
                    template=template,
                    tokenizer=tokenizer,
                    seed=3,
                ).input_ids_BT
            )
    assert torch.equal(*texts)


def test_layers_below_the_lowest_adapter_are_not_recomputed(tiny_roles, rollout):
    """What enable_input_require_grads would do, and non-reentrant checkpointing does not need."""
    made = tiny_roles(lora_layers=1, disable_gradient_checkpointing=False)
    batch = make_batch(rollout, range(4))
    calls = {0: 0, 1: 0}
    for layer in calls:
        made.trunk.layers[layer].mlp.register_forward_pre_hook(
            lambda *_, layer=layer: calls.update({layer: calls[layer] + 1})
        )
    made.train()
    gradients(made, batch, "actor")
    assert calls == {0: 1, 1: 2}


def tiny(kind):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    if kind == "gpt2":  # modules: resid, embd and attn
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=64, n_embd=16, n_head=2, n_layer=2, n_positions=64, attn_pdrop=0.5
            )
        )
    if kind == "opt":  # functional, by attribute, and whole layers
        return OPTForCausalLM(
            OPTConfig(
                **sizes, ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5,
                attention_dropout=0.5,
            )
        )  # fmt: skip
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**sizes, intermediate_size=32, attention_dropout=0.5, hidden_dropout=0.5)
    )


@pytest.mark.parametrize("kind", ["gpt2", "opt", "neox"])
def test_08_no_kind_of_dropout_survives(kind):
    torch.manual_seed(0)
    model = tiny(kind).train()
    ids = torch.arange(12)[None]

    def twice():
        return [trunk(model)(input_ids=ids).last_hidden_state for _ in range(2)]

    assert not torch.equal(*twice())
    disable_dropout(model)
    assert torch.equal(*twice())


class Products(TorchDispatchMode):
    """The dtypes and shapes of every matrix product, forward and backward."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"):
            tensors = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.found.append((name, tensors[0].dtype, tuple(tensors[0].shape), tensors[1].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "made",
    [
        *named(KINDS, *FEW, bf16=True, disable_gradient_checkpointing=False),
        *named(["lora"], fp16=True, disable_gradient_checkpointing=False),
        *named(["full shared"], "none", fp16=True, disable_gradient_checkpointing=False),
    ],
    indirect=True,
)
def test_in_16_bits_no_layer_multiplies_in_float32(made, rollout):
    """PEFT's adapters, modules_to_save and all that trains are float32; their GEMMs are not."""
    batch = make_batch(rollout, range(4))
    made.train()
    with Products() as products:
        for role in ("actor", "critic"):
            gradients(made, batch, role)
        with torch.no_grad():
            hidden_as(made, "reference", batch)
    assert len(products.found) > 40
    # The value head is float32 on purpose, one output wide; RoPE's angles are a product too.
    wide = [
        (name, left, right)
        for name, dtype, left, right in products.found
        if dtype == torch.float32 and 1 not in (*left[-2:], *right[-2:])
    ]
    assert not wide


def test_a_reward_adapter_is_frozen_in_the_bases_dtype_and_what_trains_is_not(
    tiny_roles, reward_dir
):
    made = tiny_roles(bf16=True, reward_model_type="lora", reward_model=str(reward_dir))
    dtypes = {"default": torch.float32, "critic": torch.float32, "reward": torch.bfloat16}
    for name, parameter in made.model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == dtypes[name.split(".")[-2]], name
    assert made.reward_heads["reward"].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("flash_attn", "device", "half", "installed", "expected"),
    [
        ("auto", "cuda", torch.bfloat16, True, "flash_attention_2"),
        ("auto", "cuda", torch.float16, True, "flash_attention_2"),
        ("auto", "cuda", torch.float32, True, None),  # flash-attn has no float32
        ("auto", "cuda", torch.bfloat16, False, None),
        ("auto", "cpu", torch.bfloat16, True, None),
        ("sdpa", "cuda", torch.bfloat16, True, "sdpa"),
        ("disabled", "cuda", torch.bfloat16, True, "eager"),
        ("fa2", "cuda", torch.bfloat16, True, "flash_attention_2"),
    ],
)
def test_flash_attn_auto_takes_fa2_where_it_can_run(
    monkeypatch, flash_attn, device, half, installed, expected
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert attention_implementation(flash_attn, torch.device(device), half) == expected


def test_flash_attn_is_not_for_gpus_before_ampere(monkeypatch):
    """Those that need fp16: a T4 with flash-attn installed would fail in its first pass."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert attention_implementation("auto", torch.device("cuda"), torch.float16) is None
    with pytest.raises(UserError, match="fa2 needs a GPU of Ampere or later; use auto"):
        attention_implementation("fa2", torch.device("cuda"), torch.float16)


def test_flash_attn_fa2_where_it_cannot_run_is_refused():
    with pytest.raises(UserError, match="fa2 needs a CUDA device"):
        attention_implementation("fa2", torch.device("cpu"), torch.bfloat16)
    with pytest.raises(UserError, match="fa2 computes in 16 bits; set bf16: true"):
        attention_implementation("fa2", torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(("asked", "runs"), [("auto", "sdpa"), ("disabled", "eager")])
def test_the_attention_that_runs_is_the_one_asked_for(tiny_roles, asked, runs):
    assert tiny_roles(flash_attn=asked).base.config._attn_implementation == runs


def test_loraplus_gives_b_matrices_a_rate_of_their_own_and_clips_by_role(tiny_roles, config):
    settings = config(loraplus_lr_ratio=16.0, learning_rate=1e-4, critic_learning_rate=1e-3)
    made = tiny_roles(loraplus_lr_ratio=16.0)
    optimizer = make_optimizer(settings, made)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in made.model.named_parameters():
        for adapter, rate in (("default", 1e-4), ("critic", 1e-3)):
            if f".{adapter}." in name:
                factor = 16.0 if "lora_B" in name else 1.0
                assert rates[parameter] == pytest.approx(rate * factor), name
    assert rates[made.critic_head.weight] == 1e-3
    assert len(rates) == sum(len(made.trainable_parameters(r)) for r in ("actor", "critic"))
    for parameter in rates:
        parameter.grad = torch.ones_like(parameter)
    norms, _ = clip_and_step(optimizer, settings.max_grad_norm, torch.tensor(True))
    for role in ("actor", "critic"):
        own = made.trainable_parameters(role)
        count = sum(p.numel() for p in own)
        assert norms[role].item() == pytest.approx(count**0.5, rel=1e-4)
        assert torch.cat([p.grad.flatten() for p in own]).norm().item() == pytest.approx(
            1.0, rel=1e-4
        )


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_loraplus_has_no_group_of_nothing(tiny_roles, config, advantage):
    changes = {"loraplus_lr_ratio": 4.0, "advantage": advantage, "num_generations": 2}
    optimizer = make_optimizer(config(**changes), tiny_roles(**changes))
    roles = [group["role"] for group in optimizer.param_groups]
    assert roles == ["actor", "actor", "critic", "critic"][: 4 if advantage == "gae" else 2]
    assert all(group["params"] for group in optimizer.param_groups)


def test_loraplus_in_stage_rm_is_the_optimiser_and_weight_decay_asked_for(config):
    rm = {"stage": "rm", "loraplus_lr_ratio": 4.0, "weight_decay": 0.1, "learning_rate": 1e-3}
    settings = config(**rm, optim="adamw_torch_fused", adam_epsilon=1e-7)
    model = reward_model.load_trainable_model(settings, torch.device("cpu"))
    optimizer = reward_model.lora_plus(settings, model)
    assert optimizer.defaults["fused"]
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["eps"] == 1e-7
        for parameter in group["params"]:
            assert group["weight_decay"] == 0.1
            expected = 4e-3 if "lora_B" in names[parameter] else 1e-3
            assert group["lr"] == pytest.approx(expected)
