"""Reward models as each library saves them: a row writes one, and says what it scores there.

`tests/rewards/test_matrix.py` runs the rows; the table of docs/rewards.md is made from them:

    python -m tests.rewards.matrix
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
)

from fastppo import toy
from fastppo.export.cli import main as export
from fastppo.templates import get_template

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
BEGIN, END = "<!-- made by tests/rewards/matrix.py -->\n", "<!-- end -->\n"
Conversations = list[tuple[list[dict[str, str]], str]]  # messages and answer
Score = Callable[[Conversations], Tensor]


@dataclass(frozen=True)
class Places:
    """Where a row may read and write."""

    model: Path  # a language model with its tokenizer
    reward: Path  # what stage rm wrote for it
    out: Path  # an empty folder


@dataclass(frozen=True)
class Row:
    """One kind of reward model."""

    whose: str
    what: str
    keys: str  # how a run names it, for the page
    oracle: str  # who computes the scores that it is held to
    write: Callable[[Places], tuple[dict[str, str], Score]]

    @property
    def name(self) -> str:
        return f"{self.whose}: {self.what}"


def tokenizer_of(places: Places) -> Any:
    made = toy.byte_tokenizer()
    get_template("chatml", made)
    return made


def last_token(read: Callable[[Tensor], Tensor], ids_of: Callable[..., list[int]]) -> Score:
    """`read` of each conversation's ids alone, without padding."""

    def score(conversations: Conversations) -> Tensor:
        with torch.no_grad():
            rows = [torch.tensor([ids_of(*each)]) for each in conversations]
            return torch.stack([read(row).reshape(()) for row in rows])

    return score


def policys_ids(*, suffix: bool) -> Callable[..., list[int]]:
    """What a head on the policy's tokens reads: up to EOS, or what chatml writes behind it."""
    template = get_template("chatml", toy.byte_tokenizer())

    def ids(messages: list[dict[str, str]], answer: str) -> list[int]:
        found = template.encode_prompt(messages, "") + template.encode_response(answer)
        return found + (list(template.suffix_ids) if suffix else [])

    return ids


def own_ids(folder: Path) -> Callable[..., list[int]]:
    """What the tokenizer in `folder` makes of a conversation by its own chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(messages: list[dict[str, str]], answer: str) -> list[int]:
        chat = [*messages, {"role": "assistant", "content": answer}]
        return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))

    return ids


def by_value_head(model: nn.Module, head: dict[str, Tensor], *, suffix: bool) -> Score:
    """The value head's formula on the last hidden state of a language model."""
    weight, bias = head["v_head.summary.weight"], head["v_head.summary.bias"]

    def read(ids: Tensor) -> Tensor:
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        return hidden @ weight[0] + bias[0]

    return last_token(read, policys_ids(suffix=suffix))


def by_classifier(model: nn.Module, folder: Path, bias: float = 0.0) -> Score:
    """The classifier's own logits."""
    return last_token(lambda ids: model.eval()(ids).logits + bias, own_ids(folder))


def new_head(size: int = 32) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {
        "v_head.summary.weight": torch.randn(1, size),
        "v_head.summary.bias": torch.tensor([0.7]),
    }


def ours(places: Places) -> tuple[dict[str, str], Score]:
    base = AutoModelForCausalLM.from_pretrained(places.model)
    model = PeftModel.from_pretrained(base, places.reward).eval()
    head = load_file(places.reward / "value_head.safetensors")
    keys = {"reward_model": str(places.reward), "reward_model_type": "lora"}
    return keys, by_value_head(model, head, suffix=False)


def ours_exported(places: Places) -> tuple[dict[str, str], Score]:
    folder = places.out / "exported"
    assert export([str(places.reward), str(folder)]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    keys = {"reward_model": str(folder), "reward_model_type": "full"}
    return keys, by_classifier(model, folder, model.config.score_bias)


def ours_whole(places: Places) -> tuple[dict[str, str], Score]:
    keys, _ = llamafactory_whole(".safetensors")(places)
    folder = Path(keys["reward_model"])
    (folder / "fastppo_reward.json").write_text(json.dumps({"score_at": "eos"}))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return keys, by_value_head(model, load_file(folder / "value_head.safetensors"), suffix=False)


def llamafactory_whole(ending: str) -> Callable[[Places], tuple[dict[str, str], Score]]:
    def write(places: Places) -> tuple[dict[str, str], Score]:
        folder, head = places.out / "lf", new_head()
        model = AutoModelForCausalLM.from_pretrained(places.model).eval()
        model.save_pretrained(folder)
        tokenizer_of(places).save_pretrained(folder)
        save = save_file if ending == ".safetensors" else torch.save
        save(head, folder / f"value_head{ending}")
        keys = {"reward_model": str(folder), "reward_model_type": "full"}
        return keys, by_value_head(model, head, suffix=True)

    return write


def llamafactory_adapter(places: Places) -> tuple[dict[str, str], Score]:
    base = AutoModelForCausalLM.from_pretrained(places.model)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    torch.manual_seed(8)
    model = get_peft_model(base, settings).eval()
    model.save_pretrained(places.out / "lf")
    head = new_head()
    save_file(head, places.out / "lf" / "value_head.safetensors")
    keys = {"reward_model": str(places.out / "lf"), "reward_model_type": "lora"}
    return keys, by_value_head(model, head, suffix=True)


def classifier(places: Places) -> Any:
    torch.manual_seed(9)
    kind = AutoModelForSequenceClassification
    made = kind.from_pretrained(places.model, num_labels=1).eval()
    nn.init.normal_(made.score.weight)
    return made


def trl_whole(how: str) -> Callable[[Places], tuple[dict[str, str], Score]]:
    def write(places: Places) -> tuple[dict[str, str], Score]:
        folder, model = places.out / "trl", classifier(places)
        model.save_pretrained(folder, max_shard_size="20KB" if how == "sharded" else "5GB")
        tokenizer_of(places).save_pretrained(folder)
        if how == "sharded":
            assert (folder / "model.safetensors.index.json").is_file()
        if how == ".bin":
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        keys = {"reward_model": str(folder), "reward_model_type": "full"}
        return keys, by_classifier(model, folder)

    return write


def trl_adapter(places: Places) -> tuple[dict[str, str], Score]:
    folder = places.out / "trl"
    settings = LoraConfig(
        task_type="SEQ_CLS", r=2, modules_to_save=["score"], init_lora_weights=False
    )
    torch.manual_seed(10)
    model = get_peft_model(classifier(places), settings)
    model.save_pretrained(folder)
    base = places.out / "base"
    AutoModelForCausalLM.from_pretrained(places.model).save_pretrained(base)
    tokenizer_of(places).save_pretrained(base)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    keys = {
        "reward_model": str(base),
        "reward_model_type": "full",
        "reward_model_adapters": str(folder),
    }
    return keys, by_classifier(PeftModel.from_pretrained(fresh, folder), base)


def trl_value_head(how: str) -> Callable[[Places], tuple[dict[str, str], Score]]:
    """AutoModelForCausalLMWithValueHead: the model's weights under their names, and v_head.*."""

    def write(places: Places) -> tuple[dict[str, str], Score]:
        folder, head = places.out / "trl", new_head()
        model = AutoModelForCausalLM.from_pretrained(places.model).eval()
        tensors = {**{k: x.contiguous() for k, x in model.state_dict().items()}, **head}
        model.config.save_pretrained(folder)
        tokenizer_of(places).save_pretrained(folder)
        if how == ".safetensors":
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        elif how == ".bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            files = {True: "pytorch_model-00001-of-00002.bin", False: "pytorch_model-2.bin"}
            where = {name: files[name.startswith("model.")] for name in tensors}
            for file in files.values():
                torch.save({k: x for k, x in tensors.items() if where[k] == file}, folder / file)
            index = {"metadata": {"total_size": 1}, "weight_map": where}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        keys = {"reward_model": str(folder), "reward_model_type": "full"}
        return keys, by_value_head(model, head, suffix=True)

    return write


def openrlhf(
    prefix: str, *, normalised: bool = False
) -> Callable[[Places], tuple[dict[str, str], Score]]:
    """Its RewardModel: the trunk, a linear layer of one row, and a config without num_labels."""

    def write(places: Places) -> tuple[dict[str, str], Score]:
        folder, model = places.out / "openrlhf", classifier(places)
        model.save_pretrained(folder)
        tokenizer_of(places).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{prefix}.weight"] = tensors.pop("score.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        for key in ("id2label", "label2id", "num_labels"):
            config.pop(key, None)
        config |= {"architectures": ["RewardModel"], "normalize_reward": normalised}
        config |= {"mean": 1.5, "std": 2.0} if normalised else {}
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer, whole = AutoTokenizer.from_pretrained(folder), own_ids(folder)

        def ids(messages: list[dict[str, str]], answer: str) -> list[int]:
            # openrlhf/datasets/reward_dataset.py: text.rstrip("\n"), and EOS where it lacks one
            text = tokenizer.decode(whole(messages, answer)).rstrip("\n")
            assert text.endswith(tokenizer.eos_token)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        def read(row: Tensor) -> Tensor:
            # openrlhf/models/model.py: value_head(last_hidden_state) at the last attended token
            value = model.score(model.model(row).last_hidden_state[0, -1])
            return (value - 1.5) / 2.0 if normalised else value

        keys = {"reward_model": str(folder), "reward_model_type": "full"}
        return keys, last_token(read, ids)

    return write


def named(prefix: str) -> Callable[[Places], tuple[dict[str, str], Score]]:
    """A classifier whose head goes by a name of its own, with a bias."""

    def write(places: Places) -> tuple[dict[str, str], Score]:
        keys, score = trl_whole("")(places)
        path = Path(keys["reward_model"]) / "model.safetensors"
        tensors = load_file(path)
        tensors[f"{prefix}.weight"] = tensors.pop("score.weight")
        tensors[f"{prefix}.bias"] = torch.tensor([0.25])
        save_file(tensors, path, {"format": "pt"})
        return keys, lambda conversations: score(conversations) + 0.25

    return write


def neox_with_bias(places: Places) -> tuple[dict[str, str], Score]:
    """A class whose head has no bias, and a file that has one."""
    folder, tokenizer = places.out / "neox", tokenizer_of(places)
    torch.manual_seed(4)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    model = GPTNeoXForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["score.bias"] = torch.tensor([3.5])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    keys = {"reward_model": str(folder), "reward_model_type": "full"}
    return keys, by_classifier(model, folder, 3.5)


LORA, FULL = "`lora`", "`full`"
ADAPTERS = "`full`, `reward_model_adapters`"
HEAD = "the head's formula, hand-computed, on transformers' model"
TRANSFORMERS = "transformers"
ROWS = [
    Row("fastppo", "stage rm, LoRA", LORA, f"{HEAD} with PEFT", ours),
    Row("fastppo", "stage rm, full or freeze", FULL, HEAD, ours_whole),
    Row("fastppo", "exported", FULL, f"{TRANSFORMERS}, and `score_bias`", ours_exported),
    Row("LLaMA-Factory", "LoRA", LORA, f"{HEAD} with PEFT", llamafactory_adapter),
    Row(
        "LLaMA-Factory",
        "full, `value_head.safetensors`",
        FULL,
        HEAD,
        llamafactory_whole(".safetensors"),
    ),
    Row("LLaMA-Factory", "full, `value_head.bin`", FULL, HEAD, llamafactory_whole(".bin")),
    Row("TRL", "RewardTrainer, LoRA", ADAPTERS, f"{TRANSFORMERS} with PEFT", trl_adapter),
    Row("TRL", "RewardTrainer, whole", FULL, TRANSFORMERS, trl_whole("")),
    Row("TRL", "RewardTrainer, whole, in shards", FULL, TRANSFORMERS, trl_whole("sharded")),
    Row("TRL", "RewardTrainer, whole, `.bin`", FULL, TRANSFORMERS, trl_whole(".bin")),
    Row("TRL", "value head in `model.safetensors`", FULL, HEAD, trl_value_head(".safetensors")),
    Row("TRL", "value head in `pytorch_model.bin`", FULL, HEAD, trl_value_head(".bin")),
    Row("TRL", "value head in shards of `.bin`", FULL, HEAD, trl_value_head("sharded")),
    Row(
        "OpenRLHF",
        "`value_head_prefix` score",
        FULL,
        "its forward, hand-computed",
        openrlhf("score"),
    ),
    Row(
        "OpenRLHF",
        "`value_head_prefix` value_head",
        FULL,
        "its forward, hand-computed",
        openrlhf("value_head"),
    ),
    Row(
        "OpenRLHF",
        "`normalize_reward`",
        FULL,
        "its forward, hand-computed",
        openrlhf("value_head", normalised=True),
    ),
    Row(
        "others",
        "a `score.bias` that the class has not",
        FULL,
        f"{TRANSFORMERS}, and the bias",
        neox_with_bias,
    ),
    Row(
        "others",
        "`regression_head`",
        FULL,
        f"{TRANSFORMERS}, and the bias",
        named("regression_head"),
    ),
    Row("others", "`rm_head`", FULL, f"{TRANSFORMERS}, and the bias", named("rm_head")),
]


def table() -> str:
    """The page's table."""
    lines = ["| whose | what | `reward_model_type` | equal to |", "|---|---|---|---|"]
    lines += [f"| {row.whose} | {row.what} | {row.keys} | {row.oracle} |" for row in ROWS]
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the table of today."""
    return re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}",
        lambda _: BEGIN + table() + END,
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
