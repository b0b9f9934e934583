"""Data parallelism: several processes, each with its own copy of the model, splitting the data.

Every process (a *rank*) computes gradients on its own part of the batch; before the optimizer steps, the gradients are
averaged over the ranks, so all copies of the model take the same step and stay equal:

    gradient = (gradient_0 + ... + gradient_{W-1}) / W          W = world_size

That one line is the whole method. The rest of this file is about when the sum is started and in how many messages:
one per parameter after the backward pass (naive), one for everything (flat), one per parameter *during* the backward
pass (individual), and a few buckets during the backward pass (bucketed), which is what PyTorch's own
DistributedDataParallel does. All of them give the same bits on two ranks, and the same bits as one process that
accumulates the same micro-batches, each loss divided by W.

    python ddp.py                                   two processes against one, with the bytes they move
    python ddp.py --world_size 4 --ordered          four, with sums in rank order: still the same bits
    torchrun --standalone --nproc-per-node 4 train.py --ddp bucketed

Contents
    1. Ranks: starting, stopping, waiting
    2. When a rank fails
    3. The collectives
    4. The same model on every rank
    5. Naive: one message per gradient, after the backward pass
    6. Flat: one message
    7. Individual: during the backward pass
    8. Bucketed: few messages, during the backward pass
    9. One switch for all of them
    10. Running it: two processes against one
"""

import argparse
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# --- 1. Ranks: starting, stopping, waiting ---


@dataclass(frozen=True)
class Ranks:
    """Who this process is: its number among all, its number on this machine (which GPU), and how many there are."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def init_distributed(device_type: str = "cpu", timeout_s: float = 120.0) -> Ranks:
    """Join the processes that torchrun started; without torchrun this is Ranks(0, 0, 1) and nothing is started.

    timeout_s bounds every later wait of one rank for another: a rank that hangs ends the job after that time instead of
    gloo's default of 30 minutes. GPUs talk through NCCL, CPUs through gloo.
    Raises ValueError for a wrong setting and ConnectionError when the ranks do not find each other.
    """
    if "RANK" not in os.environ:
        return Ranks()
    try:
        ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    except (KeyError, ValueError) as error:
        raise ValueError(f"RANK is set, but not all of torchrun's variables ({error}): start with torchrun") from None
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"several processes work on cpu or cuda, not on {device_type}: add --device cpu")
    if device_type == "cuda":
        num_devices = torch.cuda.device_count()
        if ranks.local_rank >= num_devices:
            raise ValueError(
                f"rank {ranks.rank} needs GPU {ranks.local_rank}, but this machine has {num_devices}: "
                f"start at most {num_devices} processes here (--nproc-per-node), or add --device cpu"
            )
        torch.cuda.set_device(ranks.local_rank)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        # subtle: torchrun keeps one store over all its restarts, and the addresses that a dead attempt left in it are
        # still there when the next one looks its peers up; a prefix per attempt keeps them apart
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _join(ranks, store, "nccl" if device_type == "cuda" else "gloo", timeout_s)
    except RuntimeError as error:  # every error of torch.distributed is one
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason or "already in use" in reason:
            reason = "another program uses that port, choose another with --master-port"
        raise ConnectionError(
            f"rank {ranks.rank} of {ranks.world_size} could not join the others at {address} within {timeout_s:g} s: "
            f"{reason}"
        ) from error
    return ranks


def _join(ranks: Ranks, store: dist.Store, backend: str, timeout_s: float) -> None:
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(seconds=timeout_s)
    )


def shutdown_distributed() -> None:
    """Leave the group at the end of a run that went well.

    Never in a `finally`: a rank that failed would wait here for peers that wait for it elsewhere.
    """
    if not dist.is_initialized():
        return
    # rank 0 may host the store and others may still be writing: nobody goes before all have arrived
    _store().set(f"finished/{get_rank()}", "yes")
    barrier("the end of the run")
    dist.destroy_process_group()


def get_rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _store() -> dist.Store:
    return dist.group.WORLD.get_group_store()  # a small key-value server that all ranks can reach


def barrier(message: str) -> None:
    """Wait until every rank has come here. `message` says what is waited for if one does not come in time."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
        return
    try:
        dist.monitored_barrier(wait_all_ranks=True)  # unlike barrier() it knows who is missing; gloo only
    except RuntimeError as error:
        raise RankFailure(f"rank {get_rank()} waited in vain for {message}: {str(error).splitlines()[0]}") from error


def on_rank_0(work: Callable[[], Any], description: str) -> Any:
    """Run work() on rank 0 alone, while the other ranks wait however long it takes; all of them get its result.

    A barrier would not do: preparing data takes minutes, and the collectives' timeout is there to end a hanging job.
    So the others look every 0.2 s for rank 0's note in the store, and say after two seconds what they wait for. If
    work() raises, they raise RankFailure at once; if rank 0 is killed, torchrun ends them.
    """
    if get_world_size() == 1:
        return work()
    store, rank = _store(), get_rank()
    # every rank counts its own calls: the n-th call here belongs to the n-th call there
    key = f"on_rank_0/{store.add(f'on_rank_0/calls_of_rank_{rank}', 1)}"
    if rank == 0:
        try:
            result = work()
        except BaseException as error:  # Ctrl-C as well: nobody may be left waiting
            store.set(key, _reason(error))
            raise
        store.set(key, "done")
        return broadcast_object(result)
    start, told = time.monotonic(), False
    while not store.check([key]):
        if not told and time.monotonic() - start > 2:
            told = True
            print(f"rank {rank} waits for rank 0: {description}", file=sys.stderr, flush=True)
        time.sleep(0.2)
    outcome = store.get(key).decode()
    if outcome != "done":
        raise RankFailure(f"rank {rank} stops because rank 0 failed at this: {description}: {outcome}")
    return broadcast_object(None)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The object that rank `source` holds, on every rank (a run's name, a path, a dict of settings)."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, source)
    return box[0]


# --- 2. When a rank fails ---


class RankFailure(RuntimeError):
    """This rank is in order and another one is not; the message is a sentence that says which and why."""


def _reason(error: BaseException) -> str:
    # ValueError and OSError carry a sentence for the user; of anything else the type is half of the message
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"


def _is_lost_contact(error: BaseException) -> bool:
    # gloo's errors are plain RuntimeErrors, known by their text: "[.../gloo/transport/tcp/pair.cc:547] Connection ..."
    words = ("gloo", "Connection", "connect", "Timed out", "NCCL", "ncclRemoteError")
    return isinstance(error, (RankFailure, dist.DistError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def explain_failure(error: BaseException, patience_s: float = 3.0) -> str:
    """One sentence about why this job ends, naming the rank at fault. Call it once, where the program catches all.

    The rank with an error of its own leaves its reason in the store before it goes. The others only see a closed
    connection or a timeout, and look there: for a reason, for a rank that had already finished (its data ran out
    first), and for the ranks that stay silent for `patience_s` seconds, which were killed or hang.
    """
    if get_world_size() == 1:
        return _reason(error)
    store, rank = _store(), get_rank()
    peers = [peer for peer in range(get_world_size()) if peer != rank]
    lost_contact = _is_lost_contact(error)
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        store.set(f"failed/{rank}", "" if lost_contact else _reason(error))
        if not lost_contact:
            return f"rank {rank} failed: {_reason(error)}"
        if isinstance(error, RankFailure) and "rank 0 failed" in first_line:
            return first_line
        silent, deadline = list(peers), time.monotonic() + patience_s
        while silent and time.monotonic() < deadline:
            for peer in list(silent):
                if store.check([f"failed/{peer}"]):
                    silent.remove(peer)
                    if reason := store.get(f"failed/{peer}").decode():
                        return f"rank {rank} stops because rank {peer} failed: {reason}"
            time.sleep(0.05)
        for peer in peers:
            if store.check([f"finished/{peer}"]):
                return (
                    f"rank {rank} stops because rank {peer} had already finished: "
                    "every rank needs the same number of steps"
                )
    except RuntimeError:  # the store went down with the rank that held it
        return f"rank {rank} stops because the rank that holds the store is gone: {first_line}"
    names = ", ".join(map(str, silent))
    if silent:
        return f"rank {rank} stops because rank {names} does not answer (killed, hanging, or left early): {first_line}"
    return f"rank {rank} stops because the ranks lost each other: {first_line}"


# --- 3. The collectives ---
#
# Started now, finished later: each start_ function returns at once, and what it returns is called to wait for the end.
# Between the two the tensors belong to the network.


def start_all_reduce(tensor: Tensor) -> Callable[[], Any]:
    """Replace `tensor` on every rank by the sum over the ranks, in place.

    The order of the additions is the network library's: two ranks give the same bits in any order, four may not.
    """
    if get_world_size() == 1:
        return lambda: None
    return dist.all_reduce(tensor, async_op=True).wait


def start_reduce_scatter(pieces: list[Tensor], output: Tensor) -> Callable[[], None]:
    """Rank r gets the sum over the ranks of their pieces[r], in `output` (which may be that piece itself).

    Every rank sends piece p straight to rank p, which adds what it receives in rank order: exactly the additions of one
    process that accumulates micro-batches 0, 1, 2, ... The pieces may differ in length.
    """
    world_size, rank = get_world_size(), get_rank()
    assert len(pieces) == world_size, f"{len(pieces)} pieces for {world_size} ranks"
    received = [pieces[rank] if peer == rank else torch.empty_like(pieces[rank]) for peer in range(world_size)]
    messages = [
        message
        for peer in range(world_size)
        if peer != rank
        for message in (dist.P2POp(dist.isend, pieces[peer], peer), dist.P2POp(dist.irecv, received[peer], peer))
    ]
    works = dist.batch_isend_irecv(messages) if messages else []

    def finish() -> None:
        for work in works:
            work.wait()
        total = received[0].clone()
        for piece in received[1:]:
            total += piece
        output.copy_(total)

    return finish


def start_all_gather(pieces: list[Tensor]) -> Callable[[], None]:
    """Fill pieces[r] with rank r's piece, for all r, on every rank; each rank has filled its own.

    One broadcast per rank: on gloo faster than its all-gather, and the pieces may differ in length.
    """
    works = [dist.broadcast(piece, r, async_op=True) for r, piece in enumerate(pieces) if get_world_size() > 1]

    def finish() -> None:
        for work in works:
            work.wait()

    return finish


def start_ordered_all_reduce(tensor: Tensor) -> Callable[[], None]:
    """An all-reduce that adds in rank order, made of the other two: reduce-scatter, then all-gather.

    The same bytes as start_all_reduce and the same bits on any number of ranks as adding one after the other.
    """
    assert tensor.is_contiguous(), f"an ordered all-reduce needs a contiguous tensor, not strides {tensor.stride()}"
    pieces = list(tensor.view(-1).tensor_split(get_world_size()))
    finish_scatter = start_reduce_scatter(pieces, pieces[get_rank()])

    def finish() -> None:
        finish_scatter()
        start_all_gather(pieces)()

    return finish


def all_reduce_sum(value: Tensor | float) -> Tensor | float:
    """The sum of `value` over the ranks: a new tensor for a tensor, a float (added in float64) for a number."""
    if get_world_size() == 1:
        return value
    if isinstance(value, Tensor):
        total = value.detach().clone()
        dist.all_reduce(total)
        return total
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return all_reduce_sum(torch.tensor(value, dtype=torch.float64, device=device)).item()


def token_loss_scale(num_tokens: int) -> float:
    """What a rank multiplies its *summed* loss by, so that averaging gradients over ranks gives the mean over tokens.

    Ranks may hold different numbers of tokens (padding, ignored targets), and then the mean of the ranks' means is not
    the mean. With loss_r = world_size / total_tokens * (sum over rank r's tokens), the average over ranks is

        1/W * sum_r loss_r  =  (sum over all tokens) / total_tokens.

    num_tokens counts this rank's tokens of the whole step, all its micro-batches; call it once, before their backward.
    """
    total_tokens = all_reduce_sum(float(num_tokens))
    if total_tokens == 0:
        raise ValueError("no rank has a token to learn from in this batch: every target is ignored")
    return get_world_size() / total_tokens


def bytes_sent_per_rank(collective: str, num_bytes: int, world_size: int) -> float:
    """What the best algorithms send, averaged over the ranks (Patarasuk & Yuan 2009), for a tensor of num_bytes.

    >>> bytes_sent_per_rank("all_reduce", 1000, 4)
    1500.0
    """
    share = (world_size - 1) / world_size
    times = {"broadcast": 1, "reduce_scatter": 1, "all_gather": 1, "all_reduce": 2}
    return times[collective] * share * num_bytes


def loopback_bytes() -> int | None:
    """Bytes sent so far through this machine's loopback interface, by the kernel's own count (None where unknown).

    No implementation can flatter it. It also counts what other programs send, and about 0.2 % of TCP headers.
    """
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), None)


# --- 4. The same model on every rank ---


def check_same_model(module: nn.Module) -> None:
    """Raise ValueError on every rank, naming the first difference, unless all ranks hold the same list of tensors.

    Not a formality: gloo aborts the process on sizes that differ, and gives silent garbage on (2, 3) against (3, 2) or
    float32 against int32.
    """
    if get_world_size() == 1:
        return
    mine = [
        f"{kind} {name} {tuple(t.shape)} {t.dtype}{' frozen' if kind == 'parameter' and not t.requires_grad else ''}"
        for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers()))
        for name, t in tensors
    ]
    everyones: list[Any] = [None] * get_world_size()
    dist.all_gather_object(everyones, mine)
    for rank, theirs in enumerate(everyones):
        for of_rank_0, of_rank in itertools.zip_longest(everyones[0], theirs, fillvalue="nothing"):
            if of_rank_0 != of_rank:
                raise ValueError(f"rank {rank} has another model than rank 0: {of_rank} instead of {of_rank_0}")


@torch.no_grad()
def broadcast_model(module: nn.Module) -> None:
    """Copy rank 0's parameters, frozen ones too, and buffers to all ranks. A tied weight travels once."""
    if get_world_size() == 1:
        return
    tensors = [*module.parameters(), *module.buffers()]
    # broadcast wants contiguous memory; a transposed parameter goes by way of a copy
    copies = [tensor.detach().contiguous() for tensor in tensors]
    for work in [dist.broadcast(tensor, 0, async_op=True) for tensor in copies]:
        work.wait()
    for tensor, received in zip(tensors, copies):
        if tensor.data_ptr() != received.data_ptr():
            tensor.copy_(received)


# --- 5. Naive: one message per gradient, after the backward pass ---


class DDPNaive(nn.Module):
    """The definition: after the backward pass, replace each gradient by its average over the ranks, one by one.

        model = DDPNaive(module)
        loss(model(x)).backward()
        model.finish_gradient_synchronization()
        optimizer.step()

    A parameter that only some ranks used in this step gets the average with zeros from the others; one that nobody used
    keeps its gradient None, so that the optimizer passes it over. With ordered=True sums are taken in rank order.
    """

    def __init__(self, module: nn.Module, *, ordered: bool = False) -> None:
        super().__init__()
        check_same_model(module)
        broadcast_model(module)
        self.module = module
        self.world_size = get_world_size()
        self.start_sum = start_ordered_all_reduce if ordered else start_all_reduce
        self.synchronizing = True
        # last layer first, as gradients arrive; parameters() gives a tied weight once
        self.trainable = [p for p in reversed(list(module.parameters())) if p.requires_grad]
        if not self.trainable:
            raise ValueError("the model has no parameter that requires a gradient: there is nothing to synchronize")

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on this rank, for all micro-batches but the last."""
        before, self.synchronizing = self.synchronizing, False
        try:
            yield
        finally:
            self.synchronizing = before

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """After this every rank holds the same averaged gradients. To be called between backward and step."""
        if not self.synchronizing or self.world_size == 1:
            return
        num_users = self._used_flags()
        self.start_sum(num_users)()
        for parameter, users in zip(self.trainable, num_users.tolist()):
            if users > 0:
                self._scale_gradient(parameter)
                self.start_sum(parameter.grad)()

    def _used_flags(self) -> Tensor:
        used = [0.0 if parameter.grad is None else 1.0 for parameter in self.trainable]
        return torch.tensor(used, device=self.trainable[0].device)

    def _scale_gradient(self, parameter: nn.Parameter) -> None:
        # dividing first, as torch does, and not after: a sum of fp16 gradients could overflow. Both are exact when
        # world_size is a power of two
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        else:
            parameter.grad = parameter.grad.contiguous().mul_(1 / self.world_size)


# --- 6. Flat: one message ---


class DDPFlat(DDPNaive):
    """All gradients in one long vector and one all-reduce: saves the fixed cost of a message per parameter.

    It costs a second copy of the gradients, and still nothing is sent before the backward pass is over.
    """

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        if not self.synchronizing or self.world_size == 1:
            return
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable]
        flat = torch.cat([piece.reshape(-1) for piece in pieces] + [self._used_flags()])
        flat *= 1 / self.world_size
        self.start_sum(flat)()
        *averages, num_users = flat.split([p.numel() for p in self.trainable] + [len(self.trainable)])
        for parameter, average, users in zip(self.trainable, averages, num_users.tolist()):
            if users > 0:
                parameter.grad = average.view_as(parameter).to(parameter.dtype)


# --- 7. Individual: during the backward pass ---


class DDPIndividual(DDPNaive):
    """Each gradient leaves as soon as it is ready, while the backward pass computes the next: hides the network.

    subtle: all ranks must send in the same order, or rank 0's gradient of one weight is added to rank 1's of another.
    Gradients may become ready in different orders (or not at all, where a rank did not use a parameter), so message i
    leaves only after messages 0 ... i-1, and finish_gradient_synchronization sends what never became ready, as zeros.

    The messages are groups of parameters: here one each, and at the end the flags that say who was used. Set `events`
    to a list to have it record the order of ("ready", parameter index) and ("sent", message index).
    """

    def __init__(self, module: nn.Module, *, ordered: bool = False) -> None:
        super().__init__(module, ordered=ordered)
        self.events: list[tuple[str, int]] | None = None
        self.index_of = {parameter: index for index, parameter in enumerate(self.trainable)}
        self.flags = torch.ones(len(self.trainable), device=self.trainable[0].device)
        self.groups = self._plan_groups()
        self.group_of = {p: number for number, group in enumerate(self.groups) for p in group}
        self._start_step()
        for parameter in self.trainable:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _plan_groups(self) -> list[list[nn.Parameter]]:
        return [[parameter] for parameter in self.trainable] + [[]]

    def _message(self, number: int) -> Tensor:
        """The tensor to be summed for group `number`."""
        return self.groups[number][0].grad if self.groups[number] else self.flags

    def _pack(self, parameter: nn.Parameter) -> None:
        """Bring a gradient, divided by the world size, to where its message takes it from."""
        self._scale_gradient(parameter)

    def _start_step(self) -> None:
        self.num_missing = [len(group) for group in self.groups]
        self.ready: set[nn.Parameter] = set()
        self.unused: list[nn.Parameter] = []  # on this rank
        self.in_flight: list[Callable[[], Any]] = []
        self.flags.fill_(1.0)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.ready:
            raise RuntimeError("finish_gradient_synchronization() was not called after the last backward pass")
        return self.module(*inputs, **kwargs)

    @torch.no_grad()
    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self.synchronizing or self.world_size == 1:
            return
        if parameter in self.ready:  # its first value is on the way already
            name = next(name for name, p in self.module.named_parameters() if p is parameter)
            raise RuntimeError(
                f"a second gradient for {name} before finish_gradient_synchronization(): wrap all micro-batches but "
                "the last in no_sync(), and use checkpointing with use_reentrant=False"
            )
        self._add(parameter)

    def _add(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            self.unused.append(parameter)
            self.flags[self.index_of[parameter]] = 0.0
        self._pack(parameter)
        self.ready.add(parameter)
        self.num_missing[self.group_of[parameter]] -= 1
        self._log("ready", self.index_of[parameter])
        while len(self.in_flight) < len(self.groups) and self.num_missing[len(self.in_flight)] == 0:
            self._log("sent", len(self.in_flight))
            self.in_flight.append(self.start_sum(self._message(len(self.in_flight))))

    def _log(self, event: str, number: int) -> None:
        if self.events is not None:
            self.events.append((event, number))

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        if not self.synchronizing or self.world_size == 1:
            return
        for parameter in self.trainable:
            if parameter not in self.ready:
                self._add(parameter)
        for finish in self.in_flight:
            finish()
        # reading the flags would make a GPU wait, so a rank that used all its parameters does not look
        if self.unused:
            num_users = self.flags.tolist()
            for parameter in self.unused:
                if num_users[self.index_of[parameter]] == 0:
                    parameter.grad = None
        self._start_step()


# --- 8. Bucketed: few messages, during the backward pass ---

FIRST_BUCKET_MB = 1.0  # small, so that the network has something to do early in the backward pass


def plan_buckets(parameters: list[nn.Parameter], bucket_size_mb: float | None) -> list[list[nn.Parameter]]:
    """Cut a list of parameters into runs of at most bucket_size_mb (1 MB = 2**20 bytes), one dtype and device each.

    A parameter larger than that is a bucket of its own; None stands for no limit at all.
    """
    if bucket_size_mb is not None and not bucket_size_mb > 0:
        raise ValueError(f"bucket_size_mb is {bucket_size_mb}, it must be positive (or None: one bucket for all)")
    limit = math.inf if bucket_size_mb is None else bucket_size_mb * 2**20
    buckets: list[list[nn.Parameter]] = []
    free = 0.0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        kind = (parameter.dtype, parameter.device)
        if not buckets or num_bytes > free or kind != (buckets[-1][0].dtype, buckets[-1][0].device):
            free = limit if buckets or bucket_size_mb is None else min(limit, FIRST_BUCKET_MB * 2**20)
            buckets.append([])
        buckets[-1].append(parameter)
        free -= num_bytes
    return buckets


class DDPBucketed(DDPIndividual):
    """Gradients travel in buckets: few messages, as in DDPFlat, and under way early, as in DDPIndividual.

    Each bucket is a flat buffer made once. A gradient is divided while it is copied there, and then `parameter.grad` is
    a view into it: nothing is copied back. The flags of used parameters ride at the end of the last bucket.

    How large? With s bytes in all, a network of w bytes/s and a fixed cost of o seconds per message, n buckets leave
    the last one's transfer uncovered and cost n overheads: s/(n*w) + n*o, least at buckets of sqrt(s*w*o) bytes.
    tests/bench_ddp.py holds this against measurements.
    """

    def __init__(self, module: nn.Module, bucket_size_mb: float | None = 25.0, *, ordered: bool = False) -> None:
        self.bucket_size_mb = bucket_size_mb
        super().__init__(module, ordered=ordered)

    def _plan_groups(self) -> list[list[nn.Parameter]]:
        buckets = plan_buckets(self.trainable, self.bucket_size_mb)
        self.flats: list[Tensor] = []
        self.view_of: dict[nn.Parameter, Tensor] = {}
        for bucket in buckets:
            sizes = [parameter.numel() for parameter in bucket]
            num_flags = len(self.trainable) if bucket is buckets[-1] else 0
            flat = torch.zeros(sum(sizes) + num_flags, dtype=bucket[0].dtype, device=bucket[0].device)
            *views, self.flags = flat.split([*sizes, num_flags])  # the last bucket's stay
            self.view_of.update({p: view.view(p.shape) for p, view in zip(bucket, views)})
            self.flats.append(flat)
        return buckets

    def _message(self, number: int) -> Tensor:
        return self.flats[number]

    def _pack(self, parameter: nn.Parameter) -> None:
        view = self.view_of[parameter]
        if parameter.grad is None:
            view.zero_()
        else:
            torch.mul(parameter.grad, 1 / self.world_size, out=view)
        parameter.grad = view


# --- 9. One switch for all of them ---


class DDPTorch(DistributedDataParallel):
    """PyTorch's own: buckets filled and sent by its C++ Reducer, finished when backward() returns."""

    def finish_gradient_synchronization(self) -> None:
        pass


MODES = ("naive", "flat", "individual", "bucketed", "torch")


def wrap(
    module: nn.Module,
    mode: str,
    *,
    bucket_size_mb: float | None = 25.0,
    ordered: bool = False,
    find_unused_parameters: bool = False,
) -> nn.Module:
    """The module in the data-parallel wrapper called `mode`. The module itself, names and all, stays at `.module`.

    find_unused_parameters is for torch's alone (a mixture of experts needs it there); the others always do.
    """
    if mode not in MODES:
        raise ValueError(f"--ddp {mode} is not known: choose one of {', '.join(MODES)}")
    if mode == "bucketed":
        return DDPBucketed(module, bucket_size_mb, ordered=ordered)
    if mode != "torch":
        return {"naive": DDPNaive, "flat": DDPFlat, "individual": DDPIndividual}[mode](module, ordered=ordered)
    if ordered:
        raise ValueError("torch's DistributedDataParallel cannot add in rank order: choose another --ddp mode")
    if not dist.is_initialized():
        return DDPNaive(module)  # torch's refuses to be alone; alone, this one does nothing
    check_same_model(module)
    wrapped = DDPTorch(
        module,
        bucket_cap_mb=bucket_size_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )
    wrapped.broadcast_buffers = False  # every forward would send all buffers, the tables of RoPE among them
    return wrapped


# --- 10. Running it: two processes against one ---


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run function(ranks, *args) in `world_size` new processes on this machine; their results in rank order.

    Arguments and function must be importable by name; results are tensors, numbers, strings, lists, dicts of these.
    If a rank fails, the others are ended and RuntimeError says which and why. torchrun does this for whole programs.
    """
    # forkserver imports torch once and forks every rank from there: 0.05 s a rank instead of 1 s
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "torch.distributed"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(function, Ranks(r, r, world_size), folder, timeout_s, args))
            for r in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s + 5
        try:
            while running := [p for p in processes if p.exitcode is None]:
                multiprocessing.connection.wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic()))
                if any(p.exitcode for p in processes):  # the others learn it from the network and say so
                    deadline = min(deadline, time.monotonic() + 5)
                if time.monotonic() >= deadline:
                    break
            exit_codes = [p.exitcode for p in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        if any(code != 0 for code in exit_codes):
            raise RuntimeError("\n".join(_what_happened(Path(folder), r, code) for r, code in enumerate(exit_codes)))
        return [torch.load(Path(folder) / f"result{r}.pt", weights_only=True) for r in range(world_size)]


def _what_happened(folder: Path, rank: int, exit_code: int | None) -> str:
    report = folder / f"failure{rank}.txt"
    if report.exists():
        return report.read_text(encoding="utf-8")
    if exit_code is None:
        return f"rank {rank} did not end in time"
    return f"rank {rank} was killed by signal {-exit_code}" if exit_code < 0 else f"rank {rank} left with {exit_code}"


def _rank_main(function: Callable[..., Any], ranks: Ranks, folder: str, timeout_s: float, args: tuple) -> None:
    torch.set_num_threads(1)  # more threads may add in another order, and results are compared to the bit
    try:
        if ranks.world_size > 1:
            store = dist.FileStore(f"{folder}/store", ranks.world_size)
            _join(ranks, store, "gloo", timeout_s)
        torch.save(function(ranks, *args), f"{folder}/result{ranks.rank}.pt")
        shutdown_distributed()
    except Exception as error:
        sentence = explain_failure(error)
        details = "" if isinstance(error, (RankFailure, ValueError)) else "\n" + traceback.format_exc()
        Path(folder, f"failure{ranks.rank}.txt").write_text(sentence + details, encoding="utf-8")
        raise SystemExit(1) from None


def _demo_collectives(ranks: Ranks) -> dict[str, Any]:
    """Each collective on four numbers, and the bytes per rank that a million numbers take."""

    def run(name: str, tensor: Tensor) -> Tensor:
        pieces = list(tensor.tensor_split(ranks.world_size))
        if name == "broadcast":
            dist.broadcast(tensor, 0)
        elif name == "all_reduce":
            start_all_reduce(tensor)()
        elif name == "reduce_scatter":
            start_reduce_scatter(pieces, pieces[ranks.rank])()
            return pieces[ranks.rank]
        else:
            start_all_gather(pieces)()
        return tensor

    results: dict[str, Any] = {}
    for name in ("broadcast", "all_reduce", "reduce_scatter", "all_gather"):
        numbers = torch.tensor([1.0, 2.0, 3.0, 4.0]) * 10**ranks.rank
        results[name] = {"numbers": run(name, numbers).tolist(), "sent": []}
        for _ in range(3):
            million = torch.ones(2**20)
            results[name]["sent"].append(_bytes_sent(lambda: run(name, million)))  # noqa: B023
    return results


def _bytes_sent(step: Callable[[], Any]) -> float:
    # per rank, as rank 0 sees it; the barriers' own bytes are too few to matter
    barrier("measuring")
    before = loopback_bytes()
    step()
    barrier("measuring")
    after = loopback_bytes()
    return math.nan if before is None or after is None else (after - before) / get_world_size()


def _demo_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [module for _ in range(8) for module in (nn.Linear(300, 300), nn.LayerNorm(300), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(300, 7))


def _demo_batch(step: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(20, 300, generator=generator), torch.randint(7, (20,), generator=generator)


def _demo_alone(ranks: Ranks, num_steps: int, num_micro_batches: int) -> list[Tensor]:
    """What all the others must equal: one process, the ranks' micro-batches one after the other, then one step."""
    model = _demo_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(num_steps):
        optimizer.zero_grad()
        for number in range(num_micro_batches):
            inputs, targets = _demo_batch(step, number)
            (nn.functional.cross_entropy(model(inputs), targets) / num_micro_batches).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def _demo_together(ranks: Ranks, mode: str, num_steps: int, bucket_size_mb: float, ordered: bool) -> dict[str, Any]:
    """The same training with one micro-batch on each rank."""
    model = wrap(_demo_model(), mode, bucket_size_mb=bucket_size_mb, ordered=ordered)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sent, events = [], []

    def gradients(inputs: Tensor, targets: Tensor) -> None:
        nn.functional.cross_entropy(model(inputs), targets).backward()
        model.finish_gradient_synchronization()

    for step in range(num_steps):
        optimizer.zero_grad()
        if isinstance(model, DDPIndividual):
            model.events = events = []
        sent.append(_bytes_sent(lambda: gradients(*_demo_batch(step, ranks.rank))))  # noqa: B023
        optimizer.step()
    sends = [position for position, (event, _) in enumerate(events) if event == "sent"]
    ready = [position for position, (event, _) in enumerate(events) if event == "ready"]
    return {
        "parameters": [p.detach() for p in model.module.parameters()],
        "sent": min(sent),
        "messages": {"naive": len(list(model.parameters())) + 1, "flat": 1}.get(mode, len(sends)),
        "early": sum(send < ready[-1] for send in sends),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Data parallelism on this CPU: every rung against one process.")
    parser.add_argument("--world_size", type=int, default=2, choices=(2, 3, 4), help="number of processes (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each rung (default 5)")
    parser.add_argument("--bucket_size_mb", type=float, default=0.5, help="of the bucketed rungs (default 0.5)")
    parser.add_argument("--ordered", action="store_true", help="add in rank order: same bits at any world size")
    args = parser.parse_args(argv)
    world_size = args.world_size
    print(f"The collectives: {world_size} processes, rank r holds 1 2 3 4 times 10^r")
    print(f"{'':16}{'afterwards, rank by rank':40}  MB sent per rank, of 4.19: formula  measured")
    by_rank = run_ranks(_demo_collectives, world_size)
    for name in by_rank[0]:
        numbers = " | ".join(" ".join(f"{number:g}" for number in results[name]["numbers"]) for results in by_rank)
        formula = bytes_sent_per_rank(name, 4 * 2**20, world_size) / 1e6
        print(f"{name:16}{numbers:40}  {formula:33.2f}{min(by_rank[0][name]['sent']) / 1e6:10.2f}")

    [alone] = run_ranks(_demo_alone, 1, args.steps, world_size)
    num_bytes = sum(4 * parameter.numel() for parameter in alone)
    formula = bytes_sent_per_rank("all_reduce", num_bytes, world_size) / 1e6
    print(f"\n{args.steps} steps of AdamW, {len(alone)} parameters, {num_bytes / 1e6:.2f} MB of gradients: ", end="")
    print(f"{world_size} processes against one that\naccumulates their micro-batches. ", end="")
    print(f"MB per rank and step by formula: {formula:.2f}")
    print(f"{'--ddp':12}{'max difference':>16}{'messages':>10}{'of them early':>15}{'MB sent per rank':>18}")
    for mode in MODES:
        if mode == "torch" and args.ordered:
            continue
        result = run_ranks(_demo_together, world_size, mode, args.steps, args.bucket_size_mb, args.ordered)[0]
        difference = max((a - b).abs().max().item() for a, b in zip(alone, result["parameters"]))
        counts = f"{result['messages']:10}{result['early']:15}" if mode != "torch" else " " * 25
        print(f"{mode:12}{difference:16.1e}{counts}{result['sent'] / 1e6:18.2f}")
    print("early: sent before the last gradient was ready, while the backward pass was still computing")


if __name__ == "__main__":
    main()
