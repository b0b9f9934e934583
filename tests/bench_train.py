"""How fast is a training step? Ours against transformers' LlamaForCausalLM with torch's own loss, clipping and AdamW.

    python tests/bench_train.py                                      both shapes, three minutes
    python tests/bench_train.py --shapes baseline --dtype bfloat16   under autocast; only where the CPU multiplies it
    python tests/bench_train.py --table where                        our step by kind of operation
    python tests/bench_train.py --table compile                      what --compile costs at the start and buys a step
    python tests/bench_train.py --table run                          around the steps: loader, start, growth; a minute
    python tests/bench_train.py --log runs/stories-1/log.jsonl       what a run spent outside its steps
    python tests/bench_train.py --json train.json

step    forward, loss, backward, clipping, optimizer, on the same batch, parameters in float32. Both sides take turns in
        one process, so that whatever else the machine does hits both; compared are medians of paired ratios. The peer
        has torch's fused AdamW. Peak memory is measured in a process of its own for each side.
where   our step by kind of operation, from torch's profiler, and the speed of its matrix products beside that of one
        product alone
compile seconds until the first compiled step is done, with an empty cache of compiled code and with a full one, each in
        a process of its own; a step over a compiled one, in turn
run     the loader beside a step of the default run; train.py --help beside `import torch`; from the command to the
        first step, data there; the last 200 of 1,000 steps of a small run over 200 early ones, in each of three runs
log     seconds of a run less those of its steps: evaluations, checkpoints, log lines

Aims: loader under 2 % of a step, outside the steps under 5 % of the default run, --help within 0.4 s of `import torch`,
the first step within 5 s, no growth.
Aims of a step: 1.2 times the peer's tokens/s in float32, 1.5 times in bfloat16, at most 0.8 of its peak memory.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_sample import peer_of, summary  # noqa: E402

from model import PRESETS, ModelConfig, TransformerLM  # noqa: E402
from train import AdamW, clip_gradients, get_batch, linear_cross_entropy, parameter_groups  # noqa: E402

SHAPES = {"baseline": {}, "deeper": dict(d_model=384, num_layers=6, num_heads=6)}

def batch_of(config: ModelConfig, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(config.vocab_size, (batch_size, config.context_length + 1), generator=generator)
    return windows[:, :-1], windows[:, 1:].contiguous()

def autocast(dtype: str):
    return nullcontext() if dtype == "float32" else torch.autocast("cpu", dtype=getattr(torch, dtype))

def our_step(config: ModelConfig, batch_size: int, dtype: str, *, compiled: bool = False) -> Callable[[], float]:
    inputs, targets = batch_of(config, batch_size)
    model = TransformerLM(config)
    if compiled:  # as train.py --compile
        model.compile()
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype):
            loss = model(inputs, head=partial(linear_cross_entropy, targets=targets))
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step

def peer_step(config: ModelConfig, batch_size: int, dtype: str) -> Callable[[], float]:
    inputs, targets = batch_of(config, batch_size)
    model = peer_of(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype):
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step

SIDES = {"ours": our_step, "peer": peer_step}

def resident_peak() -> int:
    """Bytes that this process held at most, from Linux: getrusage would count what its parent held, too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

def peak_bytes(side: str, config: ModelConfig, batch_size: int, dtype: str, queue) -> None:
    """What two steps add to the peak, behind a step of a tiny model that loads all code."""
    tiny = ModelConfig(vocab_size=8, context_length=8, d_model=8, num_heads=2, num_layers=1)
    SIDES[side](tiny, 1, dtype)()
    before = resident_peak()
    step = SIDES[side](config, batch_size, dtype)
    step(), step()
    queue.put(resident_peak() - before)

def in_own_process(target: Callable, *arguments):
    """What target(*arguments, queue) puts into its queue."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=target, args=(*arguments, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__}{arguments}: its process ended with {process.exitcode}")
    return queue.get()

def compare(config: ModelConfig, args: argparse.Namespace) -> dict:
    steps = {name: make(config, args.batch_size, args.dtype) for name, make in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for round_number in range(args.rounds + 1):  # the first warms up
        for name in list(SIDES)[:: 1 if round_number % 2 else -1]:
            start = time.perf_counter()
            loss = steps[name]()
            seconds[name].append(time.perf_counter() - start)
            assert loss < 20, f"{name}: the loss is {loss}, a step that learns nothing proves nothing"
    seconds = {name: values[1:] for name, values in seconds.items()}
    del steps
    memory = {name: in_own_process(peak_bytes, name, config, args.batch_size, args.dtype) for name in SIDES}
    tokens = args.batch_size * config.context_length
    return {
        "tokens_per_second": {name: summary([tokens / s for s in values]) for name, values in seconds.items()},
        "ratio": summary([a / b for a, b in zip(seconds["peer"], seconds["ours"])]),
        "peak_bytes": memory, "memory_ratio": memory["ours"] / memory["peer"],
    }  # fmt: skip

def kind_of(event) -> str:
    """Where an operation of the profile belongs: to the optimizer by its place, else by its name."""
    outer = event
    while outer is not None and not outer.name.startswith("Optimizer.step"):
        outer = outer.cpu_parent
    if outer is not None:
        return "optimizer"
    if event.name in ("aten::mm", "aten::bmm", "aten::addmm"):
        return "matrix products"
    return "attention" if "attention" in event.name else "elementwise and the rest"

def where_time_goes(config: ModelConfig, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step by kind of operation, and the GFLOP/s of its products and of one product alone."""
    step = our_step(config, args.batch_size, args.dtype)
    step(), step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(args.rounds):
            step()
    seconds = dict.fromkeys(("matrix products", "attention", "elementwise and the rest", "optimizer"), 0.0)
    for event in profile.events():
        seconds[kind_of(event)] += event.self_cpu_time_total / 1e6 / args.rounds
    num_tokens, c, f = args.batch_size * config.context_length, config.d_model, config.d_ff
    block = 2 * c * c + 2 * c * config.num_kv_heads * config.head_dim + 3 * c * f
    # A weight takes part in a product on the way forward, and in one for each of the two gradients on the way back.
    flops = 6 * num_tokens * (config.num_layers * block + config.vocab_size * c)
    x, w = torch.randn(num_tokens, c), torch.randn(f, c)
    with autocast(args.dtype):
        alone = min(seconds_of(lambda: x @ w.T) for _ in range(50))
    return {**seconds, "gflop": flops / 1e9, "gflops": flops / 1e9 / seconds["matrix products"],
            "gflops_alone": 2 * num_tokens * c * f / 1e9 / alone}  # fmt: skip

def compiled_beside_eager(config: ModelConfig, args: argparse.Namespace, cache: str, queue) -> None:
    """Seconds of the first compiled step, and median seconds of later ones and of plain ones, in turn."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    sides = {name: our_step(config, args.batch_size, args.dtype, compiled=name == "compiled")
             for name in ("compiled", "eager")}  # fmt: skip
    first = {name: seconds_of(step) for name, step in sides.items()}
    pairs = [[seconds_of(step) for step in sides.values()] for _ in range(args.rounds + 1)][1:]
    queue.put({"first_seconds": first["compiled"], "seconds": statistics.median(a for a, _ in pairs),
               "eager_seconds": statistics.median(b for _, b in pairs),
               "ratio": summary([b / a for a, b in pairs])})  # fmt: skip

def cost_of_compiling(config: ModelConfig, args: argparse.Namespace) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as cache:
        return {name: in_own_process(compiled_beside_eager, config, args, cache) for name in ("cold", "warm")}

def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

def loader_share() -> dict[str, float]:
    """Median seconds of a batch and of a step of the default run on a CPU: 16 windows that begin with a document."""
    config, batch_size = ModelConfig(**PRESETS["laptop"]), 16
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, 5_000_000, dtype=np.uint16)
    tokens[::200] = 0
    starts = np.flatnonzero(tokens[: -config.context_length] == 0)
    step, rng = our_step(config, batch_size, "float32"), np.random.default_rng(0)
    load = partial(get_batch, tokens, batch_size, config.context_length, "cpu", rng=rng, starts=starts)
    pairs = [(seconds_of(load), seconds_of(step)) for _ in range(15)][3:]
    batch, whole = (statistics.median(values) for values in zip(*pairs))
    return {"batch_seconds": batch, "step_seconds": whole, "share": batch / (batch + whole)}

def train_command(folder: Path, *flags: str) -> list[str]:
    small = ["--vocab_size=300", "--context_length=32", "--d_model=32", "--num_layers=1", "--num_heads=2"]
    places = [f"--dataset={folder / 'text.txt'}", f"--data_dir={folder / 'data'}", f"--out_dir={folder}"]
    more = ["--batch_size=4", "--eval_interval=100000", "--save_interval=100000", "--device=cpu", *flags]
    return [sys.executable, str(ROOT / "train.py"), *places, *small, *more]

def run_quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

def log_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

def around_the_steps() -> Iterator[tuple[str, dict[str, float]]]:
    """What a user waits for beside the steps: the rows of `--table run`, as they are measured."""
    torch_alone, with_help = [sys.executable, "-c", "import torch"], [sys.executable, str(ROOT / "train.py"), "--help"]
    pairs = [(seconds_of(partial(run_quietly, torch_alone)), seconds_of(partial(run_quietly, with_help)))
             for _ in range(4)][1:]  # fmt: skip
    yield "help", {"import_torch_seconds": statistics.median(a for a, _ in pairs),
                   "more_seconds": statistics.median(b - a for a, b in pairs)}  # fmt: skip
    yield "loader", loader_share()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("the cat sat on the mat and looked at the dog. " * 3000, encoding="utf-8")
        run_quietly(train_command(folder, "--max_steps=1", "--run_name=data"))
        starts = [seconds_of(partial(run_quietly, train_command(folder, "--max_steps=1", f"--run_name=start{i}")))
                  for i in range(3)]  # fmt: skip
        yield "start", {"seconds": statistics.median(starts)}
        ratios = []
        for i in range(3):
            run_quietly(train_command(folder, "--max_steps=1000", "--log_interval=1", f"--run_name=long{i}"))
            lines = [line for line in log_lines(folder / f"long{i}/log.jsonl") if "train_loss" in line]
            speeds = [line["tokens_per_second"] for line in lines]
            ratios.append(statistics.median(speeds[20:220]) / statistics.median(speeds[-200:]))
        yield "growth", {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}

def outside_the_steps(path: Path) -> dict[str, float]:
    """Seconds of a whole run from its log, and those that its steps took at the speeds noted there."""
    lines = log_lines(path)
    told = [line for line in lines if "train_loss" in line]
    tokens = [line["tokens"] for line in told]
    steps = sum((n - before) / line["tokens_per_second"] for before, n, line in zip([0, *tokens], tokens, told))
    return {"seconds": lines[-1]["seconds"], "in_steps": steps, "outside_share": 1 - steps / lines[-1]["seconds"]}

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("all", "step", "where", "compile", "run"), default="all",
                        help="all: step, where")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of 256 tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--log", type=Path, help="only this: a run's log.jsonl")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}, "
          f"{args.batch_size} x 256 tokens")  # fmt: skip
    results: dict[str, dict] = {}
    if args.log:
        r = results["log"] = outside_the_steps(args.log)
        print(f"{args.log}: {r['seconds']:.1f} s, {r['in_steps']:.1f} in steps, {r['outside_share']:.1%} outside")
    elif args.table == "run":
        for row, values in around_the_steps():
            results[row] = values
            print(f"  {row:8}" + "   ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items()),
                  flush=True)
    for shape in [] if args.log or args.table == "run" else args.shapes:
        config = ModelConfig(**SHAPES[shape])
        name, results[shape] = f"{shape} ({config.num_layers} x {config.d_model})", {}
        if args.table in ("all", "step"):
            r = results[shape]["step"] = compare(config, args)
            speed, memory, ratio = r["tokens_per_second"], r["peak_bytes"], r["ratio"]
            print(f"\n{name}: ours {speed['ours']['median']:,.0f} tokens/s, peer {speed['peer']['median']:,.0f}, ratio "
                  f"{ratio['median']:.2f} ({ratio['quartile1']:.2f} - {ratio['quartile3']:.2f}); peak memory "
                  f"{memory['ours'] / 1e6:,.0f} and {memory['peer'] / 1e6:,.0f} MB: {r['memory_ratio']:.2f}")
        if args.table in ("all", "where"):
            parts = results[shape]["where"] = where_time_goes(config, args)
            kinds = dict(list(parts.items())[:4])
            print(f"\n{name}, where a step of {1e3 * sum(kinds.values()):,.0f} ms goes")
            for kind, seconds in kinds.items():
                print(f"  {kind:26}{1e3 * seconds:9.1f} ms{seconds / sum(kinds.values()):8.1%}")
            print(f"  products: {parts['gflop']:.0f} GFLOP at {parts['gflops']:.0f} GFLOP/s, one alone reaches "
                  f"{parts['gflops_alone']:.0f}")
        if args.table == "compile":
            for cache, r in cost_of_compiling(config, args).items():
                results[shape].setdefault("compile", {})[cache] = r
                saved = r["eager_seconds"] - r["seconds"]
                print(f"{name}, {cache} cache: the first step takes {r['first_seconds']:.1f} s, later ones "
                      f"{1e3 * r['seconds']:,.0f} instead of {1e3 * r['eager_seconds']:,.0f} ms, ratio "
                      f"{r['ratio']['median']:.2f} ({r['ratio']['quartile1']:.2f} - {r['ratio']['quartile3']:.2f})"
                      + f"; pays after {(r['first_seconds'] - r['eager_seconds']) / saved:,.0f} steps" * (saved > 0))
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1), encoding="utf-8")

if __name__ == "__main__":
    main()
