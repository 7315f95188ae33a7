"""Reward models of their own: classifiers with another tokenizer, and LLaMA-Factory's full ones."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastppo.cli import main
from fastppo.errors import UserError
from fastppo.models.batch import Budget
from fastppo.rewards.adapter import append_suffix
from fastppo.rewards.model import ClassifierReward, load_full

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m['role'] }}] {{ m['content'] }} </s> {% endfor %}"
)
TEXTS = ["a long answer on the sea and on bread", "no", "tea", "rain is water of the sky"]
DEVICE = torch.device("cpu")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words, where the policy has bytes: not an id in common."""
    words = "[ ] user assistant a long answer on the sea and bread no tea rain is water of sky What"
    vocab = {word: i for i, word in enumerate(["<unk>", "<pad>", "</s>", *words.split(), "?", "."])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def write_classifier(folder, *, bert=False, template=True, **changes) -> None:
    tokenizer = word_tokenizer()
    if not template:
        tokenizer.chat_template = None
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    settings = {"num_labels": 1, "pad_token_id": 1, "initializer_range": 0.5, **sizes, **changes}
    torch.manual_seed(0)
    model = (
        BertForSequenceClassification(BertConfig(**settings))
        if bert
        else LlamaForSequenceClassification(
            LlamaConfig(num_key_value_heads=1, eos_token_id=2, bos_token_id=None, **settings)
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", params=["pad", "pad is eos", "no pad", "bert"])
def classifier_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    pad = {"pad": 1, "pad is eos": 2, "no pad": None, "bert": 1}[request.param]
    write_classifier(folder, bert=request.param == "bert", pad_token_id=pad)
    return folder


@pytest.fixture
def load(config, template):
    def make(folder, **changes):
        settings = config(reward_model=str(folder), reward_model_type="full", **changes)
        return load_full(str(folder), settings, DEVICE, template)

    return make


def test_scores_are_the_classifiers_own_on_its_own_template(load, classifier_dir, rollout):
    made = load(classifier_dir)
    assert isinstance(made, ClassifierReward)
    assert not made.model.training
    assert not any(p.requires_grad for p in made.model.parameters())
    rollout = replace(rollout, texts=TEXTS)
    plain = AutoModelForSequenceClassification.from_pretrained(classifier_dir).eval()
    tokenizer = word_tokenizer()
    expected = []
    assert rollout.terminated == [True, False, True, True]
    for prompt, text, ended in zip(rollout.prompts, TEXTS, rollout.terminated, strict=True):
        words = f"[user] {prompt.text} </s> [assistant] {text}" + (" </s>" if ended else "")
        ids = torch.tensor([tokenizer.encode(words, add_special_tokens=False)])
        with torch.no_grad():
            expected.append(plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
    score_B = made(rollout)
    assert score_B.dtype == torch.float32
    torch.testing.assert_close(score_B, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert len({round(score, 4) for score in score_B.tolist()}) == 4


def test_neither_batch_nor_padding_nor_order_changes_a_score(load, classifier_dir, rollout):
    made = load(classifier_dir)
    rollout = replace(rollout, texts=TEXTS)
    together = made(rollout)
    for size in (1, 3):
        made.budget = Budget(rows=size)
        torch.testing.assert_close(made(rollout), together, atol=1e-5, rtol=1e-5)
    backwards = {"texts": TEXTS[::-1], "terminated": rollout.terminated[::-1]}
    turned = replace(rollout, prompts=rollout.prompts[::-1], **backwards)
    torch.testing.assert_close(made(turned).flip(0), together, atol=1e-5, rtol=1e-5)


def test_rows_of_one_length_share_a_batch(load, classifier_dir, rollout, monkeypatch):
    made = load(classifier_dir, ppo_micro_batch_size_per_gpu=2)
    widths = []
    monkeypatch.setattr(
        made,
        "logits",
        lambda rows, _: (widths.append([*map(len, rows)]), torch.zeros(len(rows)))[1],
    )
    made(replace(rollout, texts=TEXTS))
    flat = [width for rows in widths for width in rows]
    assert flat == sorted(flat)
    assert [len(rows) for rows in widths] == [2, 2]


def test_a_conversation_with_its_system_prompt_reaches_the_template(load, tmp_path, rollout):
    write_classifier(tmp_path / "c")
    made = load(tmp_path / "c")
    system = replace(
        rollout.prompts[0],
        messages=[{"role": "system", "content": "x"}, *rollout.prompts[0].messages],
    )
    with pytest.raises(
        UserError, match=r"refuses a conversation of system, user, assistant \(no s"
    ):
        made.encode(system, "no")


def test_too_long_a_conversation_keeps_its_end_and_says_so_once(load, tmp_path, rollout):
    write_classifier(tmp_path / "c", max_position_embeddings=8)
    made = load(tmp_path / "c")
    whole = word_tokenizer().encode("the sea </s>", add_special_tokens=False)
    with pytest.warns(UserWarning, match="it takes 8; it sees the last of them"):
        ids = made.encode(rollout.prompts[3], "on bread and on the sea")
    assert len(ids) == 8
    assert ids[-3:] == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(replace(rollout, texts=TEXTS))


def test_bf16_as_the_run(load, tmp_path, rollout):
    write_classifier(tmp_path / "c")
    made = load(tmp_path / "c", bf16=True)
    assert made.model.dtype == torch.bfloat16
    score_B = made(replace(rollout, texts=TEXTS))
    assert score_B.dtype == torch.float32
    exact = load(tmp_path / "c")(replace(rollout, texts=TEXTS))
    torch.testing.assert_close(score_B, exact, atol=0.1, rtol=0.1)


def test_a_streamed_reward_says_the_same(load, classifier_dir, rollout):
    resident, streamed = load(classifier_dir), load(classifier_dir, stream_frozen=True)
    assert torch.equal(streamed(rollout), resident(rollout))
    assert streamed.model.streamed.bytes_moved > 0


@pytest.mark.parametrize(("bits", "near"), [(8, 0.03), (4, 0.2)])
def test_a_classifier_in_few_bits_keeps_its_head_whole(load, tmp_path, rollout, bits, near):
    write_classifier(tmp_path / "c", hidden_size=64, intermediate_size=128, initializer_range=0.05)
    rollout = replace(rollout, texts=TEXTS)
    exact = load(tmp_path / "c")(rollout)
    made = load(tmp_path / "c", reward_model_quantization_bit=bits)
    assert f"{bits}bit" in type(made.model.model.layers[0].mlp.up_proj).__name__
    assert type(made.model.score) is torch.nn.Linear
    score_B = made(rollout)
    assert not torch.equal(score_B, exact)
    torch.testing.assert_close(score_B, exact, atol=near, rtol=0)


def test_adapters_on_a_classifier_are_merged_in_their_order(load, tmp_path, rollout):
    write_classifier(tmp_path / "c")
    names = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
        tuned = get_peft_model(
            base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        tuned.save_pretrained(tmp_path / f"a{seed}")
        names.append(str(tmp_path / f"a{seed}"))
    rollout = replace(rollout, texts=TEXTS, terminated=[True] * 4)
    one = load(tmp_path / "c", reward_model_adapters=names[1])(rollout)
    made = load(tmp_path / "c")
    row = [torch.tensor([made.encode(p, t)]) for p, t in zip(rollout.prompts, TEXTS, strict=True)]
    with torch.no_grad():
        expected = torch.stack([tuned.eval()(input_ids=ids).logits[0, 0] for ids in row])
    torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
    both = load(tmp_path / "c", reward_model_adapters=",".join(names))(rollout)
    assert not torch.allclose(both, one)
    assert not torch.allclose(made(rollout), one)


def test_a_classification_adapter_on_a_plain_language_model(load, tmp_path, rollout):
    """What TRL's RewardTrainer leaves of a LoRA run: the head is the adapter's."""
    write_classifier(tmp_path / "c")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
    plain = LlamaForCausalLM(classifier.config)
    plain.model.load_state_dict(classifier.model.state_dict())
    plain.config.num_labels = 2
    plain.save_pretrained(tmp_path / "plain")
    word_tokenizer().save_pretrained(tmp_path / "plain")
    wanted = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["q_proj"]}
    tuned = get_peft_model(classifier, LoraConfig(**wanted, init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    rollout = replace(rollout, texts=TEXTS, terminated=[True] * 4)
    made = load(tmp_path / "plain", reward_model_adapters=str(tmp_path / "adapter"))
    rows = [torch.tensor([made.encode(p, t)]) for p, t in zip(rollout.prompts, TEXTS, strict=True)]
    with torch.no_grad():
        expected = torch.stack([tuned.eval()(input_ids=ids).logits[0, 0] for ids in rows])
    torch.testing.assert_close(made(rollout), expected, atol=1e-5, rtol=1e-5)

    headless = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match=r"has no weights for score\.weight; name a finished"):
        load(tmp_path / "plain", reward_model_adapters=str(tmp_path / "headless"))


def write_llamafactory_full(folder, model_dir, tokenizer, *, head=".safetensors") -> None:
    """A causal LM, its value head and tokenizer, as LLaMA-Factory's finetuning_type full saves."""
    model = LlamaForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(3)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = model.config.hidden_size
    tensors = {"v_head.summary.weight": torch.randn(1, size), "v_head.summary.bias": torch.ones(1)}
    if head == ".safetensors":
        save_file(tensors, folder / "value_head.safetensors")
    else:
        torch.save(tensors, folder / "value_head.bin")


@pytest.mark.parametrize(
    ("head", "changes"),
    [(".safetensors", {}), (".bin", {}), (".safetensors", {"stream_frozen": True})],
)
def test_llamafactorys_full_reward_model_scores_the_policys_tokens(
    load, model_dir, tokenizer, template, tmp_path, rollout, head, changes
):
    write_llamafactory_full(tmp_path / "full", model_dir, tokenizer, head=head)
    made = load(tmp_path / "full", **changes)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "full").eval()
    weight, bias = made.head.weight, made.head.bias
    longer = append_suffix(rollout, list(template.suffix_ids), template.pad_id)
    expected = []
    for row, length in zip(longer.input_ids_BT, longer.lengths, strict=True):
        with torch.no_grad():
            hidden = model.model(input_ids=row[None, :length]).last_hidden_state[0, -1]
        expected.append((hidden @ weight[0] + bias[0]).detach())
    torch.testing.assert_close(made(rollout), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_a_value_head_with_another_tokenizer_is_refused(load, model_dir, tmp_path, tokenizer):
    write_llamafactory_full(tmp_path / "full", model_dir, tokenizer)
    word_tokenizer().save_pretrained(tmp_path / "full")
    with pytest.raises(UserError, match=r"has another tokenizer than .* same base, or name a seq"):
        load(tmp_path / "full")


def test_a_reward_models_adapter_beside_its_base(load, model_dir, reward_dir, rollout, tiny_roles):
    """LLaMA-Factory: reward_model is the base and reward_model_adapters has adapter and head."""
    from fastppo.rewards.adapter import AdapterReward

    made = load(model_dir, reward_model_adapters=str(reward_dir))
    roles = tiny_roles(reward_model_type="lora", reward_model=str(reward_dir))
    template = made.template
    on_the_base = AdapterReward(roles, reward_dir, template, Budget(rows=4))
    torch.testing.assert_close(made(rollout), on_the_base(rollout), atol=1e-4, rtol=1e-4)


def run_refused(config, tmp_path, capsys, folder, *words, **changes) -> None:
    settings = config(reward_model=str(folder), reward_model_type="full", **changes)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings.model_dump(exclude_none=True)))
    before = {*tmp_path.iterdir()}
    assert main([str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert {*tmp_path.iterdir()} == before


def damage_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def drop_head(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def garble(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 64)


BROKEN = [
    ({"num_labels": 2}, None, ("has 2 labels", "num_labels 1")),
    ({"template": False}, None, ("has no chat template", "chat_template.jinja")),
    ({}, drop_head, ("has no weights for score.weight", "finished reward model")),
    ({}, garble, ("cannot be loaded", "check the folder")),
    ({}, damage_tokenizer, ("the tokenizer of", "cannot be loaded")),
]


@pytest.mark.parametrize(
    ("changes", "damage", "words"), BROKEN, ids=lambda v: getattr(v, "__name__", str(v)[:30])
)
def test_classifiers_that_are_no_reward_model(config, tmp_path, capsys, changes, damage, words):
    write_classifier(tmp_path / "c", **changes)
    if damage:
        damage(tmp_path / "c")
    run_refused(config, tmp_path, capsys, tmp_path / "c", "reward_model: ", *words)


def test_a_causal_lm_without_a_head(config, tmp_path, capsys, model_dir):
    words = ("is a LlamaForCausalLM without value_head.safetensors", "with its value head")
    run_refused(config, tmp_path, capsys, model_dir, *words)


def test_adapters_of_another_model(config, tmp_path, capsys, reward_dir):
    write_classifier(tmp_path / "c")
    for path in reward_dir.glob("adapter*"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    words = ("reward_model_adapters: ", "cannot be loaded on", "trained on it")
    adapters = str(tmp_path / "a")
    run_refused(config, tmp_path, capsys, tmp_path / "c", *words, reward_model_adapters=adapters)


def test_a_run_with_a_classifier(config, tmp_path, capsys):
    write_classifier(tmp_path / "c", max_position_embeddings=256)
    folder = tmp_path / "c"
    settings = config(reward_model=str(folder), reward_model_type="full", max_steps=1)
    (tmp_path / "run.json").write_text(json.dumps(settings.model_dump(exclude_none=True)))
    assert main([str(tmp_path / "run.json")]) == 0
    assert "model 'c'" in capsys.readouterr().out
    assert "reward_after" in json.loads((tmp_path / "metrics" / "summary.json").read_text())
