"""Models that `fully_shard` has sharded (FSDP2): what is measured on them is what is measured on the whole model."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fisherkit as fk
from tests import ranks
from tests.test_processes import network, own_data, whole_data

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac", "nkp")


def sharded(model: nn.Module) -> nn.Module:
    """By layers and then the rest, as users do."""
    for module in list(model.modules())[1:]:
        if isinstance(module, nn.Linear) and module.out_features > 4:
            fully_shard(module)
    return fully_shard(model)  # type: ignore[return-value]


class Tied(nn.Module):
    """A language model whose head is its embedding, and that holds a method of a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.hidden = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.ones(5))
        self.inner = self.hidden.forward

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.inner(self.embedding(x)) + self.shift))
        return found


def tokens(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, 7, (6, 4), generator=g), torch.randint(0, 7, (6, 4), generator=g)
    return [(x[rank::size], y[rank::size])]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def kinds(rank: int, size: int) -> dict[str, float]:
    worst, model = {}, sharded(network())
    known = dict(model.named_parameters())
    for structure in STRUCTURES:
        for shard in (False, True) if structure != "full" else (False,):
            one = fk.TruncatedFisher(network(), [whole_data()], structure=structure, group=False)
            fisher = fk.TruncatedFisher(model, own_data(rank, size), structure=structure, shard=shard)
            assert fisher.metadata["parameters_hash"] == one.metadata["parameters_hash"]
            worst[f"{structure}, shard={shard}"] = distance(fisher.to_dense(), one.to_dense())
    plain, tied = Tied().double(), fully_shard(Tied().double())
    for structure in ("diagonal", "ekfac"):
        one = fk.EmpiricalFisher(plain, tokens(0, 1), structure=structure, group=False)
        found = fk.EmpiricalFisher(tied, tokens(rank, size), structure=structure)
        worst[f"tied, {structure}"] = distance(found.to_dense(), one.to_dense())
    gradient = fk.evaluation.loss_gradient(model, [whole_data()])
    worst["gradient"] = distance(gradient, fk.evaluation.loss_gradient(network(), [whole_data()]))
    assert fk.parameters_hash(model) == fk.parameters_hash(network())
    for name, parameter in model.named_parameters():
        assert parameter is known[name]
        assert isinstance(parameter, DTensor)
        assert parameter.grad is None
    return worst


def scores(rank: int, size: int) -> dict[str, float]:
    worst, (x, y) = {}, whole_data()
    queries = x[:3] * 1.5, y[:3]
    for structure in ("diagonal", "ekfac", "full"):
        one = fk.EmpiricalFisher(network(), [(x, y)], structure=structure, group=False)
        model = sharded(network())
        # Of the full structure all rows must be in one process.
        own = [(x, y)] if structure == "full" else own_data(rank, size)
        fisher = fk.EmpiricalFisher(model, own, structure=structure, group=False if structure == "full" else None)
        expected = fk.influence.InfluenceScores(one, network()).scores([queries], [(x, y)])
        found = fk.influence.InfluenceScores(fisher, model).scores([queries], [(x, y)])
        worst[structure] = distance(found, expected)
    return worst


def training(rank: int, size: int) -> dict[str, float]:
    """Two steps with a penalty, whose gradient is taken before or after the forward pass: as of the whole model."""
    worst, (x, y) = {}, whole_data()
    x, y = x[:10], y[:10]
    loss = nn.functional.cross_entropy
    for structure in ("diagonal", "kfac"):
        for before in (True, False):
            ends = []
            for model, own in ((network(), slice(None)), (sharded(network()), slice(rank, None, size))):
                data = [whole_data()] if own == slice(None) else own_data(rank, size)
                group = False if own == slice(None) else None
                fisher = fk.EmpiricalFisher(model, data, structure=structure, group=group)
                ewc = fk.continual.EWC(model, strength=3.0)
                ewc.consolidate(fisher)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
                for _ in range(3):
                    optimizer.zero_grad()
                    if before:
                        total = ewc.penalty() + loss(model(x[own]), y[own])
                    else:
                        total = loss(model(x[own]), y[own]) + ewc.penalty()
                    total.backward()
                    optimizer.step()
                state = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.state_dict().values()]
                ends.append(torch.cat([p.detach().flatten() for p in state]))
            worst[f"{structure}, penalty {'before' if before else 'after'}"] = distance(ends[1], ends[0])
    return worst


def everything(rank: int, size: int) -> dict[str, float]:
    return kinds(rank, size) | scores(rank, size) | training(rank, size)


def test_fully_sharded__equals_the_whole_model() -> None:
    for one in ranks.run(2, everything):
        assert isinstance(one, dict), one
        assert max(one.values()) < 1e-10, one
