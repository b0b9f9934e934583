"""Attention without the T x T matrix, from the definition to Triton kernels.

Attention is out = softmax(scale * q k^T) v, row by row, over the keys that a mask leaves visible. Written down like
that it needs a (T, S) matrix of scores per head: 32 GiB for one head at 131,072 tokens in 16 bits. FlashAttention
(Dao 2023, arXiv 2307.08691) walks over the keys in tiles and keeps, per query, only three running things:

    m = max of the scores so far     total = sum of exp(score - m)     acc = sum of exp(score - m) * value

A new tile raises m to m', and both sums are multiplied by exp(m - m') before the tile is added. At the end
out = acc / total, and the log-sum-exp L = m + log(total) is all that the backward pass needs to rebuild any
probability as exp(score - L). Two more ideas make it fast on packed documents: tiles that nobody may see are never
touched, and tiles that everybody may see are computed without a mask.

  1. The rule: who sees whom
  2. The same, tile by tile
  3. One function for all of them
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING_SEGMENT_ID = -1


# --- 1. The rule: who sees whom ---


def visible(
    q_positions: Tensor, k_positions: Tensor, q_ids: Tensor | None = None, k_ids: Tensor | None = None, *,
    causal: bool = True, window: int | None = None,
) -> Tensor:
    """The only mask rule of this file: (..., T) and (..., S) to a bool (..., T, S), True where the query sees the key.

    A query sees a key of its own segment (ids are compared as they are, -1 is padding and sees nothing), at its own
    position or before it if `causal`, and fewer than `window` positions back, itself included.

    >>> visible(torch.arange(3), torch.arange(3), torch.tensor([7, 7, 2]), torch.tensor([7, 7, 2])).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    distance = q_positions[..., :, None] - k_positions[..., None, :]  # (..., T, S)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        mask = mask & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window)
    if q_ids is not None:
        same_segment = q_ids[..., :, None] == k_ids[..., None, :]
        mask = mask & same_segment & (q_ids != PADDING_SEGMENT_ID)[..., :, None]
    return mask


class MaskRule(NamedTuple):
    """The arguments of `visible` for a whole batch, checked; None means 0..T-1 for positions, one document for ids."""

    causal: bool
    window: int | None
    q_positions: Tensor | None  # (B, T) int32
    k_positions: Tensor | None  # (B, S) int32
    q_ids: Tensor | None  # (B, T) int32
    k_ids: Tensor | None  # (B, S) int32

    def part(self, q_slice: slice, k_slice: slice, q_len: int, k_len: int, device: torch.device) -> Tensor:
        """The mask of some queries and some keys: bool (B or 1, T, S)."""
        q_positions, k_positions = self.q_positions, self.k_positions
        if q_positions is None:
            q_positions = torch.arange(q_len, device=device, dtype=torch.int32)[None]  # (1, T)
            k_positions = torch.arange(k_len, device=device, dtype=torch.int32)[None]  # (1, S)
        q_ids = None if self.q_ids is None else self.q_ids[:, q_slice]
        k_ids = None if self.k_ids is None else self.k_ids[:, k_slice]
        return visible(q_positions[:, q_slice], k_positions[:, k_slice], q_ids, k_ids, causal=self.causal,
                       window=self.window)


def mask_rule(
    q: Tensor, k: Tensor, *, causal: bool = True, segment_ids: Tensor | None = None,
    kv_segment_ids: Tensor | None = None, positions: Tensor | None = None, kv_positions: Tensor | None = None,
    window: int | None = None,
) -> MaskRule:
    """Check and complete the mask arguments of `flash_attention` for q (B, H, T, D) and k (B, G, S, D)."""
    (B, T), S = (q.shape[0], q.shape[2]), k.shape[2]

    def rows(name: str, tensor: Tensor | None, length: int) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
            raise ValueError(f"{name} must be integers, not {tensor.dtype}.")
        if tensor.shape not in ((length,), (1, length), (B, length)):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but ({B}, {length}) or ({length},) is needed.")
        return tensor.to(q.device, torch.int32).expand(B, length).contiguous()

    if window is not None and window < 1:
        raise ValueError(f"window is {window}, but must be at least 1: a query always counts itself.")
    if (segment_ids is None) != (kv_segment_ids is None):
        if segment_ids is None or T != S:
            raise ValueError(f"segment_ids and kv_segment_ids are both needed where {T} queries meet {S} keys.")
        kv_segment_ids = segment_ids
    # subtle: with as many keys as queries, keys take the positions of the queries (self-attention on documents whose
    # positions restart); with a cache or a part of the sequence, what is not given counts from 0.
    if kv_positions is None and positions is not None and T == S:
        kv_positions = positions
    if not causal and window is None:
        positions = kv_positions = None  # nothing asks for them
    elif positions is not None or kv_positions is not None:
        positions = torch.arange(T, device=q.device) if positions is None else positions
        kv_positions = torch.arange(S, device=q.device) if kv_positions is None else kv_positions
    return MaskRule(causal, window, rows("positions", positions, T), rows("kv_positions", kv_positions, S),
                    rows("segment_ids", segment_ids, T), rows("kv_segment_ids", kv_segment_ids, S))


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dtype: torch.dtype = torch.float32, **mask_args,
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in float32 or float64: out (B, H, T, Dv) and log-sum-exp L (B, H, T).

    A query that sees no key (padding, or nothing inside its window) has output 0, gradient 0 and L = -inf.
    """
    group = check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # (B, H, S, D), (B, H, S, Dv)
    T, S = q.shape[2], k.shape[2]
    mask = mask_rule(q, k, **mask_args).part(slice(None), slice(None), T, S, q.device)[:, None]  # (B, 1, T, S)
    blind = ~mask.any(-1, keepdim=True)  # (B, 1, T, 1)
    # subtle: softmax over nothing is 0/0 and its gradient NaN, so blind rows see everything first and are zeroed after.
    scores = (scale * q @ k.mT).masked_fill(~(mask | blind), -torch.inf)  # (B, H, T, S)
    out = (scores.softmax(-1) @ v).masked_fill(blind, 0)  # (B, H, T, Dv)
    return out, scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The number of query heads that share one key head, or ValueError where q, k and v do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v must be (batch, heads, length, head_dim), but are {shapes}.")
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1:3] != v.shape[1:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"batch, key heads, key length and head_dim must agree, but the shapes are {shapes}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly ({shapes}); "
                         "heads come before length: transpose(1, 2) what is (batch, length, heads, head_dim).")
    if 0 in q.shape + k.shape + v.shape:
        raise ValueError(f"every dimension must be at least 1, but the shapes are {shapes}.")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must have one floating dtype, but have {q.dtype}, {k.dtype}, {v.dtype}.")
    return q.shape[1] // k.shape[1]


def segment_ids_from_tokens(tokens: Tensor, end_of_text_id: int) -> Tensor:
    """Number the documents of (..., T) tokens from 0, as int32; an end-of-text token belongs to the document it ends.

    Number the whole sequence once, before any slicing: numbers counted inside a slice start again at 0 and would mix
    documents that only share a number.

    >>> segment_ids_from_tokens(torch.tensor([5, 6, 0, 7, 0, 8]), 0).tolist()
    [0, 0, 0, 1, 1, 2]
    """
    ends = (tokens == end_of_text_id).to(torch.int32)
    return (ends.cumsum(-1) - ends).to(torch.int32)


def positions_in_segments(segment_ids: Tensor) -> Tensor:
    """Positions that restart at 0 in each run of equal ids of (..., T), as int64: what rotary embeddings are given.

    >>> positions_in_segments(torch.tensor([0, 0, 0, 1, 1, 2])).tolist()
    [0, 1, 2, 0, 1, 0]
    """
    index = torch.arange(segment_ids.shape[-1], device=segment_ids.device).expand(segment_ids.shape)  # (..., T)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    return index - torch.where(starts, index, 0).cummax(-1).values


# --- 2. The same, tile by tile ---


def tiles_forward(
    q: Tensor, k: Tensor, v: Tensor, rule: MaskRule, scale: float, q_tile: int = 128, k_tile: int = 128,
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2, Algorithm 1, in plain PyTorch: out (B, H, T, Dv) and L (B, H, T), never a (T, S) matrix.

    It saves the memory, not the time: the tiles are the point, and the Triton kernels below do the same steps.
    """
    (B, H, T, _), (G, S) = q.shape, k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, L = empty_heads(v, H, T), q.new_empty(B, H, T, dtype=dtype)
    q, k, v = q.unflatten(1, (G, H // G)), k[:, :, None], v[:, :, None]  # (B, G, H/G, T, D), (B, G, 1, S, D or Dv)
    for q_start in range(0, T, q_tile):
        rows = slice(q_start, q_start + q_tile)
        q_part = q[..., rows, :].to(dtype)  # (B, G, H/G, t, D)
        m = torch.full_like(q_part[..., 0], -torch.inf)  # (B, G, H/G, t)
        total, acc = torch.zeros_like(m), q_part.new_zeros(*m.shape, v.shape[-1])
        for k_start in range(0, S, k_tile):
            columns = slice(k_start, k_start + k_tile)
            mask = rule.part(rows, columns, T, S, q.device)[:, None, None]  # (B, 1, 1, t, s)
            if not mask.any():
                continue
            scores = scale * q_part @ k[..., columns, :].to(dtype).mT  # (B, G, H/G, t, s)
            scores = scores.masked_fill(~mask, -torch.inf)
            m_new = torch.maximum(m, scores.amax(-1))
            # subtle: a row that has seen nothing yet has m = -inf, and -inf - (-inf) is NaN; subtract 0 there.
            m_finite = m_new.masked_fill(m_new == -torch.inf, 0)
            p, decay = torch.exp(scores - m_finite[..., None]), torch.exp(m - m_finite)
            total = total * decay + p.sum(-1)
            acc = acc * decay[..., None] + p @ v[..., columns, :].to(dtype)  # (B, G, H/G, t, Dv)
            m = m_new
        total = total.masked_fill(total == 0, 1)  # blind rows: out = 0 / 1, L = -inf + log 1
        out[:, :, rows] = (acc / total[..., None]).flatten(1, 2).to(out.dtype)
        L[:, :, rows] = (m + total.log()).flatten(1, 2)
    return out, L


def tiles_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, L: Tensor, grad_out: Tensor, rule: MaskRule, scale: float,
    q_tile: int = 128, k_tile: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV by recomputation (FlashAttention-2, Algorithm 2): every tile of probabilities is rebuilt from L.

    With p = exp(score - L) and out = p v:   dv = p^T dout,   dp = dout v^T,   dscore = p * (dp - delta),
    where delta = sum_s p dp = rowsum(out * dout), the part of softmax's gradient that makes its rows sum to 0.
    """
    (_, H, T, _), (G, S) = q.shape, k.shape[1:3]
    heads, inputs = (G, H // G), (q, k, v)
    q, out, L, grad_out = (x.unflatten(1, heads).to(L.dtype) for x in (q, out, L, grad_out))  # (B, G, H/G, T, ...)
    k, v = k[:, :, None].to(L.dtype), v[:, :, None].to(L.dtype)  # (B, G, 1, S, D), (B, G, 1, S, Dv)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (out * grad_out).sum(-1)  # (B, G, H/G, T)
    L = L.masked_fill(L == -torch.inf, 0)  # blind rows: every score is -inf below, so p = exp(-inf - 0) = 0
    for k_start in range(0, S, k_tile):
        columns = slice(k_start, k_start + k_tile)
        for q_start in range(0, T, q_tile):
            rows = slice(q_start, q_start + q_tile)
            mask = rule.part(rows, columns, T, S, q.device)[:, None, None]  # (B, 1, 1, t, s)
            if not mask.any():
                continue
            q_part, k_part, v_part, grad_part = q[..., rows, :], k[..., columns, :], v[..., columns, :], \
                grad_out[..., rows, :]
            scores = (scale * q_part @ k_part.mT).masked_fill(~mask, -torch.inf)  # (B, G, H/G, t, s)
            p = torch.exp(scores - L[..., rows, None])
            dscores = p * (grad_part @ v_part.mT - delta[..., rows, None])  # (B, G, H/G, t, s)
            dq[..., rows, :] += scale * dscores @ k_part
            dk[..., columns, :] += scale * (dscores.mT @ q_part).sum(2, keepdim=True)  # heads that share a key add up
            dv[..., columns, :] += (p.mT @ grad_part).sum(2, keepdim=True)
    grads = dq.flatten(1, 2), dk[:, :, 0], dv[:, :, 0]
    return tuple(empty_heads(x, x.shape[1], x.shape[2]).copy_(grad) for x, grad in zip(inputs, grads))


def empty_heads(like: Tensor, heads: int, length: int, head_dim: int | None = None) -> Tensor:
    """An empty (B, heads, length, head_dim) stored as (B, length, heads, head_dim), so that joining heads is free."""
    shape = like.shape[0], length, heads, like.shape[-1] if head_dim is None else head_dim
    return like.new_empty(shape).transpose(1, 2)  # (B, H, T, D)


# --- 3. One function for all of them ---

# As two custom operators, forward and backward are opaque calls to torch.compile and to activation checkpointing: all
# these need to know is the shape of the result (the `fake` functions) and which operator is the derivative of which.
OPTIONS = "bool causal, int? window, float scale, int[] tiles, str backend"
MASK = "Tensor? q_positions, Tensor? k_positions, Tensor? q_ids, Tensor? k_ids"


@torch.library.custom_op("flash::forward", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {OPTIONS}, {MASK})"
                         " -> (Tensor, Tensor)")
def forward_op(q, k, v, causal, window, scale, tiles, backend, *mask):
    return tiles_forward(q, k, v, MaskRule(causal, window, *mask), scale, *tiles)


@forward_op.register_fake
def forward_fake(q, k, v, *_):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_heads(v, q.shape[1], q.shape[2]), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("flash::backward", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor out, "
                         f"Tensor L, Tensor grad_out, {OPTIONS}, {MASK}) -> (Tensor, Tensor, Tensor)")
def backward_op(q, k, v, out, L, grad_out, causal, window, scale, tiles, backend, *mask):
    return tiles_backward(q, k, v, out, L, grad_out, MaskRule(causal, window, *mask), scale, *tiles)


@backward_op.register_fake
def backward_fake(q, k, v, *_):
    return tuple(empty_heads(x, x.shape[1], x.shape[2]) for x in (q, k, v))


def save_for_gradients(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.options, mask = inputs[3:8], inputs[8:]
    ctx.save_for_backward(*inputs[:3], *output, *mask)


def gradients(ctx, grad_out: Tensor, grad_L: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, L, *mask = ctx.saved_tensors
    grads = backward_op(q, k, v, out, L, grad_out, *ctx.options, *mask)
    return *grads, *[None] * (len(ctx.options) + len(mask))


forward_op.register_autograd(gradients, setup_context=save_for_gradients)


class FlashAttentionPyTorch(torch.autograd.Function):
    """.apply(q, k, v, is_causal=False) on (..., T, D), by tiles; saves q, k, v, out and L, its only (..., T) tensor."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        return forward_and_save(ctx, q, k, v, is_causal, "tiles")

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, L = ctx.saved_tensors
        q_, k_, v_, out_, grad_out_ = (as_heads(x) for x in (q, k, v, out, grad_out))
        grads = backward_op(q_, k_, v_, out_, L.reshape(q_.shape[:3]), grad_out_, *ctx.options)
        return *(grad.reshape(x.shape) for grad, x in zip(grads, (q, k, v))), None


def forward_and_save(ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, backend: str) -> Tensor:
    q_, k_, v_ = as_heads(q), as_heads(k), as_heads(v)
    check_shapes(q_, k_, v_)
    ctx.options = is_causal, None, q.shape[-1] ** -0.5, [128, 128], backend, None, None, None, None
    out, L = forward_op(q_, k_, v_, *ctx.options)
    out = out.reshape(*q.shape[:-1], v.shape[-1])  # (..., T, Dv)
    ctx.save_for_backward(q, k, v, out, L.reshape(q.shape[:-1]))
    return out


def as_heads(x: Tensor) -> Tensor:
    """(..., T, D) to (B, 1, T, D)."""
    return x.reshape(-1, 1, *x.shape[-2:])


DENSE_MASK_LIMIT = 2**30  # elements, a byte each: above this, "auto" prefers tiles to a dense mask


def choose_backend(device: torch.device | str, mask_elements: int = 0) -> tuple[str, str]:
    """What backend="auto" means: the backend's name and the reason, one line each.

    mask_elements is B * T * S where segment ids, positions or a window are given, and 0 where causal is all.
    """
    if mask_elements == 0:
        return "sdpa", "PyTorch's scaled_dot_product_attention has its own kernels for plain and causal attention"
    if mask_elements <= DENSE_MASK_LIMIT:
        return "sdpa", f"PyTorch's scaled_dot_product_attention with a dense mask of {mask_elements:,} bytes"
    return "tiles", f"a dense mask would take {mask_elements:,} bytes, so the tiles of plain PyTorch are used"


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, rule: MaskRule, scale: float) -> Tensor:
    """The same by PyTorch's own kernels; anything but plain causal costs a dense (B, T, S) mask."""
    gqa = q.shape[1] != k.shape[1]
    if rule.window is None and rule.q_positions is None and rule.q_ids is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=rule.causal, scale=scale, enable_gqa=gqa)
    mask = rule.part(slice(None), slice(None), q.shape[2], k.shape[2], q.device)[:, None]  # (B, 1, T, S)
    blind = ~mask.any(-1, keepdim=True)  # (B, 1, T, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, scale=scale, enable_gqa=gqa)
    return out.masked_fill(blind, 0)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, segment_ids: Tensor | None = None,
    kv_segment_ids: Tensor | None = None, positions: Tensor | None = None, kv_positions: Tensor | None = None,
    window: int | None = None, scale: float | None = None, backend: str = "auto",
) -> Tensor:
    """Attention of q (B, H, T, D) on k (B, G, S, D) and v (B, G, S, Dv): (B, H, T, Dv), by the rule of `visible`.

    G divides H: query heads h * H/G to (h + 1) * H/G - 1 share key head h. Integer tensors are (B, T) or (T,) for
    queries and (B, S) or (S,) for keys. Without positions, queries and keys both count from 0; a decoding step passes
    the position of its query. What is given for queries alone holds for the keys too where T == S. Segment ids fit in
    32 bits; padding (-1), and whatever sees no key, gives zeros and receives zero gradient. scale is 1 / sqrt(D) where
    not given. backend: auto (see `choose_backend`), tiles, sdpa or reference.
    """
    if torch.is_autocast_enabled(q.device.type):  # rotary embeddings leave q and k in float32 beside a 16-bit v
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale is {scale}, but must be above 0.")
    mask_args = dict(causal=causal, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, positions=positions,
                     kv_positions=kv_positions, window=window)
    rule = mask_rule(q, k, **mask_args)
    if backend == "auto":
        masked = rule.window is not None or rule.q_positions is not None or rule.q_ids is not None
        backend, _ = choose_backend(q.device, q.shape[0] * q.shape[2] * k.shape[2] if masked else 0)
    if backend == "reference":
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return reference_attention(q, k, v, scale=scale, dtype=dtype, **mask_args)[0].to(q.dtype)
    if backend == "sdpa":
        return sdpa_attention(q, k, v, rule, scale)
    if backend == "tiles":
        return forward_op(q, k, v, causal, window, scale, [128, 128], backend, *rule[2:])[0]
    raise ValueError(f"backend is {backend!r}, but must be one of auto, tiles, sdpa, reference.")
