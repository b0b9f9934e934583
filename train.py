"""Train a language model: one optimizer step, then many of them, on one process or several.

One step is five lines: take a batch of token windows, predict every next token, measure the surprise in nats
(cross-entropy), differentiate, and let the optimizer move the parameters against the gradient,

    loss(theta) = mean over tokens of  -log p_theta(next token | tokens before it)
    theta      <- theta - lr * AdamW(gradient of the loss)

The rest makes those five lines repeatable: a batch is a pure function of (seed, step), so a run can stop and go on with
the same bits; a checkpoint is written whole or not at all; what was measured stands in a log.

    python train.py                                    # TinyStories (or built-in stories): minutes on a laptop
    python train.py --dry_run --preset gpt2-small      # parameters, FLOPs, memory and time; nothing is allocated
    python train.py --resume                           # go on with the newest run where it was stopped
    torchrun --standalone --nproc-per-node 2 train.py --ddp bucketed

    1. The loss                        4. Batches                   7. Writing down what happened
    2. The optimizers                  5. Checkpoints               8. Settings: one default, one place
    3. Learning rate and clipping      6. Evaluation                9. The run
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import time
import timeit
import zipfile
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bpe import END_OF_TEXT, GENERATED_BYTES, Tokenizer, UserError, alone_in, load_tokens, prepare, room_for
from bpe import story_nats, write_atomically, write_json
from ddp import MODES as DDP_MODES, ContextParallel, RankFailure, Ranks, all_reduce_sum, end_distributed
from ddp import explain_failure, get_world_size, init_distributed, on_rank_0, wrap
from model import PRESETS, ModelConfig, TransformerLM, count_parameters
from model import document_places, flops_per_token, make_attention, option, training_memory
from shard_opt import MODES as SHARD_MODES, full_state_dicts, load_full_state_dicts, load_shards, memory_table
from shard_opt import save_shards, shard

# --- 1. The loss ---
def cross_entropy(logits: Tensor, targets: Tensor, *, mean: bool = True) -> Tensor:
    """-log softmax(logits)[target], in nats: logits (..., V) of any float type, targets (...) -> a scalar, the mean, or
    the loss of every token, (...). Equal to torch.nn.functional.cross_entropy.
    Softmax divides exp(x) by a sum of exps; its log cancels the exp of the target's own score, which leaves
        loss = log(sum_v exp(x_v)) - x_target
    Subtracting max(x) from every score only keeps exp from overflowing. The sum is in float32: bfloat16 has 3 digits.
    >>> round(cross_entropy(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([2])).item(), 5), round(math.log(4), 5)
    (1.38629, 1.38629)
    """
    assert logits.shape[:-1] == targets.shape, f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}"
    scores = logits.float() - logits.detach().amax(dim=-1, keepdim=True).float()  # (..., V): no exp above 1
    losses = scores.exp().sum(dim=-1).log() - scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return losses.mean() if mean else losses

class LinearCrossEntropy(torch.autograd.Function):
    """cross_entropy(hidden @ weight.T, targets), a chunk of tokens at a time: the logits of all never exist.
    A mean has one number as its gradient, so everything else can be computed on the way forward, while a chunk's logits
    are in the cache: with p = softmax(logits), d logits = (p - onehot(target)) / tokens, and from it
        d hidden = d logits @ weight        d weight = sum over chunks of  d logits.T @ hidden
    It takes 0.6 (laptop) to 0.85 (baseline) of the plain way's time on two cores, and memory for a chunk of logits."""
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """hidden (N, C), weight (V, C), targets (N,) -> a scalar."""
        device = hidden.device.type  # a function of one's own is not cast by autocast
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        narrow, loss = weight.to(half), hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for first in range(0, len(targets), chunk):
            x, target = hidden[first : first + chunk].to(half), targets[first : first + chunk, None]  # (n, C), (n, 1)
            scores = (x @ narrow.T).float()  # (n, V)
            scores -= scores.amax(dim=-1, keepdim=True)
            loss -= scores.gather(-1, target).sum()
            exps = scores.exp_()  # (n, V)
            total = exps.sum(dim=-1, keepdim=True)  # (n, 1)
            loss += total.log().sum()
            grad = exps.div_(total * len(targets))  # (n, V): the softmax part
            grad = grad.scatter_add_(-1, target, torch.full_like(total, -1 / len(targets))).to(half)
            grad_hidden[first : first + chunk] = grad @ narrow  # (n, C)
            grad_weight += grad.T @ x  # (V, C)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # but for the factor that came from behind
        return grad_hidden * grad, grad_weight * grad, None, None

def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """The mean cross-entropy of a linear layer's logits: hidden (..., C), weight (V, C), targets (...) -> a scalar."""
    chunk = chunk or (4096 if hidden.is_cuda else 512)  # tokens: enough for the matrix products, little for the cache
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), chunk)

# --- 2. The optimizers ---
def in_cache(*tensors: Tensor, numbers: int = 2**18) -> Iterable[tuple[Tensor, ...]]:
    """Equal tensors in blocks of rows that stay in a CPU's cache for several passes: AdamW takes 42 instead of 91 ms
    for 22.7 M parameters on two cores, a tenth of a bfloat16 step of the baseline, and gives the same bits."""
    if tensors[0].numel() <= numbers or tensors[0].ndim == 0 or tensors[0].is_cuda:
        return [tensors]
    rows = max(1, numbers * len(tensors[0]) // tensors[0].numel())
    return zip(*(x.split(rows) for x in tensors))

class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2). For a parameter p with gradient g:
        p <- p - lr * weight_decay * p          shrink first, by the rate of the step, whatever the gradient
        m <- beta1 * m + (1 - beta1) * g        running mean of the gradient
        v <- beta2 * v + (1 - beta2) * g^2      running mean of its square
        p <- p - lr * m_hat / (sqrt(v_hat) + eps)
    m and v start at zero: after t steps they are too small by 1 - beta^t, which m_hat and v_hat divide out. m / sqrt(v)
    is about +-1 for a steady gradient of any size, so one lr fits all layers. The same bits as torch.optim.AdamW."""
    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update of every parameter that has a gradient; the others are skipped whole, decay included."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            self.update_group(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def update_group(self, group: dict, parameters: list[Tensor]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            t = state["step"] = state["step"] + 1
            for w, g, m, v in in_cache(p, p.grad, state["exp_avg"], state["exp_avg_sq"]):
                w.mul_(1 - lr * group["weight_decay"])
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                denominator = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
                w.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))

def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace every singular value of (..., M, N) matrices by about 1, without computing a single one.
    With X = U S V', the polynomial a X + b (X X') X + c (X X')^2 X has the same U and V, and singular values
    a s + b s^3 + c s^5. Five times, with coefficients that lift small s steeply and leave the large ones near 1
    (about 0.7 to 1.2), is a few matrix products. (Jordan et al. 2024, "Muon"; a Newton-Schulz iteration)"""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # (..., M, N): now all s <= 1
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller side is squared
    for _ in range(steps):
        square = x @ x.mT  # (..., M, M)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x  # (..., M, N)
    return x.mT if tall else x

class Muon(AdamW):
    """Momentum, orthogonalized: for matrices, in groups that carry muon=True; AdamW for the other groups.
        m <- 0.95 * m + 0.05 * g
        W <- W - lr * weight_decay * W - lr * scale * orthogonalize(0.05 * g + 0.95 * m)
    A few directions often dominate a gradient matrix, which Adam, dividing element by element, cannot see; with equal
    singular values rare directions are learned as fast as common ones. An orthogonal matrix has elements of about
    1 / sqrt(max(M, N)). The scale 0.2 * sqrt(max(M, N)) makes them 0.2, like AdamW's updates, so one lr serves both
    (Liu et al. 2025); the "original" one, sqrt(max(1, M / N)), asks for an lr of its own."""
    def __init__(self, params, *args, adjust_lr_fn: str = "match_rms_adamw", **kwargs):
        super().__init__(params, *args, **kwargs)
        self.adjust_lr_fn = adjust_lr_fn  # as torch.optim.Muon calls it

    def update_group(self, group: dict, parameters: list[Tensor]) -> None:
        if not group.get("muon"):
            return super().update_group(group, parameters)
        for shape in dict.fromkeys(p.shape for p in parameters):  # orthogonalized in one batch
            same, directions = [p for p in parameters if p.shape == shape], []
            for p in same:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                directions.append(p.grad.lerp(momentum, 0.95))  # looks one step ahead (Nesterov)
            scales = {"original": max(1, shape[-2] / shape[-1]) ** 0.5, "match_rms_adamw": 0.2 * max(shape[-2:]) ** 0.5}
            for p, update in zip(same, orthogonalize(torch.stack(directions))):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scales[self.adjust_lr_fn])

def parameter_groups(model: nn.Module, weight_decay: float, muon: bool = False) -> list[dict]:
    """Who is treated how. Gains of norms do not decay: shrinking one only rescales what the next matrix undoes. Muon
    takes the matrices inside the blocks; rows of embedding, head and router stand each for itself: AdamW's."""
    hidden, others, gains = [], [], []
    for name, p in model.named_parameters():
        inside = muon and name.startswith("layers.") and "router" not in name
        (gains if p.ndim < 2 else hidden if inside else others).append(p)
    groups = [{"params": hidden, "weight_decay": weight_decay, "muon": True},
              {"params": others, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

# --- 3. Learning rate and clipping ---
def get_lr_cosine_schedule(it: int, max_lr: float, min_lr: float, warmup_iters: int, cosine_cycle_iters: int) -> float:
    """Linear warm-up from 0 to max_lr at it == warmup_iters, half a cosine down to min_lr at it == cosine_cycle_iters,
    min_lr ever after; both ends are exact. Warm-up keeps the first steps short while AdamW's averages are still noise.
    >>> [get_lr_cosine_schedule(it, 1.0, 0.1, 2, 6) for it in (0, 1, 2, 4, 6, 9)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    if it < warmup_iters:
        return max_lr * it / warmup_iters
    if it == warmup_iters or it >= cosine_cycle_iters:  # the ends, without a rounding or a cosine of no length
        return max_lr if it == warmup_iters else min_lr
    progress = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)  # 0 ... 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)

@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_l2_norm: float, *, sharded: bool = False) -> Tensor:
    """Scale all gradients together, in place, so that their joint l2 norm is at most max_l2_norm; returns the norm
    they had, a scalar tensor. Below the limit nothing changes, not even a rounding. (Pascanu et al. 2013, section 3.2)
    torch.where makes the choice: on a GPU, Python's `if norm > limit` would wait for every kernel in flight.
    sharded: the gradients are this rank's part, by whose norm alone each rank would scale differently."""
    parameters = [p for p in parameters if p.grad is not None]
    gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters]
    copies = [get_world_size() if sharded and getattr(p, "owners", 0) is None else 1 for p in parameters]
    norms = [gradient.norm() / count**0.5 for gradient, count in zip(gradients, copies)]  # copies count as one
    norm = torch.stack(norms).norm() if norms else torch.zeros(())
    if sharded:
        norm = all_reduce_sum(norm.float().square()).sqrt()
    scale = torch.where(norm >= max_l2_norm, max_l2_norm / (norm + 1e-6), torch.ones_like(norm))
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))
    return norm

# --- 4. Batches ---
def get_batch(tokens: np.ndarray, batch_size: int, context_length: int, device: str | torch.device, *,
              rng: np.random.Generator | None = None, rows: slice = slice(None), starts: Sequence[int] = ()) -> tuple:
    """Random windows of a long token array and, for each position, the token that follows: two (B, T) int64 tensors.
    Starts 0 ... n - T - 1 are equally likely, or those in `starts`, if any. All batch_size starts are drawn from `rng`,
    then `rows` of them are read: ranks draw the same starts and each reads its share, from a memory map perhaps."""
    starts = starts if len(starts) else range(len(tokens) - context_length)
    chosen = (rng or np.random.default_rng()).integers(len(starts), size=batch_size)[rows]
    windows = np.stack([tokens[starts[n] : starts[n] + context_length + 1] for n in chosen])  # (B, T + 1)
    batch = torch.from_numpy(windows.astype(np.int64))
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory()  # so that the copy runs while the GPU computes
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]  # (B, T), (B, T)

# --- 5. Checkpoints ---
def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside a compiled (`_orig_mod`) or data-parallel (`module`) one, so that saved names are its own."""
    inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
    return module if inner is None else unwrapped(inner)

def save_checkpoint(model: nn.Module | dict, optimizer: torch.optim.Optimizer | dict, iteration: int, out, **extra):
    """Write model and optimizer (or their state dicts), iteration and `extra` (plain values, tensors) to a path or a
    binary file object. A path gets its name when the file is whole and on the disk: nobody ever finds half of one."""
    states = [x if isinstance(x, dict) else unwrapped(x).state_dict() for x in (model, optimizer)]
    payload = {"model": states[0], "optimizer": states[1], "iteration": iteration, **extra}
    with contextlib.nullcontext(out) if hasattr(out, "write") else write_atomically(out, "wb") as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:  # hides the OSError of a full disk
            raise error.__context__ or error from None

def read_checkpoint(src) -> dict:
    """The payload that save_checkpoint wrote. Only tensors and plain values are unpickled (weights_only), and the
    archive's checksums are verified first: torch.load checks none, and reads zeros where an attribute says folder."""
    try:
        with zipfile.ZipFile(src) as archive:
            if damaged := archive.testzip() or [i.filename for i in archive.infolist() if i.external_attr]:
                raise ValueError(f"the checksum of {damaged} is wrong")
        if hasattr(src, "seek"):
            src.seek(0)
        payload = torch.load(src, map_location="cpu", weights_only=True)
        payload["model"], payload["optimizer"], payload["iteration"]  # raises where one is missing
        return payload
    except Exception as error:  # a foreign or damaged file can fail in zipfile, pickle and torch in many ways
        raise UserError(f"{src}: unreadable checkpoint ({error!r:.90}); without it an older one is used") from error

def load_checkpoint(src, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Load what save_checkpoint wrote into model and optimizer (None: the model alone); returns the iteration."""
    payload = read_checkpoint(src)
    unwrapped(model).load_state_dict(payload["model"])
    if optimizer is not None:
        optimizer.load_state_dict(payload["optimizer"])
    return payload["iteration"]

def latest_checkpoint(run_folder: Path) -> Path | None:
    """checkpoint_<step>.pt with the greatest step, or None."""
    return max(run_folder.glob("checkpoint_*.pt"), key=lambda path: path.name, default=None)

# --- 6. Evaluation ---
class ValidationSet:
    """What evaluation scores: the first max_tokens validation tokens, cut into windows, each token predicted once from
    at most context_length before it. With `by_document` every story is predicted alone, after one end-of-text token: as
    a model writes it, and as the generator's -log p is reckoned. question_end: the token before an answer to score."""
    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, *, context_length: int, batch_size: int,
                 max_tokens: int, by_document: bool = False, question_end: int | None = None):
        self.token_bytes = np.array([len(tokenizer.vocab.get(n, b"")) for n in range(tokenizer.vocab_size)])  # (V,)
        self.token_bytes[[tokenizer.token_ids[name.encode()] for name in tokenizer.special_tokens]] = 0  # are no text
        tokens = np.asarray(tokens[: max_tokens + 1], dtype=np.int64)
        rows = [tokens[start : start + context_length + 1] for start in range(0, len(tokens) - 1, context_length)]
        self.floor = self.question_end = None  # floor: the generator's own nats per byte, which no model can undercut
        if by_document:
            end_of_text = tokenizer.token_ids[END_OF_TEXT.encode()]
            documents = np.split(tokens, np.flatnonzero(tokens == end_of_text) + 1)[:-1]  # the last one is cut off
            if documents and max(map(len, documents)) <= context_length:  # else windows, and no floor
                rows = sorted((np.r_[end_of_text, document] for document in documents), key=len)  # little padding
                self.question_end = question_end
                with contextlib.suppress(ValueError):  # the text is not this generator's: no floor either
                    nats = sum(story_nats(tokenizer.decode(document[:-1].tolist())) for document in documents)
                    self.floor = nats / sum(self.token_bytes[document].sum() for document in documents)
        self.batches = [np.array(list(itertools.zip_longest(*rows[n : n + batch_size], fillvalue=-1))).T.copy()
                        for n in range(0, len(rows), batch_size)]  # (B, T + 1) each, where -1 is padding

@torch.no_grad()
def evaluate(model: nn.Module, validation: ValidationSet, device: torch.device, autocast, ranks: Ranks,
             places_of: Callable[[Tensor], dict] = lambda inputs: {}) -> dict:
    """Mean loss over the validation tokens, in nats per token, and in bits per byte of text, which compares models with
    different tokenizers, too. The ranks share the batches. Where documents are problems, exact_match is the share whose
    every token behind the question is the likeliest after the right ones: always taking the likeliest solves them."""
    model.eval()
    sums = np.zeros(5)  # nats, tokens, bytes, problems solved, problems
    for first in range(0, len(validation.batches), ranks.world_size):
        index = first + ranks.rank  # beyond the end, too: a sharded model must be called equally often on every rank
        batch = validation.batches[index % len(validation.batches)]  # (B, T + 1)
        inputs, targets = torch.from_numpy(batch[:, :-1].clip(0)).to(device), batch[:, 1:]  # (B, T), (B, T)
        with autocast():
            logits = model(inputs, **places_of(inputs))  # (B, T, V)
            losses = cross_entropy(logits, torch.from_numpy(targets.clip(0)).to(device), mean=False)  # (B, T)
        if index < len(validation.batches):
            scored, ends = targets >= 0, targets == validation.question_end  # (B, T), (B, T)
            behind = scored & (ends.cumsum(axis=1) > ends)  # (B, T), the token that ends the question not included
            solved = (~behind | (logits.argmax(dim=-1).cpu().numpy() == targets)).all(axis=1)  # (B,)
            sums += (losses.cpu().double().numpy()[scored].sum(), scored.sum(),
                     validation.token_bytes[targets[scored]].sum(), solved.sum(), len(targets))
    model.train()
    nats, num_tokens, num_bytes, solved, num_problems = (all_reduce_sum(float(x)) for x in sums)
    scores = {"val_loss": nats / num_tokens, "val_bits_per_byte": nats / max(num_bytes, 1.0) / math.log(2)}
    return scores if validation.question_end is None else {**scores, "exact_match": solved / num_problems}

# --- 7. Writing down what happened ---
class RunLog:
    """`log.jsonl`: one JSON object a line, each flushed as it is written, and the same values to wandb when asked."""
    def __init__(self, folder: Path, resume_at: int, to_wandb: bool = False):
        def refuse(waiting: str) -> None:
            raise UserError(f"{folder}: another process is training this run: wait, or choose a --run_name")
        path, self.lock = folder / "log.jsonl", contextlib.ExitStack()
        self.close = self.lock.close
        self.lock.enter_context(alone_in(folder, refuse))
        self.wandb_run = to_wandb and importlib.import_module("wandb").init(project="train.py", name=folder.name)
        kept = [line for line in read_log(path) if line["step"] <= resume_at] if path.exists() else []
        with write_atomically(path) as file:  # a torn last line and what lies past the checkpoint are cut
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self.file = self.lock.enter_context(open(path, "a", encoding="utf-8"))

    def write(self, line: dict) -> None:
        finite = {name: x for name, x in line.items() if not isinstance(x, float) or math.isfinite(x)}  # JSON lacks inf
        with room_for(Path(self.file.name)):
            print(json.dumps(finite), file=self.file, flush=True)
        if self.wandb_run:
            self.wandb_run.log(line, step=line["step"])

def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; one that is not whole, such as a last one that a kill has cut off, is left out."""
    lines = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            lines += [values] if (values := json.loads(line))["step"] >= 0 else []
    return lines

def progress_line(line: dict, max_steps: int, floor: float | None = None) -> str:
    """A line of the log as people read it; of an evaluation, how near the loss is to the corpus's own entropy, too.
    >>> progress_line({"step": 50, "tokens": 153_600, "train_loss": 4.2179, "lr": 3e-3, "grad_norm": 0.5123,
    ...                "tokens_per_second": 20481.7}, 680)
    'step    50/680   loss  4.2179   lr 3.00e-03   norm  0.512    20,482 tokens/s   0:01:34 left'
    """
    step, text = line["step"], f"step {line['step']:{max(len(str(max_steps)), 5)}}/{max_steps}   "
    if "val_loss" not in line:
        left = (max_steps / step - 1) * line["tokens"] / line["tokens_per_second"]
        return text + (f"loss {line['train_loss']:7.4f}   lr {line['lr']:.2e}   norm {line['grad_norm']:6.3f}   "
                       f"{line['tokens_per_second']:7,.0f} tokens/s   {timedelta(seconds=int(left))} left")
    loss, bits = line["val_loss"], line["val_bits_per_byte"]
    perplexity = math.exp(min(loss, 700))
    text += f"val {loss:7.4f}   perplexity {perplexity:,.{2 if perplexity < 100 else 0}f}   {bits:.4f} bits/byte"
    text += "" if floor is None else f"   {bits * math.log(2):.4f} nats/byte, floor {floor:.4f}"
    return text + (f"   {line['exact_match']:.1%} solved" if "exact_match" in line else "")

def plot_runs(folders: list[Path], picture: Path) -> Path:
    """Training and validation loss of some runs against steps, tokens and seconds, as a PNG. Needs matplotlib."""
    from matplotlib import pyplot
    pyplot.switch_backend("Agg")  # draws into files, needs no screen
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for number, folder in enumerate(folders):
        lines = read_log(folder / "log.jsonl")
        for axis, panel in zip(("step", "tokens", "seconds"), panels):
            for key, style in (("train_loss", {"alpha": 0.3}), ("val_loss", {"marker": ".", "label": folder.name})):
                panel.plot(*zip(*((x[axis], x[key]) for x in lines if key in x)), color=f"C{number}", **style)
            panel.set(xlabel=axis, ylabel="nats per token: training pale, validation dotted", yscale="log")
    panels[0].legend()
    figure.savefig(picture, dpi=150)
    return picture

def report(folders: list[Path]) -> str:
    """A table of runs, the lowest last validation loss first, with the settings in which they differ."""
    runs = []
    for folder in folders:
        stored = read_config(folder)
        if scores := [line for line in read_log(folder / "log.jsonl") if "val_loss" in line]:
            runs.append((scores[-1], folder.name, {**stored["model"], **stored["train"]}))
    if not runs:
        raise UserError("none of these runs has been evaluated yet: give folders of runs, such as runs/*")
    runs.sort(key=lambda run: run[0]["val_loss"])
    differing = [name for name in runs[0][2] if len({str(settings.get(name)) for *_, settings in runs}) > 1]
    rows = [["run", "val loss", "bits/byte", "step", "tokens", "seconds", *differing]]
    for last, name, settings in runs:
        rows.append([name, f"{last['val_loss']:.4f}", f"{last['val_bits_per_byte']:.4f}", f"{last['step']:,}",
                     f"{last['tokens']:,}", f"{last['seconds']:,.0f}", *(str(settings.get(n)) for n in differing)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)

# --- 8. Settings: one default, one place ---
@dataclasses.dataclass
class TrainConfig:
    """What a run is, beside its model: a resumed run keeps it, but for the fields that may change."""
    dataset: str = option("tinystories", "tinystories, owt, shakespeare, stories, arithmetic, or a text file's path")
    data_bytes: int | None = option(None, "bytes of training text (none: all; 100 MB of tinystories and owt on a CPU)")
    seed: int = option(0, "of parameters, batches and dropout")
    dtype: str = option("auto", "arithmetic (parameters: float32)", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = option(False, "torch.compile the model: a slow start, faster steps on a GPU")
    optimizer: str = option("adamw", "who turns gradients into updates", choices=("adamw", "muon"))
    lr: float = option(1e-3, "peak learning rate")
    min_lr: float | None = option(None, "learning rate at the last step (none: a tenth of lr)")
    warmup_steps: int | None = option(None, "steps of linear warm-up (none: a twentieth of max_steps, at most 500)")
    beta2: float = option(0.95, "decay of AdamW's running mean of squared gradients")
    weight_decay: float = option(0.1, "decoupled decay of matrices")
    grad_clip: float = option(1.0, "limit of the gradient's global l2 norm")
    batch_size: int = option(128, "sequences per step, over all processes and micro-batches")
    grad_accum_steps: int = option(1, "micro-batches per process and step", may_change=True)
    max_steps: int = option(10_000, "optimizer steps", may_change=True)
    eval_interval: int = option(500, "steps between evaluations", may_change=True)
    eval_tokens: int = option(200_000, "validation tokens scored, the first ones", may_change=True)
    save_interval: int = option(1000, "steps between checkpoints", may_change=True)
    skip_nonfinite: bool = option(False, "pass over a step whose gradient is infinite or NaN instead of stopping there")
    log_interval: int = option(20, "steps between progress lines", may_change=True)

    def __post_init__(self):
        self.min_lr = self.lr / 10 if self.min_lr is None else self.min_lr
        self.warmup_steps = min(500, self.max_steps // 20) if self.warmup_steps is None else self.warmup_steps
        for name, value in vars(self).items():
            least = int(name.endswith(("size", "steps", "tokens", "interval", "bytes")) and name != "warmup_steps")
            if isinstance(value, (int, float)) and not least <= value < math.inf:
                raise UserError(f"--{name} must be at least {least} and finite, it is {value}")
        if self.grad_clip == 0 or self.beta2 >= 1 or self.seed >= 2**63:
            raise UserError("--grad_clip must be above 0, --beta2 below 1, --seed below 2**63")

@dataclasses.dataclass
class Place:
    """Where a run stands and on what it runs: free to change whenever it goes on."""
    preset: str | None = option(None, "a shape, other flags beat it (none: laptop; baseline on a GPU)", tuple(PRESETS))
    run_name: str | None = option(None, "folder below --out_dir (none: <dataset>-<next free number>)")
    resume: bool = option(False, "go on with the run that --run_name names, or with the newest")
    out_dir: str = option("runs", "where runs are kept")
    data_dir: str = option("data", "where texts, tokenizers and token arrays are kept")
    num_workers: int | None = option(None, "processes that prepare data (none: one a core)")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps (none: the fastest that is there)")
    ddp: str = option("none", "how processes share gradients, see ddp.py", choices=("none", *DDP_MODES))
    bucket_size_mb: float = option(25.0, "message size of --ddp bucketed and torch")
    shard_opt: str = option("none", "who keeps which training state, see shard_opt.py", choices=("none", *SHARD_MODES))
    checkpoint: str = option("full", "rank 0 writes all; or each its shard, where all can read it", ("full", "sharded"))
    ordered: bool = option(False, "add gradients in the order of the ranks: the same bits on any number of them")
    context_parallel: int = option(1, "neighbouring processes that read one sequence together, see ddp.py")
    dist_timeout: float = option(120.0, "a process that is silent for so many seconds ends the job")
    wandb: bool = option(False, "log to Weights & Biases, too")
    plot: bool = option(False, "draw loss.png at the end (needs matplotlib)")
    dry_run: bool = option(False, "only state parameters, FLOPs, memory, tokens and time")
    overfit_one_batch: bool = option(False, "train on one batch: the loss must fall to nearly 0")
    profile: bool = option(False, "time the parts of a few steps; write a trace and, on CUDA, a snapshot of memory")
    report: list[str] | None = option(None, "compare finished runs (with --plot: draw runs.png)")

    def __post_init__(self):
        self.device = self.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        for name in ("bucket_size_mb", "context_parallel", "dist_timeout", "num_workers"):
            if not (getattr(self, name) is None or getattr(self, name) > 0):
                raise UserError(f"--{name} must be greater than 0, it is {getattr(self, name)}")

# What goes with a preset: laptop takes minutes on two cores; by the defaults baseline is CS336's TinyStories run.
RECIPES: dict[str, dict] = {
    "laptop": dict(optimizer="muon", lr=1.2e-2, warmup_steps=30, batch_size=16, max_steps=700, log_interval=25,
                   eval_interval=140, eval_tokens=40_000, save_interval=140),
    "7b": dict(batch_size=512, grad_accum_steps=512, lr=3e-4),  # one sequence at a time
}
def build_parser() -> argparse.ArgumentParser:
    """All flags, from the fields of the three dataclasses. None has a default here (SUPPRESS), so that what was typed
    can be told from what was not; --help shows the dataclass's. Without a usage line a mistake is one sentence."""
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, config in (("what is trained (defaults: of --preset baseline)", ModelConfig),
                          ("how; kept by a resumed run", TrainConfig), ("where, and instead of training", Place)):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(config):
            help = f.metadata["help"] + ("" if f.default is None else f" (default: {str(f.default).lower()})")
            kind = next(kind for kind in (bool, int, float, str) if kind.__name__ in str(f.type))
            options: dict = {"action": argparse.BooleanOptionalAction} if kind is bool else {
                "type": kind, "choices": f.metadata["choices"], "nargs": "+" if "list" in str(f.type) else None}
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **options)
    return parser

def fields_of(config: type, values: dict) -> dict:
    return {f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values}

def pick_device(name: str, dtype: str, local_rank: int, d_model: int) -> tuple[torch.device, torch.dtype]:
    """The device of that name, of several GPUs one for each process here; and bfloat16 where it multiplies that and the
    matrices are big enough (two AMX cores, baseline: 1,120 -> 4,243 tokens/s; at 0.8 M parameters casts cost more)."""
    try:
        name = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}" if name == "cuda" else name
        device = torch.ones(1, device=name).nonzero().device  # "meta" has no values to look for
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not to be had ({str(error).splitlines()[0]}): try cpu") from None
    probes = [getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    fast = device.type == "cpu" and d_model >= 256 and any(probe() for probe in probes)
    fast = fast or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return device, getattr(torch, dtype if dtype != "auto" else "bfloat16" if fast else "float32")

def dry_run(model_config: ModelConfig, config: TrainConfig, device: torch.device, say: Callable) -> None:
    """State what the run would be, from formulas (model.py) and a timed matrix product; nothing is allocated."""
    micro_batch = config.batch_size // config.grad_accum_steps
    memory = training_memory(model_config, micro_batch)
    memory[f"in all, {micro_batch} sequences at a time"] = sum(memory.values())
    flops = 3 * sum(flops_per_token(model_config).values())  # backward costs twice the forward
    a = torch.ones(1024, 1024, device=device)
    rate = 2 * 1024**3 / sorted(timeit.repeat(lambda: (a @ a).sum().item(), number=1, repeat=5))[2]  # FLOP/s
    parameters, active = (sum(count_parameters(model_config, active=active).values()) for active in (False, True))
    say(f"parameters        {parameters:>18,}" + f"  of which a token passes {active:,}" * (active < parameters))
    say(f"FLOPs per token   {flops:>18,.0f}  forward and backward")
    for part, size in memory.items():
        say(f"memory            {size / 1e9:>15.3f} GB  {part}")
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 80 * 2**30
    rest = memory["activations"] + memory["loss"]  # each device has its share of the sequences, one at least
    for mode in memory_table(parameters, 1):
        fits = (f"{2**n:,}" for n in range(13) if rest / min(2**n, micro_batch)
                + sum(memory_table(parameters, 2**n)[mode].values()) <= room)
        say(f"devices           {next(fits, 'no number'):>18}  of {room / 2**30:.0f} GiB with --shard_opt {mode}")
    num_tokens = config.max_steps * (tokens_per_step := config.batch_size * model_config.context_length)
    say(f"tokens            {num_tokens:>18,}  {config.max_steps:,} steps x {tokens_per_step:,}")
    time_needed = str(timedelta(seconds=int(2 * flops * num_tokens / rate)))
    say(f"time              {time_needed:>18}  at half of a matrix product's {rate / 1e9:,.0f} GFLOP/s here")

# --- 9. The run ---
def start_run_folder(place: Place, dataset: str, tokenizer_dir: Path) -> Path:
    """Make a run's folder and copy the tokenizer into it: a run can be read back when the data is long gone. A folder
    that holds a run already is refused."""
    free = next(n for n in itertools.count(1) if not Path(place.out_dir, f"{dataset}-{n}").exists())
    folder = Path(place.out_dir, place.run_name or f"{dataset}-{free}")
    if (folder / "config.json").exists() or latest_checkpoint(folder):
        raise UserError(f"{folder} holds a run already: choose another --run_name, or go on with --resume")
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        with write_atomically(folder / file, "wb") as copy:
            copy.write((tokenizer_dir / file).read_bytes())
    return folder

def read_config(folder: Path) -> dict:
    """What config.json says of a run: preset, tokenizer_hash, model, train."""
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ModelConfig(**stored["model"]), TrainConfig(**stored["train"])  # raise where it is damaged
        return stored
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder}: no run to resume or report, or a damaged config.json; start a new one") from None

def settings(typed: dict, place: Place) -> tuple[ModelConfig, TrainConfig, Path | None]:
    """Model and training configuration: defaults < preset < typed flags; or the stored ones of a run that goes on."""
    if not place.resume:
        place.preset = place.preset or ("baseline" if place.device.startswith("cuda") else "laptop")
        return (ModelConfig(**{**PRESETS[place.preset], **fields_of(ModelConfig, typed)}),
                TrainConfig(**{**RECIPES.get(place.preset, {}), **fields_of(TrainConfig, typed)}), None)
    folder = Path(place.out_dir, place.run_name or "")
    if not place.run_name:  # the run that was written to last
        files = [latest_checkpoint(path.parent) or path for path in folder.glob("*/config.json")]
        folder = max(files, key=lambda file: file.stat().st_mtime, default=folder / "config.json").parent
    stored = read_config(folder)
    place.preset = stored.get("preset")
    known = {**stored["model"], **stored["train"], "preset": place.preset}
    may_change = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata.get("may_change")}
    for name, value in typed.items():
        if name in may_change:
            stored["train"][name] = value
        elif name in known and value != known[name]:
            raise UserError(f"--{name} {value} differs from the run's own {known[name]}: a resumed run keeps its "
                            f"settings; leave the flag away, or start a new run without --resume")
    return ModelConfig(**stored["model"]), TrainConfig(**stored["train"]), folder

def train(typed: dict, place: Place, ranks: Ranks, say: Callable) -> int | None:
    """The run, in the order in which things happen; returns an exit code or None. `typed`: flags that were given."""
    for name, wanted in (("matplotlib", place.plot), ("wandb", place.wandb)):
        if wanted and not importlib.util.find_spec(name):  # told now, not after hours
            raise UserError(f"--plot needs matplotlib, --wandb needs wandb: pip install {name}")
    if place.report:
        say(report(folders := [Path(name) for name in place.report]))
        if place.plot:
            say(f"curves: {plot_runs(folders, Path('runs.png'))}")
        return None
    model_config, config, folder = settings(typed, place)
    length, tokens_per_step = model_config.context_length, config.batch_size * model_config.context_length
    recording = not (place.overfit_one_batch or place.profile)
    device, dtype = pick_device(place.device, config.dtype, ranks.local_rank, model_config.d_model)
    sharded = place.shard_opt in ("zero2", "fsdp", "torch_fsdp")  # these reduce gradients themselves
    if sharded and (place.ddp != "none" or config.compile or dtype == torch.float16):
        raise UserError(f"--shard_opt {place.shard_opt} goes with no --ddp, no --compile and no --dtype float16")
    if (place.checkpoint, place.shard_opt) == ("sharded", "torch_zero1"):
        raise UserError("--shard_opt torch_zero1 saves no shards: take zero1, or --checkpoint full")
    if ranks.world_size > 1 and place.ddp == "none" and not sharded:
        raise UserError(f"{ranks.world_size} processes need a way to share gradients: add --ddp bucketed")
    if ranks.world_size % place.context_parallel or (
            place.context_parallel > 1 and length % (2 * place.context_parallel)):
        raise UserError("--context_parallel must divide the number of processes, and twice of it --context_length")
    num_slices = ranks.world_size // place.context_parallel * config.grad_accum_steps
    if config.batch_size % num_slices:
        raise UserError(f"--batch_size {config.batch_size} does not divide into {num_slices} slices (processes / "
                        f"--context_parallel x --grad_accum_steps): take a multiple of {num_slices}")
    if place.dry_run:
        return dry_run(model_config, config, device, say)

    # Data. Rank 0 prepares what is missing, the others wait for it.
    special_tokens = (END_OF_TEXT,) if model_config.vocab_size > 256 else ()  # 256 ids are all bytes: nothing else fits
    if config.data_bytes is None and config.dataset in ("tinystories", "owt") and device.type != "cuda":
        config.data_bytes = 100_000_000  # more than a CPU reads in a day
    data = on_rank_0(lambda: prepare(
        config.dataset, vocab_size=model_config.vocab_size, special_tokens=special_tokens, data_dir=place.data_dir,
        data_bytes=config.data_bytes, num_workers=place.num_workers, say=say), "preparing the data")
    tokenizer = Tokenizer.load(data.tokenizer_dir)
    if data.dataset == "stories" != config.dataset:  # it stood in for tinystories, and a resumed run asks for it
        config.dataset, config.data_bytes = "stories", min(config.data_bytes or GENERATED_BYTES, GENERATED_BYTES)
    train_tokens, val_tokens = load_tokens(data.train_tokens, tokenizer), load_tokens(data.val_tokens, tokenizer)
    end_of_text_id = tokenizer.token_ids.get(END_OF_TEXT.encode(), -1)
    # Documents of a built-in corpus are scored from their first token, so windows begin with one, too: one that begins
    # in the middle asks for names it has not seen. (The default run ends at 0.281 instead of 0.293 nats a byte.)
    by_document = special_tokens and data.dataset in ("stories", "arithmetic")
    if len(train_tokens) <= length or len(val_tokens) < 2:
        raise UserError(f"the text's {len(train_tokens):,} tokens, and {len(val_tokens):,} to validate, are fewer than "
                        "one window: lower --context_length, or take more text")
    starts = np.flatnonzero(train_tokens[:-length] == end_of_text_id) if by_document else ()
    question_end = tokenizer.token_ids[b"\n"] if data.dataset == "arithmetic" else None
    validation = ValidationSet(val_tokens, tokenizer, context_length=length, batch_size=max(1, 8192 // length),
                               max_tokens=config.eval_tokens, by_document=by_document, question_end=question_end)

    # Model and optimizer; a run that goes on takes both from its newest checkpoint.
    path = latest_checkpoint(folder) if folder else None
    payload = read_checkpoint(path) if path else {}
    identity = {"config": dataclasses.asdict(model_config), "tokenizer_hash": tokenizer.hash()}
    if path and not identity.items() <= payload.items():
        raise UserError(f"{path}: not of the configuration in {folder / 'config.json'} and the tokenizer in "
                        f"{data.tokenizer_dir}: restore what was changed")
    step, resumed_at, seconds_before = payload.get("iteration", 0), payload.get("iteration"), payload.get("seconds", 0)
    if step > config.max_steps:
        raise UserError(f"{path} is past --max_steps {config.max_steps:,}: take more")
    torch.manual_seed(config.seed)  # the same parameters on every rank
    context, spread = ContextParallel(place.context_parallel), None
    if context.size > 1:
        spread = context.attention(lambda q, k, v, **places: make_attention(model_config.attention, **places)(q, k, v))
    model = TransformerLM(model_config, attention=spread).to(device)
    if config.compile:
        model.compile()
    make_groups = partial(parameter_groups, weight_decay=config.weight_decay, muon=config.optimizer == "muon")
    by_muon = sum(p.numel() for group in make_groups(model) if "muon" in group for p in group["params"])
    optimizer_class, options = {"adamw": AdamW, "muon": Muon}[config.optimizer], {"betas": (0.9, config.beta2)}
    if place.shard_opt == "none":
        optimizer = optimizer_class(make_groups(model), **options)
    else:
        module, optimizer = shard(model, place.shard_opt, make_groups, optimizer_class, **options,
                                  compute_dtype=dtype if sharded and dtype != torch.float32 else None)
    if not sharded:  # one process alone gets a wrapper that does nothing
        mode = "naive" if place.ddp == "none" else place.ddp
        module = wrap(model, mode, bucket_size_mb=place.bucket_size_mb, ordered=place.ordered)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 gradients underflow
    if path:
        if payload["model"]:
            load_full_state_dicts(module, optimizer, payload["model"], payload["optimizer"])
        else:  # the tensors lie beside it
            load_shards(module, optimizer, path.with_suffix(".shards"), payload["optimizer"])
        scaler.load_state_dict(payload["scaler"])
        torch.set_rng_state(payload["rng"])  # though every step seeds its own
    del payload  # its tensors live in the model and the optimizer now
    places_of = partial(document_places, end_of_text_id=end_of_text_id) if model_config.doc_mask else lambda inputs: {}
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    # The run's folder: configuration, tokenizer, log. Rank 0 alone writes.
    if recording and not folder:
        folder = on_rank_0(lambda: start_run_folder(place, data.dataset, data.tokenizer_dir), "making the run's folder")
    log = RunLog(folder, step if path else -1, place.wandb) if recording and ranks.rank == 0 else None
    if log is not None:  # and so the folder is ours
        write_json(folder / "config.json", {"preset": place.preset, "tokenizer_hash": tokenizer.hash(),
                                            "model": identity["config"], "train": dataclasses.asdict(config)})
    say(f"model: {sum(count_parameters(model_config).values()):,} parameters in {str(dtype).removeprefix('torch.')} on "
        f"{device.type}, {ranks.world_size} process{'es' * (ranks.world_size > 1)}, {torch.get_num_threads()} threads"
        + f"; {by_muon:,} of them by Muon" * (by_muon > 0))
    say(f"{'run: ' + str(folder) if recording else 'one batch'}: {8 if place.profile else config.max_steps:,} steps of "
        f"{config.batch_size} x {length} tokens out of {len(train_tokens):,}"
        + (f", from step {step:,}" if path else ", no checkpoint yet, so from the beginning" * place.resume))

    # A signal only sets a flag: the step is finished, the checkpoint written, and the exit code tells which one it was.
    received, parent = [], os.getppid()  # another parent, later: torchrun was killed, and nobody ends its ranks
    def note(number: int, frame) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    span, profiler = torch.profiler.record_function, None  # names that --profile sums up
    if place.profile:
        config.max_steps, profiler = 8, torch.profiler.profile()
    def tell(values: dict) -> None:
        line = {"step": step, "tokens": step * tokens_per_step, "seconds": time.perf_counter() - started, **values}
        if experts := model.router_statistics(all_reduce_sum):
            line["experts"] = experts
        say(progress_line(line, config.max_steps, validation.floor))
        if log is not None:
            log.write(line)
    told_step, told_at = step, time.perf_counter()
    started = told_at - seconds_before  # as if it had never stopped
    module.train()
    while True:
        # Between two steps: evaluate, save, stop.
        pause = time.perf_counter()
        orphaned = ranks.world_size > 1 and os.getppid() != parent
        stopping, last = all_reduce_sum(float(orphaned or bool(received))) > 0, step >= config.max_steps
        fresh = recording and step != resumed_at  # what a run has just read of a checkpoint was scored when it wrote it
        if fresh and (step % config.eval_interval == 0 or last):
            model.attention = None  # without gradients each rank has room for whole sequences
            model.router_statistics()  # of training, forgotten: what is told next is of the validation text
            tell(evaluate(module, validation, device, autocast, ranks, places_of))
            model.attention = spread
        if fresh and (last or stopping or (step and step % config.save_interval == 0)):
            parts = [getattr(p, "_local_tensor", p) for p in model.parameters()]  # this rank's
            if all_reduce_sum(float(not all(part.isfinite().all() for part in parts))):
                raise UserError(f"step {step}: the parameters are not finite, nothing was saved: lower --lr")
            file = folder / f"checkpoint_{step:08d}.pt"
            states = (full_state_dicts(module, optimizer) if place.checkpoint == "full" else  # whole on rank 0
                      save_shards(module, optimizer, file.with_suffix(".shards")))
            if log is not None:
                save_checkpoint(*states, step, file, seconds=pause - started, scaler=scaler.state_dict(), **identity,
                                rng=torch.get_rng_state(), tokenizer=(folder / "tokenizer.json").read_text("utf-8"),
                                documents=bool((train_tokens[:1_000_000] == end_of_text_id).any()))
                for old in sorted(folder.glob("checkpoint_*.pt"))[:-2]:
                    old.unlink()
            del states  # not kept while the next steps run
        told_at += time.perf_counter() - pause  # a pause is not the training's speed
        if last or stopping:
            break

        # One step.
        step += 1
        lr = get_lr_cosine_schedule(step, config.lr, config.min_lr, config.warmup_steps, config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for micro in range(config.grad_accum_steps):
            # Slice number s of the batch is the same sequences with the same dropout, whoever computes it: rank s of
            # many processes or micro-batch s of one. So two processes equal one, to the last bit.
            s = context.team * config.grad_accum_steps + micro
            rows = slice(s * config.batch_size // num_slices, (s + 1) * config.batch_size // num_slices)
            rng = np.random.default_rng((config.seed, step if recording else 1))
            inputs, targets = get_batch(train_tokens, config.batch_size, length, device, rng=rng, rows=rows,
                                        starts=starts)  # (B, T)
            places = places_of(inputs)
            if context.size > 1:
                inputs, targets, *split = context.begin(inputs, targets, **places)
                places = dict(zip(("positions", "segment_ids"), split))
            seeds = np.random.SeedSequence((config.seed, step, s * context.size + context.index))
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))  # for dropout: where training stands
            sending = micro == config.grad_accum_steps - 1  # gradients add up here; the last backward sends them
            with contextlib.nullcontext() if sending else module.no_sync():
                with span("forward"), autocast():
                    micro_loss = module(inputs, head=partial(linear_cross_entropy, targets=targets), **places)
                    micro_loss = micro_loss / config.grad_accum_steps
                with span("backward"):
                    scaler.scale(micro_loss + model.auxiliary_loss() / config.grad_accum_steps).backward()
            losses.append(micro_loss.detach())
        with span("gradients of the others"):
            module.finish_gradient_synchronization()
        scaler.unscale_(optimizer)
        norm = clip_gradients(model.parameters(), config.grad_clip, sharded=sharded)
        telling = step % config.log_interval == 0 or step in (1, config.max_steps)
        looking = telling or config.skip_nonfinite or device.type == "cpu"  # on a GPU a look waits for the step's end
        if looking and not scaler.is_enabled() and not math.isfinite(norm.item()):
            bad = (name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
            what = f"step {step}: the gradient of {next(bad, 'a parameter on another process')} is not finite"
            if not config.skip_nonfinite:
                raise UserError(f"{what}; no checkpoint holds it: start again with a lower --lr or --skip_nonfinite")
            say(f"{what}, the step is passed over")
            continue
        with span("optimizer"):
            scaler.step(optimizer)
            scaler.update()
            model.update_router_biases(all_reduce_sum)
        if profiler and step == 3:  # the first steps are slower than all others
            profiler.start()
            if device.type == "cuda":
                torch.cuda.memory._record_memory_history()
        if telling:  # reading a loss waits for the device, so it is read only then
            train_loss = all_reduce_sum(sum(loss.item() for loss in losses)) / ranks.world_size  # added in float64
            if not math.isfinite(train_loss):
                raise UserError(f"step {step}: the loss is {train_loss}: start again with a lower --lr or more warm-up")
            speed = (step - told_step) * tokens_per_step / (time.perf_counter() - told_at)
            tell({"train_loss": train_loss, "lr": lr, "grad_norm": norm.item(), "tokens_per_second": speed})
            told_step, told_at = step, time.perf_counter()
    if profiler:
        profiler.stop()
        trace = Path(place.out_dir, f"trace_{ranks.rank}.json")
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        rows = profiler.key_averages()
        for row in [row for row in rows if row.key in ("forward", "backward", "gradients of the others", "optimizer")]:
            say(f"{row.key:<25}{max(row.cpu_time_total, row.device_time_total) / 5000:9.1f} ms a step")
        say(rows.table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
        say(f"trace: {trace}, to be opened in ui.perfetto.dev")
        if device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(trace.with_suffix(".pickle")))  # for pytorch.org/memory_viz
    if log is not None:
        log.close()
        if place.plot:
            say(f"curves: {plot_runs([folder], folder / 'loss.png')}")
    if stopping and not last:
        if recording:
            kept = fields_of(Place, {"run_name": folder.name, **typed}).items()
            flags = "".join(f" --{name} {value}" for name, value in kept if not isinstance(value, bool))
            say(f"saved at step {step:,}; go on with:  python train.py --resume{flags}")
        return 128 + (received[0] if received else signal.SIGTERM)  # 130 for Ctrl-C, 143 for SIGTERM
    if recording:
        took = timedelta(seconds=int(time.perf_counter() - started))
        say(f"trained in {took}; read a text from it:  python sample.py --run {folder}")

def main(argv: list[str] | None = None) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        typed = vars(build_parser().parse_args(argv))
        place = Place(**fields_of(Place, typed))
        ranks = init_distributed(place.device.split(":")[0], timeout_s=place.dist_timeout)
        exit_code = train(typed, place, ranks, print if ranks.rank == 0 else lambda *args, **kwargs: None)
        end_distributed()
        if exit_code:
            raise SystemExit(exit_code)
    except KeyboardInterrupt:  # before the first step: nothing to save, and what is prepared so far is kept
        raise SystemExit(130) from None
    except Exception as error:
        print(f"train.py: {explain_failure(error)}", file=sys.stderr, flush=True)
        if not isinstance(error, ValueError | OSError | RankFailure | torch.distributed.DistError):  # no user's mistake
            raise
        raise SystemExit(2) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

if __name__ == "__main__":
    main()
