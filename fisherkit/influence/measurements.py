"""What is asked of a query: a number made of its outputs, whose gradient in them is the query's output vector.

A measurement is read like a loss, lower is better, so that a positive score is a helpful training example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fisherkit.arithmetic import all_finite
from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError, NonFiniteError
from fisherkit.likelihoods import Bernoulli, Categorical, GaussianNLL
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.vectors import EmpiricalVectors

Measurement: TypeAlias = str | Callable[[Tensor, Tensor | None], Tensor]
"""A name, or a function of outputs and targets to one number for each example."""


class MarginVectors(OutputRule):
    """v = −∂m/∂z with m the margin at the observed label, log p_y / (1 − p_y), summed over positions."""

    kind_name = "margin"

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The others' distribution minus e_y; for a binary output minus the label's sign.

        Raises:
            DataError: a likelihood without labels.
        """
        known = isinstance(outputs.likelihood, (Categorical, Bernoulli)) and outputs.target is not None
        soft = isinstance(outputs.likelihood, Categorical) and known and outputs.observed.is_floating_point()
        if outputs.target is None or not known or soft:
            raise DataError(
                call='measurement="margin"',
                got=f"a {outputs.likelihood.name} likelihood{' with class probabilities' if soft else ''}",
                expected="a categorical or bernoulli one, with labels",
                why="a margin is the log odds of the observed label",
                try_='measurement="loss", or a function of outputs and targets',
            )
        if isinstance(outputs.likelihood, Bernoulli):
            return OutputVectors(outputs.masked(1 - 2 * outputs.target).unsqueeze(1))
        label = outputs.target.masked_fill(~outputs.mask, 0).unsqueeze(-1)
        others = torch.softmax(outputs.z.scatter(-1, label, float("-inf")), -1)
        return OutputVectors(outputs.masked(others.scatter(-1, label, -1.0)).unsqueeze(1))


class FunctionVectors(OutputRule):
    """v = ∂m/∂z of a user's function.

    Args:
        function: outputs and targets, as the model and the data have them, to ``[B]``.
        shape: of the model's outputs for some examples.
    """

    kind_name = "function"

    def __init__(self, function: Callable[[Tensor, Tensor | None], Tensor], shape: torch.Size) -> None:
        self.function, self.shape = function, shape

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """By automatic differentiation in the outputs.

        Raises:
            InvalidTypeError: the function does not return a tensor.
            InvalidArgumentError: one of another shape than ``[B]``, or one that does not depend on the outputs.
            NonFiniteError: gradients with NaN or infinite entries.
        """
        call = "measurement(outputs, targets)"
        with torch.enable_grad():
            z = outputs.z.detach().requires_grad_()
            values = self.function(self._as_given(z, outputs), self._target(outputs))
            if not isinstance(values, Tensor):
                raise InvalidTypeError(call=call, got=f"a {type(values).__name__}", expected="a tensor")
            if values.shape != z.shape[:1]:
                expected = f"[{z.shape[0]}], one number for each example"
                raise InvalidArgumentError(call=call, got=f"shape {list(values.shape)}", expected=expected)
            if not values.requires_grad:
                raise InvalidArgumentError(
                    call=call, got="numbers without a graph", expected="a differentiable function of the outputs"
                )
            (v,) = torch.autograd.grad(values.sum(), z)
        v = outputs.masked(v)
        if not all_finite(v):
            raise NonFiniteError(call=call, got="gradients with NaN or infinite entries", expected="finite ones")
        return OutputVectors(v.unsqueeze(1))

    def _as_given(self, x: Tensor, outputs: Outputs) -> Tensor:
        """Numbers of the outputs' shape in the model's form."""
        n, positions, c = x.shape
        if len(self.shape) != 3:
            return outputs.likelihood.as_outputs(x, torch.Size((n, *self.shape[1:])))
        last = outputs.likelihood.class_axis in (-1, 2)  # the number of positions may change with the batch
        return outputs.likelihood.as_outputs(x, torch.Size((n, positions, c) if last else (n, c, positions)))

    def _target(self, outputs: Outputs) -> Tensor | None:
        """Targets without the axes that were added to them."""
        target, axes = outputs.target, len(self.shape)
        if target is None:
            return None
        if target.shape == outputs.z.shape:
            return self._as_given(target, outputs)
        if isinstance(outputs.likelihood, GaussianNLL):
            return torch.stack([self._as_given(part, outputs) for part in target.chunk(2, -1)], -1)
        if axes > 3 and target.ndim == 2:
            axis = outputs.likelihood.class_axis % axes
            return target.reshape(len(target), *(size for i, size in enumerate(self.shape) if i not in (0, axis)))
        if axes >= 3:
            return target
        return target.squeeze(1) if axes == 2 else target.reshape(target.shape[0])


class UnlabelledFunctionVectors(FunctionVectors):
    """The same for queries without targets."""

    needs_targets: ClassVar[bool] = False


def query_rule(measurement: Measurement, shape: torch.Size, *, labelled: bool) -> OutputRule:
    """The output vectors of a measurement, for outputs of this shape, of queries with targets or without."""
    if isinstance(measurement, str):
        names: dict[str, type[OutputRule]] = {"loss": EmpiricalVectors, "margin": MarginVectors}
        if measurement not in names:
            raise InvalidArgumentError(
                call="measurement",
                got=repr(measurement),
                expected=f"one of {list(names)}, or a function",
                try_="lambda outputs, targets: outputs[:, 0] for an output of its own",
            )
        if not labelled:
            raise DataError(
                call="queries",
                got="no targets",
                expected="targets",
                why=f"the {measurement} is that of an observed label",
                try_="a function as measurement; for the predicted class of outputs [B, C] "
                "measurement=lambda outputs, targets: -outputs.log_softmax(-1).amax(-1)",
            )
        return names[measurement]()
    if not callable(measurement):
        raise InvalidTypeError(
            call="measurement", got=f"a {type(measurement).__name__}", expected="a name or a function"
        )
    return (FunctionVectors if labelled else UnlabelledFunctionVectors)(measurement, shape)
