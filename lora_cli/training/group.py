"""The processes of a run as one: what they share, add up, and fail over together.

Every message goes over the CPU and through gloo, whatever device computes; gradients alone travel
between devices. Nothing is pickled: values travel as JSON, tensors as safetensors.
"""

import atexit
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lora_cli.errors import LoraCliError
from lora_cli.ranks import LostError, as_record, from_record, own_rank, restarts, world_size

Result = TypeVar("Result")

_BUCKET_BYTES = 64 * 2**20
# How long the others are asked for once the connection to one of them is lost.
_ROLL_CALL_SECONDS = 1.5


class OthersFailed(Exception):  # noqa: N818  # the error is another process's
    """Another process has met an error; `Group.together` asks which."""


class Group:
    """The processes of a run; this one may be the only one.

    Args:
        rank: Number of this process.
        size: Number of processes.
        timeout: Seconds without an answer from another process after which it counts as lost.
        store: Where processes leave a word for each other, even for after their end.
    """

    def __init__(
        self, *, rank: int = 0, size: int = 1, timeout: float = 0, store: Store | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self._timeout = timeout
        self._store = store
        # When others began to exchange what is not asked for here, such as weights.
        self._exchange_began: float | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` over all processes; they are on the CPU."""
        if self.size > 1:
            values = values.clone()
            self._call(lambda: dist.all_reduce(values))
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return bool(self.add(torch.tensor(int(flag))).item())

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients over all processes, in place.

        This takes the place of DistributedDataParallel, which waits for a backward pass of every
        process: here the last rows of an epoch may leave some processes without a row. There is
        little to send, since only adapters have gradients, and adding in float32 in an order that
        never changes makes equal runs bit-equal.
        """
        chosen = list(parameters)
        if self.size == 1 or not chosen:
            return
        counts = self.add(torch.tensor([p.grad is not None for p in chosen], dtype=torch.int32))
        used = [p for p, count in zip(chosen, counts.tolist(), strict=True) if count]
        for bucket in _buckets(used):
            parts = [
                torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
                if p.grad is None
                else p.grad.detach().flatten().float()
                for p in bucket
            ]
            flat = torch.cat(parts)
            self._call(partial(dist.all_reduce, flat))
            for parameter, part in zip(
                bucket, flat.split([p.numel() for p in bucket]), strict=True
            ):
                summed = part.view_as(parameter).to(parameter.dtype)
                if parameter.grad is None:
                    parameter.grad = summed.clone()
                else:
                    parameter.grad.copy_(summed)

    def share_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the values of the first process to the others, in place.

        They are equal already where all machines compute alike; here nothing hangs on that.
        """
        if self.size > 1:
            for parameter in parameters:
                self._call(partial(dist.broadcast, parameter.detach(), src=0))

    def share_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of the first process; what the others give is not looked at."""
        if self.size == 1:
            return dict(tensors)
        return _unpack(self._share_bytes(_pack(tensors) if self.is_first else b""))

    def gather_tensors(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Return the tensors of every process in order of rank, on the CPU."""
        if self.size == 1:
            return [dict(tensors)]
        return [_unpack(content) for content in self._gather_bytes(_pack(tensors))]

    def first(self, act: Callable[[], Result]) -> Result:
        """Let the first process act, and return what it returned, which JSON must hold.

        Raises:
            LoraCliError: What it raised.
        """
        value: Any = None
        with self.together():
            if self.is_first:
                value = act()
        if self.size > 1:
            text = json.dumps(value).encode() if self.is_first else b""
            shared = self._share_bytes(text)
            value = value if self.is_first else json.loads(shared)
        return value  # type: ignore[no-any-return]  # plain values, equal on every process

    def first_tensors(
        self, act: Callable[[], Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Let the first process act, and return the tensors that it returned.

        Raises:
            LoraCliError: What it raised.
        """
        tensors: Mapping[str, torch.Tensor] = {}
        with self.together():
            if self.is_first:
                tensors = act()
        return self.share_tensors(tensors)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that talks to no other process; all go on after it, or none.

        Raises:
            LoraCliError: What the first of the processes that failed has met.
        """
        error: Exception | None = None
        is_told = False
        try:
            yield
        except OthersFailed:
            is_told = True
        except Exception as caught:
            if self.size == 1 or isinstance(caught, LostError):
                raise
            self._check_exchange(caught)
            error = caught
        if self.size > 1 and (is_told or self.any(error is not None)):
            record = b"" if error is None else json.dumps(as_record(error)).encode()
            records = self._gather_bytes(record)
            if error is not None:
                raise error
            raise from_record(json.loads(next(filter(None, records))))

    def meet(self) -> None:
        """Wait for the others within a block of `together`, at a place that all of them pass.

        Raises:
            OthersFailed: If one of them has left the block with an error.
        """
        if self.any(False):
            raise OthersFailed

    def begin_exchange(self) -> None:
        """Note that this process exchanges something with the others by other means."""
        self._exchange_began = time.monotonic()

    def end_exchange(self) -> None:
        """Note that it has."""
        self._exchange_began = None

    def _check_exchange(self, error: Exception) -> None:
        """Give up at once after an error in an exchange: the others may wait there for ever.

        Raises:
            Exception: The error, or why another process has ended.
        """
        began, self._exchange_began = self._exchange_began, None
        if began is None:
            return
        if isinstance(error, RuntimeError):
            raise self._lost(is_hung=self._is_over(began)) from error
        raise error

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the others why this process ends, so that they end for the same reason."""
        try:
            yield
        except BaseException as error:
            if self._store is not None and not isinstance(error, LostError):
                # Whoever keeps the store may be gone, and nobody can be told then.
                with suppress(RuntimeError, OSError):
                    self._store.set(f"error/{self.rank}", json.dumps(as_record(error)))
            raise

    def _share_bytes(self, content: bytes) -> bytes:
        size = torch.tensor(len(content))
        self._call(lambda: dist.broadcast(size, src=0))
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_first and content:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._call(lambda: dist.broadcast(buffer, src=0))
        return buffer.numpy().tobytes()

    def _gather_bytes(self, content: bytes) -> list[bytes]:
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(content)
        sizes = self.add(sizes)
        own = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        if content:
            own[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        found = [torch.zeros_like(own) for _ in range(self.size)]
        self._call(lambda: dist.all_gather(found, own))
        lengths = sizes.tolist()
        return [x[:n].numpy().tobytes() for x, n in zip(found, lengths, strict=True)]

    def _call(self, exchange: Callable[[], Any]) -> None:
        """Run an exchange with the other processes.

        Raises:
            LoraCliError: Why another process has ended, or that one is gone.
        """
        began = time.monotonic()
        try:
            exchange()
        except RuntimeError as error:
            raise self._lost(is_hung=self._is_over(began)) from error

    def _is_over(self, began: float) -> bool:
        return time.monotonic() - began > 0.9 * self._timeout

    def _lost(self, *, is_hung: bool) -> LoraCliError:
        """Ask who is left, and return why the exchange failed."""
        present, told = {self.rank}, list[LoraCliError]()
        # A thread, since asking may never end where the one that keeps the store hangs.
        asking = threading.Thread(target=self._call_roll, args=(present, told), daemon=True)
        asking.start()
        asking.join(2 * _ROLL_CALL_SECONDS)
        if told:
            return told[0]
        missing = [rank for rank in range(self.size) if rank not in present]
        return LostError(missing, timeout=self._timeout, is_hung=is_hung)

    def _call_roll(self, present: set[int], told: list[LoraCliError]) -> None:
        """Note who is present, until all are, the time is up, or one has told its error."""
        store = self._store
        end = time.monotonic() + _ROLL_CALL_SECONDS
        # Whoever keeps the store may be gone too.
        with suppress(RuntimeError, OSError):
            while store is not None and time.monotonic() < end and len(present) < self.size:
                store.set(f"present/{self.rank}", "1")
                for rank in range(self.size):
                    if store.check([f"error/{rank}"]):
                        told.append(from_record(json.loads(store.get(f"error/{rank}"))))
                        return
                    if store.check([f"present/{rank}"]):
                        present.add(rank)
                time.sleep(0.05)


ALONE = Group()


@cache
def join_group(timeout: float) -> Group:
    """Join the other processes of the run, if it has any; only the first call does anything.

    Args:
        timeout: Seconds without an answer from another process after which it counts as lost.
    """
    rank, size = own_rank(), world_size()
    if size == 1:
        return ALONE
    wait = timedelta(seconds=timeout)
    # The variables that torchrun sets say where the processes meet.
    met, _, _ = next(rendezvous("env://", timeout=wait))
    # What processes that died have left in the store must not be taken for news.
    store = PrefixStore(f"lora-cli/{restarts()}", met)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=wait,
        )
        atexit.register(_leave)
    return Group(rank=rank, size=size, timeout=timeout, store=store)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield runs of parameters that are sent as one message."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size >= _BUCKET_BYTES or parameter.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += 4 * parameter.numel()
    if bucket:
        yield bucket


def _pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    content: bytes = safetensors.torch.save(plain)
    return content


def _unpack(content: bytes) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = safetensors.torch.load(content)
    return loaded
