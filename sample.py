"""Read the model back: turn its distribution over the next token into text, one token at a time.

A language model gives p(next token | tokens so far). Writing is a loop: ask for p, draw a token from it, append it,
ask again. This file holds the three choices in that loop:

    how to draw      temperature sharpens or flattens p; top-k and top-p cut off its unlikely tail
    how to compute   naively, all tokens again for each new one: T tokens cost T + (T+1) + (T+2) + ... token forwards;
                     or with a cache of keys and values: one token's forward each, equal token for token
    when to stop     at <|endoftext|>, or after max_new_tokens

    python sample.py                                       # a text from the newest run
    python sample.py --run runs/stories-1 --prompt "One morning" --temperature 0.7
    python sample.py --num_samples 4 --top_p 0.9 --seed 7  # four texts side by side in one batch
    python sample.py --no_cache                            # the definition, to see what the cache saves

    1. From logits to a token        3. Text as it comes        5. Command line
    2. The loop                      4. What a token costs
"""

import argparse
import codecs
import json
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bpe import END_OF_TEXT, Tokenizer, UserError
from model import PADDING_SEGMENT_ID, KVCache, ModelConfig, TransformerLM, softmax

# --- 1. From logits to a token ---


def next_token_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """softmax(logits / temperature), cut to the top_k likeliest tokens, then to the smallest set of them whose
    probabilities reach top_p (nucleus sampling, Holtzman et al. 2020), renormalized: (..., V) -> (..., V) float32.

    temperature < 1 sharpens; 0 stands for the limit, all probability on the greatest logit.

    >>> p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    >>> [round(x, 3) for x in next_token_probabilities(p.log(), top_p=0.7).tolist()]
    [0.667, 0.333, 0.0, 0.0]
    >>> next_token_probabilities(p.log(), temperature=0.0).tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    logits = logits.float()  # (..., V)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)  # (..., V)
    probabilities, order = softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)  # (..., V)
    if top_k is not None:
        probabilities[..., top_k:] = 0
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    if top_p is not None:
        # subtle: a token stays when the tokens *before* it do not reach top_p yet, so the one that crosses it stays
        # too, and the first one always does.
        before = probabilities.cumsum(dim=-1) - probabilities  # (..., V)
        probabilities[before >= top_p] = 0
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)  # (..., V), in the vocabulary's order


# --- 2. The loop ---


@torch.inference_mode()
def generate(
    model: TransformerLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
    timings: dict | None = None,
) -> Iterator[list[int | None]]:
    """Continue several prompts (each at least one token) side by side; yields, per step, one new token for each row.

    A row that drew stop_id, which is not yielded, gives None from then on; the end is when all rows have stopped.
    Row r draws from its own generator, seeded with seed + r, so a text does not depend on its neighbours.

    The model sees the last tokens that fit its context. When the window is full, its last half is kept, read again,
    and grows anew: sliding it by one token would change every position and make a cache worthless.
    With and without the cache the windows, and so the tokens, are the same.
    """
    config, device = model.config, next(model.parameters()).device
    longest = max(map(len, prompts))
    # Prompts are aligned at their right ends, so that every row's next token belongs into the same column.
    window = torch.zeros(len(prompts), longest, dtype=torch.long)  # (B, T)
    segment_ids = torch.full_like(window, PADDING_SEGMENT_ID)  # (B, T)
    for row, prompt in enumerate(prompts):
        window[row, longest - len(prompt) :] = torch.tensor(prompt)
        segment_ids[row, longest - len(prompt) :] = 0
    window, segment_ids = (x[:, -config.context_length :].to(device) for x in (window, segment_ids))
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    stopped = [False] * len(prompts)
    cache = None
    if use_cache:
        cache = KVCache(config, len(prompts), device=device, dtype=next(model.parameters()).dtype)
    timings = {} if timings is None else timings
    timings.update(prefill_tokens=0, prefill_seconds=0.0, decode_tokens=0, decode_seconds=0.0)
    model.eval()
    for _ in range(max_new_tokens):
        start = time.perf_counter()
        unread = window.shape[1] - cache.length if cache is not None else window.shape[1]
        logits = last_logits(model, window[:, -unread:], segment_ids[:, -unread:], cache)  # (B, V)
        probabilities = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p).cpu()
        drawn = [torch.multinomial(p, 1, generator=g).item() for p, g in zip(probabilities, generators)]
        kind = "prefill" if unread > 1 and cache is not None else "decode"
        timings[f"{kind}_tokens"] += len(prompts) * (unread if kind == "prefill" else 1)
        timings[f"{kind}_seconds"] += time.perf_counter() - start

        stopped = [was or token == stop_id for was, token in zip(stopped, drawn)]
        if all(stopped):
            return
        yield [None if stop else token for stop, token in zip(stopped, drawn)]
        if window.shape[1] == config.context_length:  # full: keep the last half and read it again
            keep = config.context_length // 2
            window, segment_ids = window[:, -keep:], segment_ids[:, -keep:]
            if cache is not None:
                cache.reset()
        window = torch.cat([window, torch.tensor(drawn, device=device).unsqueeze(1)], dim=1)  # (B, T + 1)
        segment_ids = torch.cat([segment_ids, torch.zeros_like(segment_ids[:, :1])], dim=1)  # (B, T + 1)


def last_logits(model: TransformerLM, tokens: Tensor, segment_ids: Tensor, cache: KVCache | None) -> Tensor:
    """Logits after the last of `tokens` (B, T), which the model reads behind what the cache holds: (B, V)."""
    real = segment_ids != PADDING_SEGMENT_ID  # (B, T)
    if cache is not None:
        padded = None if real.all() else segment_ids
        hidden = model.forward_hidden(tokens, segment_ids=padded, cache=cache)  # (B, T, C)
    elif real.all():
        hidden = model.forward_hidden(tokens)  # (B, T, C)
    else:  # positions count real tokens only: each row as if it stood alone
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
        hidden = model.forward_hidden(tokens, positions=positions, segment_ids=segment_ids)  # (B, T, C)
    return model.lm_head(hidden[:, -1])  # (B, V): the head is applied where it is needed only


# --- 3. Text as it comes ---


class TextStream:
    """Turns tokens into text at once, but never into half a character: a token may end inside one, and then its last
    bytes wait for the next token. What never becomes a character is shown as U+FFFD.

    >>> stream = TextStream({0: b"caf", 1: bytes([0xC3]), 2: bytes([0xA9])})
    >>> [stream.push(0), stream.push(1), stream.push(2), stream.finish()]
    ['caf', '', 'é', '']
    """

    def __init__(self, vocab: dict[int, bytes]) -> None:
        self.vocab = vocab
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.vocab.get(token, b"\xff"))

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)


def write_samples(model: TransformerLM, tokenizer: Tokenizer, prompt: list[int], num_samples: int, **options) -> None:
    """Print num_samples continuations; they are computed together. The first is shown as it comes, the others wait."""
    streams = [TextStream(tokenizer.vocab) for _ in range(num_samples)]
    texts = [""] * num_samples
    for tokens in generate(model, [prompt] * num_samples, **options):
        for row, token in enumerate(tokens):
            if token is not None:
                piece = streams[row].push(token)
                texts[row] += piece
                if row == 0:
                    print(piece, end="", flush=True)
    print(streams[0].finish())
    for row in range(1, num_samples):
        print(f"\n--- {row + 1} ---\n{texts[row]}{streams[row].finish()}")


# --- 4. What a token costs ---


def read_bandwidth(num_bytes: int, device: torch.device) -> float:
    """Bytes per second at which a buffer of this size can be read: the best of a few sums over it."""
    buffer = torch.ones(max(num_bytes // 4, 1), device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - start)
    return 4 * buffer.numel() / best


def cost_lines(model: TransformerLM, timings: dict, num_samples: int, use_cache: bool) -> list[str]:
    """Speed reached, and the speed that memory allows: one token reads every weight but the embedding table once."""
    lines = []
    if timings["prefill_tokens"]:
        rate = timings["prefill_tokens"] / max(timings["prefill_seconds"], 1e-9)
        lines.append(f"prefill {timings['prefill_tokens']:,} tokens, {rate:,.0f} tokens/s")
    if timings["decode_tokens"]:
        rate = timings["decode_tokens"] / max(timings["decode_seconds"], 1e-9)
        lines.append(f"decode {timings['decode_tokens']:,} tokens, {rate:,.0f} tokens/s")
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}  # tied tensors once
    if not model.config.tie_embeddings:
        weights.pop(model.token_embeddings.weight.data_ptr())
    num_bytes = sum(weights.values())
    device = next(model.parameters()).device
    bound = num_samples * read_bandwidth(num_bytes, device) / num_bytes
    lines.append(f"reading {num_bytes / 1e6:,.1f} MB of weights a step allows {bound:,.0f} tokens/s")
    if use_cache:
        cache = KVCache(model.config, 1, dtype=next(model.parameters()).dtype)
        lines.append(f"cache {cache.bytes_per_token():,} bytes a token")
    return lines


# --- 5. Command line ---


def newest_run(out_dir: Path) -> Path:
    """The run whose checkpoint was written last."""
    checkpoints = list(out_dir.glob("*/checkpoint_*.pt"))
    if not checkpoints:
        raise UserError(f"{out_dir}: no trained run here yet; python train.py makes one")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def load_run(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[TransformerLM, Tokenizer]:
    """Model and tokenizer of a run of train.py, from its newest checkpoint."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: there is no run here; python train.py makes one, --run names it")
    path = max(folder.glob("checkpoint_*.pt"), key=lambda path: path.name, default=None)
    if path is None:
        raise UserError(f"{folder}: the run has no checkpoint yet; let python train.py go on until it has saved one")
    try:
        description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = ModelConfig(**description["model"])
        with zipfile.ZipFile(path) as archive:  # torch.load verifies no checksums
            if archive.testzip() is not None:
                raise UserError(f"{path}: the checkpoint is damaged; remove it to read the one before")
        payload = torch.load(path, map_location="cpu", weights_only=True)
        model = TransformerLM(config)
        model.load_state_dict(payload["model"])
    except UserError:
        raise
    except Exception as error:  # a foreign or damaged file can fail in zipfile, json, pickle and torch in many ways
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a readable checkpoint of this run ({type(error).__name__}: {reason})") from None
    special_tokens = [END_OF_TEXT] if config.vocab_size > 256 else []
    tokenizer = Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", special_tokens)
    if tokenizer.hash() != description.get("tokenizer_hash"):
        raise UserError(f"{folder}: vocab.json and merges.txt are not the tokenizer that this run was trained with")
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, help="a run's folder (default: the newest in runs)")
    parser.add_argument("--prompt", default="", help="how the text begins (default: nothing, a new text)")
    parser.add_argument("--max_new_tokens", type=int, default=400, help="length limit (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that reach probability p")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, in one batch (default: %(default)s)")
    parser.add_argument("--no_cache", action="store_true", help="recompute all tokens for each new one")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: the fastest that is there)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the weights (default: bfloat16 on GPUs that have it, else float32)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1 or args.num_samples < 1:
        raise UserError("--max_new_tokens and --num_samples must be at least 1")
    if not args.temperature >= 0:
        raise UserError(f"--temperature must not be negative, it is {args.temperature}")
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top_k must be at least 1, it is {args.top_k}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p must lie in (0, 1], it is {args.top_p}")


def sample(args: argparse.Namespace) -> None:
    check_options(args)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {args.device} is not to be had here ({reason}): try --device cpu") from None
    if args.dtype == "auto":
        modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        args.dtype = "bfloat16" if modern else "float32"
    folder = args.run or newest_run(Path("runs"))
    model, tokenizer = load_run(folder, device, getattr(torch, args.dtype))

    # A text begins after <|endoftext|>, as in training; a tokenizer without it begins after a line's end.
    stop_id = tokenizer.token_ids.get(END_OF_TEXT.encode())
    prompt = tokenizer.encode(args.prompt)
    prompt = [stop_id, *prompt] if stop_id is not None else prompt or tokenizer.encode("\n")
    print(f"--- {folder}, prompt {args.prompt!r} ---", file=sys.stderr)
    if len(prompt) > model.config.context_length:
        print(f"the prompt has {len(prompt)} tokens: the model sees the last {model.config.context_length}",
              file=sys.stderr)
    timings: dict = {}
    print(args.prompt, end="", flush=True)
    write_samples(model, tokenizer, prompt, args.num_samples, max_new_tokens=args.max_new_tokens, stop_id=stop_id,
                  temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                  use_cache=not args.no_cache, timings=timings)
    print("--- " + "; ".join(cost_lines(model, timings, args.num_samples, not args.no_cache)) + " ---", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    try:
        sample(build_parser().parse_args(argv))
    except (UserError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print()
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
