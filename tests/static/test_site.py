"""The documentation's site, without building it: its pages, its links, its pictures."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from fastppo.ops import gae
from fastppo.ops.losses import ppo_clip

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def tool(name: str) -> ModuleType:
    """A script of docs/tools as a module."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", DOCS / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, pictures = tool("hooks"), tool("pictures")


def nav_pages(entries: Any) -> list[str]:
    """The pages of the navigation, in its order."""
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in values for page in nav_pages(entry)]


def test_the_navigation_has_every_page_once_and_no_other():
    named = nav_pages(SITE["nav"])
    there = [path.name for path in DOCS.glob("*.md")]
    report = "demo_report.html"  # a page already
    assert sorted(named) == sorted([*there, *hooks.PAGES.values(), *hooks.API, report])


@pytest.fixture(scope="module")
def outside() -> dict[str, str]:
    return hooks.pages_outside()


def test_every_link_of_the_site_leads_to_one_of_its_pages(outside):
    texts = {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    texts |= {path: text for path, text in outside.items() if path.endswith(".md")}
    pages = {hooks.page_of(path) for path in [*texts, *outside]}
    files = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.*")}
    wrong, seen = [], 0
    for path, text in texts.items():
        folder = os.path.dirname(hooks.page_of(path))
        for link in hooks.links_of(hooks.with_links_of_site(text, path)):
            seen += 1
            if os.path.normpath(os.path.join(folder, link)) not in pages | files:
                wrong.append((path, link))
    assert seen > 150
    assert wrong == []


def test_links_of_a_page_follow_it_to_the_site():
    text = "[a](../CONTRIBUTING.md#habits) `[b](c.md)` [d](../fastppo/ppo/trainer.py) [e](ppo.md)"
    assert hooks.with_links_of_site(text, "docs/data.md") == (
        "[a](contributing.md#habits) `[b](c.md)` [d](source/fastppo/ppo/trainer.py.md) [e](ppo.md)"
    )
    assert hooks.with_links_of_site("![x](docs/demo_curves.png)", "README.md") == (
        "![x](demo_curves.png)"
    )
    assert hooks.with_links_of_site("[x](README.md)", "examples/README.md") == "[x](examples.md)"


def test_lists_are_continued_by_four_spaces_a_level():
    given = "text\n- a\n  - b\n    more\n\n1. c\n\n   ```\n   x\n     y\n   ```\n\nend\n"
    assert hooks.with_four_spaces(given) == (
        "text\n\n- a\n    - b\n        more\n\n1. c\n\n    ```\n    x\n      y\n    ```\n\nend\n"
    )


def test_the_site_asks_no_other_host():
    assert SITE["theme"]["font"] is False
    assert "offline" in SITE["plugins"]
    assert not re.search(r"//\w", re.sub(r"^#.*$", "", yaml.dump(SITE), flags=re.MULTILINE))
    assert "//" not in re.sub(r"/\*.*?\*/", "", (DOCS / "tools" / "site.css").read_text())


def test_what_builds_the_site_is_pinned():
    lines = (DOCS / "tools" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["mkdocs"].startswith("1.6.")
    assert {"mkdocs-material", "mkdocstrings", "mkdocstrings-python"} <= set(pins)


def test_the_first_paragraph_of_a_page_is_its_line_in_llms_txt():
    text = "# Head\n\n[中文](x.md)\n\n![p](p.png)\n\nIt [does](a.md) this.\nAnd that.\n\nMore.\n"
    assert hooks.summary_of(text) == "It does this. And that."


def test_every_part_of_the_api_is_there():
    for _, names in hooks.API.values():
        for name in hooks.described(names):
            home, _, last = name.rpartition(".")
            found = importlib.import_module(home)
            assert hasattr(found, last) or importlib.util.find_spec(name), name


@pytest.mark.parametrize("name", sorted(pictures.PICTURES))
def test_a_picture_is_what_its_script_draws_and_a_page_shows_it(name):
    drawn = pictures.PICTURES[name]()
    assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == drawn
    assert f"](pictures/{name})" in (DOCS / "concepts.md").read_text(encoding="utf-8")


def test_the_picture_of_the_clip_is_of_the_loss_that_trains():
    ratio = torch.tensor([0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 1.7], dtype=torch.float64)
    for advantage in (1.0, -1.0):
        loss = ppo_clip(ratio.log(), torch.zeros_like(ratio), torch.full_like(ratio, advantage))
        drawn = [pictures.clipped(r, advantage) for r in ratio.tolist()]
        assert (-loss.loss).tolist() == pytest.approx(drawn)


def test_the_picture_of_advantages_is_of_our_estimator():
    rewards, values = pictures.token_rewards(), list(pictures.VALUES)
    want, _ = gae(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        torch.tensor([0, len(values)], dtype=torch.int32),
        gamma=1.0,
        lam=0.95,
    )
    found = pictures.gae(rewards, values, gamma=1.0, lam=0.95)
    assert want.tolist() == pytest.approx(found, abs=1e-6)
    page = (DOCS / "concepts.md").read_text(encoding="utf-8")
    at = pictures.TOKENS.index("lovely")
    assert f'{values[at]:g} before "lovely" and {values[at + 1]:g} after it' in page
    assert max(found) == found[at]


def test_lines_that_the_program_prints_are_wrapped_and_commands_are_not():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="troubleshooting.md"))
    block = '<div class="highlight"><pre><span></span><code>{}: error: x</code></pre></div>'
    marked = hooks.on_page_content(block.format("fastppo-train"), page, None, None)
    assert marked.startswith('<div class="highlight printed"><pre>')
    command = block.format("make demo")
    assert hooks.on_page_content(command, page, None, None) == command
