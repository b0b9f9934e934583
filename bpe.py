"""Byte-pair encoding: how text becomes integers.

A model reads integers. The 256 bytes would do, but make long sequences; words make short ones, but there is no end of
words. Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2) stands between: it starts from
the bytes and makes a new token of the pair of neighbours that is most frequent, again and again.

    merges = []                                  training
    until the vocabulary is full:
        pair = the most frequent neighbours      (of equal counts, the greater pair of byte strings)
        make one token of it wherever it stands; append it to merges
    for pair in merges: ...                      encoding a text: the same merges in the same order

    python bpe.py                                trains on Python's own library: no download, some seconds
    python bpe.py --input my.txt --vocab_size 4096 --out my_tokenizer
    python bpe.py --out my_tokenizer --show "How is this cut?"
    python bpe.py --report                       compares the tokenizers and corpora under data/

    1. Pre-tokens: where a text may be cut    5. Long texts: chunks, workers, files    9. A built-in corpus: stories
    2. Training: the definition               6. Training on a file                  10. A built-in corpus: arithmetic
    3. Training: the same, faster             7. The tokenizer                       11. Corpora, to token arrays
    4. Training: fastest, in arrays           8. From text to token arrays           12. The command line
"""

import argparse
import concurrent.futures
import contextlib
import functools
import gzip
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
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex

END_OF_TEXT = "<|endoftext|>"  # stands behind each document; the model learns that another text follows
Pair = tuple[bytes, bytes]
PathLike = str | os.PathLike
class UserError(ValueError):
    """A mistake of the user's, in one sentence that also says what to do. main() prints it and exits with 2."""
# --- 1. Pre-tokens: where a text may be cut ---
# A merge never crosses the border of a pre-token, roughly a word with the space before it; otherwise "dog." and "dog!"
# would become tokens. The pattern is GPT-2's: contractions, letters, digits, other signs, and white space, whose last
# space belongs to the word behind it.
PRETOKEN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# A border is a place where a pre-token begins, whatever stands further left or right: the parts can be treated alone.
# Two characters prove it, except after white space and between an apostrophe and a letter (perhaps a contraction).
BORDER = regex.compile(r"(?<=\S)(?=\s)|(?<=\p{L})(?=\P{L})|(?<=\p{N})(?=\P{N})|(?<=[^\s\p{L}\p{N}'])(?=[\p{L}\p{N}])")
LAST_BORDER = regex.compile("(?r)" + BORDER.pattern)  # (?r) searches from the end
def special_pattern(special_tokens: Iterable[str]) -> regex.Pattern:
    """Finds special tokens, in a group so that split() keeps them; without special tokens it finds nothing."""
    longest_first = sorted(set(special_tokens), key=len, reverse=True)  # alternatives are tried in this order
    if "" in longest_first:
        raise UserError("a special token cannot be empty: leave it out of special_tokens")
    return regex.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")  # (?!) matches nowhere

# The pattern takes most of the time. So NumPy cuts a text where its bytes show a border, into pieces of mostly one
# pre-token, and only the distinct ones are shown to the pattern: in English text one of twenty.
BLOCK_BYTES = 1 << 20  # what NumPy cuts at a time: most of it stays in the cache
ALL, LETTER, DIGIT = set(range(256)), {byte for byte in range(128) if chr(byte).isalpha()}, set(b"0123456789")
SPACE = set(b" \t\n\v\f\r")  # subtle: str.isspace has \x1c to \x1f too, the pattern has not
UNKNOWN, MARK = set(range(128, 254)), {254, 255}  # no UTF-8: special tokens are written 255 254 254 ... here
SIGN = ALL - LETTER - DIGIT - SPACE - MARK - UNKNOWN - {39}  # 39 is the apostrophe
MAYBE_SPACE = SPACE | MARK | {0xC2, 0xE1, 0xE2, 0xE3}  # other white space begins with these bytes
# Bytes on the left and right of a border. Besides BORDER: nothing joins white space before it but a space, and by the
# last rule, where the border is before the left byte, the last white space of a run begins a pre-token.
RULES = [(LETTER, ALL - LETTER - UNKNOWN), (DIGIT, ALL - DIGIT - UNKNOWN), (SIGN, LETTER | DIGIT | SPACE),
         ({39}, SPACE), (MARK, ALL - MARK), (ALL, {255}), (SPACE - {32}, ALL - MAYBE_SPACE), (SPACE, ALL - MAYBE_SPACE)]
LEFT, RIGHT = (bytes(sum(1 << bit for bit, rule in enumerate(RULES) if byte in rule[side]) for byte in range(256))
               for side in (0, 1))
def border_flags(text: bytes) -> np.ndarray:
    """Whether each byte of a UTF-8 text begins a pre-token; False where the bytes beside it do not tell."""
    left, right = (np.frombuffer(text.translate(rules), np.uint8) for rules in (LEFT, RIGHT))
    rules = left[:-1] & right[1:]  # those that hold between two bytes, a bit each
    return np.append(True, rules & 127 != 0) | np.append(rules > 127, text[-1] in SPACE)

def blocks_of(text: bytes, special_tokens: Sequence[str]) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """A UTF-8 text block by block: its bytes, and where its pieces begin and end. A special token is a piece."""
    parts = re.split(special_pattern(special_tokens).pattern.encode("utf-8"), text) if special_tokens else [text]
    parts[1::2] = [b"\xff".ljust(len(special), b"\xfe") for special in parts[1::2]]
    marks, begin, size = b"".join(parts), 0, BLOCK_BYTES
    while begin < len(text):
        borders = np.flatnonzero(border_flags(marks[begin : begin + size] + b"\xff"))
        if begin + size < len(text):
            borders = borders[:-1]  # what comes last may go on
            if len(borders) < 2:
                size *= 2
                continue
        yield text[begin : begin + borders[-1]], borders[:-1], borders[1:]
        begin, size = begin + int(borders[-1]), BLOCK_BYTES

SLOT_BITS, NO_TEXT = 20, (1 << 64) - 2
class Pieces:
    """Gives equal pieces the same number, counted from 0 in the order of their coming.
    Pieces are compared as two integers, their first and next 8 bytes; longer ones, which are few, by a dict. A hash of
    the integers says in which of a million slots a piece may be known. Of two that want one slot the later gets it, and
    the other will count as new when it comes again: that costs less than to look further."""
    def __init__(self) -> None:
        self.slots, self.long = np.zeros(1 << SLOT_BITS, np.int32), {}
        self.heads, self.tails = np.full((2, 1), NO_TEXT, np.uint64)  # stands in all slots and equals no piece

    def numbers(self, block: bytes, begin: np.ndarray, end: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """The pieces that are new, in the order of their numbers, and the number of each piece of the block."""
        words = np.ndarray((len(block) + 8,), "<u8", block + b"\xff" * 16, strides=(1,))  # the 8 bytes from each place
        outside = ~np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # of a shorter piece
        length = end - begin
        head = words[begin] | outside[np.minimum(length, 8)]
        tail = words[begin + 8] | outside[np.clip(length - 8, 0, 8)]
        for place in np.flatnonzero(length > 16).tolist():  # as bytes, NO_TEXT is 254 255 255 ...
            head[place], tail[place] = self.long.setdefault(block[begin[place] : end[place]], len(self.long)), NO_TEXT
        slot = ((head ^ tail * 0x9E3779B97F4A7C15) * 0xD6E8FEB86659FD93 >> 64 - SLOT_BITS).astype(np.int64)
        number, new = self.slots[slot], []
        missing = np.flatnonzero((self.heads[number] != head) | (self.tails[number] != tail))
        while len(missing):
            self.slots[slot[missing]] = missing  # of those that want one slot, the last to write gets it
            winner = self.slots[slot[missing]]
            equal, first = (head[winner] == head[missing]) & (tail[winner] == tail[missing]), missing[winner == missing]
            self.slots[slot[first]] = number[first] = np.arange(len(self.heads), len(self.heads) + len(first))
            self.heads, self.tails = np.append(self.heads, head[first]), np.append(self.tails, tail[first])
            number[missing[equal]], missing = number[winner[equal]], missing[~equal]
            new += [block[a:b] for a, b in zip(begin[first].tolist(), end[first].tolist())]
        return new, number - 1

def pretokens_of(piece: bytes) -> list[bytes]:
    if piece.isalnum() or piece[1:].isalnum() and piece[0] == 32:  # of bytes, isalnum knows ASCII only: cut already
        return [piece]
    return [pretoken.encode("utf-8") for pretoken in PRETOKEN.findall(piece.decode("utf-8"))]

def count_pretokens(text: str, special_tokens: Iterable[str] = ()) -> dict[str, int]:
    """How often each pre-token occurs. Special tokens cut the text and are not counted.
    >>> count_pretokens("low lower low<|endoftext|> low", ["<|endoftext|>"])
    {'low': 1, ' lower': 1, ' low': 2}
    """
    counts, specials = Counter(), {special.encode("utf-8"): special for special in special_tokens}
    known, pieces, times = Pieces(), [], np.zeros(0, np.int64)
    for block in blocks_of(text.encode("utf-8"), [*specials.values()]):
        new, number = known.numbers(*block)
        pieces += new
        times = np.append(times, np.zeros(len(new), np.int64)) + np.bincount(number, minlength=len(pieces))
    for piece, count in zip(pieces, times.tolist()):
        for pretoken in pretokens_of(piece) if piece not in specials else ():
            counts[pretoken.decode("utf-8")] += count
    return dict(counts)

# --- 2. Training: the definition ---
def merge_pair(symbols: Sequence, pair: tuple, merged: Any) -> list:
    """Replace every occurrence of `pair`, from left to right.
    >>> merge_pair([1, 2, 3, 1, 2], (1, 2), 4)
    [4, 3, 4]
    """
    result, index = [], 0
    while index < len(symbols):
        found = symbols[index] == pair[0] and index + 1 < len(symbols) and symbols[index + 1] == pair[1]
        result.append(merged if found else symbols[index])
        index += 2 if found else 1
    return result

def train_naive(word_counts: Mapping[str, int], num_merges: int) -> list[Pair]:
    """The definition: for each merge, count all pairs of all words. The rest of this file must agree with it.
    The counts begin with e s 9, s t 9, w e 8; the tie goes to the greater pair, s t. Then e st leads with 9.
    >>> counts = {"low": 5, "lower": 2, "widest": 3, "newest": 6}
    >>> [f"{left.decode()} {right.decode()}" for left, right in train_naive(counts, 12)]
    ['s t', 'e st', 'o w', 'l ow', 'w est', 'n e', 'ne west', 'w i', 'wi d', 'wid est', 'low e', 'lowe r']
    """
    words = {word: [bytes([byte]) for byte in word.encode("utf-8")] for word in word_counts}
    merges: list[Pair] = []
    for _ in range(num_merges):
        pair_counts: Counter[Pair] = Counter()
        for word, symbols in words.items():
            for pair in zip(symbols, symbols[1:]):
                pair_counts[pair] += word_counts[word]
        if not pair_counts:
            break
        # subtle: ties compare byte strings, not token ids and not the printable characters of vocab.json
        best = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
        words = {word: merge_pair(symbols, best, best[0] + best[1]) for word, symbols in words.items()}
        merges.append(best)
    return merges

# --- 3. Training: the same, faster ---
# A merge changes only the words that hold its pair. So the counts are kept and corrected where a word was rewritten: a
# merge costs its own occurrences and a look at all counts, instead of the whole text.
def train_fast(word_counts: Mapping[str, int], num_merges: int) -> list[Pair]:
    """The merges of train_naive at the cost of the changes."""
    words = [[bytes([byte]) for byte in word.encode("utf-8")] for word in word_counts]
    times, merges = list(word_counts.values()), []
    pair_counts: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)  # may name words that hold it no more
    def count(index: int, sign: int) -> None:
        for pair in zip(words[index], words[index][1:]):
            pair_counts[pair] += sign * times[index]
            words_with[pair].add(index)
    for index in range(len(words)):
        count(index, +1)
    while len(merges) < num_merges and any(pair_counts.values()):
        best = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
        merges.append(best)
        for index in words_with.pop(best):
            count(index, -1)
            words[index] = merge_pair(words[index], best, best[0] + best[1])
            count(index, +1)
        del pair_counts[best]
    return merges

# --- 4. Training: fastest, in arrays ---
# All distinct words stand in one array with borders between them. For "low lower lowest", three, two and one times:
#
#     place    0 1 2 3  4 5 6 7 8 9  10 ...
#     token    l o w |  l o w e r |  l o w e s t |     | is the byte 255, which no UTF-8 text contains
#     pair_at  3 4 0 0  3 4 6 1 0 0  3 4 6 2 5 0 0     number of the pair that begins here; 0: none
#     weight   3 3 3 3  2 2 2 2 2 2  1 1 1 1 1 1 1     how often the word occurs
#
# Pair 4 is "o w": counts[4] is 6, the sum of its weights, and places[first[4] : first[5]] are 1, 5, 11, where it was
# seen when it got its number. As many has "l o", but "o w" is greater. The merged token is written at its places, the
# places behind them go out of use, and before and after link those that still stand:
#
#     token    l ow . |  l ow . e r |  l ow . e s t |
#     pair_at  8 0  0 0  8 7  0 1 0 0  8 7  0 2 5 0 0  7 and 8 are new: "ow e" and "l ow"
#
# So a merge is a handful of operations on its own places, and nothing is looked up: pair_at says which counts fall, and
# sorting brings the places of a new pair together. No count ever rises, so only pairs above a threshold need to stand
# in a heap; when it runs empty, the threshold falls to 3/4 of the maximum.
# An operation of NumPy on ten places costs as much as one on a thousand. So the next merges are made together, some
# twenty at a time: pairs that cannot overlap leave each other's counts alone. Only a new pair may come between two of
# them; whether one is as frequent as a later pair of the batch is seen beforehand, and then the batch ends there.
BATCH = 128  # merges made together, at most: with 1 the training takes three times as long
def train_vectorized(word_counts: Mapping[str, int], num_merges: int,
                     on_merge: Callable[[Pair, int], None] = lambda pair, count: None) -> list[Pair]:
    """The merges of train_naive. on_merge hears of each and its count."""
    text = ("\udcff".join(word_counts) + "\udcff").encode("utf-8", "surrogateescape")  # \udcff becomes the byte 255
    token, size = np.frombuffer(text, np.uint8).astype(np.int32), len(text)
    lengths = np.diff(np.flatnonzero(token == 255), prepend=-1)
    weight = np.repeat(np.array([*word_counts.values()] or [0]), lengths)
    # subtle: before place 0 comes -1, to NumPy the last place, which is a border as it should be
    before, after = np.arange(-1, size - 1, dtype=np.int32), np.arange(1, size + 1, dtype=np.int32)
    # A merge brings at most two new pairs for each place it takes. Memory that is never written costs nothing.
    pair_at, places, most = np.zeros(size, np.int32), np.empty(3 * size, np.int32), 65_537 + 2 * size
    counts, first = np.zeros(most, np.int64), np.zeros(most + 1, np.int64)
    left, right, num_pairs = np.zeros(most, np.int32), np.zeros(most, np.int32), 1
    tokens, merges, heap, threshold = [bytes([byte]) for byte in range(256)], [], [], 1 << 62
    # heapq hands out the least: so bytes are complemented, and a last sign above all bytes puts "ab" behind "abc"
    order = functools.cache(lambda token: bytes(255 - byte for byte in tokens[token]).decode("latin-1") + "\u0100")

    def grouped(keys: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, ...]:
        """The different keys, where each begins among the places, the places by key, and the sum of their weights."""
        codes = np.sort(keys << 32 | at)
        at, keys = codes.astype(np.int32), codes >> 32
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        return keys[begins], begins, at, np.add.reduceat(weight[at], begins) if len(at) else begins

    def add_pairs(keys: np.ndarray, at: np.ndarray, base: int) -> np.ndarray:
        """Number the pairs at these places, one for each key: of token base + (key >> 23) and another, which is on its
        left or, if the key is odd, on its right."""
        nonlocal num_pairs
        keys, begins, at, sums = grouped(keys, at)
        new, end = np.arange(num_pairs, num_pairs + len(keys)), first[num_pairs]
        merged, other = base + (keys >> 23), keys >> 1 & (1 << 22) - 1
        left[new], right[new] = np.where(keys & 1, (merged, other), (other, merged))
        counts[new], pair_at[at] = sums, np.repeat(new, np.diff(begins, append=len(at)))
        num_pairs += len(keys)
        first[new], first[num_pairs], places[end : end + len(at)] = end + begins, end + len(at), at
        return new

    def push(pairs: np.ndarray) -> None:
        for count, a, b, pair in zip(*(array[pairs].tolist() for array in (counts, left, right)), pairs.tolist()):
            heapq.heappush(heap, (-count, order(a), order(b), pair))

    def most_frequent(refill: bool) -> int:
        """See that the greatest pair stands at heap[0]; returns 0 if no pair is left."""
        nonlocal threshold
        while heap or refill and (greatest := counts[:num_pairs].max()) > 0:
            if not heap:
                threshold = max(1, greatest * 3 // 4)
                push(np.flatnonzero(counts[:num_pairs] >= threshold))
            count, _, _, pair = heap[0]
            if counts[pair] == -count:
                return pair
            heapq.heappop(heap)  # its count has fallen since
            if counts[pair] >= threshold:
                push(np.array([pair]))
        return 0

    at = np.flatnonzero((token[:-1] != 255) & (token[1:] != 255))
    add_pairs(token[at].astype(np.int64) << 23 | token[at + 1] << 1 | 1, at, 0)
    while len(merges) < num_merges:
        batch, lefts, rights = [], set(), set()
        while len(batch) < min(BATCH, num_merges - len(merges)) and (pair := most_frequent(refill=not batch)):
            a, b = int(left[pair]), int(right[pair])
            if a in rights or b in lefts:  # it may overlap one of the batch, and lose by it
                break
            lefts.add(a), rights.add(b)
            batch.append(heapq.heappop(heap))
        if not batch:
            break
        pairs = [entry[3] for entry in batch]
        at = [places[first[pair] : first[pair + 1]] for pair in pairs]
        at, which = np.concatenate(at), np.repeat(np.arange(len(at)), [len(one) for one in at])
        here = pair_at[at] == np.array(pairs)[which]  # some have been merged with their other neighbour since
        at, which = at[here], which[here]
        index = np.arange(len(at))  # a a a holds two such pairs, of which the first is merged: in a run every second
        begins = np.append(True, (after[at[:-1]] != at[1:]) | (which[:-1] != which[1:]))
        here = (index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0
        at, which = at[here], which[here]
        gone = after[at]
        beyond, ahead = after[gone], before[at]
        if len(batch) > 1:  # count new pairs as if each merge came first: at least as many as there will be
            keys = np.concatenate((which << 23 | token[ahead] << 1, which << 23 | token[beyond] << 1 | 1))
            keys, _, _, sums = grouped(keys, np.concatenate((at, at)))
            done = np.maximum((keys >> 23) + 1, np.searchsorted([entry[0] for entry in batch], -sums))  # stands before
            done = int(done[keys >> 1 & (1 << 22) - 1 != 255].min(initial=len(batch)))
            if done < len(batch):
                for entry in batch[done:]:
                    heapq.heappush(heap, entry)
                pairs, here = pairs[:done], which < done
                at, which, gone, beyond = at[here], which[here], gone[here], beyond[here]
        base = len(tokens)
        for pair in pairs:
            merges.append((tokens[left[pair]], tokens[right[pair]]))
            tokens.append(b"".join(merges[-1]))
            on_merge(merges[-1], int(counts[pair]))
        np.subtract.at(counts, pair_at[gone], weight[at])
        token[at], after[at], before[beyond] = base + which, beyond, at
        pair_at[gone] = pair_at[at] = counts[pairs] = 0
        ahead, keys = before[at], which << 23
        here = (token[ahead] != 255) & (token[ahead] < base)  # what is merged itself counts as beyond
        np.subtract.at(counts, pair_at[ahead[here]], weight[ahead[here]])
        there = token[beyond] != 255
        keys = np.concatenate(((keys | token[ahead] << 1)[here], (keys | token[beyond] << 1 | 1)[there]))
        new = add_pairs(keys, np.concatenate((ahead[here], at[there])), base)
        push(new[counts[new] >= threshold])
    return merges

# --- 5. Long texts: chunks, workers, files ---
CHUNK_BYTES = 4_000_000  # one task of a worker: less than a second, some 100 MB of memory
def text_size(path: PathLike) -> int:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the path of a text file") from None
    if size == 0:
        raise UserError(f"{path} is empty: give a file with text in it")
    return size

def read_text(path: PathLike, start: int, end: int) -> str:
    """Bytes start to end of a UTF-8 file; text mode would change line ends or use the platform's own encoding."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {start + error.start:,} is 0x{data[error.start]:02x}"
        raise UserError(f"{path} is not UTF-8 text ({where}): convert it, as with iconv -f latin1 -t utf-8") from None

def chunks_of(path: PathLike, special_tokens: Sequence[str], num_bytes: int) -> list[tuple[int, int]]:
    """(start, end) of parts of a file, about num_bytes long, that can be treated alone.
    A part begins at a special token or, where none is near, at a border; never within a special token."""
    size, window, specials = text_size(path), 16_384, special_pattern(special_tokens)
    margin = max((len(token.encode("utf-8")) for token in special_tokens), default=0) + 4
    borders, target = [0], num_bytes
    with open(path, "rb") as file:
        while target < size:
            # the margins hold any special token and any character at an end; halves further out become lone surrogates
            first = max(0, target - margin)
            file.seek(first)
            text = file.read(target - first + window + margin).decode("utf-8", errors="surrogateescape")
            spans = [match.span() for match in specials.finditer(text, overlapped=True)]
            within = {index for start, end in spans for index in range(start + 1, end)}
            begins = [start for start, _ in spans] + [match.start() for match in BORDER.finditer(text)]
            begins = (text[:index] for index in begins if index not in within)
            places = (first + len(before.encode("utf-8", errors="surrogateescape")) for before in begins)
            place = next((place for place in places if target <= place < min(target + window, size)), None)
            borders += [place] if place else []
            target = place + num_bytes if place else target + window
    return list(zip(borders, borders[1:] + [size]))

def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

def parallel_map(function: Callable, shared: Any, tasks: Sequence[tuple], num_workers: int | None) -> Iterator[Any]:
    """function(shared, *task) for each task, in order. By default one process for each processor, this one among them:
    it works while the others start, which takes half a second. A worker that dies is an error, no hang."""
    helpers = min(num_workers or processors(), len(tasks)) - 1
    if helpers == 0 or len(tasks) <= 2:
        yield from (function(shared, *task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside the threads of torch
    # subtle: handed over with the start, a tokenizer would keep this process waiting until the others can read it
    present = context.SimpleQueue()
    threading.Thread(target=lambda: [present.put(shared) for _ in range(helpers)], daemon=True).start()
    pool = concurrent.futures.ProcessPoolExecutor(helpers, context, _start_worker, (present,))
    # subtle: a spawned process first runs the caller's script again, up to `if __name__ == "__main__"`. Ours need only
    # this file, and train.py would import torch in each of them, so the script's path is hidden while they start.
    main, tasks = sys.modules["__main__"].__dict__, iter(tasks)
    script = main.pop("__file__", None) if __name__ != "__main__" else None
    try:
        waiting = deque(pool.submit(_run_task, function, task) for task in itertools.islice(tasks, 2 * helpers))
    finally:
        main.update({"__file__": script} if script else {})
    try:
        for task in tasks:
            if sum(not future.done() for future in waiting) < 2 * helpers:
                waiting.append(pool.submit(_run_task, function, task))
            else:
                waiting.append(concurrent.futures.Future())
                waiting[-1].set_result(function(shared, *task))
            while waiting and (waiting[0].done() or len(waiting) > 4 * helpers + 4):  # or results would pile up
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)
    except concurrent.futures.BrokenExecutor:
        raise UserError("a worker process died, perhaps for want of memory: try --num_workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)

_SHARED: list[Any] = []  # in a worker: what all its tasks need, such as the tokenizer, sent once
def _start_worker(present: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    # a parent that is killed ends nobody: then this does
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _SHARED.append(present.get())

def _run_task(function: Callable, task: tuple) -> Any:
    return function(_SHARED[0], *task)

class Progress:
    """One line on stderr while something long runs: how much is done, how fast, how long it still takes."""
    def __init__(self, what: str, total: int, unit: str = "MB", shown: bool = True) -> None:
        self.what, self.total, self.unit, self.shown = what, total, unit, shown
        self.started = self.printed = time.monotonic()
        self.terminal = sys.stderr.isatty()  # there a line overwrites the last one; a log file gets fewer

    def update(self, done: int) -> None:
        now, scale, line = time.monotonic(), 1e6 if self.unit == "MB" else 1, ""
        if self.shown and done and now - self.printed > (0.5 if self.terminal else 10):
            rate, self.printed = done / (now - self.started), now
            line = (f"{self.what:<20} {done / scale:9,.1f} of {self.total / scale:,.1f} {self.unit}, "
                    f"{rate / scale:,.1f} a second, {(self.total - done) / rate:,.0f} s left")
        if line or self.terminal and done >= self.total and self.printed > self.started:  # in the end an empty line
            print(f"{line:<99}", end="\r" if self.terminal else "\n", file=sys.stderr, flush=True)

@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): make room or choose another place") from None

@contextlib.contextmanager
def write_atomically(path: PathLike, mode: str = "w") -> Iterator[Any]:
    """Open a file that gets its name when it is complete; after an error nothing is left of it."""
    path, temporary = Path(path), Path(f"{path}.{os.getpid()}.unfinished.tmp")
    try:
        with room_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name and none of the content
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

@contextlib.contextmanager
def alone_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Be the only process that makes files in a folder, after a wait if need be; a process that ends, however it ends,
    holds it no more. What a killed one left half-written is removed, and the folder, too, if nothing comes into it."""
    with room_for(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):  # no fcntl on Windows, nothing to remove on a read-only disk
            import fcntl
            held.callback(os.close, lock := os.open(folder, os.O_RDONLY))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"data: waiting for the process that prepares {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.rglob("*.[0-9]*.unfinished.tmp"):
                left.unlink()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()

def write_json(path: Path, facts: dict) -> None:
    with write_atomically(path) as file:
        json.dump(facts, file, indent=1)

def read_json(path: Path) -> dict:
    """A small file of ours; nothing when it is missing or damaged, so that the stage that writes it runs again."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(facts := json.loads(path.read_text(encoding="utf-8")), dict):
            return facts
    return {}

def file_identity(path: Path) -> dict:
    """Tells a changed text from an unchanged one without reading gigabytes."""
    return {"file": path.name, "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}

# --- 6. Training on a file ---
class Kept:
    """A value in a file, written once a minute and in the end, behind a checksum; a damaged one counts as missing."""
    def __init__(self, path: Path | None, value: Any) -> None:
        self.path, self.value, self.saved = path, value, time.monotonic()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            check, text = path.read_text(encoding="utf-8").split("\n", 1)
            self.value = json.loads(text) if int(check) == zlib.crc32(text.encode("utf-8")) else value

    def save(self, now: bool) -> None:
        if self.path and (now or time.monotonic() - self.saved > 60):
            text, self.saved = json.dumps(self.value), time.monotonic()
            with write_atomically(self.path) as file:
                file.write(f"{zlib.crc32(text.encode('utf-8'))}\n{text}")

def count_chunk(special_tokens: Sequence[str], path: Path, start: int, end: int) -> dict[str, int]:
    return count_pretokens(read_text(path, start, end), special_tokens)

def count_words(path: Path, special_tokens: Sequence[str], *, num_workers: int | None = None,
                cache: Path | None = None, progress: bool = False) -> dict[str, int]:
    """Pre-token counts of a file, chunk by chunk: memory holds the distinct words, never the text.
    The cache keeps the counts of the chunks done so far, for a run after an interruption."""
    chunks = chunks_of(path, special_tokens, CHUNK_BYTES)
    kept, meter = Kept(cache, [0, {}]), Progress("counting words", chunks[-1][1], shown=progress)
    known, counts = kept.value[0], Counter(kept.value[1])
    tasks = [(path, *chunk) for chunk in chunks[known:]]
    for done, new in enumerate(parallel_map(count_chunk, list(special_tokens), tasks, num_workers), known + 1):
        counts.update(new)
        meter.update(chunks[done - 1][1])
        kept.value = [done, counts]
        kept.save(now=done == len(chunks))
    return counts

def num_merges_for(vocab_size: int, special_tokens: Iterable[str]) -> int:
    fixed = 256 + len(set(special_tokens))
    if vocab_size < fixed:
        raise UserError(f"vocab_size {vocab_size} is too small: bytes and special tokens need {fixed}")
    return vocab_size - fixed

def train_bpe(input_path: PathLike, vocab_size: int, special_tokens: Sequence[str], *, num_workers: int | None = None,
              cache_dir: PathLike | None = None, progress: bool = False, seconds: dict[str, float] | None = None,
              on_merge: Callable[[Pair, int], None] = lambda *_: None) -> tuple[dict[int, bytes], list[Pair]]:
    """Train on a UTF-8 text; returns (vocab, merges), the merges in the order of their making.
    vocab_size counts all: id b is byte b, then comes an id for each merge, then the special tokens. A text too small
    for so many merges gives fewer, said in one line. cache_dir keeps word counts and merges as they come, for this
    text, any smaller vocab_size and a run after an interruption. seconds: gets each stage's time."""
    special_tokens, path, caches = list(dict.fromkeys(special_tokens)), Path(input_path), [None, None]
    num_merges, seconds = num_merges_for(vocab_size, special_tokens), {} if seconds is None else seconds
    text_size(path)
    if cache_dir is not None:
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, "sha256")
        key.update(json.dumps([PRETOKEN.pattern, CHUNK_BYTES, sorted(special_tokens)]).encode("utf-8"))
        caches = [Path(cache_dir) / f"{key.hexdigest()[:32]}.{kind}" for kind in ("counts", "merges")]
    kept = Kept(caches[1], [])  # bytes as latin-1
    if (known := len(kept.value)) < num_merges:
        started = time.perf_counter()
        counts = count_words(path, special_tokens, num_workers=num_workers, cache=caches[0], progress=progress)
        counted, meter = time.perf_counter(), Progress("merging pairs", num_merges, "merges", progress)
        numbers = itertools.count()
        def tell(pair: Pair, count: int) -> None:
            if next(numbers) >= known:  # to make the others again is cheaper than to look up where they stand
                kept.value.append([token.decode("latin-1") for token in pair])
                kept.save(now=False)
                meter.update(len(kept.value))
                on_merge(pair, count)
        try:
            train_vectorized(counts, num_merges, tell)
        finally:
            kept.save(now=True)
        meter.update(num_merges)
        seconds |= {"counting": counted - started, "merging": time.perf_counter() - counted}
    merges = [(left.encode("latin-1"), right.encode("latin-1")) for left, right in kept.value[:num_merges]]
    if len(merges) < num_merges:
        print(f"{path}: no pair is left after {len(merges):,} of {num_merges:,} merges", file=sys.stderr)
    vocab = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    vocab += [token for token in (special.encode("utf-8") for special in special_tokens) if token not in set(vocab)]
    return dict(enumerate(vocab)), merges

# --- 7. The tokenizer ---
Ranks = dict[tuple[int, int], tuple[int, int]]  # (left id, right id) -> (rank of the merge, id of the merged token)
def apply_merges(symbols: list[int], ranks: Ranks) -> list[int]:
    """Encode one pre-token. The definition: merge the pair of lowest rank wherever it stands, until no pair has one."""
    while (pair := min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, (NO_RANK,)), default=None)) in ranks:
        symbols = merge_pair(symbols, pair, ranks[pair][1])
    return symbols

NO_RANK = 1 << 62  # of a pair that is not merged
def printable_bytes() -> dict[int, str]:
    """GPT-2's characters for bytes in text files: printable ones stand for themselves, the other 68 are moved up.
    >>> "".join(printable_bytes()[byte] for byte in b"a b")
    'aĠb'
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}

class Tokenizer:
    """Text to ids and back by GPT-2's rules.
    vocab: id -> bytes; merges: pairs of bytes in the order of their making; special_tokens: strings that are one token
    each, the longest tried first. Those that the vocabulary lacks get the next ids.
    >>> vocab = dict(enumerate([b" ", b"a", b"c", b"e", b"h", b"t", b"th", b" c", b" a", b"the", b" at"]))
    >>> merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    >>> Tokenizer(vocab, merges).encode("the cat ate")
    [9, 7, 1, 5, 10, 3]
    """
    block = 1 << 14  # characters that encode_iterable waits for

    def __init__(self, vocab: Mapping[int, bytes], merges: Iterable[Pair],
                 special_tokens: Iterable[str] | None = None) -> None:
        self.vocab, self.merges = dict(sorted(vocab.items())), list(merges)
        self.special_tokens = list(dict.fromkeys(special_tokens or ()))
        self.token_ids = {token: token_id for token_id, token in self.vocab.items()}
        for token in (special.encode("utf-8") for special in self.special_tokens):
            self.vocab.setdefault(self.token_ids.setdefault(token, self.vocab_size), token)
        self._ranks: Ranks = {}
        try:
            for rank, (left, right) in enumerate(self.merges):
                merged = rank, self.token_ids[left + right]
                self._ranks.setdefault((self.token_ids[left], self.token_ids[right]), merged)
        except KeyError as error:
            raise UserError(f"a merge needs {error}, which the vocabulary lacks: the files are damaged or not of one "
                            "tokenizer; restore them, or train the tokenizer anew") from None
        self._byte_ids = np.array([self.token_ids.get(bytes([byte]), -1) for byte in range(253)] + [-1] * 3)
        self._merged = np.array([self.token_ids[left + right] for left, right in self.merges], np.int64)
        # pairs as left << 32 | right, sorted, and their ranks; one pair behind all ends every search
        self._sorted_pairs = np.array([left << 32 | right for left, right in sorted(self._ranks)] + [1 << 62])
        self._sorted_ranks = np.array([self._ranks[pair][0] for pair in sorted(self._ranks)] + [NO_RANK])
        self._special_ids = {special: self.token_ids[special] for special in map(str.encode, self.special_tokens)}
        self._specials = special_pattern(self.special_tokens)
        self._known = None  # or the pieces that were encoded, where the ids of each number begin, and all these ids

    def __getstate__(self) -> dict[str, Any]:  # for other processes, while this one may be changing what it knows
        return {**vars(self), "_known": None}

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id: the rows that an embedding needs."""
        return max(self.vocab, default=-1) + 1

    def hash(self) -> str:
        """SHA-256 of all that decides the ids; token arrays and checkpoints remember it."""
        vocab = [[token_id, token.hex()] for token_id, token in self.vocab.items()]
        merges = [[left.hex(), right.hex()] for left, right in self.merges]
        return hashlib.sha256(json.dumps([vocab, merges, self.special_tokens]).encode("ascii")).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids as uint32. Each distinct piece is encoded once and its ids copied to wherever it stands."""
        try:
            data, result = text.encode("utf-8"), [np.empty(0, np.uint32)]
        except UnicodeEncodeError:  # half of a surrogate pair is no character and has no bytes: U+FFFD, as in tiktoken
            return self.encode_array(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        for block in blocks_of(data, self.special_tokens):
            # subtle: taken out while it is changed, so that nobody finds it half done after an error or in a thread
            pieces, begin, ids = vars(self).pop("_known", None) or (Pieces(), np.zeros(1, int), np.empty(0, np.uint32))
            new, number = pieces.numbers(*block)
            if new:
                more, end = self._encode_pieces(new)
                begin, ids = np.append(begin, end + begin[-1]), np.append(ids, more)
            if len(ids) < 2_000_000:  # some 60 MB; starting anew is cheaper than keeping track of age
                self._known = pieces, begin, ids
            length = begin[number + 1] - begin[number]
            end = np.cumsum(length)
            result.append(ids[np.repeat(begin[number] - end + length, length) + np.arange(end[-1])])
        return np.concatenate(result)

    def _encode_pieces(self, pieces: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of some pieces, one behind the other, and where each ends: apply_merges of all pre-tokens together.
        They stand in one array as in training, with the byte 254 around pieces, 255 between pre-tokens of one and 253
        for a special token. A round merges the pair of lowest rank in each; those without such a pair leave."""
        words = [[b"\xfd"] if piece in self._special_ids else pretokens_of(piece) for piece in pieces]
        text = np.frombuffer(b"\xfe".join([b"", *map(b"\xff".join, words), b""]), np.uint8)
        token, stands = self._byte_ids[text], np.ones(len(text), bool)
        token[text == 253] = [self._special_ids[piece] for piece in pieces if piece in self._special_ids]
        if lacking := set(text[(token < 0) & (text < 253)].tolist()):
            raise UserError(f"this vocabulary lacks the byte 0x{min(lacking):02x}: take a tokenizer with all 256 bytes")
        at, begin = np.arange(len(text)), np.flatnonzero(text > 253)  # a word begins with what stands before it
        def ranks(place: np.ndarray) -> np.ndarray:
            # subtle: counted from the end, the first byte comes behind the last; it is a border, which is in no pair
            pair = token[at[place]] << 32 | token[at[place + 1 - len(at)]]
            found = np.searchsorted(self._sorted_pairs, pair)
            return np.where(self._sorted_pairs[found] == pair, self._sorted_ranks[found], NO_RANK)
        rank = ranks(at)
        while len(at):
            size = np.diff(begin, append=len(at))
            lowest = np.repeat(np.minimum.reduceat(rank, begin), size)
            stays = lowest < NO_RANK
            left = np.flatnonzero((rank == lowest) & stays)
            index = np.arange(len(left))  # a a a holds two such pairs: in a run every second is merged
            left = left[(index - np.maximum.accumulate(np.where(np.diff(left, prepend=-2) > 1, index, 0))) % 2 == 0]
            token[at[left]], stands[at[left + 1]], stays[left + 1] = self._merged[rank[left]], False, False
            size, place = np.add.reduceat(stays, begin, dtype=np.int64), np.cumsum(stays)[left] - 1
            at, rank, begin = at[stays], rank[stays], np.cumsum(size[size > 0]) - size[size > 0]
            rank[place], rank[place - 1] = ranks(place), ranks(place - 1)
        stands &= text < 254
        return token[stands].astype(np.uint32), np.cumsum(stands)[text == 254][1:]

    def encode_iterable(self, strings: Iterable[str]) -> Iterator[int]:
        """The ids of "".join(strings), lazily, with memory for the longest pre-token but not for the text."""
        text, wanted = "", self.block
        for string in strings:
            text += string
            if len(text) >= wanted:
                end = self._settled(text)
                yield from self.encode(text[:end])
                text = text[end:]
                wanted = max(self.block, 2 * len(text))  # or one endless word in small strings would cost its square
        yield from self.encode(text)

    def _settled(self, text: str) -> int:
        """How much of a text that may go on can be encoded now: to its last border, or to the end of a special token.
        subtle: to encode line by line is wrong. The first two of three line ends are one token in GPT-2, and "<|endof"
        may be the beginning of a special token, or of a longer one."""
        beginnings = (special[:length] for special in self.special_tokens for length in range(1, len(special)))
        undecided = len(text) - max((len(part) for part in beginnings if text.endswith(part)), default=0)
        found = self._specials.finditer(text)
        end = max((match.end() for match in found if match.start() < undecided), default=0)
        border = LAST_BORDER.search(text, end, max(end, undecided))
        return border.start() if border else end

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are no UTF-8, as where ids end within a character, become U+FFFD."""
        try:
            return b"".join([self.vocab[int(token_id)] for token_id in ids]).decode("utf-8", errors="replace")
        except KeyError as error:
            raise UserError(f"no token has the id {error}: this vocabulary ends at {self.vocab_size - 1}") from None

    def save(self, directory: PathLike) -> None:
        """Write GPT-2's vocab.json and merges.txt, and tokenizer.json for the Hugging Face `tokenizers` package."""
        directory, character = Path(directory), printable_bytes()
        written = {token: "".join(character[byte] for byte in token) for token in self.vocab.values()}
        if len(written) < len(self.vocab):
            raise UserError("the same bytes have several ids here, which vocab.json cannot express")
        vocab = {written[token]: token_id for token_id, token in self.vocab.items()}
        merges = [(written[left], written[right]) for left, right in self.merges]
        specials = {self.token_ids[special.encode("utf-8")]: special for special in self.special_tokens}
        named = {specials.get(token_id, token): token_id for token, token_id in vocab.items()}  # specials as they are
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": token_id, "content": special, **flags} for token_id, special in sorted(specials.items())]
        splitter = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        write_json(directory / "vocab.json", vocab)
        with write_atomically(directory / "merges.txt") as file:
            check = Tokenizer(self.vocab, self.merges).hash()
            file.writelines([f"{VERSION} sha256:{check}\n", *(f"{left} {right}\n" for left, right in merges)])
        model = {"type": "BPE", "vocab": named, "merges": merges}
        write_json(directory / "tokenizer.json", {"version": "1.0", "added_tokens": added, "normalizer": None,
                   "pre_tokenizer": splitter, "decoder": splitter, "model": model})

    @classmethod
    def from_files(cls, vocab_path: PathLike, merges_path: PathLike,
                   special_tokens: Iterable[str] | None = None) -> "Tokenizer":
        """Read vocab.json and merges.txt, those of save() or GPT-2's own."""
        with _explained(f"{vocab_path} or {merges_path}"):
            vocab = json.loads(Path(vocab_path).read_text(encoding="utf-8"))
            lines = Path(merges_path).read_text(encoding="utf-8").split("\n")
            version = lines.pop(0) if lines[0][:1] in ("#", "") else VERSION
            return cls(*_from_printable(vocab, [line.split(" ") for line in lines if line], version), special_tokens)

    @classmethod
    def load(cls, directory: PathLike) -> "Tokenizer":
        """Read tokenizer.json with its special tokens: that of save(), or any plain byte-level BPE."""
        path = Path(directory) / "tokenizer.json"
        with _explained(path):
            theirs = json.loads(path.read_text(encoding="utf-8"))
            model, splitter = theirs["model"], theirs["pre_tokenizer"] or {"type": None}
            plain = {"BPE", "ByteLevel"} == {model.get("type", "BPE"), splitter["type"]} and not theirs["normalizer"]
            if not plain or splitter["add_prefix_space"] or not splitter.get("use_regex", True):
                raise UserError(f"{path} is no plain byte-level BPE: one with a normalizer or splitter cannot be used")
            specials, character = {token["id"]: token["content"] for token in theirs["added_tokens"]}, printable_bytes()
            vocab = {token: token_id for token, token_id in model["vocab"].items() if token_id not in specials}
            for token_id, special in specials.items():
                vocab["".join(character[byte] for byte in special.encode("utf-8"))] = token_id
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]  # old files, new
            beside = path.with_name("merges.txt")
            version = beside.read_text(encoding="utf-8").split("\n")[0] if beside.exists() else VERSION
            return cls(*_from_printable(vocab, pairs, version), specials.values())

@contextlib.contextmanager
def _explained(files: Any) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): give the place of a tokenizer") from None
    except Exception:  # JSON from nowhere can hold anything
        raise UserError(f"{files} is damaged or not of a tokenizer: restore it, or train the tokenizer anew") from None

VERSION = "#version: 0.2"  # the first line of GPT-2's merges.txt; save() adds a checksum
def _from_printable(vocab: dict[str, int], pairs: Iterable[Sequence[str]],
                    version: str) -> tuple[dict[int, bytes], list[Pair]]:
    """Vocabulary and merges as bytes again; an exception where ids fit in no array, or version, the first line of
    merges.txt, tells of another content."""
    byte_of = {character: byte for byte, character in printable_bytes().items()}
    tokens = {int(token_id): bytes(byte_of[character] for character in token) for token, token_id in vocab.items()}
    merges = [tuple(bytes(byte_of[sign] for sign in token) for token in (left, right)) for left, right in pairs]
    valid = len(tokens) == len(vocab) > 0 <= min(tokens) <= max(tokens) < 1 << 31
    if not (valid and (version == VERSION or "huggingface" in version
                       or version == f"{VERSION} sha256:{Tokenizer(tokens, merges).hash()}")):
        raise ValueError("damaged")
    return tokens, merges

# --- 8. From text to token arrays ---
def encode_chunk(tokenizer: Tokenizer, dtype: str, path: Path, start: int, end: int) -> bytes:
    return tokenizer.encode_array(read_text(path, start, end)).astype(dtype).tobytes()

def encode_file(tokenizer: Tokenizer, text_path: PathLike, npy_path: PathLike, *, num_workers: int | None = None,
                progress: bool = False) -> int:
    """Encode a text file into an array of ids on disk; returns their number.
    uint16 holds the ids of 65,536 tokens in half the space of uint32. The array is written chunk by chunk and never
    held whole. x.json beside x.npy tells load_tokens whose ids they are."""
    text_path, npy_path = Path(text_path), Path(npy_path)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
    chunks, source = chunks_of(text_path, tokenizer.special_tokens, CHUNK_BYTES), file_identity(text_path)
    meter, started = Progress(f"encoding {text_path.name}", source["bytes"], shown=progress), time.perf_counter()
    tasks, header = [(dtype.str, text_path, *chunk) for chunk in chunks], {"descr": dtype.str, "fortran_order": False}
    with write_atomically(npy_path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (0,)})  # padded, so that any count will fit
        begin, check = file.tell(), zlib.crc32(dtype.str.encode("ascii"))
        for (_, end), ids in zip(chunks, parallel_map(encode_chunk, tokenizer, tasks, num_workers)):
            file.write(ids)
            check = zlib.crc32(ids, check)
            meter.update(end)
        count = (file.tell() - begin) // dtype.itemsize
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count,)})
        npy_path.with_suffix(".json").unlink(missing_ok=True)  # an array without one counts as missing
    seconds = time.perf_counter() - started
    write_json(npy_path.with_suffix(".json"), {
        "tokens": count, "crc32": check, "tokenizer_hash": tokenizer.hash(), "vocab_size": tokenizer.vocab_size,
        "source": source, "bytes_per_token": source["bytes"] / count, "tokens_per_second": count / seconds})
    return count

def load_tokens(npy_path: PathLike, tokenizer: Tokenizer) -> np.ndarray:
    """Open an array of encode_file by mmap, after a look at whose ids they are and one reading for the checksum."""
    facts, again = read_json(Path(npy_path).with_suffix(".json")), f"remove {npy_path} and prepare the data again"
    try:
        tokens = np.load(npy_path, mmap_mode="r", allow_pickle=False)
        check = zlib.crc32(tokens, zlib.crc32(tokens.dtype.str.encode("ascii")))
    except Exception as error:  # a damaged header can end in an error of any kind
        raise UserError(f"cannot read {npy_path} ({error}): {again}") from None
    if [tokenizer.hash(), *tokens.shape, check] != [facts.get(key) for key in ("tokenizer_hash", "tokens", "crc32")]:
        raise UserError(f"{npy_path} was not encoded with this tokenizer, or is damaged: {again}")
    return tokens

# --- 9. A built-in corpus: stories ---
# Children's stories of about 130 words, drawn from a grammar with memory: a `{name}` is drawn once a story, every
# row of its rule equally likely, and says the same whenever it comes back. That memory is what a model has to learn.
#   name = red blue dark_green;    a list of words (`_` is a space)       name: row | row;    a list of phrases
#   who/his = Lily/her Tom/his     columns, drawn together                (x|y|)              a rule without a name
#   {trait2}  another draw from `trait`, never the same row twice         {He} {a trait}      capital letter, a or an
# So the probability of a story is a product of 1/n, one factor a draw, and its logarithm is known exactly.
GRAMMAR = """
story: {open} {plot}; plot: {lost} | {broken} | {noise} | {trouble} | {quarrel} | {gift}; open: {once} {a trait},
{trait2} {child} (called|named) {hero} lived in {a look} {home} {near} {a look2} {place}. {like}; once: Once upon a
time, | Long ago, | Far away, | Once, | Years ago, | Not far away, | Over the hills, | Up north, | Down south, | Over
the sea, | Out west, | Last year,; like: {He} {loved} {hobby}, {his} {colour} {garment} and {taste} {treat}. | {He} had
{a colour} {garment} and {number} {trait3} {siblings}, and {loved} {hobby}.; meet: (Along|Soon|Then|Up|By and by) came
{pet}, {a trait4} {animal} in {a colour2} {garment2}, and {asked}, "Why so {sad}?"; day: {one} {daytime}; feast: They
{shared} {taste2} {treat2} and {taste3} {treat3} {near2} {a look3} {spot3}.; ever: From then on, | After that, | Ever
after, | Afterwards,; lost: {day}, {hero} took {a quality} {colour4} {thing} to {a look4} {place2}, but lost it, because
{loss}. {He} looked {near3} the {spot} and {near4} the {spot2}, but found only {a state} {junk}, {a state2} {junk2} and
{a state3} {junk3}. {meet} "I lost my {thing}, because {loss}," {said} {hero}. The {animal} {adverb} found it in {a
look5} {spot4}. "{hooray}, {pet}! Now I can {use} it," {cried} {hero}. {feast} {ever} {he} {care}.; loss/care: the {bag}
had {a size} hole/mended holes with {colour3} {stuff} | the {bag} was (much|far) too full/checked the {bag} every
{weekday} | nobody had closed the {bag}/closed the {bag} {adverb2} | the {strap} of the {bag} broke/never used {a
state4} {strap} again | {a scary} {thief} took it/gave the {thief} {taste4} {treat4} every {weekday} | a {gale} blew it
away/stayed at home in every {gale} | the (road|path) was so bumpy/took the road by the {place3}; broken: {hero} had {a
quality} {colour6} {toy}. {day} its {part} broke, because {damage}. {He} tried {stuff}, {stuff2} and {colour3} {stuff3},
but nothing held. {meet} "My {toy} broke, because {damage}," {said} {hero}. The {animal} {adverb} fetched {a trait5}
{worker}, who took {a state} {tool}, {a state2} {tool2} and {colour4} {stuff4} and mended the {part}. "{hooray}!"
{cried} {hero}, and gave {pet} {taste2} {treat2} and the {worker} {taste3} {treat3}. {ever} {he} {mend}.; damage/mend:
it fell (off|from) {a state3} {furniture}/kept the {toy} (away|far) from the {furniture} | it stood in the {wet}/kept
the {toy} out of the {wet} | {a trait6} {beast} sat on it/let no {beast} near the {toy} | nobody had oiled it/oiled the
{part} every {weekday} | {a state3} screw was (loose|missing)/checked the screws {adverb2} | the frost cracked it/kept
the {toy} in {a colour5} blanket | {a trait6} {thief} chewed it/hid the {toy} from every {thief}; noise: {one} night,
{hero} could not sleep, because the {room} went "{sound}, {sound}". {He} thought of {a scary} {monster} with {colour2}
{feature} and {scary2} {feature2}. {He} woke {pet}, {his} {trait4} {animal}. "Why so {sad}?" {asked} {pet}. "The {room}
goes {sound}, {sound}," {said} {hero}. With {a state} {lamp} they {crept} {adverb} past {a state2} {furniture}, {a
look3} {furniture2}, {a state3} {junk} and {a state4} {junk2}. It was no {monster}, only {source}! "{hooray}!" {cried}
{hero}, and {fix}. They {shared} {taste2} {treat2} and {taste3} {treat3} in bed, and {hero} and {pet} dreamed of {a
quality} {colour4} {thing} and {a quality2} {thing2}.; one: One {weather}; sound/source/fix: drip/a leaky tap/put {a
state5} {container} under it | creak/a rusty hinge/oiled it {adverb2} | tap/a branch at the window/tied it back with
{colour3} {strap} | rattle/a loose shutter/closed it {adverb2} | buzz/a bee in a {container}/let it fly to the {place3}
| squeak/a mouse in a {container}/gave it {taste4} {treat4} | flap/{a colour3} curtain/closed the window {adverb2} |
snore/{his} {trait5} {relative}/fetched {a colour3} blanket | tick/an old clock/wrapped it in {a colour3} towel | hiss/a
kettle on a stove/made {taste4} tea | thump/a ball on the stairs/put it in {a state5} {container} | scratch/a cat behind
a door/gave it {taste4} {treat4} | hoot/an owl in a {container}/waved to it {adverb2} | plop/a frog in a
{container}/carried it to the {place3} | rustle/a hedgehog in a {container}/led it to the {place3} | clang/a pan on a
hook/took it down {adverb2}; trouble: {day}, by {a look3} {place2}, {he} met {pet}, {a trait4} {animal} in {a colour2}
{garment2}. "Why so {sad}?" {asked} {hero}. "Because {problem}," {said} {pet}. {hero} {adverb} fetched {a state} {tool},
{a state2} {tool2} and {colour3} {stuff}, and they {solve}. "{hooray}!" {cried} {pet}, and gave {hero} {a quality}
{colour4} {thing}. {feast} That (evening|night) {his} {trait6} {relative} saw the {colour4} {thing}. "{pet} gave it to
me, because I helped when {problem}," {beamed} {hero}.; problem/solve: the (rain|river) flooded the {den}/dug {a look4}
ditch | the (wind|storm) took the {den}/built one by the {spot} | {a trait5} {beast} ate the {treat4}/baked {taste4}
{treat4} | the (fire|lamp) in the {den} went out/lit {a quality2} lamp | the key of the {den} fell in {a look4}
(well|hole)/pulled it up with {a state3} {container} | thorns (hid|covered) the {den}/cut {a look4} path to it | the bed
in the {den} broke/made one of {stuff2} | the door of the {den} was stuck/pushed it {adverb3} | the roof of the {den}
fell in/made one of {stuff2}; quarrel: {His} best friend was {pet}, {a trait4}, {trait6} {animal} in {a colour2}
{garment2}. {day}, {near3} {a look4} {spot}, they found {a quality} {colour4} {thing}. Both wanted it, because {reason}.
"It is mine!" {snapped} {hero}. "No, mine!" {snapped2} {pet}. {hero} ran home with it and tried {hobby2} and {hobby3},
but felt {sad}. So {he} packed {taste2} {treat2}, {taste3} {treat3} and {taste4} {treat4} and {went} back {adverb}.
"Sorry! I took the {thing}, because {reason}," {said} {hero}. "Sorry too," {said2} {pet}. They {shared} it all {near2}
{a look5} {spot2}. {ever} both could {use} it.; reason: it shone like {gem} | it smelled of {taste5} {treat5} | {a
trait5} {worker} had one | {a trait5} {royal} had made it | it looked so {quality2} | it was brighter than {gem} | it
came from {a look3} {place3}; gift: {hero} wanted to buy {a quality} {colour5} {thing} for {pet}, {a trait4} {animal} in
{a colour2} {garment2}. But {his} {bag} was empty, because {spent}. "Why so {sad}?" {asked} {his} {trait6} {relative}.
"Make one!" So {hero} took {colour3} {stuff}, {colour4} {stuff2}, {a state} {tool} and {a state2} {tool2} and worked
{adverb}. {one} {weekday} {he} {went} to {pet} with it in {a state3} {container}. "I made the {thing}, because {spent},"
{said} {hero}. "{hooray}! Now I can {use} it," {cried} {pet}. {feast} {ever} {he} {save}.; spent/save: the money went on
{a look4} {garment3}/bought no {garment3} again | {a scary} {thief} took the money/hid the money from every {thief} |
the coins fell down {a look4} drain/kept coins in {a state4} {container} | the money went to {a trait5} {worker}/saved
some coins for the {worker} | the {bag} had {a size} hole/sewed up the {bag} {adverb2} | the {taste4} {treat4} cost so
much/ate less {treat4}; wet = rain snow mud sun; gale = storm gale whirlwind hurricane blizzard breeze;
hero/child/he/his/him = {girl}/girl/she/her/her {boy}/boy/he/his/him; girl = Ada Alice Amy Anna Ava Bella Beth Cara
Clara Cleo Daisy Dora Ella Elsie Emma Eva Fay Flora Gwen Hana Holly Ida Iris Isla Jane Jill Josie June Kate Kim Lena
Lily Lola Lucy Mabel Maya Meg Mia Molly Nell Nina Nora Penny Polly Rosa Ruby Sally Sara Sofia Sue Tess Tina Una Vera
Wendy Yara Zoe Zuri; boy = Adam Alfie Arlo Ben Bill Bruno Carl Cody Dan David Eli Emil Felix Finn Fred George Gus Hal
Hans Henry Hugo Ian Ivan Jack Jake Jim Joe Jonas Karl Ken Kit Leo Liam Luke Max Milo Ned Nico Noah Olaf Omar Oscar Otto
Owen Paul Pete Ravi Rob Sam Ted Theo Tim Tom Toby Victor Will Yusuf Zac; pet = Acorn Bean Biscuit Bramble Bubble Clover
Cocoa Dotty Dusty Fern Fidget Fluff Fudge Ginger Inky Jelly Maple Mitten Moss Muffin Nibble Noodle Nutmeg Patch Peanut
Pebble Pepper Pickle Pip Plum Raisin Rusty Scout Smudge Snowy Speck Sprout Sunny Tansy Teasel Thistle Toffee Tuft Twig
Waffle Willow Ziggy Zippy; animal = rabbit squirrel hedgehog mouse fox owl frog duck goose turtle snail mole otter
beaver deer lamb pony donkey goat kitten puppy robin crow swan bat bee butterfly beetle lizard parrot penguin bear
raccoon dragonfly cricket weasel moth toad crab worm badger seal hamster ladybird newt stork pigeon koala kangaroo
piglet chick foal dormouse gecko; trait = kind brave clever curious gentle careful shy stubborn lively helpful patient
dreamy playful bold quiet funny sensible friendly hopeful eager restless polite proud neat messy tidy loyal daring witty
bashful sleepy grumpy jolly wise young cautious fearless fussy gallant humble lazy lucky modest nosy plucky sincere
skilful talented trusty chatty earnest nimble dainty hungry ticklish stylish musical calm cheeky fair fond frank merry
mild noble perky plump quick rude sly smart snooty tender thrifty timid tireless vain whimsical worldly zany; look =
crooked narrow mossy dark sunny ancient enormous hidden famous noisy grand lonesome shady peaceful mysterious pleasant
deserted crowded huge small large haunted cosy dreary secret remote popular bleak spotless wide tall cold unknown frosty
snowy foggy dusty quaint colossal damp misty low vast windy leafy muddy private public sandy simple stately silvery
stony ruined rosy royal draughty grim mighty wild lovely exotic rustic humble ugly odd; home = house cottage cabin
farmhouse lighthouse windmill caravan tower bungalow hut mill inn barn houseboat castle tent palace lodge villa chalet
mansion shed bakery treehouse igloo wigwam; near = near by beside behind; place = river orchard beach forest meadow lake
market harbour station hill park pond library farm zoo island cave bridge field vineyard school church museum canal
quarry marsh theatre airport circus waterfall playground village valley swamp mountain desert jungle hospital chapel
monastery volcano glacier moor racetrack; weather = sunny rainy windy cloudy stormy chilly warm hot cool grey icy breezy
drizzly crisp mild glorious golden wet sweltering blustery bright dull fine humid hazy freezing scorching; daytime =
morning afternoon Monday Tuesday Wednesday Thursday Friday Saturday Sunday; weekday = Monday Tuesday Wednesday Thursday
Friday Saturday Sunday; relative = mother father grandmother grandfather aunt uncle cousin brother sister neighbour
teacher godmother stepfather nephew niece nanny; number = two three four five six seven eight; siblings = brothers
sisters cousins goldfish hamsters hens sheep canaries ponies rabbits tortoises aunts uncles spaniels poodles geese cats
dogs twins pigs owls mice goats nieces; loved = loved liked enjoyed; hobby = painting singing dancing swimming reading
baking knitting drawing cycling fishing gardening sewing skating sailing juggling hiking acting cooking camping sledging
stargazing rowing wrestling yodelling carving daydreaming exploring inventing counting humming gossiping weaving surfing
skiing pottery chess hopscotch tennis football cricket golf ballet archery poetry hockey karate art darts drama history
judo jokes maths music puppets riddles rugby science tag yoga; colour = red blue green purple orange pink brown black
white violet turquoise crimson scarlet lilac maroon beige silver emerald striped spotted yellow tartan mauve bronze navy
amber indigo coral ivory checked grey golden tan teal lime rose plum ruby khaki cream; garment = coat hat scarf jacket
jumper cap cloak shawl sweater vest cape raincoat shirt beret apron poncho cardigan waistcoat hood tunic sash collar
bandana kerchief nightcap overcoat robe parka anorak blazer turban headband belt pullover sunhat fleece jersey bow_tie;
went = went walked ran hurried strolled wandered skipped marched raced cycled; thing/use = kite/fly drum/beat
ball/bounce book/read flute/play boat/sail bell/ring crown/wear doll/hug hoop/roll puzzle/solve map/follow coin/spend
marble/flick telescope/aim hammer/swing compass/consult clock/wind lamp/light umbrella/open mirror/polish jigsaw/finish
guitar/strum balloon/hold locket/unlock medal/show necklace/admire torch/shine boomerang/throw scooter/ride wagon/pull
rocket/launch trumpet/blow magnet/test pencil/sharpen camera/use basket/fill pillow/squeeze rattle/shake puppet/move
sledge/steer carpet/unroll ladder/climb cup/drink_from chair/sit_on pen/write_with; quality = shiny little new bright
tiny beautiful handsome polished precious splendid fancy dazzling glittering elegant pretty smooth lovely marvellous
remarkable peculiar heavy rare sturdy colourful perfect strange foreign gorgeous charming wonderful unusual modern
glossy wooden painted curious gleaming delicate exquisite fine dear neat magic costly jolly lucky special sparkly
stylish superb valuable solid slender charmed clean; sad = sad upset gloomy worried miserable unhappy lonely glum
troubled sorrowful tearful downcast anxious pale silent dejected mournful wretched fretful sulky forlorn wistful
heartbroken flustered crestfallen melancholy cross bitter; treat = pancakes waffles soup toast honey jam biscuits
porridge cherries plums pears strawberries raspberries blueberries noodles dumplings pies buns cookies doughnuts custard
jelly pudding cheese popcorn nuts sandwiches tarts cakes lemonade cocoa milk juice tea cider bread butter salad rice
beans sausages omelettes crackers pretzels peaches apricots raisins marzipan fudge spaghetti pizza yoghurt grapes figs
olives chestnuts gingerbread lasagne curry stew; taste = warm sweet fresh creamy fruity tasty cold yummy plain salty
tangy rich chilled delicious homemade spicy leftover heavenly peppery minty lemony gingery smoky nutty honeyed buttery
thin thick light dark bitter bland French Greek Italian Turkish Spanish Mexican Indian Dutch Swiss Polish Danish Welsh
Irish Russian sour pale soft; stuff = glue string tape wire ribbon rope straw wool wax clay felt cardboard leather
velvet thread bark tin foil canvas cork paste wood cloth paper silk chalk plaster cotton linen varnish plastic rubber
cord fur gum lace mud paint satin tweed twine yarn; tool = saw brush spanner chisel needle file drill axe knife ruler
spade rake shovel hook trowel whisk screwdriver crowbar sieve pitchfork mallet hoe broom hatchet wheelbarrow sickle
toothpick awl fan jack lever net pick pin plane sponge vice wedge winch pulley; adverb = slowly quietly carefully
eagerly calmly bravely patiently cheerfully hopefully busily nervously politely wisely happily gladly firmly gracefully
stubbornly sensibly proudly solemnly dreamily promptly gently softly shyly boldly kindly swiftly secretly earnestly
faithfully briskly cleverly coolly daintily deftly fondly freely humbly keenly merrily neatly nimbly readily silently
smartly steadily tenderly warmly; spot = barrel bench bush cart crate fence gate hedge log oak pine rock swing statue
table haystack wall woodpile willow chestnut fountain signpost boulder birch pump trough henhouse greenhouse lilac
lamppost thornbush stump scarecrow birdbath sundial beehive maple hammock flagpole wheelbarrow; state = rusty muddy
dirty faded battered worn cracked chipped grubby ugly scratched shabby greasy sandy sooty smelly stained spare sticky
weathered dented grimy patched scorched tarnished bent humble clumsy dull cheap wobbly dusty wet oily mouldy slippery
dingy blunt crusty filthy gritty grey lumpy musty odd old stiff tatty drab; junk = boot spoon bottle brick button comb
fork jar jug kettle lid mug nail pipe plate saucepan teapot teacup thimble tyre wheel chain doorknob colander cog anchor
flowerpot tray helmet ladle funnel padlock bolt hairpin birdcage goblet pulley tap typewriter key cork coin bead peg
tube pan pot plug shoe lens mop dish clog; bag = bag pocket basket purse suitcase satchel rucksack backpack knapsack;
strap = strap handle string buckle clasp; thief = magpie fox jackdaw monkey crow raccoon rat pirate goblin burglar;
toy/part = wagon/wheel bicycle/chain swing/seat boat/mast robot/arm umbrella/rib tent/pole doll/head puppet/leg
clock/spring piano/pedal windmill/blade guitar/neck kite/tail scooter/brake lamp/switch drum/skin dollhouse/roof
carousel/horse telescope/lens violin/bow wheelchair/brake; beast = cow pig elephant goat bull sheep horse camel hippo
walrus moose llama; worker = carpenter blacksmith baker farmer fisherman tailor miller sailor painter plumber doctor
postman potter cobbler jeweller mechanic gardener builder miner shepherd captain librarian woodcutter locksmith juggler;
furniture = table wardrobe sofa cupboard bookcase desk stool armchair dresser cradle mattress bathtub stove shelf piano
fireplace sideboard hatstand; room = attic cellar kitchen hall pantry bathroom garage workshop hallway laundry nursery
parlour; scary = hairy giant slimy fierce wicked horrible terrible frightening awful dreadful monstrous gigantic
ghastly; monster = dragon ghost ogre witch troll vampire wolf crocodile wizard spider robber python tiger skeleton;
feature = teeth eyes claws ears horns fangs feet wings toes whiskers eyebrows elbows spikes scales nostrils; lamp = lamp
candle lantern torch; crept = crept tiptoed sneaked crawled; container = bucket box jar pot tub bowl chest tin drawer
pail barrel vase; den = den nest burrow tunnel hut treehouse; gem = diamonds rubies emeralds pearls stars sunshine
moonlight glass snow gold silver sapphires fire jewels; royal = king queen prince princess emperor knight duke; asked =
asked wondered enquired; said = said replied answered whispered sighed murmured sniffed mumbled admitted groaned sobbed
muttered; beamed = said beamed smiled answered replied laughed explained declared chuckled grinned; snapped = snapped
shouted yelled cried growled hissed called screamed; cried = cried shouted laughed cheered exclaimed sang squealed
called yelled giggled; hooray = Hooray Wonderful Hurrah Splendid Marvellous Perfect Goodness Fantastic Bravo Yippee
Terrific Brilliant Superb Great Super Amazing; shared = shared ate had; size = big small wide long nasty secret;"""

Cell = str | tuple  # a word, or a tuple of text and slots; a slot is (form, name): {a trait} is ("a", "trait")
STORY = (("", "story"),)  # where every derivation begins
@functools.cache
def _rules() -> dict[str, tuple[list[str], list[tuple[Cell, ...]], tuple]]:
    """Compile the grammar: the name in a slot -> (all columns drawn with it, rows, key of the rows already taken)."""
    lines = {}
    for head, sign, body in re.findall(r"([\w/]+)(:|\s=)\s([^;]+);", GRAMMAR):
        if sign != ":":
            lines[head] = [word.replace("_", " ") for word in body.split()]
            continue
        body = " ".join(body.split())
        while group := re.search(r"\(([^()]*)\)", body):  # (x|y|) becomes a rule of its own
            lines[name := f"{len(lines)}~"] = group[1].split("|")
            body = f"{body[:group.start()]}{{{name}}}{body[group.end():]}"
        lines[head] = body.split(" | ")
    def slot(text: str) -> tuple[str, str]:
        form, _, name = text.rpartition(" ")
        return form or ("A" if name[0].isupper() else ""), name.lower()
    def cell(text: str) -> Cell:
        pieces = re.split(r"\{(.*?)\}", text)
        parts = tuple(slot(piece) if place % 2 else piece for place, piece in enumerate(pieces) if piece)
        return parts if len(pieces) > 1 else text
    rules = {}
    for head, rows in lines.items():
        columns, rows = head.split("/"), [tuple(map(cell, row.split("/"))) for row in rows]
        for name in columns:
            for suffix in ("", *"23456"):
                rules[name + suffix] = [column + suffix for column in columns], rows, (head,)
    return rules

def _say(form: str, word: str) -> str:
    """The word as the slot wants it: with its article (form a), with a capital letter (form A), or as it is."""
    articled = ("an " if word[0] in "aeiou" else "a ") + word if form == "a" else word
    return articled[0].upper() + articled[1:] if form == "A" else articled

def _write(parts: tuple, memory: dict, draw: Callable[[], float]) -> tuple[str, float]:
    """Spell out `parts`, drawing what `memory` does not hold yet: the text and -log p of the draws.
    `memory` maps each name drawn so far to its cell, and each list (in a tuple of one) to the rows taken from it."""
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
    """-log p of every derivation of `text`: the same walk, but it follows each row that agrees with the text.
    A word that disagrees ends a branch at once, so few are ever open; what is still to be read is a linked list."""
    stack = [((*STORY, ()), 0, {}, 0.0)]  # (what is still to be read, from where, memory, nats so far)
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
        yield _write(STORY, {}, random.Random(f"{seed} {number}").random)[0]

def story_nats(text: str) -> float:
    """-log p of `text` under the grammar, which no model can beat on average; ValueError if it is not a story."""
    if (nats := next(_read(text), None)) is None:  # the only one: no text has two derivations
        raise ValueError("this text is not one of the built-in stories: the grammar cannot write it")
    return nats

# --- 10. A built-in corpus: arithmetic ---
# Problems whose answers can be checked to the letter: sums in digits and words, stories with numbers, chains of rules.
# Problem n is a pure function of (seed, n). A prompt is its question and a line end; the text must end with the answer.
NAMES, THINGS = "Ada Ben Cleo Dan Eva Finn Gita Hugo Iris Jon".split(), "apples books coins shells stamps".split()
KINDS = "blick dax fep gazzer kiki lorp mib toma wug zav".split()
UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
Problem = namedtuple("Problem", "question work answer")
def in_words(number: int) -> str:
    if number >= 100:
        return f"{UNITS[number // 100]} hundred" + (f" and {in_words(number % 100)}" if number % 100 else "")
    tens, rest = TENS[number // 10 - 2], number % 10
    return UNITS[number] if number < 20 else f"{tens}-{UNITS[rest]}" if rest else tens

def arithmetic_problems(seed: int, first: int = 0) -> Iterator[Problem]:
    for number in itertools.count(first):
        rng = random.Random(f"arithmetic {seed} {number}")
        form = rng.choice(("digits", "words", "story", "logic"))
        a, b, c = rng.randint(100, 999), rng.randint(10, 99), rng.randint(2, 9)
        if form == "digits":
            question, answer = f"What is {a} + {b} * {c}?", f"{a + b * c}"
            work = f"{b} * {c} = {b * c}. {a} + {b * c} = {answer}."
        elif form == "words":
            a = rng.randint(b, 499)
            sign, word, result = rng.choice((("+", "plus", a + b), ("-", "minus", a - b)))
            question, answer = f"What is {in_words(a)} {word} {in_words(b)}?", in_words(result)
            work = f"In digits, {a} {sign} {b} = {result}."
        elif form == "story":
            (who, other), things, given = rng.sample(NAMES, 2), rng.choice(THINGS), rng.randint(1, b)
            question = f"{who} has {b} {things}, finds {a} more and gives {given} to {other}. How many has {who} now?"
            work, answer = f"{b} + {a} = {a + b}. {a + b} - {given} = {a + b - given}.", f"{a + b - given}"
        else:
            chain, who = rng.sample(KINDS, rng.randint(3, 6)), rng.choice(NAMES)
            rules = [f"Every {kind} is a {next_kind}." for kind, next_kind in zip(chain, chain[1:])]
            start, asked = rng.sample(range(len(chain)), 2)  # the rules lead only forwards
            known = " ".join(rng.sample(rules, len(rules)))
            question = f"{known} {who} is a {chain[start]}. Must {who} be a {chain[asked]}?"
            end = asked + 1 if asked > start else None  # no further than what is asked; if that is not met, to the last
            work, answer = f"{who} is a {', so a '.join(chain[start:end])}.", "yes" if asked > start else "no"
        yield Problem(question, work, answer)

def arithmetic(seed: int, first: int = 0) -> Iterator[str]:
    for problem in arithmetic_problems(seed, first):
        yield f"{problem.question}\n{problem.work}\nAnswer: {problem.answer}"

# --- 11. Corpora, to token arrays ---
TINY = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
OWT = "https://huggingface.co/datasets/stanford-cs336/owt-sample/resolve/main/owt_"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
DOWNLOADS = {  # dataset -> split -> (address, bytes of text)
    "tinystories": {"train": (TINY + "train.txt", 2_227_753_162), "val": (TINY + "valid.txt", 22_502_601)},
    "owt": {"train": (OWT + "train.txt.gz", 11_920_511_059), "val": (OWT + "valid.txt.gz", 289_998_753)},
    "shakespeare": {"all": (SHAKESPEARE, 1_115_394)},
}
GENERATORS = {"stories": stories, "arithmetic": arithmetic}
DATASETS = (*DOWNLOADS, *GENERATORS)
GENERATED_BYTES = 25_000_000  # of a built-in corpus, when data_bytes does not say
def download(url: str, path: Path, *, first_bytes: int | None = None, expected_bytes: int | None = None,
             timeout_s: float = 30.0) -> None:
    """Fetch a file, or only its first bytes, going on where an earlier attempt broke off. Raises OSError.
    What has come lies in <path>.part. It is renamed when it has all the bytes that the server announced, and the whole
    file there must have expected_bytes."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        have = before = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"User-Agent": "bpe.py"})
        if have or first_bytes:
            request.add_header("Range", f"bytes={have}-{first_bytes - 1 if first_bytes else ''}")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                if response.status == 206:  # Content-Range: bytes 100-199/1000
                    whole = int(response.headers["Content-Range"].rpartition("/")[2])
                else:  # this server knows no Range and sends everything from the beginning
                    have, whole = 0, int(response.headers.get("Content-Length") or 0)
                if whole == 0 or expected_bytes not in (None, whole):
                    raise OSError(f"has {whole:,} bytes, not {expected_bytes or 'some'}")
                total = min(first_bytes or whole, whole)
                meter = Progress(f"loading {path.stem}", total)
                with room_for(part):
                    file = open(part, "ab" if have else "wb", buffering=0)  # what was written is there, come what may
                with file:
                    while have < total and (data := response.read(min(1 << 18, total - have))):
                        with room_for(part):
                            while data:  # of a full disk the system takes a part
                                data = data[file.write(data):]
                        have = file.tell()
                        meter.update(have)
            if have == total:
                return os.replace(part, path)
            problem: Any = f"broke off at {have / 1e6:,.1f} of {total / 1e6:,.1f} MB"
        except (OSError, http.client.HTTPException) as error:  # refused, silent too long, reset, no such page
            problem = error
            if getattr(error, "code", None) == 416 and have:  # nothing there behind what we have: not the same file
                part.unlink()
                continue
        if not part.exists() or part.stat().st_size <= before:  # as long as something comes, the next attempt goes on
            for name in ("reason", "reason", "strerror"):  # the bare words, without wrappers and numbers
                problem = getattr(problem, name, None) or problem
            raise OSError(f"{request.host.partition(':')[0]}: {problem}") from None

def download_text(dataset: str, split: str, path: Path, data_bytes: int | None) -> None:
    """One text of DOWNLOADS, whole, or its first data_bytes up to the end of a document."""
    (url, size), fetched = DOWNLOADS[dataset][split], path.with_suffix(".download")
    taken, packed = data_bytes if data_bytes and data_bytes < size else None, url.endswith(".gz")
    # packed, its size is not known before; text packs to less than half, so half the bytes hold enough of it
    download(url, fetched, first_bytes=taken and taken // (1 + packed), expected_bytes=None if packed else size)
    with (gzip.open if packed else open)(fetched, "rb") as source, write_atomically(path, "wb+") as target:
        try:
            while data := source.read1(min(1 << 18, (taken or size + 1) - target.tell())):
                target.write(data)
        except EOFError:  # the first part of a packed file ends anywhere
            pass
        except (gzip.BadGzipFile, zlib.error) as error:
            fetched.unlink()
            raise UserError(f"what came from {url} is damaged ({error}): run again to load it anew") from None
        if not taken and target.tell() != size:
            raise UserError(f"{url} holds {target.tell():,} bytes of text, not {size:,}: put your own at {path}")
        if taken:
            target.seek(max(0, target.tell() - 10_000_000))  # no document is longer
            start, end = target.tell(), target.read().rfind(END_OF_TEXT.encode("ascii"))
            if end < 0:
                raise UserError(f"{url} has no {END_OF_TEXT} in its first {taken:,} bytes: take more --data_bytes")
            target.truncate(start + end + len(END_OF_TEXT))
    fetched.unlink()

def split_text(source: Path, train: Path, val: Path, data_bytes: int | None) -> None:
    """The first 90 % of a text for training, the rest for validation, cut at the end of a document if there is one."""
    for chunk in chunks_of(source, [END_OF_TEXT], CHUNK_BYTES):
        read_text(source, *chunk)  # says where the text is not UTF-8 before anything is written
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        def character(place: int) -> int:  # the next place that is not within one
            return next((at for at in range(place, len(data)) if data[at] & 0xC0 != 0x80), len(data))
        size, mark = character(min(len(data), data_bytes or len(data))), END_OF_TEXT.encode("ascii")
        cut = int(size * 0.9)
        ends = (data.find(mark, cut, size - len(mark)), data.rfind(mark, 0, cut))  # the next end, else the last
        cut = next((end + len(mark) for end in ends if end >= 0), character(cut))
        for path, start, end in ((train, 0, cut), (val, cut, size)):
            with write_atomically(path, "wb") as target:
                target.write(memoryview(data)[start:end])

def generate_block(dataset: str, seed: int, first: int, count: int) -> bytes:
    return "".join(text + END_OF_TEXT for text in itertools.islice(GENERATORS[dataset](seed, first), count)).encode()

def generate_text(dataset: str, seed: int, path: Path, num_bytes: int, num_workers: int | None) -> None:
    """Documents 0, 1, 2, ... until num_bytes are reached; the same text for any number of workers."""
    blocks = [(seed, first, 1000) for first in range(0, num_bytes // 60 + 1, 1000)]  # none has less than 60 bytes
    meter, mark = Progress(f"generating {path.name}", num_bytes), END_OF_TEXT.encode("ascii")
    results = parallel_map(generate_block, dataset, blocks, num_workers if num_bytes > 2_000_000 else 1)
    with write_atomically(path, "wb") as file, contextlib.closing(results):
        while (missing := num_bytes - file.tell()) > 0:
            block = next(results)
            enough = block.find(mark, max(0, missing - len(mark))) + len(mark) if len(block) > missing else len(block)
            file.write(block[:enough])
            meter.update(file.tell())

def make_texts(dataset: str, folder: Path, data_bytes: int | None, num_workers: int | None, say: Callable) -> None:
    """See that train.txt and val.txt are in the folder, made from what is asked for. Raises OSError without a network.
    source.json, written last, says what they were made from; without it they are somebody's own and stay."""
    train, val, record = folder / "train.txt", folder / "val.txt", folder / "source.json"
    wanted: dict[str, Any] = {"dataset": dataset, "data_bytes": data_bytes}
    if dataset in GENERATORS:
        sample = hashlib.sha256(generate_block(dataset, 0, 0, 20)).hexdigest()  # another generator, another text
        wanted |= {"data_bytes": data_bytes or GENERATED_BYTES, "sample": sample}
    elif dataset not in DOWNLOADS:
        text_size(dataset)
        wanted |= {"dataset": str(Path(dataset).resolve()), **file_identity(Path(dataset))}
    made, splits = read_json(record), DOWNLOADS.get(dataset, {})
    more_than_wanted = "train" in splits and (made.get("data_bytes") or math.inf) >= (data_bytes or math.inf)
    enough = train.exists() and (not made or made == wanted or more_than_wanted)
    if enough and val.exists():
        return say(f"data: found {train}, {train.stat().st_size / 1e6:,.1f} MB")
    amount = f"the first {data_bytes / 1e6:,.1f} MB" if data_bytes else "all"
    if "train" in splits:  # what is there stays until the new has come
        say(f"data: downloading {dataset}, {amount} of the training text and all of the validation text")
        for split, path, missing in (("val", val, not val.exists()), ("train", train, not enough)):
            if missing:
                download_text(dataset, split, path, data_bytes if split == "train" else None)
        return write_json(record, wanted)
    if dataset in GENERATORS:
        say(f"data: generating {wanted['data_bytes'] / 1e6:,.1f} MB of {dataset}, validation from another seed")
        val.unlink(missing_ok=True)  # comes last: a run that is interrupted leaves none, and the next one begins anew
        generate_text(dataset, 0, train, wanted["data_bytes"], num_workers)
        generate_text(dataset, 1, val, min(1_000_000, wanted["data_bytes"] // 10), num_workers)
    else:
        say(f"data: {dataset}, {amount} of it, the first 90 % for training and the rest for validation")
        if splits:
            download_text(dataset, "all", folder / "input.txt", None)
        val.unlink(missing_ok=True)
        split_text(folder / "input.txt" if splits else Path(dataset), train, val, data_bytes)
    write_json(record, wanted)

# dataset is the one used: "stories" when "tinystories" could not be had; the rest are paths, tokens arrays on disk
Prepared = namedtuple("Prepared", "dataset train_text val_text train_tokens val_tokens tokenizer_dir")
def prepare(dataset: str, *, vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,),
            data_dir: PathLike = "data", data_bytes: int | None = None, num_workers: int | None = None,
            say: Callable[[str], None] = print) -> Prepared:
    """From a corpus's name, or a text file's path, to token arrays. Runs what is missing, with one line for each stage.
    data_bytes: how much training text; None is all there is, or GENERATED_BYTES of a built-in corpus. Text lies in
    data_dir/<dataset>/, tokenizer and arrays in data_dir/<dataset>/bpe<vocab_size>/. Without a network "tinystories"
    becomes "stories"; whatever else cannot be had raises UserError."""
    num_merges_for(vocab_size, special_tokens)
    name = dataset
    if dataset not in DATASETS:
        if not Path(dataset).suffix and not Path(dataset).is_file():
            raise UserError(f"unknown dataset {dataset!r}: use {', '.join(DATASETS)} or the path of a text file")
        name = Path(dataset).stem + ("-file" if Path(dataset).stem in DATASETS else "")
    folder = Path(data_dir) / name
    texts, tokenizer_dir = [folder / "train.txt", folder / "val.txt"], folder / f"bpe{vocab_size}"
    with alone_in(folder, say):
        try:
            make_texts(dataset, folder, data_bytes, num_workers, say)
        except OSError as error:
            if all(path.exists() for path in texts):
                say(f"data: cannot download more {dataset} ({error}): using what is in {folder}")
            elif dataset == "tinystories":
                say(f"data: cannot download tinystories ({error}): built-in stories instead")
                data_bytes = min(data_bytes or GENERATED_BYTES, GENERATED_BYTES)
                return prepare("stories", vocab_size=vocab_size, special_tokens=special_tokens, data_dir=data_dir,
                               data_bytes=data_bytes, num_workers=num_workers, say=say)
            else:
                where = f"{folder}/train.txt and val.txt"
                raise UserError(f"cannot download {dataset} ({error}): put it at {where}") from None
        record, seconds = tokenizer_dir / "training.json", {}
        wanted = {"special_tokens": [*special_tokens], "text": file_identity(texts[0])}
        if not (wanted.items() <= read_json(record).items() and (tokenizer_dir / "tokenizer.json").exists()):
            say(f"tokenizer: training {vocab_size:,} tokens on {texts[0]}")
            record.unlink(missing_ok=True)
            vocab, merges = train_bpe(texts[0], vocab_size, special_tokens, num_workers=num_workers, progress=True,
                                      cache_dir=folder / "cache", seconds=seconds)
            Tokenizer(vocab, merges, special_tokens).save(tokenizer_dir)
            write_json(record, wanted | {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes(num_workers)})
        tokenizer, arrays = Tokenizer.load(tokenizer_dir), [tokenizer_dir / "train.npy", tokenizer_dir / "val.npy"]
        for text, npy in zip(texts, arrays):
            facts = read_json(npy.with_suffix(".json"))
            wanted = {"tokenizer_hash": tokenizer.hash(), "source": file_identity(text)}
            if not (npy.exists() and "crc32" in facts and wanted.items() <= facts.items()):
                count = encode_file(tokenizer, text, npy, num_workers=num_workers, progress=True)
                facts = read_json(npy.with_suffix(".json"))
                speed = f"{facts['bytes_per_token']:.2f} bytes, {facts['tokens_per_second']:,.0f} a second"
                say(f"tokens: {npy}, {count:,} tokens of {speed}")
    return Prepared(name, *texts, *arrays, tokenizer_dir)

# --- 12. The command line ---
def peak_memory_bytes(num_workers: int | None) -> int:
    """The most that this process and the others can have held, each as much as the greatest of them; 0 if unknown."""
    with contextlib.suppress(ImportError):  # Windows
        from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
        own, others = getrusage(RUSAGE_SELF).ru_maxrss, getrusage(RUSAGE_CHILDREN).ru_maxrss
        return (own + ((num_workers or processors()) - 1) * others) * (1 if sys.platform == "darwin" else 1024)
    return 0

def library_sources() -> bytes:
    return END_OF_TEXT.encode("ascii").join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))

def summary(tokenizer: Tokenizer, seconds: Mapping[str, float], memory_bytes: int) -> str:
    stages = " + ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items()) or "nothing to do"
    longest = max(map(b"".join, tokenizer.merges), key=len, default=b"")
    return f"{tokenizer.vocab_size:,} tokens: {stages}, {memory_bytes / 1e6:,.0f} MB of memory; longest {longest!r}"

def train_and_tell(path: Path, vocab_size: int, special_tokens: Sequence[str], num_workers: int | None) -> Tokenizer:
    """Train, print merges as they come (the first ten, then some thirty in all), and what came of it."""
    number, step, seconds = itertools.count(1), max(1, vocab_size // 40), {}
    print(f"training {vocab_size:,} tokens on {text_size(path) / 1e6:,.1f} MB\n   merge      count  new token")
    def tell(pair: Pair, count: int) -> None:
        if (rank := next(number)) <= 10 or rank % step == 0:
            print(f"{rank:8,} {count:10,}  {pair[0]!r} + {pair[1]!r}", flush=True)
    trained = train_bpe(path, vocab_size, special_tokens, num_workers=num_workers, on_merge=tell, seconds=seconds)
    tokenizer = Tokenizer(*trained, special_tokens)
    text = read_text(path, *chunks_of(path, special_tokens, 1_000_000)[0])
    print(summary(tokenizer, seconds, peak_memory_bytes(num_workers)))
    print(f"{len(text.encode('utf-8')) / len(tokenizer.encode(text)):.2f} bytes a token in the text's beginning")
    return tokenizer

def report(data_dir: Path) -> str:
    """Every tokenizer at hand, how it was trained, and how it does on the beginning of every corpus at hand."""
    if not (folders := sorted(path.parent for path in data_dir.glob("*/bpe*/tokenizer.json"))):
        raise UserError(f"no tokenizer lies under {data_dir}/: python train.py --dataset stories makes one")
    lines, corpora = [], sorted(data_dir.glob("*/val.txt"))
    for folder in folders:
        tokenizer, facts = Tokenizer.load(folder), read_json(folder / "training.json")
        lines.append(f"{folder.parent.name}/{folder.name}, "
                     + summary(tokenizer, facts.get("seconds", {}), facts.get("peak_memory_bytes", 0)))
        for path in corpora:
            text = read_text(path, *chunks_of(path, [END_OF_TEXT], 1_000_000)[0])
            documents, started = text.split(END_OF_TEXT)[:10], time.perf_counter()
            tokenizer.encode(text)
            rate = len(text.encode("utf-8")) / (time.perf_counter() - started)
            size = len("".join(documents).encode("utf-8")) / sum(map(len, map(tokenizer.encode, documents)))
            lines.append(f"    {path.parent.name:<16} {size:5.2f} bytes a token; {rate / 1e6:4.1f} MB/s a process, "
                         f"{825e9 / rate / 3600:5,.0f} hours for 825 GB")
    return "\n".join(lines)

def main(argv: Sequence[str] | None = None) -> None:
    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the flags")
    parser = argparse.ArgumentParser(description="Train a byte-pair encoding, or look at one.", allow_abbrev=False)
    parser.error = refuse  # one sentence for every mistake, where argparse would print all flags first
    parser.add_argument("--input", type=Path, help="text to train on (default: the sources of Python's own library)")
    parser.add_argument("--vocab_size", type=int, default=1000, help="bytes and specials too (default: %(default)s)")
    parser.add_argument("--special_tokens", nargs="*", default=[END_OF_TEXT], help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder of the tokenizer's files; without --input read from there")
    parser.add_argument("--num_workers", type=int, help="processes (default: one for each processor)")
    parser.add_argument("--show", metavar="TEXT", help="print the pieces of a text")
    parser.add_argument("--report", action="store_true", help="compare the tokenizers and corpora under data/")
    try:
        args = parser.parse_args(argv)
        if args.num_workers is not None and args.num_workers < 1:
            parser.error(f"--num_workers {args.num_workers} must be at least 1")
        if args.report:
            return print(report(Path("data")))
        if args.out and not args.input and (args.out / "tokenizer.json").exists():
            tokenizer = Tokenizer.load(args.out)
        else:
            with tempfile.TemporaryDirectory() as folder:
                if args.input is None:
                    (Path(folder) / "library.txt").write_bytes(library_sources())
                path = args.input or Path(folder) / "library.txt"
                tokenizer = train_and_tell(path, args.vocab_size, args.special_tokens, args.num_workers)
            if args.out:
                tokenizer.save(args.out)
                print(f"vocab.json, merges.txt and tokenizer.json are in {args.out}/")
        if args.show is not None or not args.out:
            ids = tokenizer.encode("for line in sys.stdin: print(line)" if args.show is None else args.show)
            pieces = ["".join(map(printable_bytes().get, tokenizer.vocab[token_id])) for token_id in ids]
            print(f"{len(ids)} tokens: {'|'.join(pieces)}\n{' '.join(map(str, ids))}")
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"bpe.py: {str(error) or 'stopped'}", file=sys.stderr)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None

if __name__ == "__main__":
    main()
