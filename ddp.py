"""Data parallelism: several processes, each with its own copy of the model, splitting the data.

Every process (a *rank*) computes gradients on its own part of the batch. Before the optimizer steps, they are averaged
over the ranks, so that all copies take the same step and stay equal:
    gradient = (gradient_0 + ... + gradient_{W-1}) / W          W = world_size
That is the whole method. The rungs below differ in when the sum is started and in how many messages: one per parameter
after the backward pass (naive), one for everything (flat), one per parameter *during* the backward pass (individual),
a few buckets during it (bucketed), as in PyTorch's own DistributedDataParallel. On two ranks all of them give the same
bits, those of one process that accumulates the same micro-batches, each loss divided by W.

    python ddp.py                                   two processes against one, with the bytes they move
    torchrun --standalone --nproc-per-node 4 train.py --ddp bucketed

    1. Ranks: starting, waiting, stopping   5. Naive: one message per gradient        9. One switch for all of them
    2. When a rank fails                    6. Flat: one message                     10. Context parallelism
    3. The collectives                      7. Individual: during the backward pass  11. Two processes against one
    4. The same model on every rank         8. Bucketed: few messages, during it
"""

import argparse
import atexit
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


# --- 1. Ranks: starting, waiting, stopping ---
class Ranks(NamedTuple):
    """This process's number among all, its number on this machine (which is its GPU's), and how many there are."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

def init_distributed(device_type: str = "cpu", timeout_s: float = 120.0) -> Ranks:
    """Join the processes that torchrun started; without torchrun this is Ranks(0, 0, 1) and nothing is started.
    timeout_s bounds every wait of one rank for another, where gloo's own default would hang for 30 minutes. GPUs talk
    through NCCL, CPUs through gloo. Raises ValueError for a wrong setting, ConnectionError if the ranks do not meet."""
    if "RANK" not in os.environ:
        return Ranks()
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"several processes work on cpu or cuda, not on {device_type}: add --device cpu")
    if device_type == "cuda":
        if ranks.local_rank >= (num_gpus := torch.cuda.device_count()):
            raise ValueError(f"rank {ranks.rank} needs GPU {ranks.local_rank}, but this machine has {num_gpus}: "
                             f"start at most {num_gpus} processes (--nproc-per-node) or add --device cpu")
        torch.cuda.set_device(ranks.local_rank)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        # subtle: torchrun keeps one store over all its restarts, with the addresses that the dead attempt's ranks left
        # there for each other; a prefix per attempt keeps them apart
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _join(store, ranks, timeout_s, "nccl" if device_type == "cuda" else "gloo")
    except RuntimeError as error:  # every error of torch.distributed is one
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(f"rank {ranks.rank} of {ranks.world_size} could not join the others at {address} in "
                              f"{timeout_s:g} s (--master-port takes another port): {_reason(error)}") from error
    return ranks

def _join(store: dist.Store, ranks: Ranks, timeout_s: float, backend: str) -> None:
    timeout = timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    atexit.register(_leave_note)

def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

def _store() -> dist.Store:
    return dist.group.WORLD.get_group_store()  # a small key-value server that all ranks can reach

def barrier(message: str) -> None:
    """Wait until every rank has come here; RankFailure says what was waited for, and who is missing (on gloo)."""
    if not dist.is_initialized():
        return
    try:
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[torch.cuda.current_device()])
        else:  # subtle: its own default is 30 minutes, whatever the group's timeout is
            dist.monitored_barrier(timeout=_store().timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise RankFailure(f"waited in vain for {message}: {_reason(error)}") from error

def gather_objects(value: Any) -> list[Any]:
    """What every rank passes, in rank order, on every rank: names, paths, settings."""
    everyones = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(everyones, value)
    return everyones

def on_rank_0(work: Callable[[], Any], description: str) -> Any:
    """Run work() on rank 0 alone; all ranks return its result, or raise RankFailure if it fails. The others do not wait
    in a barrier, whose timeout preparing data may outlast: they look for rank 0's note in the store."""
    if get_world_size() == 1:
        return work()
    store, rank = _store(), get_rank()
    # each rank counts its own calls, in the store: the n-th call here belongs to the n-th call there
    key = f"on_rank_0/{store.add(f'on_rank_0/calls_of_rank_{rank}', 1)}"
    result, looks = None, itertools.count(1)
    if rank == 0:
        try:
            result = work()
        except BaseException as error:  # Ctrl-C as well: nobody may be left waiting
            store.set(key, _reason(error))
            raise
        store.set(key, "done")
    while not store.check([key]):
        if next(looks) == 10:  # two seconds
            print(f"rank {rank} waits for rank 0: {description}", file=sys.stderr, flush=True)
        time.sleep(0.2)
    if (outcome := store.get(key).decode()) != "done":
        raise RankFailure(f"rank 0 failed at {description}: {outcome}")
    return gather_objects(result)[0]

def end_distributed() -> None:
    """Leave the group at the end of a run that went well: nobody goes before all have come.
    Never in a `finally`: a rank that failed would wait here for ranks that wait for it elsewhere."""
    if dist.is_initialized():
        _leave_note()
        barrier("the end of the run")
        dist.destroy_process_group()

# --- 2. When a rank fails ---
class RankFailure(RuntimeError):
    """This rank is in order, another one is not; the message says which, and why."""

def _leave_note() -> None:
    # at the end of a run or of the process; explain_failure reads it where others still wait for this rank
    with suppress(RuntimeError):  # the store may be gone
        if dist.is_initialized() and not _store().check([f"failed/{get_rank()}"]):
            _store().set(f"finished/{get_rank()}", "yes")

def _reason(error: BaseException) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0]
    if line.startswith("[/"):  # of "[/file.cc:553] Connection closed by peer. This is typically ..." the middle
        line = line.split("] ", 1)[-1].split(". ")[0]
    # these carry a sentence; of anything else, as KeyError: 'x', the type is half of the message
    return line if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {line}"

def explain_failure(error: BaseException) -> str:
    """Why this job ends, in one sentence that names the rank at fault. To be called once, where the program ends.
    A rank with an error of its own leaves it in the store; the others, whose connection closed, look for it there."""
    reason, rank = _reason(error), get_rank()
    if get_world_size() == 1:
        return reason
    # gloo raises plain RuntimeErrors, known by their text only: "[.../gloo/transport/tcp/pair.cc:547] Connection ..."
    by_text = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection", "NCCL"))
    lost_contact = by_text or isinstance(error, (RankFailure, dist.DistError))
    peers = silent = [peer for peer in range(get_world_size()) if peer != rank]
    store, why = _store(), "the rank that hosts the store is gone"
    with suppress(RuntimeError):
        store.set(f"failed/{rank}", "" if lost_contact else reason)
        if not lost_contact:
            return f"rank {rank} failed: {reason}"
        deadline = time.monotonic() + 2
        while silent and time.monotonic() < deadline:
            silent = [peer for peer in peers if not store.check([f"failed/{peer}"])]
            for peer in set(peers).difference(silent):
                if theirs := store.get(f"failed/{peer}").decode():
                    return f"rank {rank} stops because rank {peer} failed: {theirs}"
            time.sleep(0.05)
        why = "the ranks lost each other"
        if finished := [peer for peer in peers if store.check([f"finished/{peer}"])]:
            why = f"rank {finished[0]} had already finished or left, and every rank needs the same number of steps"
        elif silent:
            why = f"there is no answer from rank {', '.join(map(str, silent))} (killed, hanging or waiting)"
    return f"rank {rank} stops because {why}: {reason}"

# --- 3. The collectives ---
# Started now, finished later: each start_ function returns at once with a function that waits for the end. Between the
# two the tensors belong to the network. Without a process group all of them leave things as they are.
def start_all_reduce(tensor: Tensor) -> Callable[[], Any]:
    """Replace `tensor` by its sum over the ranks, added in any order: the same bits on two ranks, but not on four."""
    return dist.all_reduce(tensor, async_op=True).wait if get_world_size() > 1 else lambda: None

def start_reduce_scatter(pieces: list[Tensor], output: Tensor, group: dist.ProcessGroup | None = None) -> Callable:
    """Rank r gets the sum over the ranks of their pieces[r], in `output` (which may be that piece itself).
    Each sends piece r straight to rank r, which adds what it receives in rank order, as one process that accumulates
    micro-batches 0, 1, 2, ... does. Pieces may differ in length. (gloo's own is an all-reduce inside.)"""
    members = dist.get_process_group_ranks(group) if len(pieces) > 1 else [get_rank()]  # None: all ranks
    assert len(pieces) == len(members), f"{len(pieces)} pieces for {len(members)} ranks"
    mine = members.index(get_rank())
    received = [piece if at == mine else torch.empty_like(pieces[mine]) for at, piece in enumerate(pieces)]
    others = [(at, peer) for at, peer in enumerate(members) if at != mine]
    sends = [dist.P2POp(dist.isend, pieces[at], peer, group) for at, peer in others]
    receives = [dist.P2POp(dist.irecv, received[at], peer, group) for at, peer in others]
    works = dist.batch_isend_irecv(sends + receives) if others else []
    def finish() -> None:
        for work in works:
            work.wait()
        total = received[0].to(output.dtype, copy=True)  # bfloat16 pieces may be added up in float32
        for piece in received[1:]:
            total += piece
        output.copy_(total)
    return finish

def start_all_gather(pieces: list[Tensor], group: dist.ProcessGroup | None = None) -> Callable[[], Any]:
    """Every rank has filled pieces[its rank]; fill the others. One broadcast a rank: faster than gloo's all-gather."""
    senders = zip(dist.get_process_group_ranks(group), pieces, strict=True) if len(pieces) > 1 else ()
    works = [dist.broadcast(piece, sender, group, async_op=True) for sender, piece in senders]
    return lambda: [work.wait() for work in works]

def start_ordered_all_reduce(tensor: Tensor) -> Callable[[], Any]:
    """An all-reduce made of the two above: the same bytes, added in rank order, so the same bits at any world size."""
    pieces = list(tensor.view(-1).tensor_split(get_world_size()))
    finish_scatter = start_reduce_scatter(pieces, pieces[get_rank()])
    return lambda: (finish_scatter(), start_all_gather(pieces)())

def all_reduce_sum(value: Tensor | float) -> Tensor | float:
    """The sum of `value` over the ranks: a new tensor for a tensor, a float, added in float64, for a number."""
    if get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    is_number = not isinstance(value, Tensor)
    total = torch.tensor(value, dtype=torch.float64, device=device) if is_number else value.detach().clone()
    dist.all_reduce(total)
    return total.item() if is_number else total

def token_loss_scale(num_tokens: int) -> float:
    """What each rank multiplies its *summed* loss by, for the gradients of the mean over all tokens. Where ranks hold
    unequally many, the mean of means is another. num_tokens: this rank's, in all micro-batches of a step."""
    if not (total_tokens := all_reduce_sum(float(num_tokens))):
        raise ValueError("no rank has a token to learn from in this batch: every target is ignored")
    return get_world_size() / total_tokens

def bytes_sent_per_rank(collective: str, num_bytes: int, world_size: int) -> float:
    """What the best algorithms send (Patarasuk & Yuan 2009), averaged over the ranks, for a tensor of num_bytes.
    >>> bytes_sent_per_rank("all_reduce", 1000, 4)
    1500.0
    """
    return (2 if collective == "all_reduce" else 1) * (world_size - 1) / world_size * num_bytes

def measure_bytes_sent(work: Callable[[], Any]) -> float:
    """Bytes sent per rank during work(), by the kernel's count for the loopback interface; nan where there is none.
    Other programs' bytes are in it: take the least of several. Rank 0's answer counts: it begins before the others."""
    def count() -> float:
        return int(counter.read_text()) if counter.exists() else math.nan
    counter = Path("/sys/class/net/lo/statistics/tx_bytes")
    before = count()
    barrier("the measurement")
    work()
    barrier("the others' messages")
    return (count() - before) / get_world_size()

# --- 4. The same model on every rank ---
@torch.no_grad()
def copy_rank_0(module: nn.Module) -> None:
    """Give all ranks the parameters, frozen ones too, and buffers of rank 0; a tied weight travels once. Before that,
    raise ValueError on every rank, naming the first difference, unless all hold the same list of tensors: gloo would
    abort when sizes differ, and give garbage without a word on (2, 3) against (3, 2) or float32 against int32."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    mine = [f"{name} {tuple(t.shape)} {t.dtype}{' trained' if t.requires_grad else ''}" for name, t in tensors]
    everyones = gather_objects(mine)
    for rank, theirs in enumerate(everyones):
        for expected, found in itertools.zip_longest(everyones[0], theirs, fillvalue="nothing"):
            if expected != found:
                raise ValueError(f"rank {rank} has another model than rank 0: {found} instead of {expected}")
    for work in [dist.broadcast(t.detach(), 0, async_op=True) for _, t in tensors if len(everyones) > 1]:
        work.wait()

# --- 5. Naive: one message per gradient ---
class DDPNaive(nn.Module):
    """The definition: after the backward pass, replace the gradients by their averages over the ranks, one by one.
        model = DDPNaive(module)
        loss(model(x)).backward()
        model.finish_gradient_synchronization()
        optimizer.step()
    A parameter that only some ranks used in this step gets the average with zeros for the others; one that nobody used
    keeps the gradient None, so that the optimizer passes it over. ordered=True adds in rank order."""
    def __init__(self, module: nn.Module, *, ordered: bool = False) -> None:
        super().__init__()
        copy_rank_0(module)
        self.module, self.world_size = module, get_world_size()
        self.start_sum = start_ordered_all_reduce if ordered else start_all_reduce
        self.synchronizing, self.is_pending = True, False  # pending: messages are under way
        # last layer first, as gradients arrive; parameters() gives a tied weight once
        self.trainable = [p for p in reversed(list(module.parameters())) if p.requires_grad]
        assert self.trainable, "the model has no parameter that requires a gradient"

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.is_pending:
            raise RuntimeError("finish_gradient_synchronization() was not called after the last backward pass")
        return self.module(*inputs, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on this rank: to be put around all micro-batches of a step but the last."""
        before, self.synchronizing = self.synchronizing, False
        try:
            yield
        finally:
            self.synchronizing = before

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """To be called between backward and step: after it every rank holds the same, averaged gradients."""
        if self.synchronizing and self.world_size > 1:
            self._average()

    def _average(self) -> None:
        num_users = self.trainable[0].new_tensor([parameter.grad is not None for parameter in self.trainable])
        self.start_sum(num_users)()  # how many ranks used each parameter
        for parameter, users in zip(self.trainable, num_users.tolist()):
            if users > 0:
                # divided before the sum, as torch does: a sum in fp16 could overflow (exact for 2, 4, 8, ... ranks)
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = gradient.contiguous().mul_(1 / self.world_size)
                self.start_sum(parameter.grad)()

# --- 6. Flat: one message ---
class DDPFlat(DDPNaive):
    """All gradients in one long vector (one for each dtype) and one all-reduce: saves the fixed cost of messages.
    It takes a second copy of the gradients, and still nothing is sent before the backward pass is over."""
    def _average(self) -> None:
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.trainable):
            group = [parameter for parameter in self.trainable if parameter.dtype == dtype]
            used = group[0].new_tensor([p.grad is not None for p in group])
            flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group), used])
            self.start_sum(flat.mul_(1 / self.world_size))()
            *averages, num_users = flat.split([p.numel() for p in group] + [len(group)])
            for parameter, average, users in zip(group, averages, num_users.tolist()):
                if users > 0:
                    parameter.grad = average.view(parameter.shape)

# --- 7. Individual: during the backward pass ---
class DDPIndividual(DDPNaive):
    """Each gradient leaves as soon as it is ready, while the backward pass computes the next: hides the network.
    subtle: all ranks must send in the same order, or one rank's gradient of a weight is added to another's of a
    different weight. Ranks may take different branches, so message n leaves only after messages 0 ... n-1, and
    finish_gradient_synchronization() sends what never became ready, as zeros.
    A message is a flat buffer, made once, for the gradients of a group of parameters: here one. A gradient is divided
    while it is copied there, then `parameter.grad` is a view into it: nothing is copied back. The flags of used
    parameters end the last message. `events` logs a step: ("ready", parameter's index), ("sent", message's number)."""
    def __init__(self, module: nn.Module, *, ordered: bool = False, plan: Callable[..., list] | None = None) -> None:
        super().__init__(module, ordered=ordered)
        self.groups = plan(self.trainable) if plan else [[parameter] for parameter in self.trainable]
        self.messages: list[Tensor] = []
        self.place_of: dict[nn.Parameter, tuple[int, int, Tensor]] = {}  # index, number of its message, its view there
        for number, group in enumerate(self.groups):
            sizes = [*(parameter.numel() for parameter in group), len(self.trainable) * (group is self.groups[-1])]
            self.messages.append(torch.zeros(sum(sizes), dtype=group[0].dtype, device=group[0].device))
            *views, self.flags = self.messages[-1].split(sizes)
            for parameter, view in zip(group, views):
                self.place_of[parameter] = len(self.place_of), number, view.view(parameter.shape)
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self._start_step()

    def _start_step(self) -> None:
        self.is_pending, self.num_missing = False, [len(group) for group in self.groups]
        self.ready, self.in_flight = set(), []  # parameters; of messages the functions that wait for their ends
        self.flags.fill_(1)

    @torch.no_grad()
    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self.synchronizing or self.world_size == 1:
            return
        if parameter in self.ready:  # its first value is on the way already
            name = next(name for name, p in self.module.named_parameters() if p is parameter)
            raise RuntimeError(f"a second gradient for {name} before finish_gradient_synchronization(): wrap "
                               "micro-batches but the last in no_sync(), use checkpointing with use_reentrant=False")
        if not self.is_pending:
            self.events: list[tuple[str, int]] = []
        self.is_pending = True
        index, number, view = self.place_of[parameter]
        if parameter.grad is None:
            self.flags[index] = 0
            view.zero_()
        else:
            torch.mul(parameter.grad, 1 / self.world_size, out=view)
        parameter.grad = view
        self.ready.add(parameter)
        self.events.append(("ready", index))
        self.num_missing[number] -= 1
        while (following := len(self.in_flight)) < len(self.groups) and self.num_missing[following] == 0:
            self.events.append(("sent", following))
            self.in_flight.append(self.start_sum(self.messages[following]))

    def _average(self) -> None:
        late = [parameter for parameter in self.trainable if parameter not in self.ready]
        unused_here = [parameter for parameter in late if parameter.grad is None]
        for parameter in late:
            self._on_gradient(parameter)
        for finish in self.in_flight:
            finish()
        num_users = self.flags.tolist() if unused_here else []  # not read in vain: a GPU would have to be waited for
        for parameter in unused_here:
            if num_users[self.place_of[parameter][0]] == 0:
                parameter.grad = None
        self._start_step()

# --- 8. Bucketed: few messages, during it ---
def plan_buckets(parameters: list[nn.Parameter], bucket_size_mb: float) -> list[list[nn.Parameter]]:
    """Cut a list of parameters into runs of at most bucket_size_mb (1 MB = 2**20 bytes), one dtype and device each. A
    parameter larger than that is a bucket of its own. The first bucket is small: the network gets work to do early."""
    buckets: list[list[nn.Parameter]] = [[]]
    free_bytes = min(bucket_size_mb, 1.0) * 2**20
    for p in parameters:
        if (last := buckets[-1]) and (p.nbytes > free_bytes or (p.dtype, p.device) != (last[0].dtype, last[0].device)):
            buckets.append([])
            free_bytes = bucket_size_mb * 2**20
        buckets[-1].append(p)
        free_bytes -= p.nbytes
    return buckets

class DDPBucketed(DDPIndividual):
    """Larger groups: few messages, as in DDPFlat, and under way early, as in DDPIndividual.
    How large? With s bytes in all, a network of w bytes/s and a fixed cost of o seconds per message, n buckets leave
    the last one's transfer uncovered and cost n overheads: s/(n*w) + n*o, least for buckets of sqrt(s*w*o) bytes."""
    def __init__(self, module: nn.Module, bucket_size_mb: float = 25.0, *, ordered: bool = False) -> None:
        super().__init__(module, ordered=ordered, plan=lambda trainable: plan_buckets(trainable, bucket_size_mb))

# --- 9. One switch for all of them ---
MODES = ("naive", "flat", "individual", "bucketed", "torch")
def wrap(module: nn.Module, mode: str, *, bucket_size_mb: float = 25.0, ordered: bool = False) -> nn.Module:
    """The module in the data-parallel wrapper called `mode`. The module itself, its names untouched, is at `.module`.
    torch's raises when a step leaves a parameter unused, and wants the forward pass, too, within no_sync()."""
    assert mode in MODES, f"{mode} is none of {MODES}"
    if mode == "torch" and ordered:
        raise ValueError("torch's DistributedDataParallel cannot add in rank order: choose another --ddp mode")
    ours = dict(zip(MODES, (DDPNaive, DDPFlat, DDPIndividual, partial(DDPBucketed, bucket_size_mb=bucket_size_mb))))
    if mode in ours or get_world_size() == 1:  # alone the naive one does nothing; torch's refuses
        return ours[mode if get_world_size() > 1 else "naive"](module, ordered=ordered)
    copy_rank_0(module)
    wrapped = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=bucket_size_mb, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # or every forward sends RoPE's tables
    wrapped.finish_gradient_synchronization = lambda: None  # its C++ Reducer is done when backward() returns
    return wrapped

# --- 10. Context parallelism ---
# A long sequence is split like a batch: every layer but attention looks at one token at a time. A token attends to all
# before it, so the second half of a sequence costs three times the first. Therefore N ranks cut it into 2N chunks, and
# rank r takes chunks r and 2N-1-r, an early, cheap one and a late, dear one. Two ranks, causal:
#       keys  0 1 2 3
#   queries 0 #            rank 0
#           1 # #          rank 1     rank 0 computes 1 + 4 = 5 tiles,
#           2 # # #        rank 1     rank 1 computes 2 + 3 = 5
#           3 # # # #      rank 0
# In each layer every rank gathers all keys and values (in their G heads, before these are repeated), and keeps its own
# queries. Backward, each has a gradient for all keys; a reduce-scatter adds them up at the owners. (Llama 3, section
# 3.3.2.) Positions and documents are explicit, so that masks and rotary embeddings need no special case.
def zigzag_order(n: int) -> list[int]:
    """The chunks of rank 0, of rank 1, ...
    >>> zigzag_order(4)
    [0, 7, 1, 6, 2, 5, 3, 4]
    """
    return [chunk for rank in range(n) for chunk in (rank, 2 * n - 1 - rank)]

class ContextParallel:
    """Teams of `size` neighbouring ranks read one sequence each; world_size / size teams split the batch.
        model = TransformerLM(config, attention=context.attention(local))
        inputs, targets, positions, segment_ids = context.begin(inputs, targets, segment_ids=...)
        loss = cross_entropy(model(inputs, positions=positions, segment_ids=segment_ids), targets)
    The loss is each rank's mean over its tokens, equally many everywhere: the average over all ranks, which any --ddp
    mode takes of the gradients, is that of the mean over all tokens. zigzag=False takes chunks 2r and 2r+1."""
    def __init__(self, size: int, *, zigzag: bool = True) -> None:
        assert get_world_size() % size == 0, f"{get_world_size()} processes do not divide into teams of {size}"
        self.size, (self.team, self.index) = size, divmod(get_rank(), size)
        self.order = zigzag_order(size) if zigzag else list(range(2 * size))
        self.chunks = self.order[2 * self.index : 2 * self.index + 2]  # this rank's
        # subtle: every rank takes part in the making of every group, its own or not
        teams = [dist.new_group(range(r, r + size)) for r in range(0, get_world_size(), size) if size > 1]
        self.group = teams[self.team] if teams else None

    def split(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's two chunks of a whole sequence."""
        assert x.shape[dim] % (2 * self.size) == 0, f"{x.shape[dim]} tokens do not divide into {2 * self.size} chunks"
        return torch.cat([x.chunk(2 * self.size, dim)[chunk] for chunk in self.chunks], dim)

    def begin(self, *tokens: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None) -> list:
        """Split a batch: tensors (B, T), then positions and segment ids, also kept whole: they belong to the keys."""
        if positions is None:
            positions = torch.arange(tokens[0].shape[-1], device=tokens[0].device)  # (T,)
        self.positions, self.segment_ids = positions, segment_ids
        return [x if x is None else self.split(x) for x in (*tokens, positions, segment_ids)]

    def attention(self, local: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`local`, any attention with the arguments of flash.flash_attention, over the sequence of the whole team.
        Each of the two chunks meets only the keys up to its own end: what lies behind it is not causal."""
        def attend(q: Tensor, k: Tensor, v: Tensor, *, positions: Tensor, segment_ids: Tensor | None = None) -> Tensor:
            whole = _GatherSequence.apply(torch.cat((k, v), dim=-1), self)  # (B, G, T, 2D), one message for both
            outputs, length = [], q.shape[2] // 2
            for half, chunk in enumerate(self.chunks):
                here, seen = slice(half * length, (half + 1) * length), slice((chunk + 1) * length)
                keys, values = whole[:, :, seen].split((k.shape[-1], v.shape[-1]), dim=-1)  # (B, G, S, D)
                places = {"positions": positions[..., here], "kv_positions": self.positions[..., seen]}
                if segment_ids is not None:
                    places |= {"segment_ids": segment_ids[..., here], "kv_segment_ids": self.segment_ids[..., seen]}
                outputs.append(local(q[:, :, here], keys, values, **places))
            return torch.cat(outputs, dim=2)  # (B, H, T/N, D)
        return attend

class _GatherSequence(torch.autograd.Function):
    """A rank's chunks (B, G, T/N, D) -> those of the whole team in the order of the sequence, (B, G, T, D)."""
    @staticmethod
    def forward(ctx, x: Tensor, context: ContextParallel) -> Tensor:
        ctx.context, ctx.dtype = context, x.dtype
        parts = [x.contiguous() if at == context.index else x.new_empty(x.shape) for at in range(context.size)]
        start_all_gather(parts, context.group)()
        chunks = [half for part in parts for half in part.chunk(2, dim=2)]  # in context.order
        return torch.cat([chunks[context.order.index(chunk)] for chunk in range(len(chunks))], dim=2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        context = ctx.context
        grad = grad.to(torch.promote_types(ctx.dtype, torch.float32))  # 16 bits would be added up in 32
        chunks = [grad.chunk(2 * context.size, dim=2)[chunk] for chunk in context.order]
        parts = [torch.cat(pair, dim=2) for pair in zip(chunks[::2], chunks[1::2])]
        start_reduce_scatter(parts, parts[context.index], context.group)()
        return parts[context.index].to(ctx.dtype), None

# --- 11. Two processes against one ---
def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run function(ranks, *args) in world_size new processes; returns the results by rank: tensors, numbers, strings,
    lists and dicts of these. When a rank fails, all end, and torch.multiprocessing's exception says which, and why."""
    # a forkserver imports torch (and _dynamo, its slow part) once and forks every rank: 0.1 s instead of 3 s for two
    method = "forkserver" if "forkserver" in torch.multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        torch.multiprocessing.set_forkserver_preload(["torch", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _rank_main, (function, world_size, folder, timeout_s, args), world_size, join=False, start_method=method)
        while not context.join(grace_period=3):
            pass  # one has ended well, others have not
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world_size)]

def _rank_main(rank: int, function: Callable, world_size: int, folder: str, timeout_s: float, args: tuple) -> None:
    ranks = Ranks(rank, rank, world_size)
    torch.set_num_threads(1)  # more threads may add in another order, and results are compared to the bit
    try:
        if world_size > 1:
            _join(dist.FileStore(f"{folder}/store", world_size), ranks, timeout_s, "gloo")
        torch.save(function(ranks, *args), Path(folder, f"{rank}.pt"))
        end_distributed()
    except Exception as error:
        raise RuntimeError(explain_failure(error)) from error

def _demo_collectives(ranks: Ranks) -> dict[str, tuple[list[float], float]]:
    """By collective four numbers afterwards, and the bytes per rank that it takes for a million."""
    def run(name: str, tensor: Tensor) -> Tensor:
        pieces = list(tensor.tensor_split(ranks.world_size))
        start = {"broadcast": lambda: dist.broadcast(tensor, 0, async_op=True).wait,
                 "all_reduce": lambda: start_all_reduce(tensor), "all_gather": lambda: start_all_gather(pieces),
                 "reduce_scatter": lambda: start_reduce_scatter(pieces, pieces[ranks.rank])}[name]
        start()()
        return pieces[ranks.rank] if name == "reduce_scatter" else tensor
    results = {}
    for name in ("broadcast", "all_reduce", "reduce_scatter", "all_gather"):
        sent = min(measure_bytes_sent(partial(run, name, torch.ones(2**20))) for _ in range(3))
        results[name] = run(name, torch.tensor([1.0, 2.0, 3.0, 4.0]) * 10**ranks.rank).tolist(), sent
    return results

def train_toy(ranks: Ranks, num_micro_batches: int, build: Callable, look: Callable = lambda *_: None) -> tuple:
    """Five steps of a small model, each over num_micro_batches micro-batches that the ranks share out, and the bytes
    that a step sends. `build` makes wrapped model and optimizer, which `look` may see with the gradients in place."""
    torch.manual_seed(0)
    layers = [module for _ in range(8) for module in (nn.Linear(300, 300), nn.LayerNorm(300), nn.GELU())]
    model, optimizer = build(nn.Sequential(*layers, nn.Linear(300, 7)))
    def step(number: int) -> None:
        optimizer.zero_grad()
        for index in range(ranks.rank, num_micro_batches, ranks.world_size):
            torch.manual_seed(1000 * number + index)
            loss = nn.functional.cross_entropy(model(torch.randn(20, 300)), torch.randint(7, (20,)))
            (loss * ranks.world_size / num_micro_batches).backward()
        model.finish_gradient_synchronization()
        look(model, optimizer)
        optimizer.step()
    return model, optimizer, min(measure_bytes_sent(partial(step, number)) for number in range(5))

def _demo_training(ranks: Ranks, num_micro_batches: int, mode: str) -> dict[str, Any]:
    model, _, sent = train_toy(ranks, num_micro_batches, lambda module: (
        wrap(module, mode, bucket_size_mb=0.5), torch.optim.AdamW(module.parameters(), lr=1e-3)))
    parameters = [parameter.detach() for parameter in model.module.parameters()]
    events = [event for event, _ in getattr(model, "events", [])]
    messages = events.count("sent") or {"naive": len(parameters) + 1, "flat": 1}.get(mode)
    return {"parameters": parameters, "sent": sent, "messages": messages,
            "early": "".join(events).rpartition("ready")[0].count("sent")}

def main(argv: list[str] | None = None, world_size: int = 2) -> None:
    argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Every rung, two ranks against one.").parse_args(argv)
    print(f"The collectives: {world_size} processes, rank r holds 1 2 3 4 times 10^r; MB sent per rank for 4.19 MB")
    print(f"{'':16}{'formula':>8}{'measured':>10}   afterwards, rank by rank")
    by_rank = run_ranks(_demo_collectives, world_size)
    for name, (_, measured) in by_rank[0].items():
        numbers = " | ".join(" ".join(f"{number:g}" for number in result[name][0]) for result in by_rank)
        formula = bytes_sent_per_rank(name, 2**22, world_size) / 1e6
        print(f"{name:16}{formula:8.2f}{measured / 1e6:10.2f}   {numbers}")
    [alone] = run_ranks(_demo_training, 1, world_size, "naive")
    num_bytes = sum(parameter.nbytes for parameter in alone["parameters"])
    formula = bytes_sent_per_rank("all_reduce", num_bytes, world_size)
    print(f"\n5 steps of AdamW: {world_size} processes against one that accumulates their micro-batches")
    print(f"{len(alone['parameters'])} gradients, {num_bytes / 1e6:.2f} MB; formula: {formula / 1e6:.2f} MB a rank")
    print(f"{'--ddp':12}{'max difference':>16}{'messages':>10}{'of them early':>15}{'MB sent per rank':>18}")
    for mode in MODES:
        result = run_ranks(_demo_training, world_size, world_size, mode)[0]
        difference = max((a - b).abs().max().item() for a, b in zip(alone["parameters"], result["parameters"]))
        counts = f"{result['messages']:10}{result['early']:15}" if result["messages"] else " " * 25
        print(f"{mode:12}{difference:16.1e}{counts}{result['sent'] / 1e6:18.2f}")
    print("early: sent while the backward pass was still computing, before the last gradient was ready")

if __name__ == "__main__":
    main()
