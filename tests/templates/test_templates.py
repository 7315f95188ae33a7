"""Every template word for word and id for id.

Checked against: LLaMA-Factory 0.9.5's `data/template.py` (its own code, run on this file's
tokenizer, gave the ids below for all of TEMPLATES), and, where docs/data.md says so, the format
that a model's authors publish.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fastppo import toy
from fastppo.errors import UserError
from fastppo.templates import TEMPLATES, get_template

SPECIAL = [
    *("<s>", "</s>", "<pad>", "<|endoftext|>"),
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<think>", "</think>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<eos>"),
    *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|end|>"),
    *("<｜User｜>", "<｜Assistant｜>"),
]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
MERGES = [("Ċ", "Ċ"), (".", "U"), ("H", "i")]  # the first two could reach across a slot's border


def tokenizer(**names):
    """Bytes, three merges and every family's special tokens."""
    alphabet = sorted(BYTES.alphabet())
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in MERGES)]
    made = Tokenizer(BPE(vocab={token: i for i, token in enumerate(words)}, merges=MERGES))
    made.pre_tokenizer = BYTES
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def ids(text):
    """Golden ids, by hand: a special token is one, `¦` is a slot's border, the rest are bytes."""
    alphabet = sorted(BYTES.alphabet())
    merged = {"\n\n": 0, ".U": 1, "Hi": 2}
    found = []
    for piece in re.split("(" + "|".join(map(re.escape, SPECIAL)) + "|¦)", text):
        if piece in SPECIAL:
            found.append(SPECIAL.index(piece))
            continue
        for part in re.split("(" + "|".join(map(re.escape, merged)) + ")", piece.strip("¦")):
            if part in merged:
                found.append(len(SPECIAL) + len(alphabet) + merged[part])
            else:
                letters = "".join(word for word, _ in BYTES.pre_tokenize_str(part))
                found += [len(SPECIAL) + alphabet.index(letter) for letter in letters]
    return found


HI = [{"role": "user", "content": "Hi"}]
TURNS = [*HI, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Yo"}]


def chatml(system="", *turns):
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for role, content in zip(("user", "assistant") * 2, turns, strict=False):
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def llama3(*turns):
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return "<s>" + "".join(
        head.format(role) + (content + "<|eot_id|>" if content else "") for role, content in turns
    )


ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
ZEPHYR = "You are Zephyr, a helpful assistant."
ZH = "You are a helpful assistant. 你是一个乐于助人的助手。"
SPOKEN = "Hi", "Ho", "Yo"
GEMMA = (
    "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<s><start_of_turn>user\nSys\n\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
    "<start_of_turn>user\nYo<end_of_turn>\n<start_of_turn>model\n",
)
MINISTRAL = ("<s>[INST]Hi[/INST]", "<s>[INST]Sys\n\nHi[/INST]Ho</s>[INST]Yo[/INST]")
DEEPSEEK3 = (
    "<s><｜User｜>Hi<｜Assistant｜>",
    "<s>Sys<｜User｜>Hi<｜Assistant｜>Ho</s><｜User｜>Yo<｜Assistant｜>",
)
# name -> (a question, a conversation under the system prompt Sys, an answer as it is learned from,
# and what LLaMA-Factory writes behind it)
EXPECTED = {
    "default": (
        "Human: Hi</s>\nAssistant:",
        "System: Sys</s>\n¦Human: Hi</s>\nAssistant:¦Ho</s>\n¦Human: Yo</s>\nAssistant:",
        ("Ho</s>", "\n"),
    ),
    "empty": ("Hi", "Sys¦Hi¦Ho¦Yo", ("Ho</s>", "")),
    "alpaca": (
        f"{ALPACA}¦### Instruction:\nHi\n\n### Response:\n",
        "Sys¦### Instruction:\nHi\n\n### Response:\n¦Ho</s>\n\n¦"
        "### Instruction:\nYo\n\n### Response:\n",
        ("Ho</s>", "\n\n"),
    ),
    "vicuna": (
        f"{VICUNA}¦USER: Hi ASSISTANT:",
        "Sys¦USER: Hi ASSISTANT:¦Ho</s>USER: Yo ASSISTANT:",
        ("Ho</s>", ""),
    ),
    **{
        name: (chatml(system, "Hi"), chatml("Sys", *SPOKEN), (thought + "Ho<|im_end|>", "\n"))
        for name, system, thought in (
            ("chatml", "", ""),
            ("qwen", QWEN, ""),
            ("qwen3", "", "<think>\n\n</think>\n\n"),
            ("qwen3_nothink", "", ""),
            ("smollm", "", ""),
            ("smollm2", SMOL, ""),
            ("yi", "", ""),
        )
    },
    "llama2": (
        "<s>[INST] Hi [/INST]",
        "<s>[INST] <<SYS>>\nSys\n<</SYS>>\n\nHi [/INST]¦Ho</s><s>[INST] Yo [/INST]",
        ("Ho</s>", ""),
    ),
    "llama2_zh": (
        f"<s>[INST] <<SYS>>\n{ZH}\n<</SYS>>\n\nHi [/INST]",
        "<s>[INST] <<SYS>>\nSys\n<</SYS>>\n\nHi [/INST]¦Ho</s><s>[INST] Yo [/INST]",
        ("Ho</s>", ""),
    ),
    "llama3": (
        llama3(("user", "Hi"), ("assistant", "")),
        llama3(
            *(("system", "Sys"), ("user", "Hi"), ("assistant", "Ho"), ("user", "Yo")),
            ("assistant", ""),
        ),
        ("Ho<|eot_id|>", ""),
    ),
    "mistral": (
        "<s>[INST] Hi[/INST]",
        "<s>[INST] Sys\n\nHi[/INST]¦ Ho</s>[INST] Yo[/INST]",
        (" Ho</s>", ""),
    ),
    "ministral": (*MINISTRAL, ("Ho</s>", "")),
    "mistral_small": (
        "<s>[INST]Hi[/INST]",
        "<s>[SYSTEM_PROMPT]Sys[/SYSTEM_PROMPT]¦[INST]Hi[/INST]¦Ho</s>[INST]Yo[/INST]",
        ("Ho</s>", ""),
    ),
    "gemma": (*GEMMA, ("Ho<end_of_turn>", "\n")),
    "gemma2": (*GEMMA, ("Ho<end_of_turn>", "\n</s>")),
    "gemma3": (*GEMMA, ("Ho<end_of_turn>", "\n")),
    "phi": (
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "<|system|>\nSys<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>\n"
        "<|user|>\nYo<|end|>\n<|assistant|>\n",
        ("Ho<|end|>", "\n"),
    ),
    "phi4": (
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_start|>system<|im_sep|>Sys<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Ho<|im_end|><|im_start|>user<|im_sep|>Yo<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        ("Ho<|im_end|>", ""),
    ),
    "phi4_mini": (
        "<|user|>Hi<|end|><|assistant|>",
        "<|system|>Sys<|end|><|user|>Hi<|end|><|assistant|>Ho<|end|><|user|>Yo<|end|><|assistant|>",
        ("Ho<|end|>", ""),
    ),
    "deepseek": (
        "<s>User: Hi\n\nAssistant:",
        "<s>Sys\n\n¦User: Hi\n\nAssistant:¦Ho</s>User: Yo\n\nAssistant:",
        ("Ho</s>", ""),
    ),
    "deepseek3": (*DEEPSEEK3, ("Ho</s>", "")),
    "deepseekr1": (*DEEPSEEK3, ("<think>\n\n</think>\n\nHo</s>", "")),
    "glm4": (
        "[gMASK]<sop><|user|>\nHi<|assistant|>",
        "[gMASK]<sop><|system|>\nSys<|user|>\nHi<|assistant|>\nHo<|user|>\nYo<|assistant|>",
        ("\nHo</s>", ""),
    ),
    "zephyr": (
        f"<|system|>\n{ZEPHYR}</s><|user|>\nHi</s><|assistant|>\n",
        "<|system|>\nSys</s><|user|>\nHi</s><|assistant|>\n¦Ho</s><|user|>\nYo</s><|assistant|>\n",
        ("Ho</s>", ""),
    ),
}


def test_every_template_is_written_out_here_and_in_the_page():
    assert set(EXPECTED) == set(TEMPLATES)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\|( `.*?) \|", page, flags=re.MULTILINE))
    assert not [name for name in TEMPLATES if f"`{name}`" not in rows]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_template_id_for_id(name):
    template = get_template(name, tokenizer())
    question, conversation, (answer, suffix) = EXPECTED[name]
    decode = template.tokenizer.decode
    for golden, got in (
        (question, template.encode_prompt(HI)),
        (conversation, template.encode_prompt(TURNS, "Sys")),
        (answer, template.encode_response("Ho")),
        (suffix, list(template.suffix_ids)),
    ):
        assert decode(got) == golden.replace("¦", "")
        assert got == ids(golden)
    assert template.stop_ids[0] == template.eos_id == template.encode_response("")[-1]
    assert template.pad_id not in template.stop_ids


STOPS = {
    "default": "</s>",
    "vicuna": "</s>",
    "chatml": "<|im_end|> <|im_start|> </s>",
    "qwen": "<|im_end|> </s>",
    "smollm2": "<|im_end|> </s>",
    "llama3": "<|eot_id|> <|eom_id|> </s>",
    "gemma": "<end_of_turn> </s>",
    "gemma2": "<end_of_turn> </s> <eos>",
    "glm4": "</s> <|user|> <|observation|>",
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_words_and_the_tokenizers_eos_end_a_response(name):
    template = get_template(name, tokenizer())
    stops = template.tokenizer.convert_ids_to_tokens(list(template.stop_ids))
    assert stops == STOPS[name].split()


@pytest.mark.parametrize(
    ("name", "eos"), [("qwen", "<|im_end|>"), ("smollm2", "</s>"), ("glm4", "</s>")]
)
def test_the_saved_tokenizer_has_the_eos_that_the_template_asks_for(name, eos, tmp_path):
    get_template(name, tokenizer()).tokenizer.save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).eos_token == eos


@pytest.mark.parametrize("name", [n for n in TEMPLATES if not TEMPLATES[n].reasoning])
def test_a_tokenizer_without_a_chat_template_is_saved_with_this_one(name, tmp_path):
    template = get_template(name, tokenizer())
    if name == "empty":  # no format to tell anybody of
        assert template.tokenizer.chat_template is None
        return
    template.tokenizer.save_pretrained(tmp_path)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    decode = template.tokenizer.decode
    spoken = [{"role": "system", "content": "Sys"}, *TURNS]
    expected = decode(template.encode_prompt(TURNS, "Sys"))
    assert saved.apply_chat_template(spoken, tokenize=False) == expected
    assert saved.apply_chat_template(HI, tokenize=False) == decode(template.encode_prompt(HI))


def test_a_tokenizers_own_chat_template_stays_unless_it_is_not_what_was_trained_on():
    for name, stays in (("qwen", True), ("gemma", True), ("alpaca", False), ("chatml", False)):
        made = own("</s>")
        before = made.chat_template
        assert (get_template(name, made).tokenizer.chat_template == before) is stays


def test_a_missing_padding_token_becomes_eos():
    template = get_template("qwen", tokenizer(pad_token=None))
    assert template.pad_id == template.eos_id == template.tokenizer.pad_token_id


def test_a_model_without_bos_gets_none():
    template = get_template("llama2", tokenizer(bos_token=None))
    assert template.encode_prompt(HI) == ids("[INST] Hi [/INST]")


def test_system_prompts_given_default_and_none():
    template = get_template("qwen", tokenizer())
    decode = template.tokenizer.decode
    assert decode(template.encode_prompt(HI, "Be brief.")) == chatml("Be brief.", "Hi")
    assert decode(template.encode_prompt(HI)) == chatml(QWEN, "Hi")
    assert decode(template.encode_prompt(HI, "")) == chatml("", "Hi")


def test_braces_in_what_people_write_are_theirs():
    template = get_template("llama2", tokenizer())
    said = [{"role": "user", "content": "f({}) {}"}]
    expected = "<s>[INST] <<SYS>>\n{}!\n<</SYS>>\n\nf({}) {} [/INST]"
    assert template.tokenizer.decode(template.encode_prompt(said, "{}!")) == expected


THOUGHTFUL = [
    *HI,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHo"},
    {"role": "user", "content": "Yo"},
]


@pytest.mark.parametrize("name", ["qwen3", "deepseekr1"])
def test_thinking_off_is_an_empty_thought_in_the_prompt_and_none_in_the_answer(name):
    on = get_template(name, tokenizer())
    off = get_template(name, tokenizer(), enable_thinking=False)
    empty = ids("<think>\n\n</think>\n\n")
    assert off.encode_prompt(HI) == on.encode_prompt(HI) + empty
    thought = "<think>\nhm\n</think>\n\nHo"
    decode = on.tokenizer.decode
    assert decode(on.encode_response(thought)) == thought + decode([on.eos_id])
    assert off.encode_response(thought) == off.encode_response("Ho")
    assert on.encode_response("Ho") == empty + off.encode_response("Ho")


def test_thoughts_of_earlier_turns_are_forgotten_unless_they_are_preserved():
    forgets = get_template("qwen3", tokenizer())
    keeps = get_template("qwen3", tokenizer(), preserve_thinking=True)
    decode = forgets.tokenizer.decode
    assert decode(forgets.encode_prompt(THOUGHTFUL)) == chatml("", "Hi", "Ho", "Yo")
    assert "hm" in decode(keeps.encode_prompt(THOUGHTFUL))
    nothink = get_template("qwen3_nothink", tokenizer())
    assert "hm" in decode(nothink.encode_prompt(THOUGHTFUL))


def test_a_template_whose_token_the_tokenizer_lacks_is_refused():
    with pytest.raises(UserError, match=r"'gemma' needs the token <start_of_turn>.*template: null"):
        get_template("gemma", toy.byte_tokenizer())


def test_a_tokenizer_without_eos_is_refused_where_the_template_needs_it():
    with pytest.raises(UserError, match="has no EOS token"):
        get_template("empty", tokenizer(eos_token=None))
    assert get_template("qwen", tokenizer(eos_token=None)).tokenizer.eos_token == "<|im_end|>"


def own(end, system="[{{ m['role'] }}]"):
    made = tokenizer()
    made.chat_template = (
        "{% for m in messages %}"
        + system
        + "{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        + end
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}[bot]"
        "{% if enable_thinking is defined and not enable_thinking %}[quick]{% endif %}{% endif %}"
    )
    return made


def test_null_is_the_tokenizers_own_template_or_empty():
    template = get_template(None, own("</s>"))
    assert template.encode_prompt(TURNS, "Sys") == ids(
        "[system]Sys[user]Hi[assistant]Ho</s>[user]Yo[bot]"
    )
    assert template.eos_id == template.tokenizer.eos_token_id
    assert template.suffix_ids == ()
    assert get_template(None, tokenizer()).name == "empty"
    quick = get_template(None, own("</s>"), enable_thinking=False)
    assert quick.tokenizer.decode(quick.encode_prompt(HI)) == "[user]Hi[bot][quick]"


def test_the_tokenizers_own_template_says_where_an_answer_ends():
    # A base model with a chat template: its EOS is another token, and never comes.
    template = get_template(None, own("<|im_end|>\n"))
    assert template.encode_response("Ho") == ids("Ho<|im_end|>")
    assert list(template.suffix_ids) == ids("\n")
    assert template.stop_ids == tuple(ids("<|im_end|></s>"))


def test_a_template_of_the_tokenizer_that_refuses_is_one_line():
    refuses = "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = get_template(None, own("</s>", refuses))
    with pytest.raises(UserError, match=r"own chat template refuses .*no system.*name a template"):
        template.encode_prompt(HI, "Sys")
