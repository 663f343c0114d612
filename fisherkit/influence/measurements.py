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
        """The others' distribution minus e_y; for a binary output minus the label's sign."""
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
    """v = ∂m/∂z of a user's function of outputs and targets, as the model and the data have them, to ``[B]``."""

    kind_name = "function"

    def __init__(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.function = function

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """By automatic differentiation in the outputs."""
        call = "measurement(outputs, targets)"
        with torch.enable_grad():
            z = outputs.z.detach().requires_grad_()
            values = self.function(_as_given(z, outputs), _target_as_given(outputs))
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


def _as_given(x: Tensor, outputs: Outputs) -> Tensor:
    """Numbers of the outputs' shape in the model's form."""
    return outputs.likelihood.as_outputs(x, torch.Size((len(x), *_shape(outputs))))


def _target_as_given(outputs: Outputs) -> Tensor | None:
    """Targets without the axes that were added to them."""
    target, shape = outputs.target, _shape(outputs)
    if target is None:
        return None
    if target.shape == outputs.z.shape:
        return _as_given(target, outputs)
    if isinstance(outputs.likelihood, GaussianNLL):
        return torch.stack([_as_given(part, outputs) for part in target.chunk(2, -1)], -1)
    classes = outputs.likelihood.class_axis % (len(shape) + 1) - 1
    return target.reshape(len(target), *(size for axis, size in enumerate(shape) if axis != classes))


def _shape(outputs: Outputs) -> torch.Size:
    if outputs.shape is None:
        raise LookupError("positions of their own have no outputs as the model has them")
    return outputs.shape


class UnlabelledFunctionVectors(FunctionVectors):
    """The same for queries without targets."""

    needs_targets: ClassVar[bool] = False


def query_rule(measurement: Measurement, *, labelled: bool) -> OutputRule:
    """The output vectors of a measurement, of queries with targets or without."""
    if isinstance(measurement, str):
        names: dict[str, type[OutputRule]] = {"loss": EmpiricalVectors, "margin": MarginVectors}
        if measurement not in names:
            raise InvalidArgumentError(
                call="measurement", got=repr(measurement), expected=f"one of {list(names)}, or a function",
                try_="lambda outputs, targets: outputs[:, 0] for an output of its own",
            )  # fmt: skip
        if not labelled:
            raise DataError(
                call="queries", got="no targets", expected="targets",
                why=f"the {measurement} is that of an observed label",
                try_="a function as measurement; for the predicted class of outputs [B, C] "
                "measurement=lambda outputs, targets: -outputs.log_softmax(-1).amax(-1)",
            )  # fmt: skip
        return names[measurement]()
    if not callable(measurement):
        raise InvalidTypeError(
            call="measurement", got=f"a {type(measurement).__name__}", expected="a name or a function"
        )
    return (FunctionVectors if labelled else UnlabelledFunctionVectors)(measurement)
