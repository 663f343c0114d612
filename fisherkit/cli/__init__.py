"""The command line: ``fisherkit`` and ``python -m fisherkit``."""

from fisherkit.cli.commands import app as app
