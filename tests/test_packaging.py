"""What a package index shows of the package."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The build hook; hatchling itself is there only while the package is built."""
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme__for_an_index_has_no_link_that_is_broken_there(hook: types.ModuleType) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(r"!\[[^\]]*\]\(docs/", readme), "the README has no picture: the hook has nothing to do"
    shown = hook.for_an_index(readme)
    targets = re.findall(r"\]\(([^)]+)\)", shown)
    assert targets
    assert all(target.startswith(("https://", "#")) for target in targets), targets
    assert "Drawn by" not in shown  # the caption of a picture that is not there
    code = re.compile(r"^```python.*?^```", re.MULTILINE | re.DOTALL)
    assert code.findall(shown) == code.findall(readme)


def test_readme__hook_keeps_words_and_absolute_links(hook: types.ModuleType) -> None:
    text = (
        "# A\n\n![wide\npicture](a/b.png)\n\n*Its\ncaption.*\n\n"
        "See [the\npage](docs/x.md), [web](https://x.org), [up](#a).\n"
        "![far](https://x.org/p.png)\n\n```python\nx = d[k](v)\n```\n"
    )
    assert hook.for_an_index(text) == (
        "# A\n\nSee the\npage, [web](https://x.org), [up](#a).\n"
        "![far](https://x.org/p.png)\n\n```python\nx = d[k](v)\n```\n"
    )


def test_package__says_that_it_is_typed() -> None:
    assert (ROOT / "fisherkit" / "py.typed").is_file()
