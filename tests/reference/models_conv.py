"""Families of convolutions, plain and transposed, in one to three dimensions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.zoo import Built, Compose, family, labels, parameter


def _classifier(layer: nn.Module, *shape: int) -> Built:
    """The layer, tanh, and a Linear on everything flattened; four or five examples of the shape."""
    inputs = torch.randn(4, *shape)
    with torch.no_grad():
        features = layer(inputs[:1]).numel()
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3)), inputs, labels(3, 4)


def _register(
    name: str, layer: Callable[..., nn.Module], sizes: tuple[int, int, Any], *shape: int, **options: Any
) -> None:
    family(name)(lambda: _classifier(layer(*sizes, **options), *shape))


_register("conv1d", nn.Conv1d, (2, 3, 3), 2, 7, stride=2, padding=1)
_register("conv1d_dilated", nn.Conv1d, (2, 3, 2), 2, 7, dilation=3, bias=False)
_register("conv1d_groups", nn.Conv1d, (4, 6, 2), 4, 4, groups=2)
_register("conv1d_replicate", nn.Conv1d, (2, 3, 3), 2, 5, padding=2, padding_mode="replicate")
_register("conv1d_same", nn.Conv1d, (2, 3, 4), 2, 5, padding="same")
_register("conv2d", nn.Conv2d, (2, 3, (3, 2)), 2, 5, 4, stride=(2, 1), padding=(1, 0))
_register("conv2d_dilated", nn.Conv2d, (2, 3, 2), 2, 5, 4, dilation=(2, 1), padding=1, stride=2)
_register("conv2d_groups", nn.Conv2d, (4, 4, 2), 4, 3, 3, groups=2, bias=False)
_register("conv2d_depthwise", nn.Conv2d, (3, 6, 2), 3, 3, 3, groups=3)
_register("conv2d_pointwise", nn.Conv2d, (3, 4, 1), 3, 2, 3)
_register("conv2d_reflect", nn.Conv2d, (2, 3, 3), 2, 3, 4, padding=(1, 2), padding_mode="reflect")
_register("conv2d_circular", nn.Conv2d, (2, 3, 3), 2, 3, 4, stride=(2, 1), padding=(1, 0), padding_mode="circular")
_register("conv2d_same", nn.Conv2d, (2, 3, (2, 3)), 2, 3, 4, padding="same", dilation=(2, 1))
_register("conv3d", nn.Conv3d, (2, 3, 2), 2, 3, 3, 4, stride=(1, 2, 2), padding=(0, 1, 0))
_register("conv3d_groups", nn.Conv3d, (2, 4, 2), 2, 3, 2, 3, groups=2, padding="same")
_register("conv_transpose1d", nn.ConvTranspose1d, (3, 4, 3), 3, 3, stride=2, padding=1, output_padding=1)
_register("conv_transpose1d_groups", nn.ConvTranspose1d, (4, 6, 2), 4, 3, stride=2, groups=2, bias=False)
_register(
    "conv_transpose2d", nn.ConvTranspose2d, (2, 3, (2, 3)), 2, 2, 2, stride=2, output_padding=(1, 0), padding=(0, 1)
)
_register("conv_transpose2d_groups", nn.ConvTranspose2d, (4, 4, 2), 4, 2, 2, groups=2, dilation=2)


@family("conv_pooled")
def _conv_pooled() -> Built:
    layers = nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model, torch.randn(5, 1, 5, 5), labels(3, 5)


@family("inplace_relu_conv")
def _inplace_relu_conv() -> Built:
    layers = nn.Conv2d(1, 4, 2), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2), nn.ReLU(inplace=True)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)), torch.randn(5, 1, 4, 4), labels(3, 5)


@family("residual_conv")
def _residual_conv() -> Built:
    def function(m: Any, x: Tensor) -> Any:
        h = torch.relu(m.stem(x))
        h = h + m.gain * m.second(torch.relu(m.first(h)))
        return m.head(h.mean((2, 3)))

    model = Compose(
        function,
        gain=parameter(3, 1, 1),
        stem=nn.Conv2d(1, 3, 3),
        first=nn.Conv2d(3, 3, 3, padding=1),
        second=nn.Conv2d(3, 3, 1),
        head=nn.Linear(3, 4),
    )
    return model, torch.randn(5, 1, 5, 5), labels(4, 5)


@family("conv_gaussian_positions", "gaussian")
def _conv_gaussian_positions() -> Built:
    model = Compose(
        lambda m, x: m.second(torch.tanh(m.first(x))).mT, first=nn.Conv1d(2, 4, 2), second=nn.Conv1d(4, 2, 2)
    )
    return model, torch.randn(4, 2, 5), torch.randn(4, 3, 2)
