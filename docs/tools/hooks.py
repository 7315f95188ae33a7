"""MkDocs' hooks: what lies outside docs/ becomes pages too, and links between all of them hold.

Pages link through the repository (../CONTRIBUTING.md, ../fastppo/ppo/trainer.py), as they are read
there. On the site README.md and its like are pages, and source files are pages with their text.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Files outside docs/ that have a place in the navigation -> their page.
PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh-CN.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "examples/quickstart.ipynb": "quickstart.md",
    "benchmarks/README.md": "measuring.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".cpp": "cpp", ".h": "cpp"}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
CODE = re.compile(r"(^[ \t]*```.*?^[ \t]*```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
ITEM = re.compile(r"([ ]*)([-*]|\d+\.)[ ]+")
# Page of the API -> heading, and what of the package it describes.
API = {
    "api/trainer.md": (
        "The trainer in Python",
        "fastppo.ppo.state.init_state fastppo.ppo.trainer.step_update "
        "fastppo.ppo.evaluation.evaluate fastppo.trainer.ppo_trainer.PPOTrainer",
    ),
    "api/ops.md": ("Operators", "fastppo.ops.*"),
    "api/losses.md": ("Losses", "fastppo.ops.losses.*"),
    "api/offload.md": ("Offloading", "fastppo.offload.*"),
    "api/integrations.md": (
        "Integrations",
        "fastppo.integrations.trl fastppo.integrations.verl fastppo.integrations.openrlhf "
        "fastppo.integrations.transformers fastppo.integrations.liger",
    ),
}


def described(names: str) -> list[str]:
    """The names of a page of the API; `package.*` is what the package exports, functions first."""
    found: list[str] = []
    for name in names.split():
        if not name.endswith(".*"):
            found.append(name)
            continue
        package = name.removesuffix(".*")
        folder = ROOT / package.replace(".", "/")
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        (exported,) = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        homes = {
            alias.name: f"{node.module}.{alias.name}"
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        values = [each for each in exported if not (folder / each).is_dir()]
        values.sort(key=lambda each: (each[0].isupper(), each))
        found += [homes.get(each, f"{package}.{each}") for each in values if not each.isupper()]
    return found


def page_of(path: str) -> str:
    """The page on the site of a file or folder of the repository, both as posix paths."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES:
        return PAGES[path]
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to all that is neither a block nor a span of code."""
    parts = CODE.split(text)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def links_of(text: str) -> list[str]:
    """The links in Markdown that lead into the repository, without their anchors."""
    found: list[str] = []

    def note(part: str) -> str:
        found.extend(LINK.findall(part))
        return part

    outside_code(text, note)
    local = [link for link in found if not re.match(r"\w+:|#", link)]
    return [link.partition("#")[0] for link in local]


def resolved(path: str, link: str) -> str:
    """The file of the repository that a link in the file (or folder) `path` leads to."""
    folder = path if (ROOT / path).is_dir() else os.path.dirname(path)
    return os.path.normpath(os.path.join(folder, link))


def with_links_of_site(text: str, path: str) -> str:
    """The text of the file `path` with its links as the site has them."""
    page = page_of(path)

    def change(match: re.Match[str]) -> str:
        link, anchor, name = match[1].partition("#")
        if not link or re.match(r"\w+:", link):
            return match[0]
        target = page_of(resolved(path, link))
        return os.path.relpath(target, os.path.dirname(page) or ".") + anchor + name

    return outside_code(text, lambda part: LINK.sub(change, part))


def with_four_spaces(text: str) -> str:
    """Markdown whose list items are continued by four spaces a level, as Python-Markdown wants.

    GitHub takes as many as the item's own marker is wide. A list also gets the empty line before it
    that GitHub does not need.
    """
    lines: list[str] = []
    items: list[tuple[int, int]] = []  # indentation of each open item, and of what belongs to it
    fence = ""
    for line in text.splitlines():
        mark = re.match(r"[ ]*(```+|~~~+)", line)
        width = len(line) - len(line.lstrip(" "))
        if line.strip() and not fence:
            previous = lines[-1].strip() if lines else ""
            while items and width < items[-1][1]:
                lazy = previous and not ITEM.match(line) and not line.startswith(("#", "|"))
                if lazy and width:
                    break
                items.pop()
        shift = 4 * len(items) - (items[-1][1] if items else 0)
        shown = " " * max(width + shift, 0) + line.lstrip(" ") if line.strip() else ""
        item = None if fence else ITEM.match(line)
        if item and (not items or len(item[1]) >= items[-1][1]):
            before = lines[-1].strip() if lines else ""
            opens = bool(before) and not ITEM.match(lines[-1].lstrip(" ")) and not items
            same = any(ITEM.match(x) for x in lines[-12:]) and not items
            if opens and not same:
                lines.append("")
            items.append((len(item[1]), len(item[0])))
        lines.append(shown)
        if mark:
            fence = "" if fence else mark[1]
    return "\n".join(lines) + "\n"


def notebook(path: Path) -> str:
    """A notebook with its outputs as Markdown; pictures are data of the page itself."""
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text'])}```")
            elif picture := output.get("data", {}).get("image/png"):
                parts.append(f'<img alt="curves" src="data:image/png;base64,{picture.strip()}">')
    return "\n\n".join(parts) + "\n"


def text_of(path: str) -> str:
    """The page of a file or folder outside docs/, before its links are changed."""
    where = ROOT / path
    if where.is_dir():
        names = sorted(x.name for x in where.iterdir() if not x.name.startswith((".", "_")))
        # One level: a folder's own folders are named and not followed.
        files = [name for name in names if (where / name).is_file()]
        return f"# {path}\n\n" + "".join(f"- [{x}]({x})\n" for x in files)
    text = where.read_text(encoding="utf-8")
    if where.suffix == ".md":
        return text
    if where.suffix == ".ipynb":
        return notebook(where)
    language = LANGUAGES.get(where.suffix, "text")
    return f"# {path}\n\n`````{language}\n{text}`````\n"


def pages_outside() -> dict[str, str]:
    """File or folder outside docs/ -> its text, for all that pages link to, however far."""
    found: dict[str, str] = {}
    left = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md"))]
    left += [path for path in PAGES if (ROOT / path).exists()]
    seen = set(left)
    while left:
        path = left.pop()
        inside = path.startswith("docs/")
        text = (ROOT / path).read_text(encoding="utf-8") if inside else text_of(path)
        if not inside:
            found[path] = text
        folder = (ROOT / path).is_dir()
        for link in links_of(text) if path.endswith(".md") or folder else ():
            target = resolved(path, link)
            if target in seen or not (ROOT / target).exists() or target.startswith(".."):
                continue
            seen.add(target)
            if not target.startswith("docs/"):
                left.append(target)
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no file of docs/."""
    from mkdocs.structure.files import File

    for path, text in pages_outside().items():
        name = page_of(path)
        shown = with_links_of_site(text, path)
        hidden = "---\nsearch:\n  exclude: true\n---\n" if name.startswith("source/") else ""
        files.append(File.generated(config, name, content=hidden + shown))
    for name, (heading, names) in API.items():
        blocks = "".join(f"\n::: {each}\n" for each in described(names))
        files.append(File.generated(config, name, content=f"# {heading}\n{blocks}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links and lists of a page of docs/ as the site wants them."""
    name = page.file.src_uri
    if page.file.generated_by is None:
        markdown = with_links_of_site(markdown, f"docs/{name}")
    return markdown if name.startswith("source/") else with_four_spaces(markdown)


SHIM, OWN = "https://unpkg.com/iframe-worker/shim", "tools/offline.js"


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Printed lines are marked, to be wrapped; a range that begins an argument's description
    (">= 0") is no quotation."""
    printed = r'<div class="(highlight)">(<pre><span></span><code>(?:fastppo-train: |  note: ))'
    html = re.sub(printed, r'<div class="\1 printed">\2', html)
    if page.file.src_uri not in API:
        return html
    return re.sub(r"<blockquote>\s*<p>(.*?)</p>\s*</blockquote>", r"&gt;\1", html, flags=re.DOTALL)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Load the theme's help for pages opened from the disk from the site itself."""
    folder = os.path.dirname(page.file.dest_uri) or "."
    return output.replace(SHIM, os.path.relpath(OWN, folder))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """The same for the page that stands in for one that is not there."""
    return output.replace(SHIM, OWN)


def summary_of(text: str) -> str:
    """The first paragraph of a page, without Markdown's links."""
    for part in re.split(r"\n\s*\n", text):
        if not part.lstrip().startswith(("#", "[", "!", "```", "|", "-", "<", "---", ":::")):
            plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", part)
            return " ".join(plain.split())
    return ""


def on_nav(nav: Any, config: Any, files: Any) -> Any:
    """Keep the navigation for llms.txt."""
    config["extra"]["pages"] = nav
    return nav


def on_post_build(config: Any) -> None:
    """Write llms.txt: every page of the navigation with its first paragraph.

    Raises:
        SystemExit: a page of the site asks another host for something.
    """
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    for section in config["extra"]["pages"].items:
        lines += [f"## {section.title}", ""]
        for page in section.children:
            said = summary_of(getattr(page, "markdown", None) or "")
            lines.append(f"- [{page.title}]({page.url})" + (f": {said}" if said else ""))
        lines.append("")
    site = Path(config["site_dir"])
    (site / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    asks = [
        f"{path.relative_to(site)}: {found}"
        for path in site.rglob("*.html")
        for found in re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^\" >]+",
            path.read_text(encoding="utf-8"),
        )
        if "canonical" not in found
    ]
    if asks:
        raise SystemExit("pages that ask another host: " + "; ".join(asks[:5]))
