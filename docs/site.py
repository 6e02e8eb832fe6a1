"""A hook of mkdocs, so that the pages read the same on the site and in the repository.

A link to a file outside docs/ becomes a link to a copy of it; a folder has no page, so its link becomes its name.
The page on methods is the section of the README.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")
PAGES = {"README.md": "methods.md"}
"""Files of the repository that have a page of their own on the site."""


def on_files(files: Files, config: Any) -> Files:
    """Adds every file outside docs/ to which a page links."""
    named = {name for page in files.documentation_pages() for _, name, _ in LINK.findall(page.content_string)}
    for name in sorted(named - set(PAGES)):
        if (ROOT / name).is_file():
            files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "methods.md", content=methods()))
    return files


def methods() -> str:
    """The README's section on methods as a page of its own."""
    _, _, rest = (ROOT / "README.md").read_text().partition("\n## Methods\n")
    return "# Methods\n" + rest.partition("\n## ")[0].replace("](docs/", "](")


def on_page_markdown(markdown: str, **_: Any) -> str:
    def target(found: re.Match[str]) -> str:
        text, name, anchor = found[1], found[2], found[3] or ""
        if name in PAGES:
            return f"[{text}]({PAGES[name]}{anchor})"
        return f"[{text}](files/{name})" if (ROOT / name).is_file() else text

    return LINK.sub(target, markdown)
