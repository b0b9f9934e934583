"""How fast are the rungs of ddp.py, and how much of it is the network? Processes on this machine's CPU, over gloo.

    python tests/bench_ddp.py                                 all three tables, two processes, a few minutes
    python tests/bench_ddp.py --table all_reduce --world_size 6 --sizes_mb 1 10 100 1000
    python tests/bench_ddp.py --table rungs --world_size 4 --steps 20 --json rungs.json

all_reduce   seconds and bytes/s of one all-reduce, by size and number of processes (2 to --world_size)
rungs        one training step of 20 M parameters in 147 tensors in every --ddp mode. The modes take turns step by step,
             so that whatever else the machine does hits all of them; compared are medians of paired ratios.
buckets      the same step by bucket size, beside the model of DDPBucketed's docstring

Compared at two processes: bucketed / torch <= 1.03, naive / bucketed >= 1.25, bytes within 1 % of the formula.
All processes share one machine's memory bus and cores: between machines the network is slower and free of their work.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ddp import (  # noqa: E402
    MODES,
    Ranks,
    barrier,
    bytes_sent_per_rank,
    gather_objects,
    measure_bytes_sent,
    run_ranks,
    start_all_reduce,
    wrap,
)
from model import ModelConfig, TransformerLM  # noqa: E402

TOKENS_PER_RANK = 256
CONFIG = dict(vocab_size=14_000, context_length=256, d_model=256, num_layers=16, num_heads=8, d_ff=704)


def rank_all_reduce(ranks: Ranks, sizes_mb: list[float]) -> list[float]:
    """Median seconds of one all-reduce, size by size."""
    medians = []
    for megabytes in sizes_mb:
        tensor = torch.ones(max(1, int(megabytes * 2**20 / 4)))
        seconds, spent = [], 0.0
        # rank 0 decides when there are enough, about a second's worth: all ranks must take part equally often
        while gather_objects(len(seconds) < 5 or (spent < 1.0 and len(seconds) < 100))[0]:
            barrier("a measurement")
            start = time.perf_counter()
            start_all_reduce(tensor)()
            seconds.append(time.perf_counter() - start)
            spent += seconds[-1]
        medians.append(statistics.median(seconds[1:]))
    return medians


def rank_steps(ranks: Ranks, variants: dict[str, dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Seconds and bytes of each step of each variant; variants take turns, in an order that moves on by one a step."""
    torch.manual_seed(0)
    module = TransformerLM(ModelConfig(**CONFIG))
    models = {name: wrap(copy.deepcopy(module), **arguments) for name, arguments in variants.items()}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-4) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    sent: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for step in range(num_steps + 2):  # torch rearranges its buckets after the first step; two are not counted
        generator = torch.Generator().manual_seed(1000 * step + ranks.rank)
        tokens = torch.randint(CONFIG["vocab_size"], (1, TOKENS_PER_RANK + 1), generator=generator)
        for name in names[step % len(names) :] + names[: step % len(names)]:
            model, optimizer = models[name], optimizers[name]

            def one_step() -> None:
                optimizer.zero_grad()  # noqa: B023
                logits = model(tokens[:, :-1])  # noqa: B023
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # noqa: B023
                model.finish_gradient_synchronization()  # noqa: B023
                optimizer.step()  # noqa: B023

            if step >= num_steps:  # the last two are for the bytes
                sent[name].append(measure_bytes_sent(one_step))
                continue
            barrier("a measurement")
            start = time.perf_counter()
            one_step()
            seconds[name].append(time.perf_counter() - start)
    weights = {name: torch.cat([p.detach().flatten() for p in model.parameters()]) for name, model in models.items()}
    return {
        "seconds": {name: values[2:] for name, values in seconds.items()},
        "bytes": {name: min(values) for name, values in sent.items()},
        "equal": {name: bool(torch.equal(weights[name], weights[names[0]])) for name in names},
        "groups": {name: len(getattr(model, "groups", [])) for name, model in models.items()},
        "num_bytes": 4 * sum(p.numel() for p in module.parameters()),
        "num_tensors": len(list(module.parameters())),
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def paired(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    median, low, high = quartiles([a / b for a, b in zip(numerator, denominator)])
    return {"median": median, "quartile1": low, "quartile3": high}


def table_all_reduce(args: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"\nall-reduce: {'MB':>6}{'ranks':>7}{'ms':>10}{'GB/s':>8}   (GB/s: bytes sent per rank by formula / time)")
    rows = []
    for world_size in range(2, args.world_size + 1):
        by_size = run_ranks(rank_all_reduce, world_size, args.sizes_mb, timeout_s=300)[0]
        for megabytes, seconds in zip(args.sizes_mb, by_size):
            rate = bytes_sent_per_rank("all_reduce", int(megabytes * 2**20), world_size) / seconds
            rows.append({"megabytes": megabytes, "world_size": world_size, "seconds": seconds, "bytes_per_s": rate})
            print(f"{'':12}{megabytes:6g}{world_size:7}{1e3 * seconds:10.2f}{rate / 1e9:8.2f}")
    return rows


def table_rungs(args: argparse.Namespace) -> dict[str, Any]:
    variants = {mode: {"mode": mode, "bucket_size_mb": 25.0} for mode in MODES}
    result = run_ranks(rank_steps, args.world_size, variants, args.steps, timeout_s=900)[0]
    formula = bytes_sent_per_rank("all_reduce", result["num_bytes"], args.world_size)
    tensors = f"{result['num_tensors']} tensors, {result['num_bytes'] / 1e6:.1f} MB"
    print(f"\nrungs: {args.world_size} processes, {TOKENS_PER_RANK} tokens each, {args.steps - 2} steps; ", end="")
    print(f"{tensors}; by formula {formula / 1e6:.1f} MB a rank")
    print(f"{'--ddp':12}{'ms':>8}{'quartiles':>16}{'over bucketed':>15}{'quartiles':>14}{'bytes/formula':>15}  equal")
    for mode in MODES:
        seconds = result["seconds"][mode]
        median, low, high = (1e3 * value for value in quartiles(seconds))
        ratio = paired(seconds, result["seconds"]["bucketed"])
        spread = f"{ratio['quartile1']:.2f} - {ratio['quartile3']:.2f}"
        print(f"{mode:12}{median:8.1f}{f'{low:.0f} - {high:.0f}':>16}{ratio['median']:15.3f}{spread:>14}", end="")
        print(f"{result['bytes'][mode] / formula:15.4f}  {'yes' if result['equal'][mode] else 'no'}")
    seconds = result["seconds"]
    ratios = {
        "bucketed/torch": paired(seconds["bucketed"], seconds["torch"]),
        "naive/bucketed": paired(seconds["naive"], seconds["bucketed"]),
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['median']:.3f} (quartiles {ratio['quartile1']:.3f} - {ratio['quartile3']:.3f})")
    return {**result, "formula_bytes": formula, "ratios": ratios}


def table_buckets(args: argparse.Namespace) -> dict[str, Any]:
    tiny, large = run_ranks(rank_all_reduce, args.world_size, [1e-4, 64.0], timeout_s=300)[0]
    bytes_per_s = 64 * 2**20 / large  # of gradients, not of the wire: what the model calls w
    variants = {f"{size:g}": {"mode": "bucketed", "bucket_size_mb": size} for size in args.bucket_sizes_mb}
    result = run_ranks(rank_steps, args.world_size, variants, args.steps, timeout_s=900)[0]
    total = result["num_bytes"]
    best = math.sqrt(total * bytes_per_s * tiny)
    print(f"\nbuckets: measured s = {total / 1e6:.1f} MB, w = {bytes_per_s / 1e9:.2f} GB/s, o = {1e3 * tiny:.2f} ms")
    print(f"by the model buckets of {best / 2**20:.1f} MB are best")
    print(f"{'bucket MB':>10}{'buckets':>9}{'ms':>9}{'quartiles':>16}{'model: not hidden, ms':>23}")
    rows = []
    for size, (name, seconds) in zip(args.bucket_sizes_mb, result["seconds"].items()):
        groups = result["groups"][name]
        model_ms = 1e3 * (total / (groups * bytes_per_s) + groups * tiny)
        median, low, high = (1e3 * value for value in quartiles(seconds))
        rows.append({"bucket_size_mb": size, "buckets": groups, "milliseconds": median, "model_milliseconds": model_ms})
        print(f"{size:10g}{groups:9}{median:9.1f}{f'{low:.0f} - {high:.0f}':>16}{model_ms:23.1f}")
    return {"bytes_per_s": bytes_per_s, "overhead_s": tiny, "best_bucket_mb": best / 2**20, "rows": rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("all", "all_reduce", "rungs", "buckets"), default="all")
    parser.add_argument("--world_size", type=int, default=2, help="processes, all_reduce: at most (default 2)")
    parser.add_argument("--steps", type=int, default=20, help="of each variant, the first two uncounted (default 20)")
    parser.add_argument("--sizes_mb", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--bucket_sizes_mb", type=float, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--json", metavar="FILE", help="write everything measured to FILE")
    args = parser.parse_args(argv)
    if args.world_size < 2 or args.steps < 5:
        parser.error("--world_size must be at least 2 and --steps at least 5")
    print(f"torch {torch.__version__}, {platform.machine()}, gloo over loopback, one thread a process")
    tables = {"all_reduce": table_all_reduce, "rungs": table_rungs, "buckets": table_buckets}
    measured = {name: table(args) for name, table in tables.items() if args.table in ("all", name)}
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), **measured}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
