"""Attention by flash.py beside PyTorch's own kernels: time, error, TFLOP/s and memory of the same work in one process.

    python tests/bench_flash.py mha                                     # forward, at a size that fits the device
    python tests/bench_flash.py mha_bwd --num_segments 12 --json results.json
    python tests/bench_flash.py mha_bwd --batch_size 1 --q_len 131072 --num_heads 32 --num_segments 12     # one H200
    python tests/bench_flash.py mha_cp_bwd --world_size 4 --q_len 4096     # one sequence over processes, on CPUs

In the modes mha_cp and mha_cp_bwd the contenders are one process with the whole sequence and --world_size processes
that share it, in zig-zag chunks and in consecutive ones; beside the times stand the pairs computed and bytes sent.

Every contender is forced by name, so none can fall back in silence, and gets its mask ready made: the time to build it
stands apart. Contenders take turns in rounds; the table shows the median of all calls and, as spread, the smallest
and largest median of a round. Useful TFLOP/s count visible pairs only, 2 (D + Dv) FLOPs each and 3.5 times that with
the backward pass; executed TFLOP/s, known for flash.py alone, count the pairs in the tiles it visits. Errors are
relative, ||x - exact|| / ||exact||, of the first key head and its query heads, against float64.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ddp  # noqa: E402
import flash  # noqa: E402

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- 1. The contenders: each takes the problem and returns attend(q, k, v) with its mask ready ---


def ours(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: dict) -> Attend:
    arguments = flash.operator_arguments(q, k, v, flash.mask_rule(q, k, **mask), q.shape[-1] ** -0.5, None, backend)
    return lambda q, k, v: flash.forward_op(q, k, v, *arguments)[0]


def sdpa(kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, mask: dict) -> Attend:
    rule, gqa = flash.mask_rule(q, k, **mask), q.shape[1] != k.shape[1]
    dense = None if all(x is None for x in rule[1:]) else rule.mask(q, k)[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = functools.partial(F.scaled_dot_product_attention, q, k, v, attn_mask=dense,
                                 is_causal=rule.causal and dense is None, enable_gqa=gqa)
        if kernel is None:
            return call()
        with sdpa_kernel([kernel]):
            return call()
    return attend


def flex(q: Tensor, k: Tensor, v: Tensor, mask: dict) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rule = flash.mask_rule(q, k, **mask)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = row >= column if rule.causal else row >= 0
        if rule.window is not None:
            seen = seen & (row - column < rule.window)
        if rule.q_ids is not None:
            seen = seen & (rule.q_ids[b, row] == rule.k_ids[b, column]) & (rule.q_ids[b, row] != -1)
        return seen

    block_mask = compiled(create_block_mask)(visible, None if rule.q_ids is None else len(q), None, q.shape[2],
                                             k.shape[2], device=q.device)
    gqa = q.shape[1] != k.shape[1]
    return lambda q, k, v: compiled(flex_attention)(q, k, v, block_mask=block_mask, enable_gqa=gqa)


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: dict) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    rule = flash.mask_rule(q, k, **mask)
    if rule.q_ids is None or rule.window is not None or q.shape[1] != k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError("varlen takes packed documents of equal heads, without a window")
    flat = rule.q_ids.flatten()  # padding counts as one more document: its rows are ignored
    breaks = flat.diff() != 0
    breaks[rule.q_ids.shape[1] - 1::rule.q_ids.shape[1]] = True  # the rows of the batch end too
    ends = breaks.nonzero()[:, 0] + 1
    starts = F.pad(torch.cat([ends, ends.new_tensor([len(flat)])]), (1, 0)).to(torch.int32)
    longest = starts.diff().max().item()
    options = {"window_size": (-1, 0 if rule.causal else -1)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_, k_, v_ = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, H, D)
        out = varlen_attn(q_, k_, v_, starts, starts, longest, longest, **options)
        return out.unflatten(0, (len(q), -1)).transpose(1, 2)  # (B, H, T, D)
    return attend


CONTENDERS: dict[str, Callable[..., Attend]] = {
    "triton": functools.partial(ours, "triton"), "tiles": functools.partial(ours, "tiles"),
    "sdpa": functools.partial(sdpa, None), "sdpa_flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_math": functools.partial(sdpa, SDPBackend.MATH), "flex": flex, "varlen": varlen,
}


# --- 2. The problem ---


def problem(args: argparse.Namespace) -> tuple[list[Tensor], Tensor, dict]:
    """q, k, v, the output's gradient, and mask arguments: equal random documents at the front, padding at the end."""
    gen = torch.Generator().manual_seed(args.seed)
    B, heads = args.batch_size, (args.num_heads, args.num_kv_heads, args.num_kv_heads, args.num_heads)
    lengths = (args.q_len, args.kv_len, args.kv_len, args.q_len)
    dims = (args.head_dim, args.head_dim, args.value_head_dim, args.value_head_dim)
    dtype = getattr(torch, args.dtype)  # stored as (B, T, H, D), as a projection leaves it
    *inputs, grad = (torch.randn(B, n, h, d, generator=gen).to(args.device, dtype).transpose(1, 2)
                     for h, n, d in zip(heads, lengths, dims))
    mask: dict = {"causal": not args.full, "window": args.window}
    if args.num_segments > 1 or args.num_pad_tokens:
        real = args.q_len - args.num_pad_tokens
        sizes = torch.rand(B, real, generator=gen).mul(args.num_segments).floor().sort(-1).values
        ids = torch.full((B, args.q_len), flash.PADDING_SEGMENT_ID, dtype=torch.int32)
        ids[:, :real] = sizes.to(torch.int32)
        mask["segment_ids"] = ids.to(args.device)
    return inputs, grad, mask


def count_pairs(q: Tensor, k: Tensor, v: Tensor, mask: dict) -> tuple[int, int]:
    """Visible pairs (query, key), and pairs in the tiles that the forward kernel visits, over batch and heads."""
    rule, (B, H, T, _), S = flash.mask_rule(q, k, **mask), q.shape, k.shape[2]
    useful = sum(rule.mask(q, k, slice(start, start + 512)).sum().item()
                 for start in range(0, T, 512))
    q_tile, k_tile = flash.launch_table(q, v)[:2] if q.is_cuda else (128, 128)
    bounds = flash.tile_bounds(rule, T, S, q_tile, k_tile, device=q.device).long()
    visited = (bounds[..., 3] - bounds[..., 0]).sum().item() * q_tile * k_tile
    rows = B if rule.q_ids is None else 1  # without ids, one row of the batch stands for all
    return useful * rows * H, visited * rows * H


def exact(inputs: list[Tensor], grad: Tensor, mask: dict) -> list[Tensor]:
    """Output and gradients of the first batch row and key head in float64, by large tiles."""
    q, k, v = inputs
    group = q.shape[1] // k.shape[1]
    parts = [x[:1, :n].detach().double().requires_grad_() for x, n in ((q, group), (k, 1), (v, 1))]
    first = {name: x[:1] if isinstance(x, Tensor) else x for name, x in mask.items()}
    tiles = {"forward": flash.Launch(2048, 2048, 4, 1)}
    out = flash.flash_attention(*parts, **first, params=tiles, backend="tiles")
    return [out.detach(), *torch.autograd.grad(out, parts, grad[:1, :group].double())]


# --- 3. The measurement ---


def seconds(function: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def measure(args: argparse.Namespace) -> list[dict]:
    inputs, grad, mask = problem(args)
    useful, visited = count_pairs(*inputs, mask)
    backward = args.mode == "mha_bwd"
    flops = 2 * (args.head_dim + args.value_head_dim) * (3.5 if backward else 1)
    want = exact(inputs, grad, mask)
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    rows, steps = [], {}
    for name in args.contenders:
        try:
            CONTENDERS[name](*inputs, mask)  # the first time compiles
            mask_seconds = seconds(lambda name=name: CONTENDERS[name](*inputs, mask), args.device)
            attend = CONTENDERS[name](*inputs, mask)

            def step(attend: Attend = attend) -> list[Tensor]:
                out = attend(*inputs)
                return [out, *(torch.autograd.grad(out, inputs, grad) if backward else ())]

            got = [x[:1, :y.shape[1]].detach().double() for x, y in zip(step(), want)]
            if "segment_ids" in mask:  # what a contender leaves in the rows of padding is its own affair
                got = [x * (mask["segment_ids"][:1, None, :, None] != flash.PADDING_SEGMENT_ID) for x in got]
            row = {"name": name, "mask_milliseconds": 1000 * mask_seconds,
                   "errors": [((x - y).norm() / y.norm()).item() for x, y in zip(got, want)]}
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            rows.append(row)
            steps[name] = step
        except Exception as error:  # a peer that cannot do this is a result, with its reason
            rows.append({"name": name, "unavailable": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            step()  # the caches are its own again
            times[name].append([seconds(step, args.device) for _ in range(args.num_iters)])
    for row in rows:
        if row["name"] in times:
            rounds = times[row["name"]]
            middle = statistics.median(x for one in rounds for x in one)
            medians = [statistics.median(one) for one in rounds]
            row |= {"milliseconds": 1000 * middle, "spread": [1000 * min(medians), 1000 * max(medians)],
                    "useful_tflops": useful * flops / middle / 1e12}
            if row["name"] == "triton":
                row["executed_tflops"] = visited * flops / middle / 1e12
    return rows


# --- 4. One sequence over several processes ---


def pairs_per_rank(context: ddp.ContextParallel, positions: torch.Tensor) -> list[int]:
    """How many pairs of query and key each rank of a team computes for a sequence with these positions (T,)."""
    by_chunk = (positions + 1).view(2 * context.size, -1).sum(dim=1)[context.order]  # a query at p sees p + 1 keys
    return by_chunk.view(context.size, 2).sum(dim=1).tolist()


def rank_context(ranks: ddp.Ranks, options: dict) -> dict:
    """Seconds of each round, pairs and bytes: whole on rank 0 alone, then split over all ranks."""
    args = argparse.Namespace(**options)
    backward = args.mode == "mha_cp_bwd"
    (q, k, v), grad, mask = problem(args)
    local = functools.partial(flash.flash_attention, causal=mask["causal"], window=mask["window"], backend="tiles")
    ids = mask.get("segment_ids")
    positions = torch.arange(args.q_len) if ids is None else flash.positions_in_segments(ids)
    results: dict = {}

    def step(attend: Callable, inputs: list[Tensor], grad: Tensor, *places: Tensor | None) -> None:
        inputs = [x.detach().requires_grad_(backward) for x in inputs]
        out = attend(*inputs, positions=places[0], segment_ids=places[1])
        if backward:
            torch.autograd.grad(out, inputs, grad)

    cases = {"whole": (ddp.ContextParallel(1), True), "zig-zag": (ddp.ContextParallel(args.world_size), False),
             "consecutive": (ddp.ContextParallel(args.world_size, zigzag=False), False)}
    for name in [*cases] * (args.rounds + 1):  # the first round is not counted
        context, alone = cases[name]
        split = [context.split(x, 2) for x in (q, k, v, grad)]
        here = context.begin(positions=positions, segment_ids=ids)
        run = functools.partial(step, context.attention(local), split[:3], split[3], *here)
        if alone and ranks.rank:
            run = list
        ddp.barrier("a round")
        own = time.perf_counter()
        run()
        own = time.perf_counter() - own
        ddp.barrier("the end of a round")
        entry = results.setdefault(name, {"seconds": [], "bytes": []})
        entry["seconds"].append(own)
        entry["bytes"].append(ddp.measure_bytes_sent(run))
        entry["pairs"] = pairs_per_rank(context, positions if positions.dim() == 1 else positions[0])
    return results


def show_context(args: argparse.Namespace) -> list[dict]:
    by_rank = ddp.run_ranks(rank_context, args.world_size, vars(args), timeout_s=600)
    share = 2 if args.dtype == "float32" else 1  # gradients travel in float32
    gathered = args.batch_size * args.num_kv_heads * args.q_len * (args.head_dim + args.value_head_dim) * 2 * share
    formula = ddp.bytes_sent_per_rank("all_gather", gathered, args.world_size)
    if args.mode == "mha_cp_bwd":
        formula += ddp.bytes_sent_per_rank("reduce_scatter", gathered * 2 // share, args.world_size)
    print(f"{args.mode}: batch {args.batch_size}, {args.q_len} tokens, {args.num_heads} heads on {args.num_kv_heads} "
          f"of {args.head_dim}, {args.num_segments} documents, {args.world_size} processes, one thread each")
    print(f"{'':<13}{'ms':>9}{'spread':>20}{'over whole':>12}{'work max/mean':>15}{'MB sent':>9}{'formula':>9}")
    rows = []
    for name in by_rank[0]:
        rounds = [max(times) for times in zip(*(result[name]["seconds"][1:] for result in by_rank))]  # the slowest rank
        whole = by_rank[0]["whole"]["seconds"][1:]
        pairs, sent = by_rank[0][name]["pairs"], min(by_rank[0][name]["bytes"])
        row = {"name": name, "milliseconds": 1000 * statistics.median(rounds), "work": pairs,
               "over_whole": statistics.median(a / b for a, b in zip(rounds, whole)), "bytes_sent": sent}
        rows.append(row)
        spread = f"{1000 * min(rounds):.1f} - {1000 * max(rounds):.1f}"
        print(f"{name:<13}{row['milliseconds']:9.1f}{spread:>20}{row['over_whole']:12.2f}"
              f"{max(pairs) * len(pairs) / sum(pairs):15.3f}", end="")
        print(f"{sent / 1e6:9.2f}{formula / 1e6:9.2f}" if name != "whole" else "")
    return rows


def main(argv: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", choices=["mha", "mha_bwd", "mha_cp", "mha_cp_bwd"],
                        help="forward, or forward and backward; cp: one sequence over several processes")
    sizes = {"batch_size": (4, 1), "q_len": (8192, 500), "num_heads": (16, 4), "head_dim": (128, 64),
             "num_segments": (1, 1), "num_pad_tokens": (0, 0), "num_iters": (10, 3),
             "rounds": (3, 3), "seed": (0, 0), "world_size": (2, 2)}
    for name, (gpu, cpu) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=gpu if on_gpu else cpu,
                            help=f"(default: {gpu} on a GPU, {cpu} on a CPU)")
    parser.add_argument("--num_kv_heads", type=int, help="(default: num_heads)")
    parser.add_argument("--kv_len", type=int, help="(default: q_len)")
    parser.add_argument("--value_head_dim", type=int, help="(default: head_dim)")
    parser.add_argument("--window", type=int, help="(default: none)")
    parser.add_argument("--full", action="store_true", help="without the causal mask")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS),
                        default=["triton", "sdpa_flash", "sdpa_cudnn", "flex", "varlen"] if on_gpu else
                        ["tiles", "sdpa", "sdpa_math"])
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    args.kv_len, args.value_head_dim = args.kv_len or args.q_len, args.value_head_dim or args.head_dim
    args.num_kv_heads = args.num_kv_heads or args.num_heads
    if args.mode.startswith("mha_cp"):
        args.device, args.num_segments = "cpu", max(1, args.num_segments)
        if args.q_len % (2 * args.world_size) or args.kv_len != args.q_len:
            parser.error(f"--q_len must be --kv_len and a multiple of {2 * args.world_size}")
        rows = show_context(args)
        if args.json:
            Path(args.json).write_text(json.dumps({"arguments": vars(args), "results": rows}, indent=1))
        return
    if args.kv_len != args.q_len and (args.num_segments > 1 or args.num_pad_tokens):
        parser.error("documents and padding need --kv_len equal to --q_len")
    torch.manual_seed(args.seed)
    rows = measure(args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.mode}: batch {args.batch_size}, {args.q_len} x {args.kv_len}, {args.num_heads} heads on "
          f"{args.num_kv_heads} of {args.head_dim}, {args.num_segments} documents, {args.dtype}, {device}, "
          f"torch {torch.__version__}")
    print(f"{'':<11}{'ms':>10}{'spread':>18}{'useful':>9}{'executed':>9}{'mask ms':>9}{'peak MiB':>9}"
          "  error of out dq dk dv")
    for row in rows:
        if "unavailable" in row:
            print(f"{row['name']:<11}  unavailable: {row['unavailable'][:100]}")
            continue
        low, high = row["spread"]
        executed = f"{row['executed_tflops']:9.2f}" if "executed_tflops" in row else f"{'':9}"
        peak = f"{row['peak_bytes'] / 2**20:9.0f}" if "peak_bytes" in row else f"{'':9}"
        print(f"{row['name']:<11}{row['milliseconds']:10.2f}{f'{low:.2f} - {high:.2f}':>18}{row['useful_tflops']:9.3f}"
              f"{executed}{row['mask_milliseconds']:9.2f}{peak}  " + " ".join(f"{x:.1e}" for x in row["errors"]))
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "device": device, "torch": torch.__version__,
                                               "results": rows}, indent=1))


if __name__ == "__main__":
    main()
