"""Whatever a file, an override or a data set holds: a result, or one clean error."""

from __future__ import annotations

import json
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastppo.cli import main
from fastppo.config import Config, config_from_dict, load_config
from fastppo.config.ppo import ALIASES
from fastppo.config.schema import IGNORED, REFUSED
from fastppo.data import read_records
from fastppo.errors import UserError
from tests.project import PPO, RM, write_json

KNOWN = sorted({*Config.model_fields, *IGNORED, *REFUSED, *ALIASES})
# A quarter of that in the fast suite: tests/config/conftest.py.
HUNDRED = settings.default.max_examples
# The fixture is one folder for all examples: each writes its own files anew.
QUICK = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", " ", ",", "a,b", "\0", "\ud800", "auto", "1e999", "../x", "x" * 5000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
PAIRS = st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=12), VALUES, max_size=5)


def clean(error: UserError) -> None:
    """One line that somebody reads."""
    text = " ".join(str(error).split())
    assert text
    assert len(text) < 2000, text[:300]


def tried(function: Any, *arguments: Any) -> Any:
    """The result, or None for a clean error; anything else that is raised fails the test."""
    try:
        return function(*arguments)
    except UserError as error:
        clean(error)
        return None


@settings(max_examples=3 * HUNDRED, **QUICK)
@given(PAIRS)
def test_any_keys_and_values_give_a_configuration_or_one_clean_error(values):
    config = tried(config_from_dict, {**PPO, **values})
    assert config is None or isinstance(config, Config)


@settings(max_examples=3 * HUNDRED // 2, **QUICK)
@given(st.sampled_from(KNOWN), VALUES)
def test_any_value_of_one_key_passes_preflight_or_is_an_error(project, name, value):
    """What the YAML lets through is opened, and what is no path is no crash."""
    from fastppo.run.preflight import check

    config = tried(config_from_dict, {**PPO, name: value})
    # A hub is asked only where the file says so, and never here.
    if config is not None and config.dataset_dir != "ONLINE":
        tried(check, config)


LINES = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.builds("{}: {}".format, st.sampled_from(KNOWN), st.text(max_size=12)),
        st.sampled_from(
            ["- a", "a: [", "<<: *x", "&x y: *x", "!!timestamp x", "!!int ''", "!!bool x", "? {}"]
        ),
    ),
    max_size=6,
).map("\n".join)


@settings(max_examples=2 * HUNDRED, **QUICK)
@given(LINES | st.text(st.sampled_from(string.punctuation + " \n\tab1"), max_size=40))
@example("a: !!timestamp x")
@example("a: !!int ''")
@example("a: !!float ''")
@example("a: !!bool x")
@example("a: !!set {[a]}")
@example("&x a: *x")
@example("stage: &x [*x]")
@example("seed: 0x" + "f" * 6000)
@example("[" * 5000)
def test_any_text_as_a_file(tmp_path_factory, text):
    for name in ("run.yaml", "run.json"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        tried(load_config, path)


@settings(max_examples=3 * HUNDRED, **QUICK)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    path.write_bytes(data)
    tried(load_config, path)


@settings(max_examples=2 * HUNDRED, **QUICK)
@given(
    st.lists(
        st.text(max_size=20)
        | st.builds("{}={}".format, st.sampled_from(KNOWN), st.text(max_size=12))
        | st.builds("{}={}".format, st.sampled_from(KNOWN), st.sampled_from(["!!bool x", "*x"])),
        max_size=4,
    )
)
def test_any_overrides(tmp_path_factory, overrides):
    path = tmp_path_factory.getbasetemp() / "good.yaml"
    path.write_text(yaml.safe_dump(PPO))
    tried(load_config, path, overrides)


@settings(max_examples=3 * HUNDRED // 2, **QUICK)
@given(st.lists(st.text(max_size=12), max_size=3))
@example(["\0"])
@example(["\ud800"])
@example(["--plan", "--gpu"])
@example(["--plan", "run.yaml", "--gpu=1e400GiB"])
@example(["train"])
def test_any_command_line(project, capsys, arguments):
    assert main(arguments) in (0, 2)
    out, err = capsys.readouterr()
    assert out or err.count("\n") == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system", "cat"]) | JSON,
        "value": st.text(max_size=4) | JSON,
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
        "content": st.text(max_size=4) | JSON,
        "tool_calls": JSON,
    },
)
TURNS = st.lists(TURN | JSON, max_size=4) | JSON
TEXT = st.text(max_size=4) | JSON
ROW = st.fixed_dictionaries(
    {},
    optional={
        "instruction": TEXT,
        "input": TEXT,
        "output": TEXT,
        "chosen": TEXT | TURN,
        "rejected": TEXT | TURN,
        "history": TURNS,
        "conversations": TURNS,
        "messages": TURNS,
        "system": TEXT,
        "tools": TEXT,
    },
)
KEPT = st.sampled_from(["alpaca", "sharegpt", "openai"])


@settings(max_examples=2 * HUNDRED, **QUICK)
@given(st.lists(ROW | JSON, max_size=4), KEPT, st.booleans(), st.booleans())
def test_any_rows(project, rows, formatting, ranking, history):
    columns = {"prompt": "instruction", "history": "history", "messages": "messages"}
    info = {"file_name": "any.json", "formatting": formatting, "ranking": ranking}
    if history:
        info["columns"] = columns
    write_json(project / "data" / "dataset_info.json", {"d": info})
    (project / "data" / "any.json").write_text(json.dumps(rows))
    found = tried(read_records, config_from_dict({**(RM if ranking else PPO), "dataset": "d"}))
    for record in [] if found is None else found.train:
        record.messages[-1]["content"].encode()  # text that a tokenizer takes


@settings(max_examples=2 * HUNDRED, **QUICK)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda x: x.encode("utf-8", "replace")))
@example(b"[]")
@example(b"\xef\xbb\xbf[{}]")
@example(b'{"instruction": "a"}\n{"instr')
@example(b"[NaN, Infinity]")
def test_any_bytes_as_data(project, data):
    (project / "data" / "prompts.json").write_bytes(data)
    tried(read_records, config_from_dict(PPO))


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "file_name": st.sampled_from(["prompts.json", "chats.json", "", ".", "..", "/", "\0"])
        | JSON,
        "formatting": KEPT | JSON,
        "ranking": st.booleans() | JSON,
        "columns": st.dictionaries(
            st.sampled_from(["prompt", "query", "history", "messages", "system", "tools"])
            | st.text(max_size=4),
            st.sampled_from(["instruction", "conversations", "output", ""]) | JSON,
        )
        | JSON,
        "tags": st.dictionaries(
            st.sampled_from(["role_tag", "content_tag", "user_tag", "assistant_tag"]), JSON
        )
        | JSON,
        "num_samples": st.integers(-1, 9) | JSON,
        "subset": JSON,
        "folder": JSON,
    },
)


@settings(max_examples=2 * HUNDRED, **QUICK)
@given(st.fixed_dictionaries({}, optional={"d": ENTRY | JSON}) | JSON)
def test_any_dataset_info(project, infos):
    (project / "data" / "dataset_info.json").write_text(json.dumps(infos))
    tried(read_records, config_from_dict({**PPO, "dataset": "d"}))


@settings(max_examples=HUNDRED, **QUICK)
@given(st.dictionaries(st.sampled_from(["hidden_size", "num_hidden_layers", "vocab_size"]), JSON))
def test_any_config_json_of_a_model(project, capsys, config):
    (project / "model" / "config.json").write_text(json.dumps(config))
    (project / "run.yaml").write_text(yaml.safe_dump(PPO))
    assert main(["run.yaml", "--plan"]) in (0, 2)
    with suppress(ValueError):
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.json", "dataset_info.json"])
def test_deep_json_is_an_error_and_no_crash(project: Path, name):
    for text in ("[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900):
        (project / "data" / name).write_text(text)
        tried(read_records, config_from_dict(PPO))
