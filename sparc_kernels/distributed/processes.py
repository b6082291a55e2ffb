"""Processes of one run: they join, agree on what all of them do, and end together when one of them is lost."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..core.validation import check_device, check_number, first_line, require
from .agreement import Refused, agree, first_failure, objects_of
from .ranks import DATA, LATENTS

LOST = 75  # exit code of a process that ends because another one was lost
LIMIT = 20.0  # seconds without a sign of life after which a process counts as lost
STALL = 300.0  # seconds without progress after which a process counts as hanging
_INTERVAL = 1.0  # seconds between signs of life
_PATIENCE = timedelta(days=1)  # of collectives: one rank may save or check files for hours; the watchdog ends hangs
_START = timedelta(minutes=10)  # until all processes have started
_EVERY = {"cpu": 1, "cuda": 8}  # steps between agreements on signals
_numbers = itertools.count()  # of the `Processes` of this process: the same on every rank
_joined: list[Processes] = []  # at most one
_T = TypeVar("_T")


def launched() -> bool:
    """Whether torchrun, or a launcher with its environment, has started this process as one of a run."""
    return dist.is_available() and (dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE") or 1) > 1)


def join(device: str | torch.device = "auto", *, limit: float = LIMIT, stall: float = STALL) -> Processes:
    """Join the processes of a run, by the environment of torchrun or in a process group that exists already.

    NCCL for CUDA, each process on the GPU of its LOCAL_RANK, gloo for a CPU. Without a group and torchrun's environment
    the result is a single process. Who has joined gets the same `Processes` again until they are stopped.

    Args:
        device: "auto" (CUDA if available), "cpu" or "cuda".
        limit: seconds without a sign of life after which a process counts as lost.
        stall: seconds without progress after which a process counts as hanging.

    Raises:
        ValueError: the environment is incomplete, there is no GPU for this process, or seconds are negative.
    """
    limit, stall = check_number("lost_after", limit), check_number("hangs_after", stall)
    if _joined:
        return _joined[0]
    launch = None
    starts = not (dist.is_available() and dist.is_initialized())
    if starts and not launched():
        return Processes(check_device("device", device), limit, stall)
    if starts:
        own = _own_device(device, int(os.environ.get("RANK") or 0))
        gpu: dict[str, Any] = {"device_id": own} if own.type == "cuda" else {}
        store, rank, size = next(dist.rendezvous("env://", timeout=_START))
        store = dist.PrefixStore(f"sparc_kernels/{os.environ.get('TORCHELASTIC_RUN_ID')}", store)
        launch = _launch(store)
        store = dist.PrefixStore(meet(store, rank, size), store)
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE, **gpu)
    else:
        gloo = device == "auto" and dist.get_backend() == "gloo"
        own = _own_device("cpu" if gloo else device, dist.get_rank())
    _joined.append(Processes(own, limit, stall, grouped=True, starts=starts, launch=launch))
    return _joined[0]


def meet(store: dist.Store, rank: int, size: int) -> str:
    """Agree on a name that no attempt before has: torchrun keeps its store, and counts restarts by machine.

    Rank 0 answers what each other rank asks now; nobody waits for its answers to ranks of an earlier attempt.

    Args:
        store: of all attempts.
        rank: of this process.
        size: number of processes.

    Raises:
        ValueError: on rank 0, not all have started in time.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", name)
        answer = store.get(f"answer/{name}").decode()
        store.set(f"heard/{answer}/{rank}", "")
        return answer
    deadline, answered = time.monotonic() + _START.total_seconds(), set()
    asks, heard = ([f"{key}/{other}" for other in range(1, size)] for key in ("asks", f"heard/{name}"))
    while heard and not store.check(heard):
        require(time.monotonic() < deadline, "processes", f"{size} that start", f"fewer in {_START}")
        for key in asks:
            asked = store.get(key).decode() if store.check([key]) else ""
            if asked and asked not in answered:
                store.set(f"answer/{asked}", name)
                answered.add(asked)
        time.sleep(0.02)
    return name


def _launch(store: dist.Store) -> str | None:
    """What tells one torchrun, with its restarts, from others: run ids are often the same."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it lasts as long as torchrun
        return store.compare_set("launch", "", uuid.uuid4().hex).decode()
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _own_device(device: str | torch.device, rank: int) -> torch.device:
    """The device of this process."""
    wanted = check_device("device", device)
    if wanted.type != "cuda":
        return wanted
    local, count = int(os.environ.get("LOCAL_RANK") or rank), torch.cuda.device_count()
    fits = torch.device(device).index in (None, local) if device != "auto" else True
    require(fits, "device", "auto, cpu or cuda, since each process has the GPU of its LOCAL_RANK", str(device))
    require(local < count, "device", "a GPU for every process of a machine", f"{count} for LOCAL_RANK {local}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


class Processes:
    """The processes of a run, or a single one; see `join`.

    Attributes:
        device: of this process.
        rank: number of this process.
        size: number of processes.
        grouped: whether there is a process group, maybe of one process.
        leads: whether this process writes for all.
        launch: of the torchrun that has started the processes, also over restarts; None: unknown.

    All methods but `at`, `fail` and `stop` are called by every process in the same order.
    """

    def __init__(
        self,
        device: torch.device,
        limit: float,
        stall: float,
        *,
        grouped: bool = False,
        starts: bool = False,
        launch: str | None = None,
    ):
        self.device, self.grouped, self._started, self.launch = device, grouped, starts, launch
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self.leads = self.rank == 0
        self._group: Any = None
        self._watchdog: Watchdog | None = None
        self._pending: tuple[Any, torch.Tensor] | None = None
        if grouped:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        if self.size > 1:
            from torch.distributed.distributed_c10d import _get_default_store  # missing where torch was built without

            name = f"sparc_kernels/{next(_numbers)}"
            default: Any = _get_default_store()
            store = dist.PrefixStore(name, default.clone())  # its own connection: others may block theirs
            self._watchdog = Watchdog(store, self.rank, self.size, limit, stall)

    # -------------------------------------------------------------------------------------------------------- agreement

    def share(self, value: _T) -> list[_T]:
        """Return the values of all ranks, in their order.

        Args:
            value: anything that can be pickled.
        """
        if not self.grouped:
            return [value]
        return objects_of(self._group, value)

    def to_first(self, value: _T) -> list[_T] | None:
        """Return the values of all ranks, in their order, on rank 0; None on the others.

        Args:
            value: anything that can be pickled.
        """
        if not self.grouped:
            return [value]
        values: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values

    def from_first(self, make: Callable[[], _T]) -> _T:
        """Return what `make` returns on rank 0, where alone it is called.

        Args:
            make: its result can be pickled.

        Raises:
            Refused: it raised a ValueError, OSError or ImportError; for a single process that error itself.
        """
        value: Any = None
        with self.together():
            if self.leads:
                value = make()
        if not self.grouped:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self._group)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context for work that may fail on some ranks alone: then all refuse.

        Raises:
            Refused: a ValueError, OSError or ImportError was raised inside, on any rank; the message names the first
                such rank unless it is the same on all. A single process raises the error itself.
        """
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError, ImportError) as caught:
            if not self.grouped or isinstance(caught, Refused):
                raise
            error = caught
        failed = first_failure(None if error is None else str(error), self.share)
        if failed is not None:
            rank, text, same = failed
            raise Refused(text if same else f"rank {rank}: {text}") from error

    def require_same(self, facts: dict[str, Any]) -> None:
        """Compare facts between the ranks, see `agree`."""
        agree(facts, self.share)

    def signal(self, received: int, step: int) -> int:
        """Return the signal after which all ranks stop; 0: none, go on.

        The ranks hear of it one agreement later, all after the same step. It waits for the other hosts, not for a GPU.

        Args:
            received: number of the signal that this process has received, or 0.
            step: number of the step just taken.
        """
        if not self.grouped:
            return received
        agreed = self._agreed()
        if not agreed and step % _EVERY[self.device.type] == 0:
            flag = torch.tensor([received], dtype=torch.int32, device="cpu")
            self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        return agreed

    def _agreed(self) -> int:
        if self._pending is None:
            return 0
        (work, flag), self._pending = self._pending, None
        work.wait()
        return int(flag)

    def mesh(self, shards: int) -> DeviceMesh:
        """Divide the ranks into replicas, for `Ranks`; their collectives wait as long as those of all ranks.

        Args:
            shards: number of ranks of a replica, a divisor of `size`.
        """
        ranks = torch.arange(self.size, device="cpu").view(-1, shards)
        if len(ranks) == 1:
            return DeviceMesh.from_group(_all(), self.device.type, mesh_dim_names=(LATENTS,))
        across, within = ranks.t().tolist(), ranks.tolist()
        groups = [_all() if len(parts) == 1 else dist.new_subgroups_by_enumeration(parts, timeout=_PATIENCE)[0]
                  for parts in (across, within)]  # fmt: skip
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=(DATA, LATENTS))

    # ------------------------------------------------------------------------------------------------------------- life

    def at(self, place: str | None) -> None:
        """Tell how far this process has come; called in the same order on every rank.

        Args:
            place: what it does now, for messages; None: something that may take any time.
        """
        if self._watchdog is not None:
            self._watchdog.at(place)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends, so that they end too.

        Args:
            error: why. Where it follows from the loss of another rank, this process ends as that one is found.
        """
        self._started = False  # the group cannot be left in order
        if self._watchdog is not None:
            self._watchdog.fail(error)

    def finish(self) -> None:
        """Wait until all ranks are done."""
        if self.grouped:
            self._agreed()
            self.at(None)
            dist.barrier(group=self._group)
            self.stop()
            with suppress(RuntimeError):  # nobody leaves while another one still watches
                dist.barrier(group=self._group)

    def stop(self) -> None:
        """Stop watching, and being watched."""
        if self in _joined:
            _joined.remove(self)
        if self._watchdog is not None:
            self._watchdog.stop()

    def leave(self) -> None:
        """Stop, and leave the process group if `join` started it; at the end of a command."""
        self.stop()
        if self._started and dist.is_initialized():
            dist.destroy_process_group()


def _all() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "the processes have joined"
    return group


class Watchdog:
    """A thread that ends this process when another one of the run is lost.

    Every rank gives signs of life and watches the next one; the first to find something wrong writes it down for all.
    A process is lost if it is gone from this machine, if it is stopped or on another machine and gives no sign of
    life for `limit` seconds, if an exception ends it, or if it makes no progress for `stall` seconds. The others print
    its number and the reason on stderr and exit with LOST; a hanging process that can still do so exits with 1.

    Args:
        store: of the process group, in a connection of its own.
        rank: of this process.
        size: number of processes.
        limit: seconds.
        stall: seconds.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, limit: float, stall: float):
        self.store, self.rank, self.size, self.limit, self.stall = store, rank, size, limit, stall
        self.interval = min(_INTERVAL, limit / 5)
        self._beats = self._count = 0
        self._place: str | None = None
        self._since = time.monotonic()
        self._machine = _machine()
        self._stopped = threading.Event()
        store.set_timeout(timedelta(seconds=limit))
        self._thread = threading.Thread(target=self._run, name="sparc-watchdog", daemon=True)
        self._thread.start()

    def at(self, place: str | None) -> None:
        """See `Processes.at`."""
        self._since, self._place = time.monotonic(), place
        self._count += 1

    def fail(self, error: BaseException) -> None:
        """See `Processes.fail`."""
        if self._stopped.is_set():
            return
        if _follows(error):  # the thread ends this process as soon as it is known who was the first
            self._stopped.wait(self.limit + 5 * self.interval)
        self.stop()
        with suppress(Exception):  # the store may be gone, and with it what could be told
            self._write(self.rank, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            self._wait_for_readers()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        watched, seen, changed = f"life/{(self.rank + 1) % self.size}", b"", time.monotonic()
        while not self._stopped.is_set():
            try:
                self._beats += 1
                own = json.dumps([self._beats, self._count, self._place, os.getpid(), self._machine])
                self.store.set(f"life/{self.rank}", own)
                if self.store.check(["failed"]):
                    reason = json.loads(self.store.get("failed"))
                    self.store.add("read", 1)
                    with suppress(Exception):  # whoever holds the store may go first
                        self._wait_for_readers()
                    self._end(*reason)
                life = self.store.get(watched) if self.store.check([watched]) else b""
                lost = (self.rank + 1) % self.size
                if life != seen:
                    seen, changed = life, time.monotonic()
                state = self._state_of(*json.loads(life)[3:]) if life else "S"  # it is about to begin
                # one that runs on this machine may only be short of time
                limit = self.limit if state in (None, "T", "t") else self.stall
                if state in ("Z", "X"):
                    self._write(lost, "its process is gone: killed, maybe for want of memory")
                elif time.monotonic() - changed > limit:
                    self._write(lost, f"no sign of life for {limit:g} s: it was stopped, or its machine is gone")
                elif self._place is not None and time.monotonic() - self._since > self.stall:
                    self._write(*self._hanging())
                else:
                    self._stopped.wait(self.interval)
            except Exception as error:
                if not self._stopped.is_set():
                    gone = "the store of the processes does not answer: rank 0 or the launcher is gone"
                    self._end(None, f"{gone} ({first_line(error)})")

    def _state_of(self, pid: int, machine: str | None) -> str | None:
        """State of a process of this machine, as /proc has it, "Z" if it is gone; None: unknown."""
        if self._machine is None or machine != self._machine:
            return None
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "Z"
        except OSError:
            return None

    def _write(self, rank: int | None, reason: str) -> None:
        """Write down a failure, unless there is one already."""
        self.store.compare_set("failed", "", json.dumps([rank, reason]))

    def _wait_for_readers(self) -> None:
        """Give the others time to read what is written: this process may hold the store."""
        deadline = time.monotonic() + 5 * self.interval
        while self.store.add("read", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(self.interval / 10)

    def _hanging(self) -> tuple[int | None, str]:
        """The rank that has come least far, and what it did."""
        lives = [json.loads(self.store.get(f"life/{rank}")) for rank in range(self.size)]
        counts = [count for _, count, *_ in lives]
        rank = counts.index(min(counts))
        where = f"no progress for {self.stall:g} s ({lives[rank][2] or 'between steps'})"
        return (rank, where) if min(counts) < max(counts) else (None, f"{where} on any rank")

    def _end(self, rank: int | None, reason: str) -> None:
        """End this process at once: its main thread may wait for the lost one in vain."""
        who = "the processes are lost" if rank is None else f"rank {rank} is lost"
        print(f"sparc-kernels: rank {self.rank} ends, since {who}: {reason}", file=sys.stderr, flush=True)
        os._exit(1 if rank == self.rank else LOST)


def _machine() -> str | None:
    """What tells the processes whose numbers this one can look up; None: it cannot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _follows(error: BaseException) -> bool:
    """Whether an error may follow from the loss of another process: a connection or a collective that broke off."""
    texts = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )
