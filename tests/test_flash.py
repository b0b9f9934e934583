"""flash.py: every rung against the first, and the first against pairs of Python loops and PyTorch.

Without a GPU the Triton kernels run in Triton's interpreter (float32 and float16: its bfloat16 products are garbage),
which conftest.py chooses before Triton is imported.
"""

import doctest
import functools
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flash

ON_GPU = torch.cuda.is_available()
ROOT = Path(flash.__file__).parent
DEVICE = "cuda" if ON_GPU else "cpu"
needs_kernels = pytest.mark.skipif(not (flash.INTERPRETED or (ON_GPU and flash.triton)),
                                   reason="no GPU, and Triton is absent")
BACKENDS = ["tiles", "sdpa", pytest.param("triton", marks=needs_kernels)]


def small_launches(q_tile: int, k_tile: int) -> dict[str, flash.Launch]:
    """Tiles much smaller than the sequences, and another shape for each kernel."""
    return {"forward": flash.Launch(q_tile, k_tile, 4, 1), "dq": flash.Launch(k_tile, q_tile, 4, 1),
            "dkdv": flash.Launch(q_tile, k_tile, 4, 1)}


def random_case(seed: int) -> tuple[tuple[torch.Tensor, ...], dict, dict[str, flash.Launch]]:
    """q, k, v, a random output gradient; mask arguments of every kind; launches. Nothing is a multiple of anything."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    group, kv_heads, B = rng.choice([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]) + (rng.choice([1, 2]),)
    if group * kv_heads > 2:
        B = 1
    T, S = rng.randint(1, 70), rng.randint(1, 70)
    if rng.random() < 0.6:
        S = T
    D, Dv = rng.choice([8, 16, 20, 32, 40]), rng.choice([16, 24, 32])
    dtype = rng.choice([torch.float32, torch.float16])

    def tensor(heads: int, length: int, dim: int) -> torch.Tensor:
        if rng.random() < 0.5:  # (batch, length, heads, dim) in memory, as projections leave it
            return torch.randn(B, length, heads, dim, generator=gen).to(DEVICE, dtype).transpose(1, 2)
        return torch.randn(B, heads, length, dim, generator=gen).to(DEVICE, dtype)

    q, k, v = tensor(group * kv_heads, T, D), tensor(kv_heads, S, D), tensor(kv_heads, S, Dv)
    grad = tensor(group * kv_heads, T, Dv)
    mask: dict = {"causal": rng.random() < 0.6, "scale": rng.choice([None, 0.3])}
    ids = rng.choice(["none", "sorted", "sorted", "shuffled", "huge", "padded"])
    if ids != "none":
        pool = torch.tensor([2**31 - 1, -(2**31), 10**9, 0, 7] if ids == "huge" else [0, 1, 2, 3, 4])
        both = []
        for length in (T, S):
            index = torch.randint(0, 4 if ids != "shuffled" else 3, (B, length), generator=gen)
            chosen = pool[index if ids == "shuffled" else index.sort(-1).values]
            if ids in ("huge", "padded"):
                chosen[torch.rand(B, length, generator=gen) < 0.15] = flash.PADDING_SEGMENT_ID
                chosen[:, length - length // 4:] = flash.PADDING_SEGMENT_ID
            both.append(chosen.to(torch.int32).to(DEVICE))
        mask["segment_ids"] = both[0]
        if T != S or rng.random() < 0.5:
            mask["kv_segment_ids"] = both[1]
    positions = rng.choice(["none", "none", "offset", "permuted", "restarting"])
    if positions == "offset":
        mask["positions"], mask["kv_positions"] = torch.arange(T) + rng.randint(0, S), torch.arange(S)
    elif positions == "permuted":
        mask["positions"] = torch.stack([torch.randperm(T, generator=gen) for _ in range(B)])
        mask["kv_positions"] = torch.arange(S)
    elif positions == "restarting":
        mask["positions"], mask["kv_positions"] = torch.arange(T) % 17, torch.arange(S) % 13
    if rng.random() < 0.35:
        mask["window"] = rng.randint(1, 40)
    return (q, k, v, grad), mask, small_launches(rng.choice([16, 32]), rng.choice([16, 32]))


def run(backend: str, tensors: tuple[torch.Tensor, ...], mask: dict, params=None) -> list[torch.Tensor]:
    """Output and gradients of q, k and v."""
    *inputs, grad = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = flash.flash_attention(*inputs, **mask, params=params, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def exact(tensors: tuple[torch.Tensor, ...], mask: dict) -> list[torch.Tensor]:
    return run("reference", tuple(x.double() for x in tensors), mask)


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float) -> None:
    """Relative error in the 2-norm of output, dQ, dK and dV; where a row sees one key, dQ is 0 and so not relative."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want):
        assert x.shape == y.shape and x.isfinite().all(), f"{name}: shape {x.shape} against {y.shape}, or not finite"
        error = ((x.double() - y).norm() / y.norm().clamp_min(0.1 * y.numel() ** 0.5)).item()
        assert error < tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


def tolerance_of(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]


# --- 1. The rule and the reference ---


def slow_rule(i, j, q_pos, k_pos, q_ids, k_ids, causal, window) -> bool:
    if q_ids is not None and (q_ids[i] == -1 or q_ids[i] != k_ids[j]):
        return False
    if causal and q_pos[i] < k_pos[j]:
        return False
    return window is None or q_pos[i] - k_pos[j] < window


@pytest.mark.parametrize("seed", range(12))
def test_reference_is_the_definition(seed: int) -> None:
    """The float64 reference equals attention written as loops over single pairs, log-sum-exp included."""
    (q, k, v, _), mask, _ = random_case(seed)
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    mask = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in mask.items()}
    out, L = flash.reference_attention(q, k, v, dtype=torch.float64, **mask)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]

    def row(name: str, b: int, default) -> list | None:
        value = mask.get(name, default)
        return value if value is None or isinstance(value, list) else value.expand(B, -1)[b].tolist()

    for b in range(B):
        q_pos, k_pos = row("positions", b, list(range(T))), row("kv_positions", b, list(range(S)))
        q_ids, k_ids = row("segment_ids", b, None), row("kv_segment_ids", b, mask.get("segment_ids"))
        for h in range(H):
            for i in range(T):
                keys = [j for j in range(S) if slow_rule(i, j, q_pos, k_pos, q_ids, k_ids, mask["causal"],
                                                         mask.get("window"))]
                want, want_L = torch.zeros(v.shape[-1], dtype=torch.float64), torch.tensor(-torch.inf).double()
                if keys:
                    scores = (k[b, h * G // H, keys] @ q[b, h, i]) * (mask["scale"] or D**-0.5)
                    want, want_L = scores.softmax(0) @ v[b, h * G // H, keys], scores.logsumexp(0)
                torch.testing.assert_close(out[b, h, i], want, atol=1e-12, rtol=1e-12)
                torch.testing.assert_close(L[b, h, i], want_L, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("q_len, k_len, causal", [(37, 37, True), (37, 53, True), (53, 37, True), (37, 53, False)])
def test_plain_attention_is_torchs(q_len: int, k_len: int, causal: bool) -> None:
    """Without ids, positions and window, every backend is torch's scaled_dot_product_attention, gradients included."""
    torch.manual_seed(0)
    tensors = tuple(torch.randn(2, h, n, 16, dtype=torch.float64) for h, n in ((4, q_len), (2, k_len), (2, k_len),
                                                                               (4, q_len)))
    inputs = [x.clone().requires_grad_() for x in tensors[:3]]
    out = F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True)
    want = [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]
    for backend in ("reference", "tiles", "sdpa", "auto"):
        assert_close(run(backend, tensors, {"causal": causal}), want, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "tiles"])
def test_gradcheck(backend: str) -> None:
    """Gradients of the reference and of the tiles are those of finite differences, blind rows among them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, d, dtype=torch.float64, requires_grad=True)
               for h, n, d in ((2, 5, 4), (1, 6, 4), (1, 6, 3)))
    mask = {"segment_ids": torch.tensor([0, 0, 1, 1, -1]), "kv_segment_ids": torch.tensor([0, 1, 0, 1, 9, -1]),
            "window": 3, "params": {"forward": flash.Launch(2, 4, 1, 1)} if backend == "tiles" else None}
    assert torch.autograd.gradcheck(lambda *x: flash.flash_attention(*x, **mask, backend=backend), (q, k, v))


def test_examples_in_docstrings() -> None:
    """The examples in the docstrings are true, and the contents list equals the section rulers."""
    failures, attempted = doctest.testmod(flash)
    assert failures == 0 and attempted >= 5, f"{failures} of {attempted} examples failed"
    source = Path(flash.__file__).read_text()
    rulers = [tuple(x) for x in re.findall(r"^# --- (\d+)\. (.+?) ---$", source, re.M)]
    contents = [(n, title.strip()) for n, title in re.findall(r"(\d)\. (.+?)(?=\s{2,}|\n)", flash.__doc__)]
    assert sorted(contents) == rulers, f"contents {sorted(contents)}, rulers {rulers}"


def test_document_numbers_and_positions() -> None:
    """Ids number documents across any batch shape, end-of-text belongs to its document, positions restart in each."""
    tokens = torch.tensor([[9, 9, 1, 9, 1, 1], [1, 9, 9, 9, 9, 1]])
    ids = flash.segment_ids_from_tokens(tokens, 1)
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]] and ids.dtype == torch.int32
    assert flash.positions_in_segments(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


# --- 2. Tiles, and the tiles to skip ---


@pytest.mark.parametrize("seed", range(40))
def test_tiles_equal_the_reference(seed: int) -> None:
    """Tiles in plain PyTorch give the reference's output and gradients for any mask, length, grouping and layout."""
    tensors, mask, params = random_case(1000 + seed)
    assert_close(run("tiles", tensors, mask, params), exact(tensors, mask), tolerance_of(tensors[0].dtype))


@pytest.mark.parametrize("seed", range(20))
def test_sdpa_equals_the_reference(seed: int) -> None:
    """The sdpa backend obeys every mask argument too, and zeroes rows that see nothing."""
    tensors, mask, _ = random_case(2000 + seed)
    tensors = tuple(x.float() for x in tensors)
    assert_close(run("sdpa", tensors, mask), exact(tensors, mask), tolerance_of(torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_never_hold_the_matrix(backend: str) -> None:
    """Neither pass of the tiles or kernels makes a tensor as large as T x S, and the dense backend does."""
    if backend == "triton" and not ON_GPU:
        T, params = 96, small_launches(16, 16)
    else:
        T, params = 512, {"forward": flash.Launch(64, 64, 4, 1)}
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return result

    q = torch.randn(1, 1, T, 16, device=DEVICE)
    with Largest():
        run(backend, (q, q, q, q), {"segment_ids": torch.arange(T, device=DEVICE) // 40}, params)
    dense = largest >= T * T
    assert dense == (backend == "sdpa"), f"{backend}: the largest tensor has {largest} elements, T x S is {T * T}"


@pytest.mark.parametrize("seed", range(150))
def test_bounds_are_never_wrong(seed: int) -> None:
    """For any ids, positions, window and tile sizes no visible pair is skipped and no masked pair goes unmasked."""
    (q, k, _, _), mask, _ = random_case(seed)
    mask.pop("scale")
    rule, rng = flash.mask_rule(q, k, **mask), random.Random(seed)
    T, S, q_tile, k_tile = q.shape[2], k.shape[2], rng.choice([1, 3, 8, 16]), rng.choice([1, 4, 7, 16])
    dense = rule.mask(q, k)  # (B or 1, T, S)
    for by_key in (False, True):
        bounds = flash.tile_bounds(rule, T, S, q_tile, k_tile, by_key=by_key, device=DEVICE)
        pairs, outer, inner = (dense.mT, k_tile, q_tile) if by_key else (dense, q_tile, k_tile)
        assert bounds.dtype == torch.int32 and bounds.shape[1] == -(-pairs.shape[1] // outer)
        for row, row_pairs in zip(bounds.tolist(), pairs):
            for tile, (low, full_low, full_high, high) in enumerate(row):
                assert 0 <= low <= full_low <= full_high <= high <= -(-pairs.shape[2] // inner)
                part = row_pairs[tile * outer:(tile + 1) * outer]
                assert not part[:, :low * inner].any() and not part[:, high * inner:].any(), "a visible pair is skipped"
                assert part[:, full_low * inner:full_high * inner].all(), "a masked pair goes without a mask"
                assert full_high * inner <= pairs.shape[2], "an unmasked tile sticks out"


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_tight_for_packed_documents(seed: int) -> None:
    """For documents numbered in order the bounds are exactly the first and last tile with a visible pair."""
    gen = torch.Generator().manual_seed(seed)
    ids = flash.segment_ids_from_tokens(torch.randint(0, 30, (2, 301), generator=gen), 0)
    rule = flash.MaskRule(q_ids=ids, k_ids=ids)
    dense = rule.mask(ids[..., None], ids[..., None])
    dense = F.pad(dense, (0, 3, 0, 3)).view(2, 19, 16, 19, 16)
    some = dense.any(4).any(2)  # (B, q_tiles, k_tiles)
    for by_key in (False, True):
        bounds = flash.tile_bounds(rule, 301, 301, 16, 16, by_key=by_key)
        tiles = some.mT if by_key else some
        index = torch.arange(19)
        assert torch.equal(bounds[..., 0], torch.where(tiles, index, 19).amin(-1).int())
        assert torch.equal(bounds[..., 3], torch.where(tiles, index + 1, 0).amax(-1).int())


def test_picture_of_the_mask() -> None:
    """The picture shows skipped tiles blank, partial ones light and full ones solid."""
    ids = torch.tensor([[0] * 6 + [1] * 4])
    bounds = flash.tile_bounds(flash.MaskRule(q_ids=ids, k_ids=ids), 10, 10, 2, 2)
    assert flash.mask_picture(bounds) == "░\n█░\n██░\n   ░\n   █░"


# --- 3. The Triton kernels ---


@needs_kernels
@pytest.mark.parametrize("seed", range(60))
def test_kernels_equal_the_reference(seed: int) -> None:
    """Output, dQ, dK and dV of the Triton kernels equal float64's for any mask, length, grouping, layout and dim."""
    tensors, mask, params = random_case(3000 + seed)
    assert_close(run("triton", tensors, mask, params), exact(tensors, mask), tolerance_of(tensors[0].dtype))


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_kernels_equal_the_reference_300(seed: int) -> None:
    """The same for 300 other cases."""
    test_kernels_equal_the_reference(1000 + seed)


@needs_kernels
@pytest.mark.parametrize("head_dim", [80, 96, 192])
def test_default_launches_and_odd_head_dims(head_dim: int) -> None:
    """Head dims between powers of 2 work with the table's own tile sizes, in 16 and 32 bits."""
    torch.manual_seed(head_dim)
    for dtype in (torch.float32, torch.float16):
        tensors = tuple(torch.randn(1, 1, 70, head_dim, device=DEVICE, dtype=dtype) for _ in range(4))
        mask = {"segment_ids": torch.arange(70, device=DEVICE) // 33}
        assert_close(run("triton", tensors, mask), exact(tensors, mask), tolerance_of(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_row(backend: str) -> None:
    """A decoding step, one query at its position against a cache, gives the last row of the whole attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 45, 16, device=DEVICE) for h in (4, 2, 2))
    whole = flash.flash_attention(q, k, v, window=30, backend="reference")
    cache = torch.zeros(2, 2, 64, 16, device=DEVICE)  # longer than what is written
    k_cache, v_cache = cache.clone(), cache.clone()
    k_cache[:, :, :45], v_cache[:, :, :45] = k, v
    step = flash.flash_attention(q[:, :, -1:], k_cache, v_cache, window=30, positions=torch.tensor([[44], [44]]),
                                 params=small_launches(16, 16), backend=backend)
    torch.testing.assert_close(step, whole[:, :, -1:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_that_come_back(backend: str) -> None:
    """Reused, shuffled, huge and negative ids, with padding, mix nothing up; full tiles of two runs stay apart."""
    torch.manual_seed(0)
    tensors = tuple(torch.randn(1, 1, 96, 16, device=DEVICE) for _ in range(4))
    for ids in ([0] * 32 + [1] * 32 + [0] * 32, [2**31 - 1] * 36 + [-(2**31)] * 16 + [-1] * 8 + [-2] * 36,
                [token % 3 for token in range(96)], [1000] * 60 + [-1] * 36):
        mask = {"segment_ids": torch.tensor(ids, device=DEVICE), "causal": False}
        assert_close(run(backend, tensors, mask, small_launches(32, 32)), exact(tensors, mask), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zigzag_slices(backend: str) -> None:
    """Queries cut out of the sequence in two pieces (context parallelism), at lengths no tile divides, add up to it."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 60, 16, device=DEVICE) for _ in range(4))
    ids = flash.segment_ids_from_tokens(torch.randint(0, 12, (60,)), 0).to(DEVICE)
    want = exact((q, k, v, grad), {"segment_ids": ids})
    chunks, parts = torch.arange(60).view(4, 15), []
    for mine in (torch.cat([chunks[0], chunks[3]]), torch.cat([chunks[1], chunks[2]])):
        mask = {"positions": mine, "kv_positions": torch.arange(60), "segment_ids": ids[mine], "kv_segment_ids": ids}
        out, dq, dk, dv = run(backend, (q[:, :, mine], k, v, grad[:, :, mine]), mask, small_launches(16, 16))
        parts.append((dk, dv))
        assert_close([out, dq], [want[0][:, :, mine], want[1][:, :, mine]], 2e-5)
    assert_close([parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]], want[2:], 2e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_padding_is_zero(backend: str) -> None:
    """Padding and whatever sees nothing gives exactly zero output and receives exactly zero gradient."""
    torch.manual_seed(0)
    tensors = tuple(torch.randn(1, 2, 40, 16, device=DEVICE) for _ in range(4))
    ids = torch.tensor([0] * 10 + [-1] * 5 + [1] * 10 + [-1] * 15, device=DEVICE)
    results = run(backend, tensors, {"segment_ids": ids}, small_launches(16, 16))
    for name, x in zip(("out", "dq", "dk", "dv"), results):
        assert (x[:, :, ids == -1] == 0).all() and (x[:, :, ids != -1] != 0).any(), name
    nobody = {"segment_ids": torch.zeros(40), "kv_segment_ids": torch.ones(40)}
    for x in run(backend, tensors, {name: ids.int() for name, ids in nobody.items()}, small_launches(16, 16)):
        assert (x == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_do_not_touch(backend: str) -> None:
    """Perturbing one document leaves output and gradients of every other document bit-identical, run after run."""
    torch.manual_seed(0)
    ids = torch.tensor([0] * 13 + [1] * 30 + [2] * 20, device=DEVICE)
    tensors = tuple(torch.randn(1, 2, 63, 16, device=DEVICE) for _ in range(4))
    other = tuple(x + (ids == 1)[:, None] * torch.randn_like(x) for x in tensors)
    params = small_launches(32, 32)
    first, second = (run(backend, x, {"segment_ids": ids}, params) for x in (tensors, other))
    for x, y, again in zip(first, second, run(backend, tensors, {"segment_ids": ids}, params)):
        assert torch.equal(x, again)
        assert torch.equal(x[:, :, ids != 1], y[:, :, ids != 1])
        assert not torch.equal(x[:, :, ids == 1], y[:, :, ids == 1])


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_documents_do_not_touch_in_the_model(backend: str) -> None:
    """In a whole model, changing one document's tokens leaves the other documents' logits and gradients bit-identical.

    The gradients are those of a loss over the other documents, for every parameter.
    """
    from model import ModelConfig, TransformerLM

    torch.manual_seed(0)
    tokens = torch.randint(1, 30, (1, 50), device=DEVICE)
    tokens[0, [12, 37]] = 0  # end of text
    ids = flash.segment_ids_from_tokens(tokens, 0)
    others = ids[0] != 1
    config = ModelConfig(vocab_size=30, context_length=64, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1,
                         d_ff=48, attention="flash")
    attention = functools.partial(flash.flash_attention, backend=backend, params=small_launches(32, 32))
    model = TransformerLM(config, None if backend == "auto" else attention).to(DEVICE)
    changed = torch.where((ids == 1) & (tokens != 0), tokens % 29 + 1, tokens)
    results = []
    for batch in (tokens, changed):
        logits = model(batch, positions=flash.positions_in_segments(ids), segment_ids=ids)  # (1, T, V)
        loss = F.cross_entropy(logits[0, others], batch[0, others])
        results.append((logits, torch.autograd.grad(loss, tuple(model.parameters()))))
    (logits, grads), (changed_logits, changed_grads) = results
    assert torch.equal(logits[:, others], changed_logits[:, others])
    assert not torch.equal(logits[:, ~others], changed_logits[:, ~others])
    assert all(torch.equal(x, y) for x, y in zip(grads, changed_grads))
    alone = model(tokens[:, 13:38])  # positions restart, so a document is the same on its own
    torch.testing.assert_close(logits[:, 13:38], alone, atol=1e-5, rtol=1e-5)


# --- 4. The functions that others call ---


@pytest.mark.parametrize("function", [flash.FlashAttentionPyTorch,
                                      pytest.param(flash.FlashAttentionTriton, marks=needs_kernels)])
@pytest.mark.parametrize("shape", [(37, 16), (3, 37, 16), (2, 2, 37, 16)])
def test_autograd_functions(function, shape: tuple[int, ...]) -> None:
    """.apply(q, k, v, is_causal) takes (..., T, D), and L = logsumexp is the only (..., T) tensor it saves."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    for is_causal in (False, True):
        out = function.apply(q, k, v, is_causal)
        scores = q.double() @ k.double().mT / 4
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        saved = [x for x in out.grad_fn.saved_tensors if x.shape == q.shape[:-1]]
        assert len(saved) == 1 and len(out.grad_fn.saved_tensors) == 5
        torch.testing.assert_close(saved[0].double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
        grad = torch.randn_like(out)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        got_grads, want_grads = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, want))
        for x, y in zip((out, *got_grads), (want, *want_grads)):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


def model_like(backend: str, ids: torch.Tensor):
    def function(q, k, v):
        out = flash.flash_attention(q * 2, k, v, segment_ids=ids, params=small_launches(32, 32), backend=backend)
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1).sin()
    return function


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile(backend: str) -> None:
    """flash_attention compiles into one graph, without breaks, with the same output and gradients."""
    torch.manual_seed(0)
    ids = torch.arange(50, device=DEVICE) // 20
    inputs = [torch.randn(1, h, 50, 16, device=DEVICE, requires_grad=True) for h in (2, 1, 1)]
    eager = model_like(backend, ids)
    compiled = torch.compile(eager, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    got, want = compiled(*inputs), eager(*inputs)
    for x, y in zip((got, *torch.autograd.grad(got.sum(), inputs)), (want, *torch.autograd.grad(want.sum(), inputs))):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("function", [flash.FlashAttentionPyTorch,
                                      pytest.param(flash.FlashAttentionTriton, marks=needs_kernels)])
def test_compiled_autograd_functions(function) -> None:
    """torch.compile(.apply) works as well, in one graph."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(lambda *inputs: function.apply(*inputs, True), fullgraph=True, backend="aot_eager")
    got, want = compiled(*inputs), function.apply(*inputs, True)
    for x, y in zip(torch.autograd.grad(got.sin().sum(), inputs), torch.autograd.grad(want.sin().sum(), inputs)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend: str) -> None:
    """Under activation checkpointing the gradients are bit-identical."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, h, 50, 16, device=DEVICE, requires_grad=True) for h in (2, 1, 1)]
    function = model_like(backend, torch.arange(50, device=DEVICE) // 20)
    want = torch.autograd.grad(function(*inputs).sum(), inputs)
    got = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False).sum(), inputs)
    for x, y in zip(got, want):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["tiles", pytest.param("triton", marks=needs_kernels)])
def test_custom_operators(backend: str) -> None:
    """torch's own checks of custom operators pass: schema, fake tensors, autograd registration, tracing."""
    q, k, v = (torch.randn(1, h, 20, 16, device=DEVICE, requires_grad=True) for h in (2, 1, 1))
    rule = flash.mask_rule(q, k, segment_ids=torch.arange(20, device=DEVICE) // 9)
    arguments = flash.operator_arguments(q, k, v, rule, 0.25, small_launches(32, 32), backend)
    torch.library.opcheck(flash.forward_op, (q, k, v, *arguments))
    out, L = (x.detach() for x in flash.forward_op(q, k, v, *arguments))
    q, k, v = q.detach(), k.detach(), v.detach()
    torch.library.opcheck(flash.backward_op, (q, k, v, out, L, torch.randn_like(out), *arguments))


def test_autocast_and_inference_mode() -> None:
    """Under autocast mixed dtypes become one; bounds made in inference mode can be used in training afterwards."""
    q, v = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash.flash_attention(q, q, v, backend="tiles").dtype == torch.bfloat16
    flash.plain_bounds.cache_clear()
    with torch.inference_mode():
        bounds = flash.plain_bounds(flash.MaskRule(), 20, 20, 16, 16)
    assert not bounds.is_inference() and flash.plain_bounds(flash.MaskRule(), 20, 20, 16, 16) is bounds


def test_every_argument_changes_something() -> None:
    """No mask argument is accepted and ignored, on any backend."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 24, 16) for _ in range(3))
    for backend in ("reference", "tiles", "sdpa"):
        plain = flash.flash_attention(q, k, v, backend=backend)
        ids = torch.arange(24) // 10
        for change in ({"causal": False}, {"segment_ids": ids}, {"window": 5}, {"scale": 0.7},
                       {"positions": torch.arange(24) // 2}, {"kv_positions": torch.arange(24) // 2},
                       {"segment_ids": ids, "kv_segment_ids": ids.flip(0)}):
            assert not torch.allclose(plain, flash.flash_attention(q, k, v, backend=backend, **change)), change


@pytest.mark.parametrize("arguments, sentence", [
    ({"q": (2, 30, 4, 16), "k": (2, 20, 2, 16), "v": (2, 20, 2, 16)}, "heads come before length"),
    ({"q": (20, 16)}, "must be (batch, heads, length, head_dim)"),
    ({"k": (1, 2, 20, 16)}, "must agree"),
    ({"v": (2, 2, 21, 16)}, "must agree"),
    ({"k": (2, 2, 20, 8)}, "must agree"),
    ({"q": (2, 3, 20, 16)}, "3 query heads cannot share 2 key heads"),
    ({"q": (2, 4, 0, 16)}, "at least 1"),
    ({"dtype": torch.int32}, "floating dtype"),
    ({"window": 0}, "at least 1"),
    ({"scale": -1.0}, "above 0"),
    ({"backend": "cuda"}, "one of auto, triton, tiles, sdpa, reference"),
    ({"segment_ids": torch.zeros(2, 19, dtype=torch.int32)}, "(2, 20) or (20,), but has torch.int32 of shape (2, 19)"),
    ({"segment_ids": torch.zeros(2, 20)}, "must be integers"),
    ({"q": (2, 4, 7, 16), "segment_ids": torch.zeros(7, dtype=torch.int32)},
     "both needed where 7 queries meet 20 keys"),
    ({"kv_segment_ids": torch.zeros(20, dtype=torch.int32)}, "both needed"),
    ({"positions": torch.zeros(1, 2, 20, dtype=torch.int32)}, "positions must be integers of shape (2, 20)"),
    ({"backend": "triton", "q": (2, 4, 20, 264), "k": (2, 2, 20, 264)}, "256 dims of 32 bits at most, not 264"),
    ({"backend": "triton", "dtype": torch.float64}, "not 16 of torch.float64"),
    ({"params": {"bwd": flash.Launch(16, 16, 4, 1)}}, "forward, dq and dkdv"),
])
def test_mistakes_are_one_sentence(arguments: dict, sentence: str) -> None:
    """What does not fit raises a ValueError that shows both sides."""
    arguments = {"q": (2, 4, 20, 16), "k": (2, 2, 20, 16), "v": (2, 2, 20, 16), "dtype": torch.float32, **arguments}
    dtype = arguments.pop("dtype")
    q, k, v = (torch.zeros(arguments.pop(name), dtype=dtype) for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        flash.flash_attention(q, k, v, **arguments)


def test_backend_is_said() -> None:
    """The automatic choice has a reason to print: dense masks up to a limit, tiles beyond, kernels on a GPU."""
    assert flash.choose_backend("cpu", torch.float32, 64)[0] == "sdpa"
    name, reason = flash.choose_backend("cpu", torch.float32, 64, 4096 * 4096)
    assert name == "sdpa" and "16,777,216 bytes" in reason
    assert flash.choose_backend("cpu", torch.float32, 64, 2**31)[0] == "tiles"
    if flash.triton is not None:
        assert flash.choose_backend("cuda", torch.bfloat16, 128)[0] == "triton"
    assert flash.choose_backend("cuda", torch.float64, 128)[0] == "sdpa"


@functools.cache
def start(code: str, *arguments: str) -> subprocess.Popen:
    """A program beside the tests; whoever asks for the same one again gets it, perhaps at its end."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_demonstration(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """`python flash.py` prints small errors for every backend and counts tiles; mistakes are a sentence and code 2."""
    flash.main(["--context_length", "70", "--num_heads", "2", "--num_kv_heads", "1", "--head_dim", "16"])
    text = capsys.readouterr().out
    errors = [float(x) for x in re.findall(r"\d\.\de-\d\d", text)]
    assert len(errors) >= 24 and max(errors) < 5e-3 and "visited" in text, text
    flash.main(["--show_attention_mask", "--context_length", "300"])
    assert "█" in capsys.readouterr().out
    for mistake, sentence in ((["--num_heads", "3"], "3 query heads cannot share 2"),
                              (["--window", "-3"], "at least 1"), (["--head_dim", "0"], "at least 1")):
        with pytest.raises(SystemExit) as stop:
            flash.main(mistake)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and sentence in error and error.startswith("flash.py: "), error
    if importlib.util.find_spec("matplotlib"):
        flash.main(["--plot", str(tmp_path / "mask.png"), "--context_length", "300"])
        assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, flash
q = torch.randn(1, 2, 30, 16, requires_grad=True)
flash.FlashAttentionPyTorch.apply(q, q, q, True).sum().backward()
for backend in ("auto", "tiles", "sdpa", "reference"):
    flash.flash_attention(q, q, q, window=7, backend=backend)
try:
    flash.flash_attention(q, q, q, backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton() -> None:
    """Without Triton installed everything but the kernels works, and asking for them is one sentence."""
    process = start(WITHOUT_TRITON)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "needs the package triton" in out, error


# --- 5. Without a GPU: what the compiler makes of the kernels for one ---

GATE = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton, flash
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

tools = Path(triton.__file__).parent / "backends/nvidia/bin"
kernels = {"forward": flash.forward_kernel, "dq": flash.dq_kernel, "dkdv": flash.dkdv_kernel}

def compiled(name, head_dim, launch, dtype, ids, positions, window, group):
    function = kernels[name]
    padded = triton.next_power_of_2(head_dim)
    constants = dict(GROUP=group, D=head_dim, D_PAD=padded, DV=head_dim, DV_PAD=padded,
                     CAUSAL=True, WINDOW=window, PRECISION="tf32", Q_TILE=launch.q_tile, K_TILE=launch.k_tile)
    constants |= {} if ids else {"q_ids": None, "k_ids": None}
    constants |= {} if positions else {"q_positions": None, "k_positions": None}
    signature, values, attributes = {}, {}, {}
    for index, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument], values[(index,)] = "constexpr", constants[argument]
            continue
        if argument in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"):
            signature[argument] = "*" + dtype
        elif argument in ("L", "delta"):
            signature[argument] = "*fp32"
        elif argument == "bounds" or argument.endswith(("_ids", "_positions")):
            signature[argument] = "*i32"
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
        if signature[argument][0] == "*" or argument.endswith(("_batch", "_head", "_row")) and argument[:6] != "bounds":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={
        "num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True})

for case in json.loads(sys.argv[1]):
    kernel = compiled(case[0], case[1], flash.Launch(*case[2]), *case[3:])
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        log = subprocess.run([get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx, "-o", folder + "/again"],
                             capture_output=True, text=True)
        usage, code = (subprocess.run([tools / tool, *flags, cubin], capture_output=True, text=True, check=True).stdout
                       for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", [])))
    assert log.returncode == 0, log.stderr
    print(json.dumps({"stack": int(re.search(r"STACK:(\d+)", usage)[1]), "wgmma": code.count("HGMMA"),
                      "registers": int(re.search(r"REG:(\d+)", usage)[1]),
                      "spills": len(re.findall(r"\b(LDL|STL)", code)),
                      "mma": len(re.findall(r"\bHMMA", code)), "shared": kernel.metadata.shared,
                      "serialized": "C7510" in log.stderr or "C7515" in log.stderr or "serializ" in log.stderr}))
"""


def has_assembler() -> bool:
    return bool(flash.triton) and (Path(flash.triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists()


def gate(cases: list[tuple]) -> list[dict]:
    """What ptxas makes of (kernel, head_dim, launch, dtype, ids, positions, window, group) for sm_90."""
    if not has_assembler():
        pytest.skip("this build of Triton has no assembler for NVIDIA GPUs")
    process = start(GATE, json.dumps(cases))
    out, error = process.communicate(timeout=900)
    assert process.returncode == 0, error[-2000:]
    return [json.loads(line) for line in out.splitlines()]


def cases_of_table(head_dims: tuple[int, ...]) -> list[tuple]:
    return [(kernel, head_dim, launch, "bf16", True, False, 0, 1)
            for head_dim in head_dims for kernel, launch in flash.LAUNCH_16_BIT[head_dim].items()]


@pytest.fixture(scope="module", autouse=True)
def work_meanwhile(request):
    """Two long ones work on another core while the tests before them run."""
    names = {item.name for item in request.session.items}
    if has_assembler() and "test_table_compiles_for_hopper[head_dims0]" in names:
        start(GATE, json.dumps(cases_of_table((64, 128))))
    if "test_without_triton" in names:
        start(WITHOUT_TRITON)


def assert_fits_hopper(case: tuple, found: dict) -> None:
    said = f"{case}: {found}"
    assert found["stack"] == 0 and found["spills"] == 0, f"registers are spilled, {said}"
    assert not found["serialized"], f"ptxas serializes wgmma, {said}"
    assert found["shared"] <= 232448, f"more than 227 KB of shared memory, {said}"
    if (case[0], case[1]) != ("dkdv", 256):  # the one entry on mma.sync
        assert found["wgmma"] > 0 and found["mma"] == 0, f"not on wgmma, {said}"


@pytest.mark.parametrize("head_dims", [(64, 128), pytest.param((256,), marks=pytest.mark.slow)])
def test_table_compiles_for_hopper(head_dims: tuple[int, ...]) -> None:
    """Each 16-bit entry compiles for sm_90 with a document mask: no spills, wgmma, not serialized, within 227 KB."""
    cases = cases_of_table(head_dims)
    for case, found in zip(cases, gate(cases), strict=True):
        assert_fits_hopper(case, found)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_every_variant_compiles_for_hopper(head_dim: int) -> None:
    """The same without a mask, in fp16, and with ids, positions, a window and grouped heads at once."""
    table = flash.LAUNCH_16_BIT[max(64, flash.triton.next_power_of_2(head_dim))]
    cases = [(kernel, head_dim, table[kernel], *variant) for kernel in table
             for variant in (("bf16", False, False, 0, 1), ("fp16", True, False, 0, 4), ("bf16", True, True, 500, 4))]
    for case, found in zip(cases, gate(cases), strict=True):
        assert_fits_hopper(case, found)


@pytest.mark.slow
def test_32_bit_table_compiles_for_hopper() -> None:
    """The 32-bit table compiles for sm_90 as TF32 on tensor cores, without spills, within 227 KB of shared memory."""
    cases = [(kernel, head_dim, launch, "fp32", True, False, 0, 1) for head_dim, table in flash.LAUNCH_32_BIT.items()
             for kernel, launch in table.items()]
    for case, found in zip(cases, gate(cases), strict=True):
        assert found["shared"] <= 232448 and found["mma"] > 0 and found["spills"] == 0, f"{case}: {found}"


# --- 6. On a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_shapes_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    """With the table's own tiles at lengths of thousands, documents, windows and groups equal the float64 reference."""
    torch.manual_seed(head_dim)
    tensors = tuple(torch.randn(1, heads, 1531, head_dim, device="cuda", dtype=dtype) for heads in (4, 2, 2, 4))
    ids = flash.segment_ids_from_tokens(torch.randint(0, 300, (1531,), device="cuda"), 0)
    for mask in ({}, {"causal": False}, {"segment_ids": ids}, {"segment_ids": ids, "window": 100},
                 {"positions": torch.arange(1531) // 2}):
        assert_close(run("triton", tensors, mask), exact(tensors, mask), max(tolerance_of(dtype), 1e-4))


@pytest.mark.gpu
def test_long_context_offsets() -> None:
    """Element offsets past 2^31 are right: the last queries of a long batch equal the same rows computed alone."""
    q = torch.randn(1, 140_000, 128, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # 2.3e9 elements
    out = flash.flash_attention(q, q, q, window=64)
    alone = flash.flash_attention(q[:, :, -128:], q[:, :, -192:], q[:, :, -192:], window=64,
                                  positions=torch.arange(64, 192), kv_positions=torch.arange(192), backend="reference")
    torch.testing.assert_close(out[:, :, -128:].float(), alone.float(), atol=2e-2, rtol=2e-2)
