"""Layer rules: what a function that uses a parameter saw, and how that becomes rows.

One rule a function of ``torch.nn.functional``. It names the arguments, brings the input and the output gradient to
entries of ``t`` positions each (``a [E, t, i]`` and ``g [E, t, o]``), and makes a unit's rows from them once the
entries lie by example (``a [B, T, i]``, ``g [B, T, o]``); whose an entry is, is not a rule's business. Convolutions are
linear layers on their patches; norms are elementwise products with the normalized input; an embedding's input is its
token ids. Every rule is checked against autograd on the user's own model before it is used (`rows.plan`), so a rule may
assume the usual meaning of its arguments.

Products that sum over some axes of a parameter (matrix products, batched ones, einsum, products by group) are read as
einsum writes them, one letter an axis. A weight's axes are, in this order, *slices* (an entry of the output uses one of
them, as an expert's), then outputs and contracted axes in either order.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherkit.rows.base import StoredRows, UnitRows
from fisherkit.rows.batch_axis import Axis, product_terms
from fisherkit.rows.derived import Derived
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.patches import Activations, Patches
from fisherkit.rows.sparse import SparseRows


@dataclass(frozen=True)
class Use:
    """One call of a function with a chosen parameter.

    Args:
        rule: the function's rule.
        weight: name of the chosen weight, or the weight itself if it is made of chosen parameters; None if it was not
            chosen.
        bias: the same of the bias.
        arguments: the call's arguments by name.
        edge: where the output's gradient can be asked for, whatever is done to the output later in place.
        output_shape: shape of the output.
        axis: where the batch lies in the output, as far as the forward pass tells.
        turned: whether the function saw the named weight transposed.
        slices: where it saw slices of a parameter, as of experts, which one each entry used, to be broadcast over the
            lead from the right; -1 for none.
        version: how often the input had been written to.
    """

    rule: Rule
    weight: str | Derived | None
    bias: str | Derived | None
    arguments: Mapping[str, Any]
    edge: GradientEdge
    output_shape: tuple[int, ...]
    axis: Axis | None = None
    turned: bool = False
    slices: Int[Tensor, "..."] | None = None
    version: int | None = None
    position: Axis | None = None

    @property
    def input(self) -> Tensor:
        """The input, as it is now."""
        found: Tensor = self.arguments[self.rule.input_name]
        return found

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The chosen parameters that take part."""
        parts = [() if one is None else (one,) if isinstance(one, str) else one.names for one in self.sources]
        return tuple(dict.fromkeys(name for part in parts for name in part))

    @cached_property
    def lead(self) -> torch.Size:
        """The output's axes that count its entries."""
        return self.rule.lead(self)

    @property
    def sources(self) -> tuple[str | Derived | None, str | Derived | None]:
        """Weight and bias, each by its parameter's name or as what it is made of; None where it was not chosen."""
        return self.weight, self.bias

    @property
    def plain(self) -> bool:
        """Whether weight and bias are parameters themselves, as far as they were chosen."""
        return not any(isinstance(one, Derived) for one in self.sources)


def in_dtype(use: Use, dtype: torch.dtype) -> Use:
    """The use in the rows' dtype: its input, which autocast may have changed, and what is computed with it."""
    x = use.arguments[use.rule.input_name]
    if not x.is_floating_point() or x.dtype == dtype:
        return use
    parameters = use.rule.weight_name, use.rule.bias_name  # only their shapes are asked for
    own = {n: v for n, v in use.arguments.items() if n not in parameters and isinstance(v, Tensor)}
    others = {name: value.detach().to(dtype) for name, value in own.items() if value.is_floating_point()}
    return replace(use, arguments={**use.arguments, **others})


class Rule(ABC):
    """How one function's parameter gradients factor; its name is for `coverage`, ``signature`` its arguments' names."""

    input_name = "input"
    weight_name = "weight"
    bias_name = "bias"

    def __init__(self, name: str, signature: str) -> None:
        self.name, self.signature = name, signature.split()

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        return {**dict(zip(self.signature, args, strict=False)), **kwargs}

    def exchanged(self, arguments: Mapping[str, Any]) -> tuple[Rule, dict[str, Any]] | None:
        """The rule and its arguments if the input is the parameter and the weight is not; None if there is none."""
        return None

    def features(self, use: Use) -> int:
        """Number of trailing axes of the output that are features; what is in front of them counts entries."""
        return 1

    def lead(self, use: Use) -> torch.Size:
        """The output's axes that count its entries, each of which belongs to one example."""
        return torch.Size(use.output_shape[: len(use.output_shape) - self.features(use)])

    def activations(self, use: Use) -> Activations:
        """The input's side of the gradient, ``[E, t, i]``: entries, each of t positions."""
        x: Tensor = use.arguments[self.input_name].detach()
        return x.reshape(use.lead.numel(), 1, -1)

    def gradients(self, use: Use, gradient: Float[Tensor, "k ..."]) -> Float[Tensor, "k E t o"]:
        """The output gradient's side, for k output vectors."""
        return gradient.reshape(len(gradient), use.lead.numel(), 1, -1)

    @abstractmethod
    def rows(self, use: Use, a: Activations, g: Float[Tensor, "R T o"], example: Int[Tensor, "R"] | None) -> UnitRows:
        """The rows of the chosen weight and bias, in this order, from both sides by example and position."""


def _per_row(a: Activations, g: Float[Tensor, "R ..."], example: Int[Tensor, "R"] | None) -> Tensor:
    """An example's side for each of its rows; see `FactoredRows` for a missing index."""
    a = a[:]
    if example is not None:
        return a[example]
    each = g.shape[0] // a.shape[0]
    return a if each == 1 else a.repeat_interleave(each, 0)


class LinearRule(Rule):
    """Output = input Wᵀ + b at every position."""

    transposed = False

    def rows(self, use: Use, a: Activations, g: Float[Tensor, "R T o"], example: Int[Tensor, "R"] | None) -> UnitRows:
        """Factored, or the summed gradients where only the bias is chosen."""
        if use.weight is None:
            return StoredRows(g.sum(1))
        transposed = self.transposed != use.turned
        return FactoredRows(a, g, example, bias=use.bias is not None, transposed=transposed)


class ConvolutionRule(LinearRule):
    """A linear layer on patches; padding modes other than zeros have padded the input before the call."""

    def features(self, use: Use) -> int:
        """All but the first axis."""
        return len(use.output_shape) - 1

    def activations(self, use: Use) -> Patches:
        """Patches, channels first as in the weight."""
        kernel, padding = tuple(use.arguments["weight"].shape[2:]), use.arguments.get("padding", 0)
        stride, dilation = _each_axis(use, stride=1, dilation=1)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = tuple((t // 2, t - t // 2) for t in total)
        else:
            pads = tuple((0, 0) if padding == "valid" else (p, p) for p in _each_axis(use, padding=0)[0])
        return Patches(use.arguments["input"].detach(), kernel, stride, dilation, pads)

    def gradients(self, use: Use, gradient: Float[Tensor, "k ..."]) -> Float[Tensor, "k E t o"]:
        return gradient.flatten(3).transpose(2, 3)


class GroupedConvolutionRule(ConvolutionRule):
    """Groups are small linear layers side by side: one block of the weight each, written out."""

    def rows(self, use: Use, a: Activations, g: Float[Tensor, "R T o"], example: Int[Tensor, "R"] | None) -> UnitRows:
        groups = use.arguments["groups"]
        left = g.unflatten(-1, (groups, -1))
        right = _per_row(a, g, example).unflatten(-1, (groups, -1))
        return _written(use, lambda: torch.einsum("rtgo,rtgi->rgoi", left, right), g)


class TransposedConvolutionRule(Rule):
    """A convolution seen from the output's side: its weight gradient is input times patches of the output gradient."""

    def features(self, use: Use) -> int:
        """All but the first axis."""
        return len(use.output_shape) - 1

    def activations(self, use: Use) -> Float[Tensor, "E t i"]:
        """The input, channels last."""
        x: Tensor = use.arguments["input"].detach()
        return x.flatten(2).transpose(1, 2)

    def gradients(self, use: Use, gradient: Float[Tensor, "k ..."]) -> Float[Tensor, "k E t o"]:
        """Patches of the gradient; behind them the bias's gradient, put at the first position and zero elsewhere."""
        kernel, size = use.arguments["weight"].shape[2:], use.arguments["input"].shape[2:]
        stride, dilation, padding, extra = _each_axis(use, stride=1, dilation=1, padding=0, output_padding=0)
        flat = gradient.flatten(0, 1)
        # Output index = stride · input index + dilation · kernel index − padding, so the last window may end before or
        # after the output does: a negative pad crops what output_padding added.
        crop = tuple((p, p - e) for p, e in zip(padding, extra, strict=True))
        patches = Patches(flat, tuple(kernel), stride, dilation, crop)[:]
        bias = torch.nn.functional.pad(flat.flatten(2).sum(2).unsqueeze(1), (0, 0, 0, size.numel() - 1))
        return torch.cat([patches, bias], 2).unflatten(0, gradient.shape[:2])

    def rows(self, use: Use, a: Activations, g: Float[Tensor, "R T o"], example: Int[Tensor, "R"] | None) -> UnitRows:
        groups = use.arguments.get("groups", 1)
        outputs = use.output_shape[1]
        left = _per_row(a, g, example).unflatten(-1, (groups, -1))
        right = g[..., :-outputs].unflatten(-1, (groups, -1))
        return _written(use, lambda: torch.einsum("rtgi,rtgo->rgio", left, right), g[..., -outputs:])


class EmbeddingRule(Rule):
    """A table looked up by token ids."""

    def activations(self, use: Use) -> Activations:
        """The ids; indexing counts negative ones from the table's end."""
        ids = super().activations(use)
        return ids if self is EMBEDDING else ids[:] % use.arguments["weight"].shape[0]

    def gradients(self, use: Use, gradient: Float[Tensor, "k ..."]) -> Float[Tensor, "k E t o"]:
        """Nothing for the padding token, whose vector is a constant."""
        g, padding = super().gradients(use, gradient), use.arguments.get("padding_idx")
        if padding is None:
            return g
        ids = self.activations(use)[:].unsqueeze(0)
        return torch.where(ids == padding % use.arguments["weight"].shape[0], torch.zeros_like(g), g)

    def rows(self, use: Use, a: Activations, g: Float[Tensor, "R T o"], example: Int[Tensor, "R"] | None) -> UnitRows:
        return SparseRows.gathered(_per_row(a, g, example).squeeze(-1), g, use.arguments["weight"].shape[0])


class NormalizationRule(Rule):
    """Output = weight ∘ normalized input + bias, the statistics being functions of the example or constants.

    The ``function`` itself normalizes; features are axis 1 (batch and group norms) if ``channels_second``, or the last
    axes.
    """

    def __init__(self, name: str, signature: str, function: Callable[..., Tensor], *, channels_second: bool) -> None:
        super().__init__(name, signature)
        self.function, self.channels_second = function, channels_second

    def features(self, use: Use) -> int:
        """The normalized axes; all but the first where channels come second."""
        return len(use.output_shape) - 1 if self.channels_second else len(use.arguments["normalized_shape"])

    def activations(self, use: Use) -> Float[Tensor, "E t i"]:
        plain = {**use.arguments, "weight": None, "bias": None, "input": use.arguments["input"].detach()}
        x = self.function(*(plain[name] for name in self.signature if name in plain))
        return self.gradients(use, x.unsqueeze(0)).squeeze(0)

    def gradients(self, use: Use, gradient: Float[Tensor, "k ..."]) -> Float[Tensor, "k E t o"]:
        if self.channels_second:
            return gradient.reshape(*gradient.shape[:3], -1).transpose(2, 3)
        return super().gradients(use, gradient)

    def rows(self, use: Use, a: Activations, g: Float[Tensor, "R T o"], example: Int[Tensor, "R"] | None) -> UnitRows:
        """Stored: there are as many parameters as features."""
        return _written(use, lambda: (g * _per_row(a, g, example)).sum(1), g)


def _written(use: Use, weight: Callable[[], Tensor], bias: Float[Tensor, "R T o"]) -> StoredRows:
    """The weight's rows, if it was chosen, and behind them the bias's, a sum over positions."""
    own = [weight().flatten(1)] if use.weight else []
    return StoredRows(torch.cat(own + ([bias.sum(1)] if use.bias else []), 1))


def _each_axis(use: Use, **defaults: int) -> list[tuple[int, ...]]:
    """Settings of a convolution, a number for each axis."""
    dims, found = use.arguments["weight"].ndim - 2, []
    for name, default in defaults.items():
        value = use.arguments.get(name, default)
        values = (value,) if isinstance(value, (int, str)) else tuple(value)
        found.append(values * dims if len(values) == 1 else values)
    return found


class ElementwiseRule(Rule):
    """Output = input ∘ w (a ``product``) or input ± w, w broadcast over examples, as positions and scales are."""

    def __init__(self, name: str, *, product: bool) -> None:
        super().__init__(name, "input weight")
        self.product = product

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """By name; nothing where an operand is a number, or is multiplied by one."""
        named = super().bind(args, {("weight" if name == "other" else name): value for name, value in kwargs.items()})
        fits = set(named) == {"input", "weight"} and all(isinstance(value, Tensor) for value in named.values())
        return named if fits else {}

    def exchanged(self, arguments: Mapping[str, Any]) -> tuple[Rule, dict[str, Any]] | None:
        """Either operand of a sum or product may be the parameter, if it is not written to."""
        both = {"input": arguments["weight"], "weight": arguments["input"]}
        return (self, both) if self.name in ("add", "mul") else None

    def features(self, use: Use) -> int:
        """All but the leading axes that the parameter is broadcast over; at least one of them is in front."""
        return len(use.output_shape) - max(1, broadcast_over(use.arguments["weight"].shape, use.output_shape))

    def activations(self, use: Use) -> Float[Tensor, "E t i"]:
        """The other operand at every place of the output; nothing for sums."""
        x, entries = use.arguments["input"].detach(), use.lead.numel()
        if not self.product:
            return x.new_empty(entries, 1, 0)
        return x.expand(use.output_shape).reshape(entries, 1, -1)

    def rows(self, use: Use, a: Activations, g: Float[Tensor, "R T o"], example: Int[Tensor, "R"] | None) -> UnitRows:
        """Stored: there are no more parameters than entries."""
        whole = (g * _per_row(a, g, example) if self.product else g).sum(1)
        behind, size = use.output_shape[len(use.lead) :], use.arguments["weight"].shape
        own = (*[1] * (len(behind) - len(size)), *size[max(0, len(size) - len(behind)) :])
        values = whole.unflatten(1, behind).sum_to_size(len(g), *own).flatten(1) if behind else whole
        return StoredRows(-values if self.name in ("sub", "sub_") else values)


def broadcast_over(size: Sequence[int], output: Sequence[int]) -> int:
    """Leading axes of an output along which an operand has one entry; one at least is left."""
    whole = [1] * (len(output) - len(size)) + list(size)
    return min(next((i for i, n in enumerate(whole) if n != 1), len(whole)), len(output) - 1)


_CONV = "input weight bias stride padding dilation groups"
_CONV_TRANSPOSE = "input weight bias stride padding output_padding groups dilation"
_LAYER_NORM = "input normalized_shape weight bias eps"

BATCH_NORM = NormalizationRule(
    "batch_norm", "input running_mean running_var weight bias training momentum eps", F.batch_norm, channels_second=True
)
EMBEDDING = EmbeddingRule("embedding", "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse")
RULES: dict[Callable[..., Any], Rule] = {
    F.linear: LinearRule("linear", "input weight bias"),
    **{getattr(F, f"conv{n}d"): ConvolutionRule(f"conv{n}d", _CONV) for n in (1, 2, 3)},
    **{
        getattr(F, f"conv_transpose{n}d"): TransposedConvolutionRule(f"conv_transpose{n}d", _CONV_TRANSPOSE)
        for n in (1, 2, 3)
    },
    F.embedding: EMBEDDING,
    F.layer_norm: NormalizationRule("layer_norm", _LAYER_NORM, F.layer_norm, channels_second=False),
    F.rms_norm: NormalizationRule("rms_norm", "input normalized_shape weight eps", F.rms_norm, channels_second=False),
    F.group_norm: NormalizationRule(
        "group_norm", "input num_groups weight bias eps", F.group_norm, channels_second=True
    ),
    F.batch_norm: BATCH_NORM,
}
ADDED, COPIED = ElementwiseRule("add", product=False), ElementwiseRule("broadcast", product=False)
RULES.update(
    (function, rule)
    for name, rule in {
        "add": ADDED,
        **{name: ElementwiseRule(name, product="mul" in name) for name in ("sub", "mul")},
        **{f"{name}_": ElementwiseRule(f"{name}_", product="mul" in name) for name in ("add", "sub", "mul")},
    }.items()
    for function in (getattr(torch.Tensor, name), getattr(torch, name, None))
    if function is not None
)
INDEXED = EmbeddingRule("indexing", "weight input")
GROUPED = {function: GroupedConvolutionRule(rule.name, _CONV) for function, rule in RULES.items()
           if isinstance(rule, ConvolutionRule)}  # fmt: skip


def rule_for(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rule | None:
    """The rule of a function call, if there is one."""
    rule = RULES.get(function)
    if isinstance(rule, (ConvolutionRule, TransposedConvolutionRule)):
        named = rule.bind(args, kwargs)
        if named["input"].ndim != named["weight"].ndim:  # one example without a batch axis
            return None
    if function is torch.Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.int64:
        return INDEXED if args[0].ndim == 2 and args[1].ndim else None
    if rule is EMBEDDING and rule.bind(args, kwargs).get("scale_grad_by_freq"):
        return None  # an example's gradient at a token depends on how often it has it
    if function in GROUPED and rule is not None and rule.bind(args, kwargs).get("groups", 1) != 1:
        return GROUPED[function]
    return rule


@dataclass(frozen=True)
class Letters:
    """The axes of a product: the input's, and the output's in their order, ``lead``, ``outputs`` and ``columns``.

    The lead counts entries, some of whose axes choose a slice of the weight; columns are positions.
    """

    input: str
    lead: str
    outputs: str
    columns: str
    contracted: str
    slices: str


class ContractionRule(LinearRule):
    """Output = the sum over axes of input and weight that the call's ``letters`` say, plus a bias.

    ``transposed`` if the weight has its contracted axes before its outputs.
    """

    def __init__(self, name: str, transposed: bool) -> None:
        super().__init__(name, "")
        self.transposed = transposed

    def features(self, use: Use) -> int:
        letters: Letters = use.arguments["letters"]
        return len(letters.outputs + letters.columns)

    def activations(self, use: Use) -> Float[Tensor, "E t i"]:
        """Columns are positions; an input without the slices' axes is every slice's."""
        x, letters = use.arguments["input"].detach(), use.arguments["letters"]
        lead, outputs = len(letters.lead), len(letters.outputs)
        wanted = letters.lead + letters.columns + letters.contracted
        x = x.permute([letters.input.index(one) for one in wanted if one in letters.input])
        x = x[tuple(slice(None) if one in letters.input else None for one in wanted)]
        columns = torch.Size(use.output_shape[lead + outputs :])
        whole = x.expand(*use.output_shape[:lead], *columns, *[-1] * len(letters.contracted))
        return whole.reshape(use.lead.numel(), columns.numel(), -1)

    def gradients(self, use: Use, gradient: Float[Tensor, "k ..."]) -> Float[Tensor, "k E t o"]:
        lead, letters = use.lead, use.arguments["letters"]
        outputs = torch.Size(use.output_shape[len(lead) :][: len(letters.outputs)]).numel()
        return gradient.reshape(len(gradient), lead.numel(), outputs, -1).mT


_rule = functools.cache(ContractionRule)


def contraction(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], of: Callable[[Any], Derived | None]
) -> tuple[ContractionRule, dict[str, Any]] | None:
    """The rule and the arguments of a call with one operand, or a bias, that is made of parameters (``of`` tells)."""
    name = _NAMES.get(function, "")
    read = _read(name, args, kwargs) if name else None
    if read is None or not all(isinstance(one, Tensor) for one in read[:2]) or (of(read[0]) and of(read[1])):
        return None
    first, second, bias, terms, offsets = read
    left, right, out = terms or product_terms(first.ndim, second.ndim)
    x, weight, letters, transposed = first, second, *_letters(left, right, out)
    if of(second) is None and (of(first) is not None or of(bias) is None):
        x, weight, letters, transposed = second, first, *_letters(right, left, out)
    if letters is None or (bias is not None and letters.columns):
        return None
    index, turned = None, False
    made = of(weight)
    if made is not None:
        found = made.sliced(weight, weight.ndim - len(letters.slices))
        if offsets is not None and found is not None:
            place = torch.arange(len(x), device=offsets.device)
            group = torch.bucketize(place, offsets, right=True)
            known = torch.arange(len(weight), device=group.device) if found[0] is None else found[0]
            found = torch.where(group < len(known), known[group.clamp_max(len(known) - 1)], -1), found[1]
        if found is not None:
            index, turned = found
        elif letters.slices or made.slices is not None:
            return None
        if turned and weight.ndim != len(letters.slices) + 2:
            return None
    if index is not None and index.ndim and offsets is None:
        sizes = iter(index.shape)
        index = index.reshape([next(sizes) if one in letters.slices else 1 for one in letters.lead])
    arguments = {"input": x, "weight": weight, "bias": bias, "letters": letters, "slices": index, "turned": turned}
    return _rule(name, transposed), arguments


def _read(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, Any, tuple[str, str, str] | None, Tensor | None] | None:
    """The two operands, the bias, the axes if they are not those of a matrix product, and where groups end."""
    args = (*args, *(kwargs[one] for one in ("self", "input", "mat", "mat1", "batch1", "mat_a") if one in kwargs))
    args = (*args, *(kwargs[one] for one in ("other", "mat2", "tensor2", "batch2", "mat_b") if one in kwargs))
    if name == "einsum":
        operands = args[1:] if len(args) != 2 else args[1]
        terms = _terms(args[0], operands)
        return None if terms is None else (*operands, None, terms, None)
    if any(kwargs.get(one, 1) != 1 for one in ("alpha", "beta")):
        return None
    if name in ("addmm", "baddbmm"):
        return (args[1], args[2], args[0], None, None) if len(args) == 3 else None
    if name == "grouped_mm":
        offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
        fits = isinstance(offsets, Tensor) and args[0].ndim == 2 and args[1].ndim == 3 and kwargs.get("bias") is None
        return (args[0], args[1], None, ("sy", "syz", "sz"), offsets) if fits else None
    return (args[0], args[1], None, None, None) if len(args) == 2 else None


def _terms(equation: Any, operands: Any) -> tuple[str, str, str] | None:
    """The three terms of an einsum of two operands, with letters in the place of an ellipsis."""
    if not isinstance(equation, str) or isinstance(operands, Tensor) or "->" not in equation:
        return None
    if len(operands) != 2 or equation.count(",") != 1:
        return None
    left, out = equation.replace(" ", "").split("->")
    pair = left.split(",")
    free = "".join(one for one in ascii_letters if one not in equation)[:16]
    more = [x.ndim - len(term) + 3 if "." in term else 0 for x, term in zip(operands, pair, strict=True)]
    first, second = (t.replace("...", free[16 - n : 16]) for t, n in zip(pair, more, strict=True))
    return first, second, out.replace("...", free[16 - max(more) : 16])


def _letters(x: str, weight: str, out: str) -> tuple[Letters | None, bool]:
    """How axes take part, and whether the weight has its contracted ones before its outputs; None where none can."""
    roles = "".join("s" if one in x and one in out else "c" if one in x else "o" for one in weight)
    match = re.fullmatch("(s*)(o*)(c+)(o*)", roles)
    if match is None or any(len(set(term)) < len(term) for term in (x, weight, out)):
        return None, False
    slices, before, contracted, behind = (weight[slice(*match.span(i))] for i in range(1, 5))
    if before and behind:  # the input is every slice's
        slices, before = slices + before, ""
    outputs = before or behind
    lead, _, columns = out.partition(outputs) if outputs else (out, "", "")
    fits = [one for one in lead if one in slices] == list(slices) and set(lead) - set(slices) <= set(x)
    if not fits or outputs not in out or not set(columns) <= set(x) or not set(x) <= set(out + contracted):
        return None, False
    return Letters(x, lead, outputs, columns, contracted, slices), bool(behind)


_NAMES: dict[Callable[..., Any], str] = {
    function: {"mm": "matmul", "__matmul__": "matmul", "_grouped_mm": "grouped_mm"}.get(name, name)
    for name in ("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "_grouped_mm")
    for owner in (torch, torch.Tensor)
    if (function := getattr(owner, name, None)) is not None
}
