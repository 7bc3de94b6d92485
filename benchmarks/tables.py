"""Tables in Markdown: those of a run, the files of results, and the page that shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
_MARKED = r"(?P<begin><!-- (?P<file>[\w-]+\.md)(?:(?P<colon>:)(?P<title>[^>]*?))? -->).*?<!-- end -->"


@dataclass
class Table:
    """A table of ratios: its heading, what was measured and what 1 is, the heads of its columns, and its cells."""

    title: str
    text: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"## {self.title}\n\n{self.text}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def merge(old: str, new: str) -> str:
    """Returns the results of a new run, and those tables of the old results that are not in the new ones."""
    (head, *sections), (_, *rest) = new.strip().split("\n## "), old.strip().split("\n## ")
    titles = [section.split("\n")[0] for section in sections]
    kept = [section for section in rest if section.split("\n")[0] not in titles]
    return "\n\n## ".join(each.strip() for each in [head, *sections, *kept]) + "\n"


def insert(page: str, results: Path = RESULTS) -> str:
    """Returns the page with the current results between its marks.

    ``<!-- cpu.md: Title -->`` begins the sections of a file whose titles begin so, ``<!-- cpu.md: -->`` what stands before
    them, ``<!-- cpu.md -->`` the whole file, and ``<!-- end -->`` ends them.
    """

    def current(match: re.Match[str]) -> str:
        path, title = results / match["file"], (match["title"] or "").strip()
        about, *sections = (path.read_text() if path.exists() else "#\n\nNot measured yet.").split("\n## ")
        head = [] if title else [about.split("\n", 2)[2].strip()]  # without the title
        chosen = [f"### {each.strip()}" for each in sections if each.startswith(title) and (title or not match["colon"])]
        return "\n\n".join([match["begin"], *head, *chosen, "<!-- end -->"])

    return re.sub(_MARKED, current, page, flags=re.DOTALL)
