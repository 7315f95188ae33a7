"""Log-probs by blocks of words: whatever the blocks are, they are those of the definition."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import allocations, peak_bytes
from fastppo.ops import backend, linear_policy_loss, linear_token_logprobs, word_blocks
from tests.ops.oracle import check
from tests.ops.registry import OPS, Shape

pytestmark = [
    pytest.mark.skipif("native" not in backend.available("cpu"), reason="needs the C++ kernels"),
    pytest.mark.usefixtures("poisoned"),
]
# So many tokens that they go by words, and not a whole number of tiles.
SHAPE = Shape(n=70, vocab=331, hidden=16)
COLUMNS = 96 + 16
# So large that a trained weight's gradient has room for the logits until then.
WIDE = replace(SHAPE, hidden=128)
OP = OPS["linear_token_logprobs"]
# Words of a block: one block, many and a rest, one word each.
BLOCKS = {"one block": 1 << 20, "many": 40 * 4 * COLUMNS, "one word each": 1}


@pytest.fixture(params=BLOCKS)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_blocks, "_BYTES", BLOCKS[request.param])


@pytest.fixture
def went(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call that went by words."""
    calls: list[int] = []
    inner = word_blocks._some_tokens

    def note(words: Any, *rest: Any) -> None:
        calls.append(words.hidden_ND.shape[0])
        inner(words, *rest)

    monkeypatch.setattr(word_blocks, "_some_tokens", note)
    return calls


def inputs_of(shape: Shape = SHAPE, **more: Any) -> dict[str, Any]:
    inputs = OP.make_inputs(shape, torch.float32, 0)
    inputs["token_N"][3] = -100
    return {**inputs, **more}


SETTINGS = {
    "plain": {},
    "bias": {"bias_V": torch.linspace(-3, 3, SHAPE.vocab)},
    "softcap": {"softcap": 2.0, "temperature": 0.6},
    "temperature by row": {"temperature": torch.linspace(0.05, 3, SHAPE.n)},
    "all": {
        "bias_V": torch.linspace(3, -3, SHAPE.vocab),
        "softcap": 4.0,
        "temperature": torch.linspace(0.5, 2, SHAPE.n),
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_they_obey_the_rule_at_every_width(isa, went, settings, blocks):
    inputs = inputs_of(**SETTINGS[settings])
    check(OP, inputs, "native")
    assert went == [SHAPE.n]


@pytest.mark.parametrize("order", ["rising", "falling", "a peak late"])
def test_a_largest_logit_may_come_in_any_block(isa, order, blocks):
    """What was added before it is made smaller by as much; hundreds of nats apart."""
    inputs = inputs_of()
    logits_V = torch.linspace(-200, 200, SHAPE.vocab)
    if order == "falling":
        logits_V = -logits_V
    elif order == "a peak late":
        logits_V = torch.zeros(SHAPE.vocab)
        logits_V[300] = 90.0
    bias_V = logits_V + torch.randn(SHAPE.vocab)
    check(OP, {**inputs, "bias_V": bias_V}, "native")


def found(backend: str, **inputs: Any) -> tuple[Tensor, ...]:
    hidden = inputs.pop("hidden_ND").clone().requires_grad_()
    result = linear_token_logprobs(hidden, **inputs, backend=backend, return_lse=True)
    (grad,) = torch.autograd.grad(result.logprob_N.nan_to_num(neginf=0).sum(), hidden)
    return (*result, grad)


def test_masked_words_and_rows_without_any_are_the_definitions(isa, blocks):
    """Of the first words, of the last, of all but one; a sampled word that is masked."""
    for masked in (slice(0, 100), slice(100, 331), slice(1, 331)):
        bias_V = torch.zeros(SHAPE.vocab)
        bias_V[masked] = float("-inf")
        inputs = inputs_of(bias_V=bias_V)
        ours = found("native", **inputs)
        for mine, right in zip(ours, found("torch", **inputs), strict=True):
            torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-5)
        assert (ours[0] == float("-inf")).any()


def test_what_is_not_finite_stays_in_its_row(isa):
    """Also in a row that is ignored; the others keep their bits."""
    inputs = inputs_of()
    clean = found("native", **inputs)
    inputs["hidden_ND"] = inputs["hidden_ND"].clone()
    inputs["hidden_ND"][3], inputs["hidden_ND"][9, 2] = float("nan"), float("inf")
    dirty = found("native", **inputs)
    others = [i for i in range(SHAPE.n) if i != 9]
    for was, now in zip(clean, dirty, strict=True):
        assert torch.equal(was[others], now[others])
        assert now[9].isnan().any()
    assert not dirty[3][3].any()


def test_neighbours_do_not_change_a_row(isa):
    """Another row's largest logit comes in another place, and moves nobody else's."""
    inputs = inputs_of(chunk_bytes=BLOCKS["many"])
    clean = found("native", **inputs)
    inputs["hidden_ND"] = inputs["hidden_ND"].clone()
    inputs["hidden_ND"][1::2] *= 60
    for was, now in zip(clean, found("native", **inputs), strict=True):
        assert torch.equal(was[0::2], now[0::2])
        assert not torch.equal(was[1::2], now[1::2])


TRAINED = replace(OP, differentiable=("hidden_ND", "weight_VD"))
BIASED = replace(OP, differentiable=("hidden_ND", "weight_VD", "bias_V"))


@pytest.fixture
def came_back(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Tokens of each backward that went by words, and whether it had kept the logits."""
    calls: list[tuple[int, bool]] = []
    module = sys.modules["fastppo.ops.linear_passes"]
    inner = module.gradients_by_words

    def note(chunks: Any, *rest: Any) -> None:
        calls.append((chunks.hidden_ND.shape[0], rest[-1] is not None))
        inner(chunks, *rest)

    monkeypatch.setattr(module, "gradients_by_words", note)
    return calls


@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["made again", "kept"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_trained_heads_gradients_obey_the_rule(isa, shape, came_back, settings, blocks):
    inputs = inputs_of(shape, **SETTINGS[settings])
    check(BIASED if "bias_V" in inputs else TRAINED, inputs, "native")
    assert came_back == [(SHAPE.n, shape is WIDE)]


@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["made again", "kept"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("words", ["one block", "many"])
def test_so_do_those_of_the_entropy(isa, shape, came_back, monkeypatch, settings, words):
    """Not of one word each: the first is far below the largest, which costs exponentials 3 bits."""
    monkeypatch.setattr(word_blocks, "_BYTES", BLOCKS[words])
    inputs = inputs_of(shape, **SETTINGS[settings], entropy_grad=True)
    check(BIASED if "bias_V" in inputs else TRAINED, inputs, "native")
    assert came_back == [(SHAPE.n, shape is WIDE)]


@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["made again", "kept"])
@pytest.mark.parametrize("trains", ["weight_VD", "bias_V"])
def test_a_part_of_the_head_may_train_alone(shape, came_back, trains, blocks):
    check(replace(OP, differentiable=(trains,)), inputs_of(shape, **SETTINGS["all"]), "native")
    assert came_back == [(SHAPE.n, shape is WIDE and trains == "weight_VD")]


def head_gradients(backend: str, up_N: Tensor, **inputs: Any) -> list[Tensor]:
    leaves = [inputs[key].clone().requires_grad_() for key in ("hidden_ND", "weight_VD", "bias_V")]
    hidden_ND, weight_VD, bias_V = leaves
    rest = {**inputs, "hidden_ND": hidden_ND, "weight_VD": weight_VD, "bias_V": bias_V}
    made = linear_token_logprobs(**rest, backend=backend).logprob_N
    return list(torch.autograd.grad(made, leaves, up_N))


@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["made again", "kept"])
def test_masked_words_of_a_trained_head_are_the_definitions(isa, shape, came_back, blocks):
    """A sampled word that is masked passes no gradient on; nor does a masked word get any."""
    up_N = torch.linspace(-2, 2, SHAPE.n)
    for masked in (slice(0, 100), slice(100, 331), slice(1, 331)):
        inputs = inputs_of(shape, bias_V=torch.zeros(SHAPE.vocab))
        inputs["bias_V"][masked] = float("-inf")
        mine = head_gradients("native", up_N, **inputs)
        right = head_gradients("torch", up_N, **inputs)
        for a, b in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
        assert not mine[1][masked].any()
        assert mine[1].any() == (masked != slice(1, 331))
    assert came_back == [(SHAPE.n, shape is WIDE)] * 3


@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["made again", "kept"])
def test_an_ignored_row_has_no_part_in_a_trained_heads_gradient(isa, shape, came_back):
    """Whatever its hidden state is, the gradient that comes for it, and the other rows' scale."""
    up_N = torch.linspace(-2, 2, SHAPE.n)
    inputs = inputs_of(shape, bias_V=torch.full((SHAPE.vocab,), 300.0))
    clean = head_gradients("native", up_N, **inputs)
    inputs["hidden_ND"] = inputs["hidden_ND"].clone()
    inputs["hidden_ND"][3], up_N = float("nan"), up_N.clone()
    up_N[3] = float("nan")
    for was, now in zip(clean, head_gradients("native", up_N, **inputs), strict=True):
        assert torch.equal(was, now)
        assert was.isfinite().all()
    assert not clean[0][3].any()
    assert came_back == [(SHAPE.n, shape is WIDE)] * 2


def test_more_tokens_than_a_part_has_train_a_head(monkeypatch, came_back):
    monkeypatch.setattr(word_blocks, "_MOST_TOKENS", 31)
    check(BIASED, inputs_of(**SETTINGS["all"], entropy_grad=True), "native")
    assert came_back == [(SHAPE.n, False)]


def test_the_memory_of_a_trained_head_is_its_gradient_and_a_block():
    shape = Shape(n=256, vocab=20000, hidden=8)
    inputs = OP.make_inputs(shape, torch.float32, 0)
    inputs["hidden_ND"].requires_grad_()
    inputs["weight_VD"].requires_grad_()
    budget = 1 << 20

    def call() -> None:
        made = linear_token_logprobs(**inputs, chunk_bytes=budget, backend="native").logprob_N
        torch.autograd.grad(made.sum(), (inputs["hidden_ND"], inputs["weight_VD"]))

    call()  # the block's memory is kept from call to call
    peak = peak_bytes(allocations(call))
    gradient = shape.vocab * shape.hidden * 4
    small = 80 * shape.n * 8 + 8 * shape.n * shape.hidden * 4
    assert gradient < peak < gradient + budget + small


LOSS = OPS["linear_policy_loss"]


def loss_inputs(**more: Any) -> dict[str, Any]:
    inputs = LOSS.make_inputs(replace(SHAPE, batch=3), torch.float32, 0)
    inputs["entropy_coef"] = 0.0
    inputs["token_N"][3] = -100
    inputs["weight_N"][5] = 0.0
    return {**inputs, **more}


@pytest.mark.parametrize("trains", ["hidden states", "nothing"])
def test_a_loss_of_log_probs_goes_by_words_too(isa, blocks, went, trains):
    with torch.set_grad_enabled(trains == "hidden states"):
        inputs = loss_inputs()
        if trains == "hidden states":
            check(LOSS, inputs, "native")
        else:
            loss = linear_policy_loss(**inputs, backend="native").loss
            right = linear_policy_loss(**inputs, backend="torch").loss
            torch.testing.assert_close(loss, right)
    assert went == [SHAPE.n]


@pytest.mark.parametrize("name", ["ppo_clip", "cispo", "gspo"])
def test_a_loss_is_the_one_of_chunks_of_rows(monkeypatch, went, name):
    """Loss, gradient, log-probs, KL and every metric; rows of weight 0 hold what is not finite."""
    inputs = loss_inputs(loss=name, offsets=torch.tensor([0, 20, 45, SHAPE.n]))
    inputs["hidden_ND"][5] = float("nan")

    def run() -> list[Tensor]:
        hidden_ND = inputs["hidden_ND"].clone().requires_grad_()
        made = linear_policy_loss(**{**inputs, "hidden_ND": hidden_ND}, backend="native")
        made.loss.backward()
        assert hidden_ND.grad is not None
        values = [made.loss.detach(), made.logprob_N, made.entropy_N, made.kl_N, hidden_ND.grad]
        return [*values, *(getattr(made.metrics, key) for key in made.metrics._fields)]

    words = run()
    assert len(went) == 1
    # The package has the function by the module's name.
    module = sys.modules["fastppo.ops.linear_policy_loss"]
    monkeypatch.setattr(module, "LEAST_TOKENS", SHAPE.n + 1)
    for mine, right in zip(words, run(), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-6, rtol=1e-5)
    assert len(went) == 1
    assert not words[4][[3, 5]].any()


@pytest.mark.parametrize("change", ["entropy_coef", "weight", "bias"])
def test_a_loss_that_needs_the_logits_gradient_goes_by_rows(went, change):
    inputs = loss_inputs(bias_V=torch.zeros(SHAPE.vocab))
    inputs["hidden_ND"].requires_grad_()
    if change == "entropy_coef":
        inputs["entropy_coef"] = 0.01
    else:
        inputs[{"weight": "weight_VD", "bias": "bias_V"}[change]].requires_grad_()
    linear_policy_loss(**inputs, backend="native")
    assert not went


def test_more_tokens_than_a_part_has(monkeypatch, went):
    monkeypatch.setattr(word_blocks, "_MOST_TOKENS", 31)
    check(OP, inputs_of(), "native")
    assert went == [23, 23, 24]


@pytest.mark.parametrize(
    ("by_words", "change"),
    [
        (True, {}),
        (True, {"entropy_grad": True}),
        (False, {"entropy_grad": True, "trains": True}),
        (False, {"logits_dtype": torch.bfloat16, "dtype": torch.bfloat16}),
        (False, {"n": word_blocks.LEAST_TOKENS - 1}),
    ],
)
def test_which_calls_go_by_words(went, by_words, change):
    change = dict(change)
    shape = Shape(n=change.pop("n", SHAPE.n), vocab=331, hidden=16)
    inputs = OP.make_inputs(shape, change.pop("dtype", torch.float32), 0)
    inputs["hidden_ND"].requires_grad_(change.pop("trains", False))
    linear_token_logprobs(**inputs, **change, backend="native")
    assert bool(went) == by_words


def test_the_memory_is_that_of_a_block():
    """Not of the logits, (N, V); nor of the vocabulary, whatever its size."""
    shape = Shape(n=256, vocab=20000, hidden=8)
    inputs = OP.make_inputs(shape, torch.float32, 0)
    inputs["hidden_ND"].requires_grad_()
    budget = 1 << 20
    call = lambda: linear_token_logprobs(**inputs, chunk_bytes=budget, backend="native")  # noqa: E731
    peak = peak_bytes(allocations(call))
    small = 40 * shape.n * 8 + 4 * shape.n * shape.hidden * 4
    assert budget / 2 < peak < budget + small
