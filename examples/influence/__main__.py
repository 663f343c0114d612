"""``python -m examples.influence``."""

from examples.influence.run import main

main()
