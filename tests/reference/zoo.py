"""What a model family is, and how one is registered.

Owns determinism: every build draws its weights and data from its own seed in float32 and converts at the end, so that
the float32 and float64 builds of a seed are the same problem, and the caller's random state is left alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.fisher import Inputs, Problem
from tests.reference.outputs import Example, Likelihood

Built = tuple[nn.Module, Inputs, Tensor]

FAMILIES: dict[str, "Family"] = {}


@dataclass(frozen=True)
class Family:
    """A tiny model with its data.

    Attributes:
        name: Unique name, for test ids.
        make: Float32 model, inputs and targets from the current random state.
        likelihood: Likelihood of the targets given the outputs.
        example: What one example is.
    """

    name: str
    make: Callable[[], Built]
    likelihood: Likelihood = "categorical"
    example: Example = "sequence"

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Built:
        """The model in eval mode, its inputs and its targets, floating-point tensors in ``dtype``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, inputs, targets = self.make()
            with torch.no_grad():
                # Gains start at one and biases at zero, where a forgotten gain or bias would not show.
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        converted: Inputs
        if isinstance(inputs, Mapping):
            converted = {key: _convert(value, dtype) for key, value in inputs.items()}
        else:
            converted = _convert(inputs, dtype)
        return model.to(dtype).eval(), converted, _convert(targets, dtype)

    def problem(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
        """The same as a :class:`Problem` over all parameters that require grad."""
        return Problem(*self.build(dtype, seed), likelihood=self.likelihood, example=self.example)

    def __str__(self) -> str:
        """The name."""
        return self.name


def family(
    name: str, likelihood: Likelihood = "categorical", example: Example = "sequence"
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register the decorated function as a family; it may be decorated more than once, under different names."""

    def register(make: Callable[[], Built]) -> Callable[[], Built]:
        if name in FAMILIES:
            raise ValueError(f"two families are named {name!r}")
        FAMILIES[name] = Family(name, make, likelihood, example)
        return make

    return register


class Compose(nn.Module):
    """Named parts, modules or parameters, and a function of them: ``Compose(lambda m, x: m.head(x), head=...)``."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        """Keep the function and register the parts in the order given."""
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        """The function of the parts and the input."""
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    """A bare standard normal parameter."""
    return nn.Parameter(torch.randn(*shape))


def labels(outputs: int, *shape: int) -> Tensor:
    """Uniform labels."""
    return torch.randint(outputs, shape)


def _convert(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def freeze(model: nn.Module, *names: str) -> nn.Module:
    """Switch off the gradient of the named parameters."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
    return model
