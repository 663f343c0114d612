"""LSTM, GRU and RNN by rule: their linear maps, which the kernels hide, against one autograd call an example."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fisherkit as fk
from fisherkit.rows import recurrent
from tests import by_hand
from tests.axes import pairwise
from tests.snapshot import untouched

F64 = torch.float64
N = 7

FORMS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm both ways": (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
    "lstm projected": (nn.LSTM, {"proj_size": 2, "bidirectional": True, "num_layers": 2}),
    "lstm without bias": (nn.LSTM, {"bias": False, "proj_size": 3}),
    "gru": (nn.GRU, {}),
    "gru both ways": (nn.GRU, {"bidirectional": True, "num_layers": 2}),
    "gru without bias": (nn.GRU, {"bias": False, "num_layers": 2}),
    "tanh": (nn.RNN, {"num_layers": 2}),
    "relu both ways": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


class Net(nn.Module):
    """A recurrent layer over padded sequences, which are packed if their lengths are given; states may be learned."""

    def __init__(self, form: str, *, first: bool = True, learned: bool = False) -> None:
        super().__init__()
        layer, options = FORMS[form]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.rnn = layer(3, 4, batch_first=first, **options)
            self.head = nn.LazyLinear(3)
            self.start = nn.Parameter(torch.randn(1, 1, 4)) if learned else None
            self.first = first
            self(torch.randn(2, 5, 3))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        state: Any = None
        if self.start is not None:
            h = self.start.expand(1, x.shape[1 - int(self.first)], 4)
            state = (h.contiguous(), h.tanh()) if isinstance(self.rnn, nn.LSTM) else h.contiguous()
        if lengths is None:
            found, end = self.rnn(x, state)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=self.first, enforce_sorted=False)
            found, end = self.rnn(packed, state)
            found = pad_packed_sequence(found, batch_first=self.first)[0]
        last = end[0] if isinstance(end, tuple) else end
        whole = found.tanh().sum(int(self.first))
        return self.head(torch.cat([whole, last.transpose(0, 1).flatten(1)], 1))


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, 3, generator=generator, dtype=F64)
    return x, torch.randint(1, 6, (N,), generator=generator), torch.randint(3, (N,), generator=generator)


@pytest.mark.parametrize(("structure", "form", "packed"), pairwise(["full", "diagonal"], FORMS, [False, True]))
def test_rows__are_those_of_single_examples(structure: str, form: str, packed: bool) -> None:
    model, (x, lengths, y) = Net(form).double(), data()
    inputs = (x, lengths) if packed else (x,)
    j = by_hand.rows(model, (inputs, y))
    batches = [(tuple(one[some] for one in inputs), y[some]) for some in (slice(4), slice(4, N))]
    with untouched(model, batches):
        fisher = fk.EmpiricalFisher(model, batches, structure=structure)
    torch.testing.assert_close(fisher.diagonal(), j.square().mean(0))
    if structure == "full":
        torch.testing.assert_close(fisher.to_dense(), j.mT @ j / N)
    assert {e.rule for e in fisher.coverage().entries} <= {"lstm", "gru", "rnn_tanh", "rnn_relu", "linear"}


@pytest.mark.parametrize("form", ["lstm", "gru", "tanh"])
@pytest.mark.parametrize(("first", "learned"), [(False, False), (True, True)])
def test_rows__with_steps_first_and_with_learned_states(form: str, first: bool, learned: bool) -> None:
    if form == "tanh" and learned:
        pytest.skip("two layers, one state")
    model, (x, _, y) = Net(form, first=first, learned=learned).double(), data()
    j = by_hand.rows(model, (x, y))
    fisher = fk.EmpiricalFisher(model, (x, y), structure="full")
    torch.testing.assert_close(fisher.to_dense(), j.mT @ j / N)


@pytest.mark.parametrize("form", ["lstm", "gru"])
@pytest.mark.parametrize("frozen", [False, True])
def test_learned_state__after_an_example_by_itself(form: str, frozen: bool) -> None:
    class Started(Net):
        def __init__(self) -> None:
            super().__init__(form, learned=True)
            self.start = nn.Parameter(torch.randn(4))

    torch.manual_seed(0)
    net = Started().double()
    net.rnn.requires_grad_(not frozen)
    x, y = torch.randn(N, 5, 3, dtype=F64), torch.randint(3, (N,))
    optimizer = fk.optim.NaturalGradient(net, lr=1.0, kind="ef", damping=1e-2)
    net(x[:1])
    with optimizer.paused():
        j = by_hand.rows(net, (x, y))
    chosen = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in net.parameters()])
    fisher = fk.EmpiricalFisher(net, [(x[:1], y[:1]), (x[1:], y[1:])])
    torch.testing.assert_close(fisher.to_dense(), j.mT @ j / N, rtol=1e-9, atol=1e-12)
    step = by_hand.stepped(net, optimizer, x, y)[chosen]
    torch.testing.assert_close(step, by_hand.natural(j, 1e-2), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["lstm projected", "gru both ways"])
def test_exact__is_the_reference_s(form: str) -> None:
    model, (x, _, y) = Net(form).double(), data()
    fisher = fk.ExactFisher(model, (x, y), structure="full")
    torch.testing.assert_close(fisher.to_dense(), by_hand.fisher(model, (x, y), "exact"))


@pytest.mark.parametrize("names", [["rnn.weight_hh_l0"], ["rnn.bias_ih_l0"], ["rnn.weight_ih_l1", "rnn.bias_hh_l0"]])
def test_rows__of_some_parameters(names: list[str]) -> None:
    model, (x, _, y) = Net("gru both ways").double(), data()
    j = by_hand.rows(model, (x, y))
    space = fk.EmpiricalFisher(model, (x, y), structure="diagonal").space
    fisher = fk.EmpiricalFisher(model, (x, y), structure="diagonal", params=lambda name, _: name in names)
    expected = [j[:, space.slices[name]] for name in fisher.space.names]
    torch.testing.assert_close(fisher.diagonal(), torch.cat(expected, 1).square().mean(0))


def test_kfac__has_a_pair_for_each_linear_map() -> None:
    model, (x, _, y) = Net("lstm").double(), data()
    fisher = fk.EmpiricalFisher(model, (x[:1], y[:1]), structure="kfac", params=lambda name, _: name.endswith("hh_l0"))
    assert [e.parameters for e in fisher.coverage().entries] == [("rnn.weight_hh_l0", "rnn.bias_hh_l0")]
    assert {e.structure for e in fisher.coverage().entries} == {"kfac"}


def unrolled(rnn: nn.RNNBase, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs of one example and one layer, step by step; both maps' inputs, with 1 for the bias, and outputs."""
    w, u, b, c = (getattr(rnn, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    one, h, cell = x.new_ones(1), x.new_zeros(4), x.new_zeros(4)
    of_inputs, of_states, from_inputs, from_states, found = [], [], [], [], []
    for x_t in x:
        i, s = w @ x_t + b, u @ h + c
        of_inputs.append(torch.cat([x_t, one]))
        of_states.append(torch.cat([h.detach(), one]))
        from_inputs.append(i)
        from_states.append(s)
        if isinstance(rnn, nn.LSTM):
            keep, forget, new, out = (i + s).chunk(4)
            cell = forget.sigmoid() * cell + keep.sigmoid() * new.tanh()
            h = out.sigmoid() * cell.tanh()
        elif isinstance(rnn, nn.GRU):
            (r, z, new), (r_h, z_h, new_h) = i.chunk(3), s.chunk(3)
            r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
            h = (1 - z) * (new + r * new_h).tanh() + z * h
        else:
            h = (i + s).tanh()
        found.append(h)
    return torch.stack(found), of_inputs, of_states, from_inputs, from_states


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_kfac__factors_are_those_of_the_unrolled_maps(layer: type[nn.RNNBase], structure: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Module()
        model.rnn, model.head = layer(3, 4, batch_first=True), nn.Linear(4, 3)
        model.forward = lambda x: model.head(model.rnn(x)[0].sum(1))
        model.double()
    x, _, y = data()
    inputs, states, at_inputs, at_states, per_example = [], [], [], [], []
    for n in range(N):
        found, of_inputs, of_states, from_inputs, from_states = unrolled(model.rnn, x[n])
        loss = F.cross_entropy(model.head(found.sum(0))[None], y[n : n + 1])
        gradients = torch.autograd.grad(loss, [*from_inputs, *from_states])
        inputs, states = [*inputs, *of_inputs], [*states, *of_states]
        at_inputs += gradients[: len(of_inputs)]
        at_states += gradients[len(of_inputs) :]
        per_example.append(gradients)
    fisher = fk.EmpiricalFisher(model, (x, y), structure=structure)
    steps = x.shape[1]
    for kind, a, g, first in (("ih", inputs, at_inputs, 0), ("hh", states, at_states, steps)):
        names = (f"rnn.weight_{kind}_l0", f"rnn.bias_{kind}_l0")
        assert fisher.coverage().entries[["ih", "hh"].index(kind)].parameters == names
        stacked, back = torch.stack(a), torch.stack(g)
        on_inputs, on_outputs = stacked.mT @ stacked / len(a), back.mT @ back / N
        expected = torch.kron(on_outputs, on_inputs)  # rows of the weight with their bias behind them
        if structure == "ekfac":
            u, v = (torch.linalg.eigh(factor).eigenvectors for factor in (on_outputs, on_inputs))
            basis = torch.kron(u, v)
            whole = torch.stack([
                sum(torch.outer(one[first + t], stacked[n * steps + t]) for t in range(steps)).flatten()
                for n, one in enumerate(per_example)
            ])  # fmt: skip
            expected = basis @ (basis.mT @ whole.mT).square().mean(1).diag() @ basis.mT
        place = torch.cat([torch.arange(fisher.size)[fisher.space.slices[name]] for name in names])
        width = stacked.shape[1]
        order = torch.cat([  # weights, then biases
            torch.arange(len(expected)).reshape(-1, width)[:, :-1].flatten(),
            torch.arange(len(expected)).reshape(-1, width)[:, -1],
        ])  # fmt: skip
        torch.testing.assert_close(fisher.to_dense()[place][:, place], expected[order][:, order])


def test_steps__are_judged_by_torch_s_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with the kernel's outputs and other gradients have no rule."""
    step = recurrent._STEPS["rnn_tanh"]

    def wrong(*args: Tensor) -> tuple[Tensor, Tensor]:
        h, c = step(*args)
        return h.detach() + 0.5 * (h - h.detach()), c

    monkeypatch.setitem(recurrent._STEPS, "rnn_tanh", wrong)
    model, (x, _, y) = Net("tanh").double(), data()
    fisher = fk.EmpiricalFisher(model, (x, y), structure="diagonal")
    torch.testing.assert_close(fisher.diagonal(), by_hand.rows(model, (x, y)).square().mean(0))
    assert "loop" in {e.rule for e in fisher.coverage().entries}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func._overloadpacket) in ("aten.mm", "aten.addmm", "aten.bmm", "aten.matmul")
        return func(*args, **(kwargs or {}))


def test_cost__does_not_grow_with_examples() -> None:
    model, (x, _, y) = Net("gru").double(), data()
    counts = []
    for times in (1, 5):
        many = x.repeat(times, 1, 1), y.repeat(times)
        fk.EmpiricalFisher(model, many, structure="diagonal")  # of a size that is new, two examples are looked at alone
        with Products() as found:
            fk.EmpiricalFisher(model, many, structure="diagonal")
        counts.append(found.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("form", ["lstm", "gru without bias"])
def test_optimizer__the_gradient_and_rows_are_those_of_the_model(form: str) -> None:
    model, (x, _, y) = Net(form).double(), data()
    j = by_hand.rows(model, (x, y))
    optimizer = fk.optim.NaturalGradient(model, 1.0, kind="ef", damping=0.1)
    step = by_hand.stepped(model, optimizer, x, y)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, j.mean(0))
    torch.testing.assert_close(step, by_hand.natural(j, 0.1))


class Checkpointed(Net):
    """Computed again in the backward pass."""

    def __init__(self, form: str, embedded: bool) -> None:
        super().__init__(form)
        self.before = nn.Linear(3, 3) if embedded else nn.Identity()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if not hasattr(self, "before"):
            return super().forward(x)
        return checkpoint(super().forward, self.before(x), use_reentrant=False)


@pytest.mark.parametrize("form", ["lstm", "gru", "tanh", "lstm projected"])
@pytest.mark.parametrize("embedded", [False, True])
def test_rows__of_a_checkpointed_layer(embedded: bool, form: str) -> None:
    model, (x, _, y) = Checkpointed(form, embedded).double(), data()
    expected = by_hand.rows(model, (x, y)).square().mean(0)
    for structure in ("full", "diagonal"):
        fisher = fk.EmpiricalFisher(model, (x, y), structure=structure)
        torch.testing.assert_close(fisher.diagonal(), expected)
    fisher = fk.EmpiricalFisher(model, (x, y), structure="ekfac")
    found = fisher.space.unflatten(fisher.diagonal())
    for name, right in fisher.space.unflatten(expected).items():
        if name.startswith("rnn"):
            torch.testing.assert_close(found[name], right)
    torch.testing.assert_close(fisher.trace(), expected.sum())


def test_dropout__between_layers_is_named_by_an_optimizer() -> None:
    with torch.random.fork_rng(devices=[]):
        model = Net("gru without bias").train()
        model.rnn.dropout = 0.3
        optimizer = fk.optim.NaturalGradient(model, lr=0.1, gram_damping=1e-2)
        x, _, y = data()
        with pytest.raises(fk.ModelError, match="active dropout"):
            F.cross_entropy(model(x.float()), y).backward()
        optimizer.close()


class Moved(Net):
    """Another example's inputs in the place of one's own, packed."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(x.roll(1, 0), lengths)


class LastState(Net):
    """Of packed sequences the last state alone; counts its passes."""

    passes = 0

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.passes += 1
        lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        _, end = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return self.head((end[0] if isinstance(end, tuple) else end)[-1])


@pytest.mark.parametrize("form", ["lstm", "gru"])
def test_packed__examples_are_compared_in_parts_of_the_batch(form: str) -> None:
    model, (x, lengths, y) = LastState(form).double(), [one.repeat_interleave(4, 0) for one in data()]
    for _ in range(2):
        fk.EmpiricalFisher(model, ((x, lengths), y), structure="diagonal")
    model.passes = 0
    fk.EmpiricalFisher(model, ((x, lengths), y), structure="diagonal")
    assert model.passes < len(x)


@pytest.mark.parametrize("form", ["lstm", "gru"])
def test_packed__inputs_of_other_examples_are_refused(form: str) -> None:
    x, lengths, y = data()
    with pytest.raises(fk.ModelError, match="influence"):
        fk.EmpiricalFisher(Moved(form).double(), ((x, lengths), y), structure="diagonal")


class ByNumbers(nn.Module):
    """Lengths, or the batch's numbers, that real numbers of other examples decide."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head, self.what = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3), what

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.what == "own":
            lengths = (x[:, :, 0] > 0).sum(1).clamp_min(1)
        elif self.what == "most":  # a threshold that one example decides
            lengths = lengths - (x.amax() > 2.5).long() * (lengths > 1)
        elif self.what == "size":
            x = x * (1 + 0.1 * (pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)[1][0] > 6))
        elif self.what == "mean":
            x = x - x.mean(0)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][-1])


@pytest.mark.parametrize("what", ["own", "plain", "most", "size", "mean"])
@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_packed__by_real_numbers_is_exact_or_refused(what: str, structure: str) -> None:
    model, (x, lengths, y) = ByNumbers(what).double(), data()
    x[4, 2, 1] = 3.0  # not of the first two examples
    if what in ("own", "plain"):
        j = by_hand.rows(model, ((x, lengths), y))
        fisher = fk.EmpiricalFisher(model, ((x, lengths), y), structure=structure)
        torch.testing.assert_close(fisher.diagonal(), j.square().mean(0))
    else:
        with pytest.raises(fk.ModelError):
            fk.EmpiricalFisher(model, ((x, lengths), y), structure=structure)
