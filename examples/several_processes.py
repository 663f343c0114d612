"""A Fisher of several processes, each with its part of the data, of a model that they trained together.

    torchrun --nproc-per-node 2 examples/several_processes.py --out fisher.safetensors
    torchrun --nproc-per-node 2 examples/several_processes.py --fully-shard --out fisher.safetensors

On scikit-learn's digits. Every process trains on its share of the examples and takes the Fisher of the same share; what
comes out is the Fisher of all of them, the same in every process, and the first one saves it. With --fully-shard, each
process has a shard of the model (FSDP2) and some blocks of the Fisher, and they save it together.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fisherkit as fk


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fisher.safetensors"), help="the file (default: %(default)s)")
    parser.add_argument("--structure", default="ekfac", help="of the Fisher (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="of training (default: %(default)s)")
    parser.add_argument("--fully-shard", action="store_true", help="leave each process a shard of model and Fisher")
    args = parser.parse_args(arguments)

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    x = torch.tensor(digits.data[rank::size] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[rank::size])
    data = list(zip(x.split(128), y.split(128), strict=True))

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    shares = contextlib.nullcontext()
    if args.fully_shard:  # processes must have as many batches
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
        shares = model.join()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with shares:  # of different lengths
        for _ in range(args.epochs):
            for inputs, labels in data:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()

    fisher = fk.ImprovedEmpiricalFisher(model.eval(), data, structure=args.structure, shard=args.fully_shard)
    trace = fisher.trace()  # asked in all processes, as each has some blocks
    if args.fully_shard or rank == 0:
        fisher.save(args.out)
    if rank == 0:
        print(f"{fisher.examples} examples in {size} processes, trace {trace:.4g}: {args.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
