#!/usr/bin/env python3
"""Check that relative links in Markdown files lead to a file, and to a heading where they name one.

    python check_docs_links.py FOLDER

Prints one line for each link that leads nowhere and exits 1. Links with a scheme are not followed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

LINK = re.compile(r"\[[^\]\[]*\]\(\s*<?([^)<>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`[^`\n]*`")
SKIP_PARTS = {".venv", ".venvs", ".git", "out", "build", "node_modules"}


def markdown_files(root: Path) -> Iterator[Path]:
    """Yield the Markdown files under ``root`` that belong to the project."""
    for path in sorted(root.rglob("*.md")):
        if not SKIP_PARTS.intersection(path.relative_to(root).parts):
            yield path


def anchors(text: str) -> set[str]:
    """Return the anchors that Markdown viewers give to the headings of a text: lower case, dashes for blanks."""
    titles = HEADING.findall(FENCED.sub("", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(path: Path) -> Iterator[str]:
    """Yield the relative links in the file at ``path`` that lead nowhere; what stands in code is no link."""
    for target in LINK.findall(INLINE.sub("", FENCED.sub("", path.read_text(encoding="utf-8")))):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            yield f"{path}: {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{path}: {target}: no such heading"


def main() -> int:
    """Print the dead links under the folder named on the command line; return 1 where there are any, else 0."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: check_docs_links.py FOLDER", file=sys.stderr)
        return 2
    dead = [line for path in markdown_files(Path(sys.argv[1])) for line in dead_links(path)]
    print("\n".join(dead), end="\n" if dead else "")
    return int(bool(dead))


if __name__ == "__main__":
    sys.exit(main())
