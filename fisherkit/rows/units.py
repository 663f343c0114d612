"""Units: parameters whose rows are made together, and how they are kept.

A ruled unit is a weight with its bias (or either) under one layer rule; any other parameter is a unit of its own and
goes the generic way. Owns the cost model. Which rule a unit gets is the business of `rows.plan`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.rows.base import UnitRows
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.layouts import fits
from fisherkit.rows.patches import Activations
from fisherkit.rows.rules import Rule, Use
from fisherkit.rows.selection import RowSelection
from fisherkit.rows.sparse import SparseRows
from fisherkit.rows.stored import StoredRows


class Unit:
    """A parameter without a rule; its rows are written out.

    Args:
        names: its name; more than one only in ruled units.
        reason: why it is handled as it is, for `coverage`.
        numbers: how many numbers a row takes when it is written out.
    """

    def __init__(self, names: tuple[str, ...], reason: str, numbers: int) -> None:
        self.names, self.reason, self.numbers = names, reason, numbers

    def numbers_per_example(self, vectors: int) -> int:
        """Numbers that the rows of one example take as they are kept, for so many output vectors an example."""
        return vectors * self.numbers


class RuledUnit(Unit):
    """Weight then bias, or either, under a layer rule.

    Args:
        names: of the weight and the bias that were chosen.
        rule: the rule.
        numbers: as in `Unit`.

    Attributes:
        layout: where the rule finds the batch.
        shape: positions, inputs and outputs ``(T, I, O)`` of a unit that can be kept factored; None for others.
        stored: write the rows out instead of keeping the two factors.
    """

    def __init__(self, names: tuple[str, ...], rule: Rule, numbers: int) -> None:
        super().__init__(names, "", numbers)
        self.rule = rule
        self.layout = rule.layouts[0]
        self.shape: tuple[int, int, int] | None = None
        self.stored = False

    def uses(self, uses: Sequence[Use]) -> list[Use]:
        """Those of a forward pass that belong to this unit."""
        return [use for use in uses if use.weight in self.names or use.bias in self.names]

    def fits(self, uses: Sequence[Use], layout: str, batch: int) -> bool:
        """Whether inputs and outputs of all uses can have the layout."""
        rule = self.rule
        return all(
            fits(tuple(use.arguments[rule.input_name].shape), rule.input_features(use), layout, batch)
            and fits(use.output_shape, rule.output_features(use), layout, batch)
            for use in uses
        )

    def activations(self, uses: Sequence[Use], batch: int) -> Activations:
        """The inputs' side, ``[B, T, i]``; several uses of one weight are positions of one use."""
        parts = [self.rule.activations(use, self.layout, batch) for use in uses]
        return parts[0] if len(parts) == 1 else torch.cat([part[:] for part in parts], 1)

    def gradients(
        self, uses: Sequence[Use], found: Sequence[Tensor | None], like: Float[Tensor, "k B ..."]
    ) -> Float[Tensor, "k B T o"]:
        """The output gradients' side.

        Args:
            uses: the unit's uses.
            found: gradients ``[k, *output]`` in their outputs; None where nothing depends on an output.
            like: the output vectors, for number, dtype and device.
        """
        parts = []
        for use, gradient in zip(uses, found, strict=True):
            # Positions that nothing depends on stay, with zeros, so that both sides have the same.
            whole = like.new_zeros(like.shape[0], *use.output_shape) if gradient is None else gradient
            parts.append(self.rule.gradients(use, whole, self.layout, like.shape[1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def rows(self, use: Use, a: Activations, g: Float[Tensor, "R T o"], selection: RowSelection) -> UnitRows:
        """Rows from both sides, as the unit keeps them."""
        rows = self.rule.rows(use, a, g, selection.example)
        return StoredRows(rows.dense()) if self.stored and isinstance(rows, FactoredRows) else rows

    def measure(self, rows: UnitRows, positions: int) -> None:
        """Learn the sizes from rows of the probe."""
        self.reason = self.layout
        if isinstance(rows, FactoredRows):
            self.shape = rows.positions, rows.inputs + rows.bias, rows.outputs
        elif isinstance(rows, SparseRows):
            self.numbers = positions * (rows.values.shape[1] + 2)

    def choose(self, vectors: int, lean: bool) -> None:
        """The cost model: keep the two factors, or write their product out.

        A product with F takes 4·T·I·O operations an example from factors and 4·M·I·O from rows written out. Writing out
        takes 2·T·M·I·O, once; from factors every Gram, solve or diagonal does it again. So rows are written out where
        T >= M, unless memory is short; then whatever has fewer numbers is kept.

        Args:
            vectors: M.
            lean: whether memory is short.
        """
        if self.shape is None:
            return
        t, i, o = self.shape
        pair, product = t * (i + vectors * o), vectors * i * o
        smaller, faster = pair > product, t > 1 and t >= vectors and not lean
        self.stored = smaller or faster
        sign = ">" if smaller else "<="
        why = f"T(I + M·O) = {pair:,} {sign} M·I·O = {product:,}"
        self.reason = f"{self.layout}; {f'T = {t:,} >= M = {vectors:,}' if faster else why}"

    def numbers_per_example(self, vectors: int) -> int:
        """As in `Unit`; the activations are shared by an example's rows."""
        if self.shape is None or self.stored:
            return vectors * self.numbers
        t, i, o = self.shape
        return t * (i + vectors * o)

    def strange(self, use: Use) -> bool:
        """Whether a use is not of the form that was verified."""
        names = tuple(name for name in (use.weight, use.bias) if name is not None)
        return use.rule is not self.rule or names != self.names
