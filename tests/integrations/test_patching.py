"""Other packages are imported by nobody but their module; versions and names are looked after."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import ModuleType

import pytest

from fastppo.integrations import patching


@pytest.mark.slow  # a process that imports torch
def test_nothing_of_another_trainer_is_imported_before_its_module_is():
    script = (
        "import sys, fastppo, fastppo.ops, fastppo.integrations, fastppo.integrations.liger\n"
        "names = {'trl', 'verl', 'openrlhf', 'liger_kernel', 'transformers', 'peft', 'ray'}\n"
        "print(sorted(names & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("installed", ["1.17.0", None], ids=["another", "a source tree"])
def test_another_version_is_a_warning_that_names_both(monkeypatch, installed):
    def version(package):
        if installed is None:
            raise patching.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(patching, "version", version)
    came = installed or "of an unknown version"
    with pytest.warns(UserWarning, match=f"tried with trl 1.16.0; {came} is installed"):
        patching.check_version("trl")


def test_the_version_that_was_tried_is_no_warning(monkeypatch):
    monkeypatch.setattr(patching, "version", patching.TRIED.__getitem__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for package in patching.TRIED:
            patching.check_version(package)


def test_a_name_is_replaced_where_it_was_imported_and_nowhere_else(monkeypatch):
    """`another.user` is of another package, and `pack.own` has a function of the same name."""
    old, new, own = object(), object(), object()
    modules = {"pack": old, "pack.user": old, "another.user": old, "pack.own": own}
    for path, value in modules.items():
        module = ModuleType(path)
        module.head = value
        monkeypatch.setitem(sys.modules, path, module)
    patching.replace("pack", "head", old, new)
    assert [sys.modules[path].head for path in modules] == [new, new, old, own]
    patching.replace("pack", "head", new, old)
    assert [sys.modules[path].head for path in modules] == list(modules.values())
