"""Several processes that share a run and speak through gloo, as torch has it."""

import io
import pickle
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mgvq.checks import short_words
from mgvq.errors import SharedFault, UserError
from mgvq.ranks.ranks import Ranks

T = TypeVar("T")
K = TypeVar("K")
# Others wait while the first process evaluates, for hours; that one has died is told by its connection, and at once.
_START = timedelta(minutes=5)
_LONGEST = timedelta(days=30)
_ERROR = 0  # what a process that has failed tells in place of the name of the call that the others are at


class Gloo(Ranks):
    """The process `rank` of `size`, which meet at `MASTER_ADDR` and `MASTER_PORT`, as torchrun sets them.

    They are a group of their own, and not the one that torch knows as the process's: libraries that find such a one
    (transformers, lmms-eval) share out work that is not theirs to share.

    What is exchanged goes through the memory of the CPU, also where a model is on an accelerator: sums are of a fixed order,
    which no reduction of NCCL has, and there is one way for both kinds of device. Tensors come out on the kind of device on which
    they went in.

    Before every exchange the processes tell each other where they are. One that has failed tells that instead, then all of them
    what has happened: those that are well raise the error of the first that is not. Raises SharedFault where another process has
    died, or is not found in five minutes, and RuntimeError where processes have come to different calls.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        try:
            store = next(rendezvous("env://", rank, size, timeout=_START))[0]
            own = PrefixStore("mgvq", store)
            self._group: Any = dist.ProcessGroupGloo(own, rank, size, _LONGEST)  # torch's stubs do not know what it can do
        except (RuntimeError, ValueError) as error:
            raise SharedFault(
                f"the {size} processes of this run do not find each other ({short_words(error)}): start them by torchrun."
            ) from error
        self._in_step = True  # whether the others can be expected where this one is: not after an exchange that was broken off
        self._over = False  # whether all know of an error

    def first(self, what: str, make: Callable[[], T]) -> T:
        value: Any = make() if self.is_first else None
        with self._meeting(what):
            return self._from(0, value)

    def gather(self, what: str, value: T) -> list[T]:
        with self._meeting(what):
            return [self._from(rank, value) for rank in range(self.size)]

    def total(self, what: str, sums: MutableMapping[K, Any]) -> dict[K, Any]:
        found: dict[K, Any] = {}
        with self._meeting(what):
            own = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in sums.items()}
            described = [self._from(rank, own) for rank in range(self.size)]
            for key in dict.fromkeys(key for known in described for key in known):
                having = {rank: known[key] for rank, known in enumerate(described) if key in known}
                found[key] = self._sum(sums.pop(key, None), having)
        return found

    def _sum(self, own: Tensor | None, having: Mapping[int, tuple[tuple[int, ...], torch.dtype]]) -> Tensor:
        """The sum over the processes that have a part, by their shapes and dtypes."""
        total: Tensor | None = None
        for rank, (shape, dtype) in having.items():
            if rank == self.rank:
                assert own is not None, "it has said so"
                part = own.cpu().contiguous()
            else:
                part = torch.empty(shape, dtype=dtype)
            self._wait(self._group.broadcast(part, rank))
            total = part.clone() if total is None else total.add_(part)
        assert total is not None, "a key is of some process"
        return total if own is None else total.to(own.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            try:
                yield
            except SystemExit:
                self._meet("the end")
                raise
            self._meet("the end")
        except Exception as error:
            if self._in_step and not self._over:
                self._tell(error)
            raise
        except KeyboardInterrupt:  # the others are anywhere, and are told by the connection that ends
            self._in_step = False
            raise
        finally:
            self._over = False

    def leave(self) -> None:
        if self._in_step:
            with suppress(SharedFault):
                self._wait(self._group.barrier())

    def _meet(self, what: str) -> None:
        with self._meeting(what):
            pass

    @contextmanager
    def _meeting(self, what: str) -> Iterator[None]:
        """Inside, all processes are at this call."""
        if not self._in_step:
            raise SharedFault(f"the {self.size} processes of this run are no longer at the same place: start it again.")
        self._in_step = False
        places = self._places(zlib.crc32(what.encode()) + 1)
        if _ERROR in places:
            rank, (kind, text) = next((r, told) for r, told in enumerate(self._told(None)) if told is not None)
            self._in_step = self._over = True
            error = kind(f"{text} (This is said by process {rank} of {self.size}, counted from 0.)")
            raise error
        if len(set(places)) > 1:
            self._in_step = self._over = True
            raise RuntimeError(f"process {self.rank} of {self.size} has come to {what!r}, and others elsewhere")
        yield
        self._in_step = True

    def _tell(self, error: Exception) -> None:
        """Tell the others, wherever they are, why this process ends."""
        kind, text = RuntimeError, "".join(traceback.format_exception(error))
        if isinstance(error, UserError):
            kind, text = (SharedFault if isinstance(error, SharedFault) else UserError), str(error.args[0])
        self._in_step = False
        with suppress(SharedFault):
            self._places(_ERROR)
            self._told((kind, text))
            self._in_step = True

    def _places(self, place: int) -> list[int]:
        parts = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait(self._group.allgather([parts], [torch.tensor([place])]))
        return [int(part) for part in parts]

    def _told(self, error: tuple[type[Exception], str] | None) -> list[tuple[type[Exception], str] | None]:
        return [self._from(rank, error) for rank in range(self.size)]

    def _from(self, rank: int, value: T) -> T:
        """The value that the process of that number has; `value` is this one's own."""
        content = torch.empty(0, dtype=torch.uint8)
        if rank == self.rank:
            content = torch.frombuffer(bytearray(_to_bytes(value)), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        self._wait(self._group.broadcast(size, rank))
        if rank != self.rank:
            content = torch.empty(int(size), dtype=torch.uint8)
        self._wait(self._group.broadcast(content, rank))
        return value if rank == self.rank else pickle.loads(content.numpy().tobytes())

    def _wait(self, work: Any) -> None:
        """Look again and again instead of waiting inside of torch, where no signal would be heard."""
        pause = 2e-5
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        try:
            work.wait()
        except RuntimeError as error:
            raise SharedFault(
                f"another of the {self.size} processes of this run has ended without a word: it was killed, for want of memory "
                "perhaps. What it said itself stands above."
            ) from error


class _Pickler(pickle.Pickler):
    """Tensors go as their own numbers, without the storage that they may be a view of; one that stands in several places is one
    object again."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (content, value.dtype, tuple(value.shape), value.device.type)


def _tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensor:
    made = torch.empty(shape, dtype=dtype)
    made.view(-1).view(torch.uint8).copy_(torch.from_numpy(content))
    return made.to(device)


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()
