"""Parameters that meet data through a broadcast or through a small function of themselves have rules, exact ones.

Every model is compared with one autograd call an example on the example alone, in batches of several sizes and
lengths, down to one example.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fisherkit as fk
from tests import by_hand

WIDTH, HEADS, CLASSES, LONGEST = 4, 2, 3, 8
Body = Callable[["Model", Tensor], Tensor]
BODIES: dict[str, tuple[Body, tuple[int, ...]]] = {}


class Model(nn.Module):
    """A layer, what a body does with a parameter and the layer's outputs, and a head."""

    def __init__(self, body: Body, size: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.first = nn.Linear(WIDTH, WIDTH)
        self.w = nn.Parameter(0.5 * torch.randn(size) if size else torch.tensor(0.7))
        self.v = nn.Parameter(torch.rand(WIDTH))
        self.table = nn.Embedding(2 * LONGEST, HEADS)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self, torch.tanh(self.first(x)))
        return self.head(torch.tanh(x).mean(1))


def body(*size: int) -> Callable[[Body], Body]:
    """Register a body with the size of its parameter."""

    def register(function: Body) -> Body:
        BODIES[function.__name__] = function, size
        return function

    return register


@body(WIDTH)
def one_plus(m: Model, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * (1.0 + m.w.float().double())


@body(WIDTH)
def in_place(m: Model, x: Tensor) -> Tensor:
    x = x * 2
    x *= 1 + m.w
    x += m.w.exp()
    return x


@body()
def scalars(m: Model, x: Tensor) -> Tensor:
    return m.w - x / (1 + m.w**2) + F.softplus(m.w) * x


@body(WIDTH)
def mixed(m: Model, x: Tensor) -> Tensor:
    return x * m.w + x.flip(1) * (1 - m.w) + m.w


@body(WIDTH)
def kinks(m: Model, x: Tensor) -> Tensor:
    return torch.where(x > 0.1, x, m.w) + torch.maximum(x, m.w.sigmoid()) + torch.addcmul(x, m.w, x) + x.lerp(m.w, 0.3)


@body(1, LONGEST, WIDTH)
def sliced_positions(m: Model, x: Tensor) -> Tensor:
    return x + m.w[:, : x.shape[1]]


@body(LONGEST, WIDTH)
def indexed_positions(m: Model, x: Tensor) -> Tensor:
    return x + m.w[torch.arange(x.shape[1])]


@body(LONGEST, WIDTH)
def expanded_positions(m: Model, x: Tensor) -> Tensor:
    return x + m.w[torch.arange(x.shape[1]).expand(len(x), -1)]


@body(1, 1, WIDTH)
def class_token(m: Model, x: Tensor) -> Tensor:
    return torch.cat([m.w.expand(len(x), -1, -1), m.v.repeat(len(x), 1, 1), x], 1)


@body(WIDTH)
def masked_tokens(m: Model, x: Tensor) -> Tensor:
    mask = (x.detach()[..., :1] > 0.2).double()
    return x * (1 - mask) + m.w.expand(len(x), x.shape[1], -1) * mask


@body(1, 3, WIDTH)
def queries(m: Model, x: Tensor) -> Tensor:
    q = F.layer_norm(m.w.expand(len(x), -1, -1), (WIDTH,), m.v)
    return F.scaled_dot_product_attention(q, x, x)


@body(HEADS, 1, 1)
def sinks(m: Model, x: Tensor) -> Tensor:
    heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    scores = heads @ heads.mT
    sink = m.w.reshape(1, -1, 1, 1).expand(len(x), -1, x.shape[1], -1)
    return (torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ heads).transpose(1, 2).flatten(2)


def distances(x: Tensor) -> Tensor:
    place = torch.arange(x.shape[1])
    return place.unsqueeze(1) - place + LONGEST - 1


@body(WIDTH)
def relative_positions(m: Model, x: Tensor) -> Tensor:
    heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    bias = m.table(distances(x)).permute(2, 0, 1).unsqueeze(0)
    return ((heads @ heads.mT + bias).softmax(-1) @ heads * m.w[:2]).transpose(1, 2).flatten(2)


@body(2 * LONGEST, HEADS)
def attention_mask(m: Model, x: Tensor) -> Tensor:
    heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    bias = m.w[distances(x).flatten()].view(x.shape[1], x.shape[1], -1).permute(2, 0, 1).contiguous().unsqueeze(0)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias).transpose(1, 2).flatten(2)


@body(1, HEADS, 2, 2)
def windows(m: Model, x: Tensor) -> Tensor:
    examples = len(x)
    x = torch.cat([x, x], 1).unflatten(1, (-1, 2)).flatten(0, 1)  # windows of two tokens, folded into the batch
    heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    mask = torch.zeros(len(x) // examples, 1, 2, 2, dtype=x.dtype)
    mask[::2, :, 0, 1] = -1.0
    mask = mask.repeat(examples, 1, 1, 1)
    y = ((heads @ heads.mT + (m.w + mask)).softmax(-1) @ heads).transpose(1, 2).flatten(2)
    return y.unflatten(0, (examples, -1)).flatten(1, 2)


@body(WIDTH, 2)
def state_space(m: Model, x: Tensor) -> Tensor:
    decay = torch.exp(-torch.exp(m.w.float().double())[None, None] * F.softplus(x + m.v).unsqueeze(-1))
    return decay.sum(-1) * x + x * m.v[None, None]


@body(WIDTH, WIDTH)
def products(m: Model, x: Tensor) -> Tensor:
    return x @ m.w + (m.w @ x.transpose(1, 2)).transpose(1, 2)


@body(WIDTH, WIDTH)
def transposed(m: Model, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.w.T)


@body(WIDTH, WIDTH)
def made_weight(m: Model, x: Tensor) -> Tensor:
    direction = m.w / m.w.norm(dim=1, keepdim=True)
    return F.linear(x, direction * m.v.unsqueeze(1), m.v * 2)


@body(WIDTH, WIDTH)
def viewed_weight(m: Model, x: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), m.w.unsqueeze(2).squeeze(2).unsqueeze(2)).transpose(1, 2)


@body(1, 1, WIDTH)
def written_into(m: Model, x: Tensor) -> Tensor:
    tokens = torch.zeros(len(x), 1 + x.shape[1], WIDTH, dtype=x.dtype)
    tokens[:, :1] = m.w
    tokens[:, 1:] = x
    return tokens


@body(WIDTH)
def changed_in_place(m: Model, x: Tensor) -> Tensor:
    gain = m.w * 2
    y = x + gain
    gain.mul_(3.0)
    return y + gain


@body(LONGEST, 1, WIDTH)
def sequence_first(m: Model, x: Tensor) -> Tensor:
    return (x.transpose(0, 1) + m.w[: x.shape[1]] * m.v).transpose(0, 1)


@body(2 * LONGEST, WIDTH)
def layers_of_what_is_shared(m: Model, x: Tensor) -> Tensor:
    """As relative positions that go through the layers of tokens, of which they are keys too."""
    place = m.head(F.layer_norm(m.w, (WIDTH,), m.v)).relu_()
    keys = torch.stack([place, place * m.v[0]]).repeat(len(x), 1, 1)  # two heads, folded into the batch
    scores = torch.bmm(m.head(x).repeat_interleave(2, 0), keys.mT).softmax(-1)
    return x + (scores @ keys).unflatten(0, (-1, 2)).sum((1, 3)).unsqueeze(-1)


GENERIC = {"written_into", "sequence_first"}
"""Exact too, but the slow way."""


def model(name: str) -> Model:
    return Model(*BODIES[name])


def batches(sizes: tuple[int, ...] = (3, 1, 4)) -> list[tuple[Tensor, Tensor]]:
    """Batches of several sizes, and lengths that are sometimes as many as examples."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, length, WIDTH, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size, length in zip(sizes, (5, 3, 4), strict=False)
    ]


def generic(fisher: fk.FisherApproximation) -> list[str]:
    return [name for e in fisher.coverage().entries if e.rule in ("torch.func", "loop") for name in e.parameters]


@pytest.mark.parametrize("exact", [False, True], ids=["ef", "exact"])
@pytest.mark.parametrize("name", BODIES)
def test_fisher__is_that_of_one_autograd_call_an_example(name: str, exact: bool) -> None:
    m, data = model(name), batches()
    expected = by_hand.fisher(m, data, "exact" if exact else "ef")
    kind = fk.ExactFisher if exact else fk.EmpiricalFisher
    for budget in (None, 1):
        fisher = kind(m, data, memory_budget=budget)
        found = fisher @ torch.eye(fisher.size, dtype=fisher.dtype)
        assert (found - expected).norm() <= 1e-7 * expected.norm()
    diagonal = kind(m, data, structure="diagonal")
    assert (diagonal.diagonal() - expected.diagonal()).norm() <= 1e-7 * expected.diagonal().norm()
    used = {n for n, part in diagonal.space.unflatten(expected.diagonal()).items() if bool(part.any())}
    assert bool(used.intersection(generic(diagonal))) == (name in GENERIC)


@pytest.mark.parametrize("name", BODIES)
def test_natural_gradient__sees_each_examples_row_and_leaves_the_gradient_as_it_is(name: str) -> None:
    m, (data, *_) = model(name), batches()
    x, y = data
    own = torch.autograd.grad(F.cross_entropy(m(x), y), list(m.parameters()), allow_unused=True, materialize_grads=True)
    j = by_hand.rows(m, [data])
    used = torch.cat([torch.full((p.numel(),), bool(g.any())) for p, g in zip(m.parameters(), own, strict=True)])
    expected = by_hand.natural(j, 1e-2)
    optimizer = fk.optim.NaturalGradient(m, lr=1.0, kind="ef", damping=1e-2)
    before = by_hand.weights(m)
    F.cross_entropy(m(x), y).backward()
    for p, g in zip(m.parameters(), own, strict=True):
        assert p.grad is None or (p.grad - g).norm() <= 1e-13 * g.norm()
    optimizer.step()
    step = before - by_hand.weights(m)
    assert (step - expected)[used].norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kfac__of_a_matrix_product_is_that_of_the_layer(structure: str) -> None:
    m, data = model("transposed"), batches()
    layer = Model(lambda own, x: torch.tanh(own.layer(x)), (1,))
    layer.layer = nn.Linear(WIDTH, WIDTH, bias=False).double()
    layer.load_state_dict({**m.state_dict(), "w": layer.w, "layer.weight": m.w})
    chosen = {"params": ["first.weight", "first.bias", "layer.weight", "head.weight", "head.bias"]}
    one = fk.EmpiricalFisher(
        m, data, structure=structure, params=[n.replace("layer.weight", "w") for n in chosen["params"]]
    )
    two = fk.EmpiricalFisher(layer, data, structure=structure, **chosen)
    a, b = (f.space.unflatten(f.diagonal()) for f in (one, two))
    torch.testing.assert_close(a["w"], b["layer.weight"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["one_plus", "kinks", "attention_mask", "class_token", "state_space"])
def test_checkpoints__compute_again_what_was_seen(name: str) -> None:
    """What a checkpoint saves when it computes again must have the shapes of the first time."""
    m, data = model(name), batches()
    truth = by_hand.fisher(m, data)
    inner, _ = BODIES[name]
    m.body = lambda own, x: checkpoint(inner, own, x, use_reentrant=False)
    fisher = fk.EmpiricalFisher(m, data)
    found = fisher @ torch.eye(fisher.size, dtype=fisher.dtype)
    assert (found - truth).norm() <= 1e-7 * truth.norm()


@pytest.mark.parametrize("name", ["one_plus", "kinks", "attention_mask", "class_token", "sinks"])
def test_natural_gradient__with_checkpoints_in_train_mode_only(name: str) -> None:
    m, (data, *_) = model(name), batches()
    x, y = data
    j, inner = by_hand.rows(m, [data]), m.body
    m.body = lambda own, x: checkpoint(inner, own, x, use_reentrant=False) if own.training else inner(own, x)
    expected = by_hand.natural(j, 1e-2)
    optimizer = fk.optim.NaturalGradient(m.train(), lr=1.0, kind="ef", damping=1e-2)
    step = by_hand.stepped(m, optimizer, x, y)
    assert (step - expected).norm() <= 1e-6 * expected.norm()


def test_half_of_a_sum__has_the_dtype_that_it_has_without_being_watched() -> None:
    """A number that is a parameter does not promote what it meets."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.tensor(1.5)), nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = (x.bfloat16() * 2) / self.scale
            assert y.dtype == torch.bfloat16
            return self.head(y.float())

    torch.manual_seed(0)
    m, x, y = Scaled(), torch.randn(5, WIDTH), torch.randint(CLASSES, (5,))
    found = fk.EmpiricalFisher(m, (x, y)).diagonal()
    expected = by_hand.rows(m, [(x.unsqueeze(1)[:, 0], y)]).square().mean(0)
    assert (found - expected).norm() <= 5e-2 * expected.norm()
