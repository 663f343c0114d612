"""Influence scores: what the removal of a training example does to a query, to first order.

The formula's factors (1/N, sign, what is summed over what) and the loops over queries and training examples. A Fisher's
damped inverse is asked for its form between rows (`operators.factorization`) and never how it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fisherkit import io
from fisherkit.arguments import check_choice, check_count, check_number, check_type
from fisherkit.arithmetic import all_finite, without_autocast
from fisherkit.data import Data
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError
from fisherkit.influence.approximations import ApproximateScores, LowRankQueries, compressed_groups
from fisherkit.influence.blocks import (
    MOST,
    KeptBlocks,
    LiveBlocks,
    OncePerExample,
    RowBlock,
    RowBlocks,
    in_groups,
    read_blocks,
    write_blocks,
)
from fisherkit.influence.compression import FILE, Basis, Compression, LayerBasis, check_compress, measured, refuse_error
from fisherkit.influence.model_rows import Measurement, ModelRows
from fisherkit.likelihoods import Likelihood
from fisherkit.operators import Damping, FisherOperator, usual_damping
from fisherkit.operators.factorization import Factorization, RowProducts
from fisherkit.processes import ALONE, Group, Processes
from fisherkit.rows.collection import Rows
from fisherkit.vectors import EmpiricalVectors, ExactVectors


@dataclass(frozen=True)
class TopScores:
    """The extremes of a score matrix that was never whole.

    Args:
        helpful: the largest scores, in descending order.
        helpful_index: the training examples that have them, by their place in the data.
        harmful: the smallest scores, in ascending order.
        harmful_index: the training examples that have them.
    """

    helpful: Float[Tensor, "Q k"]
    helpful_index: Int[Tensor, "Q k"]
    harmful: Float[Tensor, "Q k"]
    harmful_index: Int[Tensor, "Q k"]


class InfluenceScores:
    """score[q, n] = (1/N) ∇ℓ_qᵀ (F + λI)⁻¹ ∇ℓ_n: positive where the training example helps the query.

    To first order it is how much the query's loss rises when the example is removed and the model is trained on (Koh
    and Liang, arXiv 1703.04730, with F in place of the loss's Hessian). ∇ℓ is an example's loss gradient, summed over
    its positions. N and the scale of F are what the Fisher was measured with, also if ``train`` is a part of its data
    or other data: a score does not depend on what else is scored.

    Args:
        fisher: any kind in any structure, of this model at these parameters.
        model: the model; read, never changed. In eval mode if it has dropout or batch norm.
        likelihood: of the loss; None for the one the Fisher was built with.
        damping: λ in parameter space, or `fisherkit.RelativeDamping`; None for what suits the structure by
            `fisherkit.operators.usual_damping`: 1 × the mean eigenvalue for full and block, 0.1 × for kfac and ekfac,
            0.01 × for diagonal.
        examples: N, where the Fisher does not say it (sums of Fishers, operators of one's own).
        chunk_size: most rows (examples × vectors) in one backward pass; None to choose by memory.
        memory_budget: bytes for rows and solutions beside the scores themselves; None for half of what is available.
        progress: show progress bars.
        shift_labels: labels belong to the outputs one position before them (causal language models). None: as the model
            says of itself.

    Attributes:
        examples: N.
        damping: λ itself.

    Raises:
        InvalidTypeError: not a Fisher operator or not a module; a dtype that is not the model's.
        UnknownParameterError: the Fisher is over parameters that the model does not have.
        InvalidArgumentError: shapes or a device that are not the model's, other parameters than at the Fisher's build,
            an unknown N or likelihood, a bad damping.
        SingularMatrixError: F + λI is singular.

    Cost: one factorization of F + λI, kept.
    """

    @without_autocast()
    def __init__(
        self, fisher: FisherOperator, model: nn.Module, *, likelihood: str | Likelihood | nn.Module | None = None,
        damping: Damping | None = None, examples: int | None = None, chunk_size: int | None = None,
        memory_budget: int | None = None, progress: bool = False, shift_labels: bool | None = None,
    ) -> None:  # fmt: skip
        self._model_rows = ModelRows(
            fisher, model, likelihood=likelihood, chunk_size=chunk_size, memory_budget=memory_budget,
            progress=progress, shift_labels=shift_labels,
        )  # fmt: skip
        fisher = self._model_rows.fisher  # by the model's own names
        self.examples = self._model_rows.examples(examples)
        # Under "sum" F has no 1/N: the inverse brings it.
        self._scale = 1.0 if fisher.metadata.get("normalization") == "sum" else 1.0 / self.examples
        self._inverse = fisher.factorize(usual_damping(fisher) if damping is None else damping)
        self.damping = self._inverse.damping

    def __repr__(self) -> str:
        return f"InfluenceScores({self._model_rows.fisher!r}, damping={self.damping}, examples={self.examples})"

    @without_autocast()
    def prepare(
        self, train: Data, *, folder: str | Path | None = None, by: Literal["token"] | None = None,
        compress: int | float | None = None, most_error: float | None = None, queries: Data | None = None,
        checked: int = 64, group: Group = None,
    ) -> RowBlocks:  # fmt: skip
        """Training rows made once, for any number of calls that take ``train``.

        Args:
            train: one batch or a re-iterable of batches, with targets.
            folder: keep them there, a file a block, instead of in memory. A call that was interrupted, given the same
                batches, goes on from what it left, to the same bytes; damaged blocks and eigenvectors are made again.
            by: "token" for calls with ``by="token"``; rows without it are for all others, also ``by="module"``.
            compress: keep of each layer's rows what they have in the leading eigenvectors of its Kronecker factors:
                those of so many on either side (an integer), or the fewest pairs that have this share of the layer's
                effective dimension Σ e/(e + λ) (a float, at most 1). Layers without factors stay whole.
            most_error: refuse, before rows are kept, if a query's scores by compressed rows are farther off than
                this, ‖compressed − whole‖ / ‖whole‖, in the median over the queries.
            queries: on which that is measured, the same in all processes; None for the training examples that are
                checked, each with the others.
            checked: on how many training examples, at least about, scores by whole rows are computed for it.
            group: processes that compress alike and keep rows in one folder, each those of its own data, in the order
                of their ranks. None for the default group, where there is one, False for this process alone. Whole
                rows in memory are each process's own, made without the others.

        Returns:
            The rows, of several processes this one's own (`read` has all). Their ``compression`` says what became of
            compressed ones.

        Raises:
            DataError: no example, no targets, targets that do not fit, or data whose order is not known to be fixed.
            ModelError: dropout or batch norm in train mode, or weights that have changed since the construction.
            InvalidArgumentError: an unknown ``by``; a bad ``compress``, one that leaves too large an error, or
                ``most_error`` or ``queries`` without it; the folder holds rows of another model or other data, cannot
                be made, or is not that of the group's first process, nor is the Fisher or λ.
            FileFormatError: the folder's manifest is damaged.
            ProcessError: another process of the group failed.

        Cost: one forward and one backward pass; memory, or disk, for all rows in their smallest form; a
        reading of the blocks that are there. Compressed, another pass over the examples that are checked.
        """
        # Whole rows in memory are made without the others.
        alone = all(one is None for one in (compress, most_error, queries, folder))
        processes = ALONE if alone else Processes.of(group, "prepare", self._model_rows.device)

        def begun() -> Path | None:
            check_choice("prepare", "by", by, (None, "token"))
            if compress is None and (most_error is not None or queries is not None):
                raise InvalidArgumentError(
                    "prepare", "most_error or queries without compress", "compress=",
                    why="whole rows have no error that could be measured", try_="compress=0.9, or leave them out",
                )  # fmt: skip
            if most_error is not None:
                check_number("prepare", "most_error", most_error)
            if compress is not None:
                check_compress(compress, token=by == "token")
                check_count("prepare", "checked", checked)
            self._model_rows.begin()
            return None if folder is None else io.as_path(folder, "prepare(folder)")

        path = processes.each("prepare", begun)
        if processes.size > 1:
            asked: dict[str, object] = {"compress": compress, "most_error": most_error, "checked": checked}
            digest = processes.each("prepare", lambda: None if queries is None else self._model_rows.digest(queries))
            asked |= {"queries": digest, "folder": "None" if folder is None else "a path"}
            processes.require_same("prepare", lambda: self._model_rows.settings(token=by == "token") | asked)
        live = processes.each("prepare", lambda: self._model_rows.live(train, EmpiricalVectors(), token=by == "token"))
        live.set_written_out(processes.by_first("prepare", lambda: live.written_out))
        largest = live.limit
        if compress is not None:
            live, size = self._compressed(live, compress, most_error, path, queries, checked, processes)
            largest = max(1, min(MOST, self._model_rows.budget // 8 // size))
        return KeptBlocks(live) if path is None else write_blocks(path, live, largest, processes)

    def _compressed(
        self, live: LiveBlocks, compress: int | float, most_error: float | None, folder: Path | None,
        queries: Data | None, checked: int, processes: Processes,
    ) -> tuple[LiveBlocks, int]:  # fmt: skip
        """The rows over leading eigenvectors, whose error is measured, and the bytes that one takes."""
        rows, damping = self._model_rows, self.damping
        probe = rows.probe(live)
        known = None if folder is None else folder / FILE

        def chosen() -> tuple[tuple[LayerBasis, ...], float, bool]:
            found = None if known is None else Basis.read_whole(known, rows.fisher, damping)
            if found is not None and repr((found.compress, found.chosen_at)) == repr((compress, damping)):
                return found.layers, damping, True
            return Basis.of(rows.fisher, damping, compress, probe).layers, damping, False

        basis = Basis(rows.fisher, damping, compress, *processes.by_first("prepare", chosen))
        processes.each("prepare", lambda: basis.refuse_other() if processes.rank else None)

        # Examples of all data, by their place there, and one process that measures: any number of them tell the same.
        count = processes.each("prepare", live.count)
        before, total = processes.before(live.counted), sum(processes.gathered(count))
        sample = processes.each("prepare", lambda: rows.every(live, max(1, total // checked), before))
        sample = [part for rank in range(processes.size) for part in processes.sent_by(rank, sample)]

        def compression() -> Compression:
            asked = None if queries is None else rows.queries(queries, "loss")
            some = None if asked is None else rows.sample(asked, max(1, asked.count() // checked))
            return measured(self._inverse, basis, Rows.cat(sample), some, rows.room(2 * rows.space.size))

        report = processes.by_first("prepare", compression)
        refuse_error(report, most_error)
        settings = live.settings | {"compress": basis.settings}
        return LiveBlocks(live.problem, live.limit, settings, basis, report), report.bytes

    @without_autocast()
    def read(self, folder: str | Path) -> RowBlocks:
        """Training rows that `prepare` has kept in a folder, without the data; those of all processes that wrote them.

        Raises:
            FileFormatError: the manifest, or the file of the eigenvectors, is missing, damaged, or of another Fisher.
            InvalidArgumentError: rows that are not finished, or of another model.
            ModelError: weights that have changed since the construction.
        """
        self._model_rows.begin()
        blocks = read_blocks(folder, self._model_rows.fisher, self.damping)
        return self._training("read", blocks, token=bool(blocks.settings.get("token")))

    @overload
    def scores(
        self, queries: Data, train: Data | RowBlocks, *, measurement: Measurement = ...,
        by: Literal["token"] | None = ..., groups: Tensor | None = ..., normalize: str | None = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def scores(
        self, queries: Data, train: Data | RowBlocks, *, measurement: Measurement = ..., by: Literal["module"],
        groups: Tensor | None = ..., normalize: str | None = ...,
    ) -> dict[str, Tensor]: ...  # fmt: skip
    @without_autocast()
    def scores(
        self, queries: Data, train: Data | RowBlocks, *, measurement: Measurement = "loss",
        by: Literal["module", "token"] | None = None, groups: Int[Tensor, "N"] | None = None,
        normalize: str | None = None,
    ) -> Float[Tensor, "Q N ..."] | dict[str, Tensor]:  # fmt: skip
        """All scores of the queries against the training examples.

        Args:
            queries: one batch or a re-iterable of batches.
            train: the same, or what `prepare` made. Scores are in the order in which the data come, so no loader that
                shuffles.
            measurement: what is asked of a query: its "loss"; its "margin" log p_y / (1 − p_y); or a function
                ``(outputs, targets) -> [B]``, differentiable, each number of its own example alone. Scores are how much
                the loss or the function's value rises, or the margin falls, without the training example.
            by: "module" for the summands of each module's parameters in ∇ℓ_n; "token" for those of each training
                position's loss.
            groups: a group's number, 0 or more, for each training example; scores are then those of groups, the sums of
                their members'.
            normalize: "relatif" divides by √(∇ℓ_nᵀ(F + λI)⁻¹∇ℓ_n), so that examples with large gradients do not lead
                every list (ℓ-RelatIF of Barshan, Brunet and Dziugaite, AISTATS 2020).

        Returns:
            ``[Q, N]``, ``[Q, groups]``, ``[Q, N, T]`` by token, or a dict module -> ``[Q, N]``; in the Fisher's dtype
            and on its device. Examples without a label that counts score 0.

        Raises:
            InvalidArgumentError: an option that is none of the allowed ones, or two that do not go together.
            InvalidTypeError: groups that are not integers.
            DataError: no example, no targets, targets that do not fit, or data whose order is not known to be fixed.
            NonFiniteError: NaN or infinity in the rows of a batch, which is named, or in scores.
            ModelError: dropout or batch norm in train mode, or weights that have changed since the construction.

        Cost: the rows of both sides, one solve for each query, N·Q products of rows; or, where it takes fewer
        operations, inner products of rows alone.
        """
        call = "scores"
        _check_options(call, by, groups, normalize)
        self._model_rows.begin()
        train = self._training(call, train, token=by == "token")
        if groups is not None and groups.shape != (train.count(),):
            _check_group_count(groups, train.counted())  # before anything is computed
        weights = self._weights(normalize, train)
        whole: dict[str, list[Tensor]] = {}
        for block, form, others in self._query_blocks(queries, train, measurement):
            found: dict[str, list[Tensor]] = {}
            for pieces in self._pieces(block, form, others, by, weights):
                for name, piece in pieces.items():
                    found.setdefault(name, []).append(piece)
            for name, parts in found.items():
                total = _side_by_side(parts)
                whole.setdefault(name, []).append(total if groups is None else _grouped(total, groups))
        result = {name: _finite(_stacked(parts), "scores") for name, parts in whole.items()}
        return result if by == "module" else result[""]

    @without_autocast()
    def top(
        self, queries: Data, train: Data | RowBlocks, k: int, *, measurement: Measurement = "loss",
        normalize: str | None = None,
    ) -> TopScores:  # fmt: skip
        """The k most helpful and the k most harmful training examples of each query, without the score matrix.

        Args:
            queries: one batch or a re-iterable of batches.
            train: the same in a fixed order, or what `prepare` made.
            k: how many of each.
            measurement: what is asked of a query: its "loss", "margin" or a function ``(outputs, targets) -> [B]``.
            normalize: "relatif" so that examples with large gradients do not lead every list.

        Returns:
            Scores and places in the training data; of equal scores the earlier example comes first.

        Raises:
            InvalidArgumentError: k is not between 1 and the number of training examples.
            DataError: no example, no targets, targets that do not fit, or data whose order is not known to be fixed.
            ModelError: dropout or batch norm in train mode, or weights that have changed since the construction.
        """
        call = f"top(k={k})"
        check_count(call, "k", k)
        _check_options(call, None, None, normalize)
        self._model_rows.begin()
        tops: list[tuple[Tensor, ...]] = []
        train = self._training(call, train, token=False)
        weights = self._weights(normalize, train)
        for block, form, others in self._query_blocks(queries, train, measurement):
            none = torch.empty(block.size, 0, dtype=self._model_rows.dtype, device=self._model_rows.device)
            helpful = harmful = none, none.long()
            seen = 0
            for pieces in self._pieces(block, form, others, None, weights):
                helpful = _first(k, helpful, pieces[""], seen, largest=True)
                harmful = _first(k, harmful, pieces[""], seen, largest=False)
                seen += pieces[""].shape[1]
            if seen < k:
                raise InvalidArgumentError(call, f"{seen} training examples", f"at least k = {k}")
            tops.append((*helpful, *harmful))
        scores = TopScores(*(torch.cat(parts) for parts in zip(*tops, strict=True)))
        _finite(scores.helpful, call)  # NaN comes first among the largest
        _finite(scores.harmful, call)
        return scores

    @without_autocast()
    def approximate_scores(
        self, queries: Data, train: Data | RowBlocks, approximation: LowRankQueries, *,
        measurement: Measurement = "loss", checked: int = 64,
    ) -> ApproximateScores:  # fmt: skip
        """Scores by an approximation, with its error measured on some of the training examples.

        Args:
            queries: one batch or a re-iterable of batches.
            train: the same in a fixed order, or what `prepare` made.
            approximation: a `LowRankQueries`.
            measurement: what is asked of a query: its "loss", "margin" or a function ``(outputs, targets) -> [B]``.
            checked: on how many training examples, at least about, exact scores are computed beside them.

        Raises:
            InvalidTypeError: no approximation.
            InvalidArgumentError: checked is below 1.
            DataError: no example, no targets, targets that do not fit, or data whose order is not known to be fixed.
            ModelError: dropout or batch norm in train mode, or weights that have changed since the construction.

        Cost: one solve for each query, and a pass over the training examples for as many compressed queries as half
        the memory budget holds; another one over those that are checked.
        """
        call = "approximate_scores"
        check_type(call, "approximation", approximation, LowRankQueries, "fk.influence.LowRankQueries(rank)")
        check_count(call, "checked", checked)
        self._model_rows.begin()
        blocks = self._training(call, train, token=False)
        if blocks.basis is not None:
            raise InvalidArgumentError(
                call, "compressed rows", "whole ones", why="its error is that of one approximation",
                try_="scores(queries, train), whose error compressed rows have told",
            )  # fmt: skip
        sample = self._model_rows.sample(blocks, max(1, blocks.count() // checked))
        form = self._inverse._unit_products(sample)
        live, most = self._model_rows.queries(queries, measurement), self._model_rows.room(form.numbers_per_query)
        live = live.of(limit=min(most, live.limit))
        dtype, device, count = self._model_rows.dtype, self._model_rows.device, live.counted()
        scores = torch.empty(count, blocks.counted(), dtype=dtype, device=device)
        errors, first = torch.empty(count, dtype=dtype, device=device), 0
        solutions = ((block, form.solve(block.rows)) for block in in_groups(live, most))
        for group, error in compressed_groups(solutions, count, approximation, sample, self._model_rows.budget // 2):
            own, start = slice(first, first + len(error)), 0
            for other in blocks:
                found = other.by_example(group.products(other.rows)).mT
                scores[own, start : start + other.size], start = self._scale * found, start + other.size
            errors[own], first = error, own.stop
            del group  # its memory is the next one's
        return ApproximateScores(_finite(scores, call), errors, sample.count)

    @without_autocast()
    def self_influence(self, train: Data | RowBlocks) -> Float[Tensor, "N"]:
        """(1/N) ∇ℓ_nᵀ(F + λI)⁻¹∇ℓ_n of each example: how much its own loss rises without it.

        Args:
            train: one batch or a re-iterable of batches in a fixed order, or what `prepare` made.

        Raises:
            DataError: no example, no targets, targets that do not fit, or data whose order is not known to be fixed.
            ModelError: dropout or batch norm in train mode, or weights that have changed since the construction.

        Cost: the rows; for factored rows and structures with an eigenbasis no more than a few products of their size,
        for the full structure their inner products with the Fisher's rows, else one solve an example.
        """
        self._model_rows.begin()
        blocks = self._training("self_influence", train, token=False)
        return _finite(torch.cat([self._scale * self._squares(block, blocks) for block in blocks]), "self_influence")

    @without_autocast()
    def leverages(self, data: Data) -> Float[Tensor, "N"]:
        """(1/N) tr(S_nᵀJ_n(F + λI)⁻¹J_nᵀS_n), S_nS_nᵀ the loss's Hessian in z: how far an example fits itself.

        The leverage of generalized linear models (Pregibon 1981), from 0 to the number of free outputs; it needs no
        labels but for a loss with weights of classes or of positives. With an exact Fisher of the same data the
        leverages sum up to its effective dimension tr(F(F + λI)⁻¹).

        Args:
            data: one batch or a re-iterable of batches; targets may be None where the Hessian does not depend on them.

        Raises:
            DataError: no example, no targets where they are needed, or data whose order is not known to be fixed.
            ModelError: dropout or batch norm in train mode, or weights that have changed since the construction.

        Cost: the rows of an exact Fisher, as many for each example as it has free outputs.
        """
        self._model_rows.begin()
        blocks = self._model_rows.live(data, ExactVectors(), token=False)
        return _finite(torch.cat([self._scale * self._squares(block, blocks) for block in blocks]), "leverages")

    # -- shared --------------------------------------------------------------------------------------------------------

    def _training(self, call: str, train: Data | RowBlocks, *, token: bool) -> RowBlocks:
        if not isinstance(train, RowBlocks):
            return self._model_rows.live(train, EmpiricalVectors(), token=token)
        own = self._model_rows.settings(token=token)
        changed = [name for name in own if train.settings.get(name) != own[name]]
        if changed == ["token"]:
            raise InvalidArgumentError(
                f"{call}(train)", f"rows prepared with by={None if token else 'token'!r}",
                f"by={'token' if token else None!r}",
                try_='prepare(train, by="token") for scores by token, prepare(train) for all others',
            )  # fmt: skip
        if changed:
            raise InvalidArgumentError(
                f"{call}(train)", f"rows prepared with different {', '.join(changed)}",
                "rows of this model, over the Fisher's parameters, of the same loss",
                why="∇ℓ and F must be taken at one point", try_="prepare(train) of this InfluenceScores",
            )  # fmt: skip
        basis = train.basis
        if basis is not None and (basis.fisher is not self._model_rows.fisher or basis.damping != self.damping):
            raise InvalidArgumentError(
                f"{call}(train)", "rows that were compressed for another Fisher or damping",
                "those of this InfluenceScores", why="the eigenvectors are the Fisher's, with its inverse",
                try_="read(folder) or prepare(train, compress=...) of this InfluenceScores",
            )  # fmt: skip
        return train

    def _query_blocks(
        self, queries: Data, train: RowBlocks, measurement: Measurement
    ) -> Iterator[tuple[RowBlock, RowProducts, RowBlocks]]:
        """The queries in blocks that memory has room for, the form that suits them, and the other side."""
        live = self._model_rows.queries(queries, measurement, train.basis)
        count, others, inverse = live.count(), train.count(), self._inverse_for(train)
        form = inverse._row_products(self._model_rows.probe(train), count, others)
        most = self._model_rows.room(form.numbers_per_query)
        if count > most:
            # Each block of queries meets all others: what counts is a block's own number.
            train = self._model_rows.held(train)
            form = inverse._row_products(self._model_rows.probe(train), most, others)
            most = self._model_rows.room(form.numbers_per_query)
            live = live.of(limit=most)
        for block in in_groups(live, most):
            yield block, form, train

    def _weights(self, normalize: str | None, train: RowBlocks) -> OncePerExample | None:
        """What each training example's scores are multiplied by for ℓ-RelatIF; None for nothing."""

        def reciprocal_norms(block: RowBlock) -> Float[Tensor, "B"]:
            norms = self._squares(block, train).sqrt()
            return torch.where(norms > 0, norms.reciprocal(), 0)

        return None if normalize is None else OncePerExample(reciprocal_norms)

    def _pieces(
        self, block: RowBlock, form: RowProducts, train: RowBlocks, by: str | None, weights: OncePerExample | None
    ) -> Iterator[dict[str, Tensor]]:
        """Scores of a block of queries against each training block, ``[Q, B]`` or ``[Q, B, P]``."""
        solution, start = form.solve(block.rows), 0
        for other in train:
            scale = self._scale if weights is None else self._scale * weights.of(other, start)
            start += other.size
            found: dict[str, Tensor] = {}
            if by == "module":
                for names, part in solution.parts(other.rows):
                    name = self._model_rows.module(names)
                    found[name] = found[name] + part if name in found else part
            else:
                found[""] = solution.products(other.rows)
            # From rows on both sides to examples on both, the queries first.
            placed = other.by_position if by == "token" else other.by_example
            parts = {name: block.by_example(placed(part).movedim(-1, 0)) for name, part in found.items()}
            yield {name: (part * scale).to(self._model_rows.dtype) for name, part in parts.items()}

    def _inverse_for(self, blocks: RowBlocks) -> Factorization:
        """(F + λI)⁻¹ over what the rows are over."""
        return self._inverse if blocks.basis is None else blocks.basis.inverse

    def _squares(self, block: RowBlock, blocks: RowBlocks) -> Float[Tensor, "B"]:
        squares = self._inverse_for(blocks)._row_squares(block.rows).clamp_min(0)  # rounding may leave a little less
        return block.by_example(squares).to(self._model_rows.dtype)


def _finite(scores: Tensor, call: str) -> Tensor:
    """The scores, if they are finite: rows of live data are, whatever a Fisher or prepared rows bring."""
    if not all_finite(scores):
        raise NonFiniteError(
            call, "scores with NaN or infinite entries", "finite ones",
            why="rows of live data have been checked, so they come of the Fisher's inverse, of prepared rows, or of "
            "numbers too large for their dtype", try_="the Fisher's trace(), rows prepared anew, or a larger damping",
        )  # fmt: skip
    return scores


def _first(
    k: int, kept: tuple[Tensor, Tensor], scores: Float[Tensor, "Q B"], seen: int, *, largest: bool
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The k largest or smallest of what was kept and of the next scores, with their places; ties go to the earlier."""
    index = torch.arange(seen, seen + scores.shape[1], device=scores.device).expand_as(scores)
    scores, index = torch.cat([kept[0], scores], 1), torch.cat([kept[1], index], 1)
    values, order = torch.sort(scores, dim=1, descending=largest, stable=True)
    return values[:, :k], index.gather(1, order[:, :k])


MANY = 1 << 20
"""Groups that may be empty."""


def _check_options(call: str, by: Any, groups: Any, normalize: Any) -> None:
    check_type(call, "groups", groups, Tensor | None, "a tensor of integers")
    if groups is not None and (groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool):
        raise InvalidTypeError(call, f"groups of {groups.dtype}", "a tensor of integers")
    if groups is not None and groups.numel() and int(groups.long().min()) < 0:
        raise InvalidArgumentError(call, f"group {int(groups.long().min())}", "0 or more")
    if groups is not None and groups.numel() and int(groups.long().max()) >= max(MANY, groups.numel()):
        raise InvalidArgumentError(
            call, f"group {int(groups.long().max()):,} of {groups.numel():,} examples",
            "numbers from 0 on, without large gaps", why="there is a column of scores for every number up to it",
            try_="ids, groups = torch.unique(groups, return_inverse=True), and ids[j] is group j",
        )  # fmt: skip
    check_choice(call, "by", by, (None, "module", "token"))
    check_choice(call, "normalize", normalize, (None, "relatif"))
    if by == "token" and (groups is not None or normalize is not None):
        raise InvalidArgumentError(
            call, 'by="token" with groups= or normalize=', "either of them", why="both are about whole examples",
            try_='scores(..., by="token") and sums over it',
        )  # fmt: skip
    if groups is not None and normalize is not None:
        raise InvalidArgumentError(
            call, f"groups with normalize={normalize!r}", "either of them",
            why="RelatIF is relative to one example's own influence",
        )  # fmt: skip


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Blocks of training examples in one tensor; shorter sequences end in zeros."""
    if parts[0].ndim == 3:
        longest = max(part.shape[2] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, longest - part.shape[2])) for part in parts]
    return torch.cat(parts, 1)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Blocks of queries in one tensor, each let go as soon as it is copied."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    start = 0
    while parts:
        part = parts.pop(0)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _check_group_count(groups: Tensor, examples: int) -> None:
    if groups.shape != (examples,):
        raise InvalidArgumentError(
            "scores(groups)", f"groups of shape {list(groups.shape)} for {examples} training examples",
            "one number for each",
        )  # fmt: skip


def _grouped(scores: Float[Tensor, "Q N"], groups: Tensor) -> Float[Tensor, "Q G"]:
    _check_group_count(groups, scores.shape[1])
    groups = groups.to(scores.device, torch.long)
    total = scores.new_zeros(scores.shape[0], int(groups.max()) + 1)
    return total.index_add_(1, groups, scores)
