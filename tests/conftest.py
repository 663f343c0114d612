"""Settings shared by every test."""

import pytest
import torch

# The models are tiny: a thread pool costs more than it saves, and fights with pytest-xdist.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # torch's note on the cost of uneven padding, which one family has on purpose.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel lengths:UserWarning")
