"""Before the first step: does the engine compute what the trainer computes?

The same weights in both is more than the same name: adapters merged into the base, quantisation, a
resized vocabulary and rope scaling would all differ without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastppo.errors import UserError
from fastppo.models.batch import make_batch
from fastppo.models.rounding import LIMITS
from fastppo.ppo.engine import Engine, adapter_folder
from fastppo.ppo.rollout import make_rollout
from fastppo.ppo.sampling import Answer, Sampling
from fastppo.ppo.score import token_scores
from fastppo.seeds import seed_of
from fastppo.servers.backend import Backend, Fault
from fastppo.servers.in_process import VLLMInProcess
from fastppo.servers.vllm import VLLMServer

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Roles
    from fastppo.templates import Template
    from fastppo.types import Prompt, Rollout

PROMPTS, TOKENS = 4, 16  # that are compared
NOISE = 0.02  # standard deviation that is added to lora_B, doubled until it shows
SHOWS = 5.0  # a difference of log-probs that shows, in limits
COLD = 0.5  # temperature at which processed log-probs differ from raw ones


def start_engine(
    config: Config,
    roles: Roles,
    prompts: list[Prompt],
    longest: int,
    template: Template,
    tokenizer: Any,
) -> Engine | None:
    """Connect to the engine and check it; None without `use_vllm`.

    Args:
        prompts: of the training; a few of them are sampled.
        longest: tokens of the longest prompt, and of a response.

    Raises:
        UserError: there is no server, it is too old, or it does not compute what the trainer does.
    """
    if not (config.use_vllm and config.trains):
        return None
    size = sum(parameter.nbytes for parameter in roles.trainable_parameters("actor"))
    folder, shared = adapter_folder(config, size), config.vllm_adapter_dir is not None
    server = connect(config, roles, longest)
    engine = Engine(server, folder, shared=shared)
    try:
        room = engine.model.max_length
        if room is not None and room < longest:
            raise UserError(
                f"{server.key}: has room for {room} tokens, and the longest prompt with "
                f"max_new_tokens is {longest}; start it with --max-model-len {longest}"
            )
        compared = Comparison(
            engine,
            roles,
            prompts[:PROMPTS],
            template,
            tokenizer,
            tokens=min(TOKENS, config.max_new_tokens),
        )
        gap = compared.check()
        engine.words = (
            f"rollouts by {server.words}, whose log-probs are {gap:.1g} from the trainer's in the "
            "mean"
        )
        server.sleep()
    except BaseException:
        engine.close()
        raise
    return engine


def connect(config: Config, roles: Roles, longest: int) -> Backend:
    """The server that is there, or with `vllm_mode: colocate` vLLM started beside the trainer."""
    rank = adapter_rank(roles)
    if config.vllm_mode == "colocate":
        return VLLMInProcess(config, rank=rank, length=longest, dtype=vllm_dtype(roles))
    url, timeout = config.vllm_server_base_url, config.vllm_server_timeout
    server = VLLMServer(url, timeout=timeout, rank=rank)
    server.check_version()
    return server


def adapter_rank(roles: Roles) -> int:
    """The largest rank of the actor's adapter, which `rank_pattern` may give single layers."""
    weights = roles.model.named_parameters()
    return max(weight.shape[0] for name, weight in weights if ".lora_A.default." in name)


def vllm_dtype(roles: Roles) -> str:
    """vLLM's name of the dtype in which the trainer runs the model."""
    precision = roles.product_precision
    return "float32" if precision == "tf32" else precision


class Comparison:
    """Log-probs of the same tokens by the engine and by the trainer."""

    def __init__(
        self,
        engine: Engine,
        roles: Roles,
        prompts: list[Prompt],
        template: Template,
        tokenizer: Any,
        tokens: int = TOKENS,
    ) -> None:
        self.engine, self.roles, self.prompts = engine, roles, prompts
        self.template, self.tokenizer, self.tokens = template, tokenizer, tokens
        self.limit = LIMITS[roles.product_precision].sampler_gap

    @torch.no_grad()
    def check(self) -> float:
        """Compare without the adapter, with it, and with a temperature; returns the mean gap."""
        roles = self.roles
        with roles.use("reference"):
            base = self.engine.serves(roles)
            gap = self.gap(self.sample()) if base else 0.0
        if not gap <= self.limit:
            raise self.error(gap, "without an adapter", "", "base")
        with roles.use("actor"):
            first = self.sample()
            before_N = self.logprobs(first)
            with moved(roles, lambda: self.shows(first, before_N)):
                gap = self.gap(self.sample())
                woken = self.gap_after_sleep()
            if not gap <= self.limit:
                why = ", so it runs adapters in another way or not at all"
                raise self.error(gap, "with an adapter", why, "adapter")
            if not woken <= self.limit:
                why = f", after {gap:.2g} before it slept, so its memory was not restored"
                raise self.error(woken, "after its first waking", why, "base")
            self.check_processed()
        return gap

    def gap_after_sleep(self) -> float:
        """The gap after the engine has slept and woken for the first time; 0 if it never sleeps."""
        if not self.engine.server.sleeps:
            return 0.0
        self.engine.server.sleep()
        self.engine.server.wake()
        return self.gap(self.sample())

    def error(self, gap: float, when: str, why: str, fault: Fault) -> UserError:
        """The error for a mean gap above the limit."""
        server = self.engine.server
        return UserError(
            f"{server.key}: {gap:.2g} from the trainer's log-probs in the mean, {when} (limit "
            f"{self.limit:g}){why}; {server.cure_of(fault, vllm_dtype(self.roles))}"
        )

    def check_processed(self) -> None:
        """Refuse log-probs of the logits as they are before the temperature."""
        cold = self.sample(COLD)
        processed, raw = self.gap(cold, COLD), self.gap(cold)
        if raw < processed:
            server = self.engine.server
            raise UserError(
                f"{server.key}: its log-probs are those before temperature, top_p and top_k; "
                f"{server.cure_of('raw', vllm_dtype(self.roles))}"
            )

    def sample(self, temperature: float = 1.0) -> Rollout:
        """Responses by the engine, without a stop."""
        sampling = Sampling(max_new_tokens=self.tokens, temperature=temperature)
        seeds = [seed_of(0, "engine", row) for row in range(len(self.prompts))]
        found = self.engine.complete(self.roles, self.prompts, sampling=sampling, seeds=seeds)
        device = self.roles.device
        answers = [
            Answer(each.ids, False, torch.tensor(each.logprobs, device=device)) for each in found
        ]
        return make_rollout(self.prompts, answers, self.template, self.tokenizer, device)

    def logprobs(self, rollout: Rollout, temperature: float = 1.0) -> Tensor:
        """The trainer's log-probs of the responses, by the forward that training uses."""
        batch = make_batch(rollout, range(len(rollout.prompts)))
        hidden_BTD = self.roles.hidden(**batch.inputs)
        return token_scores(self.roles, hidden_BTD, batch, temperature).logprob_N

    def gap(self, rollout: Rollout, temperature: float = 1.0) -> float:
        """Mean |difference| of the engine's log-probs and the trainer's."""
        difference_N = rollout.sampler_logprob_N - self.logprobs(rollout, temperature)
        return difference_N.abs().mean().item()

    def shows(self, rollout: Rollout, before_N: Tensor) -> bool:
        """Whether the policy now differs from the one that gave `before_N` by far."""
        difference_N = self.logprobs(rollout) - before_N
        return difference_N.abs().mean().item() > SHOWS * self.limit


@contextmanager
def moved(roles: Roles, shows: Any) -> Iterator[None]:
    """Inside the block the actor's lora_B have noise, so much that `shows()` is true.

    A new adapter's lora_B is 0: an engine that ignores it would give the same log-probs.
    """
    weights: list[nn.Parameter] = [
        parameter
        for name, parameter in roles.model.named_parameters()
        if ".lora_B.default." in name
    ]
    kept = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(weight.shape, generator=generator) for weight in weights]
    scale = NOISE
    try:
        for _ in range(8):
            for weight, was, each in zip(weights, kept, noise, strict=True):
                weight.copy_(was + scale * each.to(was))
            if shows():
                break
            scale *= 2
        yield
    finally:
        for weight, was in zip(weights, kept, strict=True):
            weight.copy_(was)
