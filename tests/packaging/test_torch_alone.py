"""The base install: an environment with torch, what torch requires, fastppo, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastppo import packages

if sys.version_info >= (3, 11):
    import tomllib
else:  # as pytest has it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def required(name: str) -> dict[str, Requirement]:
    """An extra's requirements by package; those of the base under the name `base`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] if name == "base" else project["optional-dependencies"][name]
    return {found.name: found for found in map(Requirement, lines)}


def closure(name: str) -> set[str]:
    """A package and all that it requires here, extras left out."""
    found, waiting = set(), [name]
    while waiting:
        package = waiting.pop().lower()
        if package in found:
            continue
        found.add(package)
        for requirement in map(Requirement, distribution(package).requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of that environment. Packages are links: a copy of torch would be 1 GiB."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in closure("torch"):
        for file in distribution(package).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(distribution(package).locate_file(top))
    (site / "fastppo").symlink_to(ROOT / "fastppo")
    return folder / "bin" / "python"


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Isolated: neither PYTHONPATH, nor the working directory, nor the user's own packages."""
    return subprocess.run(
        [str(python), "-I", *arguments], capture_output=True, text=True, check=False
    )


def test_the_environment_has_torch_and_none_of_the_trainers_packages(python):
    code = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n)))"
    done = run(python, "-c", code, "torch", "fastppo", *(name for _, name, _ in packages.TRAIN))
    assert done.stdout.split() == ["torch", "fastppo"], done.stderr


def test_the_operators_compute(python):
    code = """
import fastppo, fastppo.offload, fastppo.ops, torch
from fastppo.ops import gae, linear_token_logprobs
hidden = torch.ones(2, 3, requires_grad=True)
logprob = linear_token_logprobs(hidden, torch.zeros(4, 3), torch.tensor([0, 1])).logprob_N
logprob.sum().backward()
print(logprob.exp().tolist(), hidden.grad.sum().item())
offsets = torch.tensor([0, 2], dtype=torch.int32)
print(gae(torch.tensor([0.0, 3.0]), torch.tensor([2.0, 1.0]), offsets, lam=1.0)[0].tolist())
"""
    done = run(python, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[0.25, 0.25] 0.0", "[1.0, 2.0]", ""]


@pytest.mark.parametrize("command", ["fastppo-train", "fastppo-export", "fastppo-report"])
@pytest.mark.parametrize("arguments", [[], ["run.yaml"], ["run.yaml", "--plan"]])
def test_a_command_names_what_is_missing_and_the_cure(python, tmp_path, command, arguments):
    if command != "fastppo-train" and "--plan" in arguments:
        arguments = ["saves/ppo", "export"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"][command].partition(":")
    # As the script that pip writes calls it.
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    done = run(python, "-c", code, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    names = ", ".join(package for package, _, _ in packages.TRAIN)
    assert done.stderr == (
        f"{command}: error: {names} are not installed; "
        "run: pip install '.[train]' in fastppo's checkout\n"
    )


@pytest.mark.parametrize("command", ["cli", "export.cli", "report.cli"])
def test_help_needs_no_package(python, command):
    done = run(python, "-m", f"fastppo.{command}", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fastppo-")


def test_the_loop_from_python_says_the_same(python):
    done = run(python, "-c", "from fastppo import step_update")
    assert done.stderr.splitlines()[-1].startswith("ImportError: fastppo.step_update: transformers")
    assert "pip install '.[train]'" in done.stderr


def test_the_base_is_torch_and_triton():
    assert set(required("base")) == {"torch", "triton"}


def test_what_is_looked_for_is_the_extra_train():
    assert {name: f">={least}" for name, _, least in packages.TRAIN} == {
        name: str(found.specifier) for name, found in required("train").items()
    }
    for extra in ("dev", "demo"):
        assert "train" in required(extra)["fastppo"].extras


def test_a_version_that_is_too_old_is_named_with_both(monkeypatch):
    # Installed before, without the extra: pip has not looked at it.
    def version(package):
        if package == "rich":
            raise PackageNotFoundError
        return {"transformers": "4.57.6", "peft": "0.9.dev1"}.get(package, "99")

    monkeypatch.setattr(packages, "version", version)
    assert packages.missing_for_training() == (
        "transformers>=5 (here is 4.57.6), peft>=0.18 (here is 0.9.dev1) are not installed; "
        "run: pip install '.[train]' in fastppo's checkout"
    )


def test_a_version_that_is_as_asked_for_or_newer_is_enough(monkeypatch):
    monkeypatch.setattr(packages, "version", {name: x for name, _, x in packages.TRAIN}.get)
    assert packages.missing_for_training() is None
    monkeypatch.setattr(packages, "version", lambda package: "100.0.1+local")
    assert packages.missing_for_training() is None
