"""Read a YAML or JSON file as a mapping; only its syntax is checked here, its keys in schema.py."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fastppo.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys; PyYAML would silently keep the last one."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        name = loader.construct_object(key_node, deep=True)
        if not isinstance(name, Hashable):
            raise UserError(f"line {key_node.start_mark.line + 1}: a key is not text; mend it")
        if name in seen:
            raise UserError(
                f"line {key_node.start_mark.line + 1}: '{name}' is given twice; keep one"
            )
        seen.add(name)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node)


# YAML 1.1 reads 1e-5 as text, because it has no point; OmegaConf and others read a number.
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"'{name}' is given twice; keep one")
    return dict(pairs)


def _parse(text: str, path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(text, object_pairs_hook=_object)
    return yaml.load(text, _Loader)


NEEDED = "stage, model_name_or_path, dataset, output_dir"  # by a training


# What PyYAML was reading when it gave up -> what is wrong with the line in which that began.
OPENED = {
    "while scanning a simple key": "no ': '; write key: value, with a space after the colon",
    "while scanning a quoted": "a quotation mark that is not closed; close it",
    "while parsing a flow": "a bracket that is not closed, or no comma; mend it",
}


def yaml_fault(error: yaml.MarkedYAMLError, text: str) -> str:
    """The line to mend, what is wrong with it and what to do, of what PyYAML says of a file.

    PyYAML marks where it gave up: for a missing space or quotation mark lines further down.
    """
    context, problem = error.context or "", str(error.problem)
    kind = next((words for words in OPENED if context.startswith(words)), None)
    mark = (error.context_mark if kind else None) or error.problem_mark
    number = mark.line + 1 if mark else 1
    written = "".join(text.splitlines()[number - 1 : number]).strip()
    if kind:
        why = OPENED[kind]
    elif r"'\t'" in problem:
        why = "a tab before the key or value; use spaces"
    elif problem.startswith("mapping values"):
        again = written.count(": ") > 1
        why = "a second ': '; put the value into quotes" if again else "an indent; take it away"
    else:
        return f"line {number}: {problem}; mend the line"
    return f"line {number}, {written[:60]!r}: {why}"


def read_file(path: Path, needed: str = NEEDED) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; UTF-8, with or without a byte order mark.

    `needed` are the keys that it must have, for the error if it is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; name a YAML file, for example examples/demo_ppo.yaml"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path and its permissions") from None
    except ValueError:
        raise UserError(f"{str(path)!r}: no path is written so; name a YAML file") from None
    try:
        # JSON has its own parser, because YAML's refuses tabs. yaml.load with a SafeLoader is safe.
        data = _parse(text, path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON, line {error.lineno}: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}: not YAML, {yaml_fault(error, text)}") from None
    except Exception as error:  # PyYAML's constructors can raise anything, as for `!!bool x`
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read: {why}; mend the file") from None
    if data is None:
        raise UserError(f"{path}: is empty; it needs at least {needed}")
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: is a {type(data).__name__}, not a mapping; write 'key: value' lines"
        )
    return data


def parse_value(text: str) -> Any:
    """The value of a text in YAML; if it is no YAML, the text itself."""
    try:
        return yaml.load(text, _Loader) if text else None
    except Exception:  # PyYAML's constructors can raise anything
        return text


def override(data: dict[str, Any], text: str) -> str:
    """Set `key=value`, or `key.inner=value`, of the command line in `data`; returns the key."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UserError(f"'{text}': not key=value; write for example learning_rate=2e-5")
    key, *inner = name.strip().split(".")
    if not inner:
        data[key] = parse_value(value)
        return key
    # A copy, so that the file's own mapping does not change.
    data[key] = mapping = dict(data[key]) if isinstance(data.get(key), dict) else {}
    for part in inner[:-1]:
        deeper = dict(mapping[part]) if isinstance(mapping.get(part), dict) else {}
        mapping[part], mapping = deeper, deeper
    mapping[inner[-1]] = parse_value(value)
    return key


def read_json(path: Path, what: str | None = None) -> dict[str, Any]:
    """Read the JSON object in a small file of a model folder; `what` begins its error lines."""
    where = str(path) if what is None else f"{what}: {path}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({error}); mend or replace it") from None
    if not isinstance(data, dict):
        raise UserError(f"{where} is not a JSON object; replace it")
    return data
