"""Templates, word for word, on real tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fastppo import toy
from fastppo.errors import UserError
from fastppo.templates import TEMPLATES, get_template

HI = [{"role": "user", "content": "Hi"}]
SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]


def tokenizer(**names):
    """Bytes and every template's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    made = Tokenizer(BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
EXPECTED = {
    "default": ("Human: Hi</s>\nAssistant:", "</s>"),
    "empty": ("Hi", "</s>"),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nHi\n\n### Response:\n",
        "</s>",
    ),
    "chatml": (CHATML, "<|im_end|>"),
    "qwen": (f"<|im_start|>system\n{QWEN}<|im_end|>\n{CHATML}", "<|im_end|>"),
    "qwen3_nothink": (CHATML, "<|im_end|>"),
    "smollm2": (f"<|im_start|>system\n{SMOL}<|im_end|>\n{CHATML}", "<|im_end|>"),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": ("<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    "phi4": ("<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>", "<|im_end|>"),
}


def test_every_template_is_written_out_here():
    assert set(EXPECTED) == set(TEMPLATES)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_question_word_for_word(name):
    template = get_template(name, tokenizer())
    text, eos = EXPECTED[name]
    assert template.tokenizer.decode(template.encode_prompt(HI)) == text
    assert template.tokenizer.decode(template.encode_response("Ho")) == "Ho" + eos
    assert template.stop_ids[0] == template.eos_id == template.encode_response("")[-1]
    assert template.pad_id not in template.stop_ids


def test_every_token_that_may_end_a_response_does():
    template = get_template("llama3", tokenizer())
    stops = template.tokenizer.convert_ids_to_tokens(list(template.stop_ids))
    assert stops == ["<|eot_id|>", "<|eom_id|>", "</s>"]


def test_system_prompts_given_default_and_none():
    template = get_template("qwen", tokenizer())
    decode = template.tokenizer.decode
    assert decode(template.encode_prompt(HI, "Be brief.")).startswith(
        "<|im_start|>system\nBe brief.<"
    )
    assert decode(template.encode_prompt(HI, "")) == CHATML


def test_llamafactorys_suffix_is_known():
    template = get_template("chatml", tokenizer())
    assert template.tokenizer.decode(list(template.suffix_ids)) == "\n"
    assert get_template("llama3", tokenizer()).suffix_ids == ()


def test_special_tokens_of_the_template_are_single_ids():
    ids = get_template("chatml", tokenizer()).encode_prompt(HI)
    assert ids[0] == SPECIAL.index("<|im_start|>")


def test_a_template_whose_token_the_tokenizer_lacks_is_refused():
    with pytest.raises(UserError, match=r"'gemma' needs the token <start_of_turn>.*template: null"):
        get_template("gemma", toy.byte_tokenizer())


def test_a_tokenizer_without_eos_is_refused_where_the_template_needs_it():
    with pytest.raises(UserError, match="has no EOS token"):
        get_template("empty", tokenizer(eos_token=None))


def test_null_is_the_tokenizers_own_template_or_empty():
    own = tokenizer()
    own.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}"
    )
    template = get_template(None, own)
    assert own.decode(template.encode_prompt(HI, "Sys")) == "[system]Sys[user]Hi[bot]"
    assert template.eos_id == own.eos_token_id
    assert get_template(None, tokenizer()).name == "empty"


def test_a_conversation_has_its_turns():
    template = get_template("chatml", tokenizer())
    turns = [*HI, {"role": "assistant", "content": "Ho"}, *HI]
    text = template.tokenizer.decode(template.encode_prompt(turns))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n" + CHATML
