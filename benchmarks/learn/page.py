"""docs/learning.md, its pictures and the README's two sentences, from the committed JSON.

No number is written by hand.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from benchmarks.learn import beside_trl, pictures, problems, readme, runs, sentiment
from benchmarks.learn.lines import (
    choices_lines,
    compare_lines,
    controller_lines,
    problems_lines,
    problems_verdict,
    rates_lines,
    speed_lines,
    verdict,
)
from benchmarks.learn.results import WINDOW, Found, read
from benchmarks.learn.sentiment_lines import (
    FAR,
    sentiment_choices_lines,
    sentiment_lines,
    sentiment_verdict,
    trl_lines,
    trl_rates_lines,
    trl_verdict,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "learning.md"
HEAD = """# Does it learn

```
make learn        # token tasks and controller, three seeds; problems, one: an hour on two cores
make learn-full   # all of it, three seeds; what was cut off goes on where it was
```
"""
NOT_RUN = "Not run yet: `make {target}` does."


def machines(found: dict[str, list[Found]]) -> str:
    """Where and when."""
    every = [row for rows in found.values() for row in rows]
    if not every:
        return "none yet"
    where = sorted({f"{r['machine']['cores']} cores of {r['machine']['cpu']}" for r in every})
    days = sorted({row["date"] for row in every})
    torch = sorted({row["machine"]["torch"] for row in every})
    threads = sorted({str(row["machine"]["threads"]) for row in every})
    asked: dict[str, set[str]] = {}  # backend that a run was told to take -> sections
    for section, rows in found.items():
        for row in rows:
            if row["machine"]["backend"] is not None:
                asked.setdefault(row["machine"]["backend"], set()).add(section)
    backend = "".join(
        f", FASTPPO_BACKEND={name} for {', '.join(sorted(sections))}"
        for name, sections in sorted(asked.items())
    )
    return (
        f"{', '.join(days)}, {' and '.join(where)}, torch {', '.join(torch)}, "
        f"threads of a run: {', '.join(threads)}{backend}"
    )


def paragraph(*sentences: str) -> str:
    """Sentences as lines of the page."""
    return textwrap.fill(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False)


def picture(found: dict[str, list[Found]], name: str, words: str) -> list[str]:
    """The picture `name` where there are runs to draw."""
    section, _ = pictures.PICTURES[name]
    return [f"![{words}]({name})", ""] if found[section] else []


def keys(settings: dict[str, Any]) -> str:
    """Settings as a YAML file has them."""
    words = {None: "null", True: "true", False: "false"}
    return ", ".join(
        f"`{k}: {words[v] if v is None or isinstance(v, bool) else v}`" for k, v in settings.items()
    )


def token_tasks(found: dict[str, list[Found]]) -> list[str]:
    """The sections on tasks whose best policy is computed."""
    controlled = runs.CONTROLLED
    compared, controller, choices = (found[x] for x in ("compare", "controller", "choices"))
    return [
        "## Against the best policy there is",
        "",
        paragraph(
            "A language of four letters, a random Llama of one layer (LoRA on its linear layers),",
            "a prompt of one letter. There are so few responses that the best policy can be",
            "computed: at a fixed beta, J = E[reward] - beta KL is at most beta log Z with",
            "Z = E[exp(reward / beta)] over the reference's responses. J of the trained policy is",
            "computed in the same way, over all responses, so no number below has the noise of",
            f"sampling. beta is {runs.BETA:g}; a run is {runs.STEPS} steps of {runs.BATCH}",
            f"responses, {runs.STEPS * runs.BATCH:,} in all, the same for each estimator; GRPO and",
            f"RLOO have {runs.GROUP} responses to a prompt. The % of the way is",
            "(J - J at the start) / (optimum - J at the start). Reward and KL are means of seeds.",
        ),
        "",
        *(
            [
                verdict(compared),
                *compare_lines(compared),
                "",
                "Responses until the mean of the seeds is that far:",
                "",
                *speed_lines(compared),
            ]
            if compared
            else [NOT_RUN.format(target="learn")]
        ),
        "",
        paragraph(
            "The learning rate is the best of these, on a seed that is in no other table (% of the",
            "way); an estimator without runs here has PPO's:",
        ),
        "",
        *(rates_lines(found["rates"]) if found["rates"] else [NOT_RUN.format(target="learn-full")]),
        "",
        "## The KL controller",
        "",
        paragraph(
            f"`alphabet` with `ppo_target: {controlled['ppo_target']:g}` (nats), from",
            f"`init_kl_coef: {controlled['init_kl_coef']}`, {controlled['max_steps']} steps of",
            f"{controlled['per_device_train_batch_size']} responses. KL is the mean over the last",
            f"{runs.WITHIN} steps.",
        ),
        "",
        *picture(found, "learning_controller.png", "KL over the steps, and its target"),
        *(controller_lines(controller) if controller else [NOT_RUN.format(target="learn")]),
        "",
        "## Settings, one changed at a time",
        "",
        *(choices_lines(choices, compared) if choices else [NOT_RUN.format(target="learn-full")]),
        "",
        paragraph(
            "Most rows are within two and a half points of each other; three estimates of the KL",
            "are not. A penalty in the reward is a number without a gradient. With `kl` (k1), the",
            "policy gradient of that number is the gradient of the KL in the mean; with",
            "`low_var_kl` (k3) and `full` it is not: the estimate itself depends on the policy,",
            "and that part is left out. In the loss (`use_kl_loss`), k3's own gradient is that of",
            "the KL taken the other way round, from the reference to the policy. J counts the KL",
            "from the policy to the reference, so all three end lower. The default, `kl`, stays.",
            "All this is of one small task: the two choices that matter most, how the KL is",
            "estimated and what the critic is, are repeated below with a reward model.",
        ),
    ]


def problem_tasks(found: dict[str, list[Found]]) -> list[str]:
    """The section on problems that can be checked."""
    rows = found["problems"]
    _, settings = problems.PROBLEMS[problems.TASK]
    return [
        "## Problems that can be checked",
        "",
        paragraph(
            f"`{problems.TASK}` of reasoning-gym {problems.VERSION} ({keys(settings)}): four",
            "numbers of a sequence are given, and SmolLM2-135M-Instruct answers with the next one.",
            "Each prompt begins with the same solved problem, as an earlier turn of the chat, and",
            "then gives the problem alone. The reward is 1 if the whole response is the answer,",
            f"{problems.FORMAT_SHARE} if it is another whole number, else 0; reasoning-gym's own",
            "score also pays for answers that are nearly right. Exact match is counted on",
            f"{problems.HELD_OUT} problems of another seed, none of which is in the training, and",
            "has Wilson's 95% interval. Two baselines have no model: an answer drawn from those of",
            "all held-out problems, and their commonest answer, whatever is asked.",
        ),
        "",
        *(
            [*problems_lines(rows), "", paragraph(problems_verdict(rows))]
            if rows
            else [NOT_RUN.format(target="learn")]
        ),
    ]


def demo_tasks(found: dict[str, list[Found]]) -> list[str]:
    """The sections on the demo's task: gold against proxy, and beside TRL."""
    base, rows, trl = sentiment.BASE, found["sentiment"], found["trl"]
    tried = found["trl_rates"]
    shared = {k: v for k, v in beside_trl.SETTINGS.items() if k != "critic"}
    return [
        "## A reward model, and what was meant",
        "",
        paragraph(
            "SmolLM2-135M-Instruct is to write positively: PPO against the demo's reward model",
            f"(the proxy), {base['max_steps']} steps of {base['per_device_train_batch_size']}",
            f"responses of at most {base['max_new_tokens']} tokens, LoRA on the upper",
            f"{base['lora_layers']} layers, {base['ppo_epochs']} epochs. The demo's judge (a",
            "lexicon, VADER) is the gold score: it is computed of the texts of every rollout,",
            "which takes no further sampling,",
            "and nothing is trained on it. beta begins at",
            f"{sentiment.CONTROLLED['init_kl_coef']}, where it holds nobody back; with the",
            f"controller on it follows a target of {sentiment.CONTROLLED['ppo_target']:g} nats,",
            f"and with it off it stays. Scores here are running means of {WINDOW} steps; those on",
            f"{sentiment.HELD_OUT} held-out prompts have the standard error of the change. Past",
            f"{FAR:g} nats (dotted in the picture) over-optimisation is looked for.",
        ),
        "",
        *picture(found, "learning_sentiment.png", "gold against proxy over the KL"),
        *(
            [paragraph(sentiment_verdict(rows)), "", *sentiment_lines(rows)]
            if rows
            else [NOT_RUN.format(target="learn-full")]
        ),
        "",
        paragraph(
            "Two settings, one changed at a time, on this task. A row of one seed may be chance:",
            "the seeds of the first row show how much a seed does. The KL is of the held-out",
            "prompts, and the most of it a running mean of the rollouts:",
        ),
        "",
        *(
            sentiment_choices_lines(found["sentiment_choices"], rows)
            if found["sentiment_choices"]
            else [NOT_RUN.format(target="learn-full")]
        ),
        "",
        "## Beside TRL",
        "",
        paragraph(
            "The same task by TRL 0.24's PPOTrainer in its own environment: the same prompts token",
            "for token, adapters, reward model, critic (a model under an adapter of its own that",
            "begins as the reward model), samples and updates, with what both can be told alike:",
            f"{keys(shared)}. TRL's PPOTrainer never clips gradients, so fastppo does not here",
            f"either. A run is {beside_trl.STEPS} steps. Each trainer has the best of these",
            f"learning rates by the gold score after {beside_trl.TRIED} steps, on a seed that is",
            "not reported. All policies answer the held-out prompts by fastppo's sampler, with the",
            "same random numbers.",
        ),
        "",
        *([*trl_rates_lines(tried), ""] if tried else []),
        *picture(found, "learning_trl.png", "gold score over responses, fastppo and TRL"),
        *(
            [paragraph(trl_verdict(trl)), "", *trl_lines(trl)]
            if trl
            else [NOT_RUN.format(target="learn-full")]
        ),
    ]


def markdown(found: dict[str, list[Found]]) -> str:
    """The page."""
    lines = [
        HEAD,
        paragraph(
            "Every run is fastppo's own loop (`init_state`, `step_update`), or TRL's where it says",
            "so, and leaves a JSON. The numbers here are those in `benchmarks/results/learn`:",
            f"{machines(found)}. Seconds and minutes are of a machine that did other work too.",
            "`python -m benchmarks.learn --page` writes this page, its pictures and the README's",
            "sentences from them.",
        ),
        "",
        *picture(found, "learning.png", "share of the way to the computed optimum over responses"),
        *token_tasks(found),
        "",
        *problem_tasks(found),
        "",
        *demo_tasks(found),
    ]
    return "\n".join(lines) + "\n"


def write() -> None:
    """Write page, pictures and the README's sentences."""
    found = read()
    pictures.draw(found, DOCS)
    PAGE.write_text(markdown(found), encoding="utf-8")
    for name, words in readme.sentences(found).items():
        path = DOCS.parent / name
        path.write_text(readme.put(path.read_text(encoding="utf-8"), words), encoding="utf-8")
