"""README and docs: every Python block runs, what it prints is what the page shows, and links lead somewhere.

The blocks of one page run in order in one namespace, in an empty folder. A ``text`` block right behind a Python block
is its output. mkdocs checks links inside the site (``make docs``); here are README's, and what no builder checks.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fisherkit.rows.rules import RULES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

LANGUAGES = {"python", "text", "sh"}
"""A fence of another language would be Python that nobody runs, or output that nobody compares."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of lines before its first, its code, what the page says it prints."""

    language: str
    line: int
    code: str
    shown: str | None = None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, a Python block joined with the text block that directly follows it."""
    fence = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```\s*?$", re.MULTILINE | re.DOTALL)
    found: list[Block] = []
    end = 0
    for match in fence.finditer(text):
        follows = bool(found) and found[-1].language == "python" and not text[end : match.start()].strip()
        if follows and match[1] == "text":
            found[-1] = replace(found[-1], shown=match[2])
        else:
            found.append(Block(match[1], text.count("\n", 0, match.start(2)), match[2]))
        end = match.end()
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Pages write files, seed the global generator and enter rules; other tests must not see that."""
    monkeypatch.chdir(tmp_path)
    rules = dict(RULES)
    with torch.random.fork_rng(devices=[]):
        yield
    RULES.clear()
    RULES.update(rules)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text("utf-8")], ids=name)
def test_page__every_python_block_runs_and_prints_what_is_shown(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": f"page_{page.stem}"}
    torch.manual_seed(0)
    for block in blocks(page.read_text("utf-8")):
        if block.language != "python":
            continue
        printed = io.StringIO()
        # Empty lines in front: a traceback names the page's own line.
        code = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.shown is not None:
            got = [line.rstrip() for line in printed.getvalue().splitlines()]
            assert got == block.shown.splitlines(), f"{name(page)}, line {block.line + 1}"


def test_pages__have_code() -> None:
    """The parser finds what is there: README and every guide has a block, and one of them shows output."""
    found = {name(page): [b for b in blocks(page.read_text("utf-8")) if b.language == "python"] for page in PAGES}
    silent = {page for page, code in found.items() if not code}
    without = {
        "docs/design.md",
        "docs/several-processes.md",
        *(
            f"docs/results/{page}.md"
            for page in ("optimisation", "continual", "merging", "influence", "language-models")
        ),
    }
    assert silent <= without | {page for page in found if page.startswith("docs/api/")}
    assert sum(block.shown is not None for code in found.values() for block in code) > 10


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_page__is_plain(page: Path) -> None:
    """Fences are closed and of a known language, no path is absolute, and no formula needs a renderer."""
    text = page.read_text("utf-8")
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(re.findall(r"^```\S+$", text, re.MULTILINE))
    assert {block.language for block in blocks(text)} <= LANGUAGES
    assert re.findall(r"\$\$|\\\(|\\\[|\\frac|\\sum", text) == []
    local = re.sub(r"https?://\S+", "", text)
    assert re.findall(r"(?<![\w.)\]}>*~-])/[A-Za-z_][\w.-]*/[\w.-]*|\b[A-Z]:\\\w+|~/\w+|file://", local) == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links__of_files_outside_the_site_resolve(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / (path or page)
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
