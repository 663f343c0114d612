"""Families of linear layers, norms, bare parameters, frozen ones, and unusual wiring of common layers."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.zoo import Built, Compose, family, freeze, labels, parameter


@family("mlp")
def _mlp() -> Built:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(6, 4), labels(3, 6)


@family("mlp_no_bias")
def _mlp_no_bias() -> Built:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 5, bias=False))
    return model, torch.randn(6, 4), labels(5, 6)


@family("deep_linear", "gaussian")
def _deep_linear() -> Built:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    return model, torch.randn(6, 4), torch.randn(6, 3)


@family("gaussian_vector", "gaussian")
def _gaussian_vector() -> Built:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(5, 3), torch.randn(5, 4)


@family("gaussian_scalar", "gaussian")
def _gaussian_scalar() -> Built:
    model = Compose(lambda m, x: m.body(x).squeeze(-1), body=nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))
    return model, torch.randn(5, 3), torch.randn(5)


@family("bernoulli_multilabel", "bernoulli")
def _bernoulli_multilabel() -> Built:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    return model, torch.randn(5, 3), torch.randint(2, (5, 4)).float()


@family("bernoulli_scalar", "bernoulli")
def _bernoulli_scalar() -> Built:
    model = Compose(lambda m, x: m.body(x).squeeze(-1), body=nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))
    return model, torch.randn(6, 3), torch.randint(2, (6,)).float()


@family("binary_softmax")
def _binary_softmax() -> Built:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 3), labels(2, 6)


@family("linear_3d")
def _linear_3d() -> Built:
    model = Compose(lambda m, x: m.head(torch.tanh(m.body(x)).mean(1)), body=nn.Linear(3, 5), head=nn.Linear(5, 3))
    return model, torch.randn(5, 4, 3), labels(3, 5)


@family("linear_4d")
def _linear_4d() -> Built:
    model = Compose(lambda m, x: m.head(torch.tanh(m.body(x)).sum((1, 2))), body=nn.Linear(3, 5), head=nn.Linear(5, 3))
    return model, torch.randn(4, 2, 3, 3), labels(3, 4)


@family("layernorm")
def _layernorm() -> Built:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.randn(6, 4), labels(3, 6)


@family("layernorm_two_axes")
def _layernorm_two_axes() -> Built:
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))
    return model, torch.randn(5, 3, 4), labels(3, 5)


@family("groupnorm")
def _groupnorm() -> Built:
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    return model, torch.randn(5, 2, 5), labels(3, 5)


@family("rmsnorm")
def _rmsnorm() -> Built:
    model = Compose(
        lambda m, x: m.head(m.norm(m.body(x)).mean(1)), body=nn.Linear(3, 5), norm=nn.RMSNorm(5), head=nn.Linear(5, 3)
    )
    return model, torch.randn(5, 4, 3), labels(3, 5)


def _with_statistics(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """A batch norm whose running statistics are not the initial zero and one."""
    torch.nn.init.normal_(norm.get_buffer("running_mean"))
    torch.nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2.0)
    return norm


@family("batchnorm1d")
def _batchnorm1d() -> Built:
    model = nn.Sequential(nn.Linear(4, 6), _with_statistics(nn.BatchNorm1d(6)), nn.ReLU(), nn.Linear(6, 3))
    return model, torch.randn(6, 4), labels(3, 6)


@family("batchnorm1d_positions")
def _batchnorm1d_positions() -> Built:
    norm = _with_statistics(nn.BatchNorm1d(4))
    model = nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    return model, torch.randn(5, 2, 5), labels(3, 5)


@family("batchnorm2d")
def _batchnorm2d() -> Built:
    norm = _with_statistics(nn.BatchNorm2d(3))
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return model, torch.randn(5, 2, 3, 3), labels(3, 5)


@family("bare_parameters")
def _bare_parameters() -> Built:
    model = Compose(
        lambda m, x: m.scale * m.head(torch.tanh(m.body(x + m.position)).mean(1)),
        scale=parameter(3),
        position=parameter(4, 3),
        body=nn.Linear(3, 5),
        head=nn.Linear(5, 3),
    )
    return model, torch.randn(5, 4, 3), labels(3, 5)


@family("reused_module")
def _reused_module() -> Built:
    model = Compose(
        lambda m, x: m.head(torch.tanh(m.body(torch.tanh(m.body(x))))), body=nn.Linear(4, 4), head=nn.Linear(4, 3)
    )
    return model, torch.randn(6, 4), labels(3, 6)


@family("shared_module")
def _shared_module() -> Built:
    """One module under two names."""
    body = nn.Linear(4, 4)
    return nn.Sequential(body, nn.Tanh(), body, nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 4), labels(3, 6)


@family("tied_linears")
def _tied_linears() -> Built:
    """Two Linear modules with one weight and a bias each."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model, torch.randn(6, 4), labels(3, 6)


@family("frozen_weight")
def _frozen_weight() -> Built:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return freeze(model, "0.weight", "2.weight"), torch.randn(6, 4), labels(3, 6)


@family("frozen_bias")
def _frozen_bias() -> Built:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return freeze(model, "0.bias", "2.bias"), torch.randn(6, 4), labels(3, 6)


@family("frozen_layer")
def _frozen_layer() -> Built:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return freeze(model, "2.weight", "2.bias"), torch.randn(6, 4), labels(3, 6)


class _MaskedLinear(nn.Linear):
    """A Linear whose weight is multiplied with a fixed mask when it is used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.rand(outputs, inputs) > 0.4).float())

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.get_buffer("mask"), self.bias)


@family("masked_weight")
def _masked_weight() -> Built:
    return nn.Sequential(_MaskedLinear(4, 6), nn.Tanh(), _MaskedLinear(6, 3)), torch.randn(6, 4), labels(3, 6)


@family("weight_norm")
def _weight_norm() -> Built:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3)), torch.randn(6, 4), labels(3, 6)


@family("inplace_relu_linear")
def _inplace_relu_linear() -> Built:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)
    )
    return model, torch.randn(6, 4), labels(3, 6)


@family("residual")
def _residual() -> Built:
    def function(m: Any, x: Tensor) -> Any:
        h = m.stem(x)
        branch = m.second(torch.tanh(m.first(h)))
        branch += h
        return m.head(branch + torch.tanh(m.third(branch)))

    layers = {"stem": (3, 5), "first": (5, 4), "second": (4, 5), "third": (5, 5), "head": (5, 3)}
    return (
        Compose(function, **{name: nn.Linear(*size) for name, size in layers.items()}),
        torch.randn(5, 3),
        labels(3, 5),
    )


if importlib.util.find_spec("transformers") is not None:

    @family("hf_conv1d")
    def _hf_conv1d() -> Built:
        from transformers.pytorch_utils import Conv1D

        layers = {"body": Conv1D(5, 3), "head": Conv1D(3, 5)}  # type: ignore[no-untyped-call]
        model = Compose(lambda m, x: m.head(torch.tanh(m.body(x)).mean(1)), **layers)
        return model, torch.randn(5, 4, 3), labels(3, 5)
