"""What a model says about its inputs and labels: the names it takes, wrappers, shifted labels, prompts without labels.

Reads signatures, configurations and class names, as Hugging Face's own trainer does; runs nothing and changes nothing.
Knows no data.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fisherkit.errors import DataError, listed, warn

DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, from outside in: compiled, data parallel and PEFT's models."""
    seen: set[int] = set()
    current: object = model
    while isinstance(current, nn.Module) and id(current) not in seen:
        seen.add(id(current))
        yield current
        unwrap = _held(current, "get_base_model")
        inner = _held(current, "_orig_mod", _held(current, "module"))
        current = unwrap() if inner is None and callable(unwrap) else inner


def _held(module: nn.Module, name: str, default: Any = None) -> Any:
    """A module's attribute, or the default; a module that lacks one takes its time to say so."""
    # PEFT's models look for what they lack in the model inside.
    own = type(module).__getattr__ is not nn.Module.__getattr__
    has = own or name in module.__dict__ or name in module._modules or hasattr(type(module), name)
    return getattr(module, name, default) if has else default


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a Hugging Face model makes its decoder's inputs from the labels, unless they are given."""
    for inner in wrapped(model):
        config = _held(inner, "config")
        if getattr(config, "is_encoder_decoder", False) is True:
            return True
        takes = _parameters(inner)
        if config is not None and {"labels", DECODER_INPUTS[0]} <= takes.keys():
            # Some, such as BLIP-2, can have a language model of either kind.
            return not getattr(config, "use_decoder_only_language_model", False)
    return False


UNSHIFTED = {"XLNetLMHeadModel"}
"""Language models whose own loss pairs every position with its own label, whatever their name says."""


def is_causal(model: nn.Module) -> bool:
    """Whether a Hugging Face model computes its loss on labels shifted by one, by what it says of itself."""
    endings: tuple[str, ...] = ("ForCausalLM", "LMHeadModel")
    if not is_encoder_decoder(model):
        endings = (*endings, "ForConditionalGeneration")  # of images or sound and text, by a decoder alone
    return any(
        _held(inner, "loss_type") == "ForCausalLM"
        # Users subclass the library's models.
        or any(cls.__name__.endswith(endings) and cls.__name__ not in UNSHIFTED for cls in type(inner).__mro__)
        for inner in wrapped(model)
    )


def virtual_tokens(model: nn.Module) -> int:
    """How many positions PEFT's prompt learning puts in front of every example; 0 for other models."""
    for inner in wrapped(model):
        config = _held(inner, "active_peft_config")
        if getattr(config, "is_prompt_learning", False):
            return int(getattr(config, "num_virtual_tokens", 0))
    return 0


@dataclass
class ModelInputs:
    """How a model is called: the keywords that it takes, None for any, and those without a default, if known.

    Of an ``encoder_decoder`` labels go to the model as well, which makes its decoder's inputs from them.
    """

    names: frozenset[str] | None = None
    required: tuple[str, ...] | None = None
    encoder_decoder: bool = False
    _said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> ModelInputs:
        """Read off the model's signature, of what it wraps where it only hands on."""
        kinds = inspect.Parameter
        names: set[str] = set()
        required: tuple[str, ...] | None = None
        anything = True
        for inner in wrapped(model):
            found = _parameters(inner)
            own = [p for p in found.values() if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
            names.update(p.name for p in own if p.kind is not kinds.POSITIONAL_ONLY)
            if found and required is None and not any(p.kind is kinds.VAR_POSITIONAL for p in found.values()):
                required = tuple(p.name for p in own if p.default is kinds.empty)
            if found and not any(p.kind is kinds.VAR_KEYWORD for p in found.values()):
                anything = False
                break
        return cls(None if anything else frozenset(names), required, is_encoder_decoder(model))

    def taken(self, inputs: Mapping[str, Any], call: str) -> dict[str, Any]:
        """The inputs that the model takes, without the others, of which a warning tells; refused if it needs more."""
        known = {name: value for name, value in inputs.items() if self.names is None or name in self.names}
        others = sorted(str(name) for name in inputs if name not in known)
        if not others:
            return known
        missing = [name for name in self.required or () if name not in known]
        if missing or not known:
            takes = sorted(self.names or ())
            raise DataError(
                call, f"inputs named {listed(others)}, which the model's forward pass does not take",
                f"names of its parameters: {listed(missing or takes)}",
                try_="rename the fields, ((tensor, ...), labels) for inputs by place, or ((mapping,), labels) for a "
                "model that takes the mapping itself",
            )  # fmt: skip
        if not self._said.issuperset(others):
            self._said.update(others)
            warn(
                f"{call}: {listed(others)} left out, which the model's forward pass does not take; it takes "
                f"{listed(sorted(self.names or ()))}."
            )
        return known


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The forward pass's parameters; none if it has no signature, as scripted models."""
    function = getattr(model.forward, "__func__", None)  # of a class, which is looked at once
    if function in _PARAMETERS:
        return _PARAMETERS[function]
    try:
        found = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
    if inspect.isfunction(function):
        _PARAMETERS[function] = found
    return found


_PARAMETERS: WeakKeyDictionary[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()
