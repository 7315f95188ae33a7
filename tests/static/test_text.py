"""What the files say: of the project alone, in UTF-8, with links that lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def files() -> list[Path]:
    """What git tracks, or would: build outputs and links are left out."""
    out = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = [ROOT / name for name in out.splitlines()]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_text_is_utf8_and_names_no_place_on_a_machine():
    places = re.compile(r"(?<![\w.])/(?:work|home|root|opt|mnt)/\w|/tmp/\w")
    wrong = []
    for path in files():
        if path.suffix in (".png", ".safetensors"):
            continue
        text = path.read_text(encoding="utf-8")
        wrong += [f"{path.relative_to(ROOT)}: {found}" for found in places.findall(text)]
    assert not wrong


def test_the_only_licence_is_ours():
    named = [path for path in files() if re.match(r"(?i)(licen[cs]e|copying|notice)", path.name)]
    assert [path.relative_to(ROOT).as_posix() for path in named] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]


@pytest.mark.parametrize(
    "page", [path for path in files() if path.suffix == ".md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"\w+:", link)]
    assert all((page.parent / link).exists() for link in local), local
