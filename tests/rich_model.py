"""One model with a bit of everything that could be left changed, and four batches for it."""

from typing import Any

import torch
from torch import Tensor, nn

F64 = torch.float64


class Rich(nn.Module):
    """Convolution, norms with buffers, dropout, attention, a frozen layer, a bare parameter and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 0.5))
        self.conv = nn.Conv1d(2, 4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.frozen = nn.Linear(4, 4)
        self.body = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.dropout(torch.tanh(self.frozen(h.mean(1))))
        return self.head(self.scale * torch.tanh(self.tied(self.body(h))))


class Calls:
    """A user's hook that counts its calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


def rich() -> nn.Module:
    """A `Rich` with traces of earlier work: gradients, hooks, a child in train mode, running statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Rich()
        model.tied.weight = model.body.weight
        model.frozen.requires_grad_(False)
        model.train()
        model(torch.randn(5, 2, 4)).sum().backward()
        model.double().eval()
    model.head.bias.grad = None
    model.head.train()  # harmless for a Linear, and not ours to switch
    model.body.register_forward_hook(Calls())
    model.body.register_full_backward_hook(Calls())
    model.conv.register_forward_pre_hook(Calls())
    model.head.weight.register_hook(Calls())
    model.scale.register_post_accumulate_grad_hook(Calls())
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = 3, 3, 3, 2
    x = [torch.randn(n, 2, 4, generator=generator, dtype=F64) for n in sizes]
    return [(part, torch.randint(3, (len(part),), generator=generator)) for part in x]
