"""Processes of a `torch.distributed` group that compute one thing together, each with its part of the data.

What they exchange goes through here: sums that add up, objects that one has and others need, and errors, so that what
goes wrong in one process is an error in all of them and not a wait without end. Nothing here knows what is computed.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import itertools
import os
import pickle
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fisherkit.errors import FisherkitError, InvalidTypeError, ProcessError, listed

K = TypeVar("K")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])

CPU = torch.device("cpu")

PATIENCE = 5.0
"""Seconds that processes whose exchange failed give one another to say so; who does not is named as lost."""

Group = Any
"""None for the default group where there is one, False for this process alone, or a ``torch.distributed`` group."""


class Processes:
    """The processes of a group (None for the default one), this one among them; tensors travel on the device.

    Without arguments this process alone, which exchanges nothing: what is everyone's is then its own.
    """

    def __init__(self, group: Group = False, device: torch.device = CPU) -> None:
        self.group, self.device = group, device
        self.rank, self.size = (0, 1) if group is False else (dist.get_rank(group), dist.get_world_size(group))

    @classmethod
    def of(cls, group: Group, call: str, device: torch.device = CPU) -> Processes:
        """Those of a group. A group that this process is not in is refused."""
        if group is False or not (dist.is_available() and dist.is_initialized()):
            if group not in (None, False):
                raise InvalidTypeError(
                    call, f"group={group!r}, and no process group is initialised", "a group, None or False",
                    try_="torch.distributed.init_process_group(...) first",
                )  # fmt: skip
            return ALONE
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise InvalidTypeError(
                call, f"group={group!r}", "a torch.distributed group that this process is in, None "
                "for the default group, or False for this process alone",
            )  # fmt: skip
        return cls(group, device) if dist.get_world_size(group) > 1 else ALONE

    def on(self, device: torch.device) -> Processes:
        """The same, whose tensors travel on another device."""
        return self if self.size == 1 else Processes(self.group, device)

    # -- exchanges; every process of the group must come to the same ones in the same order ----------------------------

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, the same to the last bit on each; in place if it can be."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        with self._connected():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gathered(self, value: T) -> list[T]:
        """Everyone's value, by rank; small objects and tensors on any device."""
        if self.size == 1:
            return [value]
        file, found, tensors = io.BytesIO(), list[Any]([None] * self.size), list[Tensor]()
        data, _ = _packed(value, tensors)
        if tensors:
            torch.save(tensors, file)
        with self._connected():
            dist.all_gather_object(found, (data, file.getvalue()), group=self.group)
        return [
            _Unpickler(io.BytesIO(own), torch.load(io.BytesIO(sent), self.device) if sent else ()).load()
            for own, sent in found
        ]

    def all_reduced(self, sums: T) -> T:
        """What all processes have added up."""
        return sums if self.size == 1 else sums.all_reduced(self)  # type: ignore[attr-defined]

    def stacked(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Everyone's rows, by rank, of which each rank has so many (``sizes``)."""
        whole = rows.new_zeros(sum(sizes), *rows.shape[1:])
        start = sum(sizes[: self.rank])
        whole[start : start + sizes[self.rank]] = rows
        return self.total(whole)

    def sent_by(self, rank: int, value: T | None) -> T:
        """One process's object, its tensors sent as they are and not by way of pickle."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        source = rank if self.group is None else dist.get_global_rank(self.group, rank)
        tensors: list[Tensor] = []
        packed: list[Any] = [None]
        if rank == self.rank:
            packed = [_packed(value, tensors)]
        with self._connected():
            dist.broadcast_object_list(packed, source, group=self.group)
            data, forms = packed[0]
            for place, (shape, dtype) in enumerate(forms):
                if rank != self.rank:
                    tensors.append(torch.empty(shape, dtype=dtype, device=self.device))
                dist.broadcast(tensors[place], source, group=self.group)
        if rank == self.rank:
            return value  # type: ignore[return-value]
        return _Unpickler(io.BytesIO(data), tensors).load()

    # -- working together ----------------------------------------------------------------------------------------------

    def each(self, what: str, function: Callable[[], T]) -> T:
        """Call a function that exchanges nothing in every process; an error in one is a ProcessError in all others."""
        if self.size == 1:
            return function()
        result: T | None = None
        error: Exception | None = None
        try:
            result = function()
        except Exception as own:  # noqa: BLE001  raised below, and told
            error = own
        errors = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = {rank: text for rank, text in enumerate(errors) if text is not None}
        if failed:
            texts = [f"rank {rank}: {text}" for rank, text in failed.items()]
            raise ProcessError(
                what, f"an error in {listed(f'rank {rank}' for rank in failed)} of {self.size}; {texts[0][:2000]}",
                "no error in any process", why="the result is that of all processes together",
                try_="what that process's own error says",
            )  # fmt: skip
        return result  # type: ignore[return-value]

    def by_first(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives that the first process alone calls; an error there is one in all of them."""
        own = self.each(what, lambda: function() if self.rank == 0 else None)
        return self.sent_by(0, own)

    def before(self, count: Callable[[], int]) -> int:
        """The sum of what the ranks before this one count."""
        return 0 if self.size == 1 else sum(self.gathered(self.each("counting examples", count))[: self.rank])

    def require_alike(self, call: str, tensor: Tensor) -> None:
        """Refuse to go on where processes come with different operands, or to different exchanges.

        Raises:
            ProcessError: in all of them.

        Cost: a few numbers from each process, and a wait for them.
        """
        if self.size == 1:
            return
        numbers = tensor.detach().flatten().double()
        places = torch.arange(len(numbers), dtype=torch.float64, device=tensor.device)
        marks = [zlib.crc32(call.encode()), *tensor.shape, *[0] * (3 - tensor.ndim)]
        own = torch.cat([torch.tensor(marks).to(numbers), numbers.sum()[None], (numbers @ places.cos())[None]])
        bounds = torch.cat([own, -own, numbers.norm()[None]])
        with self._connected():
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.group)
        largest, smallest, norm = bounds[: len(own)], -bounds[len(own) : -1], bounds[-1]
        allowed = 1e-6 * norm * (torch.arange(len(own), device=norm.device) >= len(marks))  # marks are exact
        if bool((largest - smallest > allowed).any()):
            raise ProcessError(
                call, "something else in some processes than in others", "the same in all of them",
                why="each process has a part of the rows, and the answer is put together of all parts",
                try_="the same operations with the same vectors in the same order in every process; group=False for a "
                "Fisher of this process's data alone",
            )  # fmt: skip

    def require_same(self, call: str, values: Callable[[], Mapping[str, object]], own: Any = None) -> list[Any]:
        """Everyone's ``own``, where all have the same values by name; a ProcessError in all of them where not."""
        if self.size == 1:
            return [own]
        answers = self.gathered(({name: str(value) for name, value in values().items()}, own))
        everyone = [texts for texts, _ in answers]
        for name in dict.fromkeys(name for one in everyone for name in one):
            first, *rest = (one.get(name, "nothing of that name") for one in everyone)
            others = {rank: text for rank, text in enumerate(rest, 1) if text != first}
            if others:
                got = "; ".join(f"rank {rank}: {text[:200]}" for rank, text in list(others.items())[:3])
                raise ProcessError(
                    call, f"different {name} in some processes (rank 0: {first[:200]}; {got})", "the same in all",
                    why="they compute one thing together", try_="group=False for a result of this process alone",
                )  # fmt: skip
        return [value for _, value in answers]

    def owners(self, costs: Mapping[K, float], load: list[float] | None = None) -> dict[K, int]:
        """Which rank has which key: the costliest first, to the rank that has least to do.

        Costs are the same in all processes; ``load`` is what each rank has to do already, and is changed.
        """
        load = [0.0] * self.size if load is None else load
        owner: dict[K, int] = {}
        for key, cost in sorted(costs.items(), key=lambda one: -one[1]):
            owner[key] = load.index(min(load))
            load[owner[key]] += cost
        return owner

    def shared_out(self, costs: Mapping[K, float], function: Callable[[K], T]) -> dict[K, T]:
        """A function of every key, each computed by its owner and sent to the others."""
        owner = self.owners(costs)
        own = self.each("sharing out work", lambda: {k: function(k) for k in costs if owner[k] == self.rank})
        return {key: self.sent_by(owner[key], own.get(key)) for key in costs}

    @contextlib.contextmanager
    def _connected(self) -> Any:
        """What a lost connection raises, said in words."""
        try:
            yield
        except FisherkitError:
            raise
        except RuntimeError as error:  # torch has no other class for all of them
            said = (str(error) or type(error).__name__).splitlines()[0]
            lost = self._lost(said)
            got = f"no answer from {lost} of {self.size}" if lost else f"a connection that failed: {said}"
            unknown = f"torch does not say which; not necessarily this one, rank {self.rank} of {self.size}"
            raise ProcessError(
                "an exchange between processes", got, "an answer from every process of the group",
                why="a process of the group has ended, hangs, or did not come to this exchange in time, and "
                + (f"torch says: {said}" if lost else unknown),
                try_=f"the output of {lost or 'the process that lacks this error, or that the launcher names first'}; "
                "a longer timeout= in init_process_group for slow ones",
            ) from error  # fmt: skip

    def _lost(self, error: str) -> str:
        """The ranks that do not say within `PATIENCE`, in the group's store, that it failed for them; "" if unknown.

        All connections are ended, as processes that wait for one another would not notice that a third one is lost.
        """
        group: Any = dist.group.WORLD if self.group is None else self.group
        others = [rank for rank in range(self.size) if rank != self.rank]
        found = [""]

        def ask() -> None:
            store, began = group.get_group_store(), time.monotonic()
            if dist.get_global_rank(group, 0) == 0 and not dist.is_torchelastic_launched():
                found[0] = "rank 0"  # which keeps the store; until that answers
            store.set(f"fisherkit/{self.rank}", error)
            for rank in others:
                with contextlib.suppress(RuntimeError):
                    work: Any = dist.irecv(torch.empty(1), group=group, group_src=rank)
                    work.wait(datetime.timedelta(milliseconds=1))
            for pause in [PATIENCE / 100] * 100:
                silent = [rank for rank in others if not store.check([f"fisherkit/{rank}"])]
                found[0] = ", ".join(f"rank {rank}" for rank in silent)
                if not silent or (len(silent) == 1 and time.monotonic() - began > PATIENCE / 5):
                    break
                time.sleep(pause)

        def asked() -> None:
            with contextlib.suppress(Exception):  # of a store that has ended
                ask()

        thread = threading.Thread(target=asked, daemon=True)  # as a store that hangs with its process has no timeout
        thread.start()
        thread.join(1.2 * PATIENCE)
        return found[0]


ALONE = Processes()
"""This process, where no other has a part in it."""


def in_all(call: str) -> Callable[[F], F]:
    """Of a constructor that takes ``group=``: what it raises in one process is an error in all of the group."""

    def decorated(init: F) -> F:
        @functools.wraps(init)
        def made(self: Any, *args: Any, **options: Any) -> None:
            processes = Processes.of(options.get("group"), call)
            processes.each(call, lambda: init(self, *args, **options))

        return cast(F, made)

    return decorated


class Share:
    """One process's part of data that all processes have: of its batches, those of ``batches[start:stop:step]``.

    Every iteration is a new pass over the data.
    """

    def __init__(self, batches: Iterable[Any], start: int, stop: int | None = None, step: int = 1) -> None:
        self.batches, self.span = batches, (start, stop, step)

    def __iter__(self) -> Iterator[Any]:
        """One pass."""
        return itertools.islice(iter(self.batches), *self.span)


def world_size() -> int:
    """How many processes torchrun says that it has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def started(device: str) -> Iterator[tuple[int, int]]:
    """The group of processes that torchrun has started, while it is needed: this one's rank, and how many there are.

    (0, 1) where nothing says that there are others.
    """
    if world_size() == 1:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


class _Packer(pickle.Pickler):
    """A pickler that leaves tensors out."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors, self._places = tensors, dict[int, int]()

    def persistent_id(self, obj: object) -> int | None:
        if type(obj) is not Tensor or obj.layout != torch.strided:
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self._tensors)
            self._tensors.append(obj.detach().contiguous())
        return self._places[id(obj)]


class _Unpickler(pickle.Unpickler):
    """Its inverse."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def _packed(value: object, tensors: list[Tensor]) -> tuple[bytes, list[tuple[torch.Size, torch.dtype]]]:
    """An object without its tensors, which go into the list, and what these look like."""
    file = io.BytesIO()
    _Packer(file, tensors).dump(value)
    return file.getvalue(), [(t.shape, t.dtype) for t in tensors]
