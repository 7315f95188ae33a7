"""Names are the field's: none of an idiom that a newcomer would have to learn first."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fastppo"
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if not {"ops", "kernels"} & set(path.relative_to(PACKAGE).parts)
)
# A name that no module, class, function or public attribute has -> what says the same in the
# field's words. The ground is one for all: nobody who looks for the concept searches for this word.
WORDS = {
    "Seat": "Place: the model, adapter and head that a role has",
    "seats": "places, or roles",
    "settle": "resolve_auto: choose a value for a key that is auto",
    "settled": "the same as a participle: a function is named by what it does",
    "advising": "advice_on_failure: what is printed if a run ends out of memory",
    "Stash": "the module that moves parameters to the host: offload.parked",
    "stash": "save, or move to the host",
    "residents": "StaticBytes: weights, gradients and optimiser state",
    "Residents": "StaticBytes",
    "moments": "peaks: the points of a step where memory is highest",
    "Moment": "Peak",
    "recipe": "inputs: what the memory plan is computed from",
    "Recipe": "PlanInputs",
    "held_out": "evaluate_only (a run without training), eval_pairs, eval_is_held_out",
    "trained": "trainable (parameters that train), or finished (a model that has been trained)",
    "finish": "what is written at the end, by its name: save_final, write_card",
    "phases": "rollout, score, update: the phase itself",
    "only": "what is left over: generation_config_of, STAGE_KEYS",
    "retried": "retry",
    "sampled": "sample",
    "scored": "score",
    "said": "message, or notes",
    "say": "print, or message",
    "beside": "partial_folder: where a folder is written before it is renamed",
    "again": "with_changes, or retry",
    "kept": "keep: a function is named by what it does",
    "go_on": "resume",
    "makes": "creates, or builds",
}
# `Experience.scored` is a value, not a function: the rollout after scoring. So is `Scored.kept`.
VALUES = {"scored", "kept"}


def names_in(tree: ast.Module) -> list[tuple[str, bool]]:
    """Names of classes, functions and public attributes, and whether each is a mere value."""
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((node.name, False))
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                targets = []
                if isinstance(statement, ast.Assign):
                    targets = statement.targets
                elif isinstance(statement, ast.AnnAssign):
                    targets = [statement.target]
                found += [(target.id, True) for target in targets if isinstance(target, ast.Name)]
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.append((node.attr, True))
    return found


def test_no_name_is_of_a_private_idiom():
    assert len(MODULES) > 100
    wrong = {
        (path.relative_to(PACKAGE).as_posix(), name): WORDS[word]
        for path in MODULES
        for name, is_value in [
            (path.stem, False),
            *names_in(ast.parse(path.read_text(encoding="utf-8"))),
        ]
        if (word := name.strip("_")) in WORDS and not (is_value and word in VALUES)
    }
    assert not wrong


def test_the_words_are_looked_for_where_they_would_stand():
    text = "class Seat:\n    go_on: int\n    def again(self):\n        self.stash = 1\nONLY = 1\n"
    names = {name for name, _ in names_in(ast.parse(text))}
    assert names == {"Seat", "go_on", "again", "stash", "ONLY"}
