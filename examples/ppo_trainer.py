"""PPOTrainer on a random tiny Llama: it learns to write vowels, in a minute on a CPU."""

import tempfile
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fastppo import PPOConfig, PPOTrainer, toy

folder = Path(tempfile.mkdtemp())
toy.write_model(folder / "model")  # yours: any causal language model of transformers
model = AutoModelForCausalLM.from_pretrained(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
subjects = ["rain", "tea", "trains", "a cat", "the sea", "bread", "winter", "a song"]
rows = [{"prompt": [{"role": "user", "content": f"Write about {x}."}]} for x in subjects]


def vowels(completions, **columns):
    """The share of vowels: a number for each completion, which is a list of messages."""
    texts = [messages[0]["content"].lower() for messages in completions]
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]


class Watch(TrainerCallback):
    """transformers' callbacks; a step is a PPO step."""

    def on_log(self, args, state, control, logs, **_):
        if "score" in logs and state.global_step % 10 == 0:
            print(f"callback: after {state.episode} responses the score is {logs['score']:.3f}")


args = PPOConfig(
    output_dir=str(folder / "ppo"),
    template="chatml",  # the tokenizer has no chat template of its own
    critic="shared",  # a value head on the policy; value_model= is a model of its own
    per_device_train_batch_size=32,
    num_ppo_epochs=4,  # TRL's names are understood: here that is ppo_epochs
    response_length=12,  # max_new_tokens
    kl_coef=0.01,  # init_kl_coef, with adap_kl_ctrl=False
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    max_steps=30,
    use_cpu=True,
)
trainer = PPOTrainer(
    model=model,
    args=args,
    reward_funcs=vowels,
    train_dataset=rows,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    callbacks=[Watch()],
)
trainer.train()
metrics = trainer.evaluate()
print(f"reward {metrics['eval_reward_reference']:.3f} -> {metrics['eval_reward']:.3f}")
print(f"the policy is in {args.output_dir}, for PeftModel.from_pretrained")
