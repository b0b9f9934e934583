"""Read the model back: turn its distribution over the next token into text, one token at a time.

Writing is a loop: ask for p(next token | tokens so far), draw a token from it, append it. Three choices are in it:

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
import sys
import time
import timeit
import zipfile
from collections.abc import Iterator
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from bpe import END_OF_TEXT, Tokenizer, UserError
from model import KVCache, ModelConfig, TransformerLM, document_places, softmax


# --- 1. From logits to a token ---
def next_token_probabilities(logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None
                             = None) -> Tensor:
    """softmax(logits / temperature), cut to the top_k likeliest tokens, then to the smallest set of them whose
    probabilities reach top_p (nucleus sampling, Holtzman et al. 2020), renormalized: (..., V) -> (..., V) float32.
    temperature < 1 sharpens; the limit 0 puts all probability on the greatest logit.
    >>> p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    >>> [round(x, 3) for x in next_token_probabilities(p.log(), top_p=0.7).tolist()]
    [0.667, 0.333, 0.0, 0.0]
    >>> next_token_probabilities(p.log(), temperature=0.0).tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    logits = logits.float()  # (..., V)
    if temperature < 1e-6:  # below float32's resolution of logits, where the division may overflow, lies the limit
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)  # (..., V)
    probabilities = softmax(logits / temperature, dim=-1)  # (..., V)
    if top_k is None and top_p is None:
        return probabilities
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)  # (..., V)
    if top_k is not None:
        probabilities[..., top_k:] = 0
    if top_p is not None:
        # subtle: a token stays when the tokens *before* it do not reach top_p yet, so the one that crosses it stays
        # too, and the first one always does.
        before = probabilities.cumsum(dim=-1) - probabilities  # (..., V)
        probabilities[before >= top_p * probabilities.sum(dim=-1, keepdim=True)] = 0
    probabilities = torch.zeros_like(probabilities).scatter(-1, order, probabilities)  # (..., V), back in order
    return probabilities / probabilities.sum(dim=-1, keepdim=True)  # (..., V)

def draw(probabilities: Tensor, generators: list[torch.Generator]) -> list[int]:
    """One token for each row of (B, V): the one on which a uniform number falls when the probabilities lie side by side
    on a line. One random number a row, where torch.multinomial takes V: at V = 10,000 a fifth of a step of 16 rows."""
    ends = probabilities.double().cumsum(dim=-1)  # (B, V)
    uniform = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in generators])  # (B, 1)
    return torch.searchsorted(ends, uniform * ends[:, -1:], right=True)[:, 0].tolist()  # B ids

# --- 2. The loop ---
@torch.inference_mode()
def generate(model: TransformerLM, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k:
             int | None = None, top_p: float | None = None, stop_id: int | None = None, seed: int = 0, use_cache: bool =
             True) -> Iterator[list[int | None]]:
    """Continue several prompts (each at least one token) side by side; yields, per step, one new token for each row.
    A row that drew stop_id, which is not yielded, gives None from then on; the end is when all rows have stopped.
    Row r draws from its own generator, seeded with seed + r: until a row has filled the window, as it would alone.
    A model trained with doc_mask reads documents as it was taught them: stop_id ends one, and what follows sees nothing
    before itself and counts from position 0.
    The model sees the last tokens that fit its context. A full window keeps its last half, reads it again and grows
    anew, with a cache as without: sliding by one token would change every position and make the cache worthless."""
    capacity, vocab_size, parameter = model.config.context_length, model.config.vocab_size, next(model.parameters())
    if not all(prompts) or any(not 0 <= token < vocab_size for prompt in prompts for token in prompt):
        raise ValueError(f"a prompt is empty or holds an id outside 0 .. {vocab_size - 1}: encode it for this model")
    # Prompts are aligned at their right ends, so that every row's next token belongs into the same column.
    gaps = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    window = torch.tensor([[0] * gap + prompt for gap, prompt in zip(gaps, prompts)])  # (B, T)
    is_gap = torch.arange(window.shape[1]) < torch.tensor(gaps)[:, None]  # (B, T)
    boundary = stop_id if model.config.doc_mask and stop_id is not None else -1  # no token has the id -1
    window, is_gap = (x[:, -capacity:].to(parameter.device) for x in (window, is_gap))  # (B, T)
    plain = boundary == -1 and not is_gap.any()  # one document a row: places are the model's defaults
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    stopped = [False] * len(prompts)
    cache = KVCache(model.config, len(prompts), device=parameter.device, dtype=parameter.dtype) if use_cache else None
    model.eval()
    for _ in range(max_new_tokens):
        new = slice(0 if cache is None else cache.length, None)  # without a cache all tokens are new each time
        places = {} if plain else {name: x[:, new] for name, x in document_places(window, boundary, is_gap).items()}
        hidden = model.forward_hidden(window[:, new], **places, cache=cache)  # (B, T, C)
        logits = model.lm_head(hidden[:, -1])  # (B, V): the head is applied where it is needed only
        probabilities = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p).cpu()
        drawn = draw(probabilities, generators)
        stopped = [was or token == stop_id for was, token in zip(stopped, drawn)]
        if all(stopped):
            return
        yield [None if stop else token for stop, token in zip(stopped, drawn)]
        if window.shape[1] == capacity:  # full: keep the last half and read it again
            window, is_gap = (x[:, capacity - capacity // 2 :] for x in (window, is_gap))  # (B, T // 2)
            if cache is not None:
                cache.length = 0
        window = torch.cat([window, torch.tensor(drawn, device=window.device)[:, None]], dim=1)  # (B, T + 1)
        is_gap = torch.nn.functional.pad(is_gap, (0, 1))  # (B, T + 1): nothing but tokens from here on

# --- 3. Text as it comes ---
def write_samples(model: TransformerLM, vocab: dict[int, bytes], prompt: list[int], num_samples: int, *, beginning: str
                  = "", **options) -> list[float]:
    """Print num_samples continuations of `prompt`, each behind `beginning`; returns the moments of the start and of
    every token. They are computed together: the first is shown as it comes, the others wait for its end.
    Never half a character is shown: where a token ends inside one, its last bytes wait in the decoder for the next
    token. What never becomes a character, and an id that the vocabulary does not have, is U+FFFD."""
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(num_samples)]
    texts, moments = [beginning] * num_samples, [time.perf_counter()]
    print(beginning, end="", flush=True)
    for tokens in generate(model, [prompt] * num_samples, **options):
        moments.append(time.perf_counter())
        pieces = [decoder.decode(b"" if token is None else vocab.get(token, b"\xff"))
                  for decoder, token in zip(decoders, tokens)]
        texts = [text + piece for text, piece in zip(texts, pieces)]
        print(pieces[0], end="", flush=True)
    print(decoders[0].decode(b"", final=True))
    for row in range(1, num_samples):
        print(f"\n--- {row + 1} ---\n{texts[row]}{decoders[row].decode(b'', final=True)}")
    return moments

# --- 4. What a token costs ---
def seconds_to_read(num_bytes: int, device: torch.device) -> float:
    """Time that the memory takes to hand over a buffer of this size: the best of a few sums over it."""
    buffer = torch.ones(num_bytes // 4, device=device)
    return min(timeit.repeat(lambda: buffer.sum().item(), number=1, repeat=5))

def cost_of(model: TransformerLM, moments: list[float], prompt_tokens: int, num_samples: int) -> str:
    """Speed of reading the prompts, speed reached after that (where a full window is read again, that included), and
    the speed that memory allows: one token reads every weight but the embedding table once."""
    spans = (("prefill", prompt_tokens, moments[:2]), ("decode", len(moments) - 2, moments[1:]))
    parts = [f"{kind} {num_samples * n:,} tokens, {num_samples * n / (part[-1] - part[0]):,.0f} tokens/s"
             for kind, n, part in spans if len(part) > 1]
    head = model.lm_head.weight  # perhaps the embedding table, too
    num_bytes = sum(p.nbytes for p in (head, *model.layers.parameters(), *model.ln_final.parameters()))
    bound = num_samples / seconds_to_read(num_bytes, head.device)
    per_token = KVCache(model.config, 1, device="meta", dtype=head.dtype).bytes_per_token()
    return "; ".join([*parts, f"reading {num_bytes / 1e6:,.1f} MB of weights a step allows {bound:,.0f} tokens/s",
                      f"a cache takes {per_token:,} bytes a token"])

# --- 5. Command line ---
def load_run(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[TransformerLM, Tokenizer, bool]:
    """Model and tokenizer of a run of train.py, from its newest checkpoint, and whether its text had documents."""
    path = max(folder.glob("checkpoint_*.pt"), default=None)
    if path is None:
        raise UserError(f"{folder}: no run with a checkpoint here; python train.py makes one, --run names it")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip() or [i.filename for i in archive.infolist() if i.external_attr]:
                raise ValueError(f"the checksum of {damaged} is wrong")
        payload = torch.load(path, map_location="cpu", weights_only=True)
        model = TransformerLM(ModelConfig(**payload["config"]))
        if payload["model"]:
            model.load_state_dict(payload["model"])
        else:  # train.py --checkpoint sharded: the tensors lie beside it
            from shard_opt import load_shards
            load_shards(model, None, path.with_suffix(".shards"), payload["optimizer"])
    except Exception as error:  # a foreign or damaged file can fail in zipfile, pickle and torch in many ways
        raise UserError(f"{path}: unreadable checkpoint ({error!r:.160}); without it an older one is read") from None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash() != payload.get("tokenizer_hash"):
        raise UserError(f"{folder}: tokenizer.json is not what this run was trained with; put the run's own back")
    return model.to(device=device, dtype=dtype).eval(), tokenizer, payload.get("documents", True)

def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="sample.py", allow_abbrev=False)
    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the flags")
    parser.error = refuse  # one sentence for every mistake, where argparse would print all flags first
    parser.add_argument("--run", type=Path, help="a run's folder (default: the newest in runs)")
    parser.add_argument("--prompt", default="", help="how the text begins (default: nothing, a new text)")
    parser.add_argument("--max_new_tokens", type=int, default=400, help="length limit (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that reach probability p")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, in one batch (default: %(default)s)")
    parser.add_argument("--no_cache", action="store_true", help="recompute all tokens for each new one")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: the fastest that is there)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of weights and cache (default: bfloat16 on GPUs that have it, else float32)")
    args = parser.parse_args(argv)
    for name, least, most in (("max_new_tokens", 1, inf), ("num_samples", 1, inf), ("temperature", 0, inf),
                              ("top_k", 1, inf), ("top_p", 1e-9, 1), ("seed", 0, 2**63 - 1)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:  # "not": nan is refused too
            parser.error(f"--{name} must lie in {least} .. {most}, it is {value}")
    return args

def sample(args: argparse.Namespace) -> None:
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}; try --device cpu") from None
    if args.dtype == "auto":
        modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        args.dtype = "bfloat16" if modern else "float32"
    checkpoints = Path("runs").glob("*/checkpoint_*.pt")  # where there is none, load_run says so
    folder = args.run or max(checkpoints, key=lambda path: path.stat().st_mtime, default=Path("runs/none")).parent
    model, tokenizer, documents = load_run(folder, device, getattr(torch, args.dtype))
    # A text begins after <|endoftext|>, as in training; where training never met that token, after a line's end.
    stop_id, prompt = tokenizer.token_ids.get(END_OF_TEXT.encode()), tokenizer.encode(args.prompt)
    prompt = [stop_id, *prompt] if documents and stop_id is not None else prompt or tokenizer.encode("\n")
    print(f"--- {folder}, prompt {args.prompt!r} ---", file=sys.stderr)
    if len(prompt) > (seen := model.config.context_length):
        print(f"the prompt has {len(prompt)} tokens: the model sees the last {seen}", file=sys.stderr)
    moments = write_samples(model, tokenizer.vocab, prompt, args.num_samples, beginning=args.prompt, stop_id=stop_id,
                            max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                            top_p=args.top_p, seed=args.seed, use_cache=not args.no_cache)
    print(f"--- {cost_of(model, moments, min(len(prompt), seen), args.num_samples)} ---", file=sys.stderr)

def main(argv: list[str] | None = None) -> None:
    try:
        sample(parse_options(argv))
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"sample.py: {error}" if str(error) else "", file=sys.stderr)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None

if __name__ == "__main__":
    main()
