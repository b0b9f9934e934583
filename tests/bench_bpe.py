"""How fast are training and encoding, beside the tokenizers and tiktoken packages?

    python tests/bench_bpe.py TEXT...                      texts of UTF-8, documents ending with <|endoftext|>
    python tests/bench_bpe.py TEXT --table train --vocab_size 32000 --repeats 3
    python tests/bench_bpe.py TEXT --table encode --megabytes 40 --json encode.json
    python tests/bench_bpe.py --table model --words 400000 800000 6700000       the last is OpenWebText's size: 7 GB

train    the whole process from its start to the saved merges, on all processors: seconds, and the greatest sum of the
         memory of all its processes. The tokenizers package reads line by line and breaks ties otherwise.
half     training on all of the text beside half of it: ours, at the first vocabulary size
encode   GPT-2's ids of a text from a cold start: loaded, nothing encoded yet. All give the same ids, as checked by a
         hash. One processor: encode_array against tiktoken's encode_to_numpy and tokenizers' encode_batch of the
         documents with one thread. Two: encode_file, the start of its workers included, against tiktoken's batch call.
model    train_vectorized on synthetic words: time and memory by distinct words, their bytes, and merges. What fits all
         sizes but the greatest says what that one, and OpenWebText's 6.7 million words, should take.

Each measurement is a fresh process; they take turns, and ratios are medians of pairs. Peers that are missing are left
out. GPT-2's files are read from data/reference.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
VOCAB, MERGES = (ROOT / "data" / "reference" / f"gpt2_{name}" for name in ("vocab.json", "merges.txt"))
END = "<|endoftext|>"


def child(what: str, text: str, number: int, folder: str) -> dict:
    """One measurement, in a process of its own: seconds, and a hash of the ids."""
    ids, begin = [], time.perf_counter()
    if what == "train ours":
        import bpe

        bpe.Tokenizer(*bpe.train_bpe(text, number, [END]), [END]).save(folder)
        return {}
    if what == "train tokenizers":
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=number, special_tokens=[END], initial_alphabet=alphabet)
        tokenizer.train([text], trainer)
        tokenizer.save(f"{folder}/tokenizer.json")
        return {}
    if what == "model":
        import bpe

        rng = random.Random(0)  # syllables, so that words share pairs as those of a language do
        syllable = lambda: rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou")  # noqa: E731
        syllables = [syllable() + syllable() for _ in range(2000)]
        counts: dict[str, int] = {}
        while len(counts) < number:
            word = " " + "".join(rng.choice(syllables) for _ in range(rng.randint(1, 3))) + rng.choice("snrt.,y")
            counts[word] = counts.get(word, 0) + 1
        begin = time.perf_counter()
        merges = bpe.train_vectorized(counts, int(text))
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "merges": len(merges), "bytes": sum(map(len, counts)) + number}

    import bpe

    data = b"".join(Path(text).open("rb").read(number).rpartition(END.encode())[:2]) or Path(text).read_bytes()[:number]
    string = data.decode("utf-8", errors="ignore")
    ours = bpe.Tokenizer.from_files(VOCAB, MERGES, [END])
    if "tiktoken" in what:
        import tiktoken

        ranks = {token: token_id for token_id, token in ours.vocab.items() if token != END.encode()}
        pattern, specials = bpe.PRETOKEN.pattern, {END: 50256}
        theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    if "tokenizers" in what:
        from tokenizers import Tokenizer

        ours.save(folder)
        theirs = Tokenizer.from_file(f"{folder}/tokenizer.json")
    documents = [document + END for document in string.split(END)[:-1]] or [string]
    path = Path(folder) / "text.txt"
    if what == "encode 2 ours":
        path.write_text(string, encoding="utf-8", newline="")
    begin = time.perf_counter()
    if what == "encode 1 ours":
        ids = ours.encode_array(string)
    elif what == "encode 2 ours":
        bpe.encode_file(ours, path, path.with_suffix(".npy"), num_workers=2)
    elif what == "encode 1 tiktoken":
        ids = theirs.encode_to_numpy(string, allowed_special="all")
    elif what == "encode 2 tiktoken":
        half = len(documents) // 2  # as two texts: many short ones cost it more
        halves = ["".join(documents[:half]), "".join(documents[half:])]
        ids = theirs.encode_batch(halves, num_threads=2, allowed_special="all")
    else:
        ids = theirs.encode_batch(documents)
    seconds = time.perf_counter() - begin
    if what == "encode 2 ours":
        ids = bpe.load_tokens(path.with_suffix(".npy"), ours)
    elif what == "encode 2 tiktoken":
        ids = [token for part in ids for token in part]
    elif "tokenizers" in what:
        ids = [token for encoding in ids for token in encoding.ids]
    digest = hashlib.sha256(np.asarray(ids, np.uint32).tobytes()).hexdigest()
    return {"seconds": seconds, "bytes": len(string.encode()), "hash": digest}


def tree_memory(root: int) -> int:
    """Bytes of a process and all its descendants, shared pages divided among those who share them."""
    parents, total = {}, 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {root}
    for pid in sorted(parents):
        if parents[pid] in family:
            family.add(pid)
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:
            continue
    return total


def measure(what: str, text: str, number: int) -> dict:
    """Run a child; seconds of the whole process unless it says better, and the greatest memory seen."""
    environment = os.environ | ({"RAYON_NUM_THREADS": "1"} if what == "encode 1 tokenizers" else {})
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--child", what, str(number), str(text)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    memory = [0]

    def watch() -> None:
        while process.poll() is None:
            memory[0] = max(memory[0], tree_memory(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.communicate()[0]
    seconds = time.perf_counter() - begin
    watcher.join()
    if process.returncode:
        return {}
    return {"seconds": seconds, "memory": memory[0]} | json.loads(out.decode().splitlines()[-1])


def compare(cases: dict[str, tuple[str, str, int]], repeats: int) -> dict[str, list[dict]]:
    """Measurements that take turns; a peer that is missing or fails is left out."""
    found: dict[str, list[dict]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            if result := measure(*case):
                found[name].append(result)
    return {name: results for name, results in found.items() if len(results) == repeats}


def first_half(text: str, folder: str) -> str:
    data = Path(text).read_bytes()
    path = Path(folder) / f"half of {Path(text).name}"
    path.write_bytes(data[: data.rfind(b"\n", 0, len(data) // 2) + 1])
    return str(path)


def model_table(sizes: list[int], merges: int) -> list[dict]:
    """Measure, fit seconds = a * bytes + b * merges and memory = c * bytes, and print both."""
    rows = [{"words": words} | measure("model", str(number), words)
            for words in sorted(sizes) for number in (merges // 4, merges)[words == max(sizes):]]
    known = [row for row in rows if row["words"] < max(sizes)] or rows
    columns = np.array([[row["bytes"], row["merges"]] for row in known])
    weights = 1 / np.array([row["seconds"] for row in known])[:, None]  # errors count by their share
    a, b = np.linalg.lstsq(columns * weights, np.ones(len(known)), rcond=None)[0]
    c = statistics.median(row["memory"] / row["bytes"] for row in known)
    print(f"model: {a * 1e6:.2f} microseconds a byte of distinct words + {b * 1e6:.0f} a merge; {c:.0f} bytes a byte")
    size = int(6_700_000 * statistics.median(row["bytes"] / row["words"] for row in rows))
    print(f"{'distinct words':>15} {'bytes':>12} {'merges':>8} {'seconds':>8} {'model':>8} {'memory':>9} {'model':>9}")
    for row in [*rows, {"words": 6_700_000, "merges": merges, "bytes": size}]:
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        memory = f"{row['memory'] / 1e6:,.0f} MB" if "memory" in row else ""
        model = f"{a * row['bytes'] + b * row['merges']:>8.1f} {memory:>9} {c * row['bytes'] / 1e6:>6,.0f} MB"
        print(f"{row['words']:>15,} {row['bytes']:>12,} {row['merges']:>8,} {seconds:>8} {model}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="UTF-8 texts")
    parser.add_argument("--table", choices=("all", "train", "half", "encode", "model"), default="all")
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[10_000, 32_000])
    parser.add_argument("--megabytes", type=int, default=40, help="of each text, for encoding (default: 40)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--words", type=int, nargs="+", default=[400_000, 800_000, 1_600_000])
    parser.add_argument("--merges", type=int, default=32_000)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            return print(json.dumps(child(args.child[0], args.texts[0], int(args.child[1]), folder)))
    rows = []
    tables = {"train": ("ours", "tokenizers"), "half": (), "encode 1": ("ours", "tiktoken", "tokenizers"),
              "encode 2": ("ours", "tiktoken")}
    print(f"{'text':<24} {'what':<22} {'seconds':>15} {'MB/s':>7} {'memory':>9}   ratio to ours")
    for text in args.texts:
        for table, names in tables.items():
            if args.table not in ("all", table.split()[0]):
                continue
            if table == "half":
                with tempfile.TemporaryDirectory() as folder:
                    size, half = args.vocab_size[0], first_half(text, folder)
                    cases = {"half": ("train ours", half, size), "all": ("train ours", text, size)}
                    found = compare(cases, args.repeats)
                ratios = [whole["seconds"] / part["seconds"] for part, whole in zip(found["half"], found["all"])]
                print(f"{Path(text).name:<24} all of it takes {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                      f"{max(ratios):.2f}) times as long as half of it, {size:,} tokens", flush=True)
                rows += [{"text": Path(text).name, "what": f"train {name}", "results": found[name]} for name in found]
                continue
            for number in args.vocab_size if table == "train" else [args.megabytes * 1_000_000]:
                cases = {f"{table} {name}": (f"{table} {name}", text, number) for name in names}
                found = compare(cases, args.repeats)
                hashes = {result.get("hash") for results in found.values() for result in results}
                assert len(hashes) == 1, f"different ids: {hashes}"
                ours = [result["seconds"] for result in next(iter(found.values()))]
                for name, results in found.items():
                    seconds = [result["seconds"] for result in results]
                    rate = results[0].get("bytes", os.path.getsize(text)) / statistics.median(seconds) / 1e6
                    ratios = [theirs / mine for theirs, mine in zip(seconds, ours)]
                    what = name.replace("train", f"train {number:,}") if table == "train" else name
                    spread = f"{statistics.median(seconds):7.2f} ±{(max(seconds) - min(seconds)) / 2:5.2f}"
                    memory = f"{max(result['memory'] for result in results) / 1e6:6.0f} MB" if table == "train" else ""
                    print(f"{Path(text).name:<24} {what:<22} {spread:>15} {rate:7.1f} {memory:>9}   "
                          f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
                    rows.append({"text": Path(text).name, "what": what, "results": results})
    if args.table in ("all", "model"):
        rows += [{"what": "model", "results": [row]} for row in model_table(args.words, args.merges)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
