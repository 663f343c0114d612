"""Peak memory of a Fisher of a language model with a large vocabulary, beside a training step's, in fresh processes.

    python -m examples.vocabulary                # a decoder of 4 layers, 256 wide, V = 8,192 and 32,768
    python -m examples.vocabulary --vocabularies 8192 --sequences 4

A training step is one forward and one backward pass of the same batch and a step of plain SGD over all parameters; the
Fishers are over the weights of the layers. Peaks are of resident memory above what there is when model and data are in
place, where glibc gives freed blocks back at once. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import fisherkit as fk
from examples.benchmarks.memory import STEADY, Peak, run_module

WIDTH, LAYERS, HEADS = 256, 4, 4
FISHERS = (("ef", "diagonal"), ("ef", "kfac"), ("ef", "ekfac"), ("sf", "ekfac"))
GOAL = 1.3


class Layer(nn.Module):
    """Causal attention and a gated perceptron, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.gate_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.queries, self.keys, self.values, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        read = self.attention_norm(x)
        q, k, v = (
            part(read).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.queries, self.keys, self.values)
        )
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        read = self.gate_norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(read)) * self.up(read))


class Decoder(nn.Module):
    """Tokens to the outputs of the next ones."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, V]."""
        return self.head(self.layers(self.words(tokens)))


def prepared(what: str, vocabulary: int, sequences: int, length: int) -> Callable[[], object]:
    """A training step, or a Fisher "kind:structure", of a model and a batch that are in place."""
    torch.manual_seed(0)
    model, tokens = Decoder(vocabulary), torch.randint(vocabulary, (sequences, length + 1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()

    def fisher() -> object:
        kind, structure = what.split(":")
        own = [name for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2]
        return fk.FisherApproximation(model, (inputs, labels), kind, params=own, structure=structure)

    return step if what == "train" else fisher


def peak(what: str, vocabulary: int, sequences: int, length: int) -> int:
    """Bytes, in a process of its own."""
    arguments = ["--child", what, "--vocabularies", vocabulary, "--sequences", sequences, "--length", length]
    return int(run_module("examples.vocabulary", list(map(str, arguments)), STEADY)["peak"])


def main() -> None:
    """Print the table; as the child process, one peak as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = options.sequences, options.length
    if options.child:
        prepared(options.child, 64, 2, 8)()  # what is imported late
        run = prepared(options.child, options.vocabularies[0], *size)
        before = Peak("cpu")
        run()
        print(json.dumps({"peak": before.bytes()}))
        return
    print("| V | training step | " + " | ".join(f"{kind}, {structure}" for kind, structure in FISHERS) + " |")
    print("|" + "---|" * (2 + len(FISHERS)))
    for vocabulary in options.vocabularies:
        train = peak("train", vocabulary, *size)
        shares = (peak(":".join(fisher), vocabulary, *size) / train for fisher in FISHERS)
        print(f"| {vocabulary:,} | {train / 1e6:,.0f} MB | {' | '.join(f'{share:.2f} ×' for share in shares)} |")


if __name__ == "__main__":
    main()
