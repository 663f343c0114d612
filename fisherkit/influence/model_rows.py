"""A model at the parameters of a Fisher: makes the rows of any data's loss or measurement, within a memory budget.

A measurement is what is asked of a query: a number made of its outputs, whose gradient in them is the query's output
vector. It is read like a loss, lower is better, so that a positive score is a helpful training example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fisherkit import likelihoods
from fisherkit.arguments import check_count, check_type
from fisherkit.arithmetic import all_finite, at_least_single
from fisherkit.data import Data, Source, model_device
from fisherkit.errors import (
    DataError,
    InvalidArgumentError,
    InvalidTypeError,
    ModelError,
    NonFiniteError,
    UnknownParameterError,
    warn,
)
from fisherkit.fisher import FisherApproximation
from fisherkit.influence.blocks import MOST, KeptBlocks, LiveBlocks, RowBlocks
from fisherkit.influence.compression import Basis
from fisherkit.likelihoods import Bernoulli, Categorical, GaussianNLL, Likelihood
from fisherkit.memory import available_memory
from fisherkit.model_inputs import is_causal
from fisherkit.model_state import measured_at, parameters_hash
from fisherkit.operators import FisherOperator
from fisherkit.operators.persistence import renamed
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.rows.collection import Rows
from fisherkit.rows.plan import Plan
from fisherkit.rows.problem import Problem
from fisherkit.rows.streamed import every_kth, every_kth_example
from fisherkit.rows.verified import plan_again, plan_of
from fisherkit.space import ParameterSpace
from fisherkit.vectors import EmpiricalVectors
from fisherkit.wrappers import matching, unwrapped, with_full_weights

Measurement: TypeAlias = str | Callable[[Tensor, Tensor | None], Tensor]
"""A name, or a function of outputs and targets to one number for each example."""


class MarginVectors(OutputRule):
    """v = −∂m/∂z with m the margin at the observed label, log p_y / (1 − p_y), summed over positions."""

    kind_name = "margin"

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The others' distribution minus e_y; for a binary output minus the label's sign."""
        known = isinstance(outputs.likelihood, (Categorical, Bernoulli)) and outputs.target is not None
        soft = isinstance(outputs.likelihood, Categorical) and known and outputs.observed.is_floating_point()
        if isinstance(outputs.likelihood, Bernoulli) and outputs.target is not None:
            soft = bool(outputs.masked(outputs.target * (1 - outputs.target)).any())
        if outputs.target is None or not known or soft:
            raise DataError(
                'measurement="margin"',
                f"a {outputs.likelihood.name} likelihood{' with class probabilities' if soft else ''}",
                "a categorical or bernoulli one, with labels", why="a margin is the log odds of the observed label",
                try_='measurement="loss", or a function of outputs and targets',
            )  # fmt: skip
        if isinstance(outputs.likelihood, Bernoulli):
            return OutputVectors(outputs.masked(1 - 2 * outputs.target).unsqueeze(1))
        label = outputs.target.masked_fill(~outputs.mask, 0).unsqueeze(-1)
        others = torch.softmax(outputs.z.scatter(-1, label, float("-inf")), -1)
        return OutputVectors(outputs.masked(others.scatter(-1, label, -1.0)).unsqueeze(1))


class FunctionVectors(OutputRule):
    """v = ∂m/∂z of a user's function of outputs and targets, as the model and the data have them, to ``[B]``."""

    kind_name = "function"

    def __init__(self, function: Callable[[Tensor, Tensor | None], Tensor], *, labelled: bool) -> None:
        self.function = function
        self.needs_targets = labelled  # type: ignore[misc]  # what a class has is an object's own here

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """By automatic differentiation in the outputs."""
        call = "measurement(outputs, targets)"
        with torch.enable_grad():
            z = outputs.z.detach().requires_grad_()
            values = self.function(_as_given(z, outputs), _target_as_given(outputs))
            if not isinstance(values, Tensor):
                raise InvalidTypeError(call, f"a {type(values).__name__}", "a tensor")
            if values.shape != z.shape[:1]:
                expected = f"[{z.shape[0]}], one number for each example"
                raise InvalidArgumentError(call, f"shape {list(values.shape)}", expected)
            if not values.requires_grad:
                raise InvalidArgumentError(call, "numbers without a graph", "a differentiable function of the outputs")
            (v,) = torch.autograd.grad(values.sum(), z)
        v = outputs.masked(v)
        if not all_finite(v):
            raise NonFiniteError(call, "gradients with NaN or infinite entries", "finite ones")
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


def query_rule(measurement: Measurement, *, labelled: bool) -> OutputRule:
    """The output vectors of a measurement, of queries with targets or without."""
    if isinstance(measurement, str):
        names: dict[str, type[OutputRule]] = {"loss": EmpiricalVectors, "margin": MarginVectors}
        if measurement not in names:
            raise InvalidArgumentError(
                "measurement", repr(measurement), f"one of {list(names)}, or a function",
                try_="lambda outputs, targets: outputs[:, 0] for an output of its own",
            )  # fmt: skip
        if not labelled:
            raise DataError(
                "queries", "no targets", "targets", why=f"the {measurement} is that of an observed label",
                try_="a function as measurement; for the predicted class of outputs [B, C] "
                "measurement=lambda outputs, targets: -outputs.log_softmax(-1).amax(-1)",
            )  # fmt: skip
        return names[measurement]()
    if not callable(measurement):
        raise InvalidTypeError("measurement", f"a {type(measurement).__name__}", "a name or a function")
    return FunctionVectors(measurement, labelled=labelled)


# -- rows --------------------------------------------------------------------------------------------------------------


CALL = "InfluenceScores"


class ModelRows:
    """Rows of a model over a Fisher's parameters, with the options of `InfluenceScores`; checked to fit each other."""

    def __init__(
        self, fisher: FisherOperator, model: nn.Module, *, likelihood: str | Likelihood | nn.Module | None,
        chunk_size: int | None, memory_budget: int | None, progress: bool, shift_labels: bool | None,
    ) -> None:  # fmt: skip
        check_type(CALL, "fisher", fisher, FisherOperator, "a Fisher", try_="fk.EmpiricalFisher")
        check_type(CALL, "model", model, nn.Module, "a torch.nn.Module")
        for name, value in (("chunk_size", chunk_size), ("memory_budget", memory_budget)):
            check_count(CALL, name, value, optional=True)
        model = with_full_weights(unwrapped(model))
        fisher = renamed(fisher, matching(fisher.space.names, dict(model.named_parameters())))
        self._weights = parameters_hash(model)
        _check_space(fisher, model, self._weights)
        self.fisher, self.model, self.space = fisher, model, fisher.space
        self._recent: Plan | None = None
        self.dtype, self.device = fisher.dtype, fisher.device
        self.metadata = fisher.metadata
        self.likelihood = _likelihood(likelihood, fisher)
        self.chunk_size, self.progress = chunk_size, progress
        self.budget = available_memory(self.device) // 2 if memory_budget is None else memory_budget
        self._shift_guessed = shift_labels is None
        self.shift_labels = is_causal(model) if shift_labels is None else shift_labels
        self._modules = {name: module for module, names in self.space.blocks.items() for name in names}

    def examples(self, given: int | None) -> int:
        """N, as given or as the Fisher says."""
        if given is not None:
            check_count(CALL, "examples", given)
            return given
        # A sum keeps what its terms have in common, which would be each term's N and not the sum's.
        known = None if "terms" in self.metadata else self.metadata.get("examples")
        if known is None:
            raise InvalidArgumentError(
                CALL, "a Fisher that does not say on how many examples it was measured", "examples=N",
                why="sums, multiples and operators of one's own have no N", try_="examples=len(train)",
            )  # fmt: skip
        return int(known)

    def module(self, names: tuple[str, ...]) -> str:
        """The module that a unit's parameters belong to; of a unit across modules, all of them."""
        return ", ".join(dict.fromkeys(self._modules[name] for name in names))

    def live(self, data: Data, rule: OutputRule, *, token: bool = False) -> LiveBlocks:
        """Rows of a kind's output vectors, made in every pass; by token, each position has a row of its own."""
        source = self._source(data)
        return self._blocks(self._plan(source), source, rule, token)

    def queries(self, data: Data, measurement: Measurement, basis: Basis | None = None) -> LiveBlocks:
        """Rows of a measurement; over a basis, those that meet compressed ones."""
        source = self._source(data)
        rule = query_rule(measurement, labelled=source.first().targets is not None)
        live = self._blocks(self._plan(source), source, rule, token=False)
        return LiveBlocks(live.problem, live.limit, live.settings, basis)

    def begin(self) -> None:
        """Look at the weights once, at the beginning of a call, and refuse ones that have changed."""
        self._recent = None
        if parameters_hash(self.model) != self._weights:
            raise ModelError(
                CALL, "a model whose weights have changed since the scores' construction", "the same values",
                why="∇ℓ and F must be taken at one point", try_="a Fisher and an InfluenceScores of the model as it is",
            )  # fmt: skip

    def _source(self, data: Data) -> Source:
        """The data, once their order is known to be fixed."""
        if isinstance(data, (str, Path)):
            raise InvalidTypeError(
                CALL, f"the path {str(data)!r} as data", "batches, or what prepare() made of them",
                why="a folder of rows is read beside the data that it belongs to",
                try_="rows = scores.prepare(train, folder=path), and scores.scores(queries, rows)",
            )  # fmt: skip
        source = Source(data, self.model)
        source.keep_order(CALL)
        return source

    def _plan(self, source: Source) -> Plan:
        """How rows of these data are made; verified once a call for data of one form."""
        first = source.first().to(self.device)
        found = None if self._recent is None else plan_again(self._recent, first)
        self._recent = plan_of(self.model, self.space, source) if found is None else found
        return self._recent

    def settings(self, *, token: bool) -> dict[str, Any]:
        """What rows of the loss depend on beside the data, as JSON has it."""
        shapes = {name: list(shape) for name, shape in zip(self.space.names, self.space.shapes, strict=True)}
        return {
            "parameters_hash": self._weights,
            "space": shapes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "likelihood": self.likelihood.recorded,
            "shift_labels": self.shift_labels,
            "token": token,
        }

    def held(self, blocks: RowBlocks) -> RowBlocks:
        """The same made once, if memory has room for all rows beside the rest."""
        if not isinstance(blocks, LiveBlocks):
            return blocks
        fit = blocks.row_bytes() * blocks.count() <= self.budget // 4
        return KeptBlocks(blocks) if fit else blocks

    def sample(self, blocks: RowBlocks, stride: int) -> Rows:
        """Rows of every so-many-th example; each has one, if it counts."""
        if isinstance(blocks, LiveBlocks):
            return Rows.cat(self.every(blocks, stride))
        taken: list[Rows] = []
        seen = 0
        for block in blocks:
            first = -seen % stride
            if not taken or first < block.rows.count:
                taken.append(every_kth(block.rows, stride, first))
            seen += block.rows.count
        return Rows.cat(taken)

    @staticmethod
    def every(blocks: LiveBlocks, stride: int, before: int = 0) -> list[Rows]:
        """The same in parts, of data that so many examples precede; none where no place is meant."""
        source = every_kth_example(blocks.problem.source, stride, before)
        if next(iter(source), None) is None:
            return []
        return [block.rows for block in blocks.of(replace(blocks.problem, source=source))]

    def digest(self, data: Data) -> str:
        """A hash of all examples and their order."""
        return hashlib.sha256("".join(batch.digest() for batch in self._source(data)).encode()).hexdigest()[:32]

    def probe(self, blocks: RowBlocks) -> Rows:
        """Some rows of the form that all have."""
        if not isinstance(blocks, LiveBlocks):
            return next(iter(blocks)).rows
        _, rows = blocks.problem.probe_rows()
        probed = blocks.problem.plan.probe.z
        return rows(torch.zeros(1, *probed.shape, dtype=probed.dtype, device=probed.device))

    def room(self, numbers: int) -> int:
        """How many queries with so many numbers each fit a quarter of the budget; at least one."""
        return max(1, self.budget // 4 // max(1, numbers * torch.finfo(self.dtype).bits // 8))

    def _blocks(self, plan: Plan, source: Source, rule: OutputRule, token: bool) -> LiveBlocks:
        problem = Problem(
            plan, source, self.likelihood, rule, token, self.shift_labels, self.chunk_size, self.progress,
            budget=self.budget, shift_guessed=self._shift_guessed,
        ).measured()  # fmt: skip
        # Products may write a block's rows out. Kept, they have as few numbers as can be.
        problem.choose(lean=False)
        most = self.budget // 8 // max(1, problem.row_bytes(self.space.names))
        problem.choose(lean=True)
        return LiveBlocks(problem, max(1, min(MOST, most)), self.settings(token=token))


def _likelihood(likelihood: str | Likelihood | nn.Module | None, fisher: FisherOperator) -> Likelihood:
    known = fisher.metadata.get("likelihood")
    if likelihood is not None:
        given = likelihoods.resolve(likelihood)
        if known not in {None, given.recorded}:
            warn(
                f"InfluenceScores: gradients of the loss {given.recorded} meet a Fisher of {known}, so that scores are "
                "of neither. Try: leave likelihood= out, or a Fisher of this loss."
            )
        return given
    if isinstance(fisher, FisherApproximation) and known == fisher.likelihood.recorded:
        return fisher.likelihood
    try:
        return likelihoods.resolve_recorded("" if known is None else known)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            CALL, "no likelihood" if known is None else f"a Fisher of a likelihood named {known!r}",
            "likelihood=, the loss module or object that the Fisher was built with",
            why="the Fisher does not say which it is"
            if known is None
            else "files, sums and multiples of Fishers have a likelihood's name and not its settings",
        ) from error  # fmt: skip


def _check_space(fisher: FisherOperator, model: nn.Module, weights: str) -> None:
    """Raise unless the Fisher's parameters are the model's, in the same dtype, on the same device."""
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    unknown = [name for name in fisher.space.names if name not in own]
    if unknown:
        raise UnknownParameterError(
            CALL, f"a Fisher over {unknown[:4]}{' …' if len(unknown) > 4 else ''}",
            f"parameters of the model, such as {list(own)[:4]}", try_="the model that the Fisher was built with",
        )  # fmt: skip
    space = ParameterSpace.of(model, fisher.space.names)
    if space != fisher.space:
        pairs = zip(fisher.space.names, fisher.space.shapes, strict=True)
        odd = [f"{name!r}: {list(shape)} and not {list(own[name])}" for name, shape in pairs if own[name] != shape]
        raise InvalidArgumentError(
            CALL, "a Fisher over " + ("; ".join(odd[:4]) or "the model's parameters in another order"),
            "the model's own shapes and order", try_="the model that the Fisher was built with",
        )  # fmt: skip
    device, dtype = model_device(model, fisher.space.names)
    if at_least_single(dtype) != fisher.dtype:
        expected = f"{at_least_single(dtype)}, that of Fishers of this model"
        advice = f"the model in {fisher.dtype}, if it was measured so"
        raise InvalidTypeError(CALL, f"a Fisher of {fisher.dtype}", expected, try_=advice)
    if device != fisher.device:
        raise InvalidArgumentError(
            CALL, f"a Fisher on {fisher.device}", f"{device}, the model's",
            try_=f'fk.load(path, device="{device}"), or model.to("{fisher.device}")',
        )  # fmt: skip
    if fisher.metadata.get("parameters_hash") != weights and measured_at(model, fisher.metadata) is False:
        raise ModelError(
            CALL, "a model whose parameters or buffers are not those that the Fisher was measured at",
            "the same values", why="∇ℓ and F must be taken at one point",
            try_="load the weights the Fisher was built with, or build it anew",
        )  # fmt: skip
