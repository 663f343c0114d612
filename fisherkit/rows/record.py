"""Watch one forward pass and note every use of a chosen parameter.

A ``TorchFunctionMode`` sees the functions themselves, so it makes no difference whether a parameter is used by its
module, by another module (tying), by a function call, or inside attention. No hook is registered and nothing on the
model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fisherkit.data import map_tensors
from fisherkit.errors import ModelError
from fisherkit.randomness import untouched_rng
from fisherkit.rows.batch_axis import DRAWS, Axis, Mark, Tracker, is_elementwise, is_expansion, tensors
from fisherkit.rows.derived import SAME, TURNED, Derivations, Derived, is_gather
from fisherkit.rows.differentiable import version_of
from fisherkit.rows.ownership import coarser
from fisherkit.rows.recurrent import RECURRENT, can_be_unrolled, drops_out, is_packed, unrolled
from fisherkit.rows.rules import (
    ADDED,
    BATCH_NORM,
    COPIED,
    ContractionRule,
    ConvolutionRule,
    ElementwiseRule,
    EmbeddingRule,
    LinearRule,
    Rule,
    Use,
    broadcast_over,
    contraction,
    rule_for,
)  # fmt: skip
from fisherkit.rows.trace import Traces

Operands = Sequence[tuple[Tensor, Derived]]
"""Tensors made of chosen parameters among a function's arguments."""

_IS_NESTED = attrgetter("is_nested")
_TRANSFORM = torch._C._functorch.peek_interpreter_stack
"""The innermost of torch.func's transforms, as vmap, that runs now."""
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu}

# Attention is one function to a mode, which would hide the linear maps inside. Running its own code with the check for
# overrides switched off lets the mode see them; the two constants are the code and defaults that PyTorch ships.
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_ATTENTION.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


_LOOKED_AT = {
    *DROPOUTS, *RECURRENT, F.scaled_dot_product_attention, F.embedding, F.embedding_bag,
    F.multi_head_attention_forward, F.batch_norm, _SET_DATA,
}  # fmt: skip
"""Functions that are refused, noted or replaced by what they are given."""


class Recorder(TorchFunctionMode):
    """Notes the uses of parameters while it is active.

    Args:
        names: ``id`` of each chosen parameter to its name.
        batch: number of examples.
        inputs: the tensors of the call that have the batch axis first.
        shared: parameters of layers whose inputs all examples share, as of positions: their outputs are functions of
            the parameters alone.
        positions: how many positions inputs have along axis 1, if it is to be seen whether these stay apart; else 0.
        training: a training step's own forward pass, in which dropout may be active.
        constant_statistics: batch norm in train mode uses its batch's statistics as if they were constants, and leaves
            its running ones alone.
        traces: of passes before, of which this one may be; None where there is nothing to know of any.

    Attributes:
        uses: what was seen.
        outside_rules: names of parameters that functions without a rule have used, with a gradient.
        without_graph: names of parameters that were used where no gradients are.
        random: whether dropout was active.
        coarsest: the floating dtype that rounds most, of all that is differentiated; autocast may be inside the model.
        casts: whether a module was cast in place, which ``torch.func`` does not survive.
        packed: whether tensors were kept for a backward pass by someone's code, as by checkpoints, which it then runs.
        muted: while positive, nothing is noted: passes of others that run in the middle of the one that is watched.
        uncompiled: whether the pass is the user's and ends one of `Uncompiled`.
        tracker: what followed the batch axis.
    """

    def __init__(
        self, names: Mapping[int, str], batch: int, inputs: Iterable[Tensor] = (), shared: Collection[str] = (),
        *, positions: int = 0, training: bool = False, constant_statistics: bool = False, traces: Traces | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        inputs = list(inputs)
        self.names, self.batch, self.shared = names, batch, shared
        self.training, self.constant_statistics = training, constant_statistics
        self.uses: list[Use] = []
        self.outside_rules: set[str] = set()
        self.without_graph: set[str] = set()
        self.random = self.casts = self.packed = self.uncompiled = False
        self.coarsest = torch.float64
        self.muted = 0
        self._hooks = RemovableHandle.next_id
        self.tracker = Tracker(batch)
        self._derivations = Derivations(names)
        self._along = Tracker(positions) if positions > 1 else None
        for tensor in inputs:
            self.tracker.mark(tensor, Axis(0))
            if self._along is not None and tensor.ndim > 1 and tensor.shape[1] == positions:
                self._along.mark(tensor, Axis(1))
        followed = traces is None or self._along is not None or constant_statistics
        self._reader = None if followed or traces is None else traces.begun(names, batch, inputs, training)

    @property
    def plain(self) -> bool:
        """Whether all that was noted came of the functions that were called, and of no numbers in tensors."""
        beside = self.outside_rules or self.without_graph or self.casts or self.packed or self.hooked
        return not beside and self._derivations.bare and self.tracker.plain

    def ended(self, z: Tensor) -> dict[Any, Any] | None:
        """The pass is over: what was decided of others that did the same, for this one too; None where it is new."""
        found = None if self._reader is None else self._reader.ended(self, z)
        return None if self.hooked or self.packed else found

    @property
    def hooked(self) -> bool:
        """Whether a hook was registered since, on a tensor or a node of the graph: it may change gradients."""
        return RemovableHandle.next_id != self._hooks

    def proves(self, z: Tensor) -> bool:
        """Whether the pass itself shows whose the entries of uses with an axis are."""
        made = self._derivations.of(z)
        if made is not None:  # outputs that are functions of parameters alone met no example
            self.outside_rules.update(made.names)
        return self.tracker.proves(z)

    def positions(self, z: Tensor) -> int:
        """How many positions of the inputs outputs ``[B, T, C]`` keep apart; 0 if not shown, or not looked at."""
        along = self._along
        return along.batch if along is not None and z.ndim == 3 and not along.lost and along.status(z) == Axis(1) else 0

    def _see(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any,
        given: Sequence[Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.tracker.see(func, args, kwargs, output, given)
        if self._along is not None:
            self._along.see(func, args, kwargs, output, given)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function and note it if it used a chosen parameter."""
        kwargs = kwargs or {}
        if self.muted:
            return func(*args, **kwargs)
        self.packed = self.packed or _packs()
        reader = self._reader
        if reader is None or func is F.multi_head_attention_forward:  # whose own calls are seen one by one
            return self._seen(func, args, kwargs)
        told, uses = reader.told(func, args, kwargs), len(self.uses)
        step = reader.step(told)
        if step is None:
            if reader.trace is not None:
                self._follow()
            output = self._seen(func, args, kwargs)
            if reader.trace is None and not reader.note(told, args, kwargs, output, self, uses):
                self._reader = None
            return output
        output = func(*args, **kwargs)
        if not reader.takes(step, args, kwargs, output, self):  # which no function does that is given the same
            self._follow()
            self.tracker.lost = True
            self._leave(self._derivations.among(tensors(args, kwargs)))
        return output

    def _follow(self) -> None:
        """Follow the rest of the pass, which is another than the one that is known."""
        if self._reader is not None:
            self._reader.give_up(self)
        self._reader = None

    def _seen(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the function, and note what it does."""
        if func in _LOOKED_AT:
            random = _random(func, args, kwargs)
            _refuse(func, args, kwargs, random=random, training=self.training)
            self.random = self.random or random
            if func is F.multi_head_attention_forward:
                with self:
                    return _ATTENTION(*args, **kwargs)
            if func is F.batch_norm and self.constant_statistics:
                args, kwargs = _with_constants(args, kwargs)
            self.casts = self.casts or func == _SET_DATA
        given = tensors(args, kwargs)
        if True in map(_IS_NESTED, given) or _TRANSFORM() is not None:  # whose axes no rule knows
            self.tracker.met = True
            self._leave(self._derivations.among(given))
            return func(*args, **kwargs)
        own, graph = self._derivations.among(given), torch.is_grad_enabled()
        if own and not graph:
            self.without_graph.update(name for _, made in own for name in made.names)
        if own and graph:
            output = self._with_parameters(func, args, kwargs, own)
        else:
            output = func(*args, **kwargs)
            self._see(func, args, kwargs, output, given)
        if isinstance(output, Tensor) and output.requires_grad and output.dtype != self.coarsest:
            self.coarsest = coarser(self.coarsest, output.dtype)
        return output

    def _with_parameters(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Operands
    ) -> Any:
        """A function that was given chosen parameters, or what is made of them alone."""
        if can_be_unrolled(func, args) and self._derivations.of(args[0]) is None and not _packs():
            return self._unrolled(func, args)
        rule, arguments = self._rule(func, args, kwargs)
        seen, versions = len(self.uses), [tensor._version for tensor, _ in own]
        gathered = own[0][0] is args[0] and is_gather(func, args) if args else False
        data = [] if gathered else [t for t in tensors(args, kwargs) if self._of_examples(t, func, own)]
        alone = not data if rule is None else self._shared(rule, arguments)
        if _in_place(func, kwargs) and isinstance(rule, ElementwiseRule) and rule.product:
            arguments["input"] = arguments["input"].detach().clone()
        if rule is None and data:
            args, kwargs = self._copied(func, args, kwargs, own, data)
        output = func(*args, **kwargs)
        self._see(func, args, kwargs, output)
        written = _in_place(func, kwargs) or _random(func, args, kwargs)
        changed = [tensor for (tensor, _), version in zip(own, versions, strict=True) if tensor._version != version]
        if changed:
            # Once more what it was, if it is all that the function wrote to and returned.
            written = not alone or output is not changed[0] or output is not args[0] or _random(func, args, kwargs)
        if not written and not any(made.requires_grad for made in tensors(output)):
            del self.uses[seen:]  # copies that are only compared
        elif alone and not written:
            self._derive(func, args, kwargs, output, own, written=bool(changed))
        elif isinstance(output, Tensor) and not output.numel():
            pass  # no position was given to it, as to an expert that nothing is routed to
        elif rule is not None and isinstance(output, Tensor):
            if isinstance(rule, ElementwiseRule) and self.tracker.status(output) is Mark.FREE:
                self.tracker.mark(output, Axis(0, 1, max(1, output.shape[0] // self.batch)))
            self._note(rule, arguments, output)
            parts = [arguments.get(name) for name in (rule.weight_name, rule.bias_name)]
            self._leave([pair for pair in own if not any(pair[0] is part for part in parts)])
        elif written or any(self._derivations.of(made) is None for made in tensors(output)):
            # What is given back as it is, as by a cast to the dtype that it has, is not used yet.
            self._leave(self._derivations.among(tensors(args, kwargs)))
        return output

    def _unrolled(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A recurrent layer, as its linear maps."""
        output, maps = unrolled(func, args)
        self._see(func, args, {}, output)
        self._leave(self._derivations.among(tensors(args[1:3] if is_packed(args) else args[1])))  # learned states
        status = self.tracker.status(output[0])
        axis = status if isinstance(status, Axis) else None
        for arguments, made in maps:
            if any(self._derivations.of(arguments[name]) is not None for name in ("weight", "bias")):
                self._note(RECURRENT[func], arguments, made, axis=axis)
        return output

    def _leave(self, operands: Operands) -> None:
        """Parameters are used in a way that there is no rule for."""
        self.outside_rules.update(name for _, made in operands for name in made.names)

    def _rule(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Rule | None, dict[str, Any]]:
        """The rule by which a function uses parameters, with its arguments by name; None if there is none."""
        rule = rule_for(func, args, kwargs)
        arguments = {} if rule is None else rule.bind(args, kwargs)
        if rule is None or not arguments:
            return contraction(func, args, kwargs, self._derivations.of) or (None, {})
        made = self._derivations.of
        if made(arguments.get(rule.weight_name)) is None and made(arguments.get(rule.bias_name)) is None:
            rule, arguments = rule.exchanged(arguments) or (None, {})
        if rule is None or self._fits(rule, arguments, func):
            return (None, {}) if rule is None else (rule, arguments)
        found = self._slices(rule, arguments, rule.weight_name)
        data = self._of_examples(arguments[rule.input_name], func, [(arguments[rule.weight_name], None)])
        return (rule, arguments) if data and found and found[0] is not None else (None, {})

    def _slices(self, rule: Rule, arguments: Mapping[str, Any], name: str) -> tuple[Tensor | None, bool] | None:
        """Which slices of a parameter entries use, None for the whole, and whether turned; None if not to be told."""
        tensor = arguments.get(name)
        made = self._derivations.of(tensor)
        if made is None or tensor is None or isinstance(rule, ConvolutionRule):
            return None
        if isinstance(rule, ContractionRule) and name == rule.weight_name:
            return arguments["slices"], arguments["turned"]
        if isinstance(rule, LinearRule):
            return made.sliced(tensor, 2 if name == rule.weight_name else 1)
        x = arguments.get(rule.input_name)
        if not isinstance(rule, ElementwiseRule) or not isinstance(x, Tensor) or 0 in (x.ndim, tensor.ndim):
            return None
        # A bias for each expert meets all of its positions; tables of positions have a rule without this.
        each = made.slices is not None or (tensor.ndim == x.ndim > 2 and tensor.shape[0] > 1 == tensor.shape[-2])
        fits = rule is COPIED or torch.broadcast_shapes(x.shape, (*tensor.shape[:-1], x.shape[-1])) == x.shape
        return (
            made.sliced(tensor, 1) if each and fits and (rule is COPIED or tensor.shape[-1:] == x.shape[-1:]) else None
        )

    def _fits(self, rule: Rule, arguments: Mapping[str, Any], func: Callable[..., Any]) -> bool:
        """Whether a parameter is broadcast over examples by a function that would broadcast it over anything."""
        x, w = arguments.get(rule.input_name), arguments.get(rule.weight_name)
        if not isinstance(rule, ElementwiseRule) or not isinstance(x, Tensor) or not isinstance(w, Tensor):
            return True
        shape, status = torch.broadcast_shapes(x.shape, w.shape), self.tracker.status(x)
        at = status.dim + len(shape) - x.ndim if isinstance(status, Axis) and self.batch > 1 else 0
        over = w.ndim < len(shape) or w.shape[0] == 1 if w.ndim else bool(shape)
        return over and at < max(1, broadcast_over(w.shape, shape)) and self._of_examples(x, func, [(w, None)])

    def _shared(self, rule: Rule, arguments: Mapping[str, Any]) -> bool:
        """Whether all examples share the input of a layer, so that its output is made of parameters alone."""
        x = arguments.get(rule.input_name)
        if not isinstance(x, Tensor) or isinstance(rule, ElementwiseRule):
            return False
        if self._derivations.of(x) is not None:
            return x.ndim < 2 or x.shape[0] != self.batch
        if x.requires_grad or self.tracker.status(x) is not Mark.FREE:
            return False
        own = [self._derivations.of(arguments.get(name)) for name in (rule.weight_name, rule.bias_name)]
        return any(made is not None and not set(self.shared).isdisjoint(made.names) for made in own)

    def _of_examples(self, tensor: Tensor, func: Callable[..., Any], own: Sequence[tuple[Tensor, Any]]) -> bool:
        """Whether an operand has entries that belong to examples."""
        if self._derivations.of(tensor) is not None:
            return False
        if self.tracker.status(tensor) is not Mark.FREE or tensor.grad_fn is not None:
            return True
        # A mask, say, of a function that is not known to keep the batch's axis: what meets it has its axes too.
        size = tensor.shape[0] if tensor.ndim > 1 and is_elementwise(func) else 1
        first = size > 1 and size % self.batch == 0
        return first and all(other.ndim < tensor.ndim or other.shape[0] == 1 for other, _ in own)

    def _note(
        self, rule: Rule, arguments: Mapping[str, Any], output: Tensor, weight: Derived | None = None,
        shape: tuple[int, ...] | None = None, axis: Axis | None = None,
    ) -> None:  # fmt: skip
        """A use under a rule, of a weight that is found among the arguments, and an output that may be seen folded."""
        made = self._derivations.of
        weight, bias = weight or made(arguments.get(rule.weight_name)), made(arguments.get(rule.bias_name))
        if weight is not None and weight.lookup is not None and rule in (COPIED, ADDED) and shape is None:
            # Rows of a table, the same for all examples: as if they were looked up for each.
            rule, call = weight.lookup
            arguments = {**call, rule.input_name: call[rule.input_name].expand(output.shape[:-1])}
            weight = made(arguments[rule.weight_name])
        status, along = self.tracker.status(output), self._along and self._along.status(output)
        slices, turned = self._slices(rule, arguments, rule.weight_name) or (None, False)
        by_bias, _ = (self._slices(rule, arguments, rule.bias_name) if bias is not None else None) or (None, False)
        turned = turned or (weight is not None and weight.layout == TURNED and isinstance(rule, LinearRule))
        if isinstance(rule, ElementwiseRule) and slices is not None:
            arguments = {**arguments, "weight": arguments["weight"].detach().flatten()[: arguments["weight"].shape[-1]]}
        use = Use(
            rule, _named(weight, turned=turned), _named(bias), arguments, get_gradient_edge(output),
            shape or output.shape, axis or (status if isinstance(status, Axis) else None), turned, slices,
            version_of(arguments[rule.input_name]), along if isinstance(along, Axis) else None,
        )  # fmt: skip
        if (slices is not None or by_bias is not None) and None not in use.sources:
            self.uses += [replace(use, bias=None), replace(use, weight=None, turned=False, slices=by_bias)]
        elif by_bias is not None:
            self.uses.append(replace(use, slices=by_bias))
        elif None not in use.sources and len({isinstance(one, Derived) for one in use.sources}) == 2:
            # A parameter beside one that is made of others keeps the rows that it has by itself.
            self.uses += [replace(use, bias=None), replace(use, weight=None)]
        else:
            self.uses.append(use)

    def _derive(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, own: Operands,
        *, written: bool,
    ) -> None:  # fmt: skip
        """Note outputs that are made of parameters alone; what is repeated along the batch is a copy for each one."""
        tensor, made = own[0]
        if len(own) == 1 and func.__name__ in ("repeat", "tile") and 1 < output.ndim == tensor.ndim:
            # All of it one time after the other, as heads before they are folded into the batch.
            each = tensor.shape[0]
            if output.shape == (each * self.batch, *tensor.shape[1:]):
                self.tracker.mark(output, Axis(0, 1, each))
                arguments = {"input": tensor.new_empty(0), "weight": tensor.unsqueeze(0)}
                self._note(COPIED, arguments, output, made, (self.batch, *tensor.shape), Axis(0))
                return
        if len(own) == 1 and is_expansion(func) and output.ndim > 1 and output.shape[0] == self.batch:
            size = (*[1] * (output.ndim - tensor.ndim), *tensor.shape)
            if (size[0] == 1 and func.__name__ not in ("repeat", "tile")) or (1, *output.shape[1:]) == size:
                self._copy(tensor, output, Axis(0))
                return
        self._derivations.add(func, args, kwargs, output, written=written)
        for one in tensors(output):
            for tracker in filter(None, (self.tracker, self._along)):
                tracker.mark(one, Mark.FREE)
        rule = rule_for(func, args, kwargs)
        looked_up = self._derivations.of(output)
        if isinstance(rule, EmbeddingRule) and looked_up is not None and made.layout == SAME:
            looked_up.lookup = rule, rule.bind(args, kwargs)

    def _copy(self, tensor: Tensor, copy: Tensor, axis: Axis) -> None:
        """What is made of parameters was repeated for each example."""
        self.tracker.mark(copy, axis)
        self._note(COPIED, {"input": tensor.new_empty(0), "weight": tensor}, copy)

    def _copied(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Operands,
        data: Sequence[Tensor],
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:  # fmt: skip
        """The arguments, with a copy for each example of what the function broadcasts over examples."""
        known = func is F.scaled_dot_product_attention or is_elementwise(func)
        target = args[0] if args and _in_place(func, kwargs) else None
        # A checkpoint computes again without us, and then saves tensors of other shapes.
        if not known or _packs() or any(tensor is target for tensor, _ in own):
            return args, kwargs
        most = max(tensor.ndim for tensor in tensors(args, kwargs))
        tracked = {
            status._replace(dim=most - tensor.ndim + status.dim)
            for tensor in data
            if isinstance(status := self.tracker.status(tensor), Axis) and self.batch > 1
        }
        axis = tracked.pop() if len(tracked) == 1 else Axis(0)
        at = axis.dim
        size = max((t.shape[at - most] for t in data if t.ndim >= most - at), default=1)
        copies: dict[int, Tensor] = {}
        for tensor, _ in own:
            shape = (*[1] * (most - tensor.ndim), *tensor.shape)
            promoted = tensor.ndim == 0 and any(tensor.dtype != one.dtype for one in data)
            if not promoted and all(n == 1 for n in shape[: at + 1]):
                copy = tensor.reshape(shape).expand(*shape[:at], size, *shape[at + 1 :])
                self._copy(tensor, copy, axis)
                copies[id(tensor)] = copy
        found: tuple[Any, Any] = map_tensors((args, kwargs), lambda tensor: copies.get(id(tensor), tensor))
        return found


def _named(made: Derived | None, *, turned: bool = False) -> str | Derived | None:
    """The parameter's name, where rows over what is made of it are rows over the parameter."""
    return made.names[0] if made is not None and (turned or made.layout == SAME) else made


def _in_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    marked = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return marked or name.startswith("__i") or func is Tensor.__setitem__ or kwargs.get("out") is not None


def _packs() -> bool:
    """Whether someone's code keeps the tensors that functions save for a backward pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    return kwargs.get(name, args[place] if len(args) > place else default)


def _random(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers."""
    if func in DROPOUTS:
        active = bool(_argument(args, kwargs, 2, "training", True))
        return active and (func is F.rrelu or _argument(args, kwargs, 1, "p", 0.5) > 0)
    if func is F.scaled_dot_product_attention:
        return bool(_argument(args, kwargs, 4, "dropout_p", 0.0) > 0)
    return drops_out(func, args)


def _refuse(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, random: bool, training: bool
) -> None:
    """Refuse chance outside of training, and embeddings that change their table or have all tokens in one row."""
    call = "the model's forward pass"
    if random and not training:
        raise ModelError(
            call, f"an active {func.__name__}", "a deterministic model",
            why="with dropout every pass has another Fisher", try_="model.eval()",
        )  # fmt: skip
    if func is F.embedding and _argument(args, kwargs, 3, "max_norm") is not None:
        raise ModelError(
            call, "an embedding with max_norm", "max_norm=None", why="it changes the table during the forward pass",
            try_="renormalize the table once, before",
        )  # fmt: skip
    if func is F.embedding_bag and _argument(args, kwargs, 2, "offsets") is not None:
        raise ModelError(
            call, "an embedding bag with offsets", "tokens [B, T], without offsets",
            why="examples lie along axis 0, and here all their tokens lie in one row",
            try_="torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=i) and padding_idx=i",
        )  # fmt: skip


class WithoutChance(TorchFunctionMode):
    """Train mode without chance or statistics of batch norms: what is left of it in which examples may meet.

    Dropout does nothing, what is drawn is everywhere the same number, an order is the reverse one, and batch norm takes
    its running statistics.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, where it can be, without its chance."""
        kwargs = kwargs or {}
        recurrent = drops_out(func, args)
        place, name, value = _IN_TRAINING.get(func, (6 + is_packed(args) if recurrent else 0, "", False))
        if func is F.batch_norm and args[1] is None:
            return func(*args, **kwargs)  # which has no statistics but the batch's
        if recurrent or (name and len(args) > place):
            args = (*args[:place], value, *args[place + 1 :])
        elif name:
            kwargs = {**kwargs, name: value}
        if func not in DRAWS:
            return func(*args, **kwargs)
        with untouched_rng([self._device]), torch.no_grad():
            output = func(*args, **kwargs)
            if func is torch.randperm:
                return output.sort(descending=True).values
            # Enough for "drawn > p" and for "drawn < 1 - p" of usual rates.
            return output.fill_(0.51 if output.is_floating_point() else output.dtype == torch.bool)


_IN_TRAINING: dict[Callable[..., Any], tuple[int, str, Any]] = {
    **dict.fromkeys(DROPOUTS, (2, "training", False)),  # type: ignore[arg-type]
    F.rrelu: (3, "training", False),
    F.batch_norm: (5, "training", False),
    F.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    F.multi_head_attention_forward: (13, "training", False),
}
"""Functions that do something else in training, and where and how they are told not to."""


def _with_constants(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """A batch norm's arguments with the batch's statistics in place of running ones, if it is in train mode."""
    named = BATCH_NORM.bind(args, kwargs)
    if not named.get("training", False):
        return args, kwargs
    x = named["input"].detach()
    axes = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x, axes, correction=0)
    return (), {**named, "running_mean": mean, "running_var": variance, "training": False}


def refuse_train_mode(model: torch.nn.Module) -> None:
    """Refuse modules whose train mode makes the Fisher random or couples the batch.

    Raises:
        ModelError: naming the modules.
    """
    nn = torch.nn
    for name, module in model.named_modules():
        if not module.training:
            continue
        rate = 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            rate = float(module.dropout)
        coupled = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if rate > 0 or coupled:
            what = (
                "batch statistics couple the examples of a batch" if coupled else "dropout makes every pass different"
            )
            raise ModelError(
                "the Fisher of this model", f"{type(module).__name__} {name!r} in train mode", "eval mode", why=what,
                try_="model.eval()",
            )  # fmt: skip
