"""docs/bad_input.md, made from the table:  python -m tests.bad.page > docs/bad_input.md"""

from __future__ import annotations

import json

from tests.bad import AREAS, Case, cases

INTRODUCTION = """# Bad input

What is wrong in a command line, a file, a key, data, a model or a reward is said in one line that
names the thing and the cure, `fastppo-train: error: ...` on stderr (or another command's name); the
exit code is 2, nothing has been written, and no pickle, script or code that came with a model has
run. What fails later, in mid run, stops the run with exit code 1. Operators raise `ValueError` or
`TypeError` with such a line.

These {count} cases are tests: `tests/bad/*.yaml` holds them, three loops run them and compare
the whole line, and this page is made from them. `...` stands for what differs from run to run or
is a library's own word. The run is named `run.yaml`; its model is in `./model`, its reward model in
`reward`, its data in `data`. Beyond the table, random files, keys, values, rows and descriptions of
data (`tests/config/test_fuzz.py`) and random calls of the operators (`tests/ops/test_fuzz.py`) have
to end in a result or in such an error.

"""
FOUND = """
## Never, whatever the input

| | where it is tested |
|---|---|
"""
# What holds without any case: in words, and the test that would fail.
ALWAYS = {
    "weights are safetensors; a `.bin` that is all there is opens as tensors alone, "
    "and one that would run code is refused": "test_a_pickle_is_opened_nowhere",
    "`trust_remote_code` is off unless the file says so, and goes to nobody else": (
        "test_code_that_comes_with_a_model_is_not_run_unasked"
    ),
    "nothing in the package unpickles, evaluates or runs text": (
        "test_no_module_can_run_what_it_reads"
    ),
    "a reward function has an importable name, never a path": "test_functions_that_are_not_there",
    "servers are spoken to by http and https alone; a redirect is refused": (
        "test_redirects_are_not_followed"
    ),
    "an answer over 1 MiB is not read to its end": "test_an_endless_answer_is_cut_off",
    "tokens, passwords and queries of URLs are in no message and no file of a run": (
        "test_no_file_of_a_run_holds_a_secret"
    ),
    "what `dataset_info.json` names lies in its folder; "
    "a path in the YAML itself may lead anywhere": "test_paths_in_the_yaml_may_lead_anywhere",
}


def cell(text: str) -> str:
    """Text that a table can hold."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def given(case: Case) -> str:
    """The part of a case that fits beside its words: keys or the call."""
    if case.call:
        return f": `{case.call}`"
    if not case.keys:
        return ""
    text = ", ".join(
        f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in case.keys.items()
    )
    text = text.replace("\n", "\\n").replace("\0", "\\0")
    text = text.replace("|", "\\|")
    return f": `{text}`" if len(text) <= 70 else ""


def page() -> str:
    """The whole page."""
    everything = cases(*AREAS)
    text = INTRODUCTION.format(count=len(everything))
    for area, heading in AREAS.items():
        rows = [case for case in everything if case.area == area]
        text += f"## {heading}\n\n| wrong | the line |\n|---|---|\n"
        text += "".join(f"| {cell(c.wrong)}{given(c)} | {cell(c.line)} |\n" for c in rows) + "\n"
    text = text.rstrip("\n") + "\n" + FOUND
    return text + "".join(f"| {cell(what)} | `{test}` |\n" for what, test in ALWAYS.items())


if __name__ == "__main__":
    print(page(), end="")
