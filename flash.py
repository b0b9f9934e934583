"""Attention without the T x T matrix, from the definition to Triton kernels.

Attention is out = softmax(scale * q k^T) v, row by row, over the keys that a mask leaves visible. Written like that it
needs a (T, S) matrix of scores: 32 GiB for one head at 131,072 tokens in 16 bits. FlashAttention (Dao 2023, arXiv
2307.08691) walks over the keys in tiles and keeps, per query, only three running things:

    m = max of the scores so far     total = sum of exp(score - m)     acc = sum of exp(score - m) * value

A new tile raises m to m', and both sums are multiplied by exp(m - m') before it is added. At the end out = acc / total,
and the log-sum-exp L = m + log(total) is all that the backward pass needs to rebuild any probability as exp(score - L).
Tiles that no query may see are never touched, and those that every query may see are computed without a mask.

  1. The rule: who sees whom         4. The kernels in Triton: forward     6. One function for all of them
  2. The same, tile by tile          5. The kernels in Triton: backward    7. Seeing it
  3. Which tiles can be skipped

    python flash.py                            # errors against float64, tiles skipped, bytes, on a packed batch
    python flash.py --show_attention_mask      # the tiles of that batch, in the terminal
    TRITON_INTERPRET=1 python flash.py --context_length 150      # the Triton kernels too, interpreted on a CPU (slow)
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # there are no wheels for macOS and Windows; all but sections 4 and 5 works without
    triton = None
jit = triton.jit if triton else lambda function: function  # without Triton nobody calls the kernels

PADDING_SEGMENT_ID = -1
DENSE_MASK_LIMIT = 2**30  # bytes, one for each query and key: above this, "auto" prefers tiles to a dense mask
LOG2_E = 1.4426950408889634  # exp(x) = 2^(x * log2(e)), see the kernels

# --- 1. The rule: who sees whom ---
def visible(q_positions: Tensor, k_positions: Tensor, q_ids: Tensor | None = None, k_ids: Tensor | None = None, *,
            causal: bool = True, window: int | None = None) -> Tensor:
    """The only mask rule of this file: (..., T) and (..., S) to a bool (..., T, S), True where the query sees the key.
    A query sees a key of its own segment (ids are compared as they are, -1 is padding and sees nothing), at its own
    position or before it if `causal`, and fewer than `window` positions back, itself included.
    >>> visible(torch.arange(3), torch.arange(3), torch.tensor([7, 7, 2]), torch.tensor([7, 7, 2])).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    distance = q_positions[..., :, None] - k_positions[..., None, :]  # (..., T, S)
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & (distance < window)
    if q_ids is not None:
        mask = mask & (q_ids[..., :, None] == k_ids[..., None, :]) & (q_ids != PADDING_SEGMENT_ID)[..., :, None]
    return mask

class MaskRule(NamedTuple):
    """The arguments of `visible` for a whole batch, checked; None means 0..T-1 for positions, one document for ids."""
    causal: bool = True
    window: int | None = None
    q_positions: Tensor | None = None  # (B, T) int32
    k_positions: Tensor | None = None  # (B, S) int32
    q_ids: Tensor | None = None  # (B, T) int32
    k_ids: Tensor | None = None  # (B, S) int32

    def mask(self, q: Tensor, k: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """The mask of some queries and some keys of q (..., T, D) and k (..., S, D): bool (B or 1, T, S)."""
        q_places, k_places = (torch.arange(x.shape[-2], device=x.device)[None] if positions is None else positions
                              for x, positions in ((q, self.q_positions), (k, self.k_positions)))  # (1 or B, T or S)
        ids = () if self.q_ids is None else (self.q_ids[:, rows], self.k_ids[:, columns])
        return visible(q_places[:, rows], k_places[:, columns], *ids, causal=self.causal, window=self.window)

def mask_rule(q: Tensor, k: Tensor, *, causal: bool = True, segment_ids: Tensor | None = None,
              kv_segment_ids: Tensor | None = None, positions: Tensor | None = None,
              kv_positions: Tensor | None = None, window: int | None = None) -> MaskRule:
    """Check and complete the mask arguments of `flash_attention` for q (B, H, T, D) and k (B, G, S, D)."""
    (B, T), S = (q.shape[0], q.shape[2]), k.shape[2]

    def rows(name: str, tensor: Tensor | None, length: int) -> Tensor | None:
        if tensor is None:
            return None
        if tensor.is_floating_point() or tensor.shape not in ((length,), (1, length), (B, length)):
            raise ValueError(f"{name} must be integers of shape ({B}, {length}) or ({length},), but has {tensor.dtype} "
                             f"of shape {tuple(tensor.shape)}.")
        return tensor.to(q.device, torch.int32).expand(B, length).contiguous()

    if window is not None and window < 1:
        raise ValueError(f"window is {window}, but must be at least 1: a query always counts itself.")
    # subtle: with as many keys as queries, keys take what is given for the queries (self-attention on documents whose
    # positions restart); with a cache or a part of the sequence, positions that are not given count from 0.
    if T == S:
        kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
        kv_positions = positions if kv_positions is None else kv_positions
    if (segment_ids is None) != (kv_segment_ids is None):
        raise ValueError(f"segment_ids and kv_segment_ids are both needed where {T} queries meet {S} keys.")
    if (positions is None) != (kv_positions is None):
        positions, kv_positions = (torch.arange(n) if x is None else x for x, n in ((positions, T), (kv_positions, S)))
    return MaskRule(causal, window, rows("positions", positions, T), rows("kv_positions", kv_positions, S),
                    rows("segment_ids", segment_ids, T), rows("kv_segment_ids", kv_segment_ids, S))

def reference_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
                        dtype: torch.dtype = torch.float32, **mask_args) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in float32 or float64: out (B, H, T, Dv) and log-sum-exp L (B, H, T).
    mask_args are those of `mask_rule`: causal, segment_ids, kv_segment_ids, positions, kv_positions, window.
    A query that sees no key (padding, or nothing inside its window) has output 0, gradient 0 and L = -inf."""
    group = check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    mask = mask_rule(q, k, **mask_args).mask(q, k)[:, None]  # (B, 1, T, S)
    blind = ~mask.any(-1, keepdim=True)  # (B, 1, T, 1)
    # subtle: softmax over nothing is 0/0 and its gradient NaN, so blind rows see everything first and are zeroed after.
    scores = (scale * q @ k.mT).masked_fill(~(mask | blind), -torch.inf)  # (B, H, T, S)
    out = (scores.softmax(-1) @ v).masked_fill(blind, 0)  # (B, H, T, Dv)
    return out, scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)

def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The number of query heads that share one key head, or ValueError where q, k and v do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or 0 in q.shape + k.shape + v.shape:
        raise ValueError(f"q, k and v must be (batch, heads, length, head_dim), each at least 1, but are {shapes}.")
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1:3] != v.shape[1:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"batch, key heads, key length and head_dim must agree, but the shapes are {shapes}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly ({shapes}); "
                         "heads come before length: transpose(1, 2) what is (batch, length, heads, head_dim).")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must have one floating dtype, but have {q.dtype}, {k.dtype}, {v.dtype}.")
    return q.shape[1] // k.shape[1]

def segment_ids_from_tokens(tokens: Tensor, end_of_text_id: int) -> Tensor:
    """Number the documents of (..., T) tokens from 0, as int32; an end-of-text token belongs to the document it ends.
    Number a whole sequence before any slicing: slices numbered apart would mix documents that only share a number.
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
    starts = F.pad(segment_ids[..., 1:] != segment_ids[..., :-1], (1, 0), value=True)  # (..., T)
    return index - torch.where(starts, index, 0).cummax(-1).values

# --- 2. The same, tile by tile ---
def empty_results(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Room for out (B, H, T, Dv), stored as (B, T, H, Dv) so that joining heads is free, and for L (B, H, T)."""
    (B, H, T, _), at_least_32_bits = q.shape, torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(B, T, H, v.shape[-1]).transpose(1, 2), q.new_empty(B, H, T, dtype=at_least_32_bits)

def empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Room for dQ, dK and dV of inputs that begin with q, k, v, stored in the same order as out."""
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in inputs[:3])

def visible_tiles(rule: MaskRule, q: Tensor, k: Tensor, q_tile: int, k_tile: int) -> Iterator[tuple]:
    """(slice of queries, slice of keys, their mask (B, 1, 1, t, s)) for every tile that holds a visible pair."""
    for rows in (slice(start, start + q_tile) for start in range(0, q.shape[-2], q_tile)):
        for columns in (slice(start, start + k_tile) for start in range(0, k.shape[-2], k_tile)):
            mask = rule.mask(q, k, rows, columns)[:, None, None]
            if mask.any():
                yield rows, columns, mask

def tiles_forward(q: Tensor, k: Tensor, v: Tensor, rule: MaskRule, scale: float, q_tile: int, k_tile: int
                  ) -> tuple[Tensor, Tensor]:
    """FlashAttention-2, Algorithm 1, in plain PyTorch: out (B, H, T, Dv) and L (B, H, T), never a (T, S) matrix.
    It saves memory, not time: that takes the kernels below, which do the same steps."""
    out, L = empty_results(q, k, v)
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]  # (B, G, H/G, T, D), (B, G, 1, S, D or Dv)
    m = torch.full_like(q[..., 0], -torch.inf, dtype=L.dtype)  # (B, G, H/G, T)
    total, acc = torch.zeros_like(m), m.new_zeros(*m.shape, v.shape[-1])  # the same, and (B, G, H/G, T, Dv)
    for rows, columns, mask in visible_tiles(rule, q, k, q_tile, k_tile):
        q_part, k_part, v_part = (x.to(L.dtype) for x in (q[..., rows, :], k[..., columns, :], v[..., columns, :]))
        scores = (scale * q_part @ k_part.mT).masked_fill(~mask, -torch.inf)  # (B, G, H/G, t, s)
        m_new = torch.maximum(m[..., rows], scores.amax(-1))  # (B, G, H/G, t)
        # subtle: a row that has seen nothing yet has m = -inf, and -inf - (-inf) is NaN; subtract 0 there.
        m_finite = m_new.masked_fill(m_new == -torch.inf, 0)
        p, decay = torch.exp(scores - m_finite[..., None]), torch.exp(m[..., rows] - m_finite)
        total[..., rows] = total[..., rows] * decay + p.sum(-1)
        acc[..., rows, :] = acc[..., rows, :] * decay[..., None] + p @ v_part  # (B, G, H/G, t, Dv)
        m[..., rows] = m_new
    total = total.masked_fill(total == 0, 1)  # blind rows: out = 0 / 1, L = -inf + log 1
    return out.copy_((acc / total[..., None]).flatten(1, 2)), L.copy_((m + total.log()).flatten(1, 2))

def tiles_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, L: Tensor, grad_out: Tensor, rule: MaskRule,
                   scale: float, q_tile: int, k_tile: int) -> tuple[Tensor, ...]:
    """dQ, dK, dV by recomputation (FlashAttention-2, Algorithm 2): every tile of probabilities is rebuilt from L.
    With p = exp(score - L) and out = p v:   dv = p^T dout,   dp = dout v^T,   dscore = p * (dp - delta),
    where delta = sum_s p dp = rowsum(out * dout), the part of softmax's gradient that makes its rows sum to 0."""
    grads = empty_gradients(q, k, v)
    q, out, L, grad_out = (x.unflatten(1, (k.shape[1], -1)).to(L.dtype) for x in (q, out, L, grad_out))  # (B, G, H/G..)
    k, v = k[:, :, None].to(L.dtype), v[:, :, None].to(L.dtype)  # (B, G, 1, S, D), (B, G, 1, S, Dv)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (out * grad_out).sum(-1)  # (B, G, H/G, T)
    for rows, columns, mask in visible_tiles(rule, q, k, q_tile, k_tile):
        q_part, grad_part = q[..., rows, :], grad_out[..., rows, :]  # (B, G, H/G, t, ...)
        k_part, v_part = k[..., columns, :], v[..., columns, :]  # (B, G, 1, s, ...)
        scores = scale * q_part @ k_part.mT  # (B, G, H/G, t, s)
        p = torch.exp(scores - L[..., rows, None]).masked_fill(~mask, 0)  # in a blind row, where L is -inf, it was inf
        dscores = p * (grad_part @ v_part.mT - delta[..., rows, None])  # (B, G, H/G, t, s)
        dq[..., rows, :] += scale * dscores @ k_part
        dk[..., columns, :] += scale * (dscores.mT @ q_part).sum(2, keepdim=True)  # heads that share a key add up
        dv[..., columns, :] += (p.mT @ grad_part).sum(2, keepdim=True)
    return tuple(room.copy_(x) for room, x in zip(grads, (dq.flatten(1, 2), dk[:, :, 0], dv[:, :, 0])))

# --- 3. Which tiles can be skipped ---
def tile_bounds(rule: MaskRule, q_len: int, k_len: int, q_tile: int, k_tile: int, *, by_key: bool = False,
                device: torch.device | str = "cpu") -> Tensor:
    """Where each row of tiles of the (T, S) matrix begins and ends: int32 (B or 1, tiles, 4), from tile extremes only.
    One row is a tile of queries that walks over tiles of keys, or with `by_key` one of keys over those of queries. It
    holds [low, full_low, full_high, high): tiles before low and from high on are seen by nobody and skipped, those from
    full_low to full_high - 1 are seen by everybody and need no mask, the others are computed with it.
    Only the smallest and largest position and id of every tile are compared, so a tile may be visited in vain (ids
    whose ranges overlap) but never missed: ids may have any value, come in any order and come back.
    >>> tile_bounds(MaskRule(causal=True), 6, 6, 2, 2).tolist()
    [[[0, 0, 0, 1], [0, 0, 1, 2], [0, 0, 2, 3]]]
    """
    def extremes(q_values: Tensor | None, k_values: Tensor | None) -> Iterator[Tensor]:
        for values, length, tile, dim in ((q_values, q_len, q_tile, 2), (k_values, k_len, k_tile, 1)):
            if values is None:
                values = torch.arange(length, device=device, dtype=torch.int32)[None]
            last = values[:, -1:].expand(-1, -length % tile)  # filling up with the last value changes no extreme
            values = torch.cat([values, last], 1).unflatten(1, (-1, tile))  # (B, tiles, tile)
            yield from (values.amin(-1).unsqueeze(dim), values.amax(-1).unsqueeze(dim))

    q_low, q_high, k_low, k_high = extremes(rule.q_positions, rule.k_positions)  # (B, q_tiles, 1), (B, 1, k_tiles)
    # (B, q_tiles, k_tiles): is there perhaps a visible pair, are there certainly none but visible pairs?
    touched = full = torch.ones_like(q_low + k_low, dtype=torch.bool)
    if rule.causal:
        touched, full = touched & (q_high >= k_low), full & (q_low >= k_high)
    if rule.window is not None:
        touched, full = touched & (q_low - k_high < rule.window), full & (q_high - k_low < rule.window)
    if rule.q_ids is not None:
        q_low, q_high, k_low, k_high = extremes(rule.q_ids, rule.k_ids)
        padding = (q_low == PADDING_SEGMENT_ID) & (q_high == PADDING_SEGMENT_ID)
        touched = touched & (q_low <= k_high) & (k_low <= q_high) & ~padding
        full = full & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if by_key:
        touched, full = touched.mT, full.mT  # (B, k_tiles, q_tiles)
    inner_len, inner_tile = (q_len, q_tile) if by_key else (k_len, k_tile)
    index = torch.arange(touched.shape[-1], device=device)
    full = full & touched & (index < inner_len // inner_tile)  # a last tile that sticks out needs its mask
    high = torch.where(touched, index + 1, 0).amax(-1)  # (B, tiles)
    low = torch.minimum(torch.where(touched, index, len(index)).amin(-1), high)
    # subtle: full tiles may come in several runs (a document that returns); only the longest run goes without a mask.
    last_partial = torch.where(full, -1, index).cummax(-1).values
    run, run_end = torch.where(full, index - last_partial, 0).max(-1)
    full_high = torch.where(run > 0, run_end + 1, low)
    return torch.stack([low, full_high - run, full_high, high], -1).to(torch.int32)  # (B, tiles, 4)

# A mask that no tensor describes is the same in every layer and step, so its bounds are computed once (not in inference
# mode: its tensors could not be saved for a later backward pass).
plain_bounds = functools.lru_cache(maxsize=64)(torch.inference_mode(False)(tile_bounds))
def mask_picture(bounds: Tensor) -> str:
    """One character for each tile of the batch's first row: blank skipped, ░ computed with the mask, █ without."""
    return "\n".join(" " * low + "░" * (full_low - low) + "█" * (full_high - full_low) + "░" * (high - full_high)
                     for low, full_low, full_high, high in bounds[0].tolist())

# --- 4. The kernels in Triton: forward ---
# A program owns one tile of queries of one head and walks over the tiles of keys from `low` to `high`; only outside of
# [full_low, full_high) it looks at the mask. (Two loops, with and without the mask, save that question but make ptxas
# serialize the tensor cores under Triton 3.6.) The hardware's exponentials are powers of 2: exp(x) = 2^(x * log2(e)).
@jit
def load_tile(base, first_row, length, row_stride, ROWS: constexpr, D: constexpr, D_PAD: constexpr):
    """Rows of D numbers as a (ROWS, D_PAD) tile; D_PAD is D rounded up to a power of 2, and what is outside is 0."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    # subtle: the offset of a row passes 2^31 at long contexts, the offsets inside a tile do not.
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + (rows[:, None] * row_stride + columns[None, :])
    return tl.load(pointers, mask=(first_row + rows < length)[:, None] & (columns < D)[None, :], other=0.0)

@jit
def store_tile(base, values, first_row, length, row_stride, ROWS: constexpr, D: constexpr, D_PAD: constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + (rows[:, None] * row_stride + columns[None, :])
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(first_row + rows < length)[:, None] & (columns < D))

@jit
def visible_tile(q_rows, k_rows, batch, q_len, k_len, q_positions, k_positions, q_ids, k_ids, CAUSAL, WINDOW):
    """`visible` for a tile: q_rows (T, 1) with k_rows (1, S) give (T, S), and (1, T) with (S, 1) its transpose."""
    # An argument that is None, as in MaskRule, is a constant when a kernel is compiled: what asks for it is left out.
    q_inside, k_inside = q_rows < q_len, k_rows < k_len
    q_flat, k_flat = batch * q_len + q_rows, batch * k_len + k_rows  # positions and ids are (B, T) and (B, S)
    mask = q_inside & k_inside
    distance = q_rows - k_rows
    if q_positions is not None:
        q_position = tl.load(q_positions + q_flat, mask=q_inside, other=0)
        distance = q_position - tl.load(k_positions + k_flat, mask=k_inside, other=0)
    if CAUSAL:
        mask = mask & (distance >= 0)
    if WINDOW > 0:
        mask = mask & (distance < WINDOW)
    if q_ids is not None:
        q_id = tl.load(q_ids + q_flat, mask=q_inside, other=-1)
        mask = mask & (q_id == tl.load(k_ids + k_flat, mask=k_inside, other=-1)) & (q_id != -1)
    return mask

@jit
def forward_kernel(q, k, v, out, L, q_positions, k_positions, q_ids, k_ids, bounds, bounds_batch,
                   q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                   out_batch, out_head, out_row, heads, q_len, k_len, scale_log2,
                   GROUP: constexpr, D: constexpr, D_PAD: constexpr, DV: constexpr, DV_PAD: constexpr,
                   CAUSAL: constexpr, WINDOW: constexpr, PRECISION: constexpr, Q_TILE: constexpr, K_TILE: constexpr):
    """out and L of one tile of queries: the same steps as `tiles_forward`."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # late queries see most keys: the longest work starts first
    batch, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    k_base, v_base = k + batch * k_batch + head // GROUP * k_head, v + batch * v_batch + head // GROUP * v_head
    bounds += batch * bounds_batch + tile * 4
    low, full_low, full_high, high = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
    q_rows = tile * Q_TILE + tl.arange(0, Q_TILE)
    q_tile = load_tile(q + batch * q_batch + head * q_head, tile * Q_TILE, q_len, q_row, Q_TILE, D, D_PAD)
    m = tl.full([Q_TILE], float("-inf"), tl.float32)  # running maximum of score * scale_log2
    total, acc = tl.zeros([Q_TILE], tl.float32), tl.zeros([Q_TILE, DV_PAD], tl.float32)
    for k_index in range(low, high):
        k_first = k_index * K_TILE
        k_tile = load_tile(k_base, k_first, k_len, k_row, K_TILE, D, D_PAD)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (Q_TILE, K_TILE)
        if (k_index < full_low) | (k_index >= full_high):
            mask = visible_tile(q_rows[:, None], (k_first + tl.arange(0, K_TILE))[None, :], batch, q_len, k_len,
                                q_positions, k_positions, q_ids, k_ids, CAUSAL, WINDOW)  # (Q_TILE, K_TILE)
            scores = tl.where(mask, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * scale_log2)
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet subtracts 0
        p = tl.exp2(scores * scale_log2 - m_finite[:, None])
        decay = tl.exp2(m - m_finite)
        total = total * decay + tl.sum(p, 1)
        v_tile = load_tile(v_base, k_first, k_len, v_row, K_TILE, DV, DV_PAD)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        m = m_new
    total = tl.where(total == 0, 1.0, total)  # blind rows: out = 0 / 1, L = -inf + log 1
    store_tile(out + batch * out_batch + head * out_head, acc / total[:, None], tile * Q_TILE, q_len, out_row, Q_TILE,
               DV, DV_PAD)
    L += (batch * heads + head) * q_len  # L is (B, H, T)
    tl.store(L + q_rows, (m + tl.log2(total)) * 0.6931471805599453, mask=q_rows < q_len)  # ln 2: back to powers of e

# --- 5. The kernels in Triton: backward ---
# No two programs add to the same number, so every run gives the same result: the first kernel owns a tile of queries
# and makes dQ (and delta, which both need), the second a tile of keys, its dK and dV from all heads that share the key.
@jit
def dq_kernel(q, k, v, out, grad_out, L, delta, dq, q_positions, k_positions, q_ids, k_ids, bounds, bounds_batch,
              q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
              grad_batch, grad_head, grad_row, dq_batch, dq_head, dq_row, heads, q_len, k_len, scale, scale_log2,
              GROUP: constexpr, D: constexpr, D_PAD: constexpr, DV: constexpr, DV_PAD: constexpr, CAUSAL: constexpr,
              WINDOW: constexpr, PRECISION: constexpr, Q_TILE: constexpr, K_TILE: constexpr):
    """dQ of one tile of queries, and delta = rowsum(out * grad_out)."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    k_base, v_base = k + batch * k_batch + head // GROUP * k_head, v + batch * v_batch + head // GROUP * v_head
    bounds += batch * bounds_batch + tile * 4
    low, full_low, full_high, high = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
    q_first = tile * Q_TILE
    q_rows = q_first + tl.arange(0, Q_TILE)
    q_tile = load_tile(q + batch * q_batch + head * q_head, q_first, q_len, q_row, Q_TILE, D, D_PAD)
    out_tile = load_tile(out + batch * out_batch + head * out_head, q_first, q_len, out_row, Q_TILE, DV, DV_PAD)
    grad = load_tile(grad_out + batch * grad_batch + head * grad_head, q_first, q_len, grad_row, Q_TILE, DV, DV_PAD)
    delta_rows = tl.sum(out_tile.to(tl.float32) * grad.to(tl.float32), 1)
    flat_rows = (batch * heads + head) * q_len + q_rows  # L and delta are (B, H, T)
    tl.store(delta + flat_rows, delta_rows, mask=q_rows < q_len)
    L_log2 = tl.load(L + flat_rows, mask=q_rows < q_len, other=0.0) * 1.4426950408889634  # times log2(e)
    acc = tl.zeros([Q_TILE, D_PAD], tl.float32)
    for k_index in range(low, high):
        k_first = k_index * K_TILE
        k_tile = load_tile(k_base, k_first, k_len, k_row, K_TILE, D, D_PAD)
        v_tile = load_tile(v_base, k_first, k_len, v_row, K_TILE, DV, DV_PAD)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (Q_TILE, K_TILE)
        p = tl.exp2(scores * scale_log2 - L_log2[:, None])
        if (k_index < full_low) | (k_index >= full_high):
            mask = visible_tile(q_rows[:, None], (k_first + tl.arange(0, K_TILE))[None, :], batch, q_len, k_len,
                                q_positions, k_positions, q_ids, k_ids, CAUSAL, WINDOW)  # (Q_TILE, K_TILE)
            p = tl.where(mask, p, 0.0)  # in a blind row, where L is -inf, p was inf
        dscores = p * (tl.dot(grad, tl.trans(v_tile), input_precision=PRECISION) - delta_rows[:, None])
        acc = tl.dot(dscores.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_tile(dq + batch * dq_batch + head * dq_head, acc * scale, q_first, q_len, dq_row, Q_TILE, D, D_PAD)

@jit
def dkdv_kernel(q, k, v, grad_out, L, delta, dk, dv, q_positions, k_positions, q_ids, k_ids, bounds, bounds_batch,
                q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
                dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, heads, q_len, k_len, scale, scale_log2,
                GROUP: constexpr, D: constexpr, D_PAD: constexpr, DV: constexpr, DV_PAD: constexpr, CAUSAL: constexpr,
                WINDOW: constexpr, PRECISION: constexpr, Q_TILE: constexpr, K_TILE: constexpr):
    """dK and dV of one tile of keys. Scores are computed transposed, so that p^T and dscores^T need no transposing."""
    tile, kv_heads = tl.program_id(1), heads // GROUP
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    bounds += batch * bounds_batch + tile * 4
    low, full_low, full_high, high = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
    k_first = tile * K_TILE
    k_rows = k_first + tl.arange(0, K_TILE)
    k_tile = load_tile(k + batch * k_batch + kv_head * k_head, k_first, k_len, k_row, K_TILE, D, D_PAD)
    v_tile = load_tile(v + batch * v_batch + kv_head * v_head, k_first, k_len, v_row, K_TILE, DV, DV_PAD)
    dk_acc, dv_acc = tl.zeros([K_TILE, D_PAD], tl.float32), tl.zeros([K_TILE, DV_PAD], tl.float32)
    for step in range(0, GROUP * (high - low)):  # one loop over (query head of the group, tile of queries)
        head, q_index = kv_head * GROUP + step // (high - low), low + step % (high - low)
        q_first = q_index * Q_TILE
        q_rows = q_first + tl.arange(0, Q_TILE)
        flat_rows = (batch * heads + head) * q_len + q_rows
        L_log2 = tl.load(L + flat_rows, mask=q_rows < q_len, other=0.0) * 1.4426950408889634
        delta_rows = tl.load(delta + flat_rows, mask=q_rows < q_len, other=0.0)
        q_tile = load_tile(q + batch * q_batch + head * q_head, q_first, q_len, q_row, Q_TILE, D, D_PAD)
        grad = load_tile(grad_out + batch * grad_batch + head * grad_head, q_first, q_len, grad_row, Q_TILE, DV, DV_PAD)
        scores_t = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)  # (K_TILE, Q_TILE)
        p_t = tl.exp2(scores_t * scale_log2 - L_log2[None, :])
        if (q_index < full_low) | (q_index >= full_high):
            mask_t = visible_tile(q_rows[None, :], k_rows[:, None], batch, q_len, k_len, q_positions, k_positions,
                                  q_ids, k_ids, CAUSAL, WINDOW)  # (K_TILE, Q_TILE)
            p_t = tl.where(mask_t, p_t, 0.0)
        dv_acc = tl.dot(p_t.to(grad.dtype), grad, dv_acc, input_precision=PRECISION)
        dscores_t = p_t * (tl.dot(v_tile, tl.trans(grad), input_precision=PRECISION) - delta_rows[None, :])
        dk_acc = tl.dot(dscores_t.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    store_tile(dk + batch * dk_batch + kv_head * dk_head, dk_acc * scale, k_first, k_len, dk_row, K_TILE, D, D_PAD)
    store_tile(dv + batch * dv_batch + kv_head * dv_head, dv_acc, k_first, k_len, dv_row, K_TILE, DV, DV_PAD)

# How one kernel is launched: the tile sizes, the warps of a program, the stages of its software pipeline.
Launch = namedtuple("Launch", "q_tile k_tile num_warps num_stages")

# One entry for each kernel and padded head dim (64 serves what is smaller). The tests compile every one for sm_90: none
# spills registers, and all run on Hopper's wgmma but dkdv at 256, which fits only with small tiles on mma.sync.
LAUNCH_16_BIT = {
    64: {"forward": Launch(128, 64, 8, 3), "dq": Launch(128, 64, 8, 2), "dkdv": Launch(64, 128, 8, 2)},
    128: {"forward": Launch(128, 64, 8, 3), "dq": Launch(128, 64, 8, 2), "dkdv": Launch(32, 128, 8, 2)},
    256: {"forward": Launch(128, 32, 8, 2), "dq": Launch(128, 32, 8, 2), "dkdv": Launch(32, 32, 8, 2)},
}
LAUNCH_32_BIT = {head_dim: dict.fromkeys(("forward", "dq", "dkdv"), Launch(tile, tile, 4, 1))  # to check, not for speed
                 for head_dim, tile in ((64, 32), (128, 32), (256, 16))}

def launch_table(q: Tensor, v: Tensor, params: dict[str, Launch] | None = None) -> list[int]:
    """Launches of the forward, dq and dkdv kernels in a row, from the table where `params` does not name them."""
    if triton is None:
        raise ValueError("backend 'triton' needs the package triton: pip install triton (Linux), or use 'auto'.")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the Triton kernels need a GPU (or TRITON_INTERPRET=1), not {q.device}: use backend='auto'.")
    if q.dtype == torch.bfloat16 and INTERPRETED:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16 there.")
    head_dim = max(q.shape[-1], v.shape[-1])
    if head_dim > 256 or q.dtype == torch.float64:
        raise ValueError(f"the kernels take 256 dims of 32 bits at most, not {head_dim} of {q.dtype}: use 'sdpa'.")
    table = (LAUNCH_32_BIT if q.dtype == torch.float32 else LAUNCH_16_BIT)[max(64, triton.next_power_of_2(head_dim))]
    return [number for kernel in ("forward", "dq", "dkdv") for number in (table | (params or {}))[kernel]]

INTERPRETED = triton is not None and not isinstance(forward_kernel, triton.JITFunction)
def launch_kernel(kernel, launch: list[int], rule: MaskRule, bounds: Tensor, heads: int, tensors: tuple[Tensor, ...],
                  *scales: float) -> None:
    """Run a kernel on `tensors`, which begin with q, k, v: a program for each row of bounds, head and batch row."""
    q, k, v = tensors[:3]
    (B, H, T, D), (G, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    D_PAD, DV_PAD = (max(16, triton.next_power_of_2(dim)) for dim in (D, Dv))  # tensor cores multiply 16 at least
    q_tile, k_tile, num_warps, num_stages = launch
    bounds = bounds.expand(B, -1, -1)
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]  # numbers of a row lie side by side
    strides = [stride for x in tensors if x.dim() == 4 for stride in x.stride()[:3]]  # batch, head, row
    # Tensor cores multiply float32 as three TF32 products, or one where PyTorch's own switch allows less precision.
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    with torch.cuda.device_of(q):  # the GPU of the tensors, not the current one
        kernel[(B * heads, bounds.shape[1])](
            *tensors, *rule[2:], bounds, bounds.stride(0), *strides, H, T, S, *scales, GROUP=H // G, D=D,
            D_PAD=D_PAD, DV=Dv, DV_PAD=DV_PAD, CAUSAL=rule.causal, WINDOW=rule.window or 0, PRECISION=precision,
            Q_TILE=q_tile, K_TILE=k_tile, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)

# --- 6. One function for all of them ---
# As custom operators, both passes are opaque calls to torch.compile and to activation checkpointing, which need only
# the shapes of the results (the `empty_` functions) and to know which operator is the derivative of which.
OPTIONS = "bool causal, int? window, float scale, int[] launch, str backend, " + ", ".join(
    f"Tensor? {name}" for name in "q_positions k_positions q_ids k_ids forward_bounds dq_bounds dkdv_bounds".split())

@torch.library.custom_op("flash::forward", mutates_args=(),
                         schema=f"(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)")
def forward_op(q, k, v, causal, window, scale, launch, backend, *tensors):
    rule = MaskRule(causal, window, *tensors[:4])
    if backend == "tiles":
        return tiles_forward(q, k, v, rule, scale, *launch)
    out, L = empty_results(q, k, v)
    launch_kernel(forward_kernel, launch[:4], rule, tensors[4], q.shape[1], (q, k, v, out, L), scale * LOG2_E)
    return out, L

@torch.library.custom_op("flash::backward", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor out, "
                         f"Tensor L, Tensor grad_out, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
def backward_op(q, k, v, out, L, grad_out, causal, window, scale, launch, backend, *tensors):
    rule, (dq_bounds, dkdv_bounds) = MaskRule(causal, window, *tensors[:4]), tensors[5:]
    if backend == "tiles":
        return tiles_backward(q, k, v, out, L, grad_out, rule, scale, *launch)
    L, delta, (dq, dk, dv) = L.contiguous(), L.new_empty(L.shape), empty_gradients(q, k, v)
    launch_kernel(dq_kernel, launch[4:8], rule, dq_bounds, q.shape[1], (q, k, v, out, grad_out, L, delta, dq),
                  scale, scale * LOG2_E)
    launch_kernel(dkdv_kernel, launch[8:], rule, dkdv_bounds, k.shape[1], (q, k, v, grad_out, L, delta, dk, dv),
                  scale, scale * LOG2_E)
    return dq, dk, dv

def save_for_gradients(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[3:8]
    ctx.save_for_backward(*inputs[:3], *output, *inputs[8:])

def gradients(ctx, grad_out: Tensor, grad_L: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, L, *tensors = ctx.saved_tensors
    grads = backward_op(q, k, v, out, L, grad_out, *ctx.options, *tensors)
    return *grads, *[None] * (len(ctx.options) + len(tensors))

forward_op.register_fake(empty_results)
backward_op.register_fake(empty_gradients)
forward_op.register_autograd(gradients, setup_context=save_for_gradients)
def operator_arguments(q: Tensor, k: Tensor, v: Tensor, rule: MaskRule, scale: float,
                       params: dict[str, Launch] | None, backend: str) -> tuple:
    """Everything after q, k and v in the signature of the operators; the bounds of the tiles are computed here."""
    if backend == "tiles":
        tile_sizes = list((params or {}).get("forward", (128, 128))[:2])
        return rule.causal, rule.window, scale, tile_sizes, backend, *rule[2:], None, None, None
    launch = launch_table(q, v, params)
    # torch.compile looks into tile_bounds itself, and computes it once for all layers that share a mask.
    described = rule.q_positions is not None or rule.q_ids is not None or torch.compiler.is_compiling()
    build = functools.partial(tile_bounds if described else plain_bounds, rule, q.shape[2], k.shape[2], device=q.device)
    bounds = (build(*launch[start:start + 2], by_key=start == 8) for start in (0, 4, 8))
    return rule.causal, rule.window, scale, launch, backend, *rule[2:], *bounds

class FlashAttentionPyTorch(torch.autograd.Function):
    """.apply(q, k, v, is_causal=False) on (..., T, D), by tiles; saves q, k, v, out and L, its only (..., T) tensor."""
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, backend: str = "tiles") -> Tensor:
        heads = [x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v)]  # (B, 1, T, D): the leading dimensions are a batch
        check_shapes(*heads)
        ctx.options = operator_arguments(*heads, MaskRule(is_causal), q.shape[-1] ** -0.5, None, backend)
        out, L = forward_op(*heads, *ctx.options)
        out = out.reshape(*q.shape[:-1], v.shape[-1])  # (..., T, Dv)
        ctx.save_for_backward(q, k, v, out, L.reshape(q.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, L = ctx.saved_tensors
        *heads, grad_out, L = (x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v, out, grad_out, L[..., None]))
        grads = backward_op(*heads, L[..., 0], grad_out, *ctx.options)
        return *(grad.reshape(x.shape) for grad, x in zip(grads, (q, k, v))), None, None

class FlashAttentionTriton(FlashAttentionPyTorch):
    """The same by the Triton kernels."""
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        return FlashAttentionPyTorch.forward(ctx, q, k, v, is_causal, "triton")

def choose_backend(device: str, dtype: torch.dtype, head_dim: int, mask_bytes: int = 0) -> tuple[str, str]:
    """The backend that "auto" means, and why, as a sentence; mask_bytes is B * T * S, or 0 where causal is all."""
    if device == "cuda" and triton is not None and head_dim <= 256 and dtype != torch.float64:
        return "triton", "Triton kernels: the device is a GPU and triton is installed."
    if mask_bytes <= DENSE_MASK_LIMIT:
        return "sdpa", f"PyTorch's own scaled_dot_product_attention, with a dense mask of {mask_bytes:,} bytes."
    return "tiles", f"tiles in plain PyTorch: a dense mask would take {mask_bytes:,} bytes."

def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, segment_ids: Tensor | None = None,
                    kv_segment_ids: Tensor | None = None, positions: Tensor | None = None,
                    kv_positions: Tensor | None = None, window: int | None = None, scale: float | None = None,
                    params: dict[str, Launch] | None = None, backend: str = "auto") -> Tensor:
    """Attention of q (B, H, T, D) on k (B, G, S, D) and v (B, G, S, Dv): (B, H, T, Dv), by the rule of `visible`.
    G divides H: query heads g * H/G to (g + 1) * H/G - 1 share key head g. Integer tensors are (B, T) or (T,) for
    queries, (B, S) or (S,) for keys; what is given for queries alone holds for the keys too where T == S. Positions
    count from 0 unless given. Ids fit in 32 bits; padding (-1), and whatever sees no key, gives zeros and receives zero
    gradient. scale: 1 / sqrt(D) unless given; backend: see `choose_backend`; params: launches of some kernels."""
    if torch.is_autocast_enabled(q.device.type):  # rotary embeddings leave q and k in float32 beside a 16-bit v
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale is {scale}, but must be above 0.")
    if unknown := set(params or {}) - {"forward", "dq", "dkdv"}:
        raise ValueError(f"params names {sorted(unknown)}, but the kernels are forward, dq and dkdv.")
    mask_args = dict(causal=causal, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, positions=positions,
                     kv_positions=kv_positions, window=window)
    rule = mask_rule(q, k, **mask_args)
    plain = rule.window is None and rule.q_positions is None and rule.q_ids is None  # causal, or nothing at all
    if backend == "auto":
        mask_bytes = 0 if plain else q.shape[0] * q.shape[2] * k.shape[2]
        backend, _ = choose_backend(q.device.type, q.dtype, max(q.shape[3], v.shape[3]), mask_bytes)
    if backend == "reference":
        dtype = torch.promote_types(q.dtype, torch.float32)
        return reference_attention(q, k, v, scale=scale, dtype=dtype, **mask_args)[0].to(q.dtype)
    if backend == "sdpa" and plain:
        return F.scaled_dot_product_attention(q, k, v, is_causal=rule.causal, scale=scale, enable_gqa=True)
    if backend == "sdpa":  # PyTorch's own kernels take anything else as a dense mask; rows that see nothing as above
        mask = rule.mask(q, k)[:, None]  # (B, 1, T, S)
        blind = ~mask.any(-1, keepdim=True)  # (B, 1, T, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, scale=scale, enable_gqa=True)
        return out.masked_fill(blind, 0)  # (B, H, T, Dv)
    if backend in ("tiles", "triton"):
        return forward_op(q, k, v, *operator_arguments(q, k, v, rule, scale, params, backend))[0]
    raise ValueError(f"backend is {backend!r}, but must be one of auto, triton, tiles, sdpa, reference.")

# --- 7. Seeing it ---
def print_errors(tensors: list[Tensor], mask_args: dict, backends: list[str]) -> None:
    """Relative errors ||x - exact|| / ||exact|| and times of every backend, where exact is the float64 reference."""
    def with_gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        *inputs, grad_out = (x.to(dtype).detach().requires_grad_() for x in tensors)
        out = flash_attention(*inputs, **mask_args, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]
    exact = with_gradients(torch.float64, "reference")
    print(f"\n{'relative error of':<24}{'out':>10}{'dQ':>10}{'dK':>10}{'dV':>10}{'milliseconds':>16}")
    for dtype, backend in ((dtype, backend) for dtype in (torch.float32, torch.float16) for backend in backends):
        for _ in range(2):  # the first run compiles and fills caches
            start = time.perf_counter()
            results = with_gradients(dtype, backend)
            float(results[1].sum())  # waits for a GPU
        milliseconds = 1000 * (time.perf_counter() - start)
        errors = "".join(f"{(x.double() - y).norm() / y.norm():10.1e}" for x, y in zip(results, exact))
        print(f"  {backend:<11}{str(dtype).removeprefix('torch.'):<11}{errors}{milliseconds:16.1f}")

def demonstrate(args: argparse.Namespace) -> None:
    device, generator = "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(0)
    B, T, H, G, D = args.batch_size, args.context_length, args.num_heads, args.num_kv_heads, args.head_dim
    tokens = torch.randint(0, max(1, T // args.num_documents), (B, T), generator=generator)  # 0 ends a document
    mask_args = {"segment_ids": segment_ids_from_tokens(tokens, 0).to(device), "window": args.window}
    tensors = q, k, v, _ = [torch.randn(B, heads, T, D, generator=generator).to(device) for heads in (H, G, G, H)]
    rule = mask_rule(q, k, **mask_args)
    tile = max(64, -(-T // 100))  # the picture is at most 100 characters wide
    bounds = tile_bounds(rule, T, T, tile, tile, device=device)
    if args.plot:
        from matplotlib import pyplot
        rows = mask_picture(bounds).split("\n")
        image = torch.tensor([[" ░█".index(kind) for kind in row.ljust(len(rows))] for row in rows])
        pyplot.imsave(args.plot, image.kron(torch.ones(8, 8)), cmap="Blues", vmin=0, vmax=2)  # 8 x 8 pixels a tile
        return print(f"wrote {args.plot}: white skipped, light computed with the mask, dark without")
    if args.show_attention_mask:
        return print(f"tiles of {tile} x {tile}: blank skipped, ░ with the mask, █ without it\n{mask_picture(bounds)}")
    name, reason = choose_backend(device, torch.float32, D, B * T * T)
    print(f"{B} rows of {T} tokens, {rule.q_ids[:, -1].sum() + B} documents in all, {H} query and {G} key heads of {D}")
    print(f"backend auto is {name}: {reason}")
    print_errors(tensors, mask_args, ["reference", "sdpa", "tiles"] + ["triton"] * (name == "triton" or INTERPRETED))
    tiles, (low, full_low, full_high, high) = bounds.shape[1], bounds.long().sum((0, 1)).tolist()
    print(f"\ntiles of {tile} x {tile}: {B * tiles**2:,} in all, {B * tiles * (tiles + 1) // 2:,} causal\n"
          f"  visited {high - low:,}, without a mask {full_high - full_low:,}\n\nbytes kept for a backward pass")
    for what, amount in (("bounds of the tiles, three kernels", 3 * bounds.nbytes), ("log-sum-exp L", 4 * B * H * T),
                         ("a dense mask, one byte a pair", B * T**2), ("(T, S) matrices in 16 bits", 2 * B * H * T**2)):
        print(f"  {what:<36}{amount:>16,}")

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("flash.py", usage=argparse.SUPPRESS, description="Attention on packed documents.")
    for name, default, text in (("batch_size", 2, "rows of the batch"), ("context_length", 1000, "tokens in a row"),
                                ("num_documents", 6, "documents in a row, on average"), ("num_heads", 4, "query heads"),
                                ("num_kv_heads", 2, "key heads"), ("head_dim", 64, "numbers in a query")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--window", type=int, help="see only so many tokens back, itself included (default: all)")
    parser.add_argument("--show_attention_mask", action="store_true", help="only draw the tiles of the first row")
    parser.add_argument("--plot", metavar="PNG", help="only draw them as a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    try:
        if small := [f"--{name} is {n}" for name, n in vars(args).items() if type(n) is int and n < 1]:
            raise ValueError(f"{small[0]}, but must be at least 1.")
        demonstrate(args)
    except (ValueError, OSError, ImportError, KeyboardInterrupt) as error:
        print(f"flash.py: {str(error) or 'stopped'}{'; install it' * isinstance(error, ImportError)}", file=sys.stderr)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None

if __name__ == "__main__":
    main()
