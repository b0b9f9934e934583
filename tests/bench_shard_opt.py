"""How fast are the modes of shard_opt.py, what do they send and hold, beside PyTorch's own? This machine's CPU, gloo.

    python tests/bench_shard_opt.py                            two processes, about three minutes
    python tests/bench_shard_opt.py --world_size 4 --steps 12 --json shard_opt.json

One step is forward, backward, reduction and AdamW on 20 M parameters in 147 tensors. The variants take turns step by
step in the same processes, so that whatever else the machine does hits all of them; compared are medians of paired
ratios. fully_shard_2 is torch's fully_shard with reshard_after_forward=False, its ZeRO-2. Then: seconds to gather the
whole optimizer state, beside ZeroRedundancyOptimizer.consolidate_state_dict, and who owns how much of a model with a
large vocabulary.
"""

import argparse
import copy
import functools
import json
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shard_opt  # noqa: E402
from ddp import Ranks, barrier, bytes_sent_per_rank, measure_bytes_sent, run_ranks, wrap  # noqa: E402
from model import ModelConfig, TransformerLM  # noqa: E402

TOKENS_PER_RANK = 256
CONFIG = dict(vocab_size=14_000, context_length=256, d_model=256, num_layers=16, num_heads=8, d_ff=704)
VARIANTS = ("unsharded", "zero1", "torch_zero1", "zero2", "fully_shard_2", "fsdp", "torch_fsdp")
LIMITS = {"zero1/torch_zero1": 1.02, "zero2/fully_shard_2": 0.92, "fsdp/torch_fsdp": 0.85}


def build(variant: str, module: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    def groups(model):
        return [{"params": list(model.parameters())}]

    if variant == "unsharded":
        return wrap(module, "torch"), torch.optim.AdamW(groups(module), lr=1e-4)
    mode = "torch_fsdp" if variant == "fully_shard_2" else variant
    module, optimizer = shard_opt.shard(module, mode, groups, torch.optim.AdamW, lr=1e-4)
    if variant == "fully_shard_2":
        for part in module.modules():
            if hasattr(part, "set_reshard_after_forward"):
                part.set_reshard_after_forward(False)
    return wrap(module, "torch") if variant.endswith("zero1") else module, optimizer


def rank_steps(ranks: Ranks, variants: list[str], num_steps: int) -> dict[str, Any]:
    """Seconds and bytes of each step, bytes held and the seconds of a gathered state, of each variant."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = TransformerLM(ModelConfig(**CONFIG))
    pairs = {variant: build(variant, copy.deepcopy(module)) for variant in variants}
    result: dict[str, Any] = {key: {variant: [] for variant in variants} for key in ("seconds", "bytes", "held")}
    for step in range(num_steps + 4):
        generator = torch.Generator().manual_seed(1000 * step + ranks.rank)
        tokens = torch.randint(CONFIG["vocab_size"], (1, TOKENS_PER_RANK + 1), generator=generator)
        for variant in variants[step % len(variants) :] + variants[: step % len(variants)]:
            model, optimizer = pairs[variant]

            def one_step(model=model, optimizer=optimizer, held=None) -> None:
                optimizer.zero_grad()
                logits = model(tokens[:, :-1])  # noqa: B023
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # noqa: B023
                model.finish_gradient_synchronization()
                if held is not None:
                    held.append(shard_opt.bytes_held(model, optimizer))
                optimizer.step()

            if step >= num_steps + 2:  # the last two are for the bytes
                measured = functools.partial(one_step, held=result["held"][variant])
                result["bytes"][variant].append(measure_bytes_sent(measured))
                continue
            barrier("a measurement")
            start = time.perf_counter()
            one_step()
            if step >= 2:
                result["seconds"][variant].append(time.perf_counter() - start)
    weights = {}
    for variant, (model, _) in pairs.items():
        state = model.module.state_dict(keep_vars=True)
        weights[variant] = torch.cat([shard_opt.whole_of(p.detach(), p).flatten() for p in state.values()])
    result["equal"] = {variant: bool(torch.equal(w, weights[variants[0]])) for variant, w in weights.items()}
    result["difference"] = {v: (w - weights[variants[0]]).abs().max().item() for v, w in weights.items()}
    result["gather_state"] = {}
    for variant in ("zero1", "torch_zero1", "fsdp", "torch_fsdp"):
        if variant in pairs:
            times = []
            for _ in range(3):
                barrier("a measurement")
                start = time.perf_counter()
                shard_opt.full_state_dicts(*pairs[variant])
                barrier("the gathered state")
                times.append(time.perf_counter() - start)
            result["gather_state"][variant] = statistics.median(times)
    result["bytes"] = {variant: min(values) for variant, values in result["bytes"].items()}
    result["held"] = {variant: values[-1] for variant, values in result["held"].items()}
    result["num_parameters"] = sum(p.numel() for p in module.parameters())
    result["num_tensors"] = len(list(module.parameters()))
    return result


def paired(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(numerator, denominator)], n=4, method="inclusive")
    return middle, low, high


def sent_by_formula(variant: str, num_parameters: int, kept: int, world_size: int) -> float:
    """Bytes per rank and step; `kept` parameters are not gathered a second time for the backward pass."""
    gather = bytes_sent_per_rank("all_gather", 4 * num_parameters, world_size)
    again = bytes_sent_per_rank("all_gather", 4 * (num_parameters - kept), world_size)
    passes = {"unsharded": 2, "zero1": 3, "torch_zero1": 3, "zero2": 2, "fully_shard_2": 2, "torch_fsdp": 2}
    return 2 * gather + again if variant == "fsdp" else passes[variant] * gather + again * (variant == "torch_fsdp")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world_size", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument("--steps", type=int, default=16, help="timed steps of each variant (default 16)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args(argv)
    by_rank = run_ranks(rank_steps, args.world_size, args.variants, args.steps, timeout_s=900)
    result = by_rank[0]
    num_parameters, kept = result["num_parameters"], 2 * CONFIG["vocab_size"] * CONFIG["d_model"]
    table = shard_opt.memory_table(num_parameters, args.world_size)
    print(f"{args.world_size} processes, {TOKENS_PER_RANK} tokens each, {args.steps} steps; {num_parameters:,} "
          f"parameters in {result['num_tensors']} tensors; torch {torch.__version__}, {platform.machine()}")
    print(f"{'':15}{'ms':>7}{'quartiles':>14}{'MB sent':>9}{'formula':>9}   MB held by whoever holds most (table):")
    print(f"{'':54}   {'parameters':>16}{'gradients':>16}{'state':>16}  equal to the first")
    for variant in args.variants:
        low, middle, high = statistics.quantiles(result["seconds"][variant], n=4, method="inclusive")
        formula = sent_by_formula(variant, num_parameters, kept, args.world_size)
        held = {part: max(other["held"][variant][part] for other in by_rank) for part in result["held"][variant]}
        stage = {"unsharded": "none", "fully_shard_2": "zero2"}.get(variant, variant.removeprefix("torch_"))
        parts = "".join(f"{held[p] / 1e6:9.2f}" + f"({table[stage][p] / 1e6:.2f})".rjust(8) for p in held)
        spread = f"{1e3 * low:.0f} - {1e3 * high:.0f}"
        equal = "yes" if result["equal"][variant] else format(result["difference"][variant], ".1e")
        sent = f"{result['bytes'][variant] / 1e6:9.2f}{formula / 1e6:9.2f}"
        print(f"{variant:15}{1e3 * middle:7.0f}{spread:>14}{sent}   {parts}  {equal}")
    ratios = {}
    for name, limit in LIMITS.items():
        ours, theirs = name.split("/")
        if ours in args.variants and theirs in args.variants:
            ratios[name] = paired(result["seconds"][ours], result["seconds"][theirs])
            sent = result["bytes"][ours] / result["bytes"][theirs]
            print(f"{name}: step {ratios[name][0]:.3f} (quartiles {ratios[name][1]:.3f} - {ratios[name][2]:.3f}), "
                  f"wanted <= {limit}; bytes sent {sent:.3f}")
    for ours, theirs in (("zero1", "torch_zero1"), ("fsdp", "torch_fsdp")):
        times = result["gather_state"]
        if ours in times and theirs in times:
            print(f"whole state dicts: {ours} {times[ours]:.3f} s, {theirs} {times[theirs]:.3f} s, "
                  f"ratio {times[ours] / times[theirs]:.2f}")
    gpt2 = TransformerLM(ModelConfig(vocab_size=50_304, context_length=8, d_model=512, num_layers=6, num_heads=8,
                                     d_ff=2048, tie_embeddings=True))  # fmt: skip
    load = [0] * 4
    shard_opt.cut_rows([p.shape for p in gpt2.parameters()], load)
    print(f"largest rank / ideal, vocabulary of 50,304, 4 ranks: {4 * max(load) / sum(load):.5f}")
    if args.json:
        args.json.write_text(json.dumps({**result, "ratios": ratios, "load": load}, indent=1))


if __name__ == "__main__":
    main()
