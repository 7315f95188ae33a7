"""Files that are right: tutorials, spellings, overrides, defaults; and the page about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fastppo import cli
from fastppo.config import Config, load_config
from fastppo.config.elsewhere import IGNORED
from fastppo.config.ppo import ALIASES, ELSEWHERE
from fastppo.config.schema import FIRST, GROUPS, INTERNAL, STAGE_KEYS
from fastppo.errors import UserError
from fastppo.ops import losses
from tests.config.config_page import keys_in_help, page
from tests.project import PPO

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_the_tutorials_reward_file_means_train():
    config = load_config(FIXTURES / "tutorial_reward.yaml")
    assert config.stage == "rm"
    assert config.do_train is None
    assert config.template == "qwen"
    assert config.num_train_epochs == 3.0
    assert config.ignored == ()


def test_the_tutorials_ppo_file_means_what_it_does_in_llamafactory():
    config = load_config(FIXTURES / "tutorial_ppo.yaml")
    assert config.learning_rate == 1e-6
    assert config.rollout_batch_size == 8
    assert config.lora_rank == 64
    assert config.resolved_lora_alpha == 128
    assert (config.ppo_epochs, config.ppo_target, config.bf16) == (4, 6.0, True)
    trl = (config.init_kl_coef, config.horizon, config.gamma, config.lam, config.cliprange)
    assert trl == (0.2, 10000, 1.0, 0.95, 0.2)
    assert (config.cliprange_value, config.vf_coef, config.ratio_threshold) == (0.2, 0.1, 10)


def load(tmp_path: Path, text: str, *overrides: str, name: str = "run.yaml") -> Config:
    base = "".join(f"{key}: {value}\n" for key, value in PPO.items())
    (tmp_path / name).write_text(base + text, encoding="utf-8")
    return load_config(tmp_path / name, overrides)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5", "'1e-5'"])
def test_every_spelling_of_a_number_is_one(tmp_path, text):
    assert load(tmp_path, f"learning_rate: {text}\n").learning_rate == 1e-5


def test_overrides_win_and_are_read_as_yaml(tmp_path):
    config = load(
        tmp_path,
        "seed: 1\n",
        "seed=2",
        "learning_rate=2e-5",
        "bf16=true",
        "output_dir=a=b",
        "lora_target=[q_proj, v_proj]",
        "cache_dir=",
    )
    assert (config.seed, config.learning_rate, config.bf16) == (2, 2e-5, True)
    assert (config.output_dir, config.lora_target) == ("a=b", "q_proj,v_proj")
    assert config.cache_dir is None


def test_a_key_with_nothing_behind_it_is_its_default(tmp_path):
    assert load(tmp_path, "ppo_epochs:\nresume_from_checkpoint: null\n").ppo_epochs == 4


def test_a_byte_order_mark_and_chinese_comments_do_not_matter(tmp_path):
    text = "# 训练\n" + "".join(f"{key}: {value}  # 注释\n" for key, value in PPO.items())
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_config(tmp_path / "bom.yaml").stage == "ppo"


def test_json_files_do_too(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**PPO, "eval_strategy": "no"}))
    assert load_config(tmp_path / "run.json").stage == "ppo"


def test_yamls_no_is_a_word_here(tmp_path):
    assert load(tmp_path, "eval_strategy: no\nreport_to: [none]\n").eval_strategy == "no"


def test_lf_sampling_restores_llamafactorys_hidden_sampling(tmp_path):
    plain = load(tmp_path, "")
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)
    hidden = load(tmp_path, "lf_sampling: true\ntop_k: 5\n")
    assert (hidden.temperature, hidden.top_p, hidden.top_k) == (0.95, 0.7, 5)


def test_trls_names_are_accepted_for_llamafactorys_keys(tmp_path):
    config = load(tmp_path, "target: 3\nwhiten_rewards: true\n")
    assert (config.ppo_target, config.ppo_whiten_rewards) == (3.0, True)
    with pytest.raises(UserError, match="target: is TRL's name for ppo_target; keep one"):
        load(tmp_path, "target: 3\nppo_target: 3\n")


def test_every_field_of_trls_ppo_config_means_something_or_says_why_not():
    """TRL 0.9.6's PPOConfig, field by field: a key, another name for one, or a reason."""
    fields = """exp_name seed log_with task_name model_name query_dataset reward_model
        remove_unused_columns tracker_project_name steps learning_rate adap_kl_ctrl init_kl_coef
        kl_penalty target horizon gamma lam cliprange cliprange_value vf_coef batch_size
        forward_batch_size mini_batch_size gradient_accumulation_steps ppo_epochs max_grad_norm
        optimize_cuda_cache optimize_device_cache early_stopping target_kl compare_steps
        ratio_threshold use_score_scaling use_score_norm score_clip whiten_rewards
        gradient_checkpointing backward_batch_size"""
    known = {*Config.model_fields, *ALIASES, *ELSEWHERE, *IGNORED}
    assert not set(fields.split()) - known


def test_another_trainers_name_is_answered_with_ours(tmp_path):
    with pytest.raises(UserError, match="unknown key 'clip_ratio_c'; here that is dual_clip"):
        load(tmp_path, "clip_ratio_c: 3\n")
    ours = {part.strip(",:()") for name in ELSEWHERE.values() for part in name.split()}
    assert {"dual_clip", "cliprange_high", "num_generations"} <= ours
    assert not set(ELSEWHERE) & set(Config.model_fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("use_score_norm: true", "use_score_norm: acts within use_score_scaling"),
        ("dual_clip: 1.1", r"dual_clip: 1.1 is not above the clip at 1.2; raise it"),
        ("advantage: grpo", "num_generations: advantage: grpo compares responses to one prompt"),
        (
            "advantage: rloo\nnum_generations: 3",
            "num_generations: 3 does not divide the 8 responses of a rollout",
        ),
        ("advantage: reinforce++\ncritic_warmup: 2", "critic_warmup: advantage: reinforce"),
        (
            "advantage: grpo\nnum_generations: 2\nbootstrap_truncated: true",
            "bootstrap_truncated: advantage: grpo has no critic",
        ),
        ("ptx_coef: 0.1", "ptx_dataset: is needed by ptx_coef"),
        ("ptx_dataset: x.json", "ptx_coef: is needed by ptx_dataset"),
        (
            "penalise_no_eos: true\nmissing_eos_penalty: 1",
            "penalise_no_eos: sets the score that missing_eos_penalty takes from",
        ),
        ("min_response_length: 9\nmax_new_tokens: 8", "min_response_length: is above max_new"),
        ("kl_loss_type: kl", "kl_loss_type: kl: its gradient is 0 on average; use low_var_kl"),
        ("loss_agg_mode: token_mean", "did you mean token-mean?"),
        (
            "policy_loss: cispo\ndual_clip: 3",
            "dual_clip: policy_loss: cispo has none; leave it out",
        ),
        (
            "policy_loss: sapo\nimportance_sampling_level: sequence",
            "importance_sampling_level: sequence is policy_loss: gspo, not sapo; leave one",
        ),
        (
            "policy_loss: dr_grpo\nloss_agg_mode: token-mean",
            "policy_loss: dr_grpo is ppo_clip with loss_agg_mode: seq-mean-token-sum-norm; leave",
        ),
        ("loss_mode: gspo", "unknown key 'loss_mode'; here that is policy_loss"),
        ("loss_type: dapo", "unknown key 'loss_type'; here that is policy_loss"),
    ],
)
def test_settings_of_the_algorithm_that_do_not_go_together(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text + "\n")


@pytest.mark.parametrize(
    ("text", "loss", "aggregation"),
    [
        ("", "ppo_clip", "token-mean"),
        ("policy_loss: vanilla", "ppo_clip", "token-mean"),
        ("policy_loss: grpo", "ppo_clip", "seq-mean-token-mean"),
        ("policy_loss: dr_grpo", "ppo_clip", "seq-mean-token-sum-norm"),
        ("policy_loss: gpg", "reinforce", "token-mean"),
        (
            "policy_loss: dppo_tv\nloss_agg_mode: seq-mean-token-sum",
            "dppo_tv",
            "seq-mean-token-sum",
        ),
        # A ratio by response, and advantages by token or one a response.
        ("importance_sampling_level: sequence", "gspo_token", "token-mean"),
        ("importance_sampling_level: sequence\nadvantage: reinforce++", "gspo_token", "token-mean"),
        (
            "importance_sampling_level: sequence\nadvantage: grpo\nnum_generations: 2",
            "gspo",
            "token-mean",
        ),
        ("policy_loss: gspo\nadvantage: rloo\nnum_generations: 2", "gspo", "token-mean"),
        (
            "policy_loss: gspo_token\nadvantage: rloo\nnum_generations: 2",
            "gspo_token",
            "token-mean",
        ),
    ],
)
def test_a_policy_loss_by_any_trainers_name(tmp_path, text, loss, aggregation):
    config = load(tmp_path, text + "\n")
    assert (config.token_loss, config.loss_agg_mode) == (loss, aggregation)
    assert config.token_loss in losses.POLICY_LOSSES


def test_keys_without_meaning_are_accepted_and_named(tmp_path):
    config = load(tmp_path, "ddp_backend: nccl\noverwrite_cache: true\nfp16: false\n")
    assert config.ignored == ("ddp_backend", "overwrite_cache")


def test_allow_extra_args_lets_unknown_keys_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    assert "'zzz' is unknown and ignored" in load(tmp_path, "zzz: 1\n").notes[0]


def test_a_configuration_is_frozen(tmp_path):
    with pytest.raises(ValidationError, match="frozen"):
        load(tmp_path, "").seed = 3


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_the_examples_load(path):
    assert load_config(path).ignored == ()


def test_every_key_says_what_it_means_and_whose_it_is():
    for name, field in Config.model_fields.items():
        if name in INTERNAL:
            continue
        assert field.description, name
        assert field.description.endswith("."), name
        assert field.json_schema_extra["owner"] in (
            "LLaMA-Factory",
            "transformers",
            "TRL 0.9.6",
            "TRL 0.24",
            "TRL (GRPO)",
            "verl",
            "OpenRLHF",
            "torchtune",
            "fastppo",
        )


def test_docs_config_md_is_what_the_code_says():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == page()


def test_every_key_is_in_one_group_and_is_a_stages_own_by_it():
    in_groups = [name for group in GROUPS for name in group.model_fields]
    assert len(in_groups) == len(set(in_groups))
    assert set(in_groups) == set(Config.model_fields) - INTERNAL
    assert in_groups == [name for name in Config.model_fields if name in in_groups]
    assert STAGE_KEYS["rm"] == {
        "calibrate_reward",
        "keep_lower_states",
        "lora_dropout",
        "save_only_model",
    }
    own = {"ppo_epochs", "lam", "temperature", "reward_model", "ref_model", "critic", "metrics_dir"}
    assert own <= STAGE_KEYS["ppo"]
    assert not {"learning_rate", "lora_rank", "dataset", "output_dir"} & STAGE_KEYS["ppo"]


def test_the_dozen_that_matter_are_first_on_the_page_and_in_help(capsys):
    assert 12 <= len(FIRST) <= 14
    # What has no default, and what a PPO run cannot do without.
    needed = {name for name, field in Config.model_fields.items() if field.is_required()}
    assert {*needed, "reward_model"} <= set(FIRST)
    assert keys_in_help() == cli.KEYS
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert cli.KEYS in shown
    assert 24 <= len(shown.splitlines()) <= 40
    assert max(map(len, shown.splitlines())) <= 84


def test_lists_of_the_roles_may_be_yaml_lists(tmp_path):
    text = "adapter_name_or_path: [a, b]\nadditional_target: [norm, lm_head]\n"
    config = load(tmp_path, text)
    assert (config.adapter_name_or_path, config.additional_target) == ("a,b", "norm,lm_head")
