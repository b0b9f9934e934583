"""What happens to machines and files happens here: real processes are killed, real files are damaged.

    python -m pytest -m faults                  # under three minutes on two cores
    python -m pytest -m faults -s --kills 50    # more kills; with -s their table

A fault ends in one of two ways: the next start goes on by itself, or says in one sentence what to do. In both cases the
result is that of an undisturbed run, to the bit.
"""

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bpe
import train
from bpe import END_OF_TEXT, Tokenizer, UserError, encode_file, load_tokens, train_bpe
from model import ModelConfig, TransformerLM
from train import AdamW, latest_checkpoint, load_checkpoint, read_checkpoint, read_log, save_checkpoint

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


# --- Kill -9 ---


def command(folder: Path, num_processes: int, *more: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    flags = dict(dataset="stories", data_bytes=1_500_000, vocab_size=800, context_length=32, d_model=32, num_layers=2,
                 num_heads=2, d_ff=64, batch_size=8, max_steps=60, warmup_steps=5, save_interval=5, eval_interval=30,
                 log_interval=5, eval_tokens=3000, device="cpu", dtype="float32", optimizer="muon", run_name="it",
                 data_dir=folder / "data", out_dir=folder / "runs")
    start = [sys.executable, *(torchrun if num_processes > 1 else []), "train.py"]
    if num_processes > 1:
        flags["ddp"] = "bucketed"
    else:
        flags["grad_accum_steps"] = 2
    return [*start, *(f"--{name}={value}" for name, value in flags.items()), *more]


def resuming(folder: Path, num_processes: int) -> list[str]:
    kept = ("--data_dir", "--out_dir", "--run_name", "--device", "--ddp")
    first = [*command(folder, num_processes), "--resume"]
    return [flag for flag in first if not flag.startswith("--") or "=" not in flag or flag.startswith(kept)]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def members_of(session: int) -> list[int]:
    """Living processes of a session: what a killed parent left behind."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def result_of(folder: Path) -> tuple[list, dict]:
    """Losses by step, and the final parameters."""
    lines = [{key: line[key] for key in ("step", "train_loss", "val_loss") if key in line}
             for line in read_log(folder / "runs" / "it" / "log.jsonl")]
    return lines, read_checkpoint(latest_checkpoint(folder / "runs" / "it"))["model"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, tuple[Path, float]]:
    """By number of processes: the folder of a run that nothing happened to, and its seconds."""
    done = {}
    for num_processes in (1, 2):
        folder, started = tmp_path_factory.mktemp(f"undisturbed{num_processes}"), time.monotonic()
        result = run(command(folder, num_processes))
        assert result.returncode == 0, result.stderr[-3000:]
        done[num_processes] = folder, time.monotonic() - started
    return done


def test_kill_at_any_moment(undisturbed, tmp_path, request):
    """Kill -9 at random moments of preparing, training and saving: what starts next ends with the undisturbed bits."""
    rng, table = random.Random(0), []
    for number in range(request.config.getoption("kills")):
        num_processes = 2 if number % 5 == 4 else 1
        folder, (whole, seconds) = tmp_path / str(number), undisturbed[num_processes]
        moment = rng.uniform(0.3, seconds)
        victim = subprocess.Popen(command(folder, num_processes), cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(moment)
        ended = victim.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim.pid, signal.SIGKILL)
        said = victim.communicate()[0].strip().splitlines()
        deadline = time.monotonic() + 5
        while members_of(victim.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not members_of(victim.pid), f"kill {number} at {moment:.2f} s left processes behind"
        again = run(command(folder, num_processes))
        how = "went on by itself"
        if again.returncode:
            told = [line for line in again.stderr.splitlines() if line.startswith("train.py: ")]
            assert told and all("go on with --resume" in line for line in told), again.stderr[-3000:]
            again, how = run(resuming(folder, num_processes)), "said: --resume"
        assert again.returncode == 0, f"kill {number} at {moment:.2f} s: {again.stderr[-3000:]}"
        (lines, parameters), (expected, wanted) = result_of(folder), result_of(whole)
        assert lines == expected, f"kill {number} at {moment:.2f} s: other losses"
        assert all(torch.equal(parameters[name], wanted[name]) for name in wanted), f"kill {number}: other parameters"
        assert not list(folder.rglob("*.tmp")) or not ended, f"kill {number}: half-written files are left"
        table.append((num_processes, moment, "it had ended" if ended else said[-1][:48] if said else "starting", how))
        shutil.rmtree(folder)
    print("\nprocesses  killed after  last line before                                  the next start")
    for num_processes, moment, stage, how in table:
        print(f"{num_processes:9}  {moment:10.2f} s  {stage:<48}  {how}")


def test_killed_workers_leave_no_orphans(tmp_path):
    """A tokenizer training whose parent is killed takes its workers with it, and the next one is right."""
    text = tmp_path / "text.txt"
    words = random.Random(1).choices(["tide", "moon", "harbour", "sail", "rope", "\n"], k=4_000_000)
    text.write_text(" ".join(words), encoding="utf-8")
    arguments = [sys.executable, "bpe.py", "--input", str(text), "--vocab_size", "280", "--out", str(tmp_path / "out")]
    victim = subprocess.Popen([*arguments, "--num_workers", "2"], cwd=ROOT, start_new_session=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1.2)
    victim.kill()
    victim.wait()
    deadline = time.monotonic() + 10
    while members_of(victim.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not members_of(victim.pid), "workers outlived their parent"
    assert not (tmp_path / "out" / "vocab.json").exists(), "a killed training left a tokenizer"
    assert run(arguments).returncode == 0 and Tokenizer.load(tmp_path / "out").vocab_size == 280


def test_killed_sampling_changes_nothing(undisturbed):
    """Sampling that is killed leaves the run as it was: the next sample is the first one."""
    folder, _ = undisturbed[1]
    arguments = [sys.executable, "sample.py", "--run", str(folder / "runs" / "it"), "--max_new_tokens", "30"]
    first = run(arguments)
    victim = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    time.sleep(2.0)
    victim.kill()
    victim.wait()

    def text(done: subprocess.CompletedProcess) -> str:
        return done.stdout.partition("tokens/s")[0].rpartition("\n")[0]  # without the times

    assert first.returncode == 0 and text(run(arguments)) == text(first)


# --- Full disks, read-only folders, vanishing files ---


def test_disk_full_while_saving(undisturbed, tmp_path):
    """A disk that fills up ends a run with one sentence; the checkpoint before is whole, and the run goes on later."""
    folder = tmp_path / "full"
    shutil.copytree(undisturbed[1][0] / "data", folder / "data")
    limited = "import resource, sys, train; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
    limited += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); train.main(sys.argv[1:])"
    start = command(folder, 1)
    done = run([sys.executable, "-c", limited, *start[2:]])
    told = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == 2 and len(told) == 1 and "make room" in told[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr and not list(folder.rglob("*.tmp"))
    assert run(resuming(folder, 1)).returncode == 0
    lines, parameters = result_of(folder)
    expected, wanted = result_of(undisturbed[1][0])
    assert lines == expected and all(torch.equal(parameters[name], wanted[name]) for name in wanted)


def test_places_that_cannot_be_written(undisturbed, tmp_path):
    """A folder that is a file, or may not be written, is one sentence with exit code 2."""
    (tmp_path / "file").write_text("in the way")
    shutil.copytree(undisturbed[1][0] / "data", tmp_path / "data")
    for out in ("file", "file/below"):
        start = [flag for flag in command(tmp_path, 1) if not flag.startswith("--out_dir")]
        done = run([*start, f"--out_dir={tmp_path / out}"])
        told = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        assert done.returncode == 2 and len(told) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]


def test_tokens_vanish_in_mid_run(undisturbed, tmp_path):
    """Token arrays removed during a run do not disturb it: they stay open."""
    shutil.copytree(undisturbed[1][0] / "data", tmp_path / "data")
    victim = subprocess.Popen(command(tmp_path, 1), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    for line in victim.stdout:
        if line.startswith("step     5/"):
            shutil.rmtree(tmp_path / "data")
    assert victim.wait() == 0
    assert result_of(tmp_path)[0] == result_of(undisturbed[1][0])[0]


# --- Damaged files ---


def outcome(load, equal) -> str:
    """'refused' where a load ends in one sentence, 'equal' where it loads the same; anything else fails the test."""
    try:
        loaded = load()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 20, f"not a sentence: {error}"
        return "refused"
    assert equal(loaded), "a damaged file was taken for a good one"
    return "equal"


def damages(data: bytes, flips: int):
    """Every eighth truncation, then single bytes changed at random places."""
    rng = random.Random(2)
    for length in range(0, len(data), 8):
        yield data[:length]
    for _ in range(flips):
        place = rng.randrange(len(data))
        yield data[:place] + bytes([data[place] ^ rng.randrange(1, 256)]) + data[place + 1 :]


def test_damaged_checkpoints(request):
    """A checkpoint cut off anywhere or with any byte changed is refused in one sentence, or loads the same tensors."""
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(vocab_size=11, context_length=8, d_model=4, num_layers=1, num_heads=2, d_ff=4))
    optimizer = AdamW(model.parameters())
    buffer = io.BytesIO()
    save_checkpoint(model, optimizer, 3, buffer)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counts = {"refused": 0, "equal": 0}
    for data in damages(buffer.getvalue(), request.config.getoption("flips")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        counts[outcome(lambda data=data: load_checkpoint(io.BytesIO(data), model, optimizer), lambda step: step == 3 and
                       all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items()))] += 1
    print(f"\ncheckpoint of {len(buffer.getvalue()):,} bytes: {counts}")
    assert counts["refused"] > 5 * counts["equal"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small text with its tokenizer and token array."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(f"low lower lowest, newer wider{END_OF_TEXT}\n" * 40, encoding="utf-8")
    tokenizer = Tokenizer(*train_bpe(folder / "text.txt", 290, [END_OF_TEXT]), [END_OF_TEXT])
    tokenizer.save(folder)
    encode_file(tokenizer, folder / "text.txt", folder / "text.npy")
    return folder


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_damaged_tokenizers(small, tmp_path, name, request):
    """A tokenizer's file cut off anywhere or with any byte changed is refused in one sentence, or is the same one."""
    for file in small.iterdir():
        shutil.copy(file, tmp_path)
    good, data = Tokenizer.load(small), (small / name).read_bytes()
    files = tmp_path / "vocab.json", tmp_path / "merges.txt", [END_OF_TEXT]
    counts = {"refused": 0, "equal": 0}
    for damaged in damages(data, request.config.getoption("flips")):
        (tmp_path / name).write_bytes(damaged)
        whole = name == "tokenizer.json"
        load = functools.partial(Tokenizer.load, tmp_path) if whole else functools.partial(Tokenizer.from_files, *files)
        counts[outcome(load, lambda loaded: loaded.hash() == good.hash())] += 1
    print(f"\n{name} of {len(data):,} bytes: {counts}")


@pytest.mark.parametrize("name", ["text.npy", "text.json"])
def test_damaged_token_arrays(small, tmp_path, name, request):
    """A token array or its sidecar, cut off or changed, is refused in one sentence, or has the same tokens."""
    for file in small.iterdir():
        shutil.copy(file, tmp_path)
    tokenizer, data = Tokenizer.load(small), (small / name).read_bytes()
    good, counts = np.array(load_tokens(small / "text.npy", tokenizer)), {"refused": 0, "equal": 0}
    for damaged in damages(data, request.config.getoption("flips")):
        (tmp_path / name).write_bytes(damaged)
        counts[outcome(lambda: np.array(load_tokens(tmp_path / "text.npy", tokenizer)),
                       lambda loaded: np.array_equal(loaded, good))] += 1
    print(f"\n{name} of {len(data):,} bytes: {counts}")


# --- Hostile text and tokenizers ---


PLANES = "".join(chr(plane * 0x10000 + 0x41 + offset) for plane in range(17) for offset in range(0, 600, 7))


@pytest.mark.parametrize("text", ["a\0b\0\0c " * 999, "no end of text " * 3000, " \t\n\r\n" * 5000, "\n" * 20_000,
                                  "\ufeffwith a mark\r\nand its line ends\r\n" * 500, PLANES * 9, "x" * 300_000],
                         ids=["NUL", "one document", "white space", "empty lines", "BOM, CRLF", "planes", "a letter"])
def test_texts_survive_the_round_trip(text, tmp_path):
    """Whatever the text is, training works, and decode(encode(x)) is x, whole or cut anywhere."""
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    tokenizer = Tokenizer(*train_bpe(path, 300, [END_OF_TEXT]), [END_OF_TEXT])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    rng, cuts = random.Random(3), [0]
    while cuts[-1] < len(text):
        cuts.append(cuts[-1] + rng.choice((1, 7, 100, 5000)))
    assert list(tokenizer.encode_iterable(text[a:b] for a, b in zip(cuts, cuts[1:]))) == ids
    encode_file(tokenizer, path, tmp_path / "text.npy")
    assert load_tokens(tmp_path / "text.npy", tokenizer).tolist() == ids


def test_long_runs_are_not_quadratic(tmp_path):
    """Ten times as many equal letters or spaces take less than 25 times as long to train on and to encode (to 3 MB)."""
    print("\n      of    MB  training s  encoding s")
    for character in ("a", " "):
        seconds = []
        for size in (300_000, 3_000_000):
            path = tmp_path / "run.txt"
            path.write_text(character * size, encoding="utf-8")
            started = time.perf_counter()
            tokenizer = Tokenizer(*train_bpe(path, 270, []))
            trained = time.perf_counter()
            assert sum(len(tokenizer.vocab[token]) for token in tokenizer.encode(character * size)) == size
            seconds.append((trained - started, time.perf_counter() - trained))
            print(f"{character!r:>8} {size / 1e6:5.1f} {seconds[-1][0]:11.2f} {seconds[-1][1]:11.2f}")
        for small, large in zip(*seconds):
            assert large < 25 * max(small, 0.05), f"{character!r}: {small:.2f} s for 0.3 MB, {large:.2f} s for 3 MB"


def test_one_long_line(tmp_path):
    """One line without an end of text is worked on in chunks: four times as long, it takes hardly more memory."""
    path = tmp_path / "line.txt"
    code = ("import resource, sys, bpe; path = sys.argv[1];"
            "t = bpe.Tokenizer(*bpe.train_bpe(path, 300, [], num_workers=1));"
            "n = bpe.encode_file(t, path, path + '.npy', num_workers=1);"
            "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    held = []
    for repeats in (300_000, 1_200_000):
        path.write_text("the quick brown fox, 12 times; " * repeats, encoding="utf-8")
        done = run([sys.executable, "-c", code, str(path)])
        assert done.returncode == 0, done.stderr[-2000:]
        tokens, megabytes = map(int, done.stdout.split())
        assert tokens > 5 * repeats, f"{tokens} tokens"
        held.append(megabytes)
    assert held[1] < 1.3 * held[0], f"{held} MB for lines of 9 and 37 MB"


def hostile(small: Path) -> dict[str, tuple[object, str]]:
    """vocab.json and merges.txt by what is wrong with them."""
    vocab = json.loads((small / "vocab.json").read_text(encoding="utf-8"))
    merges = (small / "merges.txt").read_text(encoding="utf-8").split("\n", 1)[1]
    header = "#version: 0.2\n"
    return {
        "a merge of what comes later": (vocab, header + "\n".join(reversed(merges.split("\n")))),
        "a merge that needs itself": (vocab, header + "lo w\nlow low\n" + merges),
        "negative ids": ({token: -number for token, number in vocab.items()}, header + merges),
        "huge ids": ({token: number + 10**15 for token, number in vocab.items()}, header + merges),
        "fractions": ({token: number + 0.5 for token, number in vocab.items()}, header + merges),
        "one id for all": (dict.fromkeys(vocab, 7), header + merges),
        "a list": (list(vocab), header + merges),
        "no merge": (vocab, header),
    }


@pytest.mark.parametrize("what", ["a merge of what comes later", "a merge that needs itself", "negative ids",
                                  "huge ids", "fractions", "one id for all", "a list", "no merge"])
def test_hostile_tokenizers(small, tmp_path, what):
    """A tokenizer from nowhere is refused in one sentence, or encodes and decodes without harm."""
    vocab, merges = hostile(small)[what]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    text = "lower lowest low" * 50
    try:
        tokenizer = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 0 <= min(tokenizer.vocab) and tokenizer.vocab_size < 2**32, "ids that no array can hold"
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 20, error


def test_invalid_utf8_says_where(tmp_path, capsys):
    """A byte that is no UTF-8 is named with its place, before anything is written."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"good text, " * 500_000 + b"\xff bad")
    with pytest.raises(SystemExit) as stopped:
        train.main([f"--dataset={path}", f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'runs'}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "byte 5,500,000 is 0xff" in error and error.count("\n") == 1, error
    assert not list((tmp_path / "data").rglob("*.txt")) and not (tmp_path / "runs").exists()


# --- Long runs ---


def test_a_long_run_stays_as_it_began(tmp_path):
    """20,000 steps and 200 evaluations: memory, open files, threads and the files on disk stay what they were."""
    text = tmp_path / "text.txt"
    text.write_text("tide and moon, moon and tide. " * 300, encoding="utf-8")
    watch = """
import gc, os, sys, threading, train
from pathlib import Path
steps, table, original = 0, [], train.get_batch
def counting(*args, **kwargs):
    global steps
    steps += 1
    if steps % 2500 == 0 or steps == 500:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        table.append((steps, resident, len(os.listdir("/proc/self/fd")), threading.active_count()))
    return original(*args, **kwargs)
train.get_batch = counting
train.main(sys.argv[1:])
for row in table: print("at", *row)
"""
    flags = dict(dataset=text, data_dir=tmp_path / "data", out_dir=tmp_path / "runs", vocab_size=256, context_length=4,
                 d_model=8, num_layers=1, num_heads=2, num_kv_heads=2, d_ff=8,
                 batch_size=2, max_steps=20_000, eval_interval=100,
                 save_interval=1000, log_interval=500, eval_tokens=50, device="cpu", dtype="float32", run_name="it")
    done = run([sys.executable, "-c", watch, *(f"--{name}={value}" for name, value in flags.items())])
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [list(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("at ")]
    print("\n   steps        MB  open files  threads")
    for step, megabytes, files, threads in rows:
        print(f"{step:8,.0f} {megabytes:9.1f} {files:11.0f} {threads:8.0f}")
    assert rows[-1][0] == 20_000 and rows[-1][1] < rows[0][1] * 1.05 + 5, "memory grew"
    assert rows[-1][2:] == rows[0][2:], "files or threads were left open"
    assert len(list((tmp_path / "runs" / "it").glob("checkpoint_*"))) == 2
    assert len(re.findall("val_loss", (tmp_path / "runs" / "it" / "log.jsonl").read_text())) == 201


# --- Round trips ---


def test_round_trips(tmp_path):
    """Seeded: packed documents come apart as they went in, and shards of a sequence gather to the whole."""
    import ddp
    import flash

    rng = np.random.default_rng(4)
    for _ in range(50):
        documents = [rng.integers(1, 50, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 9))]
        tokens = torch.tensor([token for document in documents for token in (*document, 0)])
        ids = flash.segment_ids_from_tokens(tokens, 0)
        assert [tokens[ids == number][:-1].tolist() for number in range(len(documents))] == documents
        positions = flash.positions_in_segments(ids)
        assert all(positions[ids == number].tolist() == list(range(len(document) + 1))
                   for number, document in enumerate(documents))
        size = int(rng.integers(1, 5))
        sequence = torch.arange(int(rng.integers(1, 9)) * 2 * size)
        chunks = sequence.chunk(2 * size)
        order = ddp.zigzag_order(size)
        gathered = {chunk: part for chunk, part in zip(order, (chunks[chunk] for chunk in order))}
        assert sorted(order) == list(range(2 * size))
        assert torch.equal(torch.cat([gathered[chunk] for chunk in range(2 * size)]), sequence)
    for seed in range(20):
        text = "".join(random.Random(seed).choices("aä \n\t'sй漢🎈1,<|endoftext|>", k=200))
        tokenizer = Tokenizer(bpe.Tokenizer({number: bytes([number]) for number in range(256)}, []).vocab, [])
        assert tokenizer.decode(tokenizer.encode(text)) == text
