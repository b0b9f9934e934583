"""ddp.py against torch's DistributedDataParallel, against one process, and against failing ranks.

Functions whose name starts with rank_ run in every process of a team, which is started once and then given one case
after another, or, where they are to fail, in processes of their own (run_ranks). They return what the test compares.
Whole programs run as a Job. All of these are forked from the forkserver of conftest.py; so are the ranks of torchrun,
but for some cases that start it from the command line.
"""

import atexit
import concurrent.futures
import contextlib
import doctest
import functools
import gc
import importlib
import io
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddp
import flash
from model import ModelConfig, TransformerLM, make_attention

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
RankError = (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException)
OURS = ("naive", "flat", "individual", "bucketed")


class Odd(nn.Module):
    """All that makes data parallelism hard: a tied and a frozen weight, buffers, a branch that only odd ranks take, a
    parameter nobody uses, two dtypes, an empty parameter and one whose memory is transposed."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(37, 12)
        self.frozen = nn.Linear(12, 12)
        self.frozen.requires_grad_(False)
        self.odd_only = nn.Linear(12, 12)
        self.nobody = nn.Linear(5, 3)
        self.transposed = nn.Parameter(torch.randn(12, 7).t())
        self.factor = nn.Parameter(torch.randn(12, dtype=torch.float64))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.head = nn.Linear(12, 37, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.randint(100, (3,)))
        self.register_buffer("table", torch.randn(5, 12).t(), persistent=False)

    def forward(self, tokens, odd):
        x = self.frozen(self.embed(tokens))
        x = x + (x @ self.transposed.t()).tanh() @ self.transposed + self.empty.sum()
        if odd:
            x = x + self.odd_only(x).relu()
        return self.head((x * self.factor).float())


def tokens_of(step: int, number: int) -> torch.Tensor:
    return torch.randint(37, (3, 11), generator=torch.Generator().manual_seed(100 * step + number))


def loss_of(model, step: int, number: int) -> torch.Tensor:
    tokens = tokens_of(step, number)
    logits = model(tokens[:, :-1], (number + number // 2) % 2 == 1)  # of 0 1 2 3 4 5: 1, 2 and 5 are odd
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gradients_of(module) -> dict:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def state_of(module) -> dict:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(left: dict, right: dict, what: str) -> None:
    assert left.keys() == right.keys(), f"{what}: {left.keys()} against {right.keys()}"
    for name, a in left.items():
        b = right[name]
        if a is None or b is None:
            assert a is None and b is None, f"{what}: {name} is {a} against {b}"
        else:
            difference = (a - b).abs().max().item() if a.numel() else 0.0
            assert torch.equal(a, b), f"{what}: {name} differs by up to {difference}"


def rank_train(ranks, mode, ordered=False, num_steps=4, set_to_none=True, micro_batches=1, bucket_size_mb=0.002):
    # the seed differs by rank: construction must bring rank 0's weights and buffers to all
    module = Odd(seed=ranks.rank)
    if mode == "torch":  # it refuses parameters that a step leaves unused, unless it is asked not to
        ddp.copy_rank_0(module)
        model = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)
        model.finish_gradient_synchronization = lambda: None
    else:
        model = ddp.wrap(module, mode, bucket_size_mb=bucket_size_mb, ordered=ordered)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = None
    for step in range(num_steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        for micro in range(micro_batches - 1):
            with model.no_sync():
                loss_of(model, step, ranks.rank + ranks.world_size * micro).backward()
        loss_of(model, step, ranks.rank + ranks.world_size * (micro_batches - 1)).backward()
        model.finish_gradient_synchronization()
        first = first or gradients_of(model.module)
        optimizer.step()
    return {"first": first, "last": gradients_of(model.module), "state": state_of(model.module)}


# --- processes ---


def begin(program: str, argv: list[str], output: str, environment: dict[str, str], chunk_bytes: int) -> None:
    """What a new process does: open its output (in a session of its own a terminal becomes its terminal), then main."""
    os.setsid()
    gc.freeze()  # see rank_serve
    place = os.open(output, os.O_RDWR if output.startswith("/dev/") else os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (0, 1, 2) if output.startswith("/dev/") else (1, 2):
        os.dup2(place, number)
    sys.stdout, sys.stderr = open(1, "w", 1), open(2, "w", 1)
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    importlib.import_module("bpe").CHUNK_BYTES = chunk_bytes  # small chunks: small texts have several, for workers
    importlib.import_module(program).main(argv)


class Job:
    """A program of ours in one process or several, as torchrun would start them, and what it prints. From main() on
    they are what the command line starts, two to four seconds earlier."""

    def __init__(self, program: str, argv: list[str], output: Path, num_processes: int = 1):
        self.output, self.ranks, free = Path(output), [], socket.create_server(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for rank in range(num_processes):
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes),
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) if num_processes > 1 else {}
            arguments = program, argv, str(output), environment, 300_000
            self.ranks.append(CONTEXT.Process(target=begin, args=arguments))
            self.ranks[-1].start()

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    def told(self) -> list[str]:
        return [line for line in self.text().splitlines() if re.match(r"(train|sample|bpe)\.py: ", line)]

    def kill(self, number: int = signal.SIGKILL, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks[: len(self.ranks)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, the greatest of several, after every process and every child of theirs has gone."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        left = still_living([process.pid for process in self.ranks], deadline - time.monotonic())
        assert not left, f"{left} live on after {seconds} s: {self.text()[-2000:]}"
        return max((process.exitcode for process in self.ranks), key=abs)

    def wait_for(self, sign, seconds: float = 60) -> bool:
        """Until sign() is true or the job has ended; whether it was seen."""
        deadline = time.monotonic() + seconds
        while not (seen := sign()) and any(process.is_alive() for process in self.ranks):
            assert time.monotonic() < deadline, self.text()[-2000:]
            time.sleep(0.001)
        return bool(seen)


def members_of(session: int) -> list[int]:
    """Living processes of a session: what a killed parent left behind."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def still_living(sessions: list[int], seconds: float) -> list[int]:
    """Wait until no process of these sessions lives; those that still do after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [pid for session in sessions for pid in members_of(session)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def rank_serve(ranks, folder):
    """Do the jobs that arrive in the folder, one after another, until one is None."""
    gc.freeze()  # else collecting garbage would write to, and so copy, the memory shared with the forkserver
    for number in itertools.count():
        path = Path(folder, f"{number}.job")
        while not path.exists():
            time.sleep(0.015)  # an idle team takes no time from the one that works
        function, arguments = pickle.loads(path.read_bytes())
        if function is None:
            return number
        torch.save(function(ranks, *arguments), Path(folder, f"{number}.{ranks.rank}.tmp"))
        os.replace(Path(folder, f"{number}.{ranks.rank}.tmp"), Path(folder, f"{number}.{ranks.rank}"))


class Team:
    """run() is run_ranks without the start of processes. When a job fails, they end, and the next one starts others."""

    def __init__(self, world_size):
        self.world_size, self.thread = world_size, None
        atexit.register(self.end)

    def start(self):
        self.folder, self.number, self.error = Path(tempfile.mkdtemp()), 0, []

        def serve():
            try:
                ddp.run_ranks(rank_serve, self.world_size, str(self.folder), timeout_s=3600.0)
            except BaseException as error:
                self.error.append(error)

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()

    def give(self, function, *arguments):
        (self.folder / "tmp").write_bytes(pickle.dumps((function, arguments)))
        os.replace(self.folder / "tmp", self.folder / f"{self.number}.job")
        self.number += 1

    def run(self, function, *arguments):
        if self.thread is None:
            self.start()
        self.give(function, *arguments)
        paths = [self.folder / f"{self.number - 1}.{rank}" for rank in range(self.world_size)]
        while not all(path.exists() for path in paths):
            if not self.thread.is_alive():
                self.end()
                raise self.error[0]
            time.sleep(0.003)
        return [torch.load(path, weights_only=True) for path in paths]

    def end(self):
        if self.thread is not None:
            self.give(None)
            self.thread.join()
            self.thread = None
            shutil.rmtree(self.folder)


@functools.cache
def team(world_size):
    """One for all tests of a session, those of test_shard_opt.py too."""
    return Team(world_size)


def rank_each(ranks, function, cases):
    return [function(ranks, *case) for case in cases]


def run_each(function, world_size, cases):
    """[rank][case]"""
    return team(world_size).run(rank_each, function, cases)


def set_torchrun_variables(monkeypatch, **changes):
    values = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")
    for name, value in {**values, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_init_without_torchrun(monkeypatch):
    """Without torchrun's variables there is one rank and no process group."""
    set_torchrun_variables(monkeypatch, RANK=None)
    assert ddp.init_distributed() == ddp.Ranks(0, 0, 1), "not one rank"
    assert not dist.is_initialized(), "a process group was started"


def test_init_refuses(monkeypatch):
    """More ranks than GPUs and devices that cannot work together are refused in a sentence."""
    set_torchrun_variables(monkeypatch, RANK="1", LOCAL_RANK="1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="rank 1 needs GPU 1, but this machine has 1: start at most 1"):
        ddp.init_distributed("cuda")
    with pytest.raises(ValueError, match="not on mps: add --device cpu"):
        ddp.init_distributed("mps")


def test_init_port_in_use(monkeypatch):
    """A port that another program holds is named with its cure, and not waited for."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        set_torchrun_variables(monkeypatch, MASTER_PORT=str(other.getsockname()[1]))
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="rank 0 of 2 .*--master-port takes another.*already in use"):
            ddp.init_distributed(timeout_s=3)
        assert time.monotonic() - start < 3 + 5, f"{time.monotonic() - start:.1f} s"


def test_init_alone_of_two(monkeypatch):
    """A rank whose peers never start gives up after the timeout and says so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    set_torchrun_variables(monkeypatch, MASTER_PORT=str(port))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"rank 0 of 2 could not join the others at 127.0.0.1:{port} in 1 s"):
        ddp.init_distributed(timeout_s=1)
    assert time.monotonic() - start < 1 + 5, f"{time.monotonic() - start:.1f} s"


@pytest.mark.parametrize("mode", [*OURS, "torch"])
def test_one_process_needs_no_group(mode):
    """Without a process group every mode leaves the gradients of plain training untouched."""
    plain = Odd()
    loss_of(plain, 0, 1).backward()
    classes = {"individual": ddp.DDPIndividual, "bucketed": ddp.DDPBucketed}  # made directly, as wrap makes a DDPNaive
    model = classes[mode](Odd()) if mode in classes else ddp.wrap(Odd(), mode)
    with model.no_sync():
        pass
    for _ in range(2):  # twice: a second step must not find the first one unfinished
        model.zero_grad()
        loss_of(model, 0, 1).backward()
        model.finish_gradient_synchronization()
    assert_same(gradients_of(model.module), gradients_of(plain), mode)
    assert ddp.all_reduce_sum(2.5) == 2.5 and ddp.gather_objects([1]) == [[1]], "collectives of one are identities"
    assert ddp.on_rank_0(lambda: 3, "nothing") == 3, "on_rank_0 alone returns the result"
    assert ddp.token_loss_scale(7) == 1 / 7, "alone the scale is 1 / tokens"
    ddp.barrier("nobody")
    ddp.end_distributed()


def test_rungs_equal_torch():
    """Every rung gives torch DDP's gradients and weights bit for bit on two ranks, None where nobody used a weight."""
    cases = [("torch", False)] + [(mode, ordered) for mode in OURS for ordered in (False, True)]
    for rank, (expected, *results) in enumerate(run_each(rank_train, 2, cases)):
        assert expected["first"]["nobody.weight"] is None, "a parameter that no rank used has got a gradient"
        assert expected["first"]["odd_only.weight"] is not None, "rank 0 did not get the gradient that rank 1 computed"
        for case, result in zip(cases[1:], results):
            for what in ("first", "last", "state"):
                assert_same(result[what], expected[what], f"{case}, {what}, rank {rank}")


@pytest.mark.parametrize(("set_to_none", "micro_batches"), [(False, 1), (True, 3), (False, 3)])
def test_accumulation_and_kept_gradients(set_to_none, micro_batches):
    """no_sync() over three micro-batches, and zero_grad(set_to_none=False), equal torch DDP bit for bit."""
    cases = [(mode, False, 3, set_to_none, micro_batches) for mode in ("torch", *OURS)]
    for rank, (expected, *results) in enumerate(run_each(rank_train, 2, cases)):
        for case, result in zip(cases[1:], results):
            assert_same(result["state"], expected["state"], f"{case}, rank {rank}")


def alone(num_micro_batches: int, num_steps: int = 4) -> dict:
    model = Odd()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(num_steps):
        optimizer.zero_grad()
        for number in range(num_micro_batches):
            (loss_of(model, step, number) / num_micro_batches).backward()
        optimizer.step()
    return state_of(model)


@pytest.mark.parametrize(("world_size", "ordered"), [(2, False), (4, True)])
def test_ranks_equal_one_process(world_size, ordered):
    """N ranks equal one process that accumulates the same N micro-batches bit for bit: 2, and 4 in rank order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = alone(world_size)
    finally:
        torch.set_num_threads(threads)
    for rank, results in enumerate(run_each(rank_train, world_size, [(mode, ordered) for mode in OURS])):
        for mode, result in zip(OURS, results):
            assert_same(result["state"], expected, f"{mode}, rank {rank} of {world_size}")


# --- messages: how many, in which order, how early, how many bytes ---


def rank_messages(ranks, mode, bucket_size_mb=0.002):
    from torch.profiler import ProfilerActivity, profile

    model = ddp.wrap(Odd(), mode, bucket_size_mb=bucket_size_mb)
    # rank 1 uses a layer in the middle that rank 0 does not
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss_of(model, 0, ranks.rank).backward()
        model.finish_gradient_synchronization()
    calls = sum(event.count for event in profiler.key_averages() if event.key == "c10d::allreduce_")
    groups = len(getattr(model, "groups", []))
    return {"calls": calls, "groups": groups, "events": getattr(model, "events", []), "trainable": len(model.trainable)}


def test_number_and_order_of_messages():
    """One all-reduce per used gradient and one of flags; one per dtype; one per group, in the same order on all ranks.

    Counted by torch's profiler. Rank 1 uses a layer that rank 0 does not, so its gradients are ready in another order.
    """
    by_rank = run_each(rank_messages, 2, [(mode,) for mode in OURS])
    for results in by_rank:
        num_trainable = results[0]["trainable"]  # two of them, the layer nobody uses, the naive rung does not send
        expected = [num_trainable - 2 + 1, 2, num_trainable, results[3]["groups"]]
        assert [result["calls"] for result in results] == expected, f"{[result['calls'] for result in results]}"
        assert 2 < results[3]["groups"] < num_trainable, f"{results[3]['groups']} buckets of {num_trainable} parameters"
    for mode in ("individual", "bucketed"):
        logs = [results[OURS.index(mode)]["events"] for results in by_rank]
        ready = [[number for event, number in log if event == "ready"] for log in logs]
        sent = [[number for event, number in log if event == "sent"] for log in logs]
        assert ready[0] != ready[1], f"the ranks should differ in what is ready when: {ready}"
        assert sent[0] == sent[1] == sorted(sent[0]), f"{mode}: sent in different orders: {sent}"


def deep_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[module for _ in range(9) for module in (nn.Linear(41, 41), nn.Tanh())])


def rank_overlap(ranks, mode):
    model = ddp.wrap(deep_model(), mode, bucket_size_mb=0.0198)  # a layer has 6,888 bytes: three to a bucket
    model(torch.randn(5, 41)).square().mean().backward()
    model.finish_gradient_synchronization()
    return {"events": model.events, "sizes": [len(group) for group in model.groups]}


def test_overlap():
    """All messages but those that hold the very last gradient leave while gradients are still being computed."""
    cases = {"individual": ([1] * 18, 17), "bucketed": ([6, 6, 6], 2)}
    for results in run_each(rank_overlap, 2, [(mode,) for mode in cases]):
        for (mode, (sizes, num_early)), result in zip(cases.items(), results):
            assert result["sizes"] == sizes, f"{mode}: groups of {result['sizes']} parameters"
            events = [tuple(event) for event in result["events"]]
            early = sum(event == "sent" for event, _ in events[: events.index(("ready", 17))])
            assert early == num_early, f"{mode}: {early} of {len(sizes)} sent before the last gradient was ready"


def test_doctests():
    """The examples in the docstrings are what the code gives."""
    failures, attempted = doctest.testmod(ddp)
    assert attempted > 0 and failures == 0, f"{failures} of {attempted} failed"


def test_plan_buckets():
    """Buckets keep the order and the limit, start small, stand alone when larger, and hold one dtype each."""

    def sizes(shapes, limit_mb, dtypes=None):
        parameters = [
            nn.Parameter(torch.empty(int(mb * 2**18), dtype=dtype))
            for mb, dtype in zip(shapes, dtypes or [torch.float32] * len(shapes))
        ]
        buckets = ddp.plan_buckets(parameters, limit_mb)
        flat = [parameter for bucket in buckets for parameter in bucket]
        assert all(a is b for a, b in zip(flat, parameters)) and len(flat) == len(parameters), "order or number changed"
        return [len(bucket) for bucket in buckets]

    assert sizes([0.5, 0.5, 0.5, 1, 1, 1], 2) == [2, 2, 2], "a first bucket of 1 MB, then 2 MB"
    assert sizes([3, 0.25, 0.25, 3, 0.5], 1) == [1, 2, 1, 1], "larger than a bucket: alone"
    assert sizes([0.1] * 3, 1, [torch.float32, torch.float16, torch.float32]) == [1, 1, 1], "one dtype a bucket"


def rank_bytes(ranks, mode):
    model = ddp.wrap(nn.Linear(1000, 300), mode)
    sent = []
    for _ in range(8):
        model.zero_grad()
        model(torch.ones(1, 1000)).sum().backward()
        sent.append(ddp.measure_bytes_sent(model.finish_gradient_synchronization))
    return min(sent)


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_on_the_wire(world_size):
    """A step of the flat rung sends the formula's bytes within 1 %, by the kernel's own count."""
    if not Path("/proc/net/dev").exists():
        pytest.skip("no /proc/net/dev here")
    formula = ddp.bytes_sent_per_rank("all_reduce", 4 * 300_300, world_size)
    for _ in range(3):  # other programs use the loopback too
        ratio = team(world_size).run(rank_bytes, "flat")[0] / formula
        if ratio < 1.01:
            break
    assert 0.999 < ratio < 1.01, f"{ratio:.4f} times the formula's bytes"


# --- what a mistake looks like ---


def rank_mistakes(ranks, mode):
    model = ddp.wrap(deep_model(), mode)
    messages = []

    def loss():
        return model(torch.randn(3, 41)).sum()

    loss().backward()
    for mistake in (loss, lambda: model.module(torch.randn(3, 41)).sum().backward()):
        try:
            mistake()
            messages.append("nothing raised")
        except RuntimeError as error:
            messages.append(str(error))
    model.finish_gradient_synchronization()
    return messages


def test_mistakes_raise():
    """A forgotten finish and a second backward without no_sync() raise and name what to do."""
    for results in run_each(rank_mistakes, 2, [("individual",), ("bucketed",)]):
        for forgotten, twice in results:
            assert "finish_gradient_synchronization() was not called" in forgotten, forgotten
            assert "a second gradient for 16.bias" in twice and "no_sync()" in twice, twice


def rank_backward_only(ranks, mode):
    model = ddp.wrap(deep_model(), mode)
    loss = model(torch.full((3, 41), 0.1 * (1 + ranks.rank))).sum()
    with model.no_sync():
        loss.backward()
        model.finish_gradient_synchronization()
    return gradients_of(model.module)


def test_no_sync_around_backward_only():
    """no_sync() counts at the backward pass: nothing is averaged inside it, wherever forward ran."""
    for rank, results in enumerate(run_each(rank_backward_only, 2, [(mode,) for mode in OURS])):
        expected = deep_model()
        expected(torch.full((3, 41), 0.1 * (1 + rank))).sum().backward()
        for mode, result in zip(OURS, results):
            for name, parameter in expected.named_parameters():
                torch.testing.assert_close(result[name], parameter.grad, msg=f"{mode}: {name} on rank {rank}")


def rank_other_model(ranks, what):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    if ranks.rank == 1:
        if what == "shape":
            model[0] = nn.Linear(5, 3)
        elif what == "dtype":
            model[0].weight.data = model[0].weight.data.half()
        elif what == "frozen":
            model[0].bias.requires_grad_(False)
        elif what == "buffer":
            model[1].register_buffer("extra", torch.ones(1))
        elif what == "missing":
            model = nn.Sequential(nn.Linear(3, 5))
    try:
        ddp.wrap(model, "torch" if what == "shape" else "naive")
    except ValueError as error:
        return str(error)


def test_other_model():
    """A rank with another model is named on all ranks, with the first tensor that differs."""
    found = {
        "shape": "0.weight (3, 5) torch.float32 trained instead of 0.weight (5, 3) torch.float32 trained",
        "dtype": "0.weight (5, 3) torch.float16 trained instead of 0.weight (5, 3) torch.float32 trained",
        "frozen": "0.bias (5,) torch.float32 instead of 0.bias (5,) torch.float32 trained",
        "buffer": "1.extra (1,) torch.float32 instead of nothing",
        "missing": "nothing instead of 1.weight (5,) torch.float32 trained",
    }
    for results in run_each(rank_other_model, 2, [(what,) for what in found]):
        assert results == [f"rank 1 has another model than rank 0: {what}" for what in found.values()], f"{results}"


def test_wrap_refuses():
    """Unknown modes, ordered sums asked of torch, and a model with nothing to train are refused in a sentence."""
    with pytest.raises(AssertionError, match="fast is none of .'naive', 'flat'"):
        ddp.wrap(nn.Linear(2, 2), "fast")
    with pytest.raises(ValueError, match="rank order"):
        ddp.wrap(nn.Linear(2, 2), "torch", ordered=True)
    with pytest.raises(AssertionError, match="no parameter that requires a gradient"):
        ddp.wrap(nn.Linear(2, 2).requires_grad_(False), "flat")


# --- collectives and sums over ranks ---


def rank_collectives(ranks):
    generator = torch.Generator().manual_seed(ranks.rank)
    mine = torch.randn(103, generator=generator)  # does not divide by 4
    ordered, pieces = mine.clone(), list(mine.clone().tensor_split(ranks.world_size))
    ddp.start_ordered_all_reduce(ordered)()
    share = torch.empty_like(pieces[ranks.rank])
    ddp.start_reduce_scatter(pieces, share)()
    total = ddp.all_reduce_sum(mine)
    counted = ddp.all_reduce_sum(2**53 / 8 + ranks.rank)
    return {
        "mine": mine, "ordered": ordered, "share": share, "total": total, "counted": counted,
        "objects": ddp.gather_objects({"name": f"run-{ranks.rank}"}),
    }  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_collectives(world_size):
    """Ordered sums equal adding rank by rank to the bit, on every rank; floats are summed in float64."""
    results = team(world_size).run(rank_collectives)
    expected = results[0]["mine"].clone()
    for result in results[1:]:
        expected += result["mine"]
    for rank, result in enumerate(results):
        assert torch.equal(result["ordered"], expected), f"ordered sum on rank {rank} of {world_size}"
        assert torch.equal(result["share"], expected.tensor_split(world_size)[rank]), f"reduce-scatter, rank {rank}"
        torch.testing.assert_close(result["total"], expected)
        assert result["counted"] == world_size * 2**53 / 8 + sum(range(world_size)), "a float's sum was rounded"
        assert result["objects"] == [{"name": f"run-{rank}"} for rank in range(world_size)], f"{result['objects']}"


def uneven_batch():
    torch.manual_seed(3)
    model, inputs, targets = nn.Linear(6, 9).double(), torch.randn(4, 5, 6).double(), torch.randint(9, (4, 5))
    targets[0, 1:] = -100
    targets[3] = -100
    return model, inputs, targets


def rank_uneven_tokens(ranks):
    model, inputs, targets = uneven_batch()
    model = ddp.wrap(model, "bucketed")
    inputs, targets = inputs.chunk(ranks.world_size)[ranks.rank], targets.chunk(ranks.world_size)[ranks.rank]
    scale = ddp.token_loss_scale(int((targets != -100).sum()))
    loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum") * scale
    loss.backward()
    model.finish_gradient_synchronization()
    return {"loss": ddp.all_reduce_sum(loss.item()) / ranks.world_size, "gradients": gradients_of(model.module)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_mean_over_tokens(world_size):
    """With different numbers of targets on the ranks, none on one of four, loss and gradients are means over tokens."""
    model, inputs, targets = uneven_batch()
    loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())  # torch's mean over all tokens
    loss.backward()
    for result in team(world_size).run(rank_uneven_tokens):
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-14), "loss"
        for name, gradient in gradients_of(model).items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-12, atol=1e-15)


def test_no_tokens_at_all():
    """A step without a single target is refused rather than divided by zero."""
    with pytest.raises(ValueError, match="every target is ignored"):
        ddp.token_loss_scale(0)


# --- waiting and failing ---


def explained(folder, ranks, function):
    """Run function(); if it raises, leave this rank's explanation in a file, and leave."""
    try:
        return function()
    except Exception as error:
        Path(folder, f"{ranks.rank}.txt").write_text(ddp.explain_failure(error))
        os._exit(1)


def rank_prepares(ranks, folder, seconds):
    def work():
        time.sleep(seconds)
        if seconds == 0:
            raise ValueError("no such dataset")
        return ["data", seconds]

    sys.stderr = io.StringIO()
    first = explained(folder, ranks, lambda: ddp.on_rank_0(work, "preparing data"))
    return [first, ddp.on_rank_0(lambda: ranks.rank, "a second thing"), sys.stderr.getvalue()]


def test_rank_0_may_take_longer_than_the_timeout(waiting):
    """Waiting for rank 0's preparation is not bounded by the collectives' timeout, and the others say what for."""
    results = waiting["rank 0 prepares"].result()
    assert [result[:2] for result in results] == [[["data", 3.0], 0]] * 3, f"{results}"
    expected = ["", *(f"rank {rank} waits for rank 0: preparing data\n" for rank in (1, 2))]
    assert [result[2] for result in results] == expected, f"{results}"


def test_rank_0_fails_while_others_wait(tmp_path):
    """When rank 0's preparation fails, the waiting ranks end at once and repeat its reason."""
    with pytest.raises(RankError):
        ddp.run_ranks(rank_prepares, 2, str(tmp_path), 0)
    assert (tmp_path / "0.txt").read_text() == "rank 0 failed: no such dataset"
    assert (tmp_path / "1.txt").read_text() == "rank 1 stops because rank 0 failed: no such dataset"


def rank_fails(ranks, folder, how):
    model = ddp.wrap(deep_model(), "bucketed")

    def train():
        for step in range(5):
            if step == 2 and ranks.rank == 1:
                if how == "raise":
                    raise KeyError("bad batch")
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "leave":
                    os._exit(0)
                if how == "hang":
                    time.sleep(5.5)
                if how == "finish":
                    return ddp.end_distributed()
            if step == 2 and how == "barrier":
                ddp._store().set_timeout(timedelta(seconds=1))  # is the barrier's
                if ranks.rank == 1:
                    time.sleep(4)
                ddp.barrier("the checkpoint")
            model(torch.randn(3, 41)).sum().backward()
            model.finish_gradient_synchronization()

    explained(folder, ranks, train)


TIMEOUT_S = 3.0


def fail(how: str) -> tuple[bool, str, float]:
    """Whether run_ranks raised, what rank 0 said, and after how many seconds."""
    process = CONTEXT.Process(target=len, args=("",))
    process.start()
    process.join()  # now the forkserver has imported everything
    start, failed = time.time(), False
    with tempfile.TemporaryDirectory() as folder:
        try:
            ddp.run_ranks(rank_fails, 3, folder, how, timeout_s=TIMEOUT_S)
        except RankError:
            failed = True
        said = Path(folder, "0.txt")
        return failed, said.read_text(), said.stat().st_mtime - start


@pytest.fixture(scope="module", autouse=True)
def waiting(request, tmp_path_factory):
    """Jobs that mostly wait for a timeout begin with the first test, beside the others."""
    items = request.session.items
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = {item.callspec.params["how"]: pool.submit(fail, item.callspec.params["how"])
                for item in items if item.originalname == "test_failing_rank"}
        if any(item.originalname == "test_rank_0_may_take_longer_than_the_timeout" for item in items):
            arguments = rank_prepares, 3, str(tmp_path_factory.mktemp("prepares")), 3.0
            jobs["rank 0 prepares"] = pool.submit(ddp.run_ranks, *arguments, timeout_s=2.5)
        yield jobs


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "rank 0 stops because rank 1 failed: KeyError: 'bad batch'"),
        ("barrier", "rank 1 (killed, hanging or waiting): waited in vain for the checkpoint: [Rank 0]: Ranks 1 failed"),
        pytest.param("kill", "rank 0 stops because there is no answer from rank 1", marks=pytest.mark.faults),
        pytest.param("leave", "rank 0 stops because there is no answer from rank 1", marks=pytest.mark.faults),
        pytest.param("hang", "rank 0 stops because there is no answer from rank 1", marks=pytest.mark.faults),
        pytest.param("finish", "rank 0 stops because rank 1 had already finished", marks=pytest.mark.faults),
    ],
)
def test_failing_rank(how, words, waiting):
    """A rank that raises, is killed, leaves, hangs or runs out of data ends the others in time, and they name it."""
    failed, said, seconds = waiting[how].result()
    assert failed, "the job ended as if nothing had happened"
    assert words in said, said
    assert seconds < TIMEOUT_S + 5, f"{seconds:.1f} s"


def test_demo(capsys):
    """python ddp.py prints a table in which every rung differs from one process by exactly zero."""
    ddp.main([])
    out = capsys.readouterr().out
    assert "all_reduce          4.19" in out, f"no formula's bytes in {out}"
    for mode in ddp.MODES:
        [line] = [line for line in out.splitlines() if line.startswith(mode + " ")]
        assert line.split()[1] == "0.0e+00", line


# --- whole jobs under torchrun ---


def torchrun(how: str, folder: Path, *options: str) -> tuple[int, str]:
    """From the command line: the exit code and what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    command += [__file__, how, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def launch(how: str, folder: Path, options: tuple[str, ...], output: str) -> None:
    """What torch.distributed.run does from its arguments on, but the ranks are forked instead of started anew."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    place = os.open(output, os.O_CREAT | os.O_WRONLY)
    os.dup2(place, 1)
    os.dup2(place, 2)
    sys.stdout, sys.stderr = open(1, "w", 1), open(2, "w", 1)
    arguments = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", folder.name,
                 "--nproc-per-node", "2", "--start-method", "fork", *options, "-m", "worker"]
    config = run.config_from_args(run.parse_args(arguments))[0]
    elastic_launch(config, worker)(how, folder)


def torchrun_forked(how: str, folder: Path, *options: str) -> tuple[int, str]:
    """The same within a second: exit code and what it said."""
    process = CONTEXT.Process(target=launch, args=(how, folder, options, str(folder / "said.txt")))
    process.start()
    process.join(120)
    assert process.exitcode is not None, f"lives on after 120 s: {(folder / 'said.txt').read_text()}"
    return process.exitcode, (folder / "said.txt").read_text()


def worker(how: str, folder: Path) -> None:
    """What each rank of a torchrun job does: ten steps with a checkpoint after each, and a fault at the fifth."""
    ranks = ddp.init_distributed(timeout_s=5.0)
    try:
        torch.manual_seed(0)
        model = ddp.wrap(nn.Linear(31, 17), "bucketed")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        checkpoint, first = folder / "checkpoint.pt", 0
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            model.module.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["step"]
        ddp.barrier("loading the checkpoint")
        for step in range(first, 10):
            if step == 5 and ranks.rank == 1 and first == 0:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "raise":
                    raise ValueError("shard 7 is damaged")
                if how == "hang":
                    time.sleep(100)
                if how == "leave":
                    sys.exit(0)
            optimizer.zero_grad()
            inputs = torch.randn(8, 31, generator=torch.Generator().manual_seed(10 * step + ranks.rank))
            model(inputs).square().mean().backward()
            model.finish_gradient_synchronization()
            optimizer.step()
            if ranks.rank == 0:
                saved = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(saved, folder / "tmp")
                os.replace(folder / "tmp", checkpoint)
            ddp.barrier("the checkpoint")
        ddp.end_distributed()
    except Exception as error:
        print("worker:", ddp.explain_failure(error), file=sys.stderr, flush=True)
        os._exit(1)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "words", "start"),
    [
        ("kill", "Signal 9", torchrun),
        ("raise", "worker: rank 1 failed: shard 7 is damaged", torchrun_forked),
        ("hang", "worker: rank 0 stops because there is no answer from rank 1", torchrun_forked),
        ("leave", "worker: rank 0 stops because rank 1 had already finished or left", torchrun),  # by its atexit
    ],
)
def test_torchrun_names_the_rank(how, words, start, tmp_path):
    """A job whose rank is killed, raises, hangs or leaves ends non-zero within the timeout + 5 s and names the rank."""
    code, said = start(how, tmp_path)
    seconds = time.time() - (tmp_path / "checkpoint.pt").stat().st_mtime  # the fault comes after this checkpoint
    assert code != 0, "the job ended as if nothing had happened"
    assert words in said, said
    assert how != "kill" or "rank      : 1 (local_rank: 1)" in said, said
    assert seconds < 5 + 5, f"{seconds:.1f} s from the fault to the end"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("none")
    code, said = torchrun_forked("none", folder)
    assert code == 0, said
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.faults
@pytest.mark.parametrize("start", [torchrun, *[torchrun_forked] * 4])
def test_torchrun_restarts(start, tmp_path, undisturbed):
    """After --max-restarts brought back a killed rank, the final weights equal an undisturbed run's bit for bit."""
    code, said = start("kill", tmp_path, "--max-restarts", "1")
    assert code == 0, said
    assert "Signal 9" in said or "exitcode: -9" in said, f"no rank was killed: {said}"
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == undisturbed["step"] == 10, f"ended after steps {saved['step']} and {undisturbed['step']}"
    assert_same(saved["model"], undisturbed["model"], "undisturbed against killed and restarted")


# --- context parallelism ---


def packed(length: int, what: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions (T,) and segment ids (2, T) or None of a batch of two rows."""
    if what == "one document":
        return torch.arange(length), None
    ids = torch.stack([torch.arange(length) * 3 // length, torch.arange(length) // 7])
    if what == "padding":
        ids[1, -length // 5 :] = -1
    return flash.positions_in_segments(ids), ids


def rank_context(ranks: ddp.Ranks, size: int, zigzag: bool, window: int | None, what: str, local: str) -> dict:
    torch.manual_seed(ranks.rank // size)  # a team shares its sequences
    length, heads, groups = 24 * size, 6, 2
    q = torch.randn(2, heads, length, 8, dtype=torch.float64)
    k, v = (torch.randn(2, groups, length, 8, dtype=torch.float64) for _ in range(2))
    grad = torch.randn_like(q)
    positions, ids = packed(length, what)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = flash.reference_attention(*whole, dtype=torch.float64, positions=positions, segment_ids=ids,
                                         window=window)[0]
    expected.backward(grad)
    context = ddp.ContextParallel(size, zigzag=zigzag)
    attend = context.attention(partial(flash.flash_attention, window=window, backend=local))
    mine = [context.split(x, 2).clone().requires_grad_() for x in (q, k, v)]
    here, ids_here = context.begin(positions=positions, segment_ids=ids)
    out = attend(*mine, positions=here, segment_ids=ids_here)
    out.backward(context.split(grad, 2))
    pairs = [(a.detach(), context.split(b.detach(), 2))
             for a, b in ((out, expected), *((x.grad, y.grad) for x, y in zip(mine, whole)))]
    return {"errors": [float((a - b).abs().max()) for a, b in pairs], "largest": float(expected.abs().max())}


@pytest.mark.parametrize("world_size", [2, 4])
def test_context_parallel_equals_one_process(world_size):
    """Attention over a split sequence, forward and backward, is that of one process to 1e-12 in float64."""
    cases = [(size, zigzag, window, what, local)
             for size in {2, world_size} for zigzag in (True, False) for window in (None, 11)
             for what in ("one document", "documents", "padding") for local in ("reference", "tiles")]
    for case, result in zip(cases, run_each(rank_context, world_size, cases)[-1]):
        assert result["largest"] > 0.1, f"{case}: attention returned nothing"
        assert max(result["errors"]) < 1e-12, f"{case}: output, dq, dk, dv differ by {result['errors']}"


def rank_context_training(ranks: ddp.Ranks, size: int, documents: bool) -> dict:
    """Three steps of a small model over teams of `size`, beside the same steps on one process."""
    config = ModelConfig(vocab_size=50, context_length=32, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2)
    teams = ranks.world_size // size
    losses: dict[str, list[float]] = {"split": [], "whole": []}
    for name in losses:
        context = ddp.ContextParallel(size if name == "split" else 1)

        def local(q, k, v, **places):
            return make_attention("naive", **places)(q, k, v)

        torch.manual_seed(0)
        model = TransformerLM(config, attention=context.attention(local) if name == "split" else None)
        wrapped = ddp.wrap(model, "bucketed") if name == "split" else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            rng = torch.Generator().manual_seed(step)
            tokens = torch.randint(50, (2 * teams, 33), generator=rng)
            ids = flash.segment_ids_from_tokens(tokens[:, :-1], 7) if documents else None
            positions = flash.positions_in_segments(ids) if documents else torch.arange(32)
            if name == "split":
                rows = slice(2 * context.team, 2 * context.team + 2)
                inputs, targets, here, ids = context.begin(
                    tokens[rows, :-1], tokens[rows, 1:], positions=positions[rows] if documents else positions,
                    segment_ids=ids[rows] if documents else None)
            else:
                inputs, targets, here = tokens[:, :-1], tokens[:, 1:], positions
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(wrapped(inputs, positions=here, segment_ids=ids).flatten(0, 1),
                                               targets.flatten())
            loss.backward()
            if name == "split":
                wrapped.finish_gradient_synchronization()
                loss = ddp.all_reduce_sum(loss) / ranks.world_size
            optimizer.step()
            losses[name].append(float(loss))
    return losses


@pytest.mark.parametrize("world_size", [2, 4])
def test_context_parallel_training(world_size):
    """Training over split sequences, alone or beside data parallelism, has one process's losses within 1e-5."""
    cases = [(size, documents) for size in {2, world_size} for documents in (False, True)]
    for case, losses in zip(cases, run_each(rank_context_training, world_size, cases)[-1]):
        assert losses["split"] == pytest.approx(losses["whole"], abs=1e-5), f"teams of {case}"


def test_zigzag_balances_the_work(monkeypatch):
    """Zig-zag chunks give every rank of one document the same number of pairs; consecutive chunks do not."""
    monkeypatch.setattr(ddp, "get_world_size", lambda: 4)
    monkeypatch.setattr(ddp.dist, "new_group", lambda ranks: None)
    for zigzag, least, most in ((True, 1.0, 1.1), (False, 1.5, 2.0)):
        order = ddp.ContextParallel(4, zigzag=zigzag).order
        by_chunk = torch.arange(1, 8001).view(8, -1).sum(dim=1)[order]  # a query at p sees p + 1 keys
        pairs = by_chunk.view(4, 2).sum(dim=1).tolist()
        assert sum(pairs) == 8000 * 8001 // 2, "the ranks together compute every pair below the diagonal"
        assert least <= max(pairs) / (sum(pairs) / 4) <= most, pairs
    with pytest.raises(AssertionError, match="do not divide into teams of 3"):
        ddp.ContextParallel(3)
    with pytest.raises(AssertionError, match="100 tokens do not divide into 8 chunks"):
        ddp.ContextParallel(4).split(torch.zeros(2, 100))


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
