"""nngeometry: representations of FIM and Gram matrices by hooks on layers.

Timed at its best: the minibatch is handed over whole, without the loader's example-by-example collation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM
from nngeometry.object import FMatDense, pspace
from nngeometry.object.vector import PVector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.benchmarks.contestants import Case, Contestant, Values

NAME = "nngeometry"
Make = Callable[[nn.Module, DataLoader[Any]], Any]


def contestants(case: Case) -> dict[str, Contestant]:
    """By operation; layers alone.

    It keeps nothing between products. Its empirical one also stands beside products with rows at hand; its exact one
    takes a backward pass for each output and is measured once.
    """
    if not case.layered or case.workload.sequence:
        return {}
    return {
        "ef_product": _implicit(case, _empirical),
        "ef_product_cached": _implicit(case, _empirical),
        "exact_product": _implicit(case, _exact),
        "ef_diagonal": _diagonal(case, _empirical),
        "exact_diagonal": _diagonal(case, _exact),
        "ef_gram": _gram(case),
        "kfac_ef": _kronecker(case, _empirical, pspace.PMatKFAC),
        "kfac_exact": _kronecker(case, _exact, pspace.PMatKFAC),
        "ekfac_ef": _kronecker(case, _empirical, pspace.PMatEKFAC),
    }


class _Whole(DataLoader[Any]):
    """One batch: the minibatch as it is."""

    def __init__(self, case: Case) -> None:
        self.minibatch = case.workload.data
        super().__init__(TensorDataset(*self.minibatch), batch_size=case.workload.examples)

    def __iter__(self) -> Any:
        inputs, targets = self.minibatch
        yield inputs.detach(), targets  # a view: theirs sets requires_grad on it


def _layers(case: Case, model: nn.Module) -> LayerCollection:
    layers = LayerCollection()
    for prefix, module in model.named_modules():
        if f"{prefix}.weight" in case.names:
            layers.add_layer_from_model(model, module)
    return layers


def _backend(case: Case, model: nn.Module) -> Any:
    """Of each example's loss: its Fisher is the empirical one."""

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), targets, reduction="none")[:, None]

    return TorchHooksJacobianBackend(layer_collection=_layers(case, model), model=model, function=losses)


def _empirical(case: Case, model: nn.Module, representation: Any, loader: Any) -> Any:
    return representation(generator=_backend(case, model), examples=loader)


def _exact(case: Case, model: nn.Module, representation: Any, loader: Any) -> Any:
    device = str(case.workload.inputs.device)
    return FIM(model, loader, representation, "classif_logits", device, layer_collection=_layers(case, model))


def _contestant(case: Case, how: str, run: Make, values: Callable[[Any], Values]) -> Contestant:
    def prepare() -> Callable[[], Any]:
        own, loader = copy.deepcopy(case.workload.model), _Whole(case)
        return lambda: run(own, loader)

    return Contestant(NAME, how, prepare, values)


def _vector(case: Case, model: nn.Module) -> PVector:
    return PVector(_layers(case, model), vector_repr=case.vector)


def _implicit(case: Case, make: Any) -> Contestant:
    def run(model: nn.Module, loader: Any) -> Tensor:
        return make(case, model, pspace.PMatImplicit, loader).mv(_vector(case, model)).to_torch()

    return _contestant(case, "PMatImplicit.mv(v)", run, lambda product: {"product": product.detach()})


def _diagonal(case: Case, make: Any) -> Contestant:
    def run(model: nn.Module, loader: Any) -> Tensor:
        return make(case, model, pspace.PMatDiag, loader).get_diag()

    return _contestant(case, "PMatDiag(…).get_diag()", run, lambda diagonal: {"diagonal": diagonal})


def _gram(case: Case) -> Contestant:
    def run(model: nn.Module, loader: Any) -> Tensor:
        return FMatDense(generator=_backend(case, model), examples=loader).to_torch()

    n = case.workload.examples
    return _contestant(case, "FMatDense(…)", run, lambda gram: {"gram": gram.reshape(n, n) / n})


def _kronecker(case: Case, make: Any, representation: Any) -> Contestant:
    def run(model: nn.Module, loader: Any) -> Any:
        matrix = make(case, model, representation, loader)
        if representation is pspace.PMatEKFAC:
            matrix.update_diag(loader)  # as built it is KFAC in its eigenbasis
        return matrix

    def values(matrix: Any) -> Values:
        product = matrix.mv(PVector(matrix.generator.layer_collection, vector_repr=case.vector)).to_torch()
        return {"product": product.detach(), "trace": matrix.trace()}

    return _contestant(case, f"{representation.__name__}(…)", run, values)
