"""Other people's trainers with their functions and with ours: numbers, CPU time and peak memory.

The examples of TRL, verl and OpenRLHF as they stand; beside them a transformers model and
Liger-Kernel's GRPO loss. Each way is a process of its own with one thread, the first of a round
changing. Time is the process's CPU time, which others on the machine change little.

Both ways train from the same start, and each of their losses, gradient norms and the like has to be
the same in every step. That says something only of a quantity that is far from 0 and changes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, report
from benchmarks.peers.environments import VERL
from benchmarks.step import MODEL, OthersLoad, linked

ROOT = Path(__file__).parents[1]
FOLDER = Path("output/benchmarks/integrations")
TOKENS = 16  # of a completion
LAYERS = 2  # of the model that TRL trains: its vocabulary is SmolLM2's, 49152, and D is 576
ROWS, LENGTH, HIDDEN, VOCAB = 8, 96, 576, 49152
TOLERANCE = 1e-4  # the largest difference in a step, as a share of the quantity's median size
QUICK = 3  # steps
LEAST = 1e-3  # a smaller median size could be rounding around 0, which is never the same

Series = dict[str, list[float]]  # the name of what is compared -> its value in each step
Found = tuple[Series, float]


@dataclass(frozen=True)
class Case:
    """What trains; it is given whether with ours, the number of steps, and the model's folder."""

    package: str
    what: str
    part: str  # what the seconds are of
    train: Callable[[bool, int, str], Found]
    steps: int


def example(name: str) -> Any:
    """An example's module."""
    sys.path.insert(0, str(ROOT / "examples"))
    return __import__(name)


def trl(ours: bool, steps: int, model: str) -> Found:
    sys.path.append(str(peers.SITE))
    found: Found = example("grpo_trl").train(ours, model, steps, TOKENS)
    return found


def openrlhf(ours: bool, steps: int, model: str) -> Found:
    sys.path.append(str(peers.SITE))
    found: Found = example("openrlhf_loss").train(ours, steps)
    return found


def verl(ours: bool, steps: int, model: str) -> Found:
    # Of its own environment alone: it mistakes TRL 1.16 for an old one.
    sys.path[:0] = map(str, VERL.folder.glob("lib/python*/site-packages"))
    found: Found = example("verl_policy_loss").train(ours, steps)
    return found


def timed(steps: int, step: Callable[[], dict[str, torch.Tensor]]) -> Found:
    """What each step gives, and the CPU seconds of the second step and all later ones."""
    found, seconds = [step()], 0.0
    for _ in range(steps - 1):
        start = time.process_time()
        found.append(step())
        seconds += time.process_time() - start
    return {name: [each[name].item() for each in found] for name in found[0]}, seconds


def transformers(ours: bool, steps: int, model: str) -> Found:
    """Log-probs and entropies of labels, and their gradient, of a Llama with a frozen head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastppo.integrations.transformers import patch_causal_lm

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, **sizes))
    llama.lm_head.requires_grad_(requires_grad=False)
    trained = list(llama.model.layers.parameters())
    optimizer = torch.optim.SGD(trained, lr=0.1)
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    if ours:
        patch_causal_lm(llama)

    def step() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        if ours:
            out = llama(input_ids=ids, labels=ids)
            logprob, entropy = out.logprob, out.entropy
        else:
            log = llama(input_ids=ids).logits[:, :-1].log_softmax(-1)
            logprob = log.gather(-1, ids[:, 1:, None])[..., 0]
            with torch.no_grad():
                entropy = -(log.exp() * log).sum(-1)
        logprob.mean().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        optimizer.step()
        found = {"log-prob": logprob.mean(), "entropy": entropy.mean(), "grad_norm": norm}
        return {name: value.detach() for name, value in found.items()}

    return timed(steps, step)


def liger(ours: bool, steps: int, model: str) -> Found:
    """Liger-Kernel's fused linear GRPO loss, not compiled, and its gradients; a frozen head."""
    if ours:
        from fastppo.integrations.liger import FusedLinearGRPOLoss as Loss
    else:
        module = peers.load("liger-kernel", "liger_kernel.chunked_loss.grpo_loss")
        Loss = module.LigerFusedLinearGRPOLoss
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    old, ref = torch.randn(2, ROWS, LENGTH) / 4 - 11
    advantages = torch.randn(ROWS)
    optimizer = torch.optim.SGD([hidden], lr=10.0)
    loss = Loss(compiled=False)
    mask = torch.ones(ROWS, LENGTH)

    def step() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        given = {"ref_per_token_logps": ref, "old_per_token_logps": old}
        value, (kl, _) = loss(hidden, weight, ids, mask, advantages, **given)
        value.backward()
        assert hidden.grad is not None
        norm = hidden.grad.norm()
        optimizer.step()
        found = {"loss": value, "kl": kl, "grad_norm": norm}
        return {name: value.detach() for name, value in found.items()}

    return timed(steps, step)


CASES = {
    "trl": Case(
        "TRL 1.16.0",
        f"GRPOTrainer, LoRA, SmolLM2-135M's first {LAYERS} layers, V 49152, D 576",
        "the loss's forward",
        trl,
        steps=20,
    ),
    "verl": Case(
        "verl 0.9.1",
        "fused head, trained, and clipped loss; V 32768, D 128",
        "head, loss and their backward",
        verl,
        steps=6,
    ),
    "openrlhf": Case(
        "OpenRLHF 0.11.2",
        "log-probs from logits, PolicyLoss; V 32768",
        "log-probs, loss and their backward",
        openrlhf,
        steps=6,
    ),
    "transformers": Case(
        "transformers",
        "log-probs and entropies of a Llama, frozen head; V 49152, D 576",
        "the step, its one layer included",
        transformers,
        steps=4,
    ),
    "liger": Case(
        "Liger-Kernel 0.8.5",
        "fused linear GRPO loss, frozen head; V 49152, D 576",
        "loss and backward",
        liger,
        steps=4,
    ),
}


def shorten(model: Path) -> Path:
    """A folder whose model is the first layers of another, with all of its vocabulary."""
    place = linked(model, FOLDER)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = LAYERS
    config.pop("layer_types", None)
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def check_installed(names: Sequence[str]) -> None:
    """Raise SystemExit with the cure where a package is not installed, or in another version."""
    needed = {"trl": "trl", "openrlhf": "openrlhf", "liger": "liger-kernel"}
    for package in (needed[name] for name in names if name in needed):
        folder = f"{package.replace('-', '_')}-{peers.PINS[package]}.dist-info"
        if not (peers.SITE / folder).is_dir():
            cure = "python -m benchmarks.peers.install"
            raise SystemExit(f"benchmarks: {peers.label(package)} is not installed; run: {cure}")
    if "verl" in names and not VERL.ready:
        cure = "python -m benchmarks.peers.environments verl"
        raise SystemExit(f"benchmarks: verl's environment is not there; run: {cure}")


def one_way(name: str, ours: bool, steps: int, model: Path) -> dict[str, Any]:
    """Run a case one way in a process of its own: its series, seconds and peak memory."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.integrations", name, str(int(ours)), str(steps)]
    done = subprocess.run(
        [*command, str(model.resolve())], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["nothing said"]
        raise SystemExit(f"benchmarks: {name}: exit code {done.returncode}: {last[0][:300]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(name: str, ours: str, steps: str, model: str) -> None:
    """What `one_way` starts."""
    measure = example("both_ways").measure
    print(json.dumps(measure(CASES[name].train, ours == "1", int(steps), model)._asdict()))


def row(case_name: str, found: dict[bool, list[dict[str, Any]]], steps: int) -> dict[str, Any]:
    """Medians of both ways, ours as a share of theirs, and how far their series are apart."""
    case = CASES[case_name]
    made: dict[str, Any] = {"case": case_name, "package": case.package, "what": case.what}
    made |= {"part": case.part, "steps": steps, "rounds": len(found[True])}
    for key, name in (("part", "cpu_seconds"), ("cpu", "whole_cpu_seconds"), ("peak_mib",) * 2):
        theirs, ours = ([run[key] for run in found[way]] for way in (False, True))
        middle = {"theirs": statistics.median(theirs), "ours": statistics.median(ours)}
        made[name] = {**middle, "share": middle["ours"] / middle["theirs"]}
        made[name] |= {"all_theirs": theirs, "all_ours": ours}
    both = example("both_ways")
    made["compared"] = {}
    for name, theirs in found[False][0]["series"].items():
        ours = found[True][0]["series"][name]
        made["compared"][name] = {
            "size": both.size(theirs),
            "difference": both.difference(theirs, ours),
            "theirs": theirs,
            "ours": ours,
        }
    made["wrong"] = wrong(made["compared"])
    made["status"] = "wrong" if made["wrong"] else "timed"
    return made


def wrong(compared: dict[str, dict[str, Any]]) -> list[str]:
    """What keeps both ways from being the same, or their comparison from saying so; a line each."""
    lines = []
    for name, each in compared.items():
        if not each["difference"] <= TOLERANCE:
            lines.append(f"{name} differs by {each['difference']:.0e} of its size")
        if not each["size"] >= LEAST:
            lines.append(f"{name} is {each['size']:.0e}, which may be rounding")
        if len(set(each["theirs"])) == 1:
            lines.append(f"{name} is the same in every step")
    return lines


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    where = found["machine"]
    lines = [
        f"# Other people's trainers, {found['date']}",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB; torch "
        f"{where['torch']}, one thread; `{found['command']}`. Each way is a process of its own. "
        "CPU time: the median of the rounds. Memory is the most that the process ever had "
        "resident, with packages and model. Compared: the largest difference in any step, as a "
        "share of the median over the steps.",
        "",
        *(f"- {note}" for note in found["notes"]),
        "",
        HEADER,
        "|" + "---|" * 9,
        *map(line, found["rows"]),
    ]
    return "\n".join(lines) + "\n"


HEADER = (
    "| trainer | what | CPU seconds of | theirs | ours | share | peak MiB, theirs | ours "
    "| compared, and the largest difference |"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    seconds, peak = row["cpu_seconds"], row["peak_mib"]
    cells = [
        row["package"],
        f"{row['what']}; {row['steps']} steps",
        row["part"],
        f"{seconds['theirs']:.2f}",
        f"{seconds['ours']:.2f}",
        f"{seconds['share']:.2f}",
        f"{peak['theirs']:.0f}",
        f"{peak['ours']:.0f}",
        ", ".join(f"{name} {each['difference']:.0e}" for name, each in row["compared"].items()),
    ]
    return "| " + " | ".join(cells) + " |"


def main(asked: argparse.Namespace, argv: Sequence[str]) -> int:
    """0, or 1 where the two ways differ by more than rounding, or where that cannot be told."""
    check_installed(asked.only)
    before, load = OthersLoad(), OthersLoad()
    with before:
        time.sleep(0.1 if asked.quick else 1.0)
    model = shorten(asked.model) if "trl" in asked.only else asked.model
    notes = [f"{QUICK} steps: a walk, no measurement"] if asked.quick else []
    out = asked.out or (None if asked.quick else report.RESULTS / "integrations.json")
    rows: list[dict[str, Any]] = []
    if asked.add and out is not None and out.is_file():
        earlier = json.loads(out.read_text(encoding="utf-8"))["rows"]
        rows = [each for each in earlier if each["case"] not in asked.only]
    for name in asked.only:
        case, found = CASES[name], {False: [], True: []}
        steps = QUICK if asked.quick else case.steps
        for turn in range(1 if asked.quick else asked.rounds):
            for ours in (turn % 2 == 1, turn % 2 == 0):
                with load:
                    found[ours].append(one_way(name, ours, steps, model))
        rows.append(row(name, found, steps))
        print(line(rows[-1]), *rows[-1]["wrong"], sep="\n", file=sys.stderr, flush=True)
        made = report.result("integrations", rows, before, load, notes, argv)
        made["notes"] = notes  # not that the machine was busy: CPU time has little of that
        if out is not None:  # after every case, so that one that fails costs no other
            out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(markdown(made), encoding="utf-8")
    print(markdown(made), *([out] if out else []), sep="\n")
    return 0 if all(row["status"] == "timed" for row in rows) else 1


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--quick", action="store_true", help="few steps of each: no measurement")
    one.add_argument("--out", type=Path, metavar="FILE", help="the JSON; a .md goes beside it")
    one.add_argument("--rounds", type=int, default=1, help="processes of each way (1)")
    one.add_argument("--add", action="store_true", help="to the rows that the JSON has already")
    one.add_argument("--model", type=Path, default=MODEL, help=f"for TRL, default {MODEL}")
    one.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="TRAINER")


if __name__ == "__main__":
    child(*sys.argv[1:])
