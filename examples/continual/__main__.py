"""``python -m examples.continual``."""

from examples.continual.run import main

main()
