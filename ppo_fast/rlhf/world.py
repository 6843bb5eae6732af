"""The processes of a run: one, or those that torchrun has started, one for each GPU."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from ppo_fast.rlhf.errors import UserError, origin_of, with_origin

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun for each process
# In the messages of gloo, NCCL and the store when another process is gone or does not answer.
LOST = ("Connection closed by peer", "Connection reset", "Timed out waiting", "timed out", "Broken pipe", "NCCL error")


PATIENCE = 60.0  # seconds that a rank which has failed waits for the others to come and hear of it


@dataclass(frozen=True)
class Failure:
    """Sent in place of an object by a rank whose function has failed."""

    error: Exception  # as the other ranks raise it


@dataclass(frozen=True)
class World:
    """The processes of a run and what they exchange. In a world of one every method is the identity.

    All ranks call the same methods in the same order. Objects are exchanged by pickle between the processes of the run.
    An error of a function that `each`, `together` or `on_main` calls is sent to the other ranks, which raise it in
    their next exchange of objects. Objects have a process group of their own: a rank that waits in another collective
    meanwhile gets none of it, and fails when the rank with the error has left.
    """

    rank: int = 0  # of this process, from 0
    size: int = 1  # processes
    mesh: DeviceMesh | None = None  # of all processes; None: there is no process group, and no weight is split
    exchange: dist.ProcessGroup | None = None  # of all processes, on the CPU: for objects

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the console of the run."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """Where this process computes; None: there is no process group."""
        if self.mesh is None:
            return None
        kind = self.mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def shares(self, count: int) -> list[range]:
        """Return consecutive shares of `count` rows, by rank; they differ by at most one row."""
        size = self.size
        return [range(count * rank // size, count * (rank + 1) // size) for rank in range(size)]

    def share(self, count: int) -> range:
        """Return this rank's of the `shares`."""
        return self.shares(count)[self.rank]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks; x has the same shape on each."""
        if self.size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total

    def concatenate(self, x: Tensor) -> Tensor:
        """Return the x [n, ...] of all ranks, by rank, along the first dimension; n may differ."""
        if self.size == 1:
            return x
        counts = self.objects(len(x))
        wide = x.new_zeros((max(counts), *x.shape[1:]))
        wide[: len(x)] = x
        # As bytes: gloo does not know every dtype.
        sent = wide.reshape(-1).view(torch.uint8)
        found = [torch.empty_like(sent) for _ in counts]
        if len(sent):
            dist.all_gather(found, sent)
        parts = [part.view(x.dtype).view(wide.shape)[:count] for part, count in zip(found, counts, strict=True)]
        return torch.cat(parts)

    def objects(self, value: Value) -> list[Value]:
        """Return the value of every rank, by rank; raise the error of a rank that has failed."""
        return [value] if self.size == 1 else self._objects(value)

    def together(self, function: Callable[[], Value]) -> list[Value]:
        """Return the results of the function of every rank, by rank; an error of one is raised on all."""
        if self.size == 1:
            return [function()]
        try:
            result = function()
        except Exception as error:
            if origin_of(error) is not None or is_lost(error):
                raise  # the others raise it as well
            self._fail(error)
        return self.objects(result)

    def each(self, function: Callable[[], Value]) -> Value:
        """Return the result of the function on this rank; an error of one rank is raised on all."""
        found = list[Value]()
        self.together(lambda: found.append(function()))
        return found[0]

    def on_main(self, function: Callable[[], Value]) -> Value:
        """Return the result of the function, which rank 0 calls, on every rank; its error is raised on all."""
        return self.together(function if self.is_main else lambda: None)[0]  # type: ignore[return-value]

    def _objects(self, value: Value | Failure, seconds: float | None = None) -> list[Value]:
        """`objects`; RuntimeError when another rank takes longer than `seconds`, None: than the group's own limit."""
        sent = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, 1, dtype=torch.int64, device="cpu")
        self._gather(sizes, torch.tensor([len(sent)], dtype=torch.int64, device="cpu"), seconds)
        parts = torch.zeros(self.size, int(sizes.max()), dtype=torch.uint8, device="cpu")
        self._gather(parts, torch.nn.functional.pad(sent, (0, parts.shape[1] - len(sent))), seconds)
        found = []
        for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            each: Value | Failure = pickle.loads(part[:size].numpy().tobytes())
            if isinstance(each, Failure):
                raise with_origin(each.error, rank)
            found.append(each)
        return found

    def _gather(self, found: Tensor, x: Tensor, seconds: float | None) -> None:
        """Fill `found` with the x of every rank."""
        work = dist.all_gather([*found], x, group=self.exchange, async_op=True)
        work.wait() if seconds is None else work.wait(datetime.timedelta(seconds=seconds))

    def _fail(self, error: Exception) -> NoReturn:
        """Send the error in place of an object and raise it; where several ranks fail, the first one's on all."""
        known = _for_all(error)
        sent = known or UserError(
            f"rank {self.rank} failed with {type(error).__name__}: {' '.join(str(error).split())}"
        )
        try:
            self._objects(Failure(sent), PATIENCE)
        except RuntimeError:  # the others are gone, or elsewhere
            raise error from None
        except Exception as first:
            if known is not None or origin_of(first) != self.rank:
                raise first from error
        raise with_origin(error, self.rank)  # with its traceback: it is a fault of the program


def _for_all(error: Exception) -> Exception | None:
    """Return the error as all ranks raise it: they catch it alike, and it can be pickled. None: it is no such error."""
    if isinstance(error, UserError):
        return error if type(error).__module__ == UserError.__module__ else UserError(str(error))
    return OSError(str(error)) if isinstance(error, OSError | SafetensorError) else None


def by_all_ranks(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Decorate a function that all ranks call: each gets its own result, and an error of one is raised on all."""

    @functools.wraps(function)
    def called(*arguments: Arguments.args, **options: Arguments.kwargs) -> Value:
        return current().each(lambda: function(*arguments, **options))

    return called


_worlds = [World()]


def current() -> World:
    """Return the processes that this one has joined; outside of `join`, itself."""
    return _worlds[-1]


@contextlib.contextmanager
def join(device: str = "auto", timeout: float = 1800.0) -> Iterator[World]:
    """Join the processes that torchrun has started; within the block they are a process group.

    Without torchrun the world is this process. A process group that exists already is used and stays.

    Args:
        device: `model.device` of the run. Under torchrun "auto" and "cuda" are the GPU number LOCAL_RANK.
        timeout: seconds that a process waits for another.

    Raises:
        UserError: variables of torchrun are missing, the node has too few GPUs, or another process is gone.
    """
    own = not dist.is_initialized()
    if own and not under_torchrun():
        yield World()
        return
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    from torch.distributed.device_mesh import init_device_mesh

    try:
        if own:
            _init(kind, device, timeout)
        size, limit = dist.get_world_size(), datetime.timedelta(seconds=timeout)
        exchange = current().exchange or dist.new_group(backend="gloo", timeout=limit)
        _worlds.append(World(dist.get_rank(), size, init_device_mesh(kind, (size,)), exchange))
        try:
            yield current()
        finally:
            _worlds.pop()
            if not own and exchange is not current().exchange:
                dist.destroy_process_group(exchange)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"lost another process of the run: {reason}; the latest checkpoint is whole, and --resume continues there"
        ) from error
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun has started this process; UserError where some of its variables are missing."""
    missing = [name for name in VARIABLES if name not in environment]
    if "WORLD_SIZE" in environment and missing:
        raise UserError(
            f"WORLD_SIZE: expected the variables of torchrun with it, got no {missing[0]}; start the run by "
            "'torchrun --nproc-per-node N -m ppo_fast ...', or unset WORLD_SIZE for one process"
        )
    return not missing


def is_lost(error: BaseException) -> bool:
    """Return whether the error says that another process is gone or does not answer."""
    gone = any(words in str(error) for words in LOST)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and gone)


def _init(kind: str, device: str, timeout: float) -> None:
    """Make the process group of torchrun's processes."""
    local, own = int(os.environ["LOCAL_RANK"]), None
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"model.device: expected 'auto', 'cuda' or 'cpu' under torchrun, got {device!r}")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(f"torchrun: expected at most {count} processes on this node, one for each GPU, got more")
        torch.cuda.set_device(local)
        own = torch.device("cuda", local)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), device_id=own)
