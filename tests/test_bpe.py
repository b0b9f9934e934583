"""bpe.py: each fast way against its definition, ids against tiktoken and tokenizers, files against damage."""

import doctest
import functools
import gzip
import http.server
import itertools
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex

import bpe
from bpe import END_OF_TEXT, Tokenizer, UserError, encode_file, load_tokens, prepare, train_bpe

REFERENCE = Path(__file__).parent.parent / "data" / "reference"
# characters at which pre-tokenization turns: contractions, white space of all kinds, digits, scripts, emoji, controls
NASTY = "a b'sltrevmd'  \n\n\t\r\x0b\x1c\x1f\x85\xa0\u2003\u3000.,!-_<|>é1²½٣你好я😀\u0301\u200d\x00\ufffd"


def reference(name: str) -> Path:
    if not (REFERENCE / name).exists():
        pytest.skip(f"{name} is not in data/reference")
    return REFERENCE / name


def nasty_text(rng: random.Random, length: int, extra: tuple[str, ...] = ()) -> str:
    return "".join(rng.choice([*NASTY, *extra]) for _ in range(length))


def some_text(num_bytes: int, seed: int = 0) -> str:
    """Sentences with repeated words, blank lines, digits and accents: enough to learn merges from."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("aaabcdeeeéfghijk'") for _ in range(rng.randint(1, 9))) for _ in range(300)]
    parts, size = [], 0
    while size < num_bytes:
        parts.append(rng.choice(words) + rng.choice([" ", " ", " ", ", ", ".\n\n\n", " 17 ", END_OF_TEXT]))
        size += len(parts[-1].encode("utf-8"))
    return "".join(parts)


def train_on(text: str, vocab_size: int, specials: tuple[str, ...] = (END_OF_TEXT,)) -> Tokenizer:
    merges = bpe.train_vectorized(bpe.count_pretokens(text, specials), vocab_size - 256 - len(specials))
    return Tokenizer(dict(enumerate([bytes([b]) for b in range(256)] + [a + b for a, b in merges])), merges, specials)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_on(some_text(60_000), 700)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.from_files(reference("gpt2_vocab.json"), reference("gpt2_merges.txt"), [END_OF_TEXT])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


# --- the chapter as a whole ---


def test_doctests():
    """Every worked example in the file is true."""
    result = doctest.testmod(bpe)
    assert result.failed == 0 and result.attempted >= 8, f"{result}"


def test_import_is_light():
    """Importing the file imports no torch and prints nothing."""
    code = "import sys, bpe; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REFERENCE.parent.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


# --- 1. pre-tokens ---


def pieces(text: str, specials: tuple[str, ...] = ()) -> list[str]:
    """The pieces of a text in their order."""
    known, distinct, found = bpe.Pieces(), [], []
    for block in bpe.blocks_of(text.encode("utf-8"), specials):
        new, number = known.numbers(*block)
        distinct += new
        found += [distinct[place].decode("utf-8") for place in number.tolist()]
    return found


# a letter, digit, sign of each kind and length in UTF-8; the apostrophe and its letters; each white space of ASCII,
# \x1c and \x1f, which str.isspace takes for white space and the pattern does not, and white space of 2 and 3 bytes
CLASSES = "al1.' \n\t\r\x0b\x1c\x1f\x00\x85\xa0\u2003\u3000é²«你、\u1681😀\u0301"


def pretokens(parts: list[str]) -> list[str]:
    return [word.decode("utf-8") for part in parts for word in bpe.pretokens_of(part.encode("utf-8"))]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_pieces_are_proven_by_all_short_texts(length):
    """Every text of up to 4 characters over an alphabet of every class has the same pre-tokens from its pieces.

    Whether there is a border depends on the character before and the two behind at most, so 4 characters are all. The
    texts are told apart by special tokens, which are hard borders, and so take one call.
    """
    alphabet = CLASSES if length < 4 else "a1.' \n\x1c\xa0é\u3000你"
    texts = ["".join(text) for text in itertools.product(alphabet, repeat=length)]
    found = pieces("<|>".join(texts), ("<|>",))
    assert "".join(found) == "<|>".join(texts), "pieces are missing"
    number, current = 0, []
    for piece in [*found, "<|>"]:
        if piece != "<|>":
            current.append(piece)
            continue
        assert pretokens(current) == bpe.PRETOKEN.findall(texts[number]), f"{texts[number]!r} was cut into {current}"
        number, current = number + 1, []
    assert number == len(texts), f"{number} of {len(texts)}"


def test_pieces_and_borders_change_nothing(monkeypatch):
    """Cutting a text into pieces, in blocks of any size, or at any border, leaves its pre-tokens as they are."""
    rng = random.Random(1)
    for _ in range(1500):
        text = nasty_text(rng, rng.randint(1, 40))
        whole = bpe.PRETOKEN.findall(text)
        monkeypatch.setattr(bpe, "BLOCK_BYTES", rng.randint(1, 60))
        assert pretokens(pieces(text)) == whole, f"{text!r}"
        last = bpe.LAST_BORDER.search(text)
        borders = [match.start() for match in bpe.BORDER.finditer(text)]
        assert (last.start() if last else None) == (borders[-1] if borders else None), f"{text!r}"
        for border in borders:  # the left part may be cut before, the right part may go on
            parts = bpe.PRETOKEN.findall(text[:border]) + bpe.PRETOKEN.findall(text[border:])
            assert parts == whole, f"{text!r} at {border}: {parts} != {whole}"


def test_equal_pieces_are_found_equal():
    """Pieces that differ only behind 8 or 16 bytes, in length or in a zero byte are told apart, and no others."""
    rng = random.Random(2)
    words = ["a" * size + end for size in range(20) for end in ("", "b", "bb")] + ["a", "\x00", "\x00\x00", "\x01" * 9]
    words += ["b" + chr(number) + "\x00" * 7 for number in range(9)]  # the numbers of the first long pieces, as bytes
    words += ["é" * size + end for size in range(1, 12) for end in ("", "ü", "好")]
    text = "".join(" " + rng.choice(words) for _ in range(20_000))
    (block,), known = bpe.blocks_of(text.encode("utf-8"), ()), bpe.Pieces()
    distinct, number = known.numbers(*block)
    assert len(set(distinct)) == len(distinct) > 80, f"{len(distinct)} pieces, {len(set(distinct))} different"
    assert b"".join(distinct[place] for place in number.tolist()).decode("utf-8") == text, "another text"
    again = known.numbers(*block)
    assert again[0] == [] and np.array_equal(again[1], number), f"known pieces are new: {again[0]}"


def test_pieces_that_want_one_slot(monkeypatch):
    """Where four slots must do for 20,000 pieces most are new again and again, and none is taken for another."""
    monkeypatch.setattr(bpe, "SLOT_BITS", 2)
    monkeypatch.setattr(bpe, "BLOCK_BYTES", 1000)
    text = nasty_text(random.Random(5), 20_000) + "\x00" * 16 + " \x00" * 20
    text += "".join(" abcdefgh" + "".join(word) for word in itertools.product("abc", repeat=5))  # the first 8 alike
    assert "".join(pieces(text)) == text, "another text"


def test_special_tokens_are_hard_boundaries():
    """Special tokens are never counted, nothing is merged across them, and none of their signs act as a pattern."""
    counts = bpe.count_pretokens("ab<|x|>cd <|x|> ab|x<|x|>", ["<|x|>"])
    assert counts == {"ab": 2, "cd": 1, " ": 2, "|": 1, "x": 1} or counts == {
        "ab": 1, "cd": 1, " ": 1, " ab": 1, "|": 1, "x": 1,
    }, f"{counts}"  # fmt: skip
    assert bpe.count_pretokens("ab", []) == {"ab": 1}, "no special tokens must not split between all characters"
    with pytest.raises(UserError, match="empty"):
        bpe.count_pretokens("ab", [""])


# --- 2, 3. training ---


def random_counts(seed: int) -> dict[str, int]:
    """A few words of few letters: overlaps such as aaaaa, ties, pairs that run out."""
    rng = random.Random(seed)
    letters = rng.choice(["a", "ab", "aab", "abcdé", "a你😀"])
    words = ("".join(rng.choice(letters) for _ in range(rng.randint(1, 15))) for _ in range(rng.randint(1, 9)))
    return {word: rng.randint(1, 3) for word in words}


def test_fast_training_equals_the_definition():
    """Both faster trainers make the merges of train_naive: ties, overlaps, single letters, texts."""
    for seed in range(250):
        counts = random_counts(seed)
        naive = bpe.train_naive(counts, 40)
        assert bpe.train_fast(counts, 40) == naive, f"seed {seed}: {counts}"
        assert bpe.train_vectorized(counts, 40) == naive, f"seed {seed}: {counts}"
    later_tie = {"xe": 2, "xez": 6, "qq": 7, "mn": 6}  # (xe, z) ties with (m, n), not with (q, q) that comes first
    for counts in ({}, {"a": 3}, {"aa": 3}, {"a" * length: 1 for length in range(2, 40)}, {"": 1, "ab": 2}, later_tie,
                   {"  ": 2, "a" * 58: 1, "a" * 59: 1, "a" * 9: 1}):
        naive = bpe.train_naive(counts, 40)
        assert bpe.train_fast(counts, 40) == bpe.train_vectorized(counts, 40) == naive, f"{counts}"
    for text in (some_text(20_000), nasty_text(random.Random(4), 5000)):
        counts = bpe.count_pretokens(text, [END_OF_TEXT])
        naive = bpe.train_naive(counts, 150)
        assert bpe.train_fast(counts, 150) == bpe.train_vectorized(counts, 150) == naive, "on a text"
    counts = bpe.count_pretokens(some_text(300_000, seed=2))
    assert bpe.train_fast(counts, 700) == bpe.train_vectorized(counts, 700), "on a longer text"


def test_ties_go_to_the_greater_byte_strings():
    """Of equal counts the greater pair of byte strings wins, not the greater ids and not the first seen."""
    # after the merge (a, b) its id 256 is greater than that of "z", but b"ab" is less than b"z"
    counts = {"ab": 9, "abq": 4, "zq": 4, "\u00ffq": 4}
    expected = [(b"a", b"b"), (b"\xc3", b"\xbf"), (b"\xc3\xbf", b"q"), (b"z", b"q"), (b"ab", b"q")]
    prefixes = {"ab": 3, "xabc": 2, "xab": 2, "yab": 2, "yabc": 2}  # a longer string is greater than its beginning
    for train in (bpe.train_naive, bpe.train_fast, bpe.train_vectorized):
        assert train(counts, 5) == expected, f"{train.__name__}: {train(counts, 5)}"
        assert train(prefixes, 9) == bpe.train_naive(prefixes, 9), f"{train.__name__}"


def test_known_merges_are_a_prefix():
    """Training tells of each merge and its count; a shorter training is the beginning of a longer one."""
    texts = [random_counts(seed) for seed in range(100)] + [bpe.count_pretokens(some_text(20_000))]
    for number, counts in enumerate(texts):
        told: list = []
        naive = bpe.train_vectorized(counts, 60, on_merge=lambda *made, told=told: told.append(made))
        assert [pair for pair, _ in told] == naive, f"{number}: {told}"
        symbols = {word: [bytes([byte]) for byte in word.encode()] for word in counts}
        for pair, count in told:
            found = sum(counts[word] * list(zip(parts, parts[1:])).count(pair) for word, parts in symbols.items())
            assert count == found, f"{number}: {pair} {count} times, but {found}"
            symbols = {word: bpe.merge_pair(parts, pair, pair[0] + pair[1]) for word, parts in symbols.items()}
        known = random.Random(number).randint(0, len(naive))
        assert bpe.train_vectorized(counts, known) == naive[:known], "a shorter training is a beginning"


def test_applying_merges_equals_replaying_them():
    """apply_merges gives what merging pair after pair, in the order of training, gives."""
    tokenizer = train_on(some_text(30_000), 500)
    rng = random.Random(2)
    for _ in range(400):
        word = "".join(rng.choice("aaabcdeeeéfghijk'") for _ in range(rng.randint(1, 30)))
        symbols = [bytes([byte]) for byte in word.encode("utf-8")]
        for pair in tokenizer.merges:
            symbols = bpe.merge_pair(symbols, pair, pair[0] + pair[1])
        ids = bpe.apply_merges(list(word.encode("utf-8")), tokenizer._ranks)
        assert [tokenizer.vocab[i] for i in ids] == symbols, f"{word!r}"


def test_long_texts_equal_the_definition(monkeypatch):
    """A long text, cut by NumPy and encoded word by word at once, has the ids of merging each pre-token by itself."""
    specials = ("<|a|>", "<|a|><|b|>", "aa")
    rng = random.Random(12)
    learnt = train_on(some_text(40_000) + " " * 90 + "=" * 200, 700, ())
    text = nasty_text(rng, 30_000, (*specials, "<|a", "don't", "    ")) + some_text(30_000, seed=3)
    text += "ab'" * 500 + "é" * 3000 + "".join(rng.choice("aeiou") for _ in range(2000)) + "\n" * 99
    for chosen in ((), specials[:1], specials):
        monkeypatch.setattr(bpe, "BLOCK_BYTES", rng.randint(900, 40_000))
        mine = Tokenizer(learnt.vocab, learnt.merges, chosen)
        expected: list[int] = []
        for place, part in enumerate(bpe.special_pattern(chosen).split(text)):
            if place % 2:
                expected.append(mine.token_ids[part.encode()])
            else:
                for word in bpe.PRETOKEN.findall(part):
                    expected += bpe.apply_merges(list(word.encode()), mine._ranks)
        assert mine.encode(text) == expected == mine.encode(text), f"{chosen}"
        assert mine.encode(text[:5000]) == Tokenizer(learnt.vocab, learnt.merges, chosen).encode(text[:5000]), "short"


def test_an_error_leaves_nothing_half_known():
    """After a text that cannot be encoded the same tokenizer encodes others rightly, and refuses this one again."""
    learnt = train_on(some_text(5000), 300, ())
    mine = Tokenizer({number: token for number, token in learnt.vocab.items() if token != b"~"}, learnt.merges)
    for text in ("the cat", "the ~ dog", "the dog", "the ~ dog", "dog the cat"):
        if "~" in text:
            with pytest.raises(UserError, match="lacks the byte 0x7e"):
                mine.encode(text)
        else:
            assert mine.encode(text) == learnt.encode(text), text


def test_a_tokenizer_is_sent_without_what_it_knows():
    """A copy for another process has no pieces in it: another thread may be changing them at that moment."""
    mine = train_on(some_text(5000), 300, ())
    mine.encode(some_text(3000))
    assert mine._known is not None, "this tokenizer keeps nothing, so the test says nothing"
    copy = pickle.loads(pickle.dumps(mine))
    assert copy._known is None and copy.encode("the cat") == mine.encode("the cat"), "the copy is not a fresh one"


# --- 4, 5. long texts ---


@pytest.mark.parametrize("specials", [(), (END_OF_TEXT,), ("<|a|>", "<|a|><|b|>", "aa", "aaa")])
def test_chunks_can_be_treated_alone(tmp_path, specials):
    """However a file is cut into chunks, its pre-tokens and ids stay the same, and no special token is cut."""
    rng = random.Random(3)
    path = tmp_path / "text.txt"
    trained = train_on(some_text(5000), 400, specials)
    for num_bytes in (1, 7, 100, 1003):
        text = nasty_text(rng, 700, (*specials, "aa", "aaaa"))
        path.write_bytes(text.encode("utf-8"))
        chunks = bpe.chunks_of(path, specials, num_bytes)
        assert [start for start, _ in chunks] + [path.stat().st_size] == [0] + [end for _, end in chunks], f"{chunks}"
        texts = [bpe.read_text(path, *chunk) for chunk in chunks]
        assert "".join(texts) == text, "a chunk was cut within a character"
        assert [i for part in texts for i in trained.encode(part)] == trained.encode(text), f"{num_bytes}: {texts}"
    path.write_text("x" * 50_000 + END_OF_TEXT + "y" * 50_000, encoding="utf-8")  # no border near: chunks get longer
    chunks = bpe.chunks_of(path, [END_OF_TEXT], 1000)
    assert chunks == [(0, 50_000), (50_000, 100_013)], f"{chunks}"


def test_workers_change_nothing(tmp_path, monkeypatch, tokenizer):
    """Two worker processes count and encode exactly as one process does."""
    path, text = tmp_path / "text.txt", some_text(90_000)
    path.write_bytes(text.encode("utf-8"))
    monkeypatch.setattr(bpe, "CHUNK_BYTES", 20_000)
    counted = bpe.count_words(path, [END_OF_TEXT], num_workers=2)
    assert counted == bpe.count_pretokens(text, [END_OF_TEXT]), "counts differ"
    count = encode_file(tokenizer, path, tmp_path / "x.npy", num_workers=2)
    assert load_tokens(tmp_path / "x.npy", tokenizer).tolist() == tokenizer.encode(text), "ids differ"
    assert count == len(tokenizer.encode(text)), f"{count}"


def test_a_dead_worker_is_an_error():
    """A worker that dies raises one sentence instead of hanging."""
    with pytest.raises(UserError, match="worker process died.*--num_workers 1"):
        code = "import os, multiprocessing; multiprocessing.parent_process() and os._exit(3)"
        list(bpe.parallel_map(exec, code, [()] * 6, 2))


def test_small_texts_start_no_workers(tmp_path, monkeypatch):
    """133 kB at a vocabulary of 500 are trained and encoded in this process, in well under a second."""
    path = tmp_path / "text.txt"
    path.write_bytes(some_text(133_000).encode("utf-8"))
    monkeypatch.setattr(bpe.concurrent.futures, "ProcessPoolExecutor", None)
    started = time.perf_counter()
    vocab, merges = train_bpe(path, 500, [END_OF_TEXT], num_workers=4)
    seconds = time.perf_counter() - started
    assert len(merges) == 243 and seconds < 1, f"{seconds:.2f} s"
    encode_file(Tokenizer(vocab, merges, [END_OF_TEXT]), path, tmp_path / "x.npy", num_workers=4)


@pytest.mark.faults
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_ctrl_c_leaves_no_orphans(tmp_path):
    """Ctrl-C while workers count ends them too, within seconds."""
    (tmp_path / "text.txt").write_bytes(some_text(8_000_000).encode("utf-8") * 8)
    code = "import bpe; bpe.train_bpe('text.txt', 9000, [], num_workers=3)"
    environment = os.environ | {"PYTHONPATH": str(Path(bpe.__file__).parent)}
    run = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, start_new_session=True,
                           stderr=subprocess.DEVNULL)

    def processes() -> int:
        stats = (path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat"))
        return sum(int(fields[3]) == run.pid and fields[0] != "Z" for fields in stats)  # of this session

    deadline = time.monotonic() + 20
    while processes() < 4 and time.monotonic() < deadline:  # the parent, two workers, the tracker of resources
        time.sleep(0.05)
    assert processes() >= 3, f"{processes()} processes"
    os.killpg(run.pid, signal.SIGINT)
    run.wait(20)
    while processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes() == 0 and run.returncode != 0, f"{processes()} processes are left"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_workers_end_with_a_killed_parent(tmp_path):
    """A parent that is killed, and so can end nobody, leaves no workers."""
    code = ("import bpe, os, time\ndef task(shared, number):\n    print(1, flush=True)\n    time.sleep(60)\n"
            "if __name__ == '__main__':\n import script\n next(bpe.parallel_map(script.task, 0, [(1,)] * 6, 2))\n")
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    paths = os.pathsep.join([str(Path(bpe.__file__).parent), str(tmp_path)])
    run = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=os.environ | {"PYTHONPATH": paths},
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    run.stdout.readline(), run.stdout.readline()
    run.kill()
    started = time.monotonic()
    run.communicate(timeout=20)  # standard output ends with the last of the workers
    assert time.monotonic() - started < 10, "workers outlived their parent"


def test_workers_do_not_run_the_script(tmp_path):
    """A script without `if __name__ == "__main__"` may use workers, and they do not run it again."""
    (tmp_path / "script.py").write_text(
        "import bpe\nprint('run')\nprint(list(bpe.parallel_map(max, 3, [(1,), (2,), (5,)], 2)))\n", encoding="utf-8"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bpe.__file__).parent)}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert done.stdout == "run\n[3, 3, 5]\n", done.stdout + done.stderr


def test_progress_says_rate_and_time_left(monkeypatch, capsys):
    """A progress line has what is done, the rate and the time left, in at most 100 columns."""
    now = [100.0]
    monkeypatch.setattr(bpe.time, "monotonic", lambda: now[0])
    meter = bpe.Progress("counting words", 300_000_000)
    now[0] = 120.0
    meter.update(100_000_000)
    line = capsys.readouterr().err
    assert "100.0 of 300.0 MB, 5.0 a second, 40 s left" in line and len(line) <= 101, f"{line!r}"


def test_train_bpe(tmp_path, capsys):
    """vocab_size counts bytes, merges and special tokens; byte b is id b, special tokens come last."""
    path = tmp_path / "text.txt"
    path.write_bytes(some_text(20_000).encode("utf-8"))
    vocab, merges = train_bpe(path, 300, [END_OF_TEXT, "<|pad|>"])
    assert list(vocab) == list(range(300)) and len(merges) == 42, f"{len(vocab)} {len(merges)}"
    assert [vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)], "bytes"
    assert [vocab[256 + i] for i in range(42)] == [left + right for left, right in merges], "merges"
    assert [vocab[298], vocab[299]] == [END_OF_TEXT.encode(), b"<|pad|>"], "specials"
    assert not any(b"<|" in token for token in list(vocab.values())[:298]), "a special token was learnt from"
    assert train_bpe(path, 256, []) == ({i: bytes([i]) for i in range(256)}, []), "plain bytes"
    assert capsys.readouterr().err == "", "nothing to say"
    path.write_text("ab ab", encoding="utf-8")
    vocab, merges = train_bpe(path, 1000, [END_OF_TEXT])
    assert merges == [(b"a", b"b"), (b" ", b"ab")] and len(vocab) == 259, f"{merges}"
    assert "no pair is left after 2 of 743 merges" in capsys.readouterr().err, "an early stop must be said"
    with pytest.raises(UserError, match="vocab_size 256 is too small: .* need 257"):
        train_bpe(path, 256, [END_OF_TEXT])


def test_cache(tmp_path, monkeypatch):
    """Merges and counts kept in cache_dir serve smaller vocabularies and interrupted runs, and only the same text."""
    path, cache = tmp_path / "text.txt", tmp_path / "cache"
    path.write_bytes(some_text(20_000).encode("utf-8"))
    clean = train_bpe(path, 400, [END_OF_TEXT])[1]

    def interrupt(pair, count):
        if pair == clean[70]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bpe(path, 400, [END_OF_TEXT], cache_dir=cache, on_merge=interrupt)
    calls, new = [], []
    count_chunk = bpe.count_chunk
    monkeypatch.setattr(bpe, "count_chunk", lambda *args: calls.append(1) or count_chunk(*args))
    assert train_bpe(path, 400, [END_OF_TEXT], cache_dir=cache, on_merge=lambda *pair: new.append(pair))[1] == clean
    assert len(clean) - len(new) == 71 and not calls, f"{len(new)} merges were made again"
    monkeypatch.setattr(bpe, "train_vectorized", None)
    assert train_bpe(path, 350, [END_OF_TEXT], cache_dir=cache)[1] == clean[:93] and not calls, "nothing to do again"
    monkeypatch.undo()
    path.write_bytes(some_text(20_000, seed=5).encode("utf-8"))
    other = train_bpe(path, 350, [END_OF_TEXT], cache_dir=cache)[1]
    assert other == train_bpe(path, 350, [END_OF_TEXT])[1] != clean[:93], "another text, other merges"


@pytest.mark.parametrize("damage", ["flipped", "cut off", "no check", "binary", "empty"])
def test_damaged_cache(tmp_path, damage):
    """Counts or merges that are damaged anywhere, were it one bit, are made again and replaced."""
    path, cache = tmp_path / "text.txt", tmp_path / "cache"
    path.write_bytes(some_text(20_000).encode("utf-8"))
    clean = train_bpe(path, 400, [END_OF_TEXT], cache_dir=cache)[1]
    whole = {kept: kept.read_bytes() for kept in cache.iterdir()}
    assert len(whole) == 2, f"{list(whole)}"
    for kept, data in whole.items():
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        kept.write_bytes({"flipped": flipped, "cut off": data[:half], "no check": data.partition(b"\n")[2],
                          "binary": data[:half] + b"\xff\x00\n", "empty": b""}[damage])
    assert train_bpe(path, 400, [END_OF_TEXT], cache_dir=cache)[1] == clean, "other merges"
    assert {kept: kept.read_bytes() for kept in cache.iterdir()} == whole, "not replaced"


def test_counts_are_kept_as_they_come(tmp_path, monkeypatch):
    """An interrupted count goes on behind the chunks that it had counted."""
    path, cache = tmp_path / "text.txt", tmp_path / "counts.json"
    text = some_text(50_000)
    path.write_bytes(text.encode("utf-8"))
    monkeypatch.setattr(bpe, "CHUNK_BYTES", 20_000)
    (_, first_end), *rest = bpe.chunks_of(path, [], 20_000)
    bpe.Kept(cache, [1, bpe.count_pretokens(bpe.read_text(path, 0, first_end))]).save(now=True)
    starts = []
    count_chunk = bpe.count_chunk
    monkeypatch.setattr(bpe, "count_chunk", lambda *args: starts.append(args[2]) or count_chunk(*args))
    assert bpe.count_words(path, [], num_workers=1, cache=cache) == bpe.count_pretokens(text), "counts differ"
    assert starts == [start for start, _ in rest], f"{starts}"
    assert bpe.Kept(cache, None).value[0] == len(rest) + 1, "the whole is kept too"


# --- 6. the tokenizer ---


def test_round_trip(tokenizer):
    """decode(encode(text)) is the text, whatever stands in it."""
    rng = random.Random(4)
    for _ in range(300):
        text = nasty_text(rng, rng.randint(0, 60), (END_OF_TEXT, "<|endof"))
        assert tokenizer.decode(tokenizer.encode(text)) == text, f"{text!r}"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == "", "nothing is nothing"
    assert tokenizer.decode(tokenizer.encode("\ud800x")) == "\ufffdx", "half a surrogate pair is no character"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600", "a whole pair is one"


def test_decoding_within_a_character(tokenizer):
    """Ids that end within a UTF-8 character decode to U+FFFD; an unknown id is one sentence."""
    assert [tokenizer.decode([byte]) for byte in "é".encode()] == ["\ufffd", "\ufffd"], "half characters"
    assert tokenizer.decode(np.array([0xC3, 0xA9], dtype=np.uint16)) == "é", "numpy ids"
    with pytest.raises(UserError, match="no token has the id 700"):
        tokenizer.decode([700])


def test_special_tokens_longest_first():
    """Of special tokens that begin alike the longest wins; those that the vocabulary lacks get the next ids."""
    vocab = {i: bytes([i]) for i in range(256)}
    both = Tokenizer(vocab, [], ["<|a|>", "<|a|><|b|>", "(.*)"])
    assert both.vocab_size == 259 and both.vocab[257] == b"<|a|><|b|>", f"{both.vocab_size}"
    assert both.encode("<|a|><|b|>x<|a|>(.*)") == [257, ord("x"), 256, 258], f"{both.encode('<|a|><|b|>x<|a|>(.*)')}"
    known = Tokenizer(vocab | {256: b"<|b|>"}, [], ["<|a|>", "<|b|>"])
    assert (known.token_ids[b"<|b|>"], known.token_ids[b"<|a|>"]) == (256, 257), f"{known.vocab_size}"


def all_cuts(text: str):
    for places in itertools.product((False, True), repeat=len(text) - 1):
        cut = [0, *(i + 1 for i, here in enumerate(places) if here), len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(cut)]


def test_encode_iterable_for_every_cut(monkeypatch):
    """encode_iterable gives the ids of the whole text for every way of cutting it into strings."""
    specials = ["<|", "<|e|>", "<|e|><|f|>"]
    tokenizer = train_on("a\n\n\nb  c  don't we'll \n \n ,,, '' 's 12 <|e ||", 300, ())
    tokenizer = Tokenizer(tokenizer.vocab, tokenizer.merges, specials)
    monkeypatch.setattr(tokenizer, "encode", functools.cache(tokenizer.encode))  # the same parts come many times
    monkeypatch.setattr(Tokenizer, "block", 1)  # decide after each string
    for text in ("a\n\n\nb  \n c", "we'll 's'a\n\n", "x<|e|><|f|>", "<|e|><|f<|", "  <|e|>  ", "é 1.2 '' '"):
        expected = tokenizer.encode(text)
        for strings in all_cuts(text):
            assert list(tokenizer.encode_iterable(strings)) == expected, f"{strings}"
    rng = random.Random(5)
    for _ in range(300):
        text = nasty_text(rng, rng.randint(2, 120), (*specials, "<|e|", "'", "l", "\n\n"))
        cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, min(40, len(text)))))
        strings = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert list(tokenizer.encode_iterable(strings)) == tokenizer.encode(text), f"{strings}"


def test_encode_iterable_is_lazy_and_small(tokenizer):
    """encode_iterable takes memory for the longest pre-token, not for the text, and gives ids before the text ends."""
    lines = [line + "\n" for line in some_text(100_000).split("\n")]
    taken = itertools.count()
    endless = (line for line in itertools.cycle(lines) if next(taken) >= 0)
    ids = tokenizer.encode_iterable(endless)
    next(ids)
    assert next(taken) < 2000, "the first id came late"
    tracemalloc.start()
    for _ in itertools.islice(ids, 500_000):  # several megabytes of text
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000, f"{peak:,} bytes"
    without_space = ("xy12" for _ in range(100_000))  # pre-tokens are short although no white space comes
    tracemalloc.start()
    assert sum(1 for _ in tokenizer.encode_iterable(without_space)) > 0, "no ids"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, f"{peak:,} bytes"


def test_long_words_cost_little(tokenizer):
    """A run of 100,000 spaces, or one endless word that comes letter by letter, is encoded in about a second."""
    started = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(" " * 100_000 + "a")) == " " * 100_000 + "a", "spaces"
    assert len(list(tokenizer.encode_iterable("a" for _ in range(50_000)))) > 0, "letters"
    assert time.perf_counter() - started < 10, f"{time.perf_counter() - started:.1f} s"


def test_files_round_trip(tmp_path):
    """A tokenizer read back from its files is the same, special tokens with spaces included."""
    saved = Tokenizer(train_on(some_text(9000), 400, ()).vocab, train_on(some_text(9000), 400, ()).merges, ["<| é |>"])
    saved.save(tmp_path)
    read = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", ["<| é |>"])
    loaded = Tokenizer.load(tmp_path)
    assert saved.hash() == read.hash() == loaded.hash(), "the hashes differ"
    text = some_text(3000, seed=8) + "<| é |> x"
    assert saved.encode(text) == read.encode(text) == loaded.encode(text), "the ids differ"
    assert Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt").hash() != saved.hash(), (
        "specials count"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "tokenizer.json", "vocab.json"], (
        "leftovers"
    )
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2 sha256:"), "the first line"


def test_damaged_files(tmp_path, tokenizer):
    """A missing, foreign or damaged vocabulary or merges file is one sentence that names it."""
    tokenizer.save(tmp_path)
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    with pytest.raises(UserError, match="cannot read .*nowhere.json"):
        Tokenizer.from_files(tmp_path / "nowhere.json", merges)
    for broken in ("{", "[1, 2]", '{"a": "b"}', '{"a b": 3}', "{}", '{"a": 1, "b": 1}'):
        (tmp_path / "broken.json").write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match="broken.json or .*merges.txt is damaged"):
            Tokenizer.from_files(tmp_path / "broken.json", merges)
    for broken in ("", "#version", "#version: 0.2 sha2", "a", "#version: 0.2\na b c", "#version: 0.2\na \u4f60"):
        (tmp_path / "broken.txt").write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match="vocab.json or .*broken.txt is damaged"):
            Tokenizer.from_files(vocab, tmp_path / "broken.txt")
    (tmp_path / "other.txt").write_text("#version: 0.2\nQ Z\n", encoding="utf-8")
    with pytest.raises(UserError, match="a merge needs b'QZ', which the vocabulary lacks"):
        Tokenizer.from_files(vocab, tmp_path / "other.txt")
    theirs = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Whitespace"}}, {"pre_tokenizer": None}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(theirs | change), encoding="utf-8")
        with pytest.raises(UserError, match="no plain byte-level BPE"):
            Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="lacks the byte 0x7a"):
        Tokenizer({0: b"a"}, []).encode("az")


def test_files_of_two_tokenizers(tmp_path, tokenizer):
    """Files that are each whole but not of one tokenizer are refused; a merges.txt of others has no checksum."""
    tokenizer.save(tmp_path / "a")
    train_on(some_text(9000, seed=1), 700).save(tmp_path / "b")
    for vocab, merges in ("ab", "ba"):
        with pytest.raises(UserError, match="is damaged or not of|which the vocabulary lacks"):
            Tokenizer.from_files(tmp_path / vocab / "vocab.json", tmp_path / merges / "merges.txt", [END_OF_TEXT])
    lines = (tmp_path / "a" / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    for first in ("", "#version: 0.2\n", "#version: 0.2 - Trained by `huggingface/tokenizers`\n"):
        (tmp_path / "c.txt").write_text(first + "".join(lines[1:]), encoding="utf-8")
        read = Tokenizer.from_files(tmp_path / "a" / "vocab.json", tmp_path / "c.txt", [END_OF_TEXT])
        assert read.hash() == tokenizer.hash(), first
    (tmp_path / "c.txt").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        Tokenizer.from_files(tmp_path / "a" / "vocab.json", tmp_path / "c.txt", [END_OF_TEXT])
    (tmp_path / "b" / "tokenizer.json").replace(tmp_path / "a" / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        Tokenizer.load(tmp_path / "a")


@pytest.mark.parametrize("wrong", [-1, 1 << 32, 10**15])
def test_ids_that_no_array_holds(tmp_path, tokenizer, wrong):
    """Ids below 0 or from 2**32 on are refused, in vocab.json and in tokenizer.json."""
    tokenizer.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"a": wrong}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    theirs = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    theirs["added_tokens"][0]["id"] = wrong
    (tmp_path / "tokenizer.json").write_text(json.dumps(theirs), encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        Tokenizer.load(tmp_path)


MANY_SCRIPTS = (
    "Hello world! It's 1 of 2,000; I'll say: 'don't' we've\n\n\nEND  \t x \r\n — "
    "naïve café, Straße, Ελληνικά, кириллица, "
    "עברית, العربية ٣٤, हिन्दी क्षि, ไทย, 中文字符, 日本語カタカナ, 한국어, "
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽, ①²½Ⅷ, \x00\x07\x1b \u200b\u2028\u3000x "
    + " " * 300 + "\n" * 77 + "\t" * 9 + "=" * 100 + "a" * 500
)  # fmt: skip


@pytest.mark.peers
def test_equal_to_tiktoken(gpt2):
    """With GPT-2's files the ids are tiktoken's: many scripts, long runs, Shakespeare, 2,000 fuzzed strings."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: i for i, token in gpt2.vocab.items() if i != 50256}
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=bpe.PRETOKEN.pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256}
    )
    assert gpt2.token_ids[END_OF_TEXT.encode()] == 50256, "the special token keeps its id"
    # Unicode grows: a code point that one side's tables do not know yet has another class there. Those are left out:
    # 17,480 between regex 2026.11 and tiktoken 0.14, all unassigned in Python's own tables, most of them from U+18D09
    # to U+191D2, U+323B0 to U+33479 and U+3D000 to U+3FC3F.
    everything = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    different = set()
    for pattern in (r"\p{L}", r"\p{N}", r"\s"):
        bytes_only = {bytes([i]): i for i in range(256)}
        found = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=bytes_only, special_tokens={})
        different |= set(regex.findall(pattern, everything)) ^ set(found.decode(found.encode(everything)))
    older = [f"U+{ord(character):04X}" for character in different if unicodedata.category(character) != "Cn"]
    assert not older, f"not only new code points are classed differently: {older[:20]}"
    rng = random.Random(6)
    texts = [MANY_SCRIPTS, reference("shakespeare.txt").read_text(encoding="utf-8")[:300_000], "\ud83dx\udc00"]
    for _ in range(2000):
        pool = rng.choice([NASTY, "ab \n'", everything, MANY_SCRIPTS])
        texts.append(
            "".join(rng.choice([rng.choice(pool), END_OF_TEXT] if i == 7 else pool) for i in range(rng.randint(1, 40)))
        )
    for text in texts:
        text = "".join(character for character in text if character not in different)
        assert gpt2.encode(text) == theirs.encode(text, allowed_special="all"), f"{text!r}"


@pytest.mark.peers
def test_equal_to_tokenizers(tmp_path, tokenizer, gpt2):
    """tokenizer.json gives the same ids in the tokenizers package, and a plain byte-level BPE of theirs loads here."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(7)
    for mine in (tokenizer, gpt2, Tokenizer(gpt2.vocab, gpt2.merges, [END_OF_TEXT, "<|a|>", "<|a|> b"])):
        mine.save(tmp_path)
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        extra = (END_OF_TEXT, "<|a|>", "<|a|> b")
        for text in [MANY_SCRIPTS, *(nasty_text(rng, 40, extra) for _ in range(200))]:
            assert theirs.encode(text).ids == mine.encode(text), f"{text!r}"
            assert theirs.decode(mine.encode(text), skip_special_tokens=False) == text, f"{text!r}"
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([some_text(20_000)], vocab_size=500, special_tokens=[END_OF_TEXT, "<pad>"])
    (tmp_path / "theirs").mkdir()
    trained.save(str(tmp_path / "theirs" / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "theirs")
    for text in (some_text(5000, seed=9), MANY_SCRIPTS, f"a{END_OF_TEXT}<pad> b"):
        assert loaded.encode(text) == trained.encode(text).ids, f"{text[:50]!r}"


# --- 7. token arrays ---


def test_token_arrays(tmp_path, tokenizer):
    """Ids below 65,536 are stored as uint16, others as uint32; the array opens by mmap and its tokenizer is checked."""
    path = tmp_path / "text.txt"
    text = some_text(30_001)
    path.write_bytes(text.encode("utf-8"))
    wide = Tokenizer(tokenizer.vocab | {65_536: b"<|wide|>"}, tokenizer.merges, [END_OF_TEXT])
    full = Tokenizer(tokenizer.vocab | {65_535: b"<|wide|>"}, tokenizer.merges, [END_OF_TEXT])
    for mine, dtype in ((tokenizer, np.uint16), (full, np.uint16), (wide, np.uint32)):
        count = encode_file(mine, path, tmp_path / "x.npy")
        tokens = load_tokens(tmp_path / "x.npy", mine)
        assert isinstance(tokens, np.memmap) and tokens.dtype == dtype, f"{type(tokens)} {tokens.dtype}"
        assert tokens.tolist() == mine.encode(text) and len(tokens) == count, f"{count}"
    facts = json.loads((tmp_path / "x.json").read_text())
    assert (facts["tokens"], facts["vocab_size"], facts["source"]["file"]) == (count, 65_537, "text.txt"), f"{facts}"
    with pytest.raises(UserError, match="not encoded with this tokenizer"):
        load_tokens(tmp_path / "x.npy", tokenizer)
    with open(tmp_path / "x.npy", "r+b") as file:
        file.truncate(500)
    with pytest.raises(UserError, match="cannot read"):
        load_tokens(tmp_path / "x.npy", wide)
    np.save(tmp_path / "x.npy", np.arange(7))
    with pytest.raises(UserError, match="not encoded with this tokenizer, or is damaged"):
        load_tokens(tmp_path / "x.npy", wide)
    with pytest.raises(UserError, match="cannot read"):
        load_tokens(tmp_path / "nowhere.npy", wide)


def test_damaged_token_arrays(tmp_path, tokenizer):
    """One flipped bit in the tokens, another type in the header, and any shorter file are refused in one sentence."""
    (tmp_path / "text.txt").write_text(some_text(5000), encoding="utf-8")
    encode_file(tokenizer, tmp_path / "text.txt", tmp_path / "x.npy")
    data = (tmp_path / "x.npy").read_bytes()
    flipped = [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in (128, 1001, len(data) - 1)]
    for damaged in (*flipped, data.replace(b"<u2", b"<i2"), data.replace(b"<u2", b">u2"), data[:-2], data[:50], b""):
        (tmp_path / "x.npy").write_bytes(damaged)
        with pytest.raises(UserError, match="x.npy.*: remove .*x.npy and prepare the data again"):
            load_tokens(tmp_path / "x.npy", tokenizer)


def test_nothing_half_written(tmp_path, tokenizer):
    """A text that turns out not to be UTF-8 is named with the place, and leaves neither array nor temporary file."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"good text " * 50 + b"caf\xe9 " + b"more " * 50)
    for action in (lambda: encode_file(tokenizer, path, tmp_path / "x.npy"), lambda: train_bpe(path, 300, [])):
        with pytest.raises(UserError, match="not UTF-8 text .byte 503 is 0xe9"):
            action()
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"], "something was left behind"
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(str(path), vocab_size=300, data_dir=tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*")), "something was written"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_space_left(tmp_path, tokenizer, monkeypatch):
    """A full disk is one sentence and leaves nothing behind."""
    real_open = open
    monkeypatch.setattr(
        "builtins.open",
        lambda name, *args, **kw: real_open("/dev/full" if str(name).endswith(".tmp") else name, *args, **kw),
    )
    with pytest.raises(UserError, match="cannot write .*merges.txt|cannot write .*vocab.json.*No space left"):
        tokenizer.save(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()), "something was left behind"


# --- 9. arithmetic ---


def test_arithmetic_answers():
    """Every answer follows from its question by other means: Python's numbers, a table of words, a search of rules."""
    number_of = {bpe.in_words(n): n for n in range(1000)}
    assert len(number_of) == 1000, "two numbers have one name"
    kinds = set()
    for problem in itertools.islice(bpe.arithmetic_problems(3), 2000):
        q = problem.question
        if match := re.fullmatch(r"What is (\d+) \+ (\d+) \* (\d+)\?", q):
            a, b, c = map(int, match.groups())
            expected = str(a + b * c)
        elif match := re.fullmatch(r"What is (.*) (plus|minus) (.*)\?", q):
            a, b = number_of[match[1]], number_of[match[3]]
            expected = bpe.in_words(a + b if match[2] == "plus" else a - b)
        elif match := re.match(r"\w+ has (\d+) \w+, finds (\d+) more and gives (\d+) to", q):
            a, b, c = map(int, match.groups())
            expected = str(a + b - c)
        else:
            match = re.search(r"\. (\w+) is a (\w+)\. Must \w+ be a (\w+)\?", q)
            reached, rules = {match[2]}, re.findall(r"Every (\w+) is a (\w+)\.", q)
            for _ in rules:
                reached |= {then for kind, then in rules if kind in reached}
            expected = "yes" if match[3] in reached else "no"
            written = re.findall(r"\ba (\w+)", problem.work)  # each by a rule, until what is asked or nothing follows
            assert written[0] == match[2] and set(zip(written, written[1:])) <= set(rules), f"{problem}"
            assert match[3] not in written[:-1] and (written[-1] == match[3]) == (expected == "yes"), f"{problem}"
            assert expected == "yes" or written[-1] not in dict(rules), f"{problem} stops too soon"
        kinds.add(
            expected if expected in ("yes", "no") else match.re.pattern[:12] + str(" plus " in q or " minus " in q)
        )
        assert problem.answer == expected, f"{problem} but {expected}"
    assert len(kinds) >= 5, f"{kinds}"


def test_arithmetic_documents():
    """Documents are a function of seed and number; few questions of one seed are among as many of another."""
    documents = list(itertools.islice(bpe.arithmetic(1), 300))
    assert list(itertools.islice(bpe.arithmetic(1, 120), 180)) == documents[120:], "not a function of the number"
    problem = next(bpe.arithmetic_problems(1))
    assert documents[0] == f"{problem.question}\n{problem.work}\nAnswer: {problem.answer}", f"{documents[0]}"
    questions = [{p.question for p in itertools.islice(bpe.arithmetic_problems(seed), 5000)} for seed in (0, 1)]
    assert len(questions[0] & questions[1]) < 25, f"{len(questions[0] & questions[1])} questions are in both"


# --- 10. corpora ---


def quiet(line: str) -> None:
    pass


def test_prepare_a_text_file(tmp_path):
    """A text file is split at a document's end near 90 %, and running again does nothing until the file changes."""
    path, data = tmp_path / "my.txt", tmp_path / "data"
    documents = [some_text(300, seed).replace(END_OF_TEXT, "") for seed in range(100)]
    path.write_bytes("".join(document + END_OF_TEXT for document in documents).encode("utf-8"))
    said = []
    got = prepare(str(path), vocab_size=300, data_dir=data, say=said.append)
    assert got.dataset == "my" and got.tokenizer_dir == data / "my" / "bpe300", f"{got}"
    train, val = (text.read_text(encoding="utf-8") for text in (got.train_text, got.val_text))
    assert train + val == path.read_text(encoding="utf-8"), "the parts are not the whole"
    assert train.endswith(END_OF_TEXT) and 0.88 < len(train) / len(train + val) < 0.93, f"{len(train)}"
    tokenizer = Tokenizer.load(got.tokenizer_dir)
    tokens = load_tokens(got.train_tokens, tokenizer)
    assert tokenizer.decode(tokens) == train, "the tokens are not the text"
    assert (tokens == tokenizer.token_ids[END_OF_TEXT.encode()]).sum() == train.count(END_OF_TEXT), "document ends"
    assert tokenizer.vocab_size == 300 and len(said) == 4, f"{said}"
    before = {file: file.stat().st_mtime_ns for file in data.rglob("*")}
    assert prepare(str(path), vocab_size=300, data_dir=data, say=quiet) == got, "another result"
    assert before == {file: file.stat().st_mtime_ns for file in data.rglob("*")}, "something ran again"
    path.write_text(some_text(5000, seed=3), encoding="utf-8")
    prepare(str(path), vocab_size=300, data_dir=data, say=quiet)
    tokens = load_tokens(got.train_tokens, Tokenizer.load(got.tokenizer_dir))
    assert Tokenizer.load(got.tokenizer_dir).decode(tokens) == got.train_text.read_text(encoding="utf-8"), (
        "stale tokens"
    )


def test_prepare_plain_bytes(tmp_path):
    """vocab_size 256 without special tokens is plain bytes; a text without documents is cut between characters."""
    path = tmp_path / "my.txt"
    text = "é" * 1005
    path.write_text(text, encoding="utf-8")
    got = prepare(str(path), vocab_size=256, special_tokens=(), data_dir=tmp_path / "data", say=quiet)
    tokenizer = Tokenizer.load(got.tokenizer_dir)
    train, val = (load_tokens(tokens, tokenizer) for tokens in (got.train_tokens, got.val_tokens))
    assert bytes([*train, *val]) == text.encode("utf-8"), "not the bytes"
    assert tokenizer.decode(train) + tokenizer.decode(val) == text and tokenizer.vocab_size == 256, "cut within é"
    with pytest.raises(UserError, match="vocab_size 256 is too small"):
        prepare(str(path), vocab_size=256, data_dir=tmp_path / "data", say=quiet)


@pytest.mark.parametrize("dataset", ["arithmetic", "stories"])
def test_prepare_a_built_in_corpus(tmp_path, dataset):
    """A built-in corpus is the same for any number of workers, ends with a document, and validates on another seed."""
    texts = []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.txt"
        bpe.generate_text(dataset, 0, path, 3_000_000 if workers == 2 else 300_000, workers)
        texts.append(path.read_text(encoding="utf-8"))
    assert texts[1].startswith(texts[0]) and texts[0].endswith(END_OF_TEXT), "depends on the workers"
    assert 300_000 <= len(texts[0].encode("utf-8")) < 303_000, f"{len(texts[0])}"
    got = prepare(dataset, vocab_size=400, data_dir=tmp_path, data_bytes=200_000, say=quiet)
    generator = {"arithmetic": bpe.arithmetic, "stories": bpe.stories}[dataset]
    train, val = (text.read_text(encoding="utf-8").split(END_OF_TEXT) for text in (got.train_text, got.val_text))
    assert train[:-1] == list(itertools.islice(generator(0), len(train) - 1)) and train[-1] == "", "not the documents"
    assert val[:-1] == list(itertools.islice(generator(1), len(val) - 1)), "not the validation documents"
    assert not set(train[:-1]) & set(val[:-1]) or dataset == "arithmetic", "training and validation overlap"
    again = prepare(dataset, vocab_size=400, data_dir=tmp_path, data_bytes=100_000, say=quiet)
    assert 100_000 <= again.train_text.stat().st_size < 101_000, "another amount asked for, the old one given"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` on the loopback address, in one of the ways that servers have."""

    def __init__(self, files: dict[str, bytes], mode: str = "range") -> None:
        self.files, self.mode, self.requests = files, mode, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request, client_address):  # a client that hangs up is no news
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        data = server.files.get(self.path[1:])
        if data is None:
            return self.send_error(404)
        start, end, mode = 0, len(data), server.mode
        if asked and mode != "no range":
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            start, end = int(first), min(len(data), int(last) + 1 if last else len(data))
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        if mode != "no length":
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        body = data[start:end]
        if mode == "cut off":
            body = body[: max(1, len(body) // 2)] if len(body) > 100 else body
        for offset in range(0, len(body), 20_000):
            if mode == "slow":
                time.sleep(0.02)
            if mode == "stalls" and offset:
                time.sleep(3)
            self.wfile.write(body[offset : offset + 20_000])
        if mode == "cut off":
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(files, mode="range"):
        servers.append(Server(files, mode))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("mode", ["range", "no range", "cut off", "slow"])
def test_download(tmp_path, serve, mode):
    """A download comes whole, or its first bytes only, from servers with and without Range, cut off and slow."""
    data = random.Random(8).randbytes(250_007)
    server = serve({"file": data}, mode)
    bpe.download(server.url("file"), tmp_path / "whole", expected_bytes=len(data))
    bpe.download(server.url("file"), tmp_path / "begin", first_bytes=100_001, expected_bytes=len(data))
    assert (tmp_path / "whole").read_bytes() == data, "the whole file differs"
    assert (tmp_path / "begin").read_bytes() == data[:100_001], "the first bytes differ"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begin", "whole"], "leftovers"


def test_download_goes_on(tmp_path, serve):
    """A download goes on behind what an interrupted one left, and begins anew where that is not possible."""
    data = random.Random(9).randbytes(50_000)
    for mode, left in (("range", data[:20_000]), ("no range", data[:20_000]), ("range", data + b"more")):
        (tmp_path / "file.part").write_bytes(left)
        server = serve({"file": data}, mode)
        bpe.download(server.url("file"), tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == data, f"{mode}: the file differs"
        assert server.requests[0][1] == f"bytes={len(left)}-", f"{server.requests}"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_download_onto_a_full_disk(tmp_path, serve, monkeypatch):
    """A disk that fills up during a download is one sentence, no change of corpus, and the next run goes on from there.

    The place of the full disk is taken by a limit on the size of files: the system writes up to it, and then refuses.
    """
    import resource

    text = (some_text(80_000) + END_OF_TEXT).encode("utf-8")
    server = serve({"tinystories-train": text, "tinystories-val": text[:5000]})
    point_downloads(monkeypatch, server)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_001, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*train.download.part \(File too large\): make room or"):
            prepare("tinystories", vocab_size=300, data_dir=tmp_path, say=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (part,) = tmp_path.rglob("*.part")
    assert part.read_bytes() == text[:30_001] and not (tmp_path / "stories").exists(), f"{part.stat().st_size}"
    got = prepare("tinystories", vocab_size=300, data_dir=tmp_path, say=quiet)
    assert server.requests[-1] == ("/tinystories-train", "bytes=30001-"), f"{server.requests}"
    assert got.dataset == "tinystories" and got.train_text.read_bytes() == text, "another text"


@pytest.mark.parametrize("wrong", ["stream", "check", "no gzip"])
def test_damaged_gzip(tmp_path, serve, monkeypatch, wrong):
    """A packed file damaged on its way is one sentence, and the next run loads it anew."""
    packed = gzip.compress(random.Random(11).randbytes(60_000).hex().encode("ascii"))
    text = {"stream": packed[:30_000] + bytes(20) + packed[30_020:], "check": packed[:-8] + bytes(8),
            "no gzip": b"<html>" * 10_000}[wrong]
    server = serve({"owt-train.gz": packed, "owt-val.gz": packed})
    point_downloads(monkeypatch, server)
    server.files["owt-val.gz"] = text
    with pytest.raises(UserError, match="owt-val.gz is damaged .*: run again to load it anew"):
        prepare("owt", vocab_size=300, data_dir=tmp_path, say=quiet)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], f"{list(tmp_path.rglob('*'))}"


def test_download_failures(tmp_path, serve):
    """Wrong size, missing page, silence and nobody there: an error that says so, and no file under the name."""
    data = random.Random(10).randbytes(90_000)
    path = tmp_path / "file"
    with pytest.raises(OSError, match="has 90,000 bytes, not 90001"):
        bpe.download(serve({"file": data}).url("file"), path, expected_bytes=90_001)
    with pytest.raises(OSError, match="has 0 bytes, not some"):
        bpe.download(serve({"file": data}, "no length").url("file"), path)
    with pytest.raises(OSError, match="Not Found"):
        bpe.download(serve({}).url("file"), path)
    started = time.monotonic()
    with pytest.raises(OSError, match="timed out"):
        bpe.download(serve({"file": data[:20_001]}, "stalls").url("file"), path, timeout_s=0.3)
    assert time.monotonic() - started < 10, "a silent server holds on"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused"):
            bpe.download(f"http://127.0.0.1:{unused.getsockname()[1]}/file", tmp_path / "other")
    assert not path.exists() and not (tmp_path / "other").exists(), "half a file got the name"


def point_downloads(monkeypatch, server: Server) -> None:
    """Let DOWNLOADS name files of a loopback server, with their true sizes."""
    table = {}
    for dataset, splits in bpe.DOWNLOADS.items():
        for split, (url, _) in splits.items():
            name = f"{dataset}-{split}" + (".gz" if url.endswith(".gz") else "")
            data = server.files.get(name, b"")
            size = len(gzip.decompress(data)) if name.endswith(".gz") and data else len(data)
            table.setdefault(dataset, {})[split] = (server.url(name), size)
    monkeypatch.setattr(bpe, "DOWNLOADS", table)


@pytest.mark.parametrize("dataset", ["tinystories", "owt"])
def test_prepare_a_download(tmp_path, serve, monkeypatch, dataset):
    """The first data_bytes are cut at the end of a document; the rest comes when asked for; found data stays."""
    text = some_text(80_000) + END_OF_TEXT
    files = {"tinystories-train": text.encode(), "tinystories-val": text[:5000].encode()}
    halves = gzip.compress(text[:40_000].encode()) + gzip.compress(text[40_000:].encode())  # gzip files may be chained
    files |= {"owt-train.gz": halves, "owt-val.gz": gzip.compress(text[:5000].encode())}
    server = serve(files)
    point_downloads(monkeypatch, server)
    got = prepare(dataset, vocab_size=300, data_dir=tmp_path, data_bytes=30_000, say=quiet)
    train = got.train_text.read_text(encoding="utf-8")
    assert got.dataset == dataset and text.startswith(train) and train.endswith(END_OF_TEXT), f"{got}"
    assert 27_000 < len(train.encode("utf-8")) <= 30_000, f"{len(train)}"
    assert got.val_text.read_text(encoding="utf-8") == text[:5000], "the validation text is whole"
    seen = len(server.requests)
    prepare(dataset, vocab_size=300, data_dir=tmp_path, data_bytes=20_000, say=quiet)
    assert len(server.requests) == seen, "less was asked for and there"
    server.files, all_files, said = {}, server.files, []
    assert prepare(dataset, vocab_size=300, data_dir=tmp_path, say=said.append) == got, "what is there must serve"
    assert any(f"cannot download more {dataset}" in line for line in said), f"{said}"
    assert got.train_text.read_text(encoding="utf-8") == train, "what was there must stay"
    server.files = all_files
    prepare(dataset, vocab_size=300, data_dir=tmp_path, say=quiet)
    assert got.train_text.read_text(encoding="utf-8") == text, "now all was asked for"
    tokenizer = Tokenizer.load(got.tokenizer_dir)
    assert tokenizer.decode(load_tokens(got.train_tokens, tokenizer)) == text, "stale tokens"
    leftovers = {path.name for path in got.train_text.parent.iterdir()}
    assert leftovers == {"train.txt", "val.txt", "source.json", "bpe300", "cache"}, f"{leftovers}"


def test_prepare_shakespeare(tmp_path, serve, monkeypatch):
    """Shakespeare is split as nanoGPT splits it: the first int(0.9 n) characters train."""
    data = reference("shakespeare.txt").read_bytes()
    point_downloads(monkeypatch, serve({"shakespeare-all": data}))
    got = prepare("shakespeare", vocab_size=256, special_tokens=(), data_dir=tmp_path, say=quiet)
    text = data.decode("utf-8")
    cut = int(len(text) * 0.9)
    assert got.train_text.read_text(encoding="utf-8") == text[:cut], "train"
    assert got.val_text.read_text(encoding="utf-8") == text[cut:], "val"


def test_fallback_without_network(tmp_path, serve, monkeypatch):
    """Without a network tinystories becomes stories, said in one line, in its own folder; others are an error."""
    point_downloads(monkeypatch, serve({}))
    said = []
    got = prepare("tinystories", vocab_size=300, data_dir=tmp_path, data_bytes=50_000, say=said.append)
    assert got.dataset == "stories" and got.train_text.parent == tmp_path / "stories", f"{got}"
    assert "data: cannot download tinystories (127.0.0.1: Not Found): built-in stories instead" in said, f"{said}"
    assert not (tmp_path / "tinystories").exists(), "an empty folder was left"
    for dataset in ("owt", "shakespeare"):
        with pytest.raises(UserError, match=f"cannot download {dataset} .*Not Found"):
            prepare(dataset, vocab_size=300, data_dir=tmp_path, say=quiet)


def test_own_copies_are_used(tmp_path, serve, monkeypatch):
    """Texts that somebody put there are used as they are; nothing is downloaded or overwritten."""
    server = serve({})
    point_downloads(monkeypatch, server)
    folder = tmp_path / "tinystories"
    folder.mkdir()
    for name in ("train.txt", "val.txt"):
        (folder / name).write_text(some_text(4000), encoding="utf-8")
    got = prepare("tinystories", vocab_size=300, data_dir=tmp_path, data_bytes=1000, say=quiet)
    assert got.dataset == "tinystories" and not server.requests, f"{server.requests}"
    assert got.train_text.read_text(encoding="utf-8") == some_text(4000), "overwritten"


@pytest.mark.faults
def test_killed_runs(tmp_path):
    """A run killed at any moment leaves nothing that a later run takes for complete."""
    (tmp_path / "my.txt").write_bytes(some_text(9_000_000).encode("utf-8"))
    code = "import bpe; bpe.prepare('my.txt', vocab_size=1500, say=print)"
    environment = os.environ | {"PYTHONPATH": str(Path(bpe.__file__).parent)}
    killed = 0
    for delay in (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0):
        run = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        try:
            run.wait(delay)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            killed += 1
    assert killed >= 3, f"only {killed} runs were killed"
    text = tmp_path / "my.txt"
    after = prepare(str(text), vocab_size=1500, data_dir=tmp_path / "data", say=quiet)
    clean = prepare(str(text), vocab_size=1500, data_dir=tmp_path / "clean", say=quiet)
    assert Tokenizer.load(after.tokenizer_dir).hash() == Tokenizer.load(clean.tokenizer_dir).hash(), "other merges"
    for mine, theirs in ((after.train_tokens, clean.train_tokens), (after.val_tokens, clean.val_tokens)):
        assert mine.read_bytes() == theirs.read_bytes(), f"{mine} differs"


# --- 11. the command line ---


def test_main(tmp_path, monkeypatch, capsys):
    """The commands of the first page run: train, save, show, report."""
    text = some_text(40_000)
    monkeypatch.setattr(bpe, "library_sources", lambda: text.encode("utf-8"))
    monkeypatch.chdir(tmp_path)
    bpe.main(["--vocab_size", "320"])
    out = capsys.readouterr().out
    assert re.search(r"^ +1 +[\d,]+  b'.*' \+ b'.*'$", out, re.M) and "bytes a token" in out, out
    (tmp_path / "my.txt").write_bytes(text.encode("utf-8"))
    bpe.main("--input my.txt --vocab_size 320 --special_tokens <|x|> <|y|> --out made --num_workers 1".split())
    assert Tokenizer.load("made").special_tokens == ["<|x|>", "<|y|>"], "special tokens"
    capsys.readouterr()
    bpe.main(["--out", "made", "--show", "a b<|x|>"])
    out = capsys.readouterr().out
    assert out.endswith(f"{' '.join(map(str, Tokenizer.load('made').encode('a b<|x|>')))}\n") and "|<|x|>" in out, out
    prepare("my.txt", vocab_size=300, say=quiet)
    prepare("arithmetic", vocab_size=400, data_bytes=20_000, say=quiet)
    capsys.readouterr()
    bpe.main(["--report"])
    out = capsys.readouterr().out
    for name in ("my/bpe300", "arithmetic/bpe400"):
        about = f"^{name}, \\d+ tokens: counting .* s [+] merging .* s, [\\d,]+ MB of memory; longest b'"
        assert len(re.findall(about, out, re.M)) == 1, out
    assert len(re.findall(r"^    (?:my|arithmetic) +[\d.]+ bytes a token; .* hours for 825 GB$", out, re.M)) == 4, out
    assert max(map(len, out.splitlines())) <= 110, out


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("--input nowhere.txt", "cannot read nowhere.txt (No such file or directory): give the path of a text file"),
        ("--input empty.txt", "empty.txt is empty: give a file with text in it"),
        ("--input .", "cannot read . (Is a directory): give the path of a text file"),
        ("--input latin.txt", "latin.txt is not UTF-8 text (byte 3 is 0xe9)"),
        ("--input good.txt --vocab_size 200", "vocab_size 200 is too small: bytes and special tokens need 257"),
        ("--out broken", "is damaged or not of a tokenizer"),
        ("--report", "no tokenizer lies under data/"),
        ("--input good.txt --num_workers -2", "--num_workers -2 must be at least 1"),
        ("--bad_flag 3", "unrecognized arguments: --bad_flag 3; --help lists the flags"),
        ("--vocab_size many", "argument --vocab_size: invalid int value: 'many'; --help lists the flags"),
        ("--input good.txt --vocab_size 258 --out good.txt/x", "cannot write good.txt/x/vocab.json (Not a directory)"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, argv, sentence):
    """A mistake is one line on stderr that says what is wrong, exit code 2, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("good good text")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        bpe.main(argv.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and error.startswith("bpe.py: "), f"{error!r}"
    assert error.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before, f"{error!r}"


def test_unknown_datasets(tmp_path):
    """An unknown dataset lists the known ones; a path that is not there is named."""
    with pytest.raises(
        UserError, match="unknown dataset 'tinystorys': use tinystories, owt, shakespeare, stories, arith"
    ):
        prepare("tinystorys", vocab_size=300, data_dir=tmp_path)
    with pytest.raises(UserError, match="cannot read nowhere.txt"):
        prepare("nowhere.txt", vocab_size=300, data_dir=tmp_path)
    assert not list(tmp_path.iterdir()), "a folder was made"


@pytest.mark.slow
def test_no_flags(tmp_path):
    """`python bpe.py` with no flags trains offline, shows merges and bytes per token, and writes nothing here."""
    script = Path(bpe.__file__).resolve()
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "bytes a token" in done.stdout, done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "something was written"
