"""How fast is a training step? Ours against transformers' LlamaForCausalLM with torch's own loss, clipping and AdamW.

    python tests/bench_train.py                                      both shapes, three minutes
    python tests/bench_train.py --shapes baseline --dtype bfloat16   under autocast; only where the CPU multiplies it
    python tests/bench_train.py --table where                        our step by part
    python tests/bench_train.py --json train.json

step    forward, loss, backward, clipping, optimizer, on the same batch, parameters in float32. Both sides take turns in
        one process, so that whatever else the machine does hits both; compared are medians of paired ratios. The peer
        has torch's fused AdamW. Peak memory is measured in a process of its own for each side.
where   seconds of the parts of our step, each timed alone

Aims: 1.2 times the peer's tokens/s in float32, 1.5 times in bfloat16, at most 0.8 of its peak memory.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_sample import peer_of, summary  # noqa: E402

from model import ModelConfig, TransformerLM  # noqa: E402
from train import AdamW, clip_gradients, linear_cross_entropy, parameter_groups  # noqa: E402

SHAPES = {"baseline": {}, "deeper": dict(d_model=384, num_layers=6, num_heads=6)}

def batch_of(config: ModelConfig, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(config.vocab_size, (batch_size, config.context_length + 1), generator=generator)
    return windows[:, :-1], windows[:, 1:].contiguous()

def autocast(dtype: str):
    return nullcontext() if dtype == "float32" else torch.autocast("cpu", dtype=getattr(torch, dtype))

def our_step(config: ModelConfig, batch_size: int, dtype: str) -> Callable[[], float]:
    inputs, targets = batch_of(config, batch_size)
    model = TransformerLM(config)
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

def peak_memory(side: str, *arguments) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=peak_bytes, args=(side, *arguments, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{side}: the process that measures memory ended with {process.exitcode}")
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
    memory = {name: peak_memory(name, config, args.batch_size, args.dtype) for name in SIDES}
    tokens = args.batch_size * config.context_length
    return {
        "tokens_per_second": {name: summary([tokens / s for s in values]) for name, values in seconds.items()},
        "ratio": summary([a / b for a, b in zip(seconds["peer"], seconds["ours"])]),
        "peak_bytes": memory, "memory_ratio": memory["ours"] / memory["peer"],
    }  # fmt: skip

def where_time_goes(config: ModelConfig, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each part of our step, timed alone on data of the step's sizes; `blocks` is the rest."""
    inputs, targets = batch_of(config, args.batch_size)
    model = TransformerLM(config)
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-3)
    hidden = torch.randn(*inputs.shape, config.d_model, requires_grad=True)  # (B, T, C)
    head = partial(linear_cross_entropy, targets=targets)

    def forward() -> torch.Tensor:
        with autocast(args.dtype):
            return model(inputs, head=head)

    def loss() -> None:
        with autocast(args.dtype):
            value = head(hidden, model.lm_head.weight)
        value.backward()

    parts = {"forward": forward, "forward and backward": lambda: forward().backward(), "lm_head and loss": loss,
             "clipping": lambda: clip_gradients(model.parameters(), 1.0), "optimizer": optimizer.step}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.rounds + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    medians["blocks, both ways"] = medians["forward and backward"] - medians["lm_head and loss"]
    return medians

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("all", "step", "where"), default="all", help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of 256 tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}, "
          f"{args.batch_size} x 256 tokens")  # fmt: skip
    results: dict[str, dict] = {}
    for shape in args.shapes:
        config = ModelConfig(**SHAPES[shape])
        name, results[shape] = f"{shape} ({config.num_layers} x {config.d_model})", {}
        if args.table != "where":
            r = results[shape]["step"] = compare(config, args)
            speed, memory, ratio = r["tokens_per_second"], r["peak_bytes"], r["ratio"]
            print(f"\n{name}: ours {speed['ours']['median']:,.0f} tokens/s, peer {speed['peer']['median']:,.0f}, ratio "
                  f"{ratio['median']:.2f} ({ratio['quartile1']:.2f} - {ratio['quartile3']:.2f}); peak memory "
                  f"{memory['ours'] / 1e6:,.0f} and {memory['peer'] / 1e6:,.0f} MB: {r['memory_ratio']:.2f}")
        if args.table != "step":
            parts = results[shape]["where"] = where_time_goes(config, args)
            whole = parts["forward and backward"] + parts["clipping"] + parts["optimizer"]
            print(f"\n{name}, where a step of {1e3 * whole:,.0f} ms goes")
            for part, seconds in parts.items():
                print(f"  {part:22}{1e3 * seconds:9.1f} ms{seconds / whole:8.1%}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1), encoding="utf-8")

if __name__ == "__main__":
    main()
