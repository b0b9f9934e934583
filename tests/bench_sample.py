"""How fast is a text read back? sample.generate against transformers' LlamaForCausalLM.generate, same weights' shapes.

    python tests/bench_sample.py                              batches of 1 and 16, both sides in turn, two minutes
    python tests/bench_sample.py --batch_sizes 4 --new_tokens 50 --rounds 9 --json sample.json

tokens/s     of all rows together, while decoding: the time for many tokens less that for one, over the tokens between
first token  seconds until the first token of a prompt of --prompt_tokens
where        a decoded token of ours: matrix products, and all else in so many operations that torch's profiler saw
bound        what the memory allows: every step reads all weights but the embedding table, see sample.seconds_to_read
products     what torch's matrix products allow: the same weights times random rows, and nothing else

Both sides draw at temperature 1 from all of the vocabulary, with a cache. Rounds take turns, so that whatever else the
machine does hits both; compared are medians of paired ratios, with their quartiles.
Aims: tokens/s >= 2.5 times the peer's at batch 1 and >= 2 times at 16, at least 0.7 of the bound at batch 1, and a
first token no later than the peer's.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import Linear, ModelConfig, TransformerLM  # noqa: E402
from sample import generate, seconds_to_read  # noqa: E402

SIDES = ("ours", "peer")

def peer_of(config: ModelConfig) -> torch.nn.Module:
    """transformers' Llama of the same shape."""
    import transformers

    transformers.logging.set_verbosity_error()
    llama = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.context_length, rms_norm_eps=1e-5,
        rope_theta=config.rope_theta, tie_word_embeddings=config.tie_embeddings, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(llama).eval()

def seconds_of(write: Callable[[int], None], num_tokens: int) -> float:
    start = time.perf_counter()
    write(num_tokens)
    return time.perf_counter() - start

@torch.inference_mode()
def seconds_of_products(model: TransformerLM, batch_size: int) -> float:
    """Median seconds of the products of one decoded token a row, by the layers themselves."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    pairs = [(layer, torch.randn(batch_size, 1, layer.weight.shape[1])) for layer in layers]
    return statistics.median(seconds_of(lambda _: [layer(x) for layer, x in pairs], 0) for _ in range(30))

def operations_per_token(write: Callable[[int], None]) -> float:
    """Operations of torch that call no other one, of a decoded token: those of 5 tokens less those of 1."""
    counts = []
    for num_tokens in (5, 1):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            write(num_tokens)
        counts.append(sum(event.name.startswith("aten::") and not event.cpu_children for event in profile.events()))
    return (counts[0] - counts[1]) / 4

def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartile1": low, "quartile3": high}

def compare(config: ModelConfig, batch_size: int, args: argparse.Namespace) -> dict:
    ours, peer = TransformerLM(config).eval(), peer_of(config)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, peer)]
    assert sizes[0] == sizes[1], f"the models differ: {sizes[0]:,} and {sizes[1]:,} parameters"
    prompt = torch.randint(config.vocab_size, (args.prompt_tokens,)).tolist()
    ids = torch.tensor([prompt] * batch_size)

    def we_write(n: int) -> None:
        written = sum(1 for _ in generate(ours, [prompt] * batch_size, n))
        assert written == n, f"{written} steps instead of {n}"

    def peer_writes(n: int) -> None:
        with torch.inference_mode():
            out = peer.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
        assert out.shape[1] == args.prompt_tokens + n, f"{out.shape[1] - args.prompt_tokens} tokens instead of {n}"

    sides = {"ours": we_write, "peer": peer_writes}
    first: dict[str, list[float]] = {name: [] for name in sides}
    speed: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(args.rounds + 1):  # the first warms up
        for name in list(sides)[:: 1 if round_number % 2 else -1]:
            one, many = seconds_of(sides[name], 1), seconds_of(sides[name], 1 + args.new_tokens)
            if round_number:
                first[name].append(one)
                speed[name].append(batch_size * args.new_tokens / (many - one))
    num_bytes = 4 * (sizes[0] - config.vocab_size * config.d_model * (not config.tie_embeddings))
    bound = batch_size / seconds_to_read(num_bytes, torch.device("cpu"))
    return {
        "batch_size": batch_size,
        "tokens_per_second": {name: summary(values) for name, values in speed.items()},
        "speed_ratio": summary([a / b for a, b in zip(speed["ours"], speed["peer"])]),
        "first_token_seconds": {name: summary(values) for name, values in first.items()},
        "first_token_ratio": summary([a / b for a, b in zip(first["peer"], first["ours"])]),
        "bound_tokens_per_second": bound,
        "share_of_bound": statistics.median(speed["ours"]) / bound,
        "products_tokens_per_second": batch_size / seconds_of_products(ours, batch_size),
        "operations_per_token": operations_per_token(we_write),
        "weight_bytes": num_bytes,
    }

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16], help="default: %(default)s")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--new_tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of measurements (default: %(default)s)")
    parser.add_argument("--d_model", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--num_layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--num_heads", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    config = ModelConfig(d_model=args.d_model, num_layers=args.num_layers, num_heads=args.num_heads)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'batch':>5}{'ours':>9}{'peer':>9} tokens/s  ratio (quartiles)   of bound  products   first token: ours  "
          "peer  ratio")
    results = []
    for batch_size in args.batch_sizes:
        r = compare(config, batch_size, args)
        results.append(r)
        speed, first = ([r[key][side]["median"] for side in SIDES]
                        for key in ("tokens_per_second", "first_token_seconds"))  # fmt: skip
        ratio = r["speed_ratio"]
        print(f"{batch_size:5}{speed[0]:9,.0f}{speed[1]:9,.0f}{ratio['median']:17.2f} "
              f"({ratio['quartile1']:.2f} - {ratio['quartile3']:.2f}){r['share_of_bound']:11.0%}"
              f"{r['products_tokens_per_second']:10,.0f}"
              f"{1e3 * first[0]:15.1f}{1e3 * first[1]:7.1f} ms{r['first_token_ratio']['median']:6.2f}")
    for r in results:
        rows, num_bytes = r["batch_size"], r["weight_bytes"]
        whole, products, bound = (1e3 * rows / x for x in (r["tokens_per_second"]["ours"]["median"],
                                  r["products_tokens_per_second"], r["bound_tokens_per_second"]))  # fmt: skip
        print(f"where a decoded token of {rows} rows goes: {whole:.1f} ms, of which matrix products {products:.1f} "
              f"({num_bytes / 1e6:,.0f} MB of weights at {num_bytes / products / 1e6:.0f} GB/s; a sum over them reads "
              f"{num_bytes / bound / 1e6:.0f}), all else {whole - products:.1f} in {r['operations_per_token']:.0f} "
              "operations")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1), encoding="utf-8")

if __name__ == "__main__":
    main()
