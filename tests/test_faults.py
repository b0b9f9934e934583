"""What happens to machines and files happens here: real processes are killed, disks fill up, files are damaged.

    python -m pytest -m faults                                      # with those of the other files three minutes
    python -m pytest tests/test_faults.py -m faults -s --kills 50 --flips 2000 --full    # all of it, with its tables

A fault ends in one of two ways: the next start goes on by itself, or says in one sentence what to do. In both cases the
result is that of an undisturbed run, to the bit. Processes are those of test_ddp.py: forked from one that has imported
torch and our files.
"""

import concurrent.futures
import contextlib
import ctypes
import io
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ddp
import flash
import sample
import shard_opt
import train
from bpe import END_OF_TEXT, Tokenizer, UserError, encode_file, load_tokens, train_bpe
from model import ModelConfig, TransformerLM
from train import AdamW, latest_checkpoint, load_checkpoint, read_checkpoint, read_log, save_checkpoint

from test_ddp import CONTEXT, ROOT, Job, begin, still_living  # isort: skip

pytestmark = [pytest.mark.faults,
              pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc, which Linux has")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
DAMAGED = "damaged file taken for a good one"


# --- Runs ---


def flags(folder: Path, num_processes: int = 1, **more) -> list[str]:
    values = dict(dataset="stories", data_bytes=1_050_000, vocab_size=600, context_length=32, d_model=32, num_layers=2,
                  num_heads=2, d_ff=64, batch_size=8, max_steps=30, warmup_steps=5, save_interval=5, eval_interval=15,
                  log_interval=5, eval_tokens=3000, device="cpu", dtype="float32", optimizer="muon", run_name="it",
                  dist_timeout=5, num_workers=2, data_dir=folder / "data", out_dir=folder / "runs")
    values |= dict(ddp="bucketed") if num_processes > 1 else dict(grad_accum_steps=2)
    return [f"--{name}={value}" for name, value in (values | more).items()]


def resuming(folder: Path, num_processes: int = 1) -> list[str]:
    kept = ("--data_dir", "--out_dir", "--run_name", "--device", "--ddp", "--dist_timeout")
    return [flag for flag in flags(folder, num_processes) if flag.startswith(kept)] + ["--resume"]


def result_of(folder: Path) -> tuple[list, dict]:
    """Losses by step, and the final parameters."""
    lines = [{key: line[key] for key in ("step", "train_loss", "val_loss") if key in line}
             for line in read_log(folder / "runs" / "it" / "log.jsonl")]
    return lines, read_checkpoint(latest_checkpoint(folder / "runs" / "it"))["model"]


def assert_as_undisturbed(folder: Path, whole: Path, what: str) -> None:
    """The same losses, parameters, tokens and tokenizer, to the bit, and nothing half-written lies about."""
    (lines, parameters), (expected, wanted) = result_of(folder), result_of(whole)
    assert lines == expected, f"{what}: other losses"
    assert all(torch.equal(parameters[name], wanted[name]) for name in wanted), f"{what}: other parameters"
    for name in ("train.npy", "val.npy", "tokenizer.json", "merges.txt"):
        mine, theirs = (place / "data" / "stories" / "bpe600" / name for place in (folder, whole))
        assert not mine.exists() or mine.read_bytes() == theirs.read_bytes(), f"{what}: {name} differs"
    assert not (left := [*folder.rglob("*.tmp")]), f"{what}: left half-written: {left}"


def go_on(folder: Path, num_processes: int = 1) -> str:
    """Start the same command again, and where it says --resume, do that; which of the two it was."""
    again = Job("train", flags(folder, num_processes), folder / "again.txt", num_processes)
    if again.wait() == 0:
        return "went on by itself"
    assert any("go on with --resume" in line for line in again.told()), again.text()[-2000:]
    assert num_processes > 1 or "Traceback" not in again.text() and len(again.told()) == 1, again.text()[-2000:]
    again = Job("train", resuming(folder, num_processes), folder / "resumed.txt", num_processes)
    assert again.wait() == 0, again.text()[-2000:]
    return "said: --resume; that went on"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, Path]:
    """By number of processes: the folder of a run that nothing happened to. The first came from the command line."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    command = [sys.executable, "train.py", *flags(one)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(one / "data", two / "data")
    job = Job("train", flags(two, 2), two / "out.txt", 2)
    assert job.wait() == 0, job.text()[-2000:]
    return {1: one, 2: two}


# --- Kill -9 ---


def in_writing(folder: Path, names: str):
    return lambda: next(folder.rglob(f"{names}.*.tmp"), None)


# what is killed, in how many processes, which ranks, how many seconds after the sign that the moment has come
PLAN = [("text generation", 1, 0.3, lambda folder, job: in_writing(folder, "train.txt")),
        ("tokenizer training", 1, 0.6, lambda folder, job: lambda: "tokenizer: training" in job.text()),
        ("bpe.py --input", 1, 0.6, lambda folder, job: lambda: "training 300" in job.text()),
        ("encoding", 1, 0.3, lambda folder, job: in_writing(folder, "*.npy")),
        ("training", 1, 0.3, lambda folder, job: lambda: "step     1/" in job.text()),
        ("checkpoint writing", 1, 0.004, lambda folder, job: in_writing(folder, "checkpoint_*")),
        ("training", 2, 0.3, lambda folder, job: lambda: "step     1/" in job.text()),
        ("checkpoint writing", 2, 0.004, lambda folder, job: in_writing(folder, "checkpoint_*")),
        ("sampling", 1, 0.3, lambda folder, job: lambda: "--- " in job.text()),
        ("any", 2, 3.0, lambda folder, job: lambda: True)]


def kill_once(number: int, folder: Path, undisturbed: dict[int, Path]) -> tuple[str, str, str]:
    """One kill at a seeded moment: what was killed, what could be seen of it, what the next start did."""
    stage, num_processes, longest, sign = PLAN[number % len(PLAN)]
    rng, whole = random.Random(number), undisturbed[num_processes]
    folder.mkdir()
    if stage in ("training", "checkpoint writing", "sampling"):
        shutil.copytree(whole / "data", folder / "data")
    if stage == "sampling":
        return kill_sampling(folder, whole, rng)
    if stage == "bpe.py --input":
        return kill_tokenizer_training(folder, whole, rng)
    more = {"save_interval": 1} if stage == "checkpoint writing" else {}
    victim = Job("train", flags(folder, num_processes, **more), folder / "out.txt", num_processes)
    for _ in range(rng.randrange(1, 20) if stage == "checkpoint writing" else 1):
        seen = victim.wait_for(sign(folder, victim))
        victim.wait_for(lambda: not sign(folder, victim)() or stage != "checkpoint writing")
    seen = victim.wait_for(sign(folder, victim))
    time.sleep(rng.uniform(0, longest))
    ranks = rng.choice(((0, 1), (0,), (1,))) if num_processes == 2 else (0,)
    running = victim.ranks[0].is_alive()
    victim.kill(ranks=ranks)
    victim.wait(30)  # the other rank and all workers end by themselves
    assert seen or stage == "any", f"{stage} was not seen: {victim.text()[-2000:]}"
    half = sorted(re.sub(r"[_.]\d+", "", path.name) for path in folder.rglob("*.tmp"))
    if more:  # the stored interval is that of the victim
        stored = folder / "runs" / "it" / "config.json"
        stored.write_text(stored.read_text().replace('"save_interval": 1', '"save_interval": 5'))
    how = go_on(folder, num_processes)
    assert_as_undisturbed(folder, whole, f"kill {number} in {stage}")
    shutil.rmtree(folder)
    who = {(0, 1): "both ranks", (0,): "rank 0", (1,): "rank 1"}[ranks] if num_processes == 2 else "the process"
    return f"{stage}, {who}", f"half-written: {', '.join(half)}" if half else "" if running else "had ended", how


def kill_sampling(folder: Path, whole: Path, rng: random.Random) -> tuple[str, str, str]:
    shutil.copytree(whole / "runs", folder / "runs")
    argv = ["--run", str(folder / "runs" / "it"), "--max_new_tokens", "60", "--device", "cpu"]
    before = {path: path.read_bytes() for path in (folder / "runs" / "it").iterdir()}
    victim = Job("sample", argv, folder / "killed.txt")
    victim.wait_for(lambda: "--- " in victim.text())
    time.sleep(rng.uniform(0, 0.2))
    victim.kill()
    victim.wait()
    texts = []
    for name, place in (("again", folder), ("undisturbed", whole)):
        job = Job("sample", [*argv[:1], str(place / "runs" / "it"), *argv[2:]], folder / f"{name}.txt")
        assert job.wait() == 0, job.text()
        texts.append(re.sub(r"(?m)^--- .*\n?", "", job.text()))
    assert texts[0] == texts[1], "another text after a kill"
    assert before == {path: path.read_bytes() for path in (folder / "runs" / "it").iterdir()}, "sampling wrote"
    shutil.rmtree(folder)
    return "sampling, the process", "", "wrote the same text"


def kill_tokenizer_training(folder: Path, whole: Path, rng: random.Random) -> tuple[str, str, str]:
    text = whole / "data" / "stories" / "train.txt"
    argv = ["--input", str(text), "--vocab_size", "300", "--num_workers", "2", "--out", str(folder / "out")]
    victim = Job("bpe", argv, folder / "out.txt")
    victim.wait_for(lambda: "training 300" in victim.text())
    time.sleep(rng.uniform(0, 0.6))
    victim.kill()
    victim.wait(20)
    again = Job("bpe", argv, folder / "again.txt")
    assert again.wait() == 0, again.text()
    expected = train_bpe(text, 300, [END_OF_TEXT], num_workers=1)
    assert Tokenizer.load(folder / "out").hash() == Tokenizer(*expected, [END_OF_TEXT]).hash(), "another tokenizer"
    shutil.rmtree(folder)
    return "bpe.py --input, the process", "", "went on by itself"


def test_kill_at_any_moment(undisturbed, tmp_path, request):
    """Kill -9 in every stage, on one and two processes: the next start ends with the undisturbed bits; no orphans."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        kills = [pool.submit(kill_once, number, tmp_path / str(number), undisturbed)
                 for number in range(request.config.getoption("kills"))]
        table = Counter(kill.result() for kill in kills)
    print(f"\n{'killed in':<32}{'times':>6}  {'what was left':<44}the next start")
    for (stage, left, how), times in sorted(table.items()):
        print(f"{stage:<32}{times:6}  {left:<44}{how}")


def test_a_killed_launcher_leaves_no_ranks(undisturbed, tmp_path):
    """Ranks whose torchrun is killed save and end, instead of training on unseen; the run goes on from there."""
    shutil.copytree(undisturbed[2] / "data", tmp_path / "data")
    launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                                 "train.py", *flags(tmp_path, 2)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    said = next(line for line in launcher.stdout if line.startswith("step     5/"))
    ranks = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
             if path.read_text().rpartition(")")[2].split()[1] == str(launcher.pid)]
    launcher.kill()
    launcher.wait()
    assert len(ranks) == 2, f"{len(ranks)} processes"
    said += launcher.stdout.read()  # ends with the last of the ranks
    assert not still_living(ranks, 30) and "step    30/30" not in said, f"the ranks trained on: {said}"
    assert "go on with:" in said, said
    again = Job("train", resuming(tmp_path, 2), tmp_path / "again.txt", 2)
    assert again.wait() == 0, again.text()[-2000:]
    assert_as_undisturbed(tmp_path, undisturbed[2], "killed launcher")


@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
def test_the_terminal_is_left_sane(undisturbed, tmp_path, how):
    """A run in a terminal that is killed, or stopped by Ctrl-C, leaves the terminal's modes and colours alone."""
    if how == "Ctrl-C":
        shutil.copytree(undisturbed[1] / "data", tmp_path / "data")
    ours, theirs = pty.openpty()
    before, shown = termios.tcgetattr(theirs), []
    sign = b"tokenizer: training" if how == "kill" else b"step    10/"

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                shown.append(data)
    threading.Thread(target=read, daemon=True).start()
    job = Job("train", flags(tmp_path, max_steps=2000), os.ttyname(theirs))
    assert job.wait_for(lambda: sign in b"".join(shown)), shown
    if how == "Ctrl-C":
        os.write(ours, b"\x03")  # the terminal itself sends SIGINT to all of the session
    else:
        job.kill()
    job.ranks[0].join(30)
    assert not still_living([job.ranks[0].pid], 10), f"lives on: {shown}"
    time.sleep(0.1)
    text, after = b"".join(shown), termios.tcgetattr(theirs)
    os.close(theirs)
    os.close(ours)
    assert after == before and b"\x1b" not in text, "the terminal was changed"
    if how == "Ctrl-C":
        assert job.ranks[0].exitcode == 130 and b"go on with:" in text and b"Traceback" not in text, text[-2000:]


def test_a_torn_last_line(undisturbed, tmp_path):
    """A log whose last line was cut off by a kill goes on as if it had never been begun."""
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    log = tmp_path / "runs" / "it" / "log.jsonl"
    (log.parent / "checkpoint_00000030.pt").unlink()
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-2]) + lines[-2][:37])
    job = Job("train", resuming(tmp_path), tmp_path / "out.txt")
    assert job.wait() == 0, job.text()[-2000:]
    assert all(json.loads(line) for line in log.read_text().splitlines()), "the torn line is still there"
    assert_as_undisturbed(tmp_path, undisturbed[1], "torn log")


def test_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """What is written gets its name after the disk has all of it: a power cut leaves the old file or the new."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(number: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def noted_replace(old, new) -> None:
        calls.append((str(old), str(new)))
        replace(old, new)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    (tmp_path / "text.txt").write_text("to be cut " * 99, encoding="utf-8")
    tokenizer = Tokenizer(*train_bpe(tmp_path / "text.txt", 260, []))
    tokenizer.save(tmp_path)
    encode_file(tokenizer, tmp_path / "text.txt", tmp_path / "text.npy")
    save_checkpoint(model := tiny_model(), AdamW(model.parameters()), 1, tmp_path / "checkpoint.pt")
    renamed = [call for call in calls if isinstance(call, tuple)]
    assert {Path(new).name for _, new in renamed} == {path.name for path in tmp_path.iterdir()} - {"text.txt"}
    for old, new in renamed:
        assert old in calls[: calls.index((old, new))], f"{new} got its name before the disk had it"


# --- Full disks, read-only folders, vanishing files ---


def in_own_mounts(story, *arguments) -> None:
    """Let story mount what it likes in a namespace of its own, which ends with it; exit code 77: not allowed here."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x20000 | (0 if user == 0 else 0x10000000)):  # CLONE_NEWNS, CLONE_NEWUSER
        os._exit(77)
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")

    def mount(place: Path, options: str, flag: int = 0) -> None:
        if libc.mount(b"none", str(place).encode(), b"tmpfs", flag, options.encode()):
            os._exit(77)
    libc.mount(None, b"/", None, 0x4000 | 0x40000, None)  # MS_REC, MS_PRIVATE: nobody else sees them
    story(mount, *arguments)


def attempt(argv: list[str], output: Path) -> int:
    """train.py in a process of its own; its exit code."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            begin("train", argv, str(output), {}, 300_000)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def full_disk(mount, folder: Path, what: str, kilobytes: int, report: Path) -> None:
    """A run with its data or its checkpoints on a small disk, which is then made larger."""
    small = folder / what
    small.mkdir()
    mount(small, f"size={kilobytes}k")
    if what == "runs":
        shutil.copytree(report.parent / "whole", folder / "data")
    code = attempt(flags(folder), folder / "out.txt")
    left = [str(path) for path in folder.rglob("*.tmp")]
    mount(small, "size=100m", 0x20)  # MS_REMOUNT: room has been made
    started = (folder / "runs" / "it" / "config.json").exists()
    second = attempt(resuming(folder) if started else flags(folder), folder / "again.txt")
    for inside in ("runs", "data"):
        shutil.copytree(folder / inside, report.parent / "kept" / inside)
    report.write_text(json.dumps([code, left, second]))


DISKS = [("data", 500), ("data", 1150), ("data", 1700), ("runs", 60), ("runs", 500), ("runs", 1200)]


def test_disk_full(undisturbed, tmp_path):
    """A full disk, a real one, in every stage: one sentence, nothing half-written; with room made the run goes on."""
    def one(what: str, kilobytes: int) -> str:
        place = tmp_path / f"{what}{kilobytes}"
        (place / "work").mkdir(parents=True)
        os.symlink(undisturbed[1] / "data", place / "whole")
        report = place / "report.json"
        process = CONTEXT.Process(target=in_own_mounts, args=(full_disk, place / "work", what, kilobytes, report))
        process.start()
        process.join()
        if process.exitcode == 77:
            return "77"
        said = (place / "work" / "out.txt").read_text()
        again = (place / "work" / "again.txt").read_text()
        assert process.exitcode == 0, f"{what} on {kilobytes} kB: {said[-2000:]} {again[-2000:]}"
        code, left, second = json.loads(report.read_text())
        told = [line for line in said.splitlines() if line.startswith("train.py: ")]
        assert code == 2 and len(told) == 1 and "make room" in told[0], f"{what} on {kilobytes} kB: {said[-2000:]}"
        assert "Traceback" not in said and not left, f"{what} on {kilobytes} kB: {left}"
        assert second == 0, again[-2000:]
        assert_as_undisturbed(place / "kept", undisturbed[1], f"{what} on {kilobytes} kB")
        return f"{what:<6}{kilobytes:8,} kB  {re.sub(r'/[^ ]*/', '', told[0])}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        table = list(pool.map(one, *zip(*DISKS)))
    if "77" in table:
        pytest.skip("this machine lets nobody mount a tmpfs; test_file_size_limit stands in")
    print("\n" + "\n".join(table))


def limited(argv: list[str], output: str, most: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    begin("train", argv, output, {}, 300_000)


def test_file_size_limit(undisturbed, tmp_path):
    """Files that may not grow, like those on a full disk: one sentence; without the limit the run goes on."""
    shutil.copytree(undisturbed[1] / "data", tmp_path / "data")
    process = CONTEXT.Process(target=limited, args=(flags(tmp_path), str(tmp_path / "out.txt"), 150_000))
    process.start()
    process.join()
    said = (tmp_path / "out.txt").read_text()
    assert process.exitcode == 2 and said.count("train.py: ") == 1 and "make room" in said, said[-2000:]
    assert "Traceback" not in said and not list(tmp_path.rglob("*.tmp"))
    go_on(tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed[1], "limit of file size")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_room_for_the_log(tmp_path):
    """A log that cannot be written says so in one sentence."""
    log = train.RunLog(tmp_path, -1)
    log.file.close()
    log.file = open("/dev/full", "w")
    with pytest.raises(UserError, match="cannot write .*make room"):
        log.write({"step": 1, "train_loss": 2.0})
    with contextlib.suppress(OSError):
        log.file.close()
    log.lock.close()


def read_only(mount, folder: Path, report: Path) -> None:
    """Three starts: with a read-only place for runs, for data, and with data that is there and need not be written."""
    locked, codes = folder / "locked", []
    locked.mkdir()
    mount(locked, "size=50m")
    shutil.copytree(report.parent / "whole", locked / "data")
    mount(locked, "size=50m", 0x20 | 1)  # MS_REMOUNT, MS_RDONLY
    for number, more in enumerate((dict(out_dir=locked / "runs", data_dir=locked / "data"),
                                   dict(out_dir=folder / "runs", data_dir=locked / "other"),
                                   dict(out_dir=folder / "runs", data_dir=locked / "data"))):
        codes.append(attempt(flags(folder, **more), folder / f"{number}.txt"))
    report.write_text(json.dumps(codes))


def test_places_that_cannot_be_written(undisturbed, tmp_path):
    """A folder that is a file or read-only is one sentence with exit code 2; data that is there may be read-only."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "work").mkdir()
    os.symlink(undisturbed[1] / "data", tmp_path / "whole")
    for place in ("file", "file/below"):
        job = Job("train", flags(tmp_path, data_dir=undisturbed[1] / "data", out_dir=tmp_path / place),
                  tmp_path / "out.txt")
        assert job.wait() == 2 and len(job.told()) == 1 and "Traceback" not in job.text(), job.text()[-2000:]
        job.output.unlink()
    process = CONTEXT.Process(target=in_own_mounts, args=(read_only, tmp_path / "work", tmp_path / "report.json"))
    process.start()
    process.join()
    if process.exitcode == 77:
        pytest.skip("this machine lets nobody mount a tmpfs")
    texts = [(tmp_path / "work" / f"{number}.txt").read_text() for number in range(3)]
    assert json.loads((tmp_path / "report.json").read_text()) == [2, 2, 0], texts
    assert all(text.count("train.py: ") == 1 and "Traceback" not in text for text in texts[:2]), texts


@pytest.mark.parametrize("what", ["data", "runs"])
def test_files_vanish_in_mid_run(undisturbed, tmp_path, what):
    """Token arrays removed during a run do not disturb it, they stay open; without its folder it ends in a sentence."""
    shutil.copytree(undisturbed[1] / "data", tmp_path / "data")
    job = Job("train", flags(tmp_path), tmp_path / "out.txt")
    assert job.wait_for(lambda: "step     5/" in job.text()), job.text()
    (tmp_path / what).rename(tmp_path / "gone")  # at once: the run may be writing
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    code = job.wait()
    if what == "data":
        assert code == 0, job.text()[-2000:]
        assert_as_undisturbed(tmp_path, undisturbed[1], "vanished tokens")
    else:
        assert code == 2 and len(job.told()) == 1 and "runs/it" in job.told()[0], job.text()[-2000:]
        assert "Traceback" not in job.text()


def test_two_runs_into_one_folder(undisturbed, tmp_path):
    """The second is refused while the first lives; a first that is killed leaves no lock behind."""
    shutil.copytree(undisturbed[1] / "data", tmp_path / "data")
    first = Job("train", flags(tmp_path), tmp_path / "first.txt")
    assert first.wait_for(lambda: "step    10/" in first.text()), first.text()
    first.kill(signal.SIGSTOP)
    config = (tmp_path / "runs" / "it" / "config.json").read_text()
    for number, argv in enumerate((flags(tmp_path), [*resuming(tmp_path), "--max_steps=7"])):
        second = Job("train", argv, tmp_path / f"{number}.txt")
        assert second.wait() == 2 and len(second.told()) == 1, second.text()
        reason = ("holds a run already", "another process is training this run")[number]
        assert reason in second.told()[0], second.told()
    assert (tmp_path / "runs" / "it" / "config.json").read_text() == config, "the second has changed the first"
    first.kill()
    first.wait()
    go_on(tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed[1], "two runs")


def test_two_runs_prepare_the_same_data(undisturbed, tmp_path):
    """Runs that start at once with one data folder wait for each other, and both end as the undisturbed one."""
    jobs = [Job("train", flags(tmp_path, out_dir=tmp_path / name / "runs"), tmp_path / f"{name}.txt") for name in "ab"]
    for name, job in zip("ab", jobs):
        assert job.wait() == 0, job.text()[-2000:]
        assert result_of(tmp_path / name)[0] == result_of(undisturbed[1])[0], f"{name}: other losses"


# --- Damaged files ---


def damages(data: bytes, flips: int):
    """Every eighth truncation, then single bytes changed at random places."""
    rng = random.Random(2)
    for length in range(0, len(data), 8):
        yield data[:length]
    for _ in range(flips):
        place = rng.randrange(len(data))
        yield data[:place] + bytes([data[place] ^ rng.randrange(1, 256)]) + data[place + 1 :]


def assert_each_is_refused_or_equal(what: str, data: bytes, request, load, equal) -> None:
    """load(damaged bytes) ends in one sentence, or equal(what it loaded) holds; each within two seconds."""
    counts, slowest = Counter(), 0.0
    for damaged in damages(data, request.config.getoption("flips")):
        started = time.perf_counter()
        try:
            assert equal(load(damaged)), f"{what}: a {DAMAGED}"
            counts["equal"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) > 20, f"not a sentence: {error}"
            counts["refused"] += 1
        slowest = max(slowest, time.perf_counter() - started)
    print(f"\n{what}, {len(data):,} bytes: {sum(counts.values()):,} damages, {dict(counts)}, slowest {slowest:.3f} s")
    assert slowest < 2, f"{what}: {slowest:.1f} s"


def tiny_model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(vocab_size=11, context_length=8, d_model=4, num_layers=1, num_heads=2, d_ff=4))


def test_damaged_checkpoints(beside, request):
    """A checkpoint cut off anywhere or with any byte changed is refused in one sentence, or loads the same tensors."""
    model, buffer = tiny_model(), io.BytesIO()
    optimizer = AdamW(model.parameters())
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    save_checkpoint(model, optimizer, 3, buffer)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]

    def load(data: bytes) -> int:
        with torch.no_grad():
            for tensor in [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]:
                tensor.zero_()
        return load_checkpoint(io.BytesIO(data), model, optimizer)

    def equal(step: int) -> bool:
        return (step == 3 and all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
                and all(torch.equal(state["exp_avg"], was) for state, was in zip(optimizer.state.values(), moments)))
    assert_each_is_refused_or_equal("checkpoint", buffer.getvalue(), request, load, equal)


@pytest.fixture(scope="module")
def beside(request, tmp_path_factory) -> dict:
    """Work of minutes in processes of their own, begun with the first damaged file: the other core is idle there."""
    full, names = request.config.getoption("full"), {item.originalname for item in request.session.items}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield {work.__name__: pool.submit(work, tmp_path_factory.mktemp(work.__name__), full)
               for work, test in ((long_lines, "test_one_long_line"), (long_run, "test_a_long_run_stays_as_it_began"))
               if test in names}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small text with its tokenizer and token array, and a run on it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(f"low lower lowest, newer wider{END_OF_TEXT}\n" * 40, encoding="utf-8")
    tokenizer = Tokenizer(*train_bpe(folder / "text.txt", 290, [END_OF_TEXT]), [END_OF_TEXT])
    tokenizer.save(folder)
    encode_file(tokenizer, folder / "text.txt", folder / "text.npy")
    train.main([*tiny(folder / "text.txt", folder), "--tie_embeddings"])
    return folder


def tiny(text: Path, folder: Path, **more) -> list[str]:
    values = dict(dataset=text, data_dir=folder / "data", out_dir=folder / "runs", run_name="it", vocab_size=290,
                  context_length=4, d_model=4, num_layers=1, num_heads=2, num_kv_heads=2, d_ff=4, batch_size=2,
                  max_steps=2, warmup_steps=0, eval_tokens=50, log_interval=1, device="cpu", dtype="float32")
    return [f"--{name}={value}" for name, value in (values | more).items()]


def test_damaged_checkpoint_of_a_run(small, tmp_path, request):
    """sample.py's reader takes no damaged checkpoint for a good one, either."""
    folder = tmp_path / "it"
    shutil.copytree(small / "runs" / "it", folder)
    path = latest_checkpoint(folder)
    wanted = read_checkpoint(path)["model"]

    def load(data: bytes):
        path.write_bytes(data)
        return sample.load_run(folder, torch.device("cpu"), torch.float32)[0].state_dict()
    some = path.read_bytes()
    request.config.option.flips, flips = request.config.option.flips // 3, request.config.option.flips
    try:
        assert_each_is_refused_or_equal("run", some, request, load, lambda model: all(
            torch.equal(model[name], wanted[name]) for name in wanted))
    finally:
        request.config.option.flips = flips


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_damaged_tokenizers(small, tmp_path, name, request):
    """A tokenizer's file cut off anywhere or with any byte changed is refused in one sentence, or is the same one."""
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        shutil.copy(small / file, tmp_path)
    good, files = Tokenizer.load(small), (tmp_path / "vocab.json", tmp_path / "merges.txt", [END_OF_TEXT])

    def load(data: bytes) -> Tokenizer:
        (tmp_path / name).write_bytes(data)
        return Tokenizer.load(tmp_path) if name == "tokenizer.json" else Tokenizer.from_files(*files)
    assert_each_is_refused_or_equal(name, (small / name).read_bytes(), request, load,
                                    lambda loaded: loaded.hash() == good.hash())


@pytest.mark.parametrize("name", ["text.npy", "text.json"])
def test_damaged_token_arrays(small, tmp_path, name, request):
    """A token array or its sidecar, cut off or changed, is refused in one sentence, or has the same tokens."""
    for file in ("text.npy", "text.json"):
        shutil.copy(small / file, tmp_path)
    tokenizer = Tokenizer.load(small)
    good = np.array(load_tokens(small / "text.npy", tokenizer))

    def load(data: bytes) -> np.ndarray:
        (tmp_path / name).write_bytes(data)
        return np.array(load_tokens(tmp_path / "text.npy", tokenizer))
    assert_each_is_refused_or_equal(name, (small / name).read_bytes(), request, load,
                                    lambda loaded: np.array_equal(loaded, good))


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_damaged_files_of_a_run(small, tmp_path, name, request):
    """A run's configuration or log, damaged, is refused in one sentence, or is read as what it then says."""
    folder = tmp_path / "it"
    folder.mkdir()
    for file in ("config.json", "log.jsonl"):
        shutil.copy(small / "runs" / "it" / file, folder)
    place = train.Place(resume=True, out_dir=str(tmp_path), run_name="it", device="cpu")

    def load(data: bytes):
        (folder / name).write_bytes(data)
        if name == "config.json":
            return train.settings({}, place)
        log = train.RunLog(folder, 2)
        log.close()
        return [line["step"] for line in read_log(folder / name)]
    assert_each_is_refused_or_equal(name, (folder / name).read_bytes(), request, load, lambda loaded: True)


@pytest.mark.parametrize("value", [0x10, 0x5A, 0xFF])
def test_every_attribute_of_a_checkpoint(value, tmp_path):
    """A byte that makes a stored tensor a folder, which torch would read as zeros, is found in every entry."""
    model = tiny_model()
    save_checkpoint(model, AdamW(model.parameters()), 3, path := tmp_path / "c.pt")
    data, places = path.read_bytes(), []
    while (place := data.find(b"PK\1\2", places[-1] + 1 if places else 0)) >= 0:
        places.append(place)  # the entries of the archive's directory
    assert len(places) > 10, f"{len(places)} entries"
    for place in places:
        damaged = bytearray(data)
        damaged[place + 38] = value
        with pytest.raises(UserError, match="unreadable checkpoint"):
            read_checkpoint(io.BytesIO(damaged))


class Harmful:
    """Unpickled, it runs a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_file_runs_code(small, tmp_path):
    """Checkpoints, token arrays and caches that hold code are refused, and the code does not run."""
    harmful, folder = Harmful(tmp_path / "harm"), tmp_path / "it"
    shutil.copytree(small / "runs" / "it", folder)
    torch.save({"model": harmful, "optimizer": {}, "iteration": 1}, path := latest_checkpoint(folder))
    with pytest.raises(UserError, match="unreadable checkpoint"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="unreadable checkpoint"):
        sample.load_run(folder, torch.device("cpu"), torch.float32)
    shutil.copy(small / "text.json", tmp_path)
    np.save(tmp_path / "text.npy", np.array([harmful], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read"):
        load_tokens(tmp_path / "text.npy", Tokenizer.load(small))
    assert not harmful.path.exists(), "code from a file has run"
    with open(path, "rb") as file:
        torch.load(file, weights_only=False)
    assert harmful.path.exists(), "the file is not as harmful as it should be"


# --- Hostile text and tokenizers ---


PLANES = "".join(chr(plane * 0x10000 + 0x41 + offset) for plane in range(17) for offset in range(0, 600, 7))
TEXTS = {"NUL": "a\0b\0\0c " * 999, "one document": "no end of text " * 3000, "white space": " \t\n\r\n" * 5000,
         "empty lines": "\n" * 20_000, "BOM, CRLF": "\ufeffwith a mark\r\nand its line ends\r\n" * 500,
         "planes": PLANES * 9, "a letter": "x" * 100_000, "ends of text": END_OF_TEXT * 300 + "x" * 300}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_survive_the_round_trip(name, tmp_path):
    """Whatever the text is, decode(encode(x)) is x, whole or cut anywhere, and a model trains on it and is sampled."""
    text, path = TEXTS[name], tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    tokenizer = Tokenizer(*train_bpe(path, 290, [END_OF_TEXT]), [END_OF_TEXT])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    rng, cuts = random.Random(3), [0]
    while cuts[-1] < len(text):
        cuts.append(cuts[-1] + rng.choice((1, 7, 100, 5000)))
    assert list(tokenizer.encode_iterable(text[a:b] for a, b in zip(cuts, cuts[1:]))) == ids
    encode_file(tokenizer, path, tmp_path / "text.npy")
    assert load_tokens(tmp_path / "text.npy", tokenizer).tolist() == ids
    train.main(tiny(path, tmp_path, vocab_size=256))
    assert math.isfinite(read_log(tmp_path / "runs" / "it" / "log.jsonl")[-1]["val_loss"])
    sample.main([f"--run={tmp_path / 'runs' / 'it'}", "--max_new_tokens=5", "--device=cpu"])


@pytest.mark.parametrize("place", [0, 1_700_000, 4_000_001])
def test_invalid_utf8_says_where(place, tmp_path, capsys):
    """A byte that is no UTF-8 is named with its place, before anything is written."""
    path, text = tmp_path / "text.txt", bytearray(b"good text, " * 500_000)
    text[place] = 0xFF
    path.write_bytes(text)
    with pytest.raises(SystemExit) as stopped:
        train.main(tiny(path, tmp_path))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"byte {place:,} is 0xff" in error and error.count("\n") == 1, error
    assert not list((tmp_path / "data").rglob("*.txt")) and not (tmp_path / "runs").exists()


def test_long_runs_are_not_quadratic(tmp_path, request):
    """Ten times as many equal letters or spaces take less than 40 times as long, where squares would take 100."""
    full = request.config.getoption("full")
    print("\n      of    MB  training s  encoding s")
    for character in ("a", " "):
        seconds = []
        for size in (100_000, 1_000_000, 10_000_000) if full else (40_000, 400_000):
            path = tmp_path / "run.txt"
            path.write_text(character * size, encoding="utf-8")
            started = time.perf_counter()
            tokenizer = Tokenizer(*train_bpe(path, 270, []))
            trained = time.perf_counter()
            assert sum(len(tokenizer.vocab[token]) for token in tokenizer.encode(character * size)) == size
            seconds.append((trained - started, time.perf_counter() - trained))
            print(f"{character!r:>8} {size / 1e6:5.2f} {seconds[-1][0]:11.2f} {seconds[-1][1]:11.2f}")
        for smaller, larger in zip(seconds, seconds[1:]):
            assert all(b < 40 * max(a, 0.05) for a, b in zip(smaller, larger)), f"{character!r}: {seconds} s"


def long_lines(folder: Path, full: bool) -> list[tuple[int, float, int, int]]:
    """How often a sentence is repeated, the seconds, the tokens, and the megabytes held."""
    path, table = folder / "line.txt", []
    # VmHWM and not getrusage: that one would count the memory of the process that started this one
    code = ("import re, sys, bpe; path = sys.argv[1];"
            "t = bpe.Tokenizer(*bpe.train_bpe(path, 300, [], num_workers=1));"
            "n = bpe.encode_file(t, path, path + '.npy', num_workers=1);"
            "print(n, int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024)")
    for repeats in (150_000, 750_000, 6_450_000)[: 3 if full else 2]:
        path.write_text("the quick brown fox, 12 times; " * repeats, encoding="utf-8")
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        table.append((repeats, time.perf_counter() - started, *map(int, done.stdout.split())))
    return table


def test_one_long_line(beside):
    """One line without an end of text is worked on in chunks: five times as long, it takes hardly more memory."""
    table = beside["long_lines"].result()
    print("\n      MB   seconds  MB held")
    for repeats, seconds, tokens, megabytes in table:
        print(f"{31 * repeats / 1e6:8.1f} {seconds:9.1f} {megabytes:8}")
        assert tokens > 5 * repeats, f"{tokens} tokens"
    held = [row[-1] for row in table]
    assert held[-1] < 1.3 * held[0], f"{held} MB"


HEADER = "#version: 0.2\n"
HOSTILE = {  # from vocab and the lines of merges.txt to other ones
    "a merge of what comes later": lambda vocab, merges: (vocab, merges[::-1]),
    "merges in a circle": lambda vocab, merges: (vocab | {"ab": 900, "aba": 901}, ["ab a", "a b", "aba b", *merges]),
    "a merge that needs itself": lambda vocab, merges: (vocab, ["lo w", "low low", *merges]),
    "each merge twice": lambda vocab, merges: (vocab, merges + merges),
    "negative ids": lambda vocab, merges: ({token: -number for token, number in vocab.items()}, merges),
    "huge ids": lambda vocab, merges: ({token: number + 10**15 for token, number in vocab.items()}, merges),
    "infinite ids": lambda vocab, merges: ({token: number or math.inf for token, number in vocab.items()}, merges),
    "fractions": lambda vocab, merges: ({token: number + 0.5 for token, number in vocab.items()}, merges),
    "words as ids": lambda vocab, merges: (dict.fromkeys(vocab, "seven"), merges),
    "nothing as ids": lambda vocab, merges: (dict.fromkeys(vocab), merges),
    "one id for all": lambda vocab, merges: (dict.fromkeys(vocab, 7), merges),
    "a list": lambda vocab, merges: (list(vocab), merges),
    "depth": lambda vocab, merges: ("[" * 100_000, merges),
    "no merge": lambda vocab, merges: (vocab, []),
    "merges of three": lambda vocab, merges: (vocab, [merge + " x" for merge in merges]),
    "no bytes": lambda vocab, merges: ({"low": 0, "lower": 1}, ["low er"]),
    "a long token": lambda vocab, merges: (vocab | {"a" * 3_000_000: 5000}, merges),
}


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tokenizers(small, tmp_path, what, kind):
    """A tokenizer from nowhere is refused in one sentence, or encodes and decodes without harm."""
    lines = (small / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocab, merges = HOSTILE[what](json.loads((small / "vocab.json").read_text(encoding="utf-8")), lines)
    if kind == "tokenizer.json":
        theirs = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
        theirs["added_tokens"], theirs["model"]["merges"] = [], [merge.split(" ") for merge in merges]
        theirs["model"]["vocab"] = "PLACE"
        whole = json.dumps(theirs).replace('"PLACE"', vocab if isinstance(vocab, str) else json.dumps(vocab))
        (tmp_path / "tokenizer.json").write_text(whole, encoding="utf-8")
        load = partial(Tokenizer.load, tmp_path)
    else:
        whole = vocab if isinstance(vocab, str) else json.dumps(vocab)
        (tmp_path / "vocab.json").write_text(whole, encoding="utf-8")
        (tmp_path / "merges.txt").write_text(HEADER + "\n".join(merges), encoding="utf-8")
        load = partial(Tokenizer.from_files, tmp_path / "vocab.json", tmp_path / "merges.txt")
    text, started = "lower lowest low ab abab" * 50, time.perf_counter()
    try:
        tokenizer = load()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 0 <= min(tokenizer.vocab) and tokenizer.vocab_size <= 2**32, "ids that no array can hold"
    except UserError as error:
        assert "\n" not in str(error) and 20 < len(str(error)) < 1000, f"{str(error)[:1000]}"
    assert time.perf_counter() - started < 5, f"{time.perf_counter() - started:.1f} s"


@pytest.mark.parametrize("special", [{"id": 288, "content": ""}, {"id": 288, "content": 7}, {"id": -1, "content": "x"},
                                     {"id": 10**12, "content": "x"}, {"id": 97, "content": "again"}, {"content": "x"},
                                     {"id": [1], "content": "x"}, {"id": 288, "content": "\ud800"}, 5], ids=str)
def test_hostile_special_tokens(small, tmp_path, special):
    """Special tokens from nowhere are refused in one sentence, or encode and decode without harm."""
    theirs = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    theirs["added_tokens"] = [special]
    (tmp_path / "tokenizer.json").write_text(json.dumps(theirs), encoding="utf-8")
    try:
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.decode(tokenizer.encode("lowest x")) == "lowest x"
        assert 0 <= min(tokenizer.vocab) and tokenizer.vocab_size <= 2**32, "ids that no array can hold"
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 20, error


# --- Numbers that are none ---


@pytest.mark.parametrize("skip", [False, True], ids=["stops", "is skipped"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "token_embeddings.weight", "layers.0.ffn.w2.weight"])
def test_numbers_that_are_none(small, tmp_path, capsys, monkeypatch, where, bad, skip):
    """A NaN or infinity in loss or gradient stops, or is skipped by flag, names step and tensor, and is never saved."""
    original, calls = train.linear_cross_entropy, []

    def loss(hidden, weight, targets):
        calls.append(1)
        return original(hidden, weight, targets) * (bad if len(calls) == 3 and where == "loss" else 1)

    class Poisoned(train.TransformerLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if where != "loss":
                parameter = dict(self.named_parameters())[where]
                parameter.register_hook(lambda gradient: gradient + (bad if len(calls) == 3 else 0))
    monkeypatch.setattr(train, "linear_cross_entropy", loss)
    monkeypatch.setattr(train, "TransformerLM", Poisoned)
    argv = tiny(small / "text.txt", tmp_path, data_dir=small / "data", max_steps=5, save_interval=1, log_interval=5)
    capsys.readouterr()
    with contextlib.nullcontext() if skip else pytest.raises(SystemExit):
        train.main([*argv, *["--skip_nonfinite"] * skip])
    said = "".join(capsys.readouterr())
    first = where if where != "loss" else "token_embeddings.weight"
    assert f"step 3: the gradient of {first} is not finite" in said, said
    assert ("the step is passed over" if skip else "no checkpoint holds it") in said, said
    payload = read_checkpoint(latest_checkpoint(tmp_path / "runs" / "it"))
    assert payload["iteration"] == (5 if skip else 2)
    tensors = [*payload["model"].values(), *(value for state in payload["optimizer"]["state"].values()
                                             for value in state.values() if torch.is_tensor(value))]
    assert len(tensors) > 20 and all(tensor.isfinite().all() for tensor in tensors), "it reached a checkpoint"


# --- Long runs ---


LONG_RUN = """
import os, sys, threading, train
from pathlib import Path
steps, table, original, every = 0, [], train.get_batch, int(sys.argv.pop(1))
def state():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count(), len(children)
def counting(*args, **kwargs):
    global steps
    steps += 1
    if steps % every == 0 or steps == every // 5:
        table.append((steps, *state()))
    return original(*args, **kwargs)
train.get_batch = counting
before = state()
train.main(sys.argv[1:])
for row in (*table, (0, *before), (-1, *state())): print("at", *row)
"""


def long_run(folder: Path, full: bool) -> tuple[int, list[list[float]], Path]:
    """The number of steps, the rows of state, the last two of them before and after the run, and the run's folder."""
    text, steps = folder / "text.txt", 20_000 if full else 2000
    text.write_text("tide and moon, moon and tide. " * 300, encoding="utf-8")
    argv = tiny(text, folder, vocab_size=256, max_steps=steps, eval_interval=100, save_interval=steps // 20,
                log_interval=50)
    done = subprocess.run([sys.executable, "-c", LONG_RUN, str(steps // 8), *argv], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [list(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("at ")]
    return steps, rows, folder / "runs" / "it"


def test_a_long_run_stays_as_it_began(beside):
    """2,000 steps and 20 evaluations (--full: 20,000 and 200): memory, files, threads, children, disk stay the same."""
    steps, (*rows, before, after), folder = beside["long_run"].result()
    print("\n   steps        MB  open files  threads  child processes")
    for step, megabytes, files, threads, children in rows:
        print(f"{step:8,.0f} {megabytes:9.1f} {files:11.0f} {threads:8.0f} {children:16.0f}")
    assert rows[-1][0] == steps and rows[-1][1] < rows[0][1] * 1.03 + 5, "memory grew"
    assert rows[-1][2:] == rows[0][2:], "files, threads or processes were left open"
    assert after[2] <= before[2] + 2 and after[3:] == before[3:], f"{before} before, {after} after the run"
    assert len(list(folder.glob("checkpoint_*"))) == 2
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert sum("val_loss" in line for line in lines) == steps // 100 + 1
    assert len(lines) == steps // 50 + steps // 100 + 2, f"{len(lines)} lines"


# --- Round trips ---


@pytest.mark.parametrize("seed", range(12))
def test_tokens_round_trip(seed, tmp_path):
    """Seeded: decode(encode(x)) = x, encode_iterable over any cutting is encode, a saved tokenizer is the same one."""
    rng = random.Random(seed)
    alphabet = rng.choice(("ab \n", "aä \n\t'sй漢🎈1,<|endoftext|>", PLANES, "  \t\r\n\u3000\x85\x1c'll've"))
    pieces = [*alphabet, END_OF_TEXT, "<|end", "of|>", " the", "'s"]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 900))) for _ in range(8)]
    (tmp_path / "text.txt").write_text("".join(texts), encoding="utf-8", newline="")
    specials = rng.choice(([], [END_OF_TEXT], [END_OF_TEXT, "<|end"]))
    vocab_size = 256 + len(specials) + rng.randrange(40)
    tokenizer = Tokenizer(*train_bpe(tmp_path / "text.txt", vocab_size, specials), specials)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash() == tokenizer.hash(), "another tokenizer after saving and loading"
    tokenizer.block = rng.choice((1, 10, 4096))
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and again.encode(text) == ids, repr(text)
        places = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(60)))})
        assert list(tokenizer.encode_iterable(text[a:b] for a, b in zip(places, places[1:]))) == ids, repr(text)


@pytest.mark.parametrize("seed", range(6))
def test_checkpoints_round_trip(seed, tmp_path):
    """Seeded: tensors of any shape and type and plain values come back equal, to the bit, NaN's own bits included."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)

    def tensor() -> torch.Tensor:
        shape = [rng.randrange(0, 5) for _ in range(rng.randrange(4))]
        return torch.randn(shape, generator=generator).div(0.01).to(rng.choice(
            (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)))
    model = {f"layers.{number}": tensor() for number in range(rng.randrange(1, 9))} | {"odd": torch.tensor([math.nan])}
    optimizer = {"state": {0: {"step": 3, "exp_avg": tensor()}}, "param_groups": [{"lr": rng.random(), "params": [0]}]}
    save_checkpoint(model, optimizer, seed, tmp_path / "c.pt", seconds=rng.random(), text="ä\0\n")
    again = read_checkpoint(tmp_path / "c.pt")
    assert again["model"].keys() == model.keys() and again["iteration"] == seed and again["text"] == "ä\0\n"
    for name, value in [*model.items(), ("exp_avg", optimizer["state"][0].pop("exp_avg"))]:
        other = again["model"][name] if name in model else again["optimizer"]["state"][0].pop("exp_avg")
        assert other.dtype == value.dtype and other.shape == value.shape
        assert other.flatten().view(torch.uint8).equal(value.flatten().view(torch.uint8)), f"{name} differs"
    assert again["optimizer"] == optimizer


def test_packed_documents_come_apart():
    """Seeded: packed documents come apart as they went in, and zig-zag chunks of a sequence go back to the whole."""
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
        order, chunks = ddp.zigzag_order(size), sequence.chunk(2 * size)
        assert sorted(order) == list(range(2 * size))
        gathered = dict(zip(order, (chunks[chunk] for chunk in order)))
        assert torch.equal(torch.cat([gathered[chunk] for chunk in range(2 * size)]), sequence)


def from_rank_0(value):
    box = [value]
    torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def shard_and_gather(ranks: ddp.Ranks) -> int:
    """On every rank: random modules, sharded and gathered, saved whole and sharded again. How many were equal."""
    equal = 0
    for seed in range(12):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        widths = [rng.randrange(1, 12) for _ in range(rng.randrange(2, 6))]
        layers = [torch.nn.Linear(a, b, bias=rng.random() < 0.5) for a, b in zip(widths, widths[1:])]
        module = torch.nn.Sequential(*layers)
        whole = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        mode = ("fsdp", "zero2")[seed % 2]
        wrapped, optimizer = shard_opt.shard(module, mode, lambda m: [{"params": [*m.parameters()]}], torch.optim.AdamW)
        gathered = wrapped.gather_full_params()
        assert gathered.keys() == whole.keys() and all(gathered[name].equal(whole[name]) for name in whole), f"{seed}"
        wrapped(torch.randn(3, widths[0])).sum().backward()
        wrapped.finish_gradient_synchronization()
        optimizer.step()
        states = from_rank_0(shard_opt.full_state_dicts(wrapped, optimizer))
        for parameter in wrapped.parameters():
            parameter.data.zero_()
        shard_opt.load_full_state_dicts(wrapped, optimizer, *states)
        again = from_rank_0(shard_opt.full_state_dicts(wrapped, optimizer))
        assert all(again[0][name].equal(states[0][name]) and not states[0][name].equal(whole[name]) for name in whole)
        for number, state in states[1]["state"].items():
            assert all(torch.equal(torch.as_tensor(again[1]["state"][number][key]), torch.as_tensor(value))
                       for key, value in state.items()), f"seed {seed}: optimizer state {number}"
        equal += 1
    return equal


def test_shards_gather_to_the_whole():
    """Seeded: what three ranks hold of modules of any shape gathers to the whole, and comes back from a checkpoint."""
    assert ddp.run_ranks(shard_and_gather, 3) == [12, 12, 12]
