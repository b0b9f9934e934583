"""Several processes splitting the memory: every rank keeps a part of what all of them would hold alike.

Under data parallelism each of W ranks holds the same parameters, gradients and optimizer state. The ZeRO stages
(Rajbhandari et al. 2020) give every number one owner instead, one stage more of them each:
    ZeRO-1   optimizer state          every rank steps its own rows of the parameters, then hands them round
    ZeRO-2   and gradients            a gradient is summed at its owner only (a reduce-scatter) and dropped elsewhere
    FSDP     and parameters (ZeRO-3)  a block's weights are gathered when it computes, and freed after it
Who owns what is decided once for all three: lay the parameters end to end and cut the line into W equal runs of rows.
An optimizer that treats rows apart then computes the same bits on smaller parameters; a probe finds out if it does.

    python shard_opt.py                             what two processes hold and send, and their difference to one
    torchrun --standalone --nproc-per-node 2 train.py --ddp bucketed --shard_opt zero1
    torchrun --standalone --nproc-per-node 2 train.py --shard_opt fsdp

    1. Where the bytes go      4. ZeRO-1: each rank steps its own rows        7. Checkpoints: whole, or in shards
    2. Who owns what           5. ZeRO-2 and FSDP: gradients, parameters      8. Two processes against one
    3. Exchanging rows         6. One switch for all of them
"""

import argparse
import hashlib
import io
import itertools
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from ddp import DDPNaive, Ranks, gather_objects, get_rank, get_world_size  # isort: skip
from ddp import run_ranks, start_all_gather, start_reduce_scatter, train_toy, wrap  # isort: skip

# --- 1. Where the bytes go ---
def memory_table(num_parameters: int, world_size: int) -> dict[str, dict[str, float]]:
    """Bytes per rank, stage by stage, of float32 training with AdamW: 16 a parameter before anything is sharded.
    >>> [sum(parts.values()) for parts in memory_table(1000, 4).values()]
    [16000.0, 10000.0, 7000.0, 4000.0]
    """
    size, w = 4.0 * num_parameters, world_size
    cuts = {"none": (1, 1, 1), "zero1": (1, 1, w), "zero2": (1, w, w), "fsdp": (w, w, w)}
    return {name: dict(parameters=size / p, gradients=size / g, state=2 * size / s) for name, (p, g, s) in cuts.items()}

def bytes_held(module: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """What this rank holds at this moment. Storages are counted, not tensors: a view holds nothing of its own, but
    keeps alive all that it looks into."""
    optimizer = getattr(optimizer, "local", getattr(optimizer, "optim", optimizer))  # inside ours, inside torch's
    parameters = [*module.parameters(), *(p for unit in getattr(module, "units", ()) for p in unit.parameters)]
    def count(tensors: Iterable[Any]) -> int:
        storages = [getattr(t, "_local_tensor", t).untyped_storage() for t in tensors if isinstance(t, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return {"parameters": count(parameters), "gradients": count(p.grad for p in parameters),
            "state": count(tree_leaves([*optimizer.state.values()]))}

# --- 2. Who owns what ---
Owners = list[tuple[int, int]] | None  # of a parameter: for each rank its rows [first, end); None: all, on every rank
def rows_of(whole: Tensor, owners: Owners, rank: int | None = None) -> Tensor:
    """The rows of a whole tensor that `rank` (by default this one) owns: a view."""
    first, end = owners[get_rank() if rank is None else rank] if owners else (0, len(whole) if whole.ndim else 1)
    return whole[first:end] if whole.ndim else whole if first < end else whole.reshape(1)[:0]

def first_owner(owners: Owners) -> int:
    return next((rank for rank, (first, end) in enumerate(owners or []) if first < end), 0)

def cut_rows(shapes: list[torch.Size], load: list[int]) -> list[Owners]:
    """Lay the tensors end to end and cut between rows, so that all ranks own equally many numbers.
    `load` is what each rank owns already, and is brought up to date: who has more of that gets less of this.
    >>> cut_rows([torch.Size([3, 4]), torch.Size([5, 4])], [0, 0])
    [[(0, 3), (3, 3)], [(0, 1), (1, 5)]]
    """
    total = sum(shape.numel() for shape in shapes)
    missing = [max((sum(load) + total) / len(load) - amount, 0.0) for amount in load]
    cuts = [total * amount / (sum(missing) or 1.0) for amount in itertools.accumulate(missing)][:-1]
    result, start = [], 0
    for shape in shapes:
        num_rows, row_size = (shape[0] if shape else 1), shape[1:].numel()
        inside = [min(max(round((cut - start) / max(row_size, 1)), 0), num_rows) for cut in cuts]
        result.append(list(itertools.pairwise([0, *inside, num_rows])))
        start += shape.numel()
        for rank, (first, end) in enumerate(result[-1]):
            load[rank] += (end - first) * row_size
    return result

def own_whole(shapes: list[torch.Size], load: list[int]) -> list[Owners]:
    """Undivided tensors, the largest first, each to the rank that owns least so far: even, if none is very large."""
    result = [[(0, 0)] * len(load) for _ in shapes]
    for index in sorted(range(len(shapes)), key=lambda index: -shapes[index].numel()):
        owner = load.index(min(load))
        result[index][owner] = (0, shapes[index][0] if shapes[index] else 1)
        load[owner] += shapes[index].numel()
    return result

def treats_rows_apart(make: Callable[[list[dict]], Optimizer], group: dict[str, Any]) -> bool:
    """Whether make([group]) moves two blocks of rows as it moves their matrix: tried out. Adam does. Muon (a singular
    value is the whole matrix's) and Adafactor (means over columns) do not: cut by rows they would run, and be wrong."""
    matrix = torch.arange(48.0).sin().view(8, 6) * torch.logspace(-2, 2, 8)[:, None]  # rows of all sizes
    matrix, results = matrix.to(group["params"][0].device), []
    for blocks in ([matrix], [matrix[:3], matrix[3:]]):
        parameters = [nn.Parameter(block.clone()) for block in blocks]
        optimizer = make([{**group, "params": parameters, "lr": 0.1}])  # one that shows: a warm-up's first may be 0
        for _ in range(3):
            for p in parameters:
                p.grad = 1 + p.detach()
            try:
                optimizer.step()
            except (TypeError, RuntimeError) as error:  # LBFGS asks for a closure, SparseAdam for sparse gradients
                raise ValueError(f"this optimizer cannot be sharded, it fails on a trial matrix: {error}") from None
        results.append(torch.cat([p.detach() for p in parameters]))
    # not to the last bit: fused kernels round a tensor's last few numbers in another way
    return bool((results[0] - results[1]).abs().max() <= 1e-4 * (results[0] - matrix).abs().max())

def owned_whole(make: Callable[[list[dict]], Optimizer], groups: list[dict[str, Any]]) -> set[nn.Parameter]:
    """The parameters of those groups in which the optimizer needs them undivided (Muon's groups differ)."""
    return {p for group in groups if group["params"] and not treats_rows_apart(make, group) for p in group["params"]}

# --- 3. Exchanging rows ---
class Unit:
    """Parameters p whose rows are exchanged together; p.shard, a parameter too, is the rows that this rank owns.
    They lie end to end in a buffer, in the order of their owners, so that each rank's rows are one segment of it: W
    messages for all of them, and no copying, as the whole parameters are views into the buffer. (There is one for each
    kind: by rows or whole, dtype, device.) keep: the shards are views as well, and the buffer is never freed.
    copies: parameters of which every rank has all, and gets the whole mean gradient; they lie behind the segments."""
    @torch.no_grad()
    def __init__(self, parameters: list[nn.Parameter], load: list[int], whole: set[nn.Parameter],
                 dtype: torch.dtype | None = None, keep: bool = True, copies: Iterable[nn.Parameter] = ()) -> None:
        if len(load) == 1:
            warnings.warn("there is one process, so nothing is sharded: start several with torchrun", stacklevel=3)
        self.parameters, self.keep, self.in_backward = parameters, keep, False
        self.arriving: list[Callable[[], Any]] | None = None  # None: what the buffers hold is out of date
        self.buffers: list[tuple[Tensor, list[Tensor], list[nn.Parameter]]] = []  # with its segments and parameters
        kinds: dict[tuple, list[nn.Parameter]] = {}
        for p in parameters:
            kinds.setdefault((p not in whole, dtype or p.dtype, p.device), []).append(p)
        for kind in sorted(kinds, key=lambda kind: kind[0]):  # whole ones first: rows then fill up what is uneven
            shapes = [torch.Size([0]) if p in copies else p.shape for p in kinds[kind]]  # copies are not dealt out
            pairs = zip(kinds[kind], (cut_rows if kind[0] else own_whole)(shapes, load))
            pairs = [(p, None if p in copies else owners) for p, owners in pairs]
            pairs.sort(key=lambda pair: (pair[1] is None, first_owner(pair[1])))
            buffer = torch.empty(sum(p.numel() for p, _ in pairs), dtype=kind[1], device=kind[2])
            for (p, owners), view in zip(pairs, buffer.split([p.numel() for p, _ in pairs])):
                view = view.view(p.shape).copy_(p)
                rows = rows_of(view, owners) if keep and view.dtype == p.dtype else rows_of(p, owners).clone()
                p.shard = nn.Parameter(rows.data, p.requires_grad)
                p.shard.owners, p.shard.whole_shape = owners, p.shape
                # subtle: set as .data, the view takes on p's version counter and leaves the buffer's, so that autograd
                # does not see a change when the buffer is filled again between forward and backward
                p.data = view
            sizes = [sum(rows_of(p, cuts, rank).numel() for p, cuts in pairs if cuts) for rank in range(len(load))]
            self.buffers.append((buffer, list(buffer[: sum(sizes)].split(sizes)), [p for p, _ in pairs]))

    @torch.no_grad()
    def start_gather(self) -> None:
        """Put this rank's rows into the buffers and start to exchange them; nothing, if that has been done."""
        for buffer, segments, parameters in self.buffers if self.arriving is None else ():
            if not self.keep:
                buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
            for p in parameters:
                if (rows := rows_of(p.data, p.shard.owners)).data_ptr() != p.shard.data_ptr():
                    rows.copy_(p.shard)
            self.arriving = [*(self.arriving or ()), start_all_gather(segments)]

    def finish_gather(self) -> None:
        self.start_gather()
        while self.arriving:
            self.arriving.pop()()

    def free(self) -> None:
        """Give the whole parameters' memory back; if they are kept, only note that they will be out of date.
        subtle: autograd keeps views of the weights from forward to backward, so that dropping the tensors would free
        nothing. The storage underneath them is emptied instead, and filled again before the backward pass looks."""
        while self.arriving:
            self.arriving.pop()()
        self.arriving = None
        for buffer, _, _ in self.buffers if not self.keep else ():
            buffer.untyped_storage().resize_(0)

def start_mean(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Send each rank its rows of this rank's gradients; what is returned waits for the mean of the own rows."""
    shards, used = [p.shard for p in parameters], [p.grad is not None for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flags = gradients[0].new_tensor(used)
    messages = [torch.cat([*(rows_of(g, s.owners, rank).reshape(-1) for s, g in zip(shards, gradients)), flags])
                for rank in range(get_world_size())]
    for p in parameters:
        p.grad = None
    # added in the shards' dtype and divided after the sum: bit for bit the mean of accumulated micro-batches
    mean = torch.empty_like(messages[get_rank()], dtype=shards[0].dtype)
    finish_scatter = start_reduce_scatter(messages, mean)
    def finish() -> None:
        finish_scatter()
        mean.mul_(1 / get_world_size())
        *averages, num_users = mean.split([*(shard.numel() for shard in shards), len(shards)])
        for shard, average, used_here, users in zip(shards, averages, used, num_users):
            # without rows no gradient, so that no optimizer makes state. The number of users is read only by a rank
            # that is not one of them: a GPU would have to be waited for
            if shard.numel() and (used_here or users > 0):
                shard.grad = average.view_as(shard) if shard.grad is None else shard.grad.add_(average.view_as(shard))
    return finish

def whole_of(rows: Tensor, p: Tensor) -> Tensor:
    """On every rank the whole tensor of which each holds its rows: of parameter p, or of something of its shape."""
    if getattr(p, "owners", None) is None:
        return rows.full_tensor() if hasattr(rows, "full_tensor") else rows.clone() if hasattr(p, "owners") else rows
    whole = rows.new_empty(p.whole_shape)
    parts = [rows_of(whole, p.owners, rank) for rank in range(get_world_size())]
    parts[get_rank()].copy_(rows)
    start_all_gather(parts)()
    return whole

def part_of(whole: Tensor, p: Tensor) -> Tensor:
    """The inverse: a copy of what this rank keeps of a whole tensor of p's shape."""
    if hasattr(p, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements)
    return rows_of(whole, getattr(p, "owners", None)).clone()

def whole_optimizer_state(optimizer: Optimizer, *, tensors: bool = True) -> dict[int, dict[str, Any]]:
    """The "state" of a plain torch.optim state dict, from an optimizer over shards: on rank 0, in CPU memory; else {}.
    Tensors of the parameter's shape are put together (or else only their dtypes are told), one at a time, so that no
    device needs room for all. Of the rest, such as a step count, the first owner's is taken."""
    optimizer = getattr(optimizer, "local", optimizer)
    held = [(p, optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]
    everyones = gather_objects([{name: v.dtype if isinstance(v, Tensor) and v.shape == p.shape else v
                                 for name, v in state.items()} for p, state in held])
    result: dict[int, dict[str, Any]] = {}
    for index, (p, state) in enumerate(held):
        for name, value in everyones[first_owner(getattr(p, "owners", None))][index].items():
            if isinstance(value, torch.dtype) and tensors:
                value = whole_of(state[name] if name in state else torch.empty_like(p, dtype=value), p).cpu()
            if get_rank() == 0:
                result.setdefault(index, {})[name] = value
    return result

def load_optimizer_state(optimizer: Optimizer, whole: dict[str, Any]) -> None:
    """The inverse, at any world size: every rank passes the whole state dict, and its part of it is taken."""
    if hasattr(optimizer, "local"):
        Optimizer.load_state_dict(optimizer, {**whole, "state": {}})
        optimizer = optimizer.local
    mine: dict[int, dict[str, Any]] = {}
    for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, value in whole["state"].get(index, {}).items() if p.numel() else ():
            if isinstance(value, torch.dtype):
                value = torch.empty_like(p, dtype=value)  # room for load_shards
            elif isinstance(value, Tensor) and value.shape == getattr(p, "whole_shape", p.shape):
                value = part_of(value, p)
            mine.setdefault(index, {})[name] = value
    optimizer.load_state_dict({"state": mine, "param_groups": whole["param_groups"]})

# --- 4. ZeRO-1: each rank steps its own rows ---
class ShardedOptimizer(Optimizer):
    """Any optimizer, with 1/W of its state on each rank. To be used as the optimizer itself, after any --ddp mode.
    Inside is an ordinary optimizer, `local`, over this rank's rows. Its step changes these, in the parameters' buffer,
    and then every rank broadcasts its segment. What is frozen (or empty) now stays whole on every rank."""
    def __init__(self, params: Iterable, optimizer_cls: type[Optimizer], **kwargs: Any) -> None:
        self.make, self.load, self.units = partial(optimizer_cls, **kwargs), [0] * get_world_size(), []
        super().__init__(params, self.make([{"params": []}]).defaults)
        self.local = self.make(self._shard(self.param_groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "local"):  # not yet when torch's constructor adds the first groups
            self.local.add_param_group(*self._shard(self.param_groups[-1:]))

    def _shard(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same groups, of this rank's rows."""
        trainable = [p for group in groups for p in group["params"] if p.requires_grad and p.numel()]
        self.units.append(Unit(trainable, self.load, owned_whole(self.make, groups)))
        return [{**group, "params": [getattr(p, "shard", p) for p in group["params"]]} for group in groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer inside, then the new rows to everyone. All ranks must hold equal gradients."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for outer, inner in zip(self.param_groups, self.local.param_groups):
            inner.update({**outer, "params": inner["params"]})  # schedulers know the outer groups only
        for p in (p for unit in self.units for p in unit.parameters):
            p.shard.grad = rows_of(p.grad, p.shard.owners) if p.grad is not None and p.shard.numel() else None
        self.local.step()
        self.local.zero_grad()  # views: they would keep the gradients alive when zero_grad() here drops them
        for unit in self.units:
            unit.free()  # out of date, all of it
            unit.finish_gather()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """A state dict of optimizer_cls, whole on rank 0 and without "state" elsewhere. All ranks must call it."""
        return {**super().state_dict(), "state": whole_optimizer_state(self)}

    load_state_dict = load_optimizer_state  # saved at any world size, or by optimizer_cls alone

# --- 5. ZeRO-2 and FSDP: gradients, parameters ---
def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules directly below this one; in place of a list or sequence those in it."""
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        yield from blocks_of(child) if is_list else [child]

class FSDP(DDPNaive):
    """Fully sharded data parallelism: of parameters, gradients and optimizer state each rank holds 1/W. The optimizer
    is an ordinary one over parameters(), which are the shards; finish_gradient_synchronization() precedes its step.
    A block's weights are gathered while the block before it computes, and freed after it; backward likewise, where the
    gradients leave for their owners block by block. So all ranks must run the same blocks, equally often. Vectors are
    small (norms, biases): every rank holds and steps all of them. Parameters that blocks share, or none holds, stay
    gathered for the whole step. Between steps the module holds the shards.
    compute_dtype: weights and gradients travel and compute in it; gradients add up in the shards' dtype. keep: ZeRO-2,
    whole parameters stay in memory and are refreshed in forward. whole: parameters to be owned undivided. no_sync()
    says that more micro-batches follow; as there is no room for whole gradients, they are reduced all the same."""
    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None, *, keep: bool = False,
                 whole: Iterable[nn.Parameter] = ()) -> None:
        super().__init__(module)
        self.compute_dtype, self.keep, self.accumulating = compute_dtype, keep, False
        self.units, self.reduced, self.in_flight = [], [], []  # the first unit is the root: what no block holds alone
        places = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]
        home: dict[nn.Parameter, nn.Module | None] = {}
        for block in dict.fromkeys(blocks_of(module)):
            home.update((p, None if p in home else block) for p in block.parameters())
        home.update((p, None) for p in module.parameters(recurse=False))
        load, small = [0] * self.world_size, {p for p in home if p.ndim < 2}  # norms and biases
        for block in dict.fromkeys([None, *home.values()]):
            unit = Unit([p for p in home if home[p] is block], load, set(whole), compute_dtype, keep, small)
            unit.places = [place for place in places if home[place[2]] is block]
            unit.for_backward = type(block).__name__ != "Embedding"  # the gradient of a lookup needs no weights
            unit.free()
            self._expose(unit, whole=False)
            self.units.append(unit)
            (block or module).register_forward_pre_hook(partial(self._before, unit))
            (block or module).register_forward_hook(partial(self._after, unit), always_call=True)

    def _expose(self, unit: Unit, whole: bool) -> None:
        """Let the modules hold whole parameters, to compute, or the shards, for everyone else."""
        for owner, name, p in unit.places:
            owner._parameters[name] = p if whole else p.shard

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.accumulating:
            self.finish_gradient_synchronization()  # of the micro-batch before
        for unit in self.units if not (self.keep and self.accumulating) else ():
            unit.free()  # an optimizer may have stepped
        self.accumulating = not self.synchronizing and torch.is_grad_enabled()
        if (dtype := self.compute_dtype) is not None:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
        return super().forward(*args, **kwargs)

    def _before(self, unit: Unit, *_: Any) -> None:
        unit.start_gather()
        if not unit.in_backward and unit is not self.units[-1]:  # in backward: a checkpoint that is computed again
            self.units[self.units.index(unit) + 1].start_gather()
        unit.finish_gather()
        self._expose(unit, whole=True)

    def _after(self, unit: Unit, module: nn.Module, inputs: Any, output: Any) -> None:
        if unit.in_backward:
            return
        self._expose(unit, whole=False)
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        for tensor in tensors:
            tensor.register_hook(lambda _: self._before_backward(unit))
        if not (self.keep or tensors and unit in (self.units[0], self.units[-1])):  # these are needed again at once
            unit.free()

    def _before_backward(self, unit: Unit) -> None:
        """The gradient of a block's output is complete: so is the work of all blocks after it. (The root ends last.)"""
        self.is_pending = True
        position = self.units.index(unit)
        for done in self.units[:position:-1] if position > 0 else ():
            if done.in_backward:
                self._reduce(done)
        unit.in_backward = position > 0
        for needed in self.units[max(position - 1, 1) : position + 1][::-1]:
            if needed.for_backward:
                needed.start_gather()
        if unit.for_backward:
            unit.finish_gather()
        self._expose(unit, whole=True)  # for a checkpoint that computes a part of it again

    def _reduce(self, unit: Unit) -> None:
        unit.in_backward = False
        self._expose(unit, whole=False)
        if not self.keep:
            unit.free()
        self.reduced.append(unit)
        trainable = [[p for p in parameters if p.requires_grad] for _, _, parameters in unit.buffers]
        self.in_flight += [start_mean(parameters) for parameters in trainable if parameters]
        while len(self.in_flight) > 4:  # a bound on what waits in memory
            self.in_flight.pop(0)()

    def finish_gradient_synchronization(self) -> None:
        """To be called between backward and step: after it each shard holds its rows of the averaged gradient."""
        for unit in reversed(self.units) if self.is_pending else ():
            if unit not in self.reduced or any(p.grad is not None for p in unit.parameters):
                self._reduce(unit)
        for finish in self.in_flight:
            finish()
        self.reduced, self.in_flight, self.is_pending = [], [], False

    def gather_full_params(self) -> dict[str, Tensor]:
        """The module's state dict with whole parameters, on every rank. All ranks must call it."""
        return {name: whole_of(p.detach(), p) for name, p in self.module.state_dict(keep_vars=True).items()}

# --- 6. One switch for all of them ---
MODES = ("zero1", "zero2", "fsdp", "torch_zero1", "torch_fsdp")
def shard(module: nn.Module, mode: str, make_groups: Callable[[nn.Module], list[dict]], optimizer_cls: type, *,
          compute_dtype: torch.dtype | None = None, **kwargs: Any) -> tuple[nn.Module, Any]:
    """The module and its optimizer in the mode called `mode`; make_groups(module) gives the parameter groups. zero1 and
    torch_zero1 leave the module as it is: its gradients are for ddp.py to reduce. The other modes wrap it."""
    assert mode in MODES, f"{mode} is none of {MODES}"
    mode = mode if get_world_size() > 1 else mode.removeprefix("torch_")  # torch's need a process group
    groups, make = make_groups(module), partial(optimizer_cls, **kwargs)
    if mode == "zero1":
        return module, ShardedOptimizer(groups, optimizer_cls, **kwargs)
    if mode == "torch_zero1":
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return module, ZeroRedundancyOptimizer(groups, optimizer_cls, parameters_as_bucket_view=True, **kwargs)
    whole = owned_whole(make, groups)
    if mode != "torch_fsdp":
        return FSDP(module, compute_dtype, keep=mode == "zero2", whole=whole), make(make_groups(module))
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if whole:
        raise ValueError(f"torch_fsdp cuts what {optimizer_cls.__name__} needs whole: take --shard_opt fsdp")
    wrapped = DDPNaive(module)
    for part in [*(block for block in blocks_of(module) if list(block.children())), module]:
        fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype))
    module.register_forward_pre_hook(lambda *_: module.set_requires_gradient_sync(wrapped.synchronizing))
    wrapped.world_size = 1  # nothing is left for DDPNaive to do: backward() does it
    return wrapped, make(make_groups(module))

@torch.no_grad()

# --- 7. Checkpoints: whole, or in shards ---
def full_state_dicts(module: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain, whole state dicts of module and optimizer in any mode, on rank 0; ({}, {}) elsewhere. All ranks must
    call it. Names are the bare module's, and optimizer state is numbered as torch.optim does."""
    is_first, model_state = get_rank() == 0, {}
    for name, p in getattr(module, "module", module).state_dict(keep_vars=True).items():
        whole = whole_of(p.detach(), p)  # one at a time: only rank 0 keeps them
        model_state.update({name: whole.cpu()} if is_first else {})
    if hasattr(optimizer, "consolidate_state_dict"):  # torch's ZeroRedundancyOptimizer: speaks on rank 0 only
        optimizer.consolidate_state_dict(to=0)
        return model_state, optimizer.state_dict() if is_first else {}
    optimizer_state = {**Optimizer.state_dict(optimizer), "state": whole_optimizer_state(optimizer)}
    return model_state, optimizer_state if is_first else {}

@torch.no_grad()
def load_full_state_dicts(module: nn.Module, optimizer: Optimizer, model_state: dict, optimizer_state: dict) -> None:
    """The inverse, at any world size and in any mode, whichever wrote them: every rank passes the whole dicts."""
    mine = getattr(module, "module", module).state_dict(keep_vars=True)
    for name, p in mine.items():
        if getattr(model_state.get(name), "shape", None) != (shape := getattr(p, "whole_shape", p.shape)):
            raise ValueError(f"the state is of another model: it has no {name} of shape {tuple(shape)}")
    for name, p in mine.items():
        p.copy_(part_of(model_state[name], p))
    load_optimizer_state(optimizer, optimizer_state)

def as_piece(rows: Tensor, p: Tensor) -> Tensor:
    """This rank's rows of a whole tensor, able to answer what torch.distributed.checkpoint asks of a part: where it
    begins, of what size the whole is. So another number of ranks finds other rows, in whichever files they lie."""
    from torch.distributed.checkpoint import metadata, planner
    start, piece = torch.Size([p.owners[get_rank()][0], *[0] * p.ndim][: p.ndim]), rows.view_as(rows)
    chunk = metadata.ChunkStorageMetadata(start, rows.shape)
    data = planner.TensorWriteData(chunk, metadata.TensorProperties.create_from_tensor(rows), p.whole_shape)
    piece.size, piece.__create_chunk_list__ = lambda: p.whole_shape, lambda: [chunk]
    piece.__create_write_items__ = lambda name, _: [planner.WriteItem(
        metadata.MetadataIndex(name, start), planner.WriteItemType.SHARD, tensor_data=data)]
    piece.__get_tensor_shard__ = lambda index: rows
    return piece

class IndexReader(pickle.Unpickler):
    """The index beside the shards is a pickle, and torch's own reader runs any code that somebody put into it. To this
    one nothing is known but the names that such an index is made of."""
    NAMES = {"torch": "Size float64 float32 float16 bfloat16", "torch.serialization": "_get_layout",
             "torch.distributed.checkpoint.filesystem": "_StorageInfo", "torch.distributed.checkpoint.metadata":
             "Metadata MetadataIndex StorageMeta ChunkStorageMetadata TensorStorageMetadata TensorProperties "
             "_MEM_FORMAT_ENCODING", "pathlib": "PosixPath", "pathlib._local": "PosixPath"}  # that in Python 3.13
    def find_class(self, module: str, name: str) -> Any:
        if name not in self.NAMES.get(module, "").split():
            raise pickle.UnpicklingError(f"an index of shards has no {module}.{name} in it")
        return super().find_class(module, name)

def exchange_shards(action: str, module: nn.Module, optimizer: Optimizer | None, folder: Path) -> None:
    """"save" or "load", in place, what this rank holds. Where one rank fails, all raise its error."""
    import torch.distributed.checkpoint as dcp
    if hasattr(optimizer, "consolidate_state_dict"):
        raise ValueError(f"--shard_opt torch_zero1 cannot {action} shards: take zero1")
    held = {f"model.{name}": (p.detach(), p)
            for name, p in getattr(module, "module", module).state_dict(keep_vars=True).items()}
    optimizer = getattr(optimizer, "local", optimizer)
    for index, p in enumerate(p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]):
        held.update({f"optimizer.{index}.{name}": (value, p) for name, value in optimizer.state.get(p, {}).items()
                     if isinstance(value, Tensor) and value.shape == p.shape})
    pieces = {key: as_piece(x, p) if getattr(p, "owners", None) else x for key, (x, p) in held.items() if p.numel()}
    options, reader = {"checkpoint_id": folder, "no_dist": get_world_size() == 1}, dcp.FileSystemReader(folder)
    reader.read_metadata = lambda **_: IndexReader(io.BytesIO((folder / ".metadata").read_bytes())).load()
    try:
        with warnings.catch_warnings(action="ignore"):  # of one process alone
            dcp.save(pieces, **options) if action == "save" else dcp.load(pieces, storage_reader=reader, **options)
    except dcp.CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"{folder}: rank {rank} could not {action} its shard ({reason!r:.150})"
                      + ": remove its .pt to use the one before" * (action == "load")) from None

def checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

def save_shards(module: nn.Module, optimizer: Optimizer, folder: Path) -> tuple[dict, dict]:
    """Every rank writes what it holds. Returned is, on rank 0, what stands in the place of full_state_dicts' two: to be
    written afterwards, into the file that makes the folder a checkpoint. Ranks that are killed before leave none."""
    for old in folder.parent.glob("*.shards") if get_rank() == 0 else ():
        if not old.with_suffix(".pt").exists():  # left by a checkpoint that was removed, or by a save that was killed
            shutil.rmtree(old)
    described = whole_optimizer_state(optimizer, tensors=False)  # for which all ranks wait for each other
    exchange_shards("save", module, optimizer, folder)
    checksums = gather_objects([(file.name, checksum(file)) for pattern in (f"__{get_rank()}_*", ".metadata")
                                for file in folder.glob(pattern)])
    return {}, {**Optimizer.state_dict(optimizer), "state": described, "checksums": dict(sum(checksums, []))}

def load_shards(module: nn.Module, optimizer: Optimizer | None, folder: Path, described: dict) -> None:
    """The inverse, at any world size and in any mode but torch_zero1: every rank takes no more than its own rows, after
    the ranks have shared out the files to verify their checksums, which torch does not. No optimizer: weights only."""
    mine = sorted(described["checksums"].items())[get_rank() :: get_world_size()]
    damaged = [name for name, value in mine if not (folder / name).is_file() or checksum(folder / name) != value]
    if everyones := sum(gather_objects(damaged), []):
        raise OSError(f"{folder}: {everyones[0]} is damaged or missing: remove its .pt to use the one before")
    if optimizer is not None:
        load_optimizer_state(optimizer, described)
    exchange_shards("load", module, optimizer, folder)

# --- 8. Two processes against one ---
def _demo(ranks: Ranks, mode: str, num_slices: int) -> dict[str, Any]:
    """What this rank held and sent in a step, and what came out."""
    warnings.simplefilter("ignore")
    held: dict[str, int] = {}
    def build(module: nn.Module) -> tuple[nn.Module, Any]:
        if mode == "none":
            return wrap(module, "bucketed"), torch.optim.AdamW(module.parameters(), lr=1e-3)
        module, optimizer = shard(module, mode, lambda m: [{"params": [*m.parameters()]}], torch.optim.AdamW, lr=1e-3)
        return module if mode.endswith(("zero2", "fsdp")) else wrap(module, "bucketed"), optimizer
    model, optimizer, sent = train_toy(ranks, num_slices, build, lambda *pair: held.update(bytes_held(*pair)))
    return {**held, "sent": sent, "model": full_state_dicts(model, optimizer)[0]}

def main(argv: list[str] | None = None, world_size: int = 2) -> None:
    argparse.ArgumentParser(usage=argparse.SUPPRESS, description="All stages, two ranks against one.").parse_args(argv)
    alone = run_ranks(_demo, 1, "none", world_size)[0]["model"]
    num_parameters = sum(tensor.numel() for tensor in alone.values())
    print(f"{num_parameters:,} parameters, {world_size} processes: MB held by the one that holds most (and by formula)")
    print(f"{'--shard_opt':12}{'parameters':>16}{'gradients':>16}{'state':>16}{'MB sent':>10}{'max difference':>16}")
    for mode in ("none", *MODES):
        by_rank = run_ranks(_demo, world_size, mode, world_size)
        formula = memory_table(num_parameters, world_size)[mode.removeprefix("torch_")]
        held = "".join(f"{max(r[part] for r in by_rank) / 1e6:8.2f} ({size / 1e6:5.2f})"
                       for part, size in formula.items())
        difference = max((tensor - by_rank[0]["model"][name]).abs().max().item() for name, tensor in alone.items())
        print(f"{mode:12}{held}{by_rank[0]['sent'] / 1e6:10.2f}{difference:16.1e}")

if __name__ == "__main__":
    main()
