"""Watch one forward pass and note every use of a chosen parameter.

A ``TorchFunctionMode`` sees the functions themselves, so it makes no difference whether a parameter is used by its
module, by another module (tying), by a function call, or inside attention. No hook is registered and nothing on the
model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from fisherkit.errors import ModelError
from fisherkit.rows.batch_axis import Axis, Tracker, tensors
from fisherkit.rows.rules import BATCH_NORM, EMBEDDING, Use, rule_for

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu}

# Attention is one function to a mode, which would hide the linear maps inside. Running its own code with the check for
# overrides switched off lets the mode see them; the two constants are the code and defaults that PyTorch ships.
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_ATTENTION.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


class Recorder(TorchFunctionMode):
    """Notes the uses of parameters while it is active.

    Args:
        names: ``id`` of each chosen parameter to its name.
        batch: number of examples.
        inputs: the tensors of the call that have the batch axis first.
        shared: embeddings whose tokens all examples share, so that they come without a batch axis; they are looked up
            for each example, because only then is there a gradient for each.
        training: a training step's own forward pass, in which dropout may be active.
        constant_statistics: batch norm in train mode uses its batch's statistics as if they were constants, and leaves
            its running ones alone.

    Attributes:
        uses: what was seen.
        elsewhere: names of parameters that functions without a rule have used, with a gradient.
        without_graph: names of parameters that were used where no gradients are.
        unbatched: embeddings that were looked up without a batch axis.
        random: whether dropout was active.
        half: whether layers computed in half precision, as under autocast, which may be inside the model.
        muted: while positive, nothing is noted: passes of others that run in the middle of the one that is watched.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        batch: int,
        inputs: Iterable[Tensor] = (),
        shared: Collection[str] = (),
        *,
        training: bool = False,
        constant_statistics: bool = False,
    ) -> None:
        super().__init__()
        self.names, self.batch, self.shared = names, batch, shared
        self.training, self.constant_statistics = training, constant_statistics
        self.uses: list[Use] = []
        self.elsewhere: set[str] = set()
        self.without_graph: set[str] = set()
        self.unbatched: set[str] = set()
        self.random = self.half = False
        self.muted = 0
        self._tracker = Tracker(batch)
        for tensor in inputs:
            self._tracker.mark(tensor, Axis(0))

    def proves(self, z: Tensor) -> bool:
        """Whether the pass itself shows whose the entries of uses with an axis are."""
        return self._tracker.proves(z)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function and note it if it used a chosen parameter."""
        kwargs = kwargs or {}
        if self.muted:
            return func(*args, **kwargs)
        if _random(func, args, kwargs):
            self.random = True
            if not self.training:
                raise _refused_chance(func)
        _refuse_max_norm(func, args, kwargs)
        _refuse_offsets(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        if func is F.embedding:
            args = self._with_batch(args, kwargs)
        if func is F.batch_norm and self.constant_statistics:
            args, kwargs = _with_constants(args, kwargs)
        output = func(*args, **kwargs)
        self._tracker.see(func, args, kwargs, output)
        own = {name for tensor in tensors((args, kwargs)) if (name := self._name(tensor))}
        if own:
            self._note(func, args, kwargs, output, own)
        return output

    def _note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, own: set[str]
    ) -> None:
        """A function that was given chosen parameters."""
        rule = rule_for(func, args, kwargs)
        if rule is not None and isinstance(output, Tensor) and output.requires_grad:
            arguments = rule.bind(args, kwargs)
            weight, bias = self._name(arguments.get(rule.weight_name)), self._name(arguments.get(rule.bias_name))
            if (weight or bias) and output.numel():
                self.half = self.half or output.dtype in (torch.bfloat16, torch.float16)
                if rule is EMBEDDING and weight in self.shared:
                    self._tracker.mark(output, Axis(0))
                status = self._tracker.status(output)
                axis = status if isinstance(status, Axis) else None
                self.uses.append(Use(rule, weight, bias, arguments, get_gradient_edge(output), output.shape, axis))
                own = own - {weight, bias}
        # What is given back as it is, as by a cast to the dtype that it has, is not used yet.
        if any(made.requires_grad and self._name(made) is None for made in tensors(output)):
            self.elsewhere |= own
        elif not torch.is_grad_enabled():
            self.without_graph |= own

    def _with_batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of an embedding, its tokens repeated for each example where all share them."""
        name = self._name(args[1] if len(args) > 1 else kwargs.get("weight"))
        tokens = args[0] if args else None
        if name is None or not isinstance(tokens, Tensor):
            return args
        lead = tokens if tokens.ndim > 1 and tokens.shape[0] == 1 else tokens.unsqueeze(0)
        if name in self.shared:
            return (lead.expand(self.batch, *lead.shape[1:]), *args[1:])
        if tokens.ndim > 0 and tokens.shape[0] != self.batch:
            self.unbatched.add(name)
        return args

    def _name(self, tensor: Any) -> str | None:
        return self.names.get(id(tensor)) if isinstance(tensor, Tensor) else None


def _random(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers."""
    if func in _DROPOUTS:
        rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        return bool(training) and (func is F.rrelu or rate > 0)
    if func is F.scaled_dot_product_attention:
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0)
    return False


def _refused_chance(func: Callable[..., Any]) -> ModelError:
    return ModelError(
        call="the model's forward pass",
        got=f"an active {func.__name__}",
        expected="a deterministic model",
        why="with dropout every pass has another Fisher",
        try_="model.eval()",
    )


def _refuse_max_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if func is F.embedding and kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None:
        raise ModelError(
            call="the model's forward pass",
            got="an embedding with max_norm",
            expected="max_norm=None",
            why="it changes the table during the forward pass",
            try_="renormalize the table once, before",
        )


def _refuse_offsets(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if func is F.embedding_bag and kwargs.get("offsets", args[2] if len(args) > 2 else None) is not None:
        raise ModelError(
            call="the model's forward pass",
            got="an embedding bag with offsets",
            expected="tokens [B, T], without offsets",
            why="examples lie along axis 0, and here all their tokens lie in one row",
            try_="torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=i) and padding_idx=i",
        )


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
                call="the Fisher of this model",
                got=f"{type(module).__name__} {name!r} in train mode",
                expected="eval mode",
                why=what,
                try_="model.eval()",
            )
