"""``python -m examples.merging``."""

from examples.merging.run import main

main()
