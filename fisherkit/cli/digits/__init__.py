"""``fisherkit demo``: every kind of Fisher on a small network trained on handwritten digits."""

from fisherkit.cli.digits.command import Settings as Settings
from fisherkit.cli.digits.command import run as run
