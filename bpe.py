"""Byte-pair encoding: how text becomes integers.

A language model reads integers. Bytes would do (256 of them, no text can fail), but sequences would be long; words would
be short, but there is no end of them. Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2)
starts from the 256 bytes and again and again makes one new token of the most frequent pair of neighbouring tokens:

    merges = []                                   training
    until the vocabulary is full:
        pair = the most frequent neighbours       (of equal counts, the greater pair of byte strings)
        replace the pair everywhere by one new token; append it to merges
    encoding: apply the same merges, in the same order, to a new text

Copy one of these:

    python bpe.py                                             trains on Python's own library, offline, in seconds
    python bpe.py --input my.txt --vocab_size 4096 --out my_tokenizer
    python bpe.py --out my_tokenizer --show "How is this cut?"
    python bpe.py --report                                    compares the tokenizers and corpora under data/

Contents
    1. Pre-tokens: where a text may be cut
    2. Training: the definition
    3. Training: the same, faster
    4. Long texts: chunks and worker processes
    5. Training on a file
    6. The tokenizer
    7. From text to token arrays
    8. A built-in corpus: stories
    9. Corpora: from a name to files
    10. The command line
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import errno
import functools
import hashlib
import heapq
import http.client
import itertools
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import regex

END_OF_TEXT = "<|endoftext|>"  # stands between documents; the model learns that what follows it is another text


class UserError(ValueError):
    """A mistake of the user's, told in one sentence that also says what to do. main() prints it and exits with 2."""


# --- 1. Pre-tokens: where a text may be cut ---
#
# Merges never cross the border of a pre-token, roughly a word with the space before it. Without that rule "dog." and
# "dog!" would become tokens of their own. The pattern is GPT-2's: contractions, letters, digits, other characters, and
# white space, whose last character goes to the word that follows it.

PRETOKEN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# The pattern costs most of the time, so a text is first cut more coarsely by Python's own faster `re`. No pre-token has
# white space after anything else, so a run of white space always begins one: a piece is such a run and what follows.
# subtle: re's \s also takes the separators \x1c to \x1f, which are no white space to `regex`, hence the list.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PIECE = re.compile(rf"[{WHITE_SPACE}]*[^{WHITE_SPACE}]+|[{WHITE_SPACE}]+")

# A border is a place where a pre-token begins whatever stands further left or right: the two characters beside it
# suffice. Three places never are: inside white space, after white space, and behind an apostrophe ("'l" may become
# "'ll"). Long texts are cut at borders and the parts treated alone, with the same result.
BORDER = regex.compile(
    r"(?<=\S)(?=\s)|(?<=\p{L})(?=[^\p{L}])|(?<=\p{N})(?=[^\p{N}])|(?<=[^\s\p{L}\p{N}'])(?=[\p{L}\p{N}])"
)
LAST_BORDER = regex.compile("(?r)" + BORDER.pattern)  # the same, searched from the end


def special_pattern(special_tokens: Iterable[str]) -> re.Pattern | None:
    """What finds special tokens in a text, in one group so that split() keeps them; None if there are none.

    >>> special_pattern(["<|a|>", "<|a|><|b|>"]).split("x<|a|><|b|>y")
    ['x', '<|a|><|b|>', 'y']
    """
    longest_first = sorted(set(special_tokens), key=len, reverse=True)  # alternatives are tried in this order
    if "" in longest_first:
        raise UserError("a special token cannot be the empty string: remove it from special_tokens")
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def count_pretokens(text: str, special_tokens: Iterable[str] = ()) -> dict[str, int]:
    """How often each pre-token occurs. Special tokens cut the text and are not counted.

    >>> count_pretokens("low lower low<|endoftext|> low", ["<|endoftext|>"])
    {'low': 1, ' lower': 1, ' low': 2}
    """
    specials = special_pattern(special_tokens)
    pieces: Counter[str] = Counter()
    for part in specials.split(text)[::2] if specials else [text]:
        pieces.update(PIECE.findall(part))
    counts: defaultdict[str, int] = defaultdict(int)
    for piece, count in pieces.items():  # each distinct piece meets the slow pattern once
        for match in PRETOKEN.finditer(piece):
            counts[match.group()] += count
    return dict(counts)


# --- 2. Training: the definition ---


def merge_pair(symbols: Sequence, pair: tuple, merged: Any) -> list:
    """Replace every occurrence of `pair`, from left to right.

    >>> merge_pair([1, 2, 3, 1, 2], (1, 2), 4)
    [4, 3, 4]
    """
    result, index = [], 0
    while index < len(symbols):
        if symbols[index] == pair[0] and index + 1 < len(symbols) and symbols[index + 1] == pair[1]:
            result.append(merged)
            index += 2
        else:
            result.append(symbols[index])
            index += 1
    return result


def train_naive(word_counts: Mapping[str, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """The definition: count all pairs of all words anew for every merge. All else in this file must agree with it.

    Counted at first: e s 9, s t 9, w e 8, ... The tie goes to "s t", the greater pair; then "e st" leads with 9.
    Fewer merges than asked come back when no pair is left.

    >>> counts = {"low": 5, "lower": 2, "widest": 3, "newest": 6}
    >>> [f"{left.decode()} {right.decode()}" for left, right in train_naive(counts, 12)]
    ['s t', 'e st', 'o w', 'l ow', 'w est', 'n e', 'ne west', 'w i', 'wi d', 'wid est', 'low e', 'lowe r']
    """
    words = {word: [bytes([byte]) for byte in word.encode("utf-8")] for word in word_counts}
    merges = []
    for _ in range(num_merges):
        pair_counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, symbols in words.items():
            for pair in zip(symbols, symbols[1:]):
                pair_counts[pair] += word_counts[word]
        if not pair_counts:
            break
        # subtle: ties are compared as byte strings, not as token ids and not as GPT-2's printable stand-ins
        most_frequent_pair = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
        merged = most_frequent_pair[0] + most_frequent_pair[1]
        words = {word: merge_pair(symbols, most_frequent_pair, merged) for word, symbols in words.items()}
        merges.append(most_frequent_pair)
    return merges


# --- 3. Training: the same, faster ---
#
# A merge changes only the words that hold the pair. So the counts are kept from merge to merge, corrected where a word
# was rewritten, and the greatest one comes from a heap: a merge costs its own occurrences, not the whole text.

FLIP = bytes(range(255, -1, -1))


def heap_order(token: bytes) -> str:
    """A key that sorts byte strings from the greatest to the least, since heapq hands out the least first.

    Bytes are complemented; the character above all bytes at the end puts "ab" behind "abc".

    >>> sorted([b"a", b"ab", b"abc", b"b"], key=heap_order)
    [b'b', b'abc', b'ab', b'a']
    """
    return token.translate(FLIP).decode("latin-1") + "\u0100"


def train_fast(
    word_counts: Mapping[str, int],
    num_merges: int,
    known_merges: Sequence[tuple[bytes, bytes]] = (),
    on_merge: Callable[[tuple[bytes, bytes], int], None] | None = None,
) -> list[tuple[bytes, bytes]]:
    """The merges of train_naive, at a cost that follows the changes.

    known_merges: the first merges when an earlier run has found them already (merges are a prefix of longer trainings).
    on_merge: called with each new pair and its count.
    """
    merges = list(known_merges)[:num_merges]
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    ranks = merge_ranks(merges, {token: token_id for token_id, token in enumerate(tokens)})
    words = [apply_merges(list(word.encode("utf-8")), ranks) for word in word_counts]
    counts = list(word_counts.values())
    order = [heap_order(token) for token in tokens]

    pair_counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    words_with: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # a superset: words are not struck out
    for index, symbols in enumerate(words):
        for pair in zip(symbols, symbols[1:]):
            pair_counts[pair] += counts[index]
        for pair in set(zip(symbols, symbols[1:])):
            words_with[pair].append(index)
    heap = [(-count, order[left], order[right], left, right) for (left, right), count in pair_counts.items()]
    heapq.heapify(heap)

    while len(merges) < num_merges and heap:
        negative_count, _, _, left, right = heapq.heappop(heap)
        count = pair_counts[left, right]
        if count != -negative_count:  # an old entry: the count has changed since
            if 0 < count < -negative_count:
                heapq.heappush(heap, (-count, order[left], order[right], left, right))
            continue
        merged = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        order.append(heap_order(tokens[merged]))
        merges.append((tokens[left], tokens[right]))
        if on_merge is not None:
            on_merge(merges[-1], count)

        changes: defaultdict[tuple[int, int], int] = defaultdict(int)
        for index in words_with.pop((left, right)):
            old = words[index]
            new = merge_pair(old, (left, right), merged)
            if len(new) == len(old):
                continue
            words[index] = new
            for pair in zip(old, old[1:]):
                changes[pair] -= counts[index]
            for pair in zip(new, new[1:]):
                changes[pair] += counts[index]
            for pair in set(zip(new, new[1:])):
                if merged in pair:  # the other pairs of this word are on their lists already
                    words_with[pair].append(index)
        for pair, change in changes.items():
            pair_counts[pair] += change
            if change > 0:  # a count that fell is corrected when its entry comes up
                heapq.heappush(heap, (-pair_counts[pair], order[pair[0]], order[pair[1]], *pair))
            elif pair_counts[pair] == 0:
                del pair_counts[pair]
    return merges


def merge_ranks(merges: Iterable[tuple[bytes, bytes]], token_ids: Mapping[bytes, int]) -> dict:
    """(left id, right id) -> (rank of the merge, id of the merged token)"""
    ranks: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault((token_ids[left], token_ids[right]), (rank, token_ids[left + right]))
    return ranks


def apply_merges(symbols: list[int], ranks: Mapping[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Encode one pre-token. The definition is `for pair in merges: symbols = merge_pair(symbols, pair, merged)`.

    This gives the same, without asking every merge: a heap holds the pairs at hand by rank, then place. A merge makes two
    new pairs, so n bytes cost n log n even for a run of 100,000 spaces.
    """
    if not ranks or len(symbols) < 2:
        return symbols
    end = len(symbols)
    following = list(range(1, end + 1))  # index of the next living symbol
    preceding = list(range(-1, end - 1))
    heap = []
    for index, pair in enumerate(zip(symbols, symbols[1:])):
        if pair in ranks:
            heap.append((ranks[pair][0], index, pair))
    heapq.heapify(heap)
    while heap:
        _, index, pair = heapq.heappop(heap)
        right = following[index]
        if right == end or symbols[index] != pair[0] or symbols[right] != pair[1]:
            continue  # one of the two was merged with another neighbour in the meantime
        symbols[index] = ranks[pair][1]
        symbols[right] = -1
        following[index] = after = following[right]
        if after != end:
            preceding[after] = index
            new_pair = (symbols[index], symbols[after])
            if new_pair in ranks:
                heapq.heappush(heap, (ranks[new_pair][0], index, new_pair))
        before = preceding[index]
        if before >= 0:
            new_pair = (symbols[before], symbols[index])
            if new_pair in ranks:
                heapq.heappush(heap, (ranks[new_pair][0], before, new_pair))
    return [symbol for symbol in symbols if symbol >= 0]


# --- 4. Long texts: chunks and worker processes ---

CHUNK_BYTES = 4_000_000  # one task of a worker: some 0.3 s of work, some 100 MB of memory


def read_text(path: Path, start: int, end: int) -> str:
    """Bytes start to end of a UTF-8 file. Read as bytes: text mode would change line ends, or use another encoding."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {start + error.start:,} is 0x{data[error.start]:02x}; convert the file first "
            f"(for instance: iconv -f latin1 -t utf-8)"
        ) from None


def text_size(path: str | os.PathLike) -> int:
    """Bytes of a text that can be used, or what is wrong with it in one sentence."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path of a text file")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of a text file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: change its permissions (chmod u+r) or give another file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: give a file with text in it")
    return path.stat().st_size


def chunk_borders(path: Path, special_tokens: Sequence[str], chunk_bytes: int = CHUNK_BYTES) -> list[int]:
    """Offsets [0, ..., size] that cut a file into parts, about chunk_bytes long, which can be treated alone.

    A part begins at a special token or, where none is near, at a BORDER, and never within a special token.
    """
    size, window = text_size(path), 16_384
    pattern = special_pattern(special_tokens)
    specials = regex.compile(pattern.pattern) if pattern else None
    margin = max((len(token.encode("utf-8")) for token in special_tokens), default=0) + 4
    borders, target = [0], chunk_bytes
    with open(path, "rb") as file:
        while target < size:
            # The margins hold any special token that begins or ends in the window, and the whole of its first and last
            # characters. Halves of characters beyond them survive decoding and encoding as "surrogates".
            start = max(0, target - margin)
            file.seek(start)
            text = file.read(target - start + window + margin).decode("utf-8", errors="surrogateescape")
            spans = [match.span() for match in specials.finditer(text, overlapped=True)] if specials else []
            within = {index for first, last in spans for index in range(first + 1, last)}
            for index in [first for first, _ in spans] + [match.start() for match in BORDER.finditer(text)]:
                offset = start + len(text[:index].encode("utf-8", errors="surrogateescape"))
                if target <= offset < min(target + window, size) and index not in within:
                    borders.append(offset)
                    target = offset + chunk_bytes
                    break
            else:
                target += window
    return borders + [size]


_SHARED: dict[str, Any] = {}  # in a worker: what all its tasks need, sent once and not with each of them


def _start_worker(shared: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it then ends the workers
    _SHARED["value"] = shared


def _run_task(function: Callable, task: tuple) -> Any:
    return function(_SHARED["value"], *task)


def parallel_map(function: Callable, shared: Any, tasks: Iterable[tuple], num_workers: int) -> Iterator[Any]:
    """function(shared, *task) for each task, in order, at most two tasks a worker ahead of what was taken.

    With one worker everything happens here. A worker that dies is an error, not a hang.
    """
    if num_workers <= 1:
        yield from (function(shared, *task) for task in tasks)
        return
    tasks, waiting = iter(tasks), deque()
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside threads, which torch starts
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, _start_worker, (shared,))
    try:
        with _without_main_script():
            waiting.extend(pool.submit(_run_task, function, task) for task in itertools.islice(tasks, 2 * num_workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_run_task, function, task) for task in itertools.islice(tasks, 1))
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            f"one of {num_workers} worker processes died, perhaps for want of memory: run again with fewer, "
            f"for instance --num_workers {max(1, num_workers // 2)}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_main_script() -> Iterator[None]:
    """A spawned worker first runs the caller's script again, up to `if __name__ == "__main__"`. Ours need only this file;
    the detour would cost each of them an import of torch, so the script's path is hidden while they start."""
    main = sys.modules["__main__"].__dict__
    hidden = main.pop("__file__", None) if __name__ != "__main__" else None
    try:
        yield
    finally:
        if hidden is not None:
            main["__file__"] = hidden


def default_num_workers() -> int:
    """The processors this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """One line on stderr while something long runs: how much, how fast, how long still."""

    def __init__(self, what: str, total: int, unit: str = "MB", scale: float = 1e6, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.scale, self.shown = what, total, unit, scale, shown
        self.started = self.printed = time.monotonic()
        self.on_terminal = sys.stderr.isatty()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if not self.shown or now - self.printed < (0.5 if self.on_terminal else 10):  # a log file gets fewer lines
            return
        self.printed = now
        rate = done / (now - self.started)
        left = f" | {(self.total - done) / rate:5.0f} s left" if rate > 0 else ""
        line = f"{self.what:<24} {done / self.scale:10,.1f} of {self.total / self.scale:,.1f} {self.unit}"
        line += f" | {rate / self.scale:8,.2f} {self.unit}/s{left}"
        print(f"\r{line:<99}" if self.on_terminal else line, end="" if self.on_terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown and self.on_terminal and self.printed > self.started:
            print(f"\r{'':<99}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, mode: str = "w") -> Iterator[Any]:
    """Open a file that appears under its name only when it is complete; after an error nothing is left of it."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place, then run again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# --- 5. Training on a file ---


def count_chunk(special_tokens: Sequence[str], path: Path, start: int, end: int) -> dict[str, int]:
    return count_pretokens(read_text(path, start, end), special_tokens)


def count_words(
    path: Path, special_tokens: Sequence[str], *, num_workers: int | None = None, progress: bool = False
) -> dict[str, int]:
    """Pre-token counts of a file, chunk by chunk: memory holds the distinct words, never the text."""
    borders = chunk_borders(path, special_tokens)
    chunks = list(zip(borders, borders[1:]))
    meter = Progress("counting words", borders[-1], shown=progress)
    counts: Counter[str] = Counter()
    results = parallel_map(
        count_chunk, list(special_tokens), [(path, *chunk) for chunk in chunks], workers_for(chunks, num_workers)
    )
    for (_, end), chunk_counts in zip(chunks, results):
        counts.update(chunk_counts)
        meter.update(end)
    meter.close()
    return counts


def workers_for(chunks: Sequence, num_workers: int | None) -> int:
    """Starting processes takes longer than treating one or two chunks here."""
    return 1 if len(chunks) <= 2 else min(num_workers or default_num_workers(), len(chunks))


def num_merges_for(vocab_size: int, special_tokens: Sequence[str]) -> int:
    smallest = 256 + len(set(special_tokens))
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {smallest - 256} special tokens need at least {smallest}"
        )
    return vocab_size - smallest


def train_bpe(
    input_path: str | os.PathLike,
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    progress: bool = False,
    on_merge: Callable[[tuple[bytes, bytes], int], None] | None = None,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Train on a UTF-8 text file; returns (vocab, merges), the merges in the order of their making.

    vocab_size counts everything: id b is byte b for the first 256, then one id a merge, then the special tokens. A text
    too small for that many merges gives fewer, said in one line on stderr.
    """
    special_tokens = list(dict.fromkeys(special_tokens))
    num_merges = num_merges_for(vocab_size, special_tokens)
    text_size(input_path)
    counts = count_words(Path(input_path), special_tokens, num_workers=num_workers, progress=progress) if num_merges else {}
    meter = Progress("merging pairs", num_merges, unit="merges", scale=1, shown=progress)
    made = itertools.count(1)

    def report(pair: tuple[bytes, bytes], count: int) -> None:
        meter.update(next(made))
        if on_merge is not None:
            on_merge(pair, count)

    merges = train_fast(counts, num_merges, on_merge=report)
    meter.close()
    if len(merges) < num_merges:
        print(
            f"{input_path}: no pair is left after {len(merges):,} of {num_merges:,} merges; the vocabulary has "
            f"{vocab_size - num_merges + len(merges):,} tokens instead of {vocab_size:,}",
            file=sys.stderr,
        )
    vocab = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    vocab += [token for special in special_tokens if (token := special.encode("utf-8")) not in set(vocab)]
    return dict(enumerate(vocab)), merges


# --- 6. The tokenizer ---


def printable_bytes() -> dict[int, str]:
    """GPT-2's way to write bytes into text files: one printable character for each byte.

    Printable latin-1 characters stand for themselves, the other 68 bytes for the characters from 256 on.

    >>> "".join(printable_bytes()[byte] for byte in b" a\\n")
    'Ġa\u010a'
    """
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in itself]
    return {byte: chr(byte) for byte in itself} | {byte: chr(256 + place) for place, byte in enumerate(others)}


class Tokenizer:
    """Text to ids and back, with GPT-2's rules.

    vocab: id -> bytes; merges: pairs of bytes in the order of their making; special_tokens: strings that are one token
    each and never cut (the longest is tried first); those that the vocabulary lacks get the next free ids.

    >>> vocab = dict(enumerate([b" ", b"a", b"c", b"e", b"h", b"t", b"th", b" c", b" a", b"the", b" at"]))
    >>> merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    >>> Tokenizer(vocab, merges).encode("the cat ate")
    [9, 7, 1, 5, 10, 3]
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Iterable[str] | None = None,
    ) -> None:
        self.vocab = dict(sorted(vocab.items()))
        self.merges = [tuple(pair) for pair in merges]
        self.special_tokens = list(dict.fromkeys(special_tokens or ()))
        self._specials = special_pattern(self.special_tokens)
        self.token_ids = {token: token_id for token_id, token in reversed(self.vocab.items())}
        for token in (special.encode("utf-8") for special in self.special_tokens):
            if token not in self.token_ids:
                self.token_ids[token] = max(self.vocab, default=-1) + 1
                self.vocab[self.token_ids[token]] = token
        for left, right in self.merges:
            for token in (left, right, left + right):
                if token not in self.token_ids:
                    raise UserError(
                        f"the merge {left!r} + {right!r} needs the token {token!r}, which the vocabulary lacks: vocabulary and "
                        f"merges do not belong together, or one of them is damaged"
                    )
        self._ranks = merge_ranks(self.merges, self.token_ids)
        self._byte_ids = [self.token_ids.get(bytes([byte])) for byte in range(256)]
        self._ids_of_piece: dict[str, tuple[int, ...]] = {}

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id: the rows that an embedding needs."""
        return max(self.vocab, default=-1) + 1

    def hash(self) -> str:
        """SHA-256 of vocabulary, merges and special tokens: arrays and checkpoints remember it."""
        content = [[[i, token.hex()] for i, token in sorted(self.vocab.items())]]
        content += [[[left.hex(), right.hex()] for left, right in self.merges], self.special_tokens]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()

    # -- encoding --

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens that stand in it become their ids."""
        if self._specials is None:
            return self._encode_ordinary(text)
        ids = []
        for place, part in enumerate(self._specials.split(text)):
            if place % 2:  # split() puts the special tokens at the odd places
                ids.append(self.token_ids[part.encode("utf-8")])
            else:
                ids += self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        known = self._ids_of_piece  # texts repeat their words: nearly all pieces have been seen before
        for piece in PIECE.findall(text):
            ids += known[piece] if piece in known else self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        ids: list[int] = []
        for match in PRETOKEN.finditer(piece):
            try:
                data = match.group().encode("utf-8")
            except UnicodeEncodeError:  # half of a surrogate pair is no character and has no bytes: U+FFFD, as in tiktoken
                data = re.sub("[\ud800-\udfff]", "\ufffd", match.group()).encode("utf-8")
            symbols = [self._byte_ids[byte] for byte in data]
            if None in symbols:
                missing = data[symbols.index(None)]
                raise UserError(f"this vocabulary has no token for the byte 0x{missing:02x} in {match.group()!r}")
            ids += apply_merges(symbols, self._ranks)
        if len(piece) <= 64:
            if len(self._ids_of_piece) >= 200_000:  # some 50 MB; starting anew costs less than keeping track of age
                self._ids_of_piece.clear()
            self._ids_of_piece[piece] = tuple(ids)
        return tuple(ids)

    def encode_iterable(self, strings: Iterable[str]) -> Iterator[int]:
        """The ids of "".join(strings), lazily, with memory for the longest pre-token but not for the text."""
        text, wanted = "", 4096
        for string in strings:
            text += string
            if len(text) >= wanted:
                end = self._settled(text)
                yield from self.encode(text[:end])
                text = text[end:]
                wanted = max(4096, 2 * len(text))  # or a long word that comes letter by letter would cost its square
        yield from self.encode(text)

    def _settled(self, text: str) -> int:
        """How much of a text that may go on can be encoded now: up to its last border, or the end of a special token.

        subtle: line by line would be wrong. In "a", two line ends, and then a third and "b", the first two are one token when
        the text is seen whole, and "<|endof" may be the beginning of a special token, or of a longer one.
        """
        undecided = len(text)
        for special in self.special_tokens:
            for length in range(min(len(special) - 1, len(text)), 0, -1):
                if text.endswith(special[:length]):
                    undecided = min(undecided, len(text) - length)
                    break
        end = 0
        for match in self._specials.finditer(text) if self._specials else ():
            if match.start() >= undecided:
                break
            end = match.end()
        border = LAST_BORDER.search(text, end, max(end, undecided))
        return border.start() if border and border.start() > end else end

    # -- decoding --

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Bytes that are no UTF-8, as when ids end within a character, become U+FFFD."""
        try:
            return b"".join([self.vocab[int(token_id)] for token_id in ids]).decode("utf-8", errors="replace")
        except KeyError as error:
            raise UserError(f"id {error} is not in this vocabulary of {len(self.vocab):,} tokens") from None

    # -- files --

    def save(self, directory: str | os.PathLike) -> None:
        """Write GPT-2's vocab.json and merges.txt, and tokenizer.json for the Hugging Face `tokenizers` package."""
        directory, character = Path(directory), printable_bytes()

        def written(token: bytes) -> str:
            return "".join(character[byte] for byte in token)

        vocab = {written(token): token_id for token_id, token in sorted(self.vocab.items())}
        if len(vocab) < len(self.vocab):
            raise UserError("this vocabulary has the same bytes under several ids, which vocab.json cannot express")
        merges = [[written(left), written(right)] for left, right in self.merges]
        specials = {self.token_ids[special.encode("utf-8")]: special for special in self.special_tokens}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        theirs = {
            "version": "1.0",
            "added_tokens": [{"id": token_id, "content": special} | flags for token_id, special in sorted(specials.items())],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {  # in this file special tokens are written as they are
                "type": "BPE",
                "vocab": {specials.get(token_id, token): token_id for token, token_id in vocab.items()},
                "merges": merges,
            },
        }
        with write_atomically(directory / "vocab.json") as file:
            json.dump(vocab, file, ensure_ascii=False)
        with write_atomically(directory / "merges.txt") as file:
            file.writelines(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)])
        with write_atomically(directory / "tokenizer.json") as file:
            json.dump(theirs, file, ensure_ascii=False, indent=1)

    @classmethod
    def from_files(
        cls,
        vocab_path: str | os.PathLike,
        merges_path: str | os.PathLike,
        special_tokens: Iterable[str] | None = None,
    ) -> "Tokenizer":
        """Read vocab.json and merges.txt, GPT-2's own or those of save()."""
        with _explained(vocab_path):
            vocab = json.loads(Path(vocab_path).read_text(encoding="utf-8"))
        with _explained(merges_path):
            lines = Path(merges_path).read_text(encoding="utf-8").split("\n")
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return cls(*_from_printable(vocab, vocab_path, pairs, merges_path), special_tokens)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Read tokenizer.json, which also knows the special tokens: one of save(), or any plain byte-level BPE."""
        path = Path(directory) / "tokenizer.json"
        with _explained(path):
            theirs = json.loads(path.read_text(encoding="utf-8"))
            model, before = theirs["model"], theirs["pre_tokenizer"]
            plain = model.get("type", "BPE") == "BPE" and theirs.get("normalizer") is None
            plain &= before["type"] == "ByteLevel" and not before["add_prefix_space"] and before.get("use_regex", True)
            if not plain:
                raise UserError(f"{path} is not a plain byte-level BPE: only those without normalizer or prefix space load here")
            vocab, specials = dict(model["vocab"]), [added["content"] for added in theirs["added_tokens"]]
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            ids = {added["content"]: added["id"] for added in theirs["added_tokens"]}
        for special in specials:
            vocab.pop(special, None)
        vocab, merges = _from_printable(vocab, path, pairs, path)
        return cls(vocab | {ids[special]: special.encode("utf-8") for special in specials}, merges, specials)


@contextlib.contextmanager
def _explained(path: str | os.PathLike) -> Iterator[None]:
    """Turn what can go wrong while a tokenizer's file is read into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; train a tokenizer first, or give its right place") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged or not a tokenizer's file: restore it, or train the tokenizer anew") from None


def _from_printable(vocab: Any, vocab_path: Any, pairs: Iterable, merges_path: Any) -> tuple[dict, list]:
    """The inverse of what save() writes, with a sentence where a file is not what it should be."""
    byte_of = {character: byte for byte, character in printable_bytes().items()}
    with _explained(vocab_path):
        tokens = {int(token_id): bytes(byte_of[character] for character in token) for token, token_id in vocab.items()}
        if len(tokens) != len(vocab) or not tokens:
            raise ValueError("ids that occur twice, or no token at all")
    with _explained(merges_path):
        merges = [tuple(bytes(byte_of[character] for character in token) for token in pair) for pair in pairs]
        if any(len(pair) != 2 for pair in merges):
            raise ValueError("a merge has two parts")
    return tokens, merges


# --- 7. From text to token arrays ---


def encode_chunk(tokenizer: Tokenizer, path: Path, start: int, end: int, dtype: str) -> bytes:
    return np.array(tokenizer.encode(read_text(path, start, end)), dtype=dtype).tobytes()


def encode_file(
    tokenizer: Tokenizer,
    text_path: str | os.PathLike,
    npy_path: str | os.PathLike,
    *,
    num_workers: int | None = None,
    progress: bool = False,
) -> int:
    """Encode a text file into one array of ids on disk; returns how many there are.

    uint16 holds ids below 65,536 in half the space of uint32. The array grows chunk by chunk, in memory only the chunk
    is held. Beside x.npy lies x.json, by which load_tokens knows whose ids they are.
    """
    text_path, npy_path = Path(text_path), Path(npy_path)
    dtype = "<u2" if tokenizer.vocab_size <= 65_536 else "<u4"
    borders = chunk_borders(text_path, tokenizer.special_tokens)
    chunks = list(zip(borders, borders[1:]))
    meter = Progress(f"encoding {text_path.name}", borders[-1], shown=progress)
    sidecar = npy_path.with_suffix(".json")
    sidecar.unlink(missing_ok=True)  # an array without one counts as missing
    source = file_identity(text_path)
    count = 0
    with write_atomically(npy_path, "wb") as file:
        write_npy_header(file, dtype, 0)
        tasks = [(text_path, *chunk, dtype) for chunk in chunks]
        for (_, end), ids in zip(chunks, parallel_map(encode_chunk, tokenizer, tasks, workers_for(chunks, num_workers))):
            file.write(ids)
            count += len(ids) // np.dtype(dtype).itemsize
            meter.update(end)
        file.seek(0)
        write_npy_header(file, dtype, count)
    meter.close()
    facts = {"tokens": count, "vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash(), "source": source}
    with write_atomically(sidecar) as file:
        json.dump(facts, file, indent=1)
    return count


def write_npy_header(file: BinaryIO, dtype: str, count: int) -> None:
    """numpy pads the header so that any count fits: it can be written again when the count is known."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def file_identity(path: Path) -> dict:
    """Tells a changed text from an unchanged one without reading gigabytes."""
    stat = path.stat()
    return {"file": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def load_tokens(npy_path: str | os.PathLike, tokenizer: Tokenizer) -> np.ndarray:
    """Open an array of encode_file without reading it into memory, and see that these are ids of this tokenizer."""
    npy_path = Path(npy_path)
    again = "remove it and prepare the data set again"
    try:
        facts = json.loads(npy_path.with_suffix(".json").read_text(encoding="utf-8"))
        tokens = np.load(npy_path, mmap_mode="r", allow_pickle=False)
        stored_hash, count = facts["tokenizer_hash"], facts["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {npy_path} and the {npy_path.stem}.json beside it ({error}): {again}") from None
    if stored_hash != tokenizer.hash():
        raise UserError(f"{npy_path} was encoded with another tokenizer: {again}")
    if tokens.shape != (count,):
        raise UserError(f"{npy_path} has the shape {tokens.shape} where ({count},) was written: {again}")
    return tokens


# --- 8. A built-in corpus: stories ---
# Children's stories of about a hundred words, drawn from a grammar with memory: a `{name}` is drawn once a story, every
# row of its rule equally likely, and says the same whenever it comes back. That memory is what a model has to learn.
#   name = red blue dark_green     a list of words (`_` is a space)       name: row | row     a list of phrases
#   who/his = Lily/her Tom/his     columns, drawn together                (x|y|)              a rule without a name
#   {trait2}  another draw from `trait`, never the same row twice         {He} {a trait}      capital letter, a or an
# So the probability of a story is a product of 1/n, one factor a draw, and its logarithm is known exactly.

GRAMMAR = """
story: {open} {plot}
plot: {lost} | {broken} | {noise} | {trouble} | {quarrel} | {gift}
open: {once} {a trait}, {trait2} {child} {called} {hero} lived in {a look} {home} {near} {a look2} {place}. {like}
once: Once upon a time, | Long ago, | Far away, | Once, | Years ago, | Not far away, | Over the hills, | Up north, |
    Down south,
  | Over the sea, | Out west, | Last year,
like: {He} {loved} {hobby}, {his} {colour} {garment} and {taste} {treat}.
  | {He} had {a colour} {garment} and {number} {trait3} {siblings}, and {loved} {hobby}.
meet: {then} came {pet}, {a trait4} {animal} in {a colour2} {garment2}, and {asked}, "Why so {sad}?"
then = Along Soon Then Up By_and_by
day: One {weather} {daytime}
feast: They {shared} {taste2} {treat2} and {taste3} {treat3} {near2} {a look3} {spot3}.
ever: From then on, | After that, | Ever after, | Afterwards,

lost: {day}, {hero} took {a quality} {colour4} {thing} to {a look4} {place2}, but lost it, because {loss}. {He} looked
    {near3} the {spot} and {near4} the {spot2}, but found only {a state} {junk}, {a state2} {junk2} and {a state3}
    {junk3}. {meet} "I lost my {thing}, because {loss}," {said} {hero}. The {animal} {adverb} found it in {a look5}
    {spot4}. "{hooray}! Now I can {use} it," {cried} {hero}. {feast} {ever} {he} {care}.
loss/care: the {bag} had {a size} hole/mended holes with {colour3} {stuff}
  | the {bag} was (much|far) too full/checked the {bag} every {weekday}
  | nobody had closed the {bag}/closed the {bag} {adverb2}
  | the {strap} of the {bag} broke/never used {a state4} {strap} again
  | {a scary} {thief} took it/gave the {thief} {taste4} {treat4} every {weekday}
  | a {gale} blew it away/stayed at home in every {gale} | the (road|path) was so bumpy/took the road by the {place3}

broken: {hero} had {a quality} {colour6} {toy}. {day} its {part} broke, because {damage}. {He} tried {stuff}, {stuff2}
    and {colour3} {stuff3}, but nothing held. {meet} "My {toy} broke, because {damage}," {said} {hero}. The {animal}
    {adverb} fetched {a trait5} {worker}, who took {a state} {tool}, {a state2} {tool2} and {colour4} {stuff4} and
    mended the {part}. "{hooray}!" {cried} {hero}, and gave them {taste2} {treat2} and {taste3} {treat3}. {ever} {he}
    {mend}.
damage/mend: it fell (off|from) {a state3} {furniture}/kept the {toy} (away|far) from the {furniture}
  | it stood in the {wet}/kept the {toy} out of the {wet} | {a trait6} {beast} sat on it/let no {beast} near the {toy}
  | nobody had oiled it/oiled the {part} every {weekday}
  | {a state3} screw was (loose|missing)/checked the screws {adverb2}
  | the frost cracked it/kept the {toy} in {a colour5} blanket
  | {a trait6} {thief} chewed it/hid the {toy} from every {thief}
wet = rain snow mud sun
gale = storm gale whirlwind hurricane blizzard breeze

noise: {day2} night, {hero} could not sleep, because the {room} went "{sound}, {sound}". {He} thought of {a scary}
    {monster} with {colour2} {feature} and {scary2} {feature2}. {He} woke {pet}, {his} {trait4} {animal}. "Why so
    {sad}?" {asked} {pet}. "The {room} goes {sound}, {sound}," {said} {hero}. With {a state} {lamp} they {crept}
    {adverb} past {a state2} {furniture}, {a look3} {furniture2}, {a state3} {junk} and {a state4} {junk2}. It was no
    {monster}, only {source}! "{hooray}!" {cried} {hero}, and {fix}. They {shared} {taste2} {treat2} and {taste3}
    {treat3} in bed, and {hero} dreamed of {a quality} {colour4} {thing} and {a quality2} {thing2}.
day2: One {weather}
sound/source/fix: drip/a leaky tap/put {a state5} {container} under it | creak/a rusty hinge/oiled it {adverb2}
  | tap/a branch at the window/tied it back with {colour3} {strap} | rattle/a loose shutter/closed it {adverb2}
  | buzz/a bee in a {container}/let it fly to the {place3} | squeak/a mouse in a {container}/gave it {taste4} {treat4}
  | flap/{a colour3} curtain/closed the window {adverb2} | snore/{his} {trait5} {relative}/fetched {a colour3} blanket
  | tick/an old clock/wrapped it in {a colour3} towel | hiss/a kettle on a stove/made {taste4} tea
  | thump/a ball on the stairs/put it in {a state5} {container} | scratch/a cat behind a door/gave it {taste4} {treat4}
  | hoot/an owl in a {container}/waved to it {adverb2} | plop/a frog in a {container}/carried it to the {place3}
  | rustle/a hedgehog in a {container}/led it to the {place3} | clang/a pan on a hook/took it down {adverb2}

trouble: {day}, by {a look3} {place2}, {he} met {pet}, {a trait4} {animal} in {a colour2} {garment2}. "Why so {sad}?"
    {asked} {hero}. "Because {problem}," {said} {pet}. {hero} {adverb} fetched {a state} {tool}, {a state2} {tool2} and
    {colour3} {stuff}, and they {solve}. "{hooray}!" {cried} {pet}, and gave {hero} {a quality} {colour4} {thing}.
    {feast} That {evening} {his} {trait6} {relative} saw the {thing}. "{pet} gave it to me, because I helped when
    {problem}," {beamed} {hero}.
evening = evening night
problem/solve: the (rain|river) flooded the {den}/dug {a look4} ditch
  | the (wind|storm) took the {den}/built one by the {spot}
  | {a trait5} {beast} ate the {treat4}/baked {taste4} {treat4}
  | the (fire|lamp) in the {den} went out/lit {a quality2} lamp
  | the key of the {den} fell in {a look4} (well|hole)/pulled it up with {a state3} {container}
  | thorns (hid|covered) the {den}/cut {a look4} path to it | the bed in the {den} broke/made one of {stuff2}
  | the door of the {den} was stuck/pushed it {adverb3} | the roof of the {den} fell in/made one of {stuff2}

quarrel: {His} best friend was {pet}, {a trait4} {animal} in {a colour2} {garment2}. {day}, {near3} {a look4} {spot},
    they found {a quality} {colour4} {thing}. Both wanted it, because {reason}. "It is mine!" {snapped} {hero}. "No,
    mine!" {snapped2} {pet}. {hero} took it home and tried {hobby2} and {hobby3}, but felt {sad}. So {he} packed
    {taste2} {treat2}, {taste3} {treat3} and {taste4} {treat4} and {went} back {adverb}. "Sorry! I took it, because
    {reason}," {said} {hero}. "Sorry too," {said2} {pet}. They {shared} it all {near2} {a look5} {spot2}. {ever} they
    could {use} the {thing} every {weekday}.
reason: it shone like {gem} | it smelled of {taste5} {treat5} | {a trait5} {worker} had one | {a trait5} {royal} had
    made it
  | it looked so {quality2} | it was as {colour3} as {gem} | it came from {a look3} {place3}

gift: {hero} wanted to buy {a quality} {colour5} {thing} for {pet}, {a trait4} {animal} in {a colour2} {garment2}. But
    {his} {bag} was empty, because {spent}. "Why so {sad}?" {asked} {his} {trait6} {relative}. "Make one!" So {he} took
    {colour3} {stuff}, {colour4} {stuff2}, {a state} {tool} and {a state2} {tool2} and worked {adverb} until {late}.
    {day2} {weekday} {he} {went} to {pet} with the {thing} in {a state3} {container}. "I made it, because {spent},"
    {said} {hero}. "{hooray}! I can {use} it every {weekday2}," {cried} {pet}. {feast} {ever} {he} {save}.
late = noon dusk dark midnight sunset supper dinner
spent/save: the money went on {a look4} {garment3}/bought no {garment3} again
  | {a scary} {thief} took the money/hid it from every {thief}
  | the coins fell down {a look4} drain/kept coins in {a state4} {container}
  | the money went to {a trait5} {worker}/did the work of the {worker}
  | the {bag} had {a size} hole/sewed up the {bag} {adverb2} | the {taste4} {treat4} cost so much/ate less {treat4}

hero/child/he/his/him = {girl}/girl/she/her/her {boy}/boy/he/his/him
girl = Ada Alice Amy Anna Ava Bella Beth Cara Clara Cleo Daisy Dora Ella Elsie Emma Eva Fay Flora Gwen Hana Holly Ida
  Iris Isla Jane Jill Josie June Kate Kim Lena Lily Lola Lucy Mabel Maya Meg Mia Molly Nell Nina Nora Penny Polly Rosa
  Ruby Sally Sara Sofia Sue Tess Tina Una Vera Wendy Yara Zoe Zuri
boy = Adam Alfie Arlo Ben Bill Bruno Carl Cody Dan David Eli Emil Felix Finn Fred George Gus Hal Hans Henry Hugo Ian
  Ivan Jack Jake Jim Joe Jonas Karl Ken Kit Leo Liam Luke Max Milo Ned Nico Noah Olaf Omar Oscar Otto Owen Paul Pete
  Ravi Rob Sam Ted Theo Tim Tom Toby Victor Will Yusuf Zac
pet = Acorn Bean Biscuit Bramble Bubble Clover Cocoa Dotty Dusty Fern Fidget Fluff Fudge Ginger Inky Jelly Maple Mitten
  Moss Muffin Nibble Noodle Nutmeg Patch Peanut Pebble Pepper Pickle Pip Plum Raisin Rusty Scout Smudge Snowy Speck
  Sprout Sunny Tansy Teasel Thistle Toffee Tuft Twig Waffle Willow Ziggy Zippy
animal = rabbit squirrel hedgehog mouse fox owl frog duck goose turtle snail mole otter beaver deer lamb pony donkey
  goat kitten puppy robin crow swan bat bee butterfly beetle lizard parrot penguin bear raccoon dragonfly cricket weasel
  moth toad crab worm badger seal hamster ladybird newt stork pigeon koala kangaroo piglet chick foal dormouse gecko
trait = kind brave clever curious gentle careful shy stubborn lively helpful patient dreamy playful bold quiet funny
  sensible friendly hopeful eager restless polite proud neat messy tidy loyal daring witty bashful sleepy grumpy jolly
  wise young cautious fearless fussy gallant humble lazy lucky modest nosy plucky sincere skilful talented trusty chatty
  earnest nimble dainty hungry ticklish stylish musical calm cheeky fair fond frank merry mild noble perky plump quick
  rude sly smart snooty tender thrifty timid tireless vain whimsical worldly zany
look = crooked narrow mossy dark sunny ancient enormous hidden famous noisy grand lonesome shady peaceful mysterious
  pleasant deserted crowded huge small large haunted cosy dreary secret remote popular bleak spotless wide tall cold
  unknown frosty snowy foggy dusty quaint colossal damp misty low vast windy leafy muddy private public sandy simple
  stately silvery stony ruined rosy royal draughty grim mighty wild lovely exotic rustic humble ugly odd
home = house cottage cabin farmhouse lighthouse windmill caravan tower bungalow hut mill inn barn houseboat castle tent
  palace lodge villa chalet mansion shed bakery treehouse igloo wigwam
near = near by beside behind
place = river orchard beach forest meadow lake market harbour station hill park pond library farm zoo island cave bridge
  field vineyard school church museum canal quarry marsh theatre airport circus waterfall playground village valley
  swamp mountain desert jungle hospital chapel monastery volcano glacier moor racetrack
weather = sunny rainy windy cloudy stormy chilly warm hot cool grey icy breezy drizzly crisp mild glorious golden wet
  sweltering blustery bright dull fine humid hazy freezing scorching
daytime = morning afternoon Monday Tuesday Wednesday Thursday Friday Saturday Sunday
weekday = Monday Tuesday Wednesday Thursday Friday Saturday Sunday
relative = mother father grandmother grandfather aunt uncle cousin brother sister neighbour teacher godmother stepfather
  nephew niece nanny
number = two three four five six seven eight
siblings = brothers sisters cousins goldfish hamsters hens sheep canaries ponies rabbits tortoises aunts uncles spaniels
  poodles geese cats dogs twins pigs owls mice goats nieces
loved = loved liked enjoyed
hobby = painting singing dancing swimming reading baking knitting drawing cycling fishing gardening sewing skating
  sailing juggling hiking acting cooking camping sledging stargazing rowing wrestling yodelling carving daydreaming
  exploring inventing counting humming gossiping weaving surfing skiing pottery chess hopscotch tennis football cricket
  golf ballet archery poetry hockey karate art darts drama history judo jokes maths music puppets riddles rugby science
  tag yoga
colour = red blue green purple orange pink brown black white violet turquoise crimson scarlet lilac maroon beige silver
  emerald striped spotted yellow tartan mauve bronze navy amber indigo coral ivory checked grey golden tan teal lime
  rose plum ruby khaki cream
garment = coat hat scarf jacket jumper cap cloak shawl sweater vest cape raincoat shirt beret apron poncho cardigan
  waistcoat hood tunic sash collar bandana kerchief nightcap overcoat robe parka anorak blazer turban headband belt
  pullover sunhat fleece jersey bow_tie
went = went walked ran hurried strolled wandered skipped marched raced cycled
thing/use = kite/fly drum/beat ball/bounce book/read flute/play boat/sail bell/ring crown/wear doll/hug hoop/roll
  puzzle/solve map/follow coin/spend marble/flick telescope/aim hammer/swing compass/consult clock/wind lamp/light
  umbrella/open mirror/polish jigsaw/finish guitar/strum balloon/hold locket/unlock medal/show necklace/admire
  torch/shine boomerang/throw scooter/ride wagon/pull rocket/launch trumpet/blow magnet/test pencil/sharpen camera/use
  basket/fill pillow/squeeze rattle/shake puppet/move sledge/steer carpet/unroll ladder/climb cup/drink_from
  chair/sit_on pen/write_with
quality = shiny little new bright tiny beautiful handsome polished precious splendid fancy dazzling glittering elegant
  pretty smooth lovely marvellous remarkable peculiar heavy rare sturdy colourful perfect strange foreign gorgeous
  charming wonderful unusual modern glossy wooden painted curious gleaming delicate exquisite fine dear neat magic
  costly jolly lucky special sparkly stylish superb valuable solid slender charmed clean
sad = sad upset gloomy worried miserable unhappy lonely glum troubled sorrowful tearful downcast anxious pale silent
  dejected mournful wretched fretful sulky forlorn wistful heartbroken flustered crestfallen melancholy cross bitter
treat = pancakes waffles soup toast honey jam biscuits porridge cherries plums pears strawberries raspberries
  blueberries noodles dumplings pies buns cookies doughnuts custard jelly pudding cheese popcorn nuts sandwiches tarts
  cakes lemonade cocoa milk juice tea cider bread butter salad rice beans sausages omelettes crackers pretzels peaches
  apricots raisins marzipan fudge spaghetti pizza yoghurt grapes figs olives chestnuts gingerbread lasagne curry stew
taste = warm sweet fresh creamy fruity tasty cold yummy plain salty tangy rich chilled delicious homemade spicy leftover
  heavenly peppery minty lemony gingery smoky nutty honeyed buttery thin thick light dark bitter bland French Greek
  Italian Turkish Spanish Mexican Indian Dutch Swiss Polish Danish Welsh Irish Russian sour pale soft
stuff = glue string tape wire ribbon rope straw wool wax clay felt cardboard leather velvet thread bark tin foil canvas
  cork paste wood cloth paper silk chalk plaster cotton linen varnish plastic rubber cord fur gum lace mud paint satin
  tweed twine yarn
tool = saw brush spanner chisel needle file drill axe knife ruler spade rake shovel hook trowel whisk screwdriver
  crowbar sieve pitchfork mallet hoe broom hatchet wheelbarrow sickle toothpick awl fan jack lever net pick pin plane
  sponge vice wedge winch pulley
adverb = slowly quietly carefully eagerly calmly bravely patiently cheerfully hopefully busily nervously politely wisely
  happily gladly firmly gracefully stubbornly sensibly proudly solemnly dreamily promptly gently softly shyly boldly
  kindly swiftly secretly earnestly faithfully briskly cleverly coolly daintily deftly fondly freely humbly keenly
  merrily neatly nimbly readily silently smartly steadily tenderly warmly
spot = barrel bench bush cart crate fence gate hedge log oak pine rock swing statue table haystack wall woodpile willow
  chestnut fountain signpost boulder birch pump trough henhouse greenhouse lilac lamppost thornbush stump scarecrow
  birdbath sundial beehive maple hammock flagpole wheelbarrow
state = rusty muddy dirty faded battered worn cracked chipped grubby ugly scratched shabby greasy sandy sooty smelly
  stained spare sticky weathered dented grimy patched scorched tarnished bent humble clumsy dull cheap wobbly dusty wet
  oily mouldy slippery dingy blunt crusty filthy gritty grey lumpy musty odd old stiff tatty used drab
junk = boot spoon bottle brick button comb fork jar jug kettle lid mug nail pipe plate saucepan teapot teacup thimble
  tyre wheel chain doorknob colander cog anchor flowerpot tray helmet ladle funnel padlock bolt hairpin birdcage goblet
  pulley tap typewriter key cork coin bead peg tube pan pot plug shoe lens mop dish clog
bag = bag pocket basket purse suitcase satchel rucksack backpack knapsack
strap = strap handle string buckle clasp
thief = magpie fox jackdaw monkey crow raccoon rat pirate goblin burglar
toy/part = wagon/wheel bicycle/chain swing/seat boat/mast robot/arm umbrella/rib tent/pole doll/head puppet/leg
  clock/spring piano/pedal windmill/blade guitar/neck kite/tail scooter/brake lamp/switch drum/skin dollhouse/roof
  carousel/horse telescope/lens violin/bow wheelchair/brake
beast = cow pig elephant goat bull sheep horse camel hippo walrus moose llama
worker = carpenter blacksmith baker farmer fisherman tailor miller sailor painter plumber doctor postman potter cobbler
  jeweller mechanic gardener builder miner shepherd captain librarian woodcutter locksmith juggler
furniture = table wardrobe sofa cupboard bookcase desk stool armchair dresser cradle mattress bathtub stove shelf piano
  fireplace sideboard hatstand
room = attic cellar kitchen hall pantry bathroom garage workshop hallway laundry nursery parlour
scary = hairy giant slimy fierce wicked horrible terrible frightening awful dreadful monstrous gigantic ghastly
monster = dragon ghost ogre witch troll vampire wolf crocodile wizard spider robber python tiger skeleton
feature = teeth eyes claws ears horns fangs feet wings toes whiskers eyebrows elbows spikes scales nostrils
lamp = lamp candle lantern torch
crept = crept tiptoed sneaked crawled
container = bucket box jar pot tub bowl chest tin drawer pail barrel vase
den = den nest burrow tunnel hut treehouse
gem = diamonds rubies emeralds pearls stars sunshine moonlight glass snow gold silver sapphires fire jewels
royal = king queen prince princess emperor knight duke
asked = asked wondered enquired
said = said replied answered whispered sighed murmured sniffed mumbled admitted groaned sobbed muttered
beamed = said beamed smiled answered replied laughed explained declared chuckled grinned
snapped = snapped shouted yelled cried growled hissed called screamed
cried = cried shouted laughed cheered exclaimed sang squealed called yelled giggled
hooray = Hooray Wonderful Hurrah Splendid Marvellous Perfect Goodness Fantastic Bravo Yippee Terrific Brilliant Superb
  Great Super Amazing
shared = shared ate had
called = called named
size = big small wide long nasty secret
"""


Cell = str | tuple  # a word, or a tuple of text and (form, name) slots


@functools.cache
def _rules() -> dict[str, tuple[list[str], list[tuple[Cell, ...]], tuple]]:
    """Compile the grammar: the name in a slot -> (all columns drawn with it, rows, key of the rows already taken)."""
    lines = {}
    for head, kind, body in re.findall(r"^(\S+?)(:| =)((?: .*\n)+)", GRAMMAR, re.M):
        body = " ".join(body.split())
        while kind == ":" and (group := re.search(r"\(([^()]*)\)", body)):  # (x|y|) becomes a rule of its own
            lines[name := f"{len(lines)}~"] = group[1].split("|")
            body = f"{body[:group.start()]}{{{name}}}{body[group.end():]}"
        lines[head] = body.split(" | ") if kind == ":" else [word.replace("_", " ") for word in body.split()]

    def cell(text: str) -> Cell:
        pieces = re.split(r"\{(.*?)\}", text)
        slots = [(form, name.lower()) if form else ("A" if name[0].isupper() else "", name.lower())
                 for form, _, name in (slot.rpartition(" ") for slot in pieces[1::2])]
        parts = [part for pair in zip(pieces[::2], [*slots, ""]) for part in pair if part]
        return tuple(parts) if slots else text

    rules = {}
    for head, rows in lines.items():
        columns, rows = head.split("/"), [tuple(map(cell, row.split("/"))) for row in rows]
        for name in columns:
            for suffix in ("", *"23456"):
                rules[name + suffix] = [column + suffix for column in columns], rows, (head,)
    return rules


def _say(form: str, word: str) -> str:
    """The word as the slot wants it: with its article (form a), with a capital letter (form A), or as it is."""
    if form == "a":
        return ("an " if word[0] in "aeiou" else "a ") + word
    return word[0].upper() + word[1:] if form == "A" else word


def _write(parts: tuple, memory: dict, draw) -> tuple[str, float]:
    """Spell out `parts`, drawing what `memory` does not hold yet: the text and -log p of the draws."""
    text, nats = [], 0.0
    for part in parts:
        if isinstance(part, str):
            text.append(part)
            continue
        form, name = part
        if name not in memory:
            columns, rows, taken = _rules()[name]
            used = memory.get(taken, ())
            while (row := rows[int(draw() * len(rows))]) in used:
                pass
            nats += math.log(len(rows) - len(used))
            memory.update(zip(columns, row))
            memory[taken] = (*used, row)
        value = memory[name]
        if isinstance(value, tuple):
            value, more = _write(value, memory, draw)
            nats += more
        text.append(_say(form, value) if form else value)
    return "".join(text), nats


def _read(text: str) -> Iterator[float]:
    """-log p of every derivation of `text`: the same walk, but it follows each row that agrees with the text."""
    stack = [((("", "story"), ()), 0, {}, 0.0)]  # (what is still to be read, from where, memory, nats so far)
    while stack:
        todo, at, memory, nats = stack.pop()
        while todo:
            part, todo = todo
            if isinstance(part, str):
                if not text.startswith(part, at):
                    break
                at += len(part)
            elif (value := memory.get(part[1])) is None:
                columns, rows, taken = _rules()[part[1]]
                used = memory.get(taken, ())
                nats += math.log(len(rows) - len(used))
                for row in rows:
                    value = row[columns.index(part[1])]
                    if row not in used and (isinstance(value, tuple) or text.startswith(_say(part[0], value), at)):
                        stack.append(((part, todo), at, memory | dict(zip(columns, row)) | {taken: (*used, row)}, nats))
                break
            elif isinstance(value, str):
                todo = (_say(part[0], value), todo)
            else:
                for piece in reversed(value):
                    todo = (piece, todo)
        else:
            if at == len(text):
                yield nats


def stories(seed: int, first: int = 0) -> Iterator[str]:
    """Stories number `first`, first + 1, ... of a seed, without end; each is a pure function of (seed, number)."""
    for number in itertools.count(first):
        yield _write((("", "story"),), {}, random.Random(f"{seed} {number}").random)[0]


def story_nats(text: str) -> float:
    """-log p of `text` under the grammar: what no model can beat on average. ValueError if it is not a story."""
    for nats in _read(text):
        return nats
    raise ValueError("this text is not one of the built-in stories: the grammar cannot write it")


# --- 9. Corpora: from a name to files ---

TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
OWT = "https://huggingface.co/datasets/stanford-cs336/owt-sample/resolve/main/owt_"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
DOWNLOADS = {  # file -> (address, bytes of text)
    ("tinystories", "train"): (TINYSTORIES + "train.txt", 2_227_753_162),
    ("tinystories", "val"): (TINYSTORIES + "valid.txt", 22_502_601),
    ("owt", "train"): (OWT + "train.txt.gz", 11_920_511_059),
    ("owt", "val"): (OWT + "valid.txt.gz", 289_998_753),
    ("shakespeare", "all"): (SHAKESPEARE, 1_115_394),
}
DATASETS = ("tinystories", "owt", "shakespeare", "stories")
GENERATED_BYTES = 25_000_000  # of a built-in corpus when data_bytes is not given
GENERATED_BLOCK = 1000  # documents made by one task


class Prepared(NamedTuple):
    dataset: str  # the one used: "stories" when "tinystories" could not be had
    train_text: Path
    val_text: Path
    train_tokens: Path  # arrays of encode_file
    val_tokens: Path
    tokenizer_dir: Path


def download(
    url: str, path: Path, *, first_bytes: int | None = None, expected_bytes: int | None = None, timeout_s: float = 30.0
) -> None:
    """Fetch a file, or only its first bytes, going on where an earlier attempt broke off. Raises OSError.

    What has come lies in <path>.part. It is renamed when it has the size that the server announced, and expected_bytes
    is what that size of the whole file must be.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if first_bytes and part.exists() and part.stat().st_size > first_bytes:
        os.truncate(part, first_bytes)
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            total = _fetch(url, part, before, first_bytes, expected_bytes, timeout_s)
            reason = "the connection broke off"
            if part.stat().st_size == total:
                os.replace(part, path)
                return
        except (OSError, http.client.HTTPException) as error:  # refused, timed out, reset, no such page
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise UserError(f"no space left for {path}: free some, then run again") from None
            if isinstance(error, urllib.error.HTTPError) and error.code == 416 and before:
                part.unlink()  # the server has nothing behind what came before: another file, begin anew
                continue
            reason = str(getattr(error, "reason", None) or error)
        after = part.stat().st_size if part.exists() else 0
        if after <= before:  # as long as each attempt brings something the next one goes on
            raise OSError(f"{url}: {reason}" + (f", {after:,} bytes are kept for the next time" if after else ""))


def _fetch(
    url: str, part: Path, have: int, first_bytes: int | None, expected_bytes: int | None, timeout_s: float
) -> int:
    """Append what one connection gives to `part`; returns the size it must have in the end."""
    request = urllib.request.Request(url, headers={"User-Agent": "bpe.py"})
    if have or first_bytes:
        request.add_header("Range", f"bytes={have}-{first_bytes - 1 if first_bytes else ''}")
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        if response.status == 206:  # Content-Range: bytes 100-199/1000
            whole = int(response.headers["Content-Range"].rpartition("/")[2])
        else:  # a server without Range sends everything from the beginning
            have, whole = 0, int(response.headers.get("Content-Length") or 0)
        if expected_bytes and whole != expected_bytes:
            raise OSError(f"the file there has {whole:,} bytes where {expected_bytes:,} are expected")
        total = min(first_bytes or whole, whole)
        meter = Progress(f"download {part.stem}", total)
        with open(part, "ab" if have else "wb") as file:
            while have < total and (data := response.read(min(1 << 18, total - have))):
                file.write(data)
                have += len(data)
                meter.update(have)
        meter.close()
    return total


def cut_after_last_document(path: Path) -> None:
    """Shorten a text so that it ends with END_OF_TEXT."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        end = data.rfind(END_OF_TEXT.encode("ascii"))
    if end < 0:
        raise OSError(f"no {END_OF_TEXT} in {path}: this is not the text expected")
    os.truncate(path, end + len(END_OF_TEXT))


def unpack(packed: Path, path: Path, num_bytes: int) -> None:
    """The first num_bytes of a gzip file, which may itself be only the beginning of one."""
    with open(packed, "rb") as source, open(path, "wb") as target:
        unpacker = zlib.decompressobj(wbits=31)
        while target.tell() < num_bytes and (data := source.read(1 << 18)):
            target.write(unpacker.decompress(data)[: num_bytes - target.tell()])


def download_text(dataset: str, split: str, path: Path, data_bytes: int | None, say: Callable[[str], None]) -> None:
    """One split of tinystories or owt: whole, or its first data_bytes up to the end of a document."""
    url, whole = DOWNLOADS[dataset, split]
    taken = data_bytes if data_bytes and data_bytes < whole and split == "train" else None
    say(f"download: {dataset} {split}.txt, {f'the first {taken / 1e6:,.0f} of ' if taken else ''}{whole / 1e6:,.0f} MB")
    loading = path.with_name(path.name + ".download")
    if url.endswith(".gz"):
        packed = path.with_name(path.name + ".gz")
        # English packs to less than half, so half as many packed bytes as wanted are enough
        download(url, packed, first_bytes=taken and taken // 2)
        unpack(packed, loading, taken or whole)
        packed.unlink()
        if not taken and loading.stat().st_size != whole:
            raise OSError(f"{url}: {loading.stat().st_size:,} bytes of text where {whole:,} are expected")
    else:
        download(url, loading, first_bytes=taken, expected_bytes=whole)
    if taken:
        cut_after_last_document(loading)
    os.replace(loading, path)


def split_text(source: Path, folder: Path, data_bytes: int | None = None) -> None:
    """The first 90 % of a text become train.txt, the rest val.txt, cut at the end of a document where there is one."""
    borders = chunk_borders(source, [END_OF_TEXT])
    for start, end in zip(borders, borders[1:]):
        read_text(source, start, end)  # says where the text is not UTF-8 before anything is written
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size, mark = min(len(data), data_bytes or len(data)), END_OF_TEXT.encode("ascii")
        cut = int(size * 0.9)
        ends = (data.find(mark, cut, size - len(mark) - 1), data.rfind(mark, 0, cut))  # the next end, else the last
        cut = next((end + len(mark) for end in ends if end >= 0), cut)
        while cut and data[cut] & 0xC0 == 0x80:  # not within a character
            cut -= 1
        for name, start, end in (("train.txt", 0, cut), ("val.txt", cut, size)):
            with write_atomically(folder / name, "wb") as target:
                for offset in range(start, end, 1 << 20):
                    target.write(data[offset : min(offset + (1 << 20), end)])


def generate_block(dataset: str, seed: int, first: int) -> bytes:
    """A thousand documents of a built-in corpus, each followed by END_OF_TEXT and nothing else."""
    documents = itertools.islice(stories(seed, first), GENERATED_BLOCK)
    return "".join(document + END_OF_TEXT for document in documents).encode("utf-8")


def generate_text(dataset: str, seed: int, path: Path, num_bytes: int, num_workers: int | None = None) -> None:
    """Documents 0, 1, 2, ... of a built-in corpus until num_bytes are full; the same for any number of workers."""
    workers = 1 if num_bytes < 2_000_000 else num_workers or default_num_workers()
    blocks = ((seed, first) for first in itertools.count(0, GENERATED_BLOCK))
    meter = Progress(f"generating {path.name}", num_bytes)
    mark = END_OF_TEXT.encode("ascii")
    with write_atomically(path, "wb") as file:
        for block in parallel_map(generate_block, dataset, blocks, workers):
            if file.tell() + len(block) >= num_bytes:
                missing = max(0, num_bytes - file.tell() - len(mark))
                file.write(block[: block.index(mark, missing) + len(mark)])
                break
            file.write(block)
            meter.update(file.tell())
    meter.close()


def read_json(path: Path) -> dict:
    """What stands in a small file of ours; nothing when it is missing or damaged, so that its stage runs again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, facts: dict) -> None:
    with write_atomically(path) as file:
        json.dump(facts, file, indent=1)


def make_texts(dataset: str, folder: Path, data_bytes: int | None, num_workers: int | None, say: Callable) -> None:
    """See that folder/train.txt and folder/val.txt are there, as source.json beside them says.

    Without source.json the files are somebody's own and stay as they are.
    """
    record, texts = folder / "source.json", {split: folder / f"{split}.txt" for split in ("train", "val")}
    if dataset == "stories":
        data_bytes = data_bytes or GENERATED_BYTES
        first = hashlib.sha256(generate_block(dataset, 0, 0)).hexdigest()  # changes when the generator does
        wanted = {"dataset": dataset, "data_bytes": data_bytes, "first_documents": first}
    elif dataset in DATASETS:
        wanted = {"dataset": dataset, "data_bytes": data_bytes}
    else:
        text_size(dataset)
        wanted = {"dataset": str(Path(dataset).resolve()), "data_bytes": data_bytes, **file_identity(Path(dataset))}
    made = read_json(record)
    if made and dataset in ("tinystories", "owt"):  # what was downloaded serves whoever wants less
        enough = made["data_bytes"] is None or (data_bytes is not None and data_bytes <= made["data_bytes"])
        wanted = made if enough else wanted
    if made and made != wanted:
        say(f"data: {folder} was made otherwise than now asked for, so it is made anew")
        for path in texts.values():
            path.unlink(missing_ok=True)
    if all(path.exists() for path in texts.values()):
        say(f"data: found {folder}, {texts['train'].stat().st_size / 1e6:,.1f} MB of training text")
        return
    if made or not any(path.exists() for path in texts.values()):
        write_json(record, wanted)
    if dataset in ("tinystories", "owt"):
        for split, path in texts.items():
            if not path.exists():
                download_text(dataset, split, path, data_bytes, say)
    elif dataset == "stories":
        say(f"data: generating {data_bytes / 1e6:,.1f} MB of {dataset}, for validation from another seed")
        generate_text(dataset, 0, texts["train"], data_bytes, num_workers)
        generate_text(dataset, 1, texts["val"], min(1_000_000, data_bytes // 10), num_workers)
    elif dataset == "shakespeare":
        url, size = DOWNLOADS[dataset, "all"]
        say(f"download: {dataset}, {size / 1e6:.1f} MB")
        download(url, folder / "input.txt", expected_bytes=size)
        split_text(folder / "input.txt", folder, data_bytes)
    else:
        say(f"data: {dataset}, the first 90 % for training, the rest for validation")
        split_text(Path(dataset), folder, data_bytes)


def prepare(
    dataset: str,
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    data_dir: str | os.PathLike = "data",
    data_bytes: int | None = None,
    num_workers: int | None = None,
    say: Callable[[str], None] = print,
) -> Prepared:
    """From a corpus's name, or a text file's path, to token arrays; runs the stages that are missing, a line for each.

    data_bytes: how much training text; None takes all that there is, or GENERATED_BYTES of a built-in corpus. Text lies
    in data_dir/<dataset>/, tokenizer and arrays in data_dir/<dataset>/bpe<vocab_size>/. Without a network "tinystories"
    becomes "stories"; any other corpus that cannot be had raises UserError.
    """
    num_merges_for(vocab_size, special_tokens)
    name = dataset if dataset in DATASETS else Path(dataset).stem
    if dataset not in DATASETS:
        if not Path(dataset).suffix and not Path(dataset).exists():
            raise UserError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}, or give a text file's path")
        name += "-file" if name in DATASETS else ""
    folder = Path(data_dir) / name
    try:
        make_texts(dataset, folder, data_bytes, num_workers, say)
    except OSError as error:
        if not (folder / "train.txt").exists():
            (folder / "source.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        if dataset != "tinystories":
            raise UserError(f"{dataset} could not be had ({error}); put your copy at {folder}/train.txt and val.txt") from None
        say(f"data: tinystories could not be downloaded ({error}); the built-in stories are used instead")
        return prepare(
            "stories", vocab_size=vocab_size, special_tokens=special_tokens, data_dir=data_dir, num_workers=num_workers,
            data_bytes=min(data_bytes or GENERATED_BYTES, GENERATED_BYTES), say=say,
        )  # fmt: skip

    train_text, val_text, tokenizer_dir = folder / "train.txt", folder / "val.txt", folder / f"bpe{vocab_size}"
    wanted = {"special_tokens": list(special_tokens), "text": file_identity(train_text)}
    record = tokenizer_dir / "training.json"
    if wanted.items() <= read_json(record).items() and (tokenizer_dir / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(tokenizer_dir)
    else:
        say(f"tokenizer: {vocab_size:,} tokens, trained on {train_text}")
        record.unlink(missing_ok=True)
        vocab, merges = train_bpe(train_text, vocab_size, special_tokens, num_workers=num_workers, progress=True)
        tokenizer = Tokenizer(vocab, merges, special_tokens)
        tokenizer.save(tokenizer_dir)
        write_json(record, wanted)
    for text in (train_text, val_text):
        npy = tokenizer_dir / f"{text.stem}.npy"
        wanted = {"tokenizer_hash": tokenizer.hash(), "source": file_identity(text)}
        if not (npy.exists() and wanted.items() <= read_json(npy.with_suffix(".json")).items()):
            count = encode_file(tokenizer, text, npy, num_workers=num_workers, progress=True)
            say(f"tokens: {npy}, {count:,} tokens, {text.stat().st_size / max(1, count):.2f} bytes each")
    return Prepared(name, train_text, val_text, tokenizer_dir / "train.npy", tokenizer_dir / "val.npy", tokenizer_dir)


# --- 10. The command line ---
