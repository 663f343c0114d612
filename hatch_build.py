"""The README as a package index shows it, made when the package is built.

An index shows the text alone: a picture or a page that lies beside it is a broken link there. There is no public
address yet that they could be given instead, so the picture goes with its caption and links to pages become their text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE = r"\((?!https?://|#|mailto:)[^)\s]+\)"
_PICTURE = re.compile(rf"^!\[[^\]]*\]{_RELATIVE}\n+(?:\*[^*]+\*\n+)?", re.MULTILINE)
_LINK = re.compile(rf"(?<!!)\[([^\]]+)\]{_RELATIVE}")
_FENCED = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def for_an_index(readme: str) -> str:
    """The text without what lies beside it; code is left as it is.

    Args:
        readme: Markdown.
    """
    parts = _FENCED.split(readme)
    parts[::2] = [_LINK.sub(r"\1", _PICTURE.sub("", part)) for part in parts[::2]]
    return "".join(parts)


class ReadmeHook(MetadataHookInterface):
    """Sets the readme of the built metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the project's metadata."""
        text = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text)}
