"""How integers become a distribution over the next one: a decoder-only Transformer from raw parameters.

A language model reads token ids x_1 .. x_T and returns, at every place t, one score (logit) for each entry of the
vocabulary; softmax turns them into p(x_{t+1} | x_1 .. x_t). In the order in which a token travels:

    embedding  ->  num_layers times [ x += attention(norm(x));  x += ffn(norm(x)) ]  ->  norm  ->  lm_head  ->  logits

Attention lets a place look at the places before it, the feed-forward network (ffn) works on each place alone; their
sum x, the residual stream, is the only road between them.

    python model.py                                # every preset: parameters, FLOPs per token, training memory
    python model.py --preset 7b --batch_size 1     # one preset in exact numbers

Shapes: B batch, T queries, S keys, H heads, G key/value heads, D head dimension, C d_model, F d_ff, V vocab_size,
N tokens, E experts, K experts of a token.

    1. Configuration and presets                                       6. The cache for decoding
    2. The functions: softmax, silu, attention by its definition       7. Self-attention, block, language model
    3. The layers: linear, embedding, norm, feed-forward, rotary       8. What it costs: parameters, FLOPs, memory
    4. A mixture of experts                                            9. Command line
    5. Attention faster, and for packed documents
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PADDING_SEGMENT_ID = -1  # the segment id of a place that holds no token: it attends to nothing and nothing to it

# --- 1. Configuration and presets ---
def option(default, help: str, choices: tuple[str, ...] | None = None, **more):
    """A field of a configuration that is a flag as well: default, help and choices stand together, once."""
    return field(default=default, metadata={"help": help, "choices": choices, **more})

@dataclass
class ModelConfig:
    """Everything that decides the shape of the model; a ValueError says what clashes. Defaults: the baseline preset."""
    vocab_size: int = option(10_000, "tokens in the vocabulary, bytes and special tokens included")
    context_length: int = option(256, "tokens that the model sees at once")
    d_model: int = option(512, "width of the residual stream")
    num_layers: int = option(4, "transformer blocks")
    num_heads: int = option(16, "query heads")
    num_kv_heads: int | None = option(None, "key and value heads (none: as many as query heads)")
    d_ff: int | None = option(None, "width of the feed-forward (none: 8/3 d_model for swiglu, else 4 d_model)")
    rope_theta: float = option(10_000.0, "base of the rotary frequencies")
    norm: str = option("pre", "RMSNorm before each branch, after each sum, or nowhere", ("pre", "post", "none"))
    pos: str = option("rope", "how order enters: rotary, or only through the causal mask", ("rope", "none"))
    ffn: str = option("swiglu", "three matrices, gated; or two matrices", ("swiglu", "silu", "relu", "relu2"))
    dropout: float = option(0.0, "on the output of every attention and feed-forward branch, in training only")
    qk_norm: bool = option(False, "RMSNorm on each head's queries and keys, which bounds the attention scores")
    tie_embeddings: bool = option(False, "one matrix for token embeddings and output head")
    attention: str = option("auto", "who computes attention", ("auto", "naive", "sdpa", "flash"))
    doc_mask: bool = option(False, "a token sees its own document only, in which positions start at 0")
    num_experts: int = option(0, "feed-forward networks of width d_ff of which each token takes a few (0: one for all)")
    experts_per_token: int = option(2, "experts that a token takes")
    shared_experts: int = option(0, "experts beside them that every token takes")
    moe_every: int = option(1, "every n-th block has experts, the others one network")
    balance: str = option("loss", "what keeps experts busy: a loss, or a bias on the choice", ("loss", "bias", "none"))
    balance_rate: float | None = option(None, "weight of that loss or step of that bias (none: 0.01, 0.001)")
    checkpoint_activations: bool = option(False, "keep only each block's input, compute the rest again in the backward")

    def __post_init__(self) -> None:
        self.num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if self.d_ff is None and isinstance(self.d_model, int):
            # A gate is a third matrix: 8/3 d_model instead of 4 keeps the parameters equal; hardware likes 64s.
            self.d_ff = 64 * max(1, (self.d_model + 12) // 24) if self.ffn == "swiglu" else 4 * self.d_model
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")
        for name, choices in ((f.name, f.metadata["choices"]) for f in fields(self)):
            if choices and getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.d_model % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}, "
                             f"and that a multiple of num_kv_heads {self.num_kv_heads}")
        self.head_dim = self.d_model // self.num_heads
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"d_model / num_heads is {self.head_dim}: pos rope turns pairs, so it must be even")
        if not (self.rope_theta > 0 and 0 <= self.dropout < 1):
            raise ValueError(f"rope_theta {self.rope_theta} must be above 0, dropout {self.dropout} in [0, 1)")
        self.balance_rate = {"bias": 0.001}.get(self.balance, 0.01) if self.balance_rate is None else self.balance_rate
        if self.num_experts and not (self.ffn == "swiglu" and 1 <= self.experts_per_token <= self.num_experts > 1
                                     and 1 <= self.moe_every <= self.num_layers and self.shared_experts >= 0):
            raise ValueError(f"num_experts {self.num_experts} must be 0 or more than 1, ffn swiglu, experts_per_token "
                             "1 to num_experts, moe_every 1 to num_layers, shared_experts at least 0")
        self.moe_layers = [n for n in range(self.num_layers) if self.num_experts and (n + 1) % self.moe_every == 0]

GPT2 = dict(vocab_size=50_257, context_length=1_024)
# The gpt2 rows have the published widths and depths, but RMSNorm, rotary positions and gates. 7b is Llama's shape.
PRESETS: dict[str, dict] = {
    "laptop": dict(vocab_size=4_096, context_length=176, d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                   qk_norm=True, tie_embeddings=True),
    "baseline": dict(vocab_size=10_000, context_length=256, d_model=512, num_layers=4, num_heads=16),
    "gpt2-small": dict(GPT2, d_model=768, num_layers=12, num_heads=12),
    "gpt2-medium": dict(GPT2, d_model=1_024, num_layers=24, num_heads=16),
    "gpt2-large": dict(GPT2, d_model=1_280, num_layers=36, num_heads=20),
    "gpt2-xl": dict(GPT2, d_model=1_600, num_layers=48, num_heads=25),
    "10m": dict(vocab_size=2_048, context_length=512, d_model=512, num_layers=3, num_heads=4, tie_embeddings=True),
    "41m": dict(GPT2, d_model=512, num_layers=5, num_heads=8, tie_embeddings=True),
    "124m": dict(GPT2, d_model=768, num_layers=12, num_heads=12, tie_embeddings=True),
    "350m": dict(GPT2, d_model=1_024, num_layers=24, num_heads=16, tie_embeddings=True),
    "1b": dict(vocab_size=32_000, context_length=2_048, d_model=2_048, num_layers=22, num_heads=32, num_kv_heads=4),
    "7b": dict(vocab_size=32_000, context_length=4_096, d_model=4_096, num_layers=32, num_heads=32, d_ff=11_008),
}

# --- 2. The functions: softmax, silu, attention by its definition ---
def softmax(x: Tensor, dim: int) -> Tensor:
    """exp(x) / sum(exp(x)) along `dim`.
    >>> softmax(torch.tensor([0.0, 1000.0, 1000.0]), dim=0)
    tensor([0.0000, 0.5000, 0.5000])
    """
    # exp(1000) overflows. Subtracting the maximum divides above and below by one factor: result and gradient stay.
    exponentials = torch.exp(x - x.detach().amax(dim=dim, keepdim=True))
    return exponentials / exponentials.sum(dim=dim, keepdim=True)

def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x): a smooth relu, also called swish."""
    return x * torch.sigmoid(x)

def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v ("Attention Is All You Need", equation 1): every query takes a weighted mean of v.
    q (..., T, D), k (..., S, D), v (..., S, Dv), mask broadcastable to (..., T, S), True where a query may look.
    Returns (..., T, Dv). A query that may look nowhere gets zeros.
    >>> q, v = torch.zeros(3, 2), torch.tensor([[3.0], [6.0], [9.0]])  # all scores are equal, and so all weights
    >>> scaled_dot_product_attention(q, q, v, torch.ones(3, 3, dtype=torch.bool).tril()).flatten()
    tensor([3.0000, 4.5000, 6.0000])
    """
    # Scores of unit-variance vectors have variance D; divided by sqrt(D) they do not saturate the softmax.
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    if mask is None:
        return softmax(scores, dim=-1) @ v  # (..., T, Dv)
    # subtle: with -inf a row without any key would be -inf - -inf = nan. The lowest finite number gives the same zeros
    # in every other row (exp underflows), and the second fill clears the rows that had no key, gradient included.
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)
    return weights.masked_fill(~mask, 0.0) @ v  # (..., T, Dv)

# --- 3. The layers: linear, embedding, norm, feed-forward, rotary ---
def trunc_normal(*size: int, std: float) -> nn.Parameter:
    """A parameter drawn from a normal distribution cut at three standard deviations: no weight starts as an outlier."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(size), std=std, a=-3 * std, b=3 * std))

class Linear(nn.Module):
    """y = x W^T with W (out_features, in_features), no bias. Glorot's variance 2 / (in + out) is between 1/in, which
    preserves the scale of activations on the way forward, and 1/out, which does so for gradients on the way back."""
    def __init__(self, in_features: int, out_features: int, *, std: float | None = None) -> None:
        super().__init__()
        self.weight = trunc_normal(out_features, in_features, std=std or math.sqrt(2 / (in_features + out_features)))

    def forward(self, x: Tensor) -> Tensor:
        num_out, num_in = self.weight.shape
        if x.is_cpu and not torch.is_grad_enabled() and x.numel() <= 32 * num_in and num_out % 2 == 0:
            # Decoding: reading the weights is all the work, and torch gives a few rows to one core unless it is shown a
            # batch of products, here the halves of the weights (two cores, AVX2: a quarter less time for 1 to 16 rows).
            rows, halves = x.reshape(1, -1, num_in).expand(2, -1, -1), self.weight.view(2, -1, num_in)
            return torch.bmm(rows, halves.mT).transpose(0, 1).reshape(*x.shape[:-1], num_out)  # (..., out_features)
        return x @ self.weight.T  # (..., in_features) @ (in_features, out_features) -> (..., out_features)

class Embedding(nn.Module):
    """One row of `embedding_dim` numbers for each of `num_embeddings` ids, looked up by index."""
    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = trunc_normal(num_embeddings, embedding_dim, std=1.0)

    def forward(self, ids: Tensor) -> Tensor:
        # subtle: weight[ids] is the same, but on a CPU its backward adds up repeated ids in no fixed order, slowly.
        return F.embedding(ids, self.weight)  # (..., embedding_dim)

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019): LayerNorm, no centring."""
    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        # Squares overflow float16 and lose digits in bfloat16, so at least float32 inside; down only after the gain.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # (..., C)
        inverse_rms = torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)  # (..., 1)
        return (wide * inverse_rms * self.weight).to(x.dtype)  # (..., C)

class FeedForward(nn.Module):
    """w2(activation(w1 x)): the network of the first Transformers; relu2 is relu squared (So et al. 2021)."""
    def __init__(self, d_model: int, d_ff: int, activation: str = "silu") -> None:
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff), Linear(d_ff, d_model)  # up, down
        self.activation = {"silu": silu, "relu": torch.relu, "relu2": lambda x: torch.relu(x).square()}[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)))  # (..., C) -> (..., F) -> (..., C)

class SwiGLU(FeedForward):
    """w2(silu(w1 x) * w3 x) (Shazeer 2020, "GLU Variants"): w3 proposes d_ff features, w1 decides how much of each."""
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(d_model, d_ff)
        self.w3 = Linear(d_model, d_ff)  # up, where w1 is the gate

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))  # (..., C) -> (..., F) -> (..., C)

class RotaryPositionalEmbedding(nn.Module):
    """Turns the pair (x[2i], x[2i+1]) of a query or key by the angle position * theta^(-2i / d_k) (Su et al. 2021).
    The dot product of two turned vectors depends only on the difference of their positions: "three tokens ago". Pairs
    are neighbours; Hugging Face's Llama pairs i with i + d_k/2, the same model with rows of q_proj and k_proj permuted.
    >>> rope = RotaryPositionalEmbedding(theta=10_000.0, d_k=2, max_seq_len=8)
    >>> rope(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))     # turned by 1 radian: (cos 1, sin 1)
    tensor([[0.5403, 0.8415]])
    """
    def __init__(self, theta: float, d_k: int, max_seq_len: int) -> None:
        super().__init__()
        frequencies = theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64, device="cpu") / d_k)  # (D/2,)
        angles = torch.outer(frequencies.new_tensor(range(max_seq_len)), frequencies)  # (max_seq_len, D/2)
        self.exact = torch.stack((angles.cos(), angles.sin()), dim=-1)  # (max_seq_len, D/2, 2)
        # The table follows from the configuration, so it is not persistent: checkpoints do not carry it.
        self.register_buffer("cos_sin", self.exact.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # subtle: model.bfloat16() means the weights; turns of three digits blur positions
        self.cos_sin = self.exact.to(self.cos_sin.device, torch.promote_types(self.cos_sin.dtype, torch.float32))
        return self

    def forward(self, x: Tensor, token_positions: Tensor) -> Tensor:
        """x (..., T, D), token_positions (..., T) broadcastable to x's leading dimensions. Returns (..., T, D)."""
        # A turn by an angle is a multiplication by cos + i sin: one pass over x, where four products, two sums and a
        # stack would be seven. There is no bfloat16 complex number, so half precision goes through float32.
        wide = torch.promote_types(x.dtype, torch.float32)
        turns = torch.view_as_complex(self.cos_sin[token_positions].to(wide))  # (..., T, D/2)
        pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))  # (..., T, D/2)
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)  # (..., T, D)

# --- 4. A mixture of experts ---
def mix_by_loop(x: Tensor, chosen: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The definition: each expert's SwiGLU of the tokens that chose it, times their gates, added up.
    x (N, C), chosen and gates (N, K), w1 and w3 (E, F, C), w2 (E, C, F). Returns (N, C)."""
    out = torch.zeros_like(x)  # (N, C)
    for expert in range(len(w1)):
        token, place = (chosen == expert).nonzero(as_tuple=True)  # who took it, and as which of K choices
        y = (silu(x[token] @ w1[expert].T) * (x[token] @ w3[expert].T)) @ w2[expert].T  # (tokens, C)
        out = out.index_add(0, token, (y * gates[token, place, None]).to(x.dtype))  # (N, C)
    return out

def mix_sorted(x: Tensor, chosen: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *,
               grouped: bool | None = None) -> Tensor:
    """The same, faster: sorted by expert, the N K choices are E runs of rows, of any length; no choice is dropped. Runs
    meet their experts one by one or, `grouped`, all in one kernel: in bfloat16 on a GPU, which then never waits."""
    (num_tokens, k), device = chosen.shape, x.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
    if grouped is None:
        grouped = x.is_cuda and dtype == torch.bfloat16 and w1.shape[1] % 8 == w1.shape[2] % 8 == 0
    by_expert, order = chosen.flatten().sort(stable=True)  # (N K,): place in the sorted rows -> choice
    ends = torch.searchsorted(by_expert, torch.arange(len(w1), device=device), right=True, out_int32=True)  # (E,)
    # subtle: the backward of x[order // K] adds up K rows, on CUDA in no fixed order; copied first, rows are permuted.
    rows = x[:, None].expand(-1, k, -1).flatten(0, 1).index_select(0, order)  # (N K, C)
    if grouped:
        product = lambda a, w: F.grouped_mm(a.to(dtype), w.to(dtype).mT, offs=ends)  # noqa: E731
        y = product(silu(product(rows, w1)) * product(rows, w3), w2)  # (N K, F) -> (N K, C)
    else:
        runs = zip(rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist()), w1, w2, w3)
        y = torch.cat([(silu(run @ a.T) * (run @ c.T)) @ b.T for run, a, b, c in runs])  # (N K, C)
    y = y.index_select(0, order.argsort()).view(num_tokens, k, -1)  # (N, K, C)
    return (gates[:, None].to(y.dtype) @ y).squeeze(1)  # (N, 1, K) @ (N, K, C) -> (N, C)

class MixtureOfExperts(nn.Module):
    """E SwiGLUs, of which a router picks K for each token: parameters grow with E, work with K (Shazeer et al. 2017).
        p = softmax(router x)      y = sum over the K greatest p_e of  p_e / (their sum) * expert_e(x)
    Left alone, a router feeds the experts that learn first. What balances it is a loss, E sum_e (e's share of choices)
    (mean p_e), which is 1 when all shares are equal ("Switch Transformers", equation 4); or a bias on p that decides
    the choice and not the gate, and steps up where fewer tokens came (Wang et al. 2024). At -inf the expert is off."""
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, c, f = config.num_experts, config.d_model, config.d_ff
        self.num_experts, self.k, std = e, config.experts_per_token, math.sqrt(2 / (c + f))
        self.router = Linear(c, e, std=1 / math.sqrt(c))
        self.w1, self.w2, self.w3 = (trunc_normal(e, *size, std=std) for size in ((f, c), (c, f), (f, c)))
        self.shared = SwiGLU(c, config.shared_experts * f) if config.shared_experts else None
        self.register_buffer("bias", torch.zeros(e))
        self.mix, self.balance_loss = mix_sorted, None
        self.counts = self.step_counts = 0.0  # become tensors (E + 1,): choices of each expert, sum of entropies

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, C)
        with torch.autocast(x.device.type, enabled=False):  # logits of few digits would swap near-equal experts
            p = torch.softmax(tokens.float() @ self.router.weight.float().T, dim=-1)  # (N, E)
        chosen = (p + self.bias).topk(self.k, dim=-1).indices  # (N, K)
        gates = p.gather(1, chosen)  # (N, K)
        if self.k > 1:  # subtle: one gate divided by itself is 1, and would teach the router nothing
            gates = gates / gates.sum(dim=-1, keepdim=True)
        load = F.one_hot(chosen, self.num_experts).sum(dim=(0, 1))  # (E,)
        balance_loss = self.num_experts * (load / chosen.numel() * p.mean(dim=0)).sum()
        counts = torch.cat((load, torch.special.entr(p.detach()).sum()[None]))  # (E + 1,)
        if self.balance_loss is None:  # subtle: in a step a checkpointed block comes here twice
            self.balance_loss, self.step_counts = balance_loss, self.step_counts + counts
        y = self.mix(tokens, chosen, gates, self.w1, self.w2, self.w3).view_as(x)  # (..., C)
        return y if self.shared is None else y + self.shared(x)

# --- 5. Attention faster, and for packed documents ---
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, H, T, D), k (B, G, S, D), v (B, G, S, D) -> (B, H, T, D)
def make_attention(kind: str, positions: Tensor, segment_ids: Tensor | None = None, kv_positions: Tensor | None = None,
                   kv_segment_ids: Tensor | None = None, *, is_causal: bool = False) -> Attend:
    """The attention of all layers of one pass. is_causal promises that the mask is a triangle or, of one query, empty.
    positions and segment_ids (T,) or (B, T) are the queries'; the keys' are the same unless given, (S,) or (B, S).
    Who sees whom is flash.visible's to say: nothing later, nothing of another segment, never padding.
    naive   the definition of section 2: writes the (B, H, T, S) scores to memory, several times
    sdpa    torch's fused kernels: the same numbers without storing scores, and without a mask if `is_causal`
    flash   flash.py: skips the tiles that the mask empties, so that packed documents cost less (needs Triton for that)
    auto    flash on CUDA, else sdpa"""
    if kind == "auto":
        kind = "flash" if positions.is_cuda else "sdpa"
    if kind == "sdpa" and is_causal:
        return partial(F.scaled_dot_product_attention, is_causal=positions.shape[-1] > 1, enable_gqa=True)
    from flash import flash_attention, visible
    kv_positions = positions if kv_positions is None else kv_positions
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    if kind == "flash":
        places = dict(positions=positions, segment_ids=segment_ids)
        places |= dict(kv_positions=kv_positions, kv_segment_ids=kv_segment_ids)
        return partial(flash_attention, **({"causal": positions.shape[-1] > 1} if is_causal else places))
    mask = visible(positions, kv_positions, segment_ids, kv_segment_ids)  # (T, S) or (B, T, S)
    mask = mask.view(-1, 1, *mask.shape[-2:])  # (1 or B, 1, T, S), the second 1 standing for the heads
    # subtle: what a query without keys gets is left to each fused kernel. It is shown all keys, and cleared after.
    blind = ~mask.any(dim=-1, keepdim=True)  # (1 or B, 1, T, 1)
    shown = mask | blind  # (1 or B, 1, T, S), once for all layers
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind == "naive":  # key/value head g serves the query heads g * H/G to (g + 1) * H/G - 1
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, D)
            return scaled_dot_product_attention(q, k, v, mask)  # (B, H, T, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=shown, enable_gqa=True)  # (B, H, T, D)
        return out.masked_fill(blind, 0.0)
    return attend

def document_places(token_ids: Tensor, end_of_text_id: int, is_padding: Tensor | None = None) -> dict[str, Tensor]:
    """The positions and segment_ids, both (B, T), with which packed documents neither see nor count each other.
    To be numbered over whole rows of token_ids (B, T), not their parts; end_of_text_id belongs to what it ends.
    Where is_padding (B, T) is True there is no token, and the next place begins a document."""
    from flash import positions_in_segments, segment_ids_from_tokens
    segment_ids = segment_ids_from_tokens(token_ids, end_of_text_id)  # (B, T)
    if is_padding is not None:
        segment_ids = segment_ids.masked_fill(is_padding, PADDING_SEGMENT_ID)  # (B, T)
    return {"positions": positions_in_segments(segment_ids), "segment_ids": segment_ids}

# --- 6. The cache for decoding ---
class KVCache:
    """Keys and values of the tokens already read, so that the next token costs one token's work instead of all: under
    the causal mask nothing that a token computed changes later, and of it later tokens need only its keys and values.
    A call of the model with `cache` appends its T tokens to the `length` slots in use, the same number in every row.
    Shorter prompts have places of segment PADDING_SEGMENT_ID in front, where nobody looks and positions do not count,
    so that every row is what it would be alone. Length 0 forgets all. No gradient passes through what is cached."""
    def __init__(self, config: ModelConfig, batch_size: int, *, device=None, dtype: torch.dtype | None = None) -> None:
        size = (config.num_layers, batch_size, config.num_kv_heads, config.context_length, config.head_dim)
        self.keys = torch.empty(size, device=device, dtype=dtype)  # (num_layers, B, G, context_length, D)
        self.values = torch.empty_like(self.keys)  # (num_layers, B, G, context_length, D)
        self.positions = torch.zeros(batch_size, config.context_length, dtype=torch.long, device=device)
        self.segment_ids = torch.zeros_like(self.positions)  # (B, context_length)
        self.length, self.is_plain = 0, True

    def bytes_per_token(self) -> int:
        """Bytes that one more token of one row occupies, over all layers."""
        return 2 * self.keys[:, 0, :, 0].numel() * self.keys.element_size()

    def reserve(self, num_rows: int, num_tokens: int, positions: Tensor | None, segment_ids: Tensor | None) -> None:
        """Note position and segment of `num_tokens` more tokens; what is not given continues the row, as segment 0."""
        batch_size, capacity = self.positions.shape
        if num_rows != batch_size or self.length + num_tokens > capacity:
            raise ValueError(f"the cache, made for {batch_size} rows of {capacity} tokens, holds {self.length}: it "
                             f"cannot take {num_rows} rows of {num_tokens} more; make another, or set length to 0")
        new = slice(self.length, self.length + num_tokens)
        # Plain is one document without padding: the last token sees all others.
        self.is_plain = (self.is_plain or self.length == 0) and positions is None and segment_ids is None
        self.segment_ids[:, new] = 0 if segment_ids is None else segment_ids  # (B, T)
        if positions is None:  # padding in front keeps the position -1, where nobody looks, so that a text starts at 0
            last = self.positions[:, self.length - 1 : self.length] if self.length else -1  # (B, 1)
            positions = last + (self.segment_ids[:, new] != PADDING_SEGMENT_ID).cumsum(dim=1)  # (B, T)
        self.positions[:, new] = positions  # (B, T)
        self.length += num_tokens

    def attend(self, layer: int, attention: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention` over all tokens so far, after k and v (B, G, T, D) went into this layer's last reserved slots."""
        keys, values = (x[layer, :, :, : self.length] for x in (self.keys, self.values))  # (B, G, S, D)
        keys[:, :, -k.shape[2] :], values[:, :, -k.shape[2] :] = k.detach(), v.detach()
        return attention(q, keys, values)  # (B, H, T, D)

# --- 7. Self-attention, block, language model ---
class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention: num_heads attentions side by side, each on its own d_model / num_heads projections of x.
    With fewer key/value heads (grouped queries, Ainslie et al. 2023) H/G query heads share one: a smaller cache."""
    def __init__(self, d_model: int, num_heads: int, *, num_kv_heads: int | None = None, rope: RotaryPositionalEmbedding
                 | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
        self.q_proj = Linear(d_model, d_model)
        self.k_proj, self.v_proj = (Linear(d_model, self.head_dim * (num_kv_heads or num_heads)) for _ in range(2))
        self.output_proj = Linear(d_model, d_model)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.rope = rope

    def forward(self, x: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """x (B, T, C), positions (T,) or (B, T), by default 0 .. T-1; `attend` by default the causal definition."""
        positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions  # (T,) or (B, T)
        attend = make_attention("naive", positions) if attend is None else attend
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, G, T, D)
        if self.rope is not None:
            by_head = positions.unsqueeze(-2)  # (1, T) or (B, 1, T): the same positions for every head
            q, k = self.rope(q, by_head), self.rope(k, by_head)
        return self.output_proj(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)

class TransformerBlock(nn.Module):
    """Two branches that read the residual stream and add to it: attention across places, then ffn at each place."""
    def __init__(self, config: ModelConfig, rope: RotaryPositionalEmbedding | None = None, layer: int = 0) -> None:
        super().__init__()
        c, f, h, g = config.d_model, config.d_ff, config.num_heads, config.num_kv_heads
        self.attn = MultiHeadSelfAttention(c, h, num_kv_heads=g, rope=rope, qk_norm=config.qk_norm)
        dense = SwiGLU if config.ffn == "swiglu" else partial(FeedForward, activation=config.ffn)
        self.ffn = MixtureOfExperts(config) if layer in config.moe_layers else dense(c, f)
        self.ln1, self.ln2 = (RMSNorm(c) if config.norm != "none" else nn.Identity() for _ in range(2))
        self.dropout, self.post_norm = nn.Dropout(config.dropout), config.norm == "post"

    def forward(self, x: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        if self.post_norm:  # the order of 2017: every sum is normalized, so the gradient passes through every norm
            x = self.ln1(x + self.dropout(self.attn(x, positions, attend)))  # (B, T, C)
            return self.ln2(x + self.dropout(self.ffn(x)))  # (B, T, C)
        # Norms inside the branches leave the stream a plain sum, through which gradients reach every layer unchanged.
        x = x + self.dropout(self.attn(self.ln1(x), positions, attend))  # (B, T, C)
        return x + self.dropout(self.ffn(self.ln2(x)))  # (B, T, C)

class TransformerLM(nn.Module):
    """Token ids (B, T) to logits (B, T, V), where logits[:, t] score the token at t + 1. `attention` replaces the
    local one, as ddp.py's: it is called as attention(q, k, v, positions=..., segment_ids=...), k and v in G heads."""
    def __init__(self, config: ModelConfig, attention: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        sizes = (config.rope_theta, config.head_dim, config.context_length)
        rope = RotaryPositionalEmbedding(*sizes) if config.pos == "rope" else None  # one table serves all layers
        self.token_embeddings = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(TransformerBlock(config, rope, layer) for layer in range(config.num_layers))
        self.moe = {layer: self.layers[layer].ffn for layer in config.moe_layers}
        self.ln_final = RMSNorm(config.d_model) if config.norm == "pre" else nn.Identity()  # post: a block ends in one
        # lm_head reads about unit variance. Weights of std 1 / (4 sqrt(C)) give logits of variance 1/16, a first loss
        # of about ln V + 1/32: at any size (unlike Glorot's) the model starts by knowing nothing.
        std = 1 / (4 * math.sqrt(config.d_model))
        if config.tie_embeddings:
            # subtle: embeddings of std 1 would let every token predict itself, with a logit near C and a first loss in
            # the hundreds. That logit is at most C * std: up to ln(V) / 2 it is harmless.
            std = min(std, math.log(1 + config.vocab_size) / (2 * config.d_model))
        self.lm_head = Linear(config.d_model, config.vocab_size, std=std)
        if config.tie_embeddings:
            self.token_embeddings.weight = self.lm_head.weight
            self.embedding_scale = 1 / std  # to unit variance on the way in ("Attention Is All You Need", 3.4)
        # 2 num_layers branches add to the stream: scaled so, their variances add up to one's, at any depth (GPT-2).
        with torch.no_grad():
            for name, parameter in self.layers.named_parameters():
                if "output_proj" in name or ".w2" in name:
                    parameter /= math.sqrt(2 * config.num_layers)

    def forward_hidden(self, token_ids: Tensor, *, positions: Tensor | None = None, segment_ids: Tensor | None = None,
                       cache: KVCache | None = None) -> Tensor:
        """What lm_head reads, (B, T, C): a loss may then make the logits, V / C times larger, a piece at a time.
        positions (T,) or (B, T), all below context_length: place of each token in its text, by default 0 .. T-1, or
        what follows in the cache. segment_ids (T,) or (B, T): a token sees its own segment only, padding nothing."""
        num_rows, num_tokens = token_ids.shape
        if num_tokens > self.config.context_length:
            raise ValueError(f"{num_tokens} tokens do not fit into the context length {self.config.context_length}")
        is_causal, keys = positions is None and segment_ids is None, (None, None)
        assert cache is None or self.attention is None, "a cache goes with the local attention only, got another one"
        if cache is not None:
            cache.reserve(num_rows, num_tokens, positions, segment_ids)
            is_causal = cache.is_plain and num_tokens in (1, cache.length)  # no mask: 5 % of a decoded token
            keys = (cache.positions[:, : cache.length], cache.segment_ids[:, : cache.length])  # (B, S) each
            positions, segment_ids = (x[:, -num_tokens:] for x in keys)  # (B, T) each
        elif positions is None:
            positions = torch.arange(num_tokens, device=token_ids.device)  # (T,)
        attend = (partial(self.attention, positions=positions, segment_ids=segment_ids) if self.attention else
                  make_attention(self.config.attention, positions, segment_ids, *keys, is_causal=is_causal))
        x = self.token_embeddings(token_ids)  # (B, T, C)
        if self.config.tie_embeddings:
            x = x * self.embedding_scale  # (B, T, C)
        for moe in self.moe.values():
            moe.balance_loss = None
        for layer, block in enumerate(self.layers):
            arguments = (x, positions, attend if cache is None else partial(cache.attend, layer, attend))
            again = self.config.checkpoint_activations and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)  # (B, T, C)
        return self.ln_final(x)  # (B, T, C)

    def forward(self, token_ids: Tensor, *, head: Callable[[Tensor, Tensor], Tensor] | None = None, **places) -> Tensor:
        """Logits (B, T, V), or what `head` makes of forward_hidden's result (B, T, C) and lm_head's weight (V, C)."""
        x = self.forward_hidden(token_ids, **places)  # (B, T, C)
        return self.lm_head(x) if head is None else head(x, self.lm_head.weight)

    def auxiliary_loss(self) -> Tensor | float:
        """What balancing adds to the loss of the last forward pass; 0 without experts, or without that balance."""
        experts = self.moe.values() if self.config.balance == "loss" else ()
        return self.config.balance_rate * sum(moe.balance_loss for moe in experts)

    @torch.no_grad()
    def update_router_biases(self, total: Callable = lambda counts: counts) -> None:
        """After a step: experts with fewer tokens than the mean become easier to choose. total: sums over processes."""
        for moe in self.moe.values() if self.config.balance == "bias" else ():
            load = total(moe.step_counts)[:-1]  # (E,)
            moe.bias += self.config.balance_rate * torch.sign(load.mean() - load)
            moe.counts, moe.step_counts = moe.counts + moe.step_counts, 0.0

    def router_statistics(self, total: Callable = lambda counts: counts) -> list[dict]:
        """Per layer with experts, over the tokens since the last call: the experts' shares of the choices; a token's
        uncertainty, from 0 to 1 (entropy of p over log E); how far the fullest expert is above the mean (0: not)."""
        rows = []
        for layer, moe in self.moe.items():
            if isinstance(counts := moe.counts + moe.step_counts, Tensor):  # there were tokens
                *load, entropy = total(counts).tolist()
                rows.append({"layer": layer, "load": [number / sum(load) for number in load],
                             "entropy": entropy * moe.k / sum(load) / math.log(moe.num_experts),
                             "violation": max(load) * moe.num_experts / sum(load) - 1})
                moe.counts = moe.step_counts = 0.0
        return rows

# --- 8. What it costs: parameters, FLOPs, memory ---
def count_parameters(config: ModelConfig, active: bool = False) -> dict[str, int]:
    """Number of parameters by part; the sum of the values is the model's. active: of those that one token passes."""
    c, kv_width, num_moe = config.d_model, config.num_kv_heads * config.head_dim, len(config.moe_layers)
    experts = config.shared_experts + (config.experts_per_token if active else config.num_experts)
    networks = config.num_layers - num_moe + num_moe * experts
    norms_of_width_c = {"pre": 2 * config.num_layers + 1, "post": 2 * config.num_layers, "none": 0}[config.norm]
    return {
        "embeddings": config.vocab_size * c,
        "attention": config.num_layers * (2 * c * c + 2 * c * kv_width),  # q and output, k and v
        "ffn": networks * (3 if config.ffn == "swiglu" else 2) * c * config.d_ff + num_moe * config.num_experts * c,
        "norms": norms_of_width_c * c + config.num_layers * 2 * config.head_dim * config.qk_norm,
        "head": 0 if config.tie_embeddings else config.vocab_size * c,
    }

def flops_per_token(config: ModelConfig, context_length: int | None = None) -> dict[str, int]:
    """FLOPs of the forward pass by part, per token of a sequence of `context_length`; training costs 3 times as much.
    A product of (m, n) and (n, p) takes m n p multiplications and as many additions; the backward pass makes two more
    for the gradients of its factors, hence 3. All else is left out; scores that the mask hides count as computed."""
    context_length, parameters = context_length or config.context_length, count_parameters(config, active=True)
    return {
        "projections": 2 * parameters["attention"],  # each weight is used once per token
        "attention": config.num_layers * 2 * 2 * context_length * config.d_model,  # q k^T, and weights times v
        "ffn": 2 * parameters["ffn"],
        "head": 2 * config.vocab_size * config.d_model,
    }

def training_memory(config: ModelConfig, batch_size: int, context_length: int | None = None, chunk: int = 512) -> dict:
    """Bytes of a float32 training step by part, for `batch_size` sequences on one device. Activations are what autograd
    keeps for the backward pass. The loss, train.linear_cross_entropy, keeps gradients of hidden states and lm_head, and
    logits of one `chunk` of tokens (on a GPU 4,096). Left out: dropout's masks, temporary buffers, autocast."""
    context_length, layers = context_length or config.context_length, config.num_layers
    c, f, kv_width = config.d_model, config.d_ff, config.num_kv_heads * config.head_dim
    tokens, parameters = batch_size * context_length, sum(count_parameters(config).values())
    norm = 3 * c + 1  # numbers per token that a norm keeps: its input, that over its rms, its result, and 1 / rms
    # Attention: q, k, v, its result (the factor of output_proj), the softmax's denominators or their logarithms.
    attention = 2 * c + 2 * kv_width + config.num_heads
    if config.attention == "naive":  # and the exponentials and the weights of H heads, and k and v repeated
        attention += 2 * context_length * config.num_heads + 2 * (c - kv_width)
    if config.qk_norm:  # q and k before and after the division by their rms
        attention += 2 * (c + kv_width) + config.num_heads + config.num_kv_heads
    # swiglu: w1 x, its sigmoid, silu, w3 x, the product; silu: the first 3; relu: its result; relu2: and its square.
    ffn = {"swiglu": 5, "silu": 3, "relu": 1, "relu2": 2}[config.ffn] * f
    # K experts: their rows before and after; gates, their sum, p; choices, order and its inverse in int64.
    k, num_moe = config.experts_per_token, len(config.moe_layers)
    moe = (k + config.shared_experts) * ffn + 2 * k * c + 2 * k + 1 + config.num_experts + 6 * k
    # post: after the embeddings, which the first block reads without a norm. none: every sum is read as it is.
    stream = {"pre": (2 * layers + 1) * norm, "post": c + 2 * layers * norm, "none": (2 * layers + 1) * c}[config.norm]
    activations = layers * attention + (layers - num_moe) * ffn + num_moe * moe + stream
    if config.checkpoint_activations:  # the inputs of all blocks, and one block at a time in full
        activations = layers * c + attention + (moe if num_moe else ffn) + stream * 3 / (2 * layers + 1)
    return {
        "parameters": 4 * parameters, "gradients": 4 * parameters, "AdamW moments": 8 * parameters,
        "activations": round(4 * tokens * activations),
        "loss": 4 * (tokens * c + config.vocab_size * c + min(chunk, tokens) * config.vocab_size),
    }

# --- 9. Command line ---
def main(argv: list[str] | None = None) -> None:
    """Print three accounts, one table each: a line for each preset in millions, or for one exactly."""
    parser = argparse.ArgumentParser("model.py", usage=argparse.SUPPRESS, description="What each preset costs.")
    parser.add_argument("--preset", choices=PRESETS, help="show one in detail")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of the training step (default: 8)")
    parser.add_argument("--context_length", type=int, help="tokens of a sequence (default: the preset's)")
    args = parser.parse_args(argv)
    batch_size, length = args.batch_size, args.context_length
    if batch_size < 1 or length is not None and length < 1:
        parser.error("--batch_size and --context_length must be at least 1")
    names, unit, digits = ([args.preset], 1, 0) if args.preset else (list(PRESETS), 1e6, 2)
    accounts = {
        "Parameters": count_parameters,
        "FLOPs per token of the forward pass (training: 3 times as many)": lambda c: flops_per_token(c, length),
        f"Bytes of a float32 training step on {batch_size} sequences": lambda c: training_memory(c, batch_size, length),
    }
    for title, account in accounts.items():
        tables = {name: account(ModelConfig(**PRESETS[name])) for name in names}
        print(f"\n{title}\n{'' if args.preset else 'in millions':11}", end="")
        print("".join(f"{part:>16}" for part in (*tables[names[0]], "total")))
        for name, parts in tables.items():
            print(f"{name:11}" + "".join(f"{n / unit:16,.{digits}f}" for n in (*parts.values(), sum(parts.values()))))

if __name__ == "__main__":
    main()
