"""bergson's factors, and its store of projected gradients, for a language model. Knows its interface and no Fisher.

Its data are sequences whose labels are their next tokens, and it counts no last position. So sequences get one more
token, which no other position sees, and the model one more position: then what counts is what everybody else counts.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FACTORS = {"a": "activation_sharded", "g": "gradient_sharded"}
EIGEN = {"a": "eigen_activation_sharded", "g": "eigen_gradient_sharded", "values": "eigenvalue_correction_sharded"}
"""Where results lie, by side."""

Results = dict[str, dict[str, Tensor]]
"""By side and layer."""


class Causal(nn.Module):
    """A decoder in the form that bergson takes: its ``base_model`` has the layers, its outputs have a name.

    Args:
        model: a `Decoder` of T positions.
    """

    device: torch.device

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        base: Any = copy.deepcopy(model)
        known = base.position.weight.detach()
        base.position = nn.Embedding.from_pretrained(torch.cat([known, torch.zeros_like(known[:1])]))
        base.device = self.device = known.device
        base.requires_grad_(False)  # as bergson leaves a model that it loads
        base.embed.requires_grad_(True)
        self.base_model, self.dtype = base, known.dtype

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        """Logits ``[B, T + 1, C]``."""
        return SimpleNamespace(logits=self.base_model(tokens))


class Bergson:
    """Its runs over a model's data, whose results lie in a folder that lives as long.

    Args:
        model: a `Decoder` of T positions.
        tokens: ``[N, T]``.
        labels: ``[N, T]``.
        batch: sequences in a batch.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, labels: Tensor, batch: int) -> None:
        # By name: a library that need not be there has no types to check.
        self.library = importlib.import_module("bergson")
        self.fitting = importlib.import_module("bergson.hessians.hessian_approximations")
        self.model, none = Causal(model), torch.zeros_like(tokens[:, :1])
        columns = {"input_ids": torch.cat([tokens, none], 1), "labels": torch.cat([none, labels], 1)}
        made = importlib.import_module("datasets").Dataset.from_dict
        self.data = made({name: column.tolist() for name, column in columns.items()})
        self.batches = [places.tolist() for places in torch.arange(len(tokens)).split(batch)]
        self.folder = tempfile.TemporaryDirectory()

    def factors(self, *, corrected: bool, empirical: bool) -> Results:
        """Of kfac the sums for its factors; of ekfac eigenvectors and eigenvalues, these as means over sequences.

        Args:
            corrected: ekfac.
            empirical: observed labels instead of drawn ones.
        """
        settings = self._settings()
        asked = self.fitting.HessianConfig(method="kfac", ev_correction=corrected, use_dataset_labels=empirical)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fitting.fit_factored_hessians(
                self.model, self.data, settings, asked, target_modules=None, attention_cfgs={}, batches=self.batches,
                path=str(settings.partial_run_path), do_eigendecomposition=corrected,
            )  # fmt: skip
        folders = EIGEN if corrected else FACTORS
        return {k: load_file(settings.partial_run_path / v / "shard_0.safetensors") for k, v in folders.items()}

    def project(self, width: int) -> None:
        """Store every sequence's gradient, each layer's projected to ``width`` × ``width`` numbers."""
        settings = self._settings(projection_dim=width)
        processor = self.library.GradientProcessor(projection_dim=width, include_bias=True)
        self.library.collect_gradients(self.model, self.data, processor, settings, batches=self.batches)

    def _settings(self, **options: Any) -> Any:
        found = self.library.IndexConfig(run_path=f"{self.folder.name}/run", include_bias=True, **options)
        found.partial_run_path.mkdir(exist_ok=True)
        return found
