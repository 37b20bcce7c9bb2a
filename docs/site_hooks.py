"""What the documentation site has beside the pages of this folder: its front page and the API reference."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """The front page is the README, seen from this folder; the reference has an entry for each public name."""
    front = LINK.sub(_from_docs, (ROOT / "README.md").read_text())
    for name, text in (("index.md", front), ("api.md", _reference())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files that are not on the site become their names."""
    here = posixpath.dirname(page.file.src_uri)

    def named(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2]))
        return f"{match[1]} (`{target[3:]}`)" if target.startswith("../") else match[0]

    return LINK.sub(named, markdown)


def _from_docs(match: re.Match[str]) -> str:
    inside = match[2].removeprefix("docs/")
    return f"[{match[1]}]({inside if inside != match[2] else '../' + match[2]}{match[3] or ''})"


def _reference() -> str:
    """Entries of the public names, from their docstrings."""
    source = (ROOT / "hf_vitprune" / "__init__.py").read_text()
    public = dict(re.findall(r'^    "(\w+)": "([\w.]+)",$', source, re.MULTILINE))
    entries = "\n\n".join(
        f"::: hf_vitprune.{name if public[name] == name else f'{public[name]}.{name}'}" for name in public
    )
    return f"# API reference\n\nEverything here is imported from `hf_vitprune`.\n\n{entries}\n"
