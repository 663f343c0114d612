"""The command line: ``fisherkit`` and ``python -m fisherkit``."""

from fisherkit.cli import commands, file_commands  # they put their commands into the application
from fisherkit.cli.app import app

__all__ = ["app", "commands", "file_commands"]
