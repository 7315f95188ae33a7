"""Continuous batching against transformers' generate, and a row against itself alone."""

from __future__ import annotations

import functools
import random
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from fastppo.models.roles import Place, Roles
from fastppo.ops.native_library import OBSTACLE
from fastppo.ppo import cpu_layers
from fastppo.ppo import sampler as sampler_module
from fastppo.ppo.cpu_layers import use_cpu_layers
from fastppo.ppo.rollout import cache_bytes, row_batch_note, sample
from fastppo.ppo.sampler import Row, Sampler
from fastppo.ppo.sampling import Draws, Sampling, Stops
from fastppo.ppo.slots import SlotCache, windows_of
from fastppo.types import Prompt
from tests import zoo
from tests.tiers import slow_unless

TEMPLATE: Any = SimpleNamespace(stop_ids=(), stop_strings=(), pad_id=zoo.TOKENIZER.pad_token_id)
LENGTHS = (3, 17, 9, 30, 1)  # shorter and longer than the windows of 8 tokens
NEW = 12
# Models with more than keys and values in their caches: they run in row batches.
OTHERS: dict[str, tuple[type, dict[str, Any]]] = {
    "mamba": (
        hf.MambaConfig,
        {**zoo.IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "lfm2": (
        hf.Lfm2Config,
        {**zoo.GROUPED, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    ),
}


def roles_of(config: Any) -> Roles:
    """A model of this configuration in the actor's place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    place = Place(model, None, "a model")
    return Roles({"actor": place, "reference": place}, {}, None, torch.device("cpu"), None)


def prompts_of(lengths=LENGTHS) -> list[Prompt]:
    numbers = random.Random(0)
    return [Prompt([numbers.randrange(30, 90) for _ in range(n)], "") for n in lengths]


def generated(roles: Roles, prompt: Prompt, new: int = NEW) -> tuple[list[int], torch.Tensor]:
    """transformers' own greedy response to one prompt, and its tokens' log-probs."""
    base: Any = roles.base
    base.generation_config = GenerationConfig(do_sample=False)
    with torch.no_grad():
        out = base.generate(
            torch.tensor([prompt.ids]),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    ids = out.sequences[0, len(prompt.ids) :].tolist()
    logits = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
    return ids, logits.gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def sampled(roles: Roles, prompts: list[Prompt], most: int | None = None, **settings: Any):
    """Responses and their log-probs, by row."""
    found = sample(
        roles,
        prompts,
        sampling=Sampling(**{"max_new_tokens": NEW, "do_sample": False, **settings}),
        template=TEMPLATE,
        tokenizer=zoo.TOKENIZER,
        seed=5,
        budgets=None if most is None else SimpleNamespace(generation_batch=most),
    )
    rows = zip(found.input_ids_BT, found.prompt_lengths, found.lengths, strict=True)
    ids = [row[p:n].tolist() for row, p, n in rows]
    return ids, found.sampler_logprob_N.split(found.response_lengths), found.terminated


@pytest.mark.parametrize(
    ("family", "native"),
    slow_unless(
        lambda family, native: family in (zoo.KINDS if native else ("llama", "gemma2")),
        product(zoo.FAMILIES, [True, False]),
    ),
    ids=lambda value: {True: "native", False: "own"}.get(value, value),
)
def test_greedy_tokens_are_those_of_generate_in_every_family(family, native, monkeypatch):
    """Five prompts in three slots: rows leave and enter, and the cache is moved back."""
    monkeypatch.setattr(sampler_module, "SLACK", 3)
    if not native:
        monkeypatch.setattr(sampler_module, "can_run", lambda *_: False)
    roles = roles_of(zoo.config_of(family))
    prompts = prompts_of()
    assert windows_of(roles.one_token_cache()) is not None
    ids, logprobs, _ = sampled(roles, prompts, most=3)
    for prompt, own, logprob in zip(prompts, ids, logprobs, strict=True):
        wanted, wanted_logprob = generated(roles, prompt)
        assert own == wanted
        torch.testing.assert_close(logprob, wanted_logprob, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_with_other_states_runs_in_row_batches(kind):
    config, settings = OTHERS[kind]
    roles = roles_of(config(**settings))
    assert windows_of(roles.one_token_cache()) is None
    assert "sampled in batches" in row_batch_note(roles)
    assert cache_bytes(roles) >= 0
    prompts = prompts_of((3, 5, 2))
    ids, logprobs, _ = sampled(roles, prompts, most=1)
    for prompt, own, logprob in zip(prompts, ids, logprobs, strict=True):
        wanted, wanted_logprob = generated(roles, prompt)
        assert own == wanted
        torch.testing.assert_close(logprob, wanted_logprob, atol=2e-4, rtol=2e-4)


@pytest.fixture(scope="module")
def llama() -> Roles:
    return roles_of(zoo.config_of("llama"))


@pytest.mark.skipif(OBSTACLE is not None, reason=f"no native kernels: {OBSTACLE}")
@pytest.mark.parametrize(
    "family",
    slow_unless(
        lambda family: family in ("llama", "gemma3_text"),
        ["llama", "mistral", "gemma3_text", "gpt_neox"],
    ),
)
def test_tokens_are_equal_in_any_order_and_any_batch(family, monkeypatch):
    """To the bit of their log-probs: a sum's order depends on the row alone."""
    monkeypatch.setattr(sampler_module, "SLACK", 3)
    roles = roles_of(zoo.config_of(family))
    prompts = prompts_of([*LENGTHS, 12, 12, 5])
    stops = SimpleNamespace(stop_ids=tuple(range(9, 250, 9)), stop_strings=())
    sampling = Sampling(NEW)
    found = []
    for turn, most in enumerate((3, 3, 1, 8, 2)):
        rows = [Row(i, prompt.ids) for i, prompt in enumerate(prompts)]
        random.Random(turn).shuffle(rows)
        made = Sampler(
            roles,
            Draws(sampling, seed=1),
            Stops(sampling, stops, None),
            slots=most,
            windows=windows_of(roles.one_token_cache()),
        )
        with torch.no_grad(), use_cpu_layers(roles.base):
            made.sample_rows(rows)
        assert not made.forward.own_attention
        found.append([made.answers[i] for i in range(len(prompts))])
    lengths = {len(answer.ids) for answer in found[0]}
    assert len(lengths) > 2  # rows have left at several steps
    for other in found[1:]:
        assert [a.ids for a in other] == [a.ids for a in found[0]]
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a.logprob_N, b.logprob_N, atol=1e-6, rtol=0)


def test_a_row_alone_draws_what_it_draws_among_others(llama):
    prompts = prompts_of()
    how = {"template": TEMPLATE, "tokenizer": zoo.TOKENIZER, "sampling": Sampling(NEW)}
    together = sample(llama, prompts, seed=9, **how)
    for row, prompt in enumerate(prompts):
        alone = sample(llama, [prompt], seed=9, first_row=row, **how)
        assert alone.texts == together.texts[row : row + 1]
    assert sample(llama, prompts, seed=8, **how).texts != together.texts


def test_log_probs_are_those_of_a_whole_forward(llama):
    prompts = prompts_of()
    ids, logprobs, _ = sampled(llama, prompts, most=2, do_sample=True, temperature=0.7)
    for prompt, own, logprob in zip(prompts, ids, logprobs, strict=True):
        with torch.no_grad():
            logits = llama.base(torch.tensor([prompt.ids + own])).logits[0, len(prompt.ids) - 1 :]
        wanted = (logits[:-1] / 0.7).log_softmax(-1).gather(1, torch.tensor(own)[:, None])
        torch.testing.assert_close(logprob, wanted.squeeze(1), atol=1e-5, rtol=1e-5)


def widths(roles: Roles, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what the model is given, forward by forward."""
    seen: list[tuple[int, ...]] = []
    inner = type(roles.base).forward

    @functools.wraps(inner)
    def forward(self, *, input_ids, **kwargs):
        seen.append(tuple(input_ids.shape))
        return inner(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(roles.base), "forward", forward)
    return seen


def test_a_row_that_ends_leaves_and_the_next_prompt_enters(llama, monkeypatch):
    """Two slots, responses of 12, 1, 1 and 12 tokens: no step runs a row that has ended."""
    prompts = prompts_of((4, 5, 6, 7))
    whole, _, _ = sampled(llama, prompts)
    # The second and third end at once, at tokens that the others do not have.
    stops = {whole[1][0], whole[2][0]}
    wanted = [next((i + 1 for i, t in enumerate(row) if t in stops), NEW) for row in whole]
    assert wanted[1:3] == [1, 1]
    template = SimpleNamespace(**{**vars(TEMPLATE), "stop_ids": tuple(stops)})
    monkeypatch.setattr("tests.ppo.test_sampler.TEMPLATE", template)
    seen = widths(llama, monkeypatch)
    ids, _, ended = sampled(llama, prompts, most=2)
    assert [len(row) for row in ids] == wanted
    assert ended == [n < NEW or row[n - 1] in stops for n, row in zip(wanted, whole, strict=True)]
    assert sum(rows for rows, width in seen if width == 1) == sum(n - 1 for n in wanted)
    assert [shape for shape in seen if shape[1] > 1] == [(1, 4), (1, 5), (1, 6), (1, 7)]


def test_equal_prompts_are_run_once(llama, monkeypatch):
    """Four responses to each of two prompts, in three slots: the copies enter at several steps."""
    first, second = prompts_of((6, 9))
    prompts = [first] * 4 + [second] * 4
    seen = widths(llama, monkeypatch)
    ids, logprobs, _ = sampled(llama, prompts, most=3, do_sample=True)
    assert [shape for shape in seen if shape[1] > 1] == [(1, 6), (1, 9)]
    assert len({tuple(row) for row in ids}) > 4
    for row, (own, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        how = {"template": TEMPLATE, "tokenizer": zoo.TOKENIZER, "sampling": Sampling(NEW)}
        alone = sample(llama, [prompts[row]], seed=5, first_row=row, **how)
        assert alone.input_ids_BT[0, len(prompts[row].ids) :].tolist() == own
        torch.testing.assert_close(alone.sampler_logprob_N, logprob, atol=1e-5, rtol=0)


@pytest.mark.parametrize("most", slow_unless(lambda most: most in (2, 7), [1, 2, 3, 4, 7]))
def test_a_row_has_its_own_prompt_if_several_run_together(llama, monkeypatch, most):
    """As on a GPU; a prompt that comes again later, and one whose copies enter at two times."""
    inner = Sampler.__init__

    def init(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        self.alone = False

    first, second, third = prompts_of((6, 9, 4))
    prompts = [first, second, first, first, third, third, second]
    wanted = [generated(llama, prompt)[0] for prompt in prompts]
    monkeypatch.setattr(Sampler, "__init__", init)
    assert sampled(llama, prompts, most=most)[0] == wanted


@pytest.mark.parametrize("alone", [True, False], ids=["one by one", "together"])
def test_prompts_are_run_in_chunks(llama, monkeypatch, alone):
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", 8)
    inner = Sampler.__init__

    def init(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        self.alone = alone

    monkeypatch.setattr(Sampler, "__init__", init)
    prompts = prompts_of((3, 2, 17, 4, 4))
    seen = widths(llama, monkeypatch)
    ids, _, _ = sampled(llama, prompts)
    assert max(rows * width for rows, width in seen if width > 1) <= 8
    assert alone == all(rows == 1 for rows, width in seen if width > 1)
    monkeypatch.undo()
    for prompt, own in zip(prompts, ids, strict=True):
        assert own == generated(llama, prompt)[0]


def test_a_stop_string_over_several_tokens_ends_a_row(llama, monkeypatch):
    """The toy's tokens are bytes: a string of two is never one token."""
    prompts = prompts_of()
    whole, _, _ = sampled(llama, prompts, do_sample=True)

    def readable(ids):
        text = zoo.TOKENIZER.decode(ids)
        return text.isascii() and len(text) == len(ids) == 2

    hit, at = next(
        (r, i) for r, row in enumerate(whole) for i in range(2, NEW) if readable(row[i : i + 2])
    )
    string = zoo.TOKENIZER.decode(whole[hit][at : at + 2])
    template = SimpleNamespace(**{**vars(TEMPLATE), "stop_strings": (string,)})
    monkeypatch.setattr("tests.ppo.test_sampler.TEMPLATE", template)
    ids, _, ended = sampled(llama, prompts, do_sample=True)
    for own, row, how in zip(ids, whole, ended, strict=True):
        assert own == row[: len(own)]
        assert string not in zoo.TOKENIZER.decode(own[:-1])
        assert how == zoo.TOKENIZER.decode(own).endswith(string)
        assert how or len(own) == NEW
    assert len(ids[hit]) == at + 2


@pytest.mark.parametrize("least", [1, 5, NEW])
def test_min_new_tokens_is_kept_by_rows_that_would_end(llama, monkeypatch, least):
    everything = tuple(range(10, 200))
    template = SimpleNamespace(**{**vars(TEMPLATE), "stop_ids": everything})
    monkeypatch.setattr("tests.ppo.test_sampler.TEMPLATE", template)
    ids, _, _ = sampled(llama, prompts_of(), most=2, min_new_tokens=least, do_sample=True)
    assert min(map(len, ids)) >= least
    assert not any(token in everything for row in ids for token in row[: least - 1])
    none, _, _ = sampled(llama, prompts_of(), most=2, do_sample=True)
    assert min(map(len, none)) == 1  # they would


def test_a_penalty_counts_a_rows_own_tokens_and_no_padding(llama):
    """Beside a longer prompt a row is what it is alone."""
    short, long = prompts_of((2, 20))
    settings = {"repetition_penalty": 1.8}
    together, _, _ = sampled(llama, [short, long], **settings)
    assert sampled(llama, [short], **settings)[0] == together[:1]
    assert sampled(llama, [short])[0] != together[:1]


@pytest.mark.parametrize("native", [True, False], ids=["native", "own"])
def test_an_attention_that_the_kernel_cannot_do_runs_as_the_model_has_it(
    llama, monkeypatch, native
):
    prompts = prompts_of()
    wanted = sampled(llama, prompts)[0]
    if native:
        monkeypatch.setattr(cpu_layers, "suits", lambda *_: False)  # as another dtype
    else:
        monkeypatch.setattr(cpu_layers, "IGNORED", frozenset())  # as an unknown argument
    assert sampled(llama, prompts)[0] == wanted
    assert llama.base.config._attn_implementation == "sdpa"


def test_a_cache_of_slots_holds_what_a_dynamic_cache_holds(llama):
    """After a move and a shift back too."""
    prompts = prompts_of((5, 9))
    made = sampler_module.Forward(llama)
    cache = SlotCache([None, None], slots=3, width=12, end=9)
    for slot, prompt in enumerate(prompts):
        with torch.no_grad():
            run = made.prompts([prompt.ids])
        cache.admit(run.cache, 0, len(prompt.ids), [slot])
    cache.move(1, 2, 9)
    cache.move(0, 1, 5)
    cache.extent.end, cache.extent.rows, cache.extent.longest = 9, 3, 9
    for layer in cache.slot_layers:
        layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, 3, -3))
        layer.values = torch.nn.functional.pad(layer.values, (0, 0, 3, -3))
    cache.extent.end = 12  # as after three tokens
    cache.prepare([5, 5, 9])
    assert cache.extent.end == 9
    plain = DynamicCache()
    with torch.no_grad():
        llama.base(torch.tensor([prompts[1].ids]), past_key_values=plain, use_cache=True)
    for own, layer in zip(cache.slot_layers, plain.layers, strict=True):
        assert torch.equal(own.keys[2, :, :9], layer.keys[0])
        assert torch.equal(own.values[2, :, :9], layer.values[0])
