"""`FisherApproximation`: a Fisher matrix of a model on data, by one kind and in one structure.

Owns the conventions a user chooses and hands the work on: the kind is a rule of `vectors`, rows are made by `rows`, the
operator by `build`. As an operator it forwards to the one that was built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit import io, likelihoods
from fisherkit._version import __version__
from fisherkit.arguments import check_choice, check_count, check_type
from fisherkit.arithmetic import without_autocast
from fisherkit.build import Builder, BuildPlan, Built, PartsFile
from fisherkit.coverage import Coverage
from fisherkit.data import Data, Source, model_device
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.likelihoods import Likelihood
from fisherkit.model_inputs import is_causal
from fisherkit.model_state import weight_hashes
from fisherkit.operators import BlockDiagonalOperator, ForwardingOperator
from fisherkit.operators.files import FisherFile, open_together
from fisherkit.outputs import OutputRule
from fisherkit.processes import Group, Processes
from fisherkit.rows.problem import Problem
from fisherkit.rows.verified import joint_plan, plan_of
from fisherkit.space import ParameterSpace, Selection
from fisherkit.structures import Structure, structure_named
from fisherkit.vectors import rule_of
from fisherkit.wrappers import unwrapped, with_full_weights, without_prefix, wrapped_in

T = TypeVar("T")


class FisherApproximation(ForwardingOperator):
    """F = (1/N) Σ_nm (J_nᵀ v_nm)(J_nᵀ v_nm)ᵀ with the vectors v of a kind, in a structure.

    The model is read, never changed: parameters, ``.grad``, hooks, train/eval flags and random generators are as
    before, also after an exception. It must be deterministic: call ``model.eval()`` if it has dropout or batch norm.
    The Fisher is in the parameters' dtype, in float32 of models in half precision; a caller's autocast is off around
    its passes and products, one inside the model's forward stays.

    Args:
        model: any module that maps a batch to outputs ``(B, C)``, ``(B, T, C)`` or ``(B,)``, or as the likelihood reads
            them, or to an object with ``.logits``. Examples lie along axis 0 and do not influence each other; both are
            checked. Of a compiled model, or one wrapped for data parallelism, it is the model inside that is measured,
            by its own names.
        data: one batch, or anything that can be iterated again and again and yields batches (a list, a DataLoader). A
            batch is a pair (inputs, targets), where inputs is a tensor, a tuple of positional or a mapping of keyword
            arguments, or a mapping (dataclass, named tuple) with "labels"; of a longer tuple the last is the targets,
            if the model needs all others. Batches are moved to the model's device. Targets may be None for kinds that
            do not use them. Where several passes are made, all must read the same examples in the same order; a
            checksum of each batch is compared.
        kind: which vectors: "ef", "ief", "sf", "exact" or "truncated", with a setting after a colon ("ief:0.5" power,
            "sf:4" draws, "truncated:3" rank, "truncated:0.01" tolerance), or an `OutputRule`, the built-in ones of
            `fisherkit.vectors` or one of your own. `EmpiricalFisher` and its like fill it in. Settings may also be
            ``options`` by their names: ``power=``, ``draws=``, ``seed=``, ``rank=``, ``tolerance=``.
        likelihood: the loss module that you train with, as ``nn.CrossEntropyLoss(...)``, or a name, "categorical",
            "gaussian", "bernoulli" or "poisson", or an object of `fisherkit.likelihoods`.
        structure: of `fisherkit.structures`, by name: "full", "block", "diagonal", "kfac", "ekfac", "nkp", or your own.
        params: which parameters: None for all that require grad; names, or patterns of names, as "head.*"; or a
            predicate ``(name, parameter) -> bool``.
        example: "sequence": one example a batch element, its positions' losses summed; "token": one an unmasked
            position.
        normalization: "mean" for 1/N, "sum" for no factor.
        generator: seeds whatever is random about the kind; None for its documented default.
        chunk_size: most rows (examples × vectors) in one backward pass; None to choose by memory. No effect on the
            result.
        memory_budget: bytes that the operator may take; None for half of what is available. Rows of the full
            structure that do not fit are streamed from the data for each product, unless ``storage`` is "rows"; other
            structures that do not fit are refused. ekfac keeps the rows for its second pass that fit, with None only
            as many bytes as its result has, or 2²⁸, and else makes them again.
        storage: of the rows of the full structure. "rows": kept from the start. "stream": never kept, but made anew
            from model and data for every product. "auto": kept from the start where that is as cheap as one product,
            or where there are several processes; else a few products are made without them (kinds of three vectors an
            example or more), and rows once so many products have been asked for that rows pay, or with the first
            question that needs them. Until then the model and data must stay as they are; a change is refused.
            `coverage` says what was chosen. Others than "auto" only for ``structure="full"``.
        progress: show a progress bar.
        shift_labels: labels belong to the outputs one position before them (causal language models). None: as the model
            says of itself, for Hugging Face's ForCausalLM and their ``loss_type``; else no.
        kfac_positions: "expand" or "reduce", how Kronecker factors treat shared positions.
        max_rows: keep so many rows, those of largest norm; None for all. Only for ``structure="full"``. The result is
            below F in the Loewner order and its rows are in the data's order; of rows of equal norm the earlier one
            is kept, so that neither batches nor chunk_size matter, up to rounding. `dropped_share` says what is
            missing. Kept rows are never streamed: twice as many must fit in memory_budget.
        dtype: torch.bfloat16 or torch.float32, in which factors, bases and diagonals are kept and saved; None for that
            of the rows. Sums, products and vectors stay in the rows' dtype, float32 at least, and eigenvalues of
            factors in float64; the layer that is used is widened for as long as it is. Only for "diagonal", "kfac",
            "ekfac" and "nkp".
        group: the processes that each have a part of the data (`torch.distributed`): None for the default group where
            one is initialised, False for this process alone. The Fisher is that of all their examples, in the order of
            the ranks, and the same in every process. Of the full structure (and of block where it keeps rows), every
            process keeps its own rows, and what is asked of the Fisher must be asked in all processes alike.
        shard: every process keeps the blocks of some layers (of a diagonal, the entries), about as many bytes as each
            other one, and decomposes and solves with those alone. What is asked of the Fisher, `save` included, must
            then be asked in all processes alike. Not for ``structure="full"``, whose rows are shared out as they are.

    Attributes:
        likelihood: of the loss.
        examples: N.
        rows: R, number of rows; with max_rows, of those that were kept.
        dropped_trace: for each example (or token) counted, the trace of the output Fisher that a truncated kind left
            out; None for other kinds. ‖F_exact − F‖₂ is at most the mean over examples of dropped_trace · ‖J_n‖₂².
        dropped_share: share of F's trace that went with the rows that max_rows left out, also in ``metadata``; None
            without max_rows.

    Raises:
        FisherkitError: in one of its forms, each saying what was got, what was expected and what to try. A
            `NonFiniteError` names the batch and the module of NaN or infinity, also where outputs are finite.

    Cost: one forward and M backward passes over the data without weight gradients; ekfac reads the data twice. No
    backward pass for the diagonal, kfac or ekfac of the exact kind's last layer alone. More than 64 vectors an example
    are told before the run, with ``progress`` or, if they would take over ten minutes, in a UserWarning.
    """

    @without_autocast()
    def __init__(
        self,
        model: nn.Module,
        data: Data,
        kind: str | OutputRule | None = None,
        *,
        likelihood: str | Likelihood | nn.Module = "categorical",
        structure: str = "full",
        params: Selection = None,
        example: str = "sequence",
        normalization: str = "mean",
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        memory_budget: float | None = None,
        storage: str = "auto",
        progress: bool = False,
        shift_labels: bool | None = None,
        kfac_positions: str = "expand",
        max_rows: int | None = None,
        dtype: torch.dtype | None = None,
        group: Group = None,
        shard: bool = False,
        **options: Any,
    ) -> None:
        asked = _Asked.of(type(self).__name__, dict(locals()))  # by name, as the signature alone has to list them
        asked.builder.rows_made = self._built_later
        built = asked.builder.build(asked.structure)
        self.held, self._tally = built.operator, built.tally
        super().__init__(self.held.space, dtype=self.held.dtype, device=self.held.device)
        self.likelihood, self.structure = asked.builder.problem.likelihood, structure
        self.dropped_share = built.dropped_share
        self._metadata, self._coverage = asked.recorded | {"coverage": ""} | built.share, built.coverage
        self._hashes: Callable[[], tuple[str, str]] | None = asked.hashes

    def _built_later(self, built: Built) -> None:
        """Record the rows that were made; the model and the data are let go."""
        self._tally = built.tally
        self._metadata["coverage"] = built.coverage.to_json()

    @property
    def examples(self) -> int:
        """N, the number of examples that count."""
        return self._tally.some().examples

    @property
    def rows(self) -> int:
        """R, the number of rows."""
        return self._tally.some().rows

    @property
    def dropped_trace(self) -> Float[Tensor, "n"] | None:
        """What a truncated kind left out of each output Fisher."""
        dropped = self._tally.some().dropped
        return torch.cat(dropped) if dropped else None

    @property
    def metadata(self) -> dict[str, str]:
        """What is recorded: kind, structure, conventions, counts, hashes of the weights and versions."""
        if self._metadata.get("rows") == "":
            self._metadata |= {"examples": str(self.examples), "rows": str(self.rows)}
        if self._hashes is not None:
            self._metadata, self._hashes = _hashed(self._metadata, self._hashes), None
        return self._covered

    @metadata.setter
    def metadata(self, value: dict[str, str]) -> None:
        self._metadata, self._hashes = value, None

    @property
    def _recorded(self) -> dict[str, str]:
        return self._covered if self._tally.counted is None else self.metadata

    @property
    def _covered(self) -> dict[str, str]:
        if self._metadata.get("coverage") == "":
            self._metadata["coverage"] = self._coverage.to_json()
        return self._metadata

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: with the rows that were to be made later, and what that records."""
        _ = self.held.stored_rows, self.metadata
        return {**self.__dict__, "_tally": self._tally.some()}


class _Asked(NamedTuple):
    """A Fisher that has been asked for, its arguments checked and nothing computed but the model's probe.

    ``recorded`` is what is known before it is built, but for ``hashes`` of the weights, which are those at the build
    and not at save: by then the model may have moved on. For that, ``copied`` bytes of them are kept.
    """

    builder: Builder
    structure: type[Structure]
    recorded: dict[str, str]
    hashes: Callable[[], tuple[str, str]]
    copied: int

    @classmethod
    def of(cls, call: str, arguments: Mapping[str, Any]) -> _Asked:
        """Check all arguments of `FisherApproximation`, by name, and find out how the model's rows are made."""
        o = SimpleNamespace(**arguments)
        processes = Processes.of(o.group, call)
        alone = processes.size == 1
        chosen, budget, rule = _checked(call, o) if alone else processes.each(call, lambda: _checked(call, o))
        model, params = within_wrappers(o.model, o.params)

        own = dict(model.named_parameters())

        def met() -> tuple[Any, ...]:
            resolved, space = likelihoods.resolve(o.likelihood, model), ParameterSpace.among(own, params)
            return resolved, space, *model_device(model, space.names, own), Source(o.data, model)

        resolved, space, device, dtype, source = met() if alone else processes.each(call, met)
        hashes, copied = weight_hashes(model, space.names, own)
        if alone:
            plan = plan_of(model, space, source, assume=True, own=own)
        else:
            processes = processes.on(device)
            settings = ("structure", "example", "normalization", "kfac_positions", "max_rows", "storage", "shard")
            processes.require_same(call, lambda: {
                "parameters": space.names, "dtype": dtype, "weights": hashes()[0], "likelihood": resolved.recorded,
                "kind": (rule.kind_name, rule.kind_options()), "shift_labels": o.shift_labels, "budget": budget,
                "kept dtype": o.dtype, **{name: getattr(o, name) for name in settings},
            })  # fmt: skip
            plan = joint_plan(model, space, source, processes)
        problem = Problem(
            plan, source, resolved, rule, o.example == "token",
            is_causal(model) if o.shift_labels is None else o.shift_labels, o.chunk_size,
            o.progress and processes.rank == 0, processes=processes, shift_guessed=o.shift_labels is None,
            offset=processes.before(source.count) if rule.random else 0,
        )  # fmt: skip
        builder = Builder(
            problem, normalization=o.normalization, memory_budget=budget, reduce=o.kfac_positions == "reduce",
            max_rows=o.max_rows, storage=o.storage, weights=lambda: hashes()[0], kept_dtype=o.dtype, shard=o.shard,
        )  # fmt: skip
        recorded = {
            "kind": rule.kind_name, "structure": o.structure, "examples": "", "rows": "",
            "likelihood": resolved.recorded, "label_source": rule.label_source, "example": o.example,
            "normalization": o.normalization, "kfac_positions": o.kfac_positions, "model": type(model).__name__,
            "parameters_hash": "", "covered_hash": f"{dtype}:".removeprefix("torch."),
            "fisherkit": __version__, "torch": torch.__version__, **rule.kind_options(),
            **({} if o.max_rows is None else {"max_rows": str(o.max_rows)}),
            **({} if o.dtype is None else {"kept_dtype": str(o.dtype).removeprefix("torch.")}),
        }  # fmt: skip
        return cls(builder, chosen, recorded, hashes, copied)


def _checked(call: str, o: SimpleNamespace) -> tuple[type[Structure], int | None, OutputRule]:
    """The structure, the budget and the kind that are asked for, if all settings fit."""
    if not isinstance(o.model, nn.Module):
        raise InvalidTypeError(call, f"a {type(o.model).__name__} as model", "a torch.nn.Module")
    chosen = structure_named(o.structure, call)
    for name, allowed in _CHOICES.items():
        check_choice(call, name, getattr(o, name), allowed)
    budget = o.memory_budget
    if isinstance(budget, float) and budget.is_integer():
        budget = int(budget)  # as 2e9 is
    for name, value in (("chunk_size", o.chunk_size), ("memory_budget", budget), ("max_rows", o.max_rows)):
        check_count(call, name, value, optional=True)
    _refuse_unfit(call, o, chosen)
    if o.generator is not None:
        check_type(call, "generator", o.generator, torch.Generator, "a torch.Generator or None")
    if o.kind is None:
        raise InvalidTypeError(
            call, "no kind", 'one such as "exact", or an fk.OutputRule',
            why="a Fisher does not say its vectors itself: its kind does",
            try_="class MyKind(fk.OutputRule), and fk.FisherApproximation(model, data, MyKind())",
        )  # fmt: skip
    rule = rule_of(o.kind, call=call, options=o.options)
    if o.generator is not None and rule.random:
        drawn = torch.randint(1 << 62, (1,), generator=o.generator, device=o.generator.device)
        rule = rule.with_seed(int(drawn))
    return chosen, budget, rule


_CHOICES: dict[str, Sequence[object]] = {
    "example": ("sequence", "token"), "normalization": ("mean", "sum"), "kfac_positions": ("expand", "reduce"),
    "shift_labels": (None, True, False), "storage": ("auto", "rows", "stream"), "shard": (True, False),
    "dtype": (None, torch.bfloat16, torch.float32),
}  # fmt: skip


def _hashed(recorded: dict[str, str], hashes: Callable[[], tuple[str, str]]) -> dict[str, str]:
    """With hashes of the weights."""
    whole, covered = hashes()
    return {**recorded, "parameters_hash": whole, "covered_hash": recorded["covered_hash"] + covered}


def plan(
    model: nn.Module, data: Data, kind: str | OutputRule = "ef", *, to_file: bool = False, **options: Any
) -> BuildPlan:  # fmt: skip
    """What estimating a Fisher will take, before the first pass over the data: parts, passes, bytes and time.

    Args:
        model: as in `FisherApproximation`.
        data: as in `FisherApproximation`.
        kind: as in `FisherApproximation`; the number of its vectors decides how many backward passes there are.
        to_file: of `build_file`, which keeps no finished part in memory.
        options: the keywords of `FisherApproximation`, as ``structure=`` and ``memory_budget=``.

    Returns:
        A record whose ``str`` is for people. A structure that is refused for its size is planned all the same:
        ``refused`` then says why.

    Raises:
        FisherkitError: as `FisherApproximation` before its first pass.

    Cost: the model's probe on two examples, and the first batch three times, with all backward passes of one part.
    """
    asked = _asked("plan", model, data, kind, options)
    found = asked.builder.plan(asked.structure, to_file=to_file)
    return replace(found, peak_bytes=found.peak_bytes + asked.copied)


def build_file(
    path: str | Path, model: nn.Module, data: Data, kind: str | OutputRule, *, max_shard_size: int | None = None,
    overwrite: bool = False, **options: Any,
) -> FisherFile:  # fmt: skip
    """Estimate a Fisher into a file, in parts where it does not fit in memory.

    Of kfac, ekfac, nkp and block, as many layers are taken at once as fit in ``memory_budget``, with passes of their
    own over the data, and written as shards before the next ones are begun. `load` and `open_file` find the file when
    all parts are there. A run that was killed goes on after its last finished part if it is called again in the same
    way, with the budget that it had, and gives the same bytes.

    In several processes, which must all call it, the first one writes, and all find the file if they share a disk.

    Args:
        path: as in `FisherOperator.save`, which also says what is replaced there.
        model: as in `FisherApproximation`.
        data: as in `FisherApproximation`.
        kind: as in `FisherApproximation`.
        max_shard_size: bytes of a file at most; None for one file a part.
        overwrite: discard what an interrupted run with other settings has left.
        options: the keywords of `FisherApproximation`.

    Returns:
        The open file.

    Raises:
        InvalidArgumentError: ``shard=True``; the path cannot be written, or parts of another run are there.
        DataError: data that change between passes, or since the interrupted run.
        ProcessError: another file is at the path of some process than at the first one's.
        FisherkitError: as `FisherApproximation`.
    """
    call = "build_file"
    path = io.as_path(path, f"{call}(path)")
    io.check_folder(path, call)
    asked = _asked(call, model, data, kind, options)
    builder, recorded = asked.builder, _hashed(asked.recorded, asked.hashes)
    source, plan, processes = builder.problem.source, builder.problem.plan, builder.processes
    builder.storage = "rows"  # a file has them
    if builder.shards > 1:
        raise InvalidArgumentError(
            call, "shard=True", "shard=False", why="finished parts are kept in the file alone",
            try_="FisherApproximation(..., shard=True), and save",
        )  # fmt: skip
    settings = recorded | {
        "space": str(dict(zip(plan.space.names, plan.space.shapes, strict=True))), "dtype": str(plan.dtype),
        "threads": str(torch.get_num_threads()), "chunk_size": str(options.get("chunk_size")),
        "shift_labels": str(builder.problem.shift_labels),
    } | ({"processes": str(processes.size)} if processes.size > 1 else {})  # fmt: skip
    parts = PartsFile(
        builder, lambda data: io.PartsFile(path, settings, data, largest=max_shard_size, overwrite=overwrite, call=call)
    )
    known = parts.first(lambda file: {key: file.known[key] for key in ("budget", "data") if file.known})
    if known:
        builder.budget = builder.settings["memory_budget"] = known["budget"]
        source.expect(known["data"][processes.rank], io.record_of(path).name)
    with without_autocast():
        built = builder.build_into(asked.structure, parts)

    def finish(file: io.PartsFile) -> None:
        if built is None:
            # N and R are those of each part.
            entries = [entry for one in file.records for entry in Coverage.from_json(one["coverage"]).entries]
            entries.sort(key=lambda entry: plan.space.names.index(entry.parameters[0]))
            joint = {**file.records[0], "coverage": Coverage(tuple(entries)).to_json()}
            file.close(BlockDiagonalOperator.tag, plan.space, recorded | joint)
        else:
            built.operator.metadata = recorded | built.counted()
            built.operator.save(path, max_shard_size=max_shard_size)

    parts.first(finish)
    return open_together(path, processes, call)


def _asked(call: str, model: nn.Module, data: Data, kind: str | OutputRule, options: Mapping[str, Any]) -> _Asked:
    """With the defaults of `FisherApproximation`."""
    bound = inspect.signature(FisherApproximation).bind(model, data, kind, **options)
    bound.apply_defaults()
    with without_autocast():
        return _Asked.of(call, bound.arguments)


def within_wrappers(model: nn.Module, params: Selection) -> tuple[nn.Module, Selection]:
    """The model inside its wrappers, with all of its weights, and the selection by its own names."""
    return with_full_weights(unwrapped(model)), without_prefix(params, wrapped_in(model))


def _refuse_unfit(call: str, o: SimpleNamespace, structure: type[Structure]) -> None:
    """Refuse settings that the structure, or another setting, leaves without a meaning."""

    def refuse(setting: str, expected: str, why: str, advice: str, beside: str = "structure") -> None:
        got = f"{setting}={getattr(o, setting)!r} with {beside}={getattr(o, beside)!r}"
        raise InvalidArgumentError(call, got, expected, why=why, try_=advice)

    if o.storage == "stream" and o.max_rows is not None:
        why = "which rows are the largest is known when all have been made, once"
        refuse("storage", 'storage="auto" or "rows"', why, "max_rows=None", "max_rows")
    if o.storage != "auto" and structure.name != "full":
        why = "no other structure is made of the rows of the whole matrix"
        refuse("storage", 'storage="auto"', why, 'structure="full"')
    if o.max_rows is not None and structure.name != "full":
        why = "no other structure keeps the rows of the whole matrix"
        refuse("max_rows", 'structure="full"', why, "max_rows=None")
    if o.shard and structure.keeps_rows and not structure.in_parts:
        why = "its rows are one block, and stay in the processes that made them anyway"
        refuse("shard", "a structure of blocks", why, "shard=False")
    refuse_unpacked(call, structure, o.dtype)


def refuse_unpacked(call: str, structure: type[Structure], dtype: torch.dtype | None) -> None:
    """Refuse a dtype to keep numbers in, of a structure whose numbers cannot be rounded."""
    if dtype is not None and not structure.packs:
        raise InvalidArgumentError(
            call, f'dtype={dtype} with structure="{structure.name}"', "dtype=None",
            why="rounded, a matrix of rows or of a whole block would not be a Fisher matrix of its own",
            try_='structure="kfac", "ekfac", "nkp" or "diagonal"',
        )  # fmt: skip
