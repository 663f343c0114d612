"""Low-rank adapters (LoRA, as PEFT makes them) seen as what they do to the weights that they act on: W + s·BA.

A is arbitrary up to an invertible matrix that B undoes, so two adapters that are one function may lie far apart; the
function is W + s·BA. Its rows are those of the frozen W, which ``params=`` selects like any parameter's, and whatever
asks for the value of such a parameter gets W + s·BA. Owns which layers that holds for. Knows no Fisher matrix, and
imports no PEFT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisherkit.arguments import check_type
from fisherkit.arithmetic import all_finite, at_least_single
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError, UnknownParameterError, listed
from fisherkit.wrappers import unwrapped

__all__ = ["merged_weights", "write_merged_weights"]

CLASSES = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")
"""Of peft.tuners.lora.layer: the layers that add s·BA to a weight and do nothing else."""


class Product(NamedTuple):
    """What a parameter of a base layer stands for: itself and Σ scale · B A over active adapters, or Σ scale · b.

    ``turned`` says that the parameter is (B A)ᵀ.
    """

    base: nn.Parameter
    terms: tuple[tuple[float, tuple[nn.Parameter, ...]], ...]
    turned: bool = False

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the adapters in it."""
        return (p for _, own in self.terms for p in own)

    @property
    def dtype(self) -> torch.dtype:
        """Of the value: in half precision most of a small change would be lost."""
        dtype = self.base.dtype
        for p in self.parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        return at_least_single(dtype)

    def value(self) -> Tensor:
        """The sum, which autograd follows to A and B."""
        return self.added_to(self.base.to(self.dtype))

    def added_to(self, total: Tensor) -> Tensor:
        """A tensor of the base's shape and the adapters' changes."""
        for scale, own in self.terms:
            factors = [p.to(self.dtype) for p in own]
            made = factors[0] if len(own) == 1 else factors[1].flatten(1) @ factors[0].flatten(1)
            total = total + scale * (made.mT if self.turned else made).reshape(self.base.shape)
        return total


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """All that a model with LoRA adapters trains, by the weights that it acts on: W + s·BA in the place of A and B.

        names = fk.adapters.merged_weights(model)
        fisher = fk.ExactFisher(model, data, params=names, structure="kfac")  # the Fisher of the products

    The names are those of the frozen base weights (``….base_layer.weight``, of adapters with biases also ``.bias``) and
    of all other parameters that require grad. Rows over a base weight are gradients with respect to W + s·BA, made
    from the layer's inputs and output gradients without a dense gradient, as of any layer. `continual.EWC` of such a
    Fisher holds W + s·BA, and `merging.merge` takes these dicts as models.

    Args:
        model: with adapters of PEFT, of which the active ones count; not changed.

    Returns:
        Name to value: float32 at least, the base's device; autograd follows it to A and B.

    Raises:
        InvalidTypeError: not a module.
        InvalidArgumentError: no active adapters; or those of a layer do not add a product to one weight: DoRA and
            other variants, other adapters than LoRA, convolutions with groups or dilation, quantised or tied weights.

    Cost: O·I·r a layer of rank r, and the dense values' memory.
    """
    check_type("merged_weights", "model", model, nn.Module, "a torch.nn.Module")
    model = unwrapped(model)
    layers = dict(_adapted(model))
    made, reasons = _products(model, layers)
    if reasons:
        raise InvalidArgumentError(
            "merged_weights", listed([f"{name}: {why}" for name, why in reasons.items()], 4),
            "LoRA layers that compute with W + s·BA",
            why="only where the adapters are a change of W are its rows those of the change",
            try_="params=None, the Fisher of the adapters' own parameters",
        )  # fmt: skip
    if not made:
        raise InvalidArgumentError(
            "merged_weights", "a model without active LoRA adapters", "at least one",
            why="there is no product BA to be measured",
            try_="peft.get_peft_model(model, peft.LoraConfig(...)); of merged adapters model.unmerge_adapter()",
        )  # fmt: skip
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    inside -= {id(p) for layer in layers.values() for p in layer.base_layer.parameters()}
    return {
        name: made[name].value() if name in made else p
        for name, p in model.named_parameters()
        if name in made or (p.requires_grad and id(p) not in inside)
    }


def products(model: nn.Module, names: Collection[str]) -> dict[str, Product]:
    """Those of some parameters that stand for products: base weights whose adapters' parameters are not among them."""
    made, _ = _products(model, dict(_adapted(model)))
    chosen = {id(p) for name, p in model.named_parameters() if name in names} if made else set()
    return {
        name: product
        for name, product in made.items()
        if name in names and not any(id(p) in chosen for p in product.parameters)
    }


def values(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The values of some parameters, products where they stand for these.

    Beside products, a module that is trained and saved whole (``modules_to_save``) counts as what the model computes
    too: the copy that is in use now stands for that of any adapter.
    """
    parameters = dict(model.named_parameters())
    made = products(model, names)
    used = _in_use(model) if made else {}
    return {name: made[name].value() if name in made else parameters[used.get(name, name)] for name in names}


def _in_use(model: nn.Module) -> dict[str, str]:
    """For parameters of the copies of modules that adapters have for themselves, those that the model computes with."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        copies, original = (getattr(module, own, None) for own in ("modules_to_save", "original_module"))
        if isinstance(copies, nn.ModuleDict) and isinstance(original, nn.Module):
            active = next((one for one in module.active_adapters if one in copies), None)
            used = f"{name}.original_module" if active is None else f"{name}.modules_to_save.{active}"
            for adapter, own in copies.items():
                found |= {f"{name}.modules_to_save.{adapter}.{p}": f"{used}.{p}" for p, _ in own.named_parameters()}
    return found


@torch.no_grad()
def write_merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Put weights, merged ones for instance, into a model's adapters: of each change of W its best approximation.

    A and B of the active adapter become the leading r singular triples of (weight − W) / s, r the adapter's rank, so
    that nothing of rank r is nearer in the Frobenius norm (Eckart and Young). W stays. Parameters that have no adapter
    are copied.

    Args:
        model: with one active adapter of PEFT.
        weights: by the names of `merged_weights`.

    Returns:
        Of each adapted weight the relative error ‖s·BA − (weight − W)‖ / ‖weight − W‖ of what was written.

    Raises:
        InvalidTypeError: no module, or no dict of tensors.
        UnknownParameterError: a name that `merged_weights` does not give.
        InvalidArgumentError: another shape, several active adapters, or a scale of 0; nothing is changed then.
        NonFiniteError: NaN or infinity, or numbers beyond the adapters' dtype.

    Cost: a singular value decomposition of each weight, in float64.
    """
    call, known = "write_merged_weights", merged_weights(model)
    model = unwrapped(model)
    parameters = dict(model.named_parameters())
    if not isinstance(weights, Mapping) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise InvalidTypeError(
            call, f"weights of type {type(weights).__name__}", "a dict of name -> tensor",
            try_="fk.merging.merge([fk.adapters.merged_weights(model), ...], ...)",
        )  # fmt: skip
    if unknown := sorted(set(weights) - set(known)):
        raise UnknownParameterError(
            call, f"unknown names {listed(unknown)}", "names of merged_weights(model)",
            why="only weights that the model trains are written", try_="sorted(fk.adapters.merged_weights(model))",
        )  # fmt: skip
    if odd := [name for name, w in weights.items() if w.shape != known[name].shape]:
        raise InvalidArgumentError(
            call, f"other shapes of {listed(odd)}", "the model's", why="an adapter changes a weight and not its shape",
            try_="weights of models of the same architecture",
        )  # fmt: skip
    made = {name: product for name, product in products(model, known).items() if name in weights}
    if odd := [name for name, w in weights.items() if not all_finite(w)]:
        raise NonFiniteError(call, f"NaN or infinite entries of {listed(odd)}", "finite numbers")
    if several := [name for name, product in made.items() if len(product.terms) > 1]:
        raise InvalidArgumentError(
            call, f"several active adapters on {listed(several, 4)}", "one",
            why="how a change is shared out between them is open", try_='model.set_adapter("name")',
        )  # fmt: skip
    if still := [name for name, product in made.items() if not product.terms[0][0]]:
        raise InvalidArgumentError(
            call, f"adapters of scale 0 on {listed(still, 4)}", "another scale",
            why="whatever is in them changes nothing", try_="a lora_alpha above 0",
        )  # fmt: skip
    written: list[tuple[nn.Parameter, Tensor]] = []
    changes = {name: weights[name].detach().double() - product.base.double() for name, product in made.items()}
    for name, weight in weights.items():
        if name not in made:
            written.append((parameters[name], weight.detach()))
            continue
        ((scale, own),) = made[name].terms
        if len(own) == 1:
            written.append((own[0], changes[name] / scale))
            continue
        change = changes[name] / scale
        u, s, v = torch.linalg.svd(change.mT if made[name].turned else change.flatten(1), full_matrices=False)
        rank, root = own[0].shape[0], s.sqrt()
        factors = [
            nn.functional.pad(f, (0, 0, 0, rank - len(f)))
            for f in ((root.unsqueeze(1) * v)[:rank], (u * root).mT[:rank])
        ]  # fewer triples than ranks leave the rest 0
        written += [(own[0], factors[0].reshape(own[0].shape)), (own[1], factors[1].mT.reshape(own[1].shape))]
    if not all(all_finite(value.to(parameter.dtype)) for parameter, value in written):
        raise NonFiniteError(
            call, "weights beyond the range of the adapters' dtype", "numbers that it holds", try_="adapters in float32"
        )
    for parameter, value in written:
        parameter.copy_(value)
    return {
        name: float(product.added_to(-changes[name]).norm() / changes[name].norm().clamp_min(1e-300))
        for name, product in made.items()
    }


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that adapters were put around, with their active adapters at work."""
    for name, module in model.named_modules():
        # Of its class: a module that lacks an attribute takes its time to say so.
        if not (
            hasattr(type(module), "adapter_layer_names") and isinstance(getattr(module, "base_layer", None), nn.Module)
        ):
            continue
        if not (module.disable_adapters or module.merged):
            yield name, module


def _products(model: nn.Module, layers: Mapping[str, Any]) -> tuple[dict[str, Product], dict[str, str]]:
    """The products by the names of base parameters, and why layers have none."""
    held: Counter[int] = Counter()
    if layers:
        held.update(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: dict[str, Product] = {}
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        own = _of_layer(layer)
        if isinstance(own, dict) and any(held[id(product.base)] > 1 for product in own.values()):
            own = "its weight is tied to another layer's, which the adapters do not act on"
        if isinstance(own, str):
            reasons[name] = own
        else:
            found |= {f"{name}.base_layer.{what}": product for what, product in own.items()}
    return found, reasons


def _of_layer(layer: Any) -> dict[str, Product] | str:
    """The products of one layer, by "weight" and "bias"; or why it has none."""
    cls, base = type(layer), layer.base_layer
    if not cls.__module__.startswith("peft.tuners.lora.") or not hasattr(layer, "scaling"):
        return f"a {cls.__name__} of {cls.__module__}, not of LoRA"
    embeds = cls.__name__ == "Embedding"
    has = layer.lora_embedding_A if embeds else layer.lora_A
    active = [adapter for adapter in layer.active_adapters if adapter in has]
    variants = {adapter: getattr(layer, "lora_variant", {}).get(adapter) for adapter in active}
    if any(variants.values()) or any(getattr(layer, "use_dora", {}).get(adapter) for adapter in active):
        names = [type(v).__name__ for v in variants.values() if v] or ["DoRA"]
        return f"{', '.join(names)}: what it does to W is no product, but depends on W or on the input"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if cls.__module__ != "peft.tuners.lora.layer" or cls.__name__ not in CLASSES or weight is None:
        return f"a {cls.__name__} of {cls.__module__} around a {type(base).__name__}"
    if not weight.is_floating_point():
        return f"a quantised weight of {weight.dtype}, which has no value to be moved"
    if cls.__name__.startswith("Conv") and (
        base.groups > 1 or set(base.dilation) != {1} or base.padding_mode != "zeros"
    ):
        return "a convolution with groups, dilation or padded otherwise than by zeros, which the adapters' is not"
    pairs = {
        adapter: (has[adapter], layer.lora_embedding_B[adapter])
        if embeds else (has[adapter].weight, layer.lora_B[adapter].weight)
        for adapter in active
    }  # fmt: skip
    if not pairs:
        return {}
    scales = {adapter: float(layer.scaling[adapter]) for adapter in active}
    turned = embeds or bool(getattr(layer, "fan_in_fan_out", False))
    found = {"weight": Product(weight, tuple((scales[a], pair) for a, pair in pairs.items()), turned)}
    biases = {} if embeds else {a: layer.lora_B[a].bias for a in active if layer.lora_B[a].bias is not None}
    if biases and bias is None:
        return "adapters with a bias on a layer without one"
    if biases and bias is not None:
        found["bias"] = Product(bias, tuple((scales[a], (b,)) for a, b in biases.items()))
    return found
