"""train.py: each part against PyTorch or brute force; whole runs against themselves, bit for bit."""

import contextlib
import doctest
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import bpe
import train
from bpe import Tokenizer, UserError, load_tokens, prepare, story_nats
from ddp import Ranks, run_ranks
from model import PRESETS, ModelConfig, TransformerLM, count_parameters, training_memory
from train import (
    AdamW,
    clip_gradients,
    cross_entropy,
    get_batch,
    get_lr_cosine_schedule,
    latest_checkpoint,
    linear_cross_entropy,
    load_checkpoint,
    read_checkpoint,
    read_log,
    save_checkpoint,
)

from test_ddp import CONTEXT, ROOT, Job  # isort: skip

TINY = dict(vocab_size=61, context_length=12, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48)
TEXT = "".join(f"The {a} {b} sat on the {c}. " for a in ("old", "red", "wet") for b in ("cat", "dog") for c in
               ("mat", "log", "roof")) * 12

def tiny_model(seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(ModelConfig(**TINY))

# --- The loss ---

@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), ()])
def test_cross_entropy_equals_torch(shape):
    """Loss and gradient equal torch.nn.functional.cross_entropy for any leading dimensions."""
    torch.manual_seed(0)
    logits = torch.randn(*shape, 41, dtype=torch.float32) * 5
    targets = torch.randint(41, shape)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = cross_entropy(ours, targets)
    expected = torch.nn.functional.cross_entropy(theirs.reshape(-1, 41), targets.reshape(-1))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)

def test_cross_entropy_is_stable():
    """Scores of +-1e4 give the exact loss where exp would overflow, and bfloat16 scores are summed in float32."""
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert cross_entropy(logits, torch.tensor([0])).item() == 0.0
    assert cross_entropy(logits, torch.tensor([1])).item() == 2e4
    flat = torch.zeros(1, 10_000, dtype=torch.bfloat16)
    assert cross_entropy(flat, torch.tensor([3])).item() == pytest.approx(math.log(10_000), rel=1e-6)

@pytest.mark.parametrize("chunk", [1, 5, 17, 400])
def test_loss_and_head_in_one_pass(chunk):
    """linear_cross_entropy has the loss and both gradients of torch's linear and cross_entropy, for any chunk."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(3, 17, 8), torch.randn(29, 8), torch.randint(29, (3, 17))
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss = linear_cross_entropy(*ours, targets, chunk=chunk)
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*theirs).flatten(0, 1), targets.flatten())
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)

def test_loss_and_head_keep_no_logits():
    """Nothing of the size of the logits is kept for the backward pass, and under autocast the products are bfloat16."""
    hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(999, 16, requires_grad=True)
    targets, kept = torch.randint(999, (64,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_cross_entropy(hidden, weight, targets, chunk=8)
    assert max(kept) == 999 * 16, f"kept tensors of {kept} numbers, the logits have {64 * 999}"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=8)
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    assert loss.dtype == torch.float32 and 0 < abs(loss.item() - exact.item()) < 0.05, (loss, exact)
    loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32

def test_sums_in_half_precision():
    """1000 times 0.01: float16 loses the small addend (9.9531), a float32 sum of float16 numbers only their rounding
    (10.0021), float32 nearly nothing (10.0001). So sums, moments and parameters stay in float32."""
    def total(sum_dtype: torch.dtype, dtype: torch.dtype, widen: bool = False) -> float:
        s = torch.tensor(0, dtype=sum_dtype)
        for _ in range(1000):
            x = torch.tensor(0.01, dtype=dtype)
            s += x.to(sum_dtype) if widen else x
        return round(s.item(), 4)

    assert total(torch.float32, torch.float32) == 10.0001 and total(torch.float16, torch.float16) == 9.9531
    assert total(torch.float32, torch.float16) == total(torch.float32, torch.float16, widen=True) == 10.0021

def test_what_autocast_keeps_in_float32():
    """Under autocast products are half precision; parameters, norms, loss, gradients and AdamW's moments float32.
    A gradient of 1e-8 is 0 in float16 and survives scaled by 65,536, where GradScaler begins; bfloat16 needs none."""
    model, kinds = tiny_model(), {}
    for name in ("layers.0.attn.q_proj", "layers.0.ln1", "layers.1.ffn.w2"):
        model.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: kinds.update({name: y.dtype}))
    ids = torch.randint(61, (3, 13))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1])
        loss = cross_entropy(logits, ids[:, 1:])
    loss.backward()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    assert list(kinds.values()) == [torch.float32, torch.bfloat16, torch.bfloat16], kinds
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    for p in model.parameters():
        assert {p.dtype, p.grad.dtype, *(optimizer.state[p][name].dtype for name in ("exp_avg", "exp_avg_sq"))} == {
            torch.float32}
    gradient = torch.tensor(1e-8)
    assert gradient.half() == 0 and (gradient * 65_536).half() / 65_536 == pytest.approx(1e-8, rel=1e-3)
    assert gradient.bfloat16().item() == pytest.approx(1e-8, rel=2**-8)
    assert torch.amp.GradScaler("cpu").get_scale() == 65_536

# --- The optimizer ---

def test_adamw_is_torchs_to_the_last_bit():
    """25 steps over two groups, one parameter without gradients now and then: the same bits as torch.optim.AdamW."""
    def parameters():
        torch.manual_seed(1)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (7,), (2, 2, 2), (701, 401), ())]

    ours, theirs = parameters(), parameters()
    groups = lambda ps: [{"params": ps[:1], "weight_decay": 0.2}, {"params": ps[1:], "weight_decay": 0.0, "lr": 3e-3}]  # noqa: E731
    options = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-7)
    a = AdamW(groups(ours), **options)
    b = torch.optim.AdamW(groups(theirs), foreach=False, fused=False, **options)
    generator = torch.Generator().manual_seed(2)
    for step in range(25):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator) if (step + p.ndim) % 3 else None
            q.grad = None if p.grad is None else p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q), f"largest difference {(p - q).abs().max().item()}"

def test_adamw_state_survives_a_round_trip():
    """Saving and loading the state in mid-run changes no later bit, and the step count stays an int."""
    def steps(optimizer, p, first, last):
        for step in range(first, last):
            p.grad = torch.sin(p.detach() * step)
            optimizer.step()

    p = torch.nn.Parameter(torch.linspace(-1, 1, 11))
    q = torch.nn.Parameter(p.detach().clone())
    whole, first_half = AdamW([p], lr=0.1), AdamW([q], lr=0.1)
    steps(whole, p, 0, 8)
    steps(first_half, q, 0, 4)
    second_half = AdamW([q], lr=0.5)
    second_half.load_state_dict(first_half.state_dict())
    steps(second_half, q, 4, 8)
    assert torch.equal(p, q)
    assert second_half.state[q]["step"] == 8

def test_adamw_decays_where_the_gradient_is_zero():
    """Decay uses the base rate and applies to zero gradients; a parameter whose grad is None is left alone."""
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    AdamW([p, q], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p, torch.full((3,), 0.95)) and torch.equal(q, torch.ones(3))

def test_orthogonalize_keeps_directions_and_evens_out_their_sizes():
    """Singular values of wide, tall and batched matrices go to 0.7 ... 1.2; the singular vectors stay (float64 SVD)."""
    torch.manual_seed(4)
    for shape in ((6, 10), (12, 5), (3, 8, 8)):
        u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        s = torch.linspace(1, 0.2, s.shape[-1], dtype=torch.float64).expand_as(s)
        result = train.orthogonalize(u @ (s[..., None] * vh))
        new = u.mT @ result @ vh.mT
        values = new.diagonal(dim1=-2, dim2=-1)
        assert values.min() > 0.65 and values.max() < 1.25, values
        assert (new - torch.diag_embed(values)).abs().max() < 1e-10

@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_muon_equals_torchs(adjust_lr_fn):
    """Five steps on matrices follow torch.optim.Muon with either scaling, up to its bfloat16; the rest is AdamW."""
    torch.manual_seed(5)
    ours = [torch.nn.Parameter(torch.randn(shape) * 0.1) for shape in ((16, 24), (16, 24), (40, 8), (7,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=0.02, weight_decay=0.1)
    a = train.Muon([{"params": ours[:3], "muon": True}, {"params": ours[3:]}], adjust_lr_fn=adjust_lr_fn, **options)
    b = torch.optim.Muon(theirs[:3], momentum=0.95, nesterov=True, adjust_lr_fn=adjust_lr_fn, **options)
    c = AdamW(theirs[3:], **options)
    for step in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.cos(p.detach() * 9 + step)
            q.grad = p.grad.clone()
        for optimizer in (a, b, c):
            optimizer.step()
    for p, q in zip(ours[:3], theirs):  # elements of an orthogonal matrix are about 1 / sqrt(longer side)
        m, n = p.shape
        size = 0.2 if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, m / n) / max(m, n))
        torch.testing.assert_close(p, q, atol=0.02 * size * 5 * 0.15, rtol=0)  # 15 % of the way that five steps go
    assert torch.equal(ours[3], theirs[3])

def test_muon_takes_the_matrices_inside_the_blocks():
    """Matrices of blocks go to Muon; embedding, head and gains stay with AdamW; every parameter is in one group."""
    for model in (tiny_model(), TransformerLM(ModelConfig(**TINY, num_experts=3, shared_experts=1, moe_every=2))):
        check_muon_split(model)

def check_muon_split(model: TransformerLM) -> None:
    groups = train.parameter_groups(model, 0.1, muon=True)
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for group in groups if group.get("muon") for p in group["params"]}
    assert muon == {name for name in names.values() if ".attn." in name or ".ffn." in name and "router" not in name}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())

# --- Learning rate and clipping ---

def test_schedule_has_exact_ends():
    """0 at step 0, exactly max at the end of warm-up, exactly min at the end of the cosine and after it."""
    lr = [get_lr_cosine_schedule(it, 0.7, 0.07, 10, 50) for it in range(61)]
    assert lr[0] == 0 and lr[10] == 0.7 and lr[50] == 0.07 and lr[60] == 0.07
    assert lr[30] == pytest.approx((0.7 + 0.07) / 2)
    assert all(a < b for a, b in zip(lr[:10], lr[1:11])) and all(a > b for a, b in zip(lr[10:50], lr[11:51]))

def test_schedule_without_warmup_or_cosine():
    """warmup_iters 0 starts at max; a cosine of no length falls from max to min in one step, without dividing by 0."""
    assert get_lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1.0
    assert get_lr_cosine_schedule(5, 1.0, 0.1, 5, 5) == 1.0
    assert get_lr_cosine_schedule(6, 1.0, 0.1, 5, 5) == 0.1
    assert 1e-3 + (1e-2 - 1e-3) != 1e-2 == get_lr_cosine_schedule(5, 1e-2, 1e-3, 5, 9), "max, where it could be rounded"

@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping_equals_torch(limit):
    """The norm and the clipped gradients are torch.nn.utils.clip_grad_norm_'s, for a generator with gaps."""
    torch.manual_seed(3)
    ours = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (5,), (2,))]
    for p in ours[:2]:
        p.grad = torch.randn(p.shape)
    theirs = [torch.nn.Parameter(torch.zeros_like(p)) for p in ours]
    for p, q in zip(ours[:2], theirs):
        q.grad = p.grad.clone()
    before = [p.grad.clone() for p in ours[:2]]
    norm = clip_gradients((p for p in ours), limit)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit))
    for p, q, unclipped in zip(ours[:2], theirs, before):
        torch.testing.assert_close(p.grad, q.grad)
        assert limit < 1 or torch.equal(p.grad, unclipped), "below the limit nothing may change, not even a rounding"
    assert clip_gradients([], 1.0).item() == 0

# --- Batches ---

def test_batches_are_windows_and_their_successors(tmp_path):
    """Targets are the inputs moved by one, from a memory map of uint16; every start can come up, the last one too."""
    np.save(tmp_path / "tokens.npy", np.arange(1000, 1023, dtype=np.uint16))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    inputs, targets = get_batch(tokens, 500, 5, "cpu", rng=np.random.default_rng(0))
    assert inputs.shape == targets.shape == (500, 5) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    assert set(inputs[:, 0].tolist()) == set(range(1000, 1018)), "n - T = 18 starts, the last target is the last token"

def test_ranks_read_disjoint_rows_of_one_batch():
    """The rows that two ranks read are together the batch that one process reads."""
    tokens = np.arange(10_000, dtype=np.uint16)
    read = lambda rows: get_batch(tokens, 8, 4, "cpu", rng=np.random.default_rng((7, 3)), rows=rows)[0]  # noqa: E731
    assert torch.equal(torch.cat([read(slice(0, 4)), read(slice(4, 8))]), read(slice(None)))

def test_batches_from_too_little():
    """A corpus shorter than a window is an error; so is a device that is not there, not a fallback."""
    with pytest.raises(ValueError):
        get_batch(np.arange(5, dtype=np.uint16), 2, 5, "cpu")
    with pytest.raises((RuntimeError, AssertionError)):
        get_batch(np.arange(50, dtype=np.uint16), 2, 5, "no_such_device")

# --- Checkpoints ---

def trained_pair(seed: int = 0):
    model = tiny_model(seed)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    x = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(seed))
    cross_entropy(model(x), x).backward()
    optimizer.step()
    return model, optimizer

@pytest.mark.parametrize("kind", ["path", "file object"])
def test_checkpoint_round_trip(tmp_path, kind):
    """Model, optimizer and iteration come back bit-equal from a path and from a file object; no temporary stays."""
    model, optimizer = trained_pair()
    out = tmp_path / "c.pt" if kind == "path" else io.BytesIO()
    save_checkpoint(model, optimizer, 17, out)
    if kind == "file object":
        out.seek(0)
    other, other_optimizer = trained_pair(1)
    assert load_checkpoint(out, other, other_optimizer) == 17
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(optimizer.state.values(), other_optimizer.state.values()):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and a["step"] == b["step"]
    assert [path.name for path in tmp_path.iterdir()] == (["c.pt"] if kind == "path" else [])

def test_checkpoint_names_are_the_models_own(tmp_path):
    """A compiled or wrapped model saves under plain names, and such a checkpoint loads into a wrapped one."""
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model, optimizer = trained_pair()
    save_checkpoint(Wrapper(torch.compile(model)), optimizer, 1, tmp_path / "c.pt")
    assert set(read_checkpoint(tmp_path / "c.pt")["model"]) == set(model.state_dict())
    assert load_checkpoint(tmp_path / "c.pt", Wrapper(tiny_model(1)), None) == 1

def test_a_compiled_run_saves_plain_names(corpus, tmp_path):
    """--compile changes no name in the checkpoint and, run eagerly, no bit: it loads into a model as it is."""
    with torch.compiler.set_stance("force_eager"):
        train.main(flags(corpus, tmp_path, "--compile", "--max_steps=2", "--run_name=compiled"))
    train.main(flags(corpus, tmp_path, "--max_steps=2", "--run_name=plain"))
    assert_equal_runs(final_state(tmp_path, "plain"), final_state(tmp_path, "compiled"))

def test_damaged_checkpoint_is_refused(tmp_path):
    """A flipped bit in the stored weights, a cut file, a foreign file and a missing one: one sentence each."""
    model, optimizer = trained_pair()
    path = tmp_path / "c.pt"
    save_checkpoint(model, optimizer, 1, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    position = largest.header_offset + 200 + largest.file_size // 2
    for damaged in (whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :], whole[: len(whole) // 2],
                    b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            load_checkpoint(path, model, optimizer)
    with pytest.raises(UserError, match="No such file"):
        load_checkpoint(tmp_path / "missing.pt", model, optimizer)

# --- Whole runs ---

@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "cats.txt").write_text(TEXT, encoding="utf-8")
    return folder

def flags(corpus: Path, out: Path, *more: str) -> list[str]:
    common = dict(dataset=corpus / "cats.txt", data_dir=corpus / "data", out_dir=out, vocab_size=256, context_length=12,
                  d_model=32, num_layers=2, num_heads=4, d_ff=48, batch_size=8, max_steps=10, lr=1e-2, log_interval=1,
                  eval_interval=5, save_interval=5, device="cpu", dtype="float32")
    typed = {item.split("=")[0].removeprefix("--") for item in more}
    return [f"--{name}={value}" for name, value in common.items() if name not in typed] + list(more)

def final_state(out: Path, name: str = "cats-1") -> dict:
    return read_checkpoint(latest_checkpoint(out / name))

def assert_equal_runs(a: dict, b: dict) -> None:
    assert a["iteration"] == b["iteration"], f"{a['iteration']} steps against {b['iteration']}"
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), f"{name} differs"
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][key][name]))
                   for name, value in state.items()), f"optimizer state {key} differs"

def test_a_run_learns_and_writes_what_it_promises(corpus, tmp_path, capsys):
    """The folder holds config, tokenizer, log and the last two checkpoints; the log's keys are the documented ones."""
    train.main(flags(corpus, tmp_path, "--max_steps=40", "--eval_interval=20"))
    run = tmp_path / "cats-1"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "vocab.json", "merges.txt", "log.jsonl", "checkpoint_00000040.pt",
                     "checkpoint_00000035.pt"}
    assert len(list(run.glob("checkpoint_*.pt"))) == 2 and not [n for n in names if n.endswith(".tmp")]
    lines = read_log(run / "log.jsonl")
    losses = [line for line in lines if "train_loss" in line]
    scores = [line for line in lines if "val_loss" in line]
    assert all(line.keys() == {"step", "tokens", "seconds", "train_loss", "lr", "grad_norm", "tokens_per_second"}
               for line in losses)
    assert all(line.keys() == {"step", "tokens", "seconds", "val_loss", "val_bits_per_byte"} for line in scores)
    assert [line["step"] for line in scores] == [0, 20, 40]
    assert abs(scores[0]["val_loss"] - math.log(256)) < 0.2, "an untrained model knows nothing: ln 256"
    assert scores[-1]["val_loss"] < 3.0 < losses[0]["train_loss"]
    # one byte a token: bits per byte are the nats per token, in bits
    assert scores[-1]["val_bits_per_byte"] == pytest.approx(scores[-1]["val_loss"] / math.log(2))
    assert losses[-1]["tokens"] == 40 * 8 * 12
    printed = capsys.readouterr().out
    assert "sample.py --run" in printed
    assert all(len(line) <= 100 for line in printed.splitlines() if line.startswith("step"))

@pytest.mark.parametrize("more", [("--weight_decay=0.3",),
                                  ("--dropout=0.2", "--grad_accum_steps=2", "--optimizer=muon")])
def test_ten_steps_are_five_and_five(corpus, tmp_path, more):
    """10 steps equal 5 + resume + 5, bit for bit, in parameters, optimizer and losses, with dropout too."""
    train.main(flags(corpus, tmp_path / "whole", *more))
    with pytest.raises(SystemExit) as stopped:  # a signal during step 5
        interrupt_at(5, signal.SIGTERM, flags(corpus, tmp_path / "parts", *more))
    assert stopped.value.code == 143
    assert final_state(tmp_path / "parts")["iteration"] == 5
    train.main(["--resume", f"--out_dir={tmp_path / 'parts'}", f"--data_dir={corpus / 'data'}", "--device=cpu"])
    assert_equal_runs(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    a, b = (read_log(tmp_path / out / "cats-1" / "log.jsonl") for out in ("whole", "parts"))
    timeless = lambda lines: [{k: v for k, v in line.items() if "second" not in k} for line in lines]  # noqa: E731
    assert timeless(a) == timeless(b)

def test_lines_of_an_evaluation():
    """Loss, perplexity, bits and, beside the corpus's own entropy, nats per byte, in at most 100 columns."""
    line = {"step": 600, "val_loss": 1.25, "val_bits_per_byte": 0.4}
    told = train.progress_line(line, 600, floor=0.2522)
    assert told == "step   600/600   val  1.2500   perplexity 3.49   0.4000 bits/byte   0.2773 nats/byte, floor 0.2522"
    assert len(told) <= 100 and train.progress_line({**line, "exact_match": 0.5}, 600).endswith("50.0% solved")

def test_ctrl_c_saves_and_says_how_to_go_on(corpus, tmp_path, capsys):
    """SIGINT in mid-step finishes the step, saves it, prints the command that goes on, and exits with 130."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        interrupt_at(3, signal.SIGINT, flags(corpus, tmp_path))
    assert stopped.value.code == 130
    assert final_state(tmp_path)["iteration"] == 3
    assert "--resume --run_name cats-1" in capsys.readouterr().out
    now = signal.getsignal(signal.SIGINT)
    assert now is before, f"{now} handles SIGINT, where the caller had {before}"

@pytest.mark.parametrize("optimizer", [("--optimizer=muon",), ("--optimizer=adamw", "--grad_accum_steps=2")])
def test_a_killed_run_goes_on_as_if_undisturbed(corpus, tmp_path, optimizer):
    """kill -9 in mid-run, then --resume: parameters, optimizer, losses of the run that nobody killed, bit for bit."""
    more = (*optimizer, "--dropout=0.1", "--max_steps=60", "--save_interval=4", "--eval_interval=25")
    run = Job("train", flags(corpus, tmp_path / "killed", *more), tmp_path / "said.txt")
    assert run.wait_for(lambda: re.search(r"^step +22/60", run.text(), re.M)), run.text()
    run.kill()
    assert run.wait() == -signal.SIGKILL and final_state(tmp_path / "killed")["iteration"] < 60
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main(["--resume", f"--out_dir={tmp_path / 'killed'}", f"--data_dir={corpus / 'data'}", "--device=cpu"])
    train.main(flags(corpus, tmp_path / "whole", *more))
    torch.set_num_threads(threads)
    assert_equal_runs(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))
    a, b = ([{k: v for k, v in line.items() if "second" not in k} for line in
             read_log(tmp_path / out / "cats-1" / "log.jsonl")] for out in ("killed", "whole"))
    assert a == b

def interrupt_at(step: int, number: int, argv: list[str]) -> None:
    """Run train.main and send ourselves a signal in the middle of the given step."""
    original = train.get_batch
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        accumulation = next((int(a.split("=")[1]) for a in argv if a.startswith("--grad_accum_steps")), 1)
        if len(calls) == step * accumulation:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    train.get_batch = counting
    try:
        train.main(argv)
    finally:
        train.get_batch = original

def test_accumulation_is_the_same_training(corpus, tmp_path):
    """Two micro-batches of 4 give the losses of one batch of 8, up to rounding."""
    train.main(flags(corpus, tmp_path / "one"))
    train.main(flags(corpus, tmp_path / "two", "--grad_accum_steps=2"))
    a, b = final_state(tmp_path / "one")["model"], final_state(tmp_path / "two")["model"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)

def test_overfit_one_batch(corpus, tmp_path, capsys):
    """On a single batch the loss goes to nearly zero, and nothing is written."""
    more = ("--overfit_one_batch", "--max_steps=150", "--log_interval=150", "--batch_size=2")
    train.main(flags(corpus, tmp_path, *more))
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")][-1]
    assert float(last.split("loss")[1].split()[0]) < 0.1, last
    assert not tmp_path.exists() or not list(tmp_path.iterdir())

def test_dry_run_allocates_and_writes_nothing(tmp_path, capsys):
    """--dry_run states parameters, memory, tokens and time of a model far too large for this machine, in a moment."""
    folders = [f"--out_dir={tmp_path / 'runs'}", f"--data_dir={tmp_path / 'data'}"]
    train.main(["--dry_run", "--preset=7b", "--device=cpu", *folders])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("parameters", "FLOPs", "memory", "tokens", "time"))
    assert not list(tmp_path.iterdir())
    assert "devices                            4  of 80 GiB with --shard_opt fsdp" in printed
    # 16 bytes a parameter, of which zero1 divides 8 by the number of devices, zero2 12, fsdp all; and the activations,
    # which the devices divide up to one sequence each
    for preset, parameters, batch_size in (("7b", 6_738_415_616, 1), ("gpt2-small", 162_148_608, 128)):
        train.main(["--dry_run", f"--preset={preset}", "--device=cpu", *folders])
        printed = capsys.readouterr().out
        memory = training_memory(ModelConfig(**PRESETS[preset]), batch_size)
        whole, rest = 16 * parameters, memory["activations"] + memory["loss"]
        assert whole == sum(memory.values()) - rest
        for mode, share in (("none", 0), ("zero1", 1 / 2), ("zero2", 3 / 4), ("fsdp", 1)):
            fits = [2**n for n in range(13)
                    if whole * (1 - share + share / 2**n) + rest / min(2**n, batch_size) <= 80 * 2**30]
            told = re.search(rf"^devices +(\S+|no number)  of 80 GiB with --shard_opt {mode}$", printed, re.M)
            assert told and told[1] == (f"{fits[0]:,}" if fits else "no number"), f"{mode}: {told} instead of {fits}"
    assert re.search(r"^devices +2  of 80 GiB with --shard_opt none$", printed, re.M)
    train.main(["--dry_run", "--device=cpu", "--num_experts=8", *folders])
    config = ModelConfig(**PRESETS["laptop"], num_experts=8)
    ffn = 4 * 3 * 128 * 320  # of one expert, in 4 layers
    active = sum(count_parameters(config).values()) - 6 * ffn
    assert f"of which a token passes {active:,}" in capsys.readouterr().out

def test_evaluation_is_the_mean_over_all_windows(corpus, tmp_path):
    """The logged validation loss equals a loop over the text, one window and one token at a time."""
    train.main(flags(corpus, tmp_path))
    payload = final_state(tmp_path)
    model = TransformerLM(ModelConfig(**payload["config"])).eval()
    model.load_state_dict(payload["model"])
    tokens = np.load(next((corpus / "data").glob("**/bpe256/val.npy"))).astype(np.int64)
    nats = []
    for start in range(0, len(tokens) - 1, 12):
        window = torch.from_numpy(tokens[start : start + 13])
        log_p = torch.log_softmax(model(window[None, :-1])[0].double(), dim=-1)
        nats += [-log_p[t, window[t + 1]].item() for t in range(len(window) - 1)]
    logged = read_log(tmp_path / "cats-1" / "log.jsonl")[-1]["val_loss"]
    assert len(nats) == len(tokens) - 1
    assert logged == pytest.approx(sum(nats) / len(nats), rel=1e-6)

def test_stories_are_scored_one_by_one(tmp_path):
    """Nats per byte of built-in stories: each alone after one end-of-text token, its end included; beside the floor."""
    data = prepare("stories", vocab_size=400, data_dir=tmp_path, data_bytes=60_000, num_workers=1, say=str)
    tokenizer = Tokenizer.load(data.tokenizer_dir)
    tokens = load_tokens(data.val_tokens, tokenizer)
    options = dict(batch_size=3, max_tokens=4000, by_document=True)
    validation = train.ValidationSet(tokens, tokenizer, context_length=700, **options)
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**{**TINY, "vocab_size": 400, "context_length": 700})).eval()
    scores = train.evaluate(model, validation, torch.device("cpu"), contextlib.nullcontext, Ranks())
    texts = data.val_text.read_text(encoding="utf-8").split("<|endoftext|>")[:-1]
    nats, num_bytes, floor, num_tokens = 0.0, 0, 0.0, 0
    for text in texts:
        ids = tokenizer.encode("<|endoftext|>" + text + "<|endoftext|>")
        if num_tokens + len(ids) - 1 > 4001:
            break
        log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), dim=-1)
        nats -= sum(log_p[t, token].item() for t, token in enumerate(ids[1:]))
        num_bytes, num_tokens = num_bytes + len(text.encode()), num_tokens + len(ids) - 1
        floor += story_nats(text)
    assert sum((batch[:, 1:] >= 0).sum() for batch in validation.batches) == num_tokens > 1000
    assert scores["val_loss"] == pytest.approx(nats / num_tokens, rel=1e-5)
    assert scores["val_bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    assert validation.floor == pytest.approx(floor / num_bytes, rel=1e-9)
    assert train.ValidationSet(tokens, tokenizer, context_length=50, **options).floor is None, "stories do not fit"

# --- Mistakes ---

@pytest.mark.parametrize("more, said", [
    (("--d_model=30",), "num_heads"),
    (("--batch_size=9", "--grad_accum_steps=2"), "multiple of 2"),
    (("--max_steps=0",), "max_steps"),
    (("--lr=-1",), "lr"),
    (("--lr=inf",), "finite"),
    (("--device=meta",), "--device meta"),
    (("--device=cuda:7",), "--device"),
    (("--context_length=6000",), "fewer than one window"),
    (("--dataset=no/such/file.txt",), "no/such/file.txt"),
    (("--num_kv_heads=3",), "num_kv_heads"),
    (("--no_such_flag=3",), "no_such_flag"),
    (("--batch_size=many",), "batch_size"),
    (("--data_bytes=0",), "data_bytes"),
    (("--beta2=1.5",), "beta2"),
    (("--seed=99999999999999999999",), "seed"),
    (("--num_workers=-1",), "num_workers"),
    (("--resume", "--run_name=missing"), "no run to resume"),
])
def test_mistakes_are_one_sentence(corpus, tmp_path, capsys, more, said):
    """A mistake ends in one line on stderr that names it, exit code 2, and leaves no run folder."""
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(corpus, tmp_path / "out", *more))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("train.py: ") and error.count("\n") == 1 and said in error, error
    assert not list((tmp_path / "out").glob("*"))

def test_an_odd_context_is_one_process_affair(corpus, tmp_path, capsys):
    """Only --context_parallel asks for an even context length."""
    train.main(flags(corpus, tmp_path, "--max_steps=1", "--context_length=13"))
    with pytest.raises(SystemExit):
        train.main(flags(corpus, tmp_path, "--max_steps=1", "--context_parallel=2"))
    assert "--context_parallel must divide" in capsys.readouterr().err

def test_a_folder_is_no_dataset(corpus, tmp_path, capsys, monkeypatch):
    """--dataset .. is refused before anything is touched, and nobody's own .tmp files are ever removed."""
    (tmp_path / "data").mkdir()
    files = [tmp_path / "fig.1.tmp", tmp_path / "data" / "cats" / "results.2024.tmp"]
    files[1].parent.mkdir()
    for file in files:
        file.write_text("mine")
    monkeypatch.chdir(tmp_path / "data")
    for dataset, code in (("..", 2), (str(corpus / "cats.txt"), 0)):
        with contextlib.ExitStack() as stack:
            stopped = stack.enter_context(pytest.raises(SystemExit)) if code else None
            train.main(flags(corpus, tmp_path / "out", f"--dataset={dataset}", "--data_dir=.", "--max_steps=1"))
        assert (stopped.value.code if stopped else 0) == code
        assert all(file.exists() for file in files), f"--dataset {dataset} removed a file that is not ours"
    assert "unknown dataset '..'" in capsys.readouterr().err

def test_a_run_is_never_overwritten(corpus, tmp_path, capsys):
    """A taken --run_name is refused; without a name the next free number is taken."""
    train.main(flags(corpus, tmp_path, "--max_steps=1"))
    with pytest.raises(SystemExit):
        train.main(flags(corpus, tmp_path, "--max_steps=1", "--run_name=cats-1"))
    assert "holds a run already" in capsys.readouterr().err
    train.main(flags(corpus, tmp_path, "--max_steps=1"))
    assert (tmp_path / "cats-2" / "log.jsonl").exists()

def test_resuming_keeps_the_settings(corpus, tmp_path, capsys):
    """A typed flag that differs from the run's is refused by name; max_steps may change, and the log goes on."""
    train.main(flags(corpus, tmp_path))
    place = ["--resume", f"--out_dir={tmp_path}", f"--data_dir={corpus / 'data'}", "--device=cpu"]
    with pytest.raises(SystemExit):
        train.main([*place, "--lr=0.5"])
    assert "--lr 0.5 differs" in capsys.readouterr().err
    log = tmp_path / "cats-1" / "log.jsonl"
    config = (tmp_path / "cats-1" / "config.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train.main([*place, "--max_steps=5"])
    assert stopped.value.code == 2 and "is past --max_steps 5" in capsys.readouterr().err
    assert (tmp_path / "cats-1" / "config.json").read_bytes() == config, "refused, and yet changed"
    with open(log, "a") as file:
        file.write('5\n"step"\n{"step": "x"}\n{"step": 99, "tok')  # no lines of ours, and one torn by a kill
    train.main([*place, "--max_steps=12", "--lr=0.01"])
    steps = [line["step"] for line in read_log(log) if "train_loss" in line]
    assert steps == list(range(1, 13))
    assert json.loads((tmp_path / "cats-1" / "config.json").read_text())["train"]["max_steps"] == 12
    with pytest.raises(SystemExit):
        train.main(["--resume", f"--out_dir={tmp_path / 'nowhere'}"])
    assert "no run" in capsys.readouterr().err

def test_resuming_without_a_network_finds_the_stories_again(tmp_path, monkeypatch):
    """tinystories that became stories goes on with the same stories and tokenizer: 4 steps equal 2 + resume + 2."""
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(bpe, "download", no_network)
    common = [f"--data_dir={tmp_path / 'data'}", "--device=cpu"]
    new = ["--data_bytes=60000", "--vocab_size=300", "--d_model=32", "--batch_size=2", "--eval_tokens=900"]
    with pytest.raises(SystemExit):
        interrupt_at(2, signal.SIGTERM, [*common, *new, f"--out_dir={tmp_path / 'parts'}", "--max_steps=4"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("data/stories/**/*.*")}
    train.main([*common, "--resume", f"--out_dir={tmp_path / 'parts'}"])
    train.main([*common, *new, f"--out_dir={tmp_path / 'whole'}", "--max_steps=4"])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("data/stories/**/*.*")}
    assert_equal_runs(final_state(tmp_path / "parts", "stories-1"), final_state(tmp_path / "whole", "stories-1"))

def test_a_checkpoint_of_another_configuration_is_refused(corpus, tmp_path, capsys):
    """config.json edited to other heads fits every shape, and is still refused; a damaged checkpoint is named."""
    train.main(flags(corpus, tmp_path, "--max_steps=2"))
    run, place = tmp_path / "cats-1", ["--resume", f"--out_dir={tmp_path}", f"--data_dir={corpus / 'data'}"]
    description = json.loads((run / "config.json").read_text())
    description["model"].update(rope_theta=123.0)
    (run / "config.json").write_text(json.dumps(description))
    with pytest.raises(SystemExit) as stopped:
        train.main([*place, "--max_steps=4", "--device=cpu"])
    assert stopped.value.code == 2 and "not of the configuration" in capsys.readouterr().err
    checkpoint = latest_checkpoint(run)
    checkpoint.write_bytes(checkpoint.read_bytes()[:900])
    with pytest.raises(SystemExit):
        train.main([*place, "--device=cpu"])
    assert "unreadable checkpoint" in capsys.readouterr().err

def test_a_diverged_run_stops_and_says_so(corpus, tmp_path, capsys):
    """A loss that is not a number ends the run with the step, and no checkpoint holds it."""
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(corpus, tmp_path, "--lr=1e30", "--norm=none", "--grad_clip=1e30", "--warmup_steps=0"))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "the gradient of " in error and "no checkpoint holds it" in error
    for path in (tmp_path / "cats-1").glob("checkpoint_*.pt"):
        assert all(value.isfinite().all() for value in read_checkpoint(path)["model"].values()), path

def poisoned(monkeypatch, step: int) -> None:
    """Let the batch of one step have a loss that is not a number."""
    original, calls = train.linear_cross_entropy, []

    def loss(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == step else 1.0)

    monkeypatch.setattr(train, "linear_cross_entropy", loss)

def test_a_step_that_is_not_finite(corpus, tmp_path, capsys, monkeypatch):
    """A NaN stops the run at its step and names the first bad tensor; --skip_nonfinite passes the step over."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        poisoned(patch, 7)
        train.main(flags(corpus, tmp_path / "stop"))
    assert "step 7: the gradient of token_embeddings.weight is not finite" in capsys.readouterr().err
    assert final_state(tmp_path / "stop")["iteration"] == 5
    with monkeypatch.context() as patch:
        poisoned(patch, 7)
        train.main(flags(corpus, tmp_path / "skip", "--skip_nonfinite"))
    assert "step 7: the gradient of token_embeddings.weight is not finite, the step is passed over" in (
        capsys.readouterr().out)
    final = final_state(tmp_path / "skip")
    assert final["iteration"] == 10 and all(value.isfinite().all() for value in final["model"].values())

def test_a_run_without_a_checkpoint_begins_anew(corpus, tmp_path, capsys):
    """--resume of a run that was killed before its first checkpoint starts it from the beginning, and equals it."""
    train.main(flags(corpus, tmp_path))
    whole = final_state(tmp_path)
    for path in (tmp_path / "cats-1").glob("checkpoint_*.pt"):
        path.unlink()
    train.main(["--resume", f"--out_dir={tmp_path}", f"--data_dir={corpus / 'data'}", "--device=cpu"])
    assert "no checkpoint yet, so from the beginning" in capsys.readouterr().out
    assert_equal_runs(final_state(tmp_path), whole)
    steps = [line["step"] for line in read_log(tmp_path / "cats-1" / "log.jsonl") if "val_loss" in line]
    assert steps == [0, 5, 10]

def hold_the_log(folder: Path, holds) -> None:
    log = train.RunLog(folder, 10)
    holds.set()
    time.sleep(60)
    log.close()

def test_two_runs_into_one_folder(corpus, tmp_path, capsys):
    """A folder that another process writes is refused; a process that is gone leaves no lock behind."""
    train.main(flags(corpus, tmp_path))
    resume = ["--resume", f"--out_dir={tmp_path}", f"--data_dir={corpus / 'data'}", "--device=cpu", "--max_steps=12"]
    holds = CONTEXT.Event()
    other = CONTEXT.Process(target=hold_the_log, args=(tmp_path / "cats-1", holds))
    other.start()
    assert holds.wait(60), "the other process did not start"
    with pytest.raises(SystemExit) as stopped:
        train.main(resume)
    assert stopped.value.code == 2 and "another process is training this run" in capsys.readouterr().err
    other.kill()
    other.join()
    train.main(resume)
    assert final_state(tmp_path)["iteration"] == 12

def test_report_of_runs(corpus, tmp_path, capsys):
    """--report sorts runs by their last validation loss and names the settings that differ; --plot draws them."""
    for name, lr in (("slow", 1e-5), ("quick", 1e-2)):
        train.main(flags(corpus, tmp_path, f"--lr={lr}", f"--run_name={name}"))
    capsys.readouterr()
    train.main(["--report", str(tmp_path / "slow"), str(tmp_path / "quick")])
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["run", "val", "loss", "bits/byte", "step", "tokens", "seconds", "lr", "min_lr"]
    assert [(row[0], row[-2]) for row in rows] == [("quick", "0.01"), ("slow", "1e-05")]
    with pytest.raises(SystemExit):
        train.main(["--report", str(tmp_path / "none")])
    assert "no run to resume or report" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    picture = train.plot_runs([tmp_path / "slow", tmp_path / "quick"], tmp_path / "runs.png")
    assert picture.read_bytes().startswith(b"\x89PNG")

@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_experts_are_logged(corpus, tmp_path, balance):
    """A mixture of experts logs each layer's load, entropy and worst violation, of the training and of the validation
    text, and resumes to the bit."""
    options = ("--num_experts=4", f"--balance={balance}", "--optimizer=muon")
    train.main(flags(corpus, tmp_path / "whole", *options))
    lines = read_log(tmp_path / "whole" / "cats-1" / "log.jsonl")
    for line in lines:
        assert [layer["layer"] for layer in line["experts"]] == [0, 1]
        for layer in line["experts"]:
            assert sum(layer["load"]) == pytest.approx(1) and max(layer["load"]) * 4 - 1 == pytest.approx(
                layer["violation"], abs=1e-6) and 0 < layer["entropy"] <= 1, layer
    train.main(flags(corpus, tmp_path / "parts", *options, "--log_interval=3"))
    (tmp_path / "parts" / "cats-1" / "checkpoint_00000010.pt").unlink()
    train.main(["--resume", f"--out_dir={tmp_path / 'parts'}", f"--data_dir={corpus / 'data'}", "--device=cpu"])
    assert_equal_runs(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    seldom = read_log(tmp_path / "parts" / "cats-1" / "log.jsonl")
    scores = [[line["experts"] for line in some if "val_loss" in line] for some in (lines, seldom)]
    assert scores[0] == scores[1] and len(scores[0]) == 3, "an evaluation tells of the validation text alone"
    train.main(flags(corpus, tmp_path / "left", *options[::2], "--balance=none"))
    states = [final_state(tmp_path / folder)["model"] for folder in ("whole", "left")]
    assert not torch.equal(*(state["layers.1.ffn.router.weight"] for state in states)), "balancing changed nothing"

def test_profile(corpus, tmp_path, capsys):
    """--profile times forward, backward and optimizer, writes a trace with these names, and leaves no run."""
    train.main(flags(corpus, tmp_path, "--profile"))
    out = capsys.readouterr().out
    trace = json.loads((tmp_path / "trace_0.json").read_text(encoding="utf-8"))
    named = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    for part in ("forward", "backward", "gradients of the others", "optimizer"):
        assert re.search(rf"^{part} +\d+\.\d ms a step$", out, re.M), out
        assert named.count(part) == 5, f"{part} is {named.count(part)} times in the trace"
    assert not (tmp_path / "cats-1").exists()

@pytest.mark.gpu
def test_profile_on_a_gpu(corpus, tmp_path):
    """On CUDA --profile leaves a snapshot of memory beside the trace."""
    train.main(flags(corpus, tmp_path, "--profile", "--device=cuda"))
    assert (tmp_path / "trace_0.pickle").stat().st_size > 0

def test_arithmetic_is_scored_by_whole_answers():
    """exact_match is the share of problems that greedy generation solves to the letter, told from brute force."""
    torch.manual_seed(0)
    vocab = dict(enumerate(b"%c" % byte for byte in range(256))) | {256: b"<|endoftext|>"}
    tokenizer = Tokenizer(vocab, [], ["<|endoftext|>"])
    # A bigram machine in place of a model: what follows each byte, learned from the first two problems alone.
    texts = ["ab\ncd", "ba\nce", "ab\ncd", "aa\ncd", "bb\nde"]
    follow = {a: b for a, b in zip(b"\ncd", b"cd" + b"\0")} | {ord("d"): 256}
    table = torch.full((257, 257), 0.0)
    for a, b in follow.items():
        table[a, b] = 9.0

    class Machine(torch.nn.Module):
        def forward(self, ids):
            return table[ids]

    ids = np.array([token for text in texts for token in [*text.encode(), 256]] + [97], dtype=np.uint16)
    validation = train.ValidationSet(ids, tokenizer, context_length=20, batch_size=2, max_tokens=1000,
                                      by_document=True, question_end=10)
    scores = train.evaluate(Machine(), validation, torch.device("cpu"), contextlib.nullcontext, Ranks())

    def solves(text: str) -> bool:
        question, answer = text.encode().split(b"\n")
        written, token = [], 10
        while (token := table[token].argmax().item()) != 256 and len(written) < 9:
            written.append(token)
        return bytes(written) == answer

    assert scores["exact_match"] == sum(map(solves, texts)) / len(texts) == 0.6

# --- Several processes ---

def torchrun(num_processes: int, argv: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "train.py", *argv], capture_output=True, text=True, timeout=120,
                          env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]

def on_processes(num_processes: int, argv: list[str], output: Path, code: int = 0) -> Job:
    """The same without torchrun, whose start is most of its time; what the ranks said is added to the output file."""
    job = Job("train", argv, output, num_processes)
    assert job.wait() == code, job.text()[-2000:]
    return job

def on_one_thread(argv: list[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main(argv)
    torch.set_num_threads(threads)

def losses(out: Path, name: str = "cats-1") -> list[float]:
    return [line["train_loss"] for line in read_log(out / name / "log.jsonl") if "train_loss" in line]

@pytest.mark.parametrize("num_processes, more", [(2, ("--dropout=0.1",)), (4, ("--ordered",))])
def test_processes_equal_micro_batches(corpus, tmp_path, num_processes, more):
    """--ddp bucketed on 2 processes of torchrun, and on 4: the bits of one process that accumulates as many batches."""
    many = flags(corpus, tmp_path / "many", "--ddp=bucketed", *more)
    if num_processes == 2:
        torchrun(2, many)
    else:
        on_processes(num_processes, many, tmp_path / "said.txt")
    on_one_thread(flags(corpus, tmp_path / "one", f"--grad_accum_steps={num_processes}", *more))
    assert_equal_runs(final_state(tmp_path / "one"), final_state(tmp_path / "many"))
    assert losses(tmp_path / "one") == losses(tmp_path / "many")

def test_resuming_on_another_number_of_processes(corpus, tmp_path):
    """Stopped on one process with two micro-batches, resumed on two with one each: the losses of one process."""
    whole, parts = flags(corpus, tmp_path / "whole", "--grad_accum_steps=2"), flags(corpus, tmp_path / "parts")
    on_one_thread(whole)
    original, stop_after = train.get_batch, [2 * 3]

    def stopping(*args, **kwargs):
        stop_after[0] -= 1
        if stop_after[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "get_batch", stopping)
        on_one_thread([*parts, "--grad_accum_steps=2"])
    resume = ["--resume", f"--out_dir={tmp_path / 'parts'}", f"--data_dir={corpus / 'data'}", "--device=cpu"]
    job = on_processes(2, [*resume, "--ddp=bucketed", "--grad_accum_steps=1"], tmp_path / "said.txt")
    assert "from step 3" in job.text(), job.text()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

def test_shards_of_every_kind(corpus, tmp_path):
    """Two processes with zero1, zero2 or fsdp train the bits of one, and go on with each other's checkpoints."""
    options = ("--optimizer=muon", "--max_steps=9", "--grad_clip=100")  # a norm over shards is added in another order
    on_one_thread(flags(corpus, tmp_path / "one", "--grad_accum_steps=2", *options))
    run = flags(corpus, tmp_path / "many", *options)
    resume = ["--resume", f"--out_dir={tmp_path / 'many'}", f"--data_dir={corpus / 'data'}", "--device=cpu"]
    for step, mode in ((5, ["--shard_opt=fsdp"]), (7, ["--shard_opt=zero2"]),
                       (9, ["--shard_opt=zero1", "--ddp=bucketed"])):
        start = resume if step > 5 else [flag for flag in run if "save_interval" not in flag]
        on_processes(2, [*start, *mode, f"--save_interval={step}"], tmp_path / "said.txt")
        folder = tmp_path / "many" / "cats-1"
        for path in folder.glob("checkpoint_*.pt"):  # as if this stage had been killed after its first save
            if int(path.stem.split("_")[1]) > step:
                path.unlink()
        assert latest_checkpoint(folder).stem.endswith(str(step)), f"{mode} left {latest_checkpoint(folder)}"
    assert_equal_runs(final_state(tmp_path / "many"), final_state(tmp_path / "one"))
    assert losses(tmp_path / "many") == losses(tmp_path / "one")

def train_in_group(ranks: Ranks, runs: list[list[str]]) -> None:
    """Several runs, one after the other, by the processes of one group."""
    for argv in runs:
        typed = vars(train.build_parser().parse_args(argv))
        train.train(typed, train.Place(**train.fields_of(train.Place, typed)), ranks, lambda *args: None)

def test_experts_on_two_processes(corpus, tmp_path):
    """With experts, two processes have the losses and loads of one with two micro-batches: to the bit under bucketed,
    zero1 and fsdp (here with checkpointed activations), to rounding in context parallelism; and the same biases."""
    options = ("--num_experts=4", "--grad_clip=100", "--log_interval=2", "--max_steps=4", "--save_interval=9")
    modes = {"loss": {"loss-bucketed": ["--ddp=bucketed"],
                      "loss-fsdp": ["--shard_opt=fsdp", "--checkpoint_activations"]},
             "bias": {"bias-zero1": ["--ddp=bucketed", "--shard_opt=zero1"],
                      "bias-context": ["--ddp=bucketed", "--context_parallel=2"]}}

    def argv(balance: str, name: str, *more: str) -> list[str]:
        return flags(corpus, tmp_path, *options, f"--balance={balance}", f"--run_name={name}", *more)

    def told(name: str) -> list[dict]:
        return [line for line in read_log(tmp_path / name / "log.jsonl") if "train_loss" in line]

    run_ranks(train_in_group, 2, [argv(b, name, *more) for b, runs in modes.items() for name, more in runs.items()])
    for balance in modes:
        on_one_thread(argv(balance, balance, "--grad_accum_steps=2"))
        expected = final_state(tmp_path, balance)["model"]["layers.1.ffn.bias"]
        assert (expected.abs().max() > 0) == (balance == "bias"), f"{balance}: biases {expected}"
        for name in modes[balance]:
            assert torch.equal(final_state(tmp_path, name)["model"]["layers.1.ffn.bias"], expected), name
            for line, alone in zip(told(name), told(balance), strict=True):
                tolerance = 1e-5 if name == "bias-context" else 0
                assert line["train_loss"] == pytest.approx(alone["train_loss"], abs=tolerance, rel=0), name
                assert [layer["load"] for layer in line["experts"]] == [layer["load"] for layer in alone["experts"]]

def test_what_does_not_go_together_is_one_sentence(corpus, tmp_path):
    """Muon with torch_fsdp is refused in one sentence with exit code 2, without a traceback."""
    job = on_processes(2, flags(corpus, tmp_path, "--optimizer=muon", "--shard_opt=torch_fsdp"), tmp_path / "said", 2)
    assert job.told() and all("take --shard_opt fsdp" in line for line in job.told()), job.text()
    assert "Traceback" not in job.text(), job.text()

def test_context_parallel_run(corpus, tmp_path):
    """--context_parallel 2 with --doc_mask: two processes on each sequence have the losses of one, to 1e-5."""
    text = corpus / "documents.txt"
    text.write_text("<|endoftext|>".join(TEXT[first : first + 19] for first in range(0, 3000, 19)), encoding="utf-8")
    run = [f"--dataset={text}" if flag.startswith("--dataset") else flag for flag in flags(corpus, tmp_path / "one")]
    run = [flag for flag in run if "vocab_size" not in flag] + ["--vocab_size=300", "--doc_mask"]
    train.main(run)
    on_processes(2, [*run, "--ddp=bucketed", "--context_parallel=2", "--run_name=two"], tmp_path / "said.txt")
    one, two = (losses(tmp_path / "one", name) for name in ("documents-1", "two"))
    assert one == pytest.approx(two, abs=1e-5) and len(one) > 3
    train.main([*run[:-1], "--run_name=open"])
    assert losses(tmp_path / "one", "open") != pytest.approx(one, abs=1e-3), "--doc_mask changed nothing"

def test_two_processes_without_ddp_are_refused(corpus, tmp_path):
    """Several processes with --ddp none would train apart: refused in one sentence by every rank."""
    job = on_processes(2, flags(corpus, tmp_path), tmp_path / "said.txt", 2)
    assert len(job.told()) == 2 and all("add --ddp bucketed" in line for line in job.told()), job.text()

def test_doctests():
    """The worked examples in the docstrings are true."""
    assert doctest.testmod(train).failed == 0
