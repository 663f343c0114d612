"""Products that sum over some axes of a parameter: matrix products, batched ones, einsum and products by group.

All are read as einsum writes them, one letter an axis. A weight's axes are, in this order, *slices* (an entry of the
output uses one of them, as an expert's), then outputs and contracted axes in either order. Owns how a call is read;
whose an entry is, and what becomes of slices, is the business of others.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.rows.batch_axis import product_terms
from fisherkit.rows.derived import Derived
from fisherkit.rows.rules import LinearRule, Use


@dataclass(frozen=True)
class Letters:
    """The axes of a product.

    Args:
        input: of the input.
        lead: of the output that count entries, which come first.
        outputs: of the output that are features.
        columns: of the output behind them, which are positions.
        contracted: summed over.
        slices: of the lead that choose a slice of the weight.
    """

    input: str
    lead: str
    outputs: str
    columns: str
    contracted: str
    slices: str


class ContractionRule(LinearRule):
    """Output = the sum over axes of input and weight that the call's ``letters`` say, plus a bias.

    Args:
        name: the function's name.
        transposed: whether the weight has its contracted axes before its outputs.
    """

    def __init__(self, name: str, transposed: bool) -> None:
        super().__init__(name, "")
        self.transposed = transposed

    def features(self, use: Use) -> int:
        """Outputs and columns."""
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
        """As the input."""
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
    kinds = "".join("s" if one in x and one in out else "c" if one in x else "o" for one in weight)
    match = re.fullmatch("(s*)(o*)(c+)(o*)", kinds)
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
