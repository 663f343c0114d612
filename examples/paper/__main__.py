"""``python -m examples.paper``."""

from examples.paper.run import main

main()
