"""A model's state, told from any other: a hash of what it computes with.

Owns the hash; reads models and changes nothing about them. Knows no Fisher matrix.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherkit.adapters import products
from fisherkit.arguments import check_type
from fisherkit.errors import InvalidArgumentError
from fisherkit.wrappers import COMPILED, PARALLEL, full, plain, unwrapped

CHECKSUM = "checksum"
"""The key of a state's own hash."""

_COLUMNS = 1024
_SMALL = 1 << 20
"""Bytes of a model up to which it is copied, which takes less time than a hash."""


def parameters_hash(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and values of a model's parameters and buffers: which weights these are.

    Fisher files record it at build as ``parameters_hash``, so that ``fk.parameters_hash(model)`` tells whether a model
    is the one that was measured. Buffers count, also those that a checkpoint leaves out; gradients, train/eval flags
    and ``requires_grad`` do not. The same on every device, and for a model that is compiled or wrapped for data
    parallelism as for the model inside; of a model of which each process has a shard (`fully_shard`), which all must
    ask, as of the whole one. A long tensor enters by exact sums of its 64-bit words,
    along rows and along columns of 1,024, and not byte by byte: training steps, casts, permutations and swaps show, but
    nothing here resists someone who seeks two models with one hash. The page on the file format has the definition.

    Args:
        model: any module; not changed.

    Returns:
        64 hexadecimal digits.

    Raises:
        InvalidTypeError: not a module.

    Cost: reads every value twice, on its device, and moves about a thousandth of them to the CPU.
    """
    check_type("parameters_hash(model)", "", model, nn.Module, "a torch.nn.Module")
    return tensors_hash({plain(name): tensor for name, tensor in _tensors(unwrapped(model)).items()})


def _tensors(model: nn.Module, own: Mapping[str, nn.Parameter] | None = None) -> dict[str, Tensor]:
    found = itertools.chain(model.named_parameters() if own is None else own.items(), model.named_buffers())
    return {name: full(tensor) for name, tensor in found}


def weight_hashes(
    model: nn.Module, names: Sequence[str], own: Mapping[str, nn.Parameter] | None = None
) -> tuple[Callable[[], tuple[str, str]], int]:
    """`parameters_hash` of the model inside of all wrappers, and `tensors_hash` of some parameters, as they are now.

    A base weight that stands for W + s·BA of its adapters (`fisherkit.adapters`) counts with that value. Of a small
    model without frozen weights, a copy is hashed when it is asked for, whose bytes are given too. ``own`` are the
    model's parameters by name, if they are known.
    """
    own = dict(model.named_parameters()) if own is None else own
    tensors, made = _tensors(model, own), products(model, names)
    usual = len(names) == len(own) and not made
    usual = usual and all(type(t) in (nn.Parameter, Tensor) and t.layout == torch.strided for t in tensors.values())
    if usual and (size := sum(t.numel() * t.element_size() for t in tensors.values())) <= _SMALL:
        with torch.no_grad():
            tensors = {name: t.clone() for name, t in tensors.items()}
        return functools.cache(lambda: _weight_hashes(tensors, names, made)), size
    found = _weight_hashes(tensors, names, made)
    return lambda: found, 0


def _weight_hashes(tensors: Mapping[str, Tensor], names: Sequence[str], made: Mapping[str, Any]) -> tuple[str, str]:
    bare = {plain(name): tensor for name, tensor in tensors.items()}
    digests = _digests(bare)
    whole = _hash(bare, digests)
    if not made and len(names) == len(tensors) and bare.keys() == tensors.keys():
        return whole, whole
    some = {name: tensors[name] for name in names}
    some |= {name: torch.empty(p.base.shape, dtype=p.dtype, device="meta") for name, p in made.items()}
    known = {name: digests[plain(name)] for name in some if name not in made}
    return whole, _hash(some, known | _digests({name: some[name] for name in made}, lambda name: made[name].value()))


def tensors_hash(tensors: Mapping[str, Tensor], read: Callable[[str], Tensor] | None = None) -> str:
    """`parameters_hash` of any named tensors, whose values ``read`` gives one after the other, if there is one."""
    return _hash(tensors, _digests(tensors, read))


def _hash(tensors: Mapping[str, Tensor], digests: Mapping[str, bytes]) -> str:
    """SHA-256 of names, dtypes, shapes and digests."""
    names = sorted(tensors)
    digest = _header(tuple((name, tensors[name].dtype, tensors[name].shape) for name in names)).copy()
    for name in names:
        digest.update(digests[name])
    return digest.hexdigest()


@functools.lru_cache(8)
def _header(described: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> Any:
    """SHA-256 of what is known of tensors before their values."""
    listed = [[name, str(dtype).removeprefix("torch."), list(shape)] for name, dtype, shape in described]
    return hashlib.sha256(json.dumps(listed).encode())


def _digests(tensors: Mapping[str, Tensor], read: Callable[[str], Tensor] | None = None) -> dict[str, bytes]:
    """The bytes that stand for each tensor's values."""
    found: dict[str, list[bytes]] = {name: [] for name in tensors}
    moved: list[tuple[str, Tensor]] = []
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            own = (tensor if read is None else read(name)).detach()
            for piece in [own.numpy()] if _is_short(own) else _digestible(own):
                if isinstance(piece, Tensor):
                    moved.append((name, piece))
                else:
                    found[name].append(piece.tobytes())
        # One transfer for all tensors in a row on one device.
        for _, group in itertools.groupby(moved, key=lambda pair: pair[1].device):
            names, pieces = zip(*group, strict=True)
            arrays = torch.cat(pieces).cpu().numpy()
            ends = itertools.accumulate(map(len, pieces))
            for name, array in zip(names, np.split(arrays, list(ends)[:-1]), strict=True):
                found[name].append(array.tobytes())
    return {name: b"".join(parts) for name, parts in found.items()}


def state_hash(state: Any) -> str:
    """SHA-256 of mappings and sequences of tensors, numbers, strings and None, such as a state dict.

    The order of a mapping does not count, nor whether a sequence is a list or a tuple.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[f"{len(tensors):09}"] = value
            return ["tensor", len(tensors)]
        if isinstance(value, Mapping):
            return {"mapping": [[repr(key), plain(value[key])] for key in sorted(value, key=repr)]}
        if isinstance(value, (list, tuple)):
            return {"sequence": [plain(item) for item in value]}
        return value

    text = json.dumps(plain(state), default=repr)
    return hashlib.sha256(f"{tensors_hash(tensors)} {text}".encode()).hexdigest()


def with_checksum(state: dict[str, Any]) -> dict[str, Any]:
    """A state for a file whose format compares nothing, with its `state_hash` under `CHECKSUM`."""
    return state | {CHECKSUM: state_hash(state)}


def check_checksum(state: Any, call: str) -> None:
    """Compare a state with its checksum; one that has none, as before they were introduced, is let pass."""
    if isinstance(state, Mapping) and CHECKSUM in state:
        own = {key: value for key, value in state.items() if key != CHECKSUM}
        check_hash(own, state[CHECKSUM], CHECKSUM, call)


def check_hash(state: Any, known: Any, key: str, call: str) -> None:
    """Compare a state with a hash of it."""
    if state_hash(state) != known:
        held = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise InvalidArgumentError(
            call, f"a state of {held} that is not what state_dict() gave, by its checksum",
            "one that nothing has changed since",
            why="the file is damaged, or the state's tensors were changed in place",
            try_=f"another copy of the file; if the change is meant, take {key!r} out of the state",
        )  # fmt: skip


def measured_at(model: nn.Module, metadata: Mapping[str, str]) -> bool | None:
    """Whether a Fisher was measured at a model's present weights; None if it does not say at which it was."""
    known = metadata.get("parameters_hash")
    if known is None:
        return None
    if known == parameters_hash(model):
        return True
    # Older files of wrapped models have the hash under the wrappers' names.
    tensors = _tensors(unwrapped(model))
    prefixes = ("", PARALLEL, f"{COMPILED}.")
    return any(
        known == tensors_hash({prefix + name: tensor for name, tensor in tensors.items()}) for prefix in prefixes
    )


def _is_short(tensor: Tensor) -> bool:
    """Whether a tensor's bytes, as NumPy has them, stand for it as they are."""
    plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    known = plain and tensor.dtype in _OF_NUMPY and not tensor.is_conj() and not tensor.is_neg()
    return known and tensor.numel() * tensor.element_size() < 8 * _COLUMNS


_OF_NUMPY = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool}


def _digestible(tensor: Tensor) -> Iterator[Any]:
    """Bytes that stand for a tensor's values: sums of whole rows of words, then what is left over.

    Arrays on a processor, where the sums of a small tensor take less time than a kernel's call; tensors elsewhere.
    """
    for values in _dense_parts(tensor):
        flat = values.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
        data: Any = flat.numpy() if flat.device.type == "cpu" else flat
        byte, word = (np.uint8, np.int64) if flat.device.type == "cpu" else (torch.uint8, torch.int64)
        whole = len(data) - len(data) % (8 * _COLUMNS)
        if whole:
            main = data[:whole]
            aligned = not isinstance(main, Tensor) or main.storage_offset() % 8 == 0
            words = (main if aligned else main.clone()).view(word).reshape(-1, _COLUMNS)
            # Integer sums wrap around, and so are the same in any order and on any device.
            yield words.sum(1).view(byte)
            yield words.sum(0).view(byte)
        yield data[whole:] if flat.device.type == "cpu" else data[whole:].clone()  # a view would keep the whole tensor


def _dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors in memory that a tensor of any layout consists of; none of one without values."""
    if tensor.is_meta:
        return
    if tensor.layout == torch.strided:
        yield tensor.dequantize() if tensor.is_quantized else tensor
    elif tensor.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        entries = tensor.to_sparse_coo().coalesce()
        yield entries.indices()
        yield entries.values()
    else:
        yield tensor.to_dense()
