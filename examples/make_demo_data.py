"""The demo's preference pairs: the model's own answers, the more positive one of each two chosen.

    python examples/make_demo_data.py        (make demo-data; some ten minutes on two cores)

The held-out prompts of demo_eval_prompts.json are never read here.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
from demo_judge import judge
from demo_model import FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parent / "data"
SAMPLES, TEMPERATURE, MAX_NEW_TOKENS, BATCH, SEED = 24, 0.7, 40, 168, 0
GAP = 0.4  # of the judge, from which on one answer is clearly the more positive
PAIRS_A_PROMPT, USES_OF_AN_ANSWER = 5, 1
HELD_OUT_EVERY = 9  # prompt, whose pairs measure the reward model: no answer is on both sides


def sample(prompts: list[str]) -> list[tuple[str, int, bool]]:
    """One answer each: text, tokens, and whether it ended by itself."""
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(
        **batch,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
    )
    answers = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        ended = tokenizer.eos_token_id in row
        length = row.index(tokenizer.eos_token_id) + 1 if ended else len(row)
        answers.append(
            (tokenizer.decode(row[:length], skip_special_tokens=True).strip(), length, ended)
        )
    return answers


def pairs_of(answers: list[tuple[str, int, bool]]) -> list[tuple[str, str, int]]:
    """Pairs of complete answers, the widest gap first: chosen, rejected, extra tokens."""
    complete = sorted({(text, length) for text, length, ended in answers if ended and text})
    scored = [(judge([], [text])[0], length, text) for text, length in complete]
    wide = [(high, low) for high in scored for low in scored if high[0] - low[0] >= GAP]
    wide.sort(key=lambda pair: pair[1][0] - pair[0][0])
    uses: Counter[str] = Counter()
    found = []
    for high, low in wide:
        if max(uses[high[2]], uses[low[2]]) < USES_OF_AN_ANSWER and len(found) < PAIRS_A_PROMPT:
            uses.update((high[2], low[2]))
            found.append((high[2], low[2], high[1] - low[1]))
    return found


def balance(pairs: list[dict[str, object]]) -> list[dict[str, object]]:
    """Drop pairs until the chosen answer is the longer one as often as the shorter one.

    Otherwise the reward model would learn length.
    """
    longer = [pair for pair in pairs if pair["gap"] > 0]
    shorter = [pair for pair in pairs if pair["gap"] < 0]
    even = [pair for pair in pairs if pair["gap"] == 0]
    keep = min(len(longer), len(shorter))
    chance = random.Random(SEED)
    kept = chance.sample(longer, keep) + chance.sample(shorter, keep) + even
    return sorted(kept, key=pairs.index)


if __name__ == "__main__":
    began = time.monotonic()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    prompts = [row["instruction"] for row in json.loads((DATA / "demo_prompts.json").read_text())]
    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]
    answers = []
    for start in range(0, len(asked), BATCH):
        answers += sample(asked[start : start + BATCH])
        print(f"{len(answers)}/{len(asked)} sampled, {time.monotonic() - began:.0f} s", flush=True)
    pairs = []
    for i, prompt in enumerate(prompts):
        for chosen, rejected, gap in pairs_of(answers[i * SAMPLES : (i + 1) * SAMPLES]):
            pairs.append(
                {"instruction": prompt, "chosen": chosen, "rejected": rejected, "gap": gap}
            )
    kept = balance(pairs)
    rows = [{name: pair[name] for name in ("instruction", "chosen", "rejected")} for pair in kept]
    held_out = prompts[::HELD_OUT_EVERY]
    for name, among in (("demo_preferences", False), ("demo_preferences_eval", True)):
        mine = [row for row in rows if (row["instruction"] in held_out) == among]
        text = json.dumps(mine, indent=1, ensure_ascii=False) + "\n"
        (DATA / f"{name}.json").write_text(text, encoding="utf-8")
    scores = judge([], [text for text, _, _ in answers])
    n = len(answers)
    print(
        f"{len(rows)} pairs of {len(pairs)} (balanced by length), from {n} answers: "
        f"judge {sum(scores) / n:+.3f}, {sum(ended for _, _, ended in answers) / n:.0%} ended by "
        f"themselves, {sum(length for _, length, _ in answers) / n:.1f} tokens"
    )
