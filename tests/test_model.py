"""model.py against torch's functions, transformers' Llama, autograd's own saved tensors and torch's FLOP counter."""

import doctest
import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from model import (
    PADDING_SEGMENT_ID,
    PRESETS,
    Embedding,
    FeedForward,
    KVCache,
    Linear,
    MixtureOfExperts,
    ModelConfig,
    MultiHeadSelfAttention,
    RMSNorm,
    RotaryPositionalEmbedding,
    SwiGLU,
    TransformerLM,
    count_parameters,
    document_places,
    flops_per_token,
    main,
    make_attention,
    mix_by_loop,
    mix_sorted,
    scaled_dot_product_attention,
    silu,
    softmax,
    training_memory,
)

# Irregular on purpose: no size is a power of two, and no two sizes are equal.
SMALL = dict(vocab_size=211, context_length=41, d_model=60, num_layers=3, num_heads=6, num_kv_heads=2, d_ff=76)
KINDS = ["naive", "sdpa", "flash"]

@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

def small_model(**switches) -> TransformerLM:
    return TransformerLM(ModelConfig(**(SMALL | switches))).eval()

def random_tokens(*size: int, vocab_size: int = 211) -> torch.Tensor:
    return torch.randint(vocab_size, size)

def test_doctests():
    """Every worked example in model.py gives what it says."""
    result = doctest.testmod(model_file)
    assert result.attempted > 4 and result.failed == 0

# --- the parts against torch ---

def test_softmax_equals_torch_and_survives_large_numbers():
    """softmax is torch.softmax along any dimension, also where exp overflows, gradient included."""
    x = torch.randn(3, 7, 5, dtype=torch.float64) * 500
    for dim in (0, 1, -1):
        torch.testing.assert_close(softmax(x, dim), torch.softmax(x, dim))
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((f(x, -1) * weight).sum(), x)[0] for f in (softmax, torch.softmax))
    torch.testing.assert_close(ours, theirs)

def test_the_gradient_of_an_embedding_is_the_same_each_time():
    """Rows of repeated ids are added up in one order on any number of threads: equal to the bit, and to float64."""
    embedding, ids, grad = Embedding(500, 64), torch.randint(0, 500, (16, 176)), torch.randn(16, 176, 64)
    ids[:, ::3] = 7
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        for _ in range(10):
            embedding.weight.grad = None
            embedding(ids).backward(grad)
            found.append(embedding.weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)
    exact = F.one_hot(ids.flatten(), 500).double().T @ grad.flatten(0, 1).double()
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-4)

def test_layers_equal_torch():
    """Linear, Embedding, RMSNorm, silu and the feed-forward networks equal their torch spellings."""
    x = torch.randn(2, 5, 12)
    linear, norm, embedding = Linear(12, 7), RMSNorm(12), Embedding(13, 12)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (12,), norm.weight, eps=1e-5))
    torch.testing.assert_close(silu(x), F.silu(x))
    ids = torch.tensor([[0, 12, 3], [3, 3, 1]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    with pytest.raises(IndexError):
        embedding(torch.tensor([13]))
    swiglu = SwiGLU(12, 20)
    w1, w2, w3 = swiglu.w1.weight, swiglu.w2.weight, swiglu.w3.weight
    torch.testing.assert_close(swiglu(x), F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2))
    for name, activation in {"silu": F.silu, "relu": F.relu, "relu2": lambda y: F.relu(y) ** 2}.items():
        ffn = FeedForward(12, 20, name)
        torch.testing.assert_close(ffn(x), F.linear(activation(F.linear(x, ffn.w1.weight)), ffn.w2.weight))

@torch.no_grad()
def test_linear_of_few_rows_is_the_same_product():
    """Without gradients, products of 1 to 33 rows take another road to the same numbers, in the same layout."""
    for d_out, shape in product((7, 12), ((12,), (1, 12), (1, 1, 12), (2, 1, 12), (3, 5, 12), (32, 12), (33, 12))):
        linear, x = Linear(12, d_out).double(), torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(linear(x), F.linear(x, linear.weight))
        assert linear(x).is_contiguous(), f"{shape} -> {d_out}"

def test_rmsnorm_computes_in_float32():
    """RMSNorm of half-precision input squares in float32 and rounds once, after the gain."""
    norm = RMSNorm(96)
    torch.nn.init.normal_(norm.weight)
    for dtype in (torch.bfloat16, torch.float16):
        x = (300 * torch.randn(5, 96)).to(dtype)  # 300^2 is beyond float16
        exact = F.rms_norm(x.double(), (96,), norm.weight.double(), eps=1e-5)
        assert norm(x).dtype == dtype
        torch.testing.assert_close(norm(x), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)

def test_attention_definition_equals_torch():
    """scaled_dot_product_attention equals torch's for any leading dimensions, with and without a mask."""
    for leading in ((), (3,), (2, 3), (2, 1, 3)):
        q, k, v = (torch.randn(*leading, n, d, dtype=torch.float64) for n, d in ((5, 6), (9, 6), (9, 4)))
        mask = torch.rand(*leading, 5, 9) > 0.5
        mask[..., 0] = True
        for m in (None, mask):
            ours = scaled_dot_product_attention(q, k, v, m)
            theirs = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=m)[0]
            torch.testing.assert_close(ours, theirs)

def test_a_query_without_keys_gets_zeros_and_no_gradient():
    """A fully masked row gives exact zeros, and no NaN reaches any gradient, in each of our attentions."""
    positions, segment_ids = torch.arange(9), torch.tensor([[0] * 4 + [5] * 3 + [PADDING_SEGMENT_ID] * 2] * 2)
    for kind in KINDS:
        q, k, v = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (6, 2, 2))
        out = make_attention(kind, positions, segment_ids)(q, k, v)
        assert out[:, :, 7:].abs().max() == 0, f"{kind}: padding must give zeros, got {out[:, :, 7:].abs().max()}"
        for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
            assert gradient.isfinite().all() and gradient[:, :, 7:].abs().max() == 0, kind

def test_rope_equals_its_definition():
    """RoPE turns neighbouring pairs by position * theta^(-2i/d), for positions of any shape and in any order."""
    theta, d_k, max_seq_len = 1234.5, 10, 23
    rope = RotaryPositionalEmbedding(theta, d_k, max_seq_len)
    x = torch.randn(2, 3, 7, d_k)
    for shape in ((7,), (1, 7), (2, 1, 7), (2, 3, 7)):
        positions = torch.randint(max_seq_len, shape)
        turned = rope(x, positions)
        everywhere = positions.expand(2, 3, 7)
        for b, h, t, i in product(range(2), range(3), range(7), range(d_k // 2)):
            angle = everywhere[b, h, t].item() * theta ** (-2 * i / d_k)
            number = complex(x[b, h, t, 2 * i], x[b, h, t, 2 * i + 1]) * complex(math.cos(angle), math.sin(angle))
            assert abs(complex(turned[b, h, t, 2 * i], turned[b, h, t, 2 * i + 1]) - number) < 1e-5
    assert not rope.state_dict(), "the table follows from the configuration and is not saved"
    assert rope(x.bfloat16(), positions).dtype == torch.bfloat16

def test_rope_keeps_its_digits_in_half_precision():
    """model.bfloat16() rounds the weights, not the turns; in float64 and after meta they are computed anew."""
    exact = RotaryPositionalEmbedding(10_000.0, 16, 4096).double().cos_sin
    assert exact.dtype == torch.float64 and (exact.square().sum(-1) - 1).abs().max() < 1e-15
    for convert in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("meta").to_empty(device="cpu")):
        rope = convert(RotaryPositionalEmbedding(10_000.0, 16, 4096))
        assert rope.cos_sin.dtype == torch.float32, f"the table is {rope.cos_sin.dtype}"
        torch.testing.assert_close(rope.cos_sin, exact.float(), atol=0, rtol=0)

def test_rope_scores_depend_on_distance_only():
    """The product of a turned query and a turned key is the same wherever the two stand at equal distance."""
    rope = RotaryPositionalEmbedding(10_000.0, 16, 100)
    q, k = torch.randn(2, 1, 16).double()
    scores = [rope(q, torch.tensor([p + 7])) @ rope(k, torch.tensor([p])).T for p in (0, 1, 50, 92)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(4, 1, 1), atol=1e-5, rtol=0)

def test_who_sees_whom_by_brute_force():
    """Each attention averages the values of keys not later, of the same segment, never padding; keys may have positions
    and segments of their own, and what is not given for them is the queries'."""
    rows = [torch.randint(low, high, (2, n)) for n in (5, 8) for low, high in ((0, 9), (-1, 2))]
    square = torch.arange(5), torch.tensor([3, 3, -1, 0, 3])
    for positions, segments, *keys in (rows, square):
        kv_positions, kv_segments = keys or (positions, segments)
        b, t, s = 2 if keys else 1, positions.shape[-1], kv_positions.shape[-1]
        q, k, v = torch.zeros(b, 2, t, 4), torch.zeros(b, 1, s, 4), torch.randn(b, 1, s, 4)
        outs = {kind: make_attention(kind, positions, segments, *keys)(q, k, v) for kind in KINDS}
        for row, query in product(range(b), range(t)):
            p, g, kp, kg = (x if x.dim() == 1 else x[row] for x in (positions, segments, kv_positions, kv_segments))
            seen = [j for j in range(s) if kp[j] <= p[query] and kg[j] == g[query] != -1]
            expected = v[row, 0, seen].mean(0) if seen else torch.zeros(4)
            for kind, out in outs.items():
                torch.testing.assert_close(out[row, :, query], expected.expand(2, 4), msg=lambda m, k=kind: f"{k}: {m}")

def test_document_places_by_counting():
    """Each end-of-text token ends its document, positions restart behind it and behind padding, padding has no id."""
    ids, padding = torch.randint(3, (4, 23)), torch.arange(23) < torch.tensor([0, 1, 5, 22])[:, None]
    for is_padding in (None, padding):
        places = document_places(ids, 0, is_padding)
        for row in range(4):
            start, document, before = 0, 0, None
            for t in range(23):
                empty = is_padding is not None and bool(padding[row, t])
                segment = PADDING_SEGMENT_ID if empty else document
                start = t if segment != before else start
                document, before = document + int(ids[row, t] == 0), segment
                got = places["positions"][row, t].item(), places["segment_ids"][row, t].item()
                assert got == (t - start, segment), f"row {row}, place {t}: {got} instead of {t - start}, {segment}"

@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_every_attention_equals_naive(num_kv_heads):
    """sdpa and flash give the naive result and gradients, plain causal and with segments and positions."""
    positions, segment_ids = torch.arange(11), torch.tensor([[0] * 4 + [2] * 5 + [-1] * 2, [3] * 6 + [0] * 5])
    for segments in (None, segment_ids):
        q = torch.randn(2, 6, 11, 8, requires_grad=True)
        k, v = (torch.randn(2, num_kv_heads, 11, 8, requires_grad=True) for _ in range(2))
        results = []
        for kind in KINDS:
            out = make_attention(kind, positions, segments, is_causal=segments is None)(q, k, v)
            results.append((out, *torch.autograd.grad(out.cos().sum(), (q, k, v))))
        for naive, sdpa, flash in zip(*results):
            torch.testing.assert_close(sdpa, naive, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(flash, naive, atol=1e-5, rtol=1e-4)

def test_self_attention_equals_torch_module():
    """MultiHeadSelfAttention without rotary positions is torch.nn.MultiheadAttention with the same weights."""
    ours, theirs = MultiHeadSelfAttention(24, 3), torch.nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.out_proj.weight.copy_(ours.output_proj.weight)
    x = torch.randn(2, 7, 24)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=later, need_weights=False)[0], atol=1e-5, rtol=1e-4)

# --- the whole ---

@pytest.mark.peers
@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_llama_in_float64(num_kv_heads, tie_embeddings):
    """The whole model equals transformers' LlamaForCausalLM with q and k rows permuted for its half-split RoPE."""
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(**(SMALL | dict(num_kv_heads=num_kv_heads, tie_embeddings=tie_embeddings)))
    ours = TransformerLM(config).double()
    for parameter in ours.parameters():  # norms too, so that a forgotten gain shows
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=1e-5,
            rope_theta=config.rope_theta,
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
        )
    ).double()
    names = {"token_embeddings": "model.embed_tokens", "ln_final": "model.norm", "lm_head": "lm_head"}
    inner = {"attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj"}
    inner |= {"attn.output_proj": "self_attn.o_proj", "ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    inner |= {"ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj", "ffn.w3": "mlp.up_proj"}
    for i in range(config.num_layers):
        names |= {f"layers.{i}.{mine}": f"model.layers.{i}.{theirs}" for mine, theirs in inner.items()}
    weights = {}
    for key, weight in ours.state_dict().items():
        name = names[key.removesuffix(".weight")]
        if name.endswith(("q_proj", "k_proj")):  # (0, 1, 2, 3, ...) -> (0, 2, ..., 1, 3, ...) inside every head
            weight = weight.view(-1, config.head_dim // 2, 2, config.d_model).transpose(1, 2).reshape(weight.shape)
        weights[f"{name}.weight"] = weight
    if tie_embeddings:  # ours scale the shared weights on the way in
        weights["model.embed_tokens.weight"] = weights["lm_head.weight"] * ours.embedding_scale
    llama.load_state_dict(weights)
    ids = random_tokens(2, 37)
    with torch.no_grad():
        ours_logits, llama_logits = ours(ids), llama(ids).logits
    # Llama computes its turns in float32 even here, hence not 1e-12.
    torch.testing.assert_close(ours_logits, llama_logits, atol=1e-4, rtol=1e-5)
    assert ours_logits.std() > 1, f"logits must be far from zero for this to mean something, std {ours_logits.std()}"

def test_state_dict_keys():
    """The keys are the documented ones, weights are (out, in), and tied models hold one tensor under two names."""
    model = small_model(num_layers=1)
    attention = [f"layers.0.attn.{name}_proj.weight" for name in ("q", "k", "v", "output")]
    block = [f"layers.0.{name}.weight" for name in ("ffn.w1", "ffn.w2", "ffn.w3", "ln1", "ln2")]
    ends = ["token_embeddings.weight", "ln_final.weight", "lm_head.weight"]
    assert sorted(model.state_dict()) == sorted(attention + block + ends)
    assert model.state_dict()["layers.0.attn.k_proj.weight"].shape == (20, 60)
    assert model.state_dict()["layers.0.ffn.w2.weight"].shape == (60, 76)
    tied = small_model(tie_embeddings=True)
    assert sorted(tied.state_dict()) == sorted(small_model().state_dict())
    assert tied.token_embeddings.weight is tied.lm_head.weight
    assert tied.embedding_scale * tied.lm_head.weight.std().item() == pytest.approx(1, rel=0.05)
    clone = small_model(tie_embeddings=True)
    clone.load_state_dict(tied.state_dict())
    assert clone.token_embeddings.weight is clone.lm_head.weight

SWITCHES = [
    dict(norm=norm, pos=pos, ffn=ffn, qk_norm=qk_norm, tie_embeddings=tied)
    for norm, pos, ffn, qk_norm, tied in product(
        ("pre", "post", "none"), ("rope", "none"), ("swiglu", "silu", "relu", "relu2"), (False, True), (False, True)
    )
]

def reference_logits(config: ModelConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The model written a second time, straight from the formulas, with torch's functions only."""
    c, d, n = config, config.d_model // config.num_heads, ids.shape[1]
    norm = lambda x, key: F.rms_norm(x, x.shape[-1:], weights[f"{key}.weight"], eps=1e-5)  # noqa: E731
    activation = {"swiglu": F.silu, "silu": F.silu, "relu": F.relu, "relu2": lambda y: F.relu(y) ** 2}[c.ffn]
    angles = torch.outer(torch.arange(n).double(), c.rope_theta ** (-torch.arange(0, d, 2).double() / d))
    turn = torch.zeros(n, d, d).double()  # (T, D, D): a matrix of 2 x 2 rotations for every position
    for i in range(d // 2):
        cos, sin = angles[:, i].cos(), angles[:, i].sin()
        rotation = torch.stack([cos, -sin, sin, cos], dim=-1).view(n, 2, 2)
        turn[:, 2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = rotation

    def attention(x, i):
        q, k, v = (F.linear(x, weights[f"layers.{i}.attn.{p}_proj.weight"]).view(2, n, -1, d) for p in "qkv")
        if c.qk_norm:
            q, k = norm(q, f"layers.{i}.attn.q_norm"), norm(k, f"layers.{i}.attn.k_norm")
        if c.pos == "rope":
            q, k = (torch.einsum("tij,bthj->bthi", turn, y) for y in (q, k))
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True, enable_gqa=True)
        return F.linear(out.transpose(1, 2).reshape(x.shape), weights[f"layers.{i}.attn.output_proj.weight"])

    def ffn(x, i):
        w = {key: weights[f"layers.{i}.ffn.{key}.weight"] for key in ("w1", "w2")}
        inner = activation(F.linear(x, w["w1"]))
        if c.ffn == "swiglu":
            inner = inner * F.linear(x, weights[f"layers.{i}.ffn.w3.weight"])
        return F.linear(inner, w["w2"])

    x = weights["token_embeddings.weight"][ids]
    for i in range(c.num_layers):
        for branch, ln in ((attention, f"layers.{i}.ln1"), (ffn, f"layers.{i}.ln2")):
            if c.norm == "pre":
                x = x + branch(norm(x, ln), i)
            elif c.norm == "post":
                x = norm(x + branch(x, i), ln)
            else:
                x = x + branch(x, i)
    x = norm(x, "ln_final") if c.norm == "pre" else x
    return F.linear(x, weights["lm_head.weight"])

def test_every_switch_in_float64():
    """Logits equal a second writing of the model for every combination of norm, pos, ffn and qk_norm."""
    for switches in SWITCHES[::2]:
        config = ModelConfig(**(SMALL | switches), rope_theta=123.0)
        model = TransformerLM(config).double().eval()
        for parameter in model.parameters():  # norms too, so that a forgotten gain shows
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
        ids = random_tokens(2, 23)
        with torch.no_grad():
            logits, expected = model(ids), reference_logits(config, model.state_dict(), ids)
        # The table of turns is float32, hence not 1e-12.
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4, msg=lambda m, s=switches: f"{s}: {m}")
        assert expected.std() > 0.05, f"{switches}: logits too small to tell anything, std {expected.std()}"

def test_first_loss_and_gradients_for_every_switch():
    """For all 96 combinations, with dropout in every third, the first loss is within 0.2 of ln V, every parameter gets
    a finite gradient, and the activations keep their size."""
    for index, switches in enumerate(SWITCHES):
        switches = dict(switches, dropout=0.0 if index % 3 else 0.1)
        config = ModelConfig(vocab_size=512, context_length=32, d_model=64, num_layers=5, num_heads=4, **switches)
        model = TransformerLM(config)
        ids = random_tokens(4, 33, vocab_size=512)
        hidden = model.forward_hidden(ids[:, :-1])
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, 1:].flatten())
        assert abs(loss.item() - math.log(512)) < 0.2, f"{switches}: loss {loss.item()} against ln V {math.log(512)}"
        assert hidden.square().mean() < 4, f"{switches}: mean square of the last activations {hidden.square().mean()}"
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{switches}: {name}"
            assert parameter.grad.abs().max() > 0, f"{switches}: {name} gets no gradient"

@pytest.mark.parametrize("sizes", [dict(vocab_size=9_973, d_model=72), dict(vocab_size=64, d_model=384)])
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_first_loss_at_other_sizes(sizes, norm):
    """The first loss is within 0.2 of ln V for vocabularies larger and much smaller than d_model, tied or not."""
    for tied in (False, True):
        config = ModelConfig(**sizes, context_length=16, num_layers=2, num_heads=12, norm=norm, tie_embeddings=tied)
        ids = random_tokens(4, 17, vocab_size=config.vocab_size)
        with torch.no_grad():
            loss = F.cross_entropy(TransformerLM(config)(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        assert abs(loss.item() - math.log(config.vocab_size)) < 0.2, f"{sizes} {norm} tied {tied}: {loss.item()}"

@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_causality(attention, norm):
    """Changing a token leaves every earlier logit bit-identical and changes its own."""
    model = small_model(attention=attention, norm=norm)
    ids = random_tokens(2, 41)
    changed = ids.clone()
    changed[:, 29] = (ids[:, 29] + 1) % 211
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :29], after[:, :29])
    assert (before[:, 29:] != after[:, 29:]).any(dim=-1).all()

@pytest.mark.parametrize("attention", KINDS)
def test_documents_do_not_see_each_other(attention):
    """Packed documents with segment ids and restarting positions give the logits of each document alone."""
    model = small_model(attention=attention)
    documents = [random_tokens(1, n) for n in (5, 17, 11)]
    packed = torch.cat([*documents, random_tokens(1, 3)], dim=1)
    segment_ids = torch.tensor([[4] * 5 + [0] * 17 + [9] * 11 + [PADDING_SEGMENT_ID] * 3])
    positions = torch.cat([torch.arange(n) for n in (5, 17, 11, 3)])
    with torch.no_grad():
        restarting = model(packed, positions=positions, segment_ids=segment_ids)
        running = model(packed, segment_ids=segment_ids)  # rotary scores depend on distances alone
        alone = torch.cat([model(document) for document in documents], dim=1)
        mixed = model(packed)
    torch.testing.assert_close(restarting[:, :33], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(running[:, :33], alone, atol=1e-5, rtol=1e-4)
    assert restarting.isfinite().all()
    assert (mixed[:, 5:33] - alone[:, 5:]).abs().max() > 1e-3, "without segment ids the documents must mix"

def test_positions_of_batches():
    """positions (T,), (1, T) and (B, T) with equal rows are the same; rows may differ."""
    model = small_model()
    ids, positions = random_tokens(2, 9), torch.arange(3, 12)
    with torch.no_grad():
        expected = model(ids, positions=positions)
        assert torch.equal(model(ids, positions=positions[None]), expected)
        assert torch.equal(model(ids, positions=positions.expand(2, 9)), expected)
        spread = model(ids, positions=torch.stack([positions, 2 * positions]))
    torch.testing.assert_close(spread[0], expected[0])
    assert not torch.allclose(spread[1], expected[1])

def test_replaced_attention_is_called_with_grouped_heads():
    """A callable given as `attention` replaces the local one in every layer and gets positions and segment ids."""
    calls = []

    def spy(q, k, v, *, positions, segment_ids):
        calls.append((q.shape, k.shape, positions, segment_ids))
        return make_attention("naive", positions, segment_ids)(q, k, v)

    config = ModelConfig(**SMALL)
    model = TransformerLM(config, attention=spy)
    local = TransformerLM(config)
    local.load_state_dict(model.state_dict())
    ids, segment_ids = random_tokens(2, 9), torch.tensor([[0] * 4 + [1] * 5] * 2)
    torch.testing.assert_close(model(ids, segment_ids=segment_ids), local(ids, segment_ids=segment_ids))
    assert len(calls) == config.num_layers
    assert calls[0][:2] == ((2, 6, 9, 10), (2, 2, 9, 10)) and calls[0][3] is segment_ids
    assert torch.equal(calls[0][2], torch.arange(9))
    with pytest.raises(AssertionError, match="local attention only"):
        model(ids, cache=KVCache(config, 2))

def test_forward_is_head_of_hidden_and_dropout_rests_in_eval():
    """forward is lm_head of forward_hidden; dropout acts in training only and follows the seed."""
    model = small_model(dropout=0.3)
    ids = random_tokens(2, 9)
    assert torch.equal(model(ids), model.lm_head(model.forward_hidden(ids)))
    assert torch.equal(model(ids), model(ids))
    model.train()
    torch.manual_seed(1)
    first, second = model(ids), model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first) and not torch.equal(first, second)

def test_autocast_bfloat16():
    """Under autocast the products run in bfloat16, the residual stream and the inside of norms in float32."""
    model = small_model()
    seen = {}
    for name in ("ln1", "attn.q_proj", "attn.output_proj"):
        module = model.layers[1].get_submodule(name)
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].dtype, y.dtype)}))
    ids = random_tokens(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
        for kind in KINDS:
            model.config.attention = kind
            torch.testing.assert_close(model(ids), logits, atol=0.05, rtol=0.05)
    assert seen["ln1"] == (torch.float32, torch.float32)
    assert seen["attn.q_proj"][1] == seen["attn.output_proj"][1] == logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(ids), atol=0.05, rtol=0.05)
    half = model.bfloat16()  # the whole model in half precision, as for sampling
    assert half(ids).dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).float(), logits.float(), atol=0.05, rtol=0.05)

def test_too_many_tokens():
    """More tokens than the context length is a sentence with both numbers."""
    with pytest.raises(ValueError, match="42 tokens .* 41"):
        small_model()(random_tokens(1, 42))

# --- decoding with a cache ---

DECODING = [dict(), dict(num_kv_heads=6), dict(num_kv_heads=1), dict(pos="none"), dict(norm="post", qk_norm=True)]

@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("switches", DECODING, ids=str)
@torch.no_grad()
def test_cached_decoding_equals_recomputing_everything(switches, attention):
    """Greedy decoding with the cache, prefilled in two pieces, gives token for token what recomputing gives."""
    model = small_model(attention=attention, **switches)
    cache = KVCache(model.config, 3)
    full = random_tokens(3, 11)
    model(full[:, :4], cache=cache)
    cached_logits = model(full[:, 4:], cache=cache)
    torch.testing.assert_close(cached_logits, model(full)[:, 4:], atol=1e-5, rtol=1e-4)
    for _ in range(model.config.context_length - 11):
        expected, got = model(full)[:, -1], cached_logits[:, -1]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(got.argmax(dim=-1), expected.argmax(dim=-1))
        full = torch.cat([full, got.argmax(dim=-1, keepdim=True)], dim=1)
        cached_logits = model(full[:, -1:], cache=cache)
    assert cache.length == model.config.context_length == full.shape[1]
    with pytest.raises(ValueError, match="of 41 tokens, holds 41: it cannot take . rows of 1 more"):
        model(full[:, -1:], cache=cache)
    cache.length = 0
    torch.testing.assert_close(model(full[:, -20:], cache=cache), model(full[:, -20:]), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("switches", DECODING, ids=str)
@torch.no_grad()
def test_batch_of_prompts_of_different_lengths(switches, attention):
    """Prompts of 3, 12 and 1 tokens, aligned at the right, decode in one batch as each does alone."""
    model = small_model(attention=attention, **switches)
    prompts = [random_tokens(n) for n in (3, 12, 1)]
    ids = torch.stack([F.pad(prompt, (12 - len(prompt), 0)) for prompt in prompts])
    segment_ids = torch.stack([F.pad(torch.zeros_like(p), (12 - len(p), 0), value=-1) for p in prompts])
    cache = KVCache(model.config, 3)
    next_ids = model(ids, segment_ids=segment_ids, cache=cache)[:, -1].argmax(dim=-1, keepdim=True)
    for step in range(20):
        prompts = [torch.cat([prompt, new]) for prompt, new in zip(prompts, next_ids)]
        assert cache.positions[:, cache.length - 1].tolist() == [2 + step, 11 + step, step]
        logits = model(next_ids, cache=cache)[:, -1]
        expected = torch.stack([model(prompt[None])[0, -1] for prompt in prompts])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        next_ids = logits.argmax(dim=-1, keepdim=True)
        assert torch.equal(next_ids[:, 0], expected.argmax(dim=-1))

@torch.no_grad()
def test_cache_with_explicit_positions_and_documents():
    """Positions and segments given to a cached call are used, and the next call goes on after them."""
    model = small_model()
    ids, cache = random_tokens(2, 9), KVCache(model.config, 2)
    segment_ids = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0])
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    model(ids[:, :7], positions=positions[:7], segment_ids=segment_ids[:7], cache=cache)
    got = model(ids[:, 7:], cache=cache)
    assert cache.positions[:, :9].tolist() == [positions.tolist()] * 2
    torch.testing.assert_close(got, model(ids[:, 4:])[:, 3:], atol=1e-5, rtol=1e-4)

def test_cache_memory():
    """bytes_per_token is the growth of keys and values: all heads of k and v, before they are repeated."""
    for num_kv_heads, dtype in ((6, torch.float32), (2, torch.float32), (2, torch.bfloat16)):
        config = ModelConfig(**(SMALL | dict(num_kv_heads=num_kv_heads)))
        cache = KVCache(config, 5, dtype=dtype)
        assert cache.bytes_per_token() == 2 * 3 * num_kv_heads * 10 * dtype.itemsize
        assert cache.keys.nbytes + cache.values.nbytes == 5 * 41 * cache.bytes_per_token()
        assert cache.keys.shape == (3, 5, num_kv_heads, 41, 10)

def test_cache_for_another_batch():
    """A cache made for another number of rows is refused with both numbers."""
    model = small_model()
    with pytest.raises(ValueError, match="made for 3 rows .* cannot take 2 rows"):
        model(random_tokens(2, 5), cache=KVCache(model.config, 3))

# --- a mixture of experts ---

EXPERTS = dict(num_experts=5, experts_per_token=2)

@pytest.mark.parametrize("switches", [dict(), dict(shared_experts=2), dict(experts_per_token=1), dict(d_ff=75),
                                      dict(experts_per_token=5, moe_every=3, norm="post")], ids=str)
def test_sorted_experts_equal_the_loop(switches):
    """The sorted mixture, run by run or with torch's grouped product, gives the loop's logits and gradients, also when
    an expert gets nothing; and it costs the FLOPs of the experts taken."""
    from torch.utils.flop_counter import FlopCounterMode

    model, ids, results = small_model(**(EXPERTS | switches), attention="naive").train(), random_tokens(3, 31), []
    if model.config.experts_per_token < 5:
        model.moe[2].bias[1] = -torch.inf
    grouped = model.config.d_ff % 4 == 0  # its rows must begin at multiples of 16 bytes
    for mix in (mix_sorted, partial(mix_sorted, grouped=grouped), mix_by_loop):
        for moe in model.moe.values():
            moe.mix = mix
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            logits = model(ids)
        (logits.cos().mean() + model.auxiliary_loss()).backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert counter.get_total_flops() == 3 * 31 * sum(flops_per_token(model.config, 31).values())
    for *ours, expected in zip(*results):
        for result in ours:
            torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-4)
    assert all(p.grad.abs().max() > 0 for p in model.parameters()), "every weight learns, the router among them"

def test_equal_experts_are_the_dense_network():
    """Experts with the dense network's weights give its output, whichever K of them are chosen."""
    for k in (2, 3, 5):
        config = ModelConfig(**(SMALL | EXPERTS | dict(experts_per_token=k)))
        moe, dense, x = MixtureOfExperts(config), SwiGLU(60, 76), torch.randn(2, 9, 60)
        with torch.no_grad():
            for name in ("w1", "w2", "w3"):
                getattr(moe, name).copy_(getattr(dense, name).weight.expand(5, -1, -1))
        torch.testing.assert_close(moe(x), dense(x), atol=1e-5, rtol=1e-4)

def test_auxiliary_loss():
    """The loss is E sum f P: 1 per layer when balanced, E when all goes to one; weighted, and absent on request."""
    model = small_model(**EXPERTS, balance_rate=0.5).train()
    with torch.no_grad():
        for moe in model.moe.values():
            moe.router.weight.zero_()
    model(random_tokens(2, 9))
    assert model.auxiliary_loss().item() == pytest.approx(0.5 * 3 * 1.0, abs=1e-6), "equal p: 1 whatever is chosen"
    moe = MixtureOfExperts(ModelConfig(**(SMALL | dict(num_experts=5, experts_per_token=1))))
    with torch.no_grad():
        moe.router.weight[3] = 1.0
        moe(torch.ones(1, 8, 60))
    assert moe.balance_loss.item() == pytest.approx(5), "everything on one of five experts"
    for switches in (dict(), EXPERTS | dict(balance="none"), EXPERTS | dict(balance="bias")):
        model = small_model(**switches)
        model(random_tokens(2, 9))
        assert model.auxiliary_loss() == 0.0, switches

def test_router_statistics_count_tokens():
    """Load, entropy and violation equal a count of the choices; recomputed blocks count once; evaluation repeats."""
    for checkpoint_activations in (False, True):
        model, seen = small_model(**EXPERTS, checkpoint_activations=checkpoint_activations).train(), []
        ids = [random_tokens(2, 9), random_tokens(3, 17)]
        model.layers[1].ln2.register_forward_hook(lambda module, inputs, y, seen=seen: seen.append(y.detach()))
        for batch in ids:
            (model(batch).sum() + model.auxiliary_loss()).backward()
        x = torch.cat([y.flatten(0, 1) for y in seen[:: 1 + checkpoint_activations]])
        p = torch.softmax(x @ model.layers[1].ffn.router.weight.T, dim=-1)
        counts = torch.bincount(p.topk(2).indices.flatten(), minlength=5).double()
        assert model.moe[1].step_counts[:-1].tolist() == counts.tolist(), "each choice once"
        row = model.router_statistics(lambda counts: 2 * counts)[1]  # as if two processes had counted the same
        assert row["layer"] == 1 and row["load"] == pytest.approx((counts / counts.sum()).tolist())
        assert row["violation"] == pytest.approx((counts.max() / counts.mean() - 1).item())
        assert row["entropy"] == pytest.approx(((-p * p.log()).sum(-1).mean() / math.log(5)).item(), rel=1e-5)
        assert torch.equal(model.eval()(ids[0]), model(ids[0])), "evaluation is deterministic"
        assert model.router_statistics()[0]["load"] != row["load"], "counted anew"

def test_biases_move_the_load():
    """With balance "bias" a router that feeds two experts only comes to feed all; the gates ignore the biases."""
    model = small_model(**EXPERTS, num_layers=1, balance="bias", balance_rate=0.01).train()
    ids, moe = random_tokens(8, 40), model.layers[0].ffn
    model.layers[0].ln2.register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.no_grad():
        moe.router.weight[3:] += 0.02  # times 60 ones: every token's logits of experts 3 and 4 are 1.2 higher
    violations = []
    for step in range(101):
        with torch.no_grad():
            model(ids)
        if step in (0, 100):
            violations.append(model.router_statistics()[0]["violation"])
            model(ids)
        model.update_router_biases()
    assert violations[0] > 0.4 and violations[1] < violations[0] / 4, f"before and after: {violations}"
    chosen = []
    moe.mix = lambda x, picked, *others: chosen.append(picked) or mix_sorted(x, picked, *others)
    for _ in range(5):  # of two micro-batches each
        before, _ = moe.bias.clone(), chosen.clear()
        for _ in range(2):
            model(random_tokens(1, 7))
        model.update_router_biases()
        load = torch.bincount(torch.cat(chosen).flatten(), minlength=5).float()
        torch.testing.assert_close(moe.bias, before + 0.01 * torch.sign(load.mean() - load))
    assert "layers.0.ffn.bias" in model.state_dict()
    everyone = MixtureOfExperts(ModelConfig(**(SMALL | dict(num_experts=5, experts_per_token=5))))
    x = torch.randn(7, 60)
    expected = everyone(x)
    everyone.bias.copy_(torch.randn(5))
    torch.testing.assert_close(everyone(x), expected)

def test_an_expert_switched_off():
    """No token reaches an expert with a bias of -inf, others take over, and a bias of 0 brings the old output back."""
    model, ids = small_model(**EXPERTS), random_tokens(4, 41)
    with torch.no_grad():
        before = model(ids)
        model.router_statistics()
        model.moe[1].bias[3] = -torch.inf
        without = model(ids)
        loads = [row["load"] for row in model.router_statistics()]
        assert loads[1][3] == 0 and sum(loads[1]) == pytest.approx(1) and loads[0][3] > 0
        assert (without - before).abs().max() > 1e-3
        model.moe[1].bias[3] = 0
        assert torch.equal(model(ids), before)

def test_the_router_computes_in_float32():
    """Under autocast and in a model of half precision the gates come from float32 logits."""
    model, kinds = small_model(**EXPERTS), []
    for moe in model.moe.values():
        moe.mix = lambda x, chosen, gates, *w: kinds.append(gates.dtype) or mix_sorted(x, chosen, gates, *w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(random_tokens(2, 9)).dtype == torch.bfloat16
    model.bfloat16()(random_tokens(2, 9))
    assert set(kinds) == {torch.float32} and len(kinds) == 6, f"gates are {kinds}"

def test_cached_decoding_with_experts():
    """With the cache each token takes the experts that it takes when everything is recomputed."""
    model, ids, cache = small_model(**EXPERTS), random_tokens(2, 20), KVCache(ModelConfig(**SMALL), 2)
    with torch.no_grad():
        got = [model(piece, cache=cache) for piece in ids.split([11] + [1] * 9, dim=1)]
        torch.testing.assert_close(torch.cat(got, dim=1), model(ids), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("switches", [dict(), EXPERTS, dict(dropout=0.3)], ids=str)
def test_checkpointed_activations_change_nothing_but_memory(switches):
    """Computing activations twice gives the same bits, loss and gradients, dropout included; far less is kept."""
    ids, results, kept = random_tokens(3, 29), [], []
    for checkpoint_activations in (False, True):
        torch.manual_seed(1)
        model = small_model(**switches, checkpoint_activations=checkpoint_activations).train()
        loss = model(ids).square().mean() + model.auxiliary_loss()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        kept.append(bytes_saved_by_autograd(model, ids))
    assert all(map(torch.equal, *results))
    assert kept[1] < kept[0] / 5, f"{kept[1]} bytes kept against {kept[0]}"
    configs = [ModelConfig(**(SMALL | switches | dict(num_layers=n)), checkpoint_activations=True) for n in (3, 7)]
    less, more = (training_memory(config, 3)["activations"] for config in configs)
    assert more - less == 4 * (4 * 3 * 41 * 60), "a block more: its input more"

# --- configuration ---

@pytest.mark.parametrize(
    "mistake, words",
    [
        (dict(d_model=100, num_heads=3), "d_model 100 .* num_heads 3"),
        (dict(num_heads=16, num_kv_heads=3), "num_heads 16.* num_kv_heads 3"),
        (dict(d_model=48, num_heads=16), "d_model / num_heads is 3"),
        (dict(num_layers=0), "num_layers is 0"),
        (dict(vocab_size=-5), "vocab_size is -5"),
        (dict(context_length=2.5), "context_length is 2.5"),
        (dict(d_ff=0), "d_ff is 0"),
        (dict(num_kv_heads=0), "num_kv_heads is 0"),
        (dict(norm="layer"), "norm is 'layer': choose one of pre, post, none"),
        (dict(ffn="gelu"), "swiglu, silu, relu, relu2"),
        (dict(pos="alibi"), "rope, none"),
        (dict(attention="fast"), "auto, naive, sdpa, flash"),
        (dict(dropout=1.0), "dropout 1.0"),
        (dict(rope_theta=0.0), "rope_theta 0.0"),
        (dict(num_experts=4, experts_per_token=5), "experts_per_token 1 to num_experts"),
        (dict(num_experts=4, moe_every=5), "moe_every 1 to num_layers"),
        (dict(num_experts=-1), "num_experts -1"),
        (dict(num_experts=4, ffn="relu"), "ffn swiglu"),
        (dict(num_experts=4, shared_experts=-1), "shared_experts"),
    ],
)
def test_mistakes_in_the_configuration(mistake, words):
    """Each impossible configuration is a ValueError of one sentence that names what clashes."""
    with pytest.raises(ValueError, match=words):
        ModelConfig(**mistake)

def test_d_ff_rule():
    """d_ff None is the nearest multiple of 64 to 8/3 d_model for swiglu and 4 d_model for the others."""
    for d_model in range(8, 5000, 8):
        d_ff = ModelConfig(d_model=d_model, num_heads=4).d_ff
        assert d_ff % 64 == 0 and (abs(d_ff - 8 * d_model / 3) <= 32 or d_ff == 64), f"{d_model}: {d_ff}"
    assert [ModelConfig(d_model=d, num_heads=4).d_ff for d in (512, 1600)] == [1344, 4288]
    assert {ModelConfig(ffn=ffn).d_ff for ffn in ("silu", "relu", "relu2")} == {2048}
    assert ModelConfig(d_model=60, num_heads=15, pos="none").head_dim == 4
    assert ModelConfig(d_model=45, num_heads=15, pos="none").head_dim == 3

# --- what it costs ---

@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name):
    """count_parameters equals the real model's, built on the meta device."""
    config = ModelConfig(**PRESETS[name])
    with torch.device("meta"):
        model = TransformerLM(config)
    assert sum(p.numel() for p in model.parameters()) == sum(count_parameters(config).values())

def test_published_parameter_counts():
    """The baseline has 22,696,448 parameters, GPT-2 XL's shape at d_ff 6400 2,127,057,600, Llama-7B's 6,738,415,616."""
    assert ModelConfig(**PRESETS["baseline"]) == ModelConfig(), "the defaults of ModelConfig are the baseline"
    assert sum(count_parameters(ModelConfig()).values()) == 22_696_448
    assert sum(count_parameters(ModelConfig(**PRESETS["gpt2-xl"], d_ff=6400)).values()) == 2_127_057_600
    assert sum(count_parameters(ModelConfig(**PRESETS["gpt2-xl"])).values()) == 1_640_452_800
    assert sum(count_parameters(ModelConfig(**PRESETS["7b"])).values()) == 6_738_415_616

def test_flops_of_gpt2_xl():
    """GPT-2 XL's shape: 4.513e12 forward FLOPs at context 1024 and 1.495e14 at 16384 (d_ff 6400)."""
    config = ModelConfig(**PRESETS["gpt2-xl"], d_ff=6400)
    short, long = flops_per_token(config), flops_per_token(config, 16_384)
    assert 1024 * sum(short.values()) == pytest.approx(4.513e12, rel=1e-3)
    assert 16_384 * sum(long.values()) == pytest.approx(1.495e14, rel=1e-3)
    shares = [round(100 * part / sum(short.values()), 1) for part in short.values()]
    assert shares == [22.3, 7.1, 66.9, 3.6]

@pytest.mark.parametrize("switches", [dict(), dict(ffn="relu"), dict(tie_embeddings=True, num_kv_heads=6)])
def test_flops_equal_torchs_counter(switches):
    """flops_per_token is what FlopCounterMode counts in a forward pass, and a third of forward plus backward."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small_model(attention="naive", **switches)
    expected = 2 * 31 * sum(flops_per_token(model.config, 31).values())
    with FlopCounterMode(display=False) as counter:
        logits = model(random_tokens(2, 31))
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * expected

def bytes_saved_by_autograd(model: TransformerLM, ids: torch.Tensor, **options) -> int:
    """Bytes of the distinct storages that the forward pass keeps for the backward pass, parameters not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids, **options)  # alive until the sum below, and its graph with it: no storage is used twice
    assert logits.untyped_storage().data_ptr() not in saved, "lm_head keeps its input, not its output"
    return sum(saved.values())

@pytest.mark.parametrize(
    "switches",
    [
        dict(),
        dict(norm="post"),
        dict(norm="none", pos="none"),
        dict(ffn="silu"),
        dict(ffn="relu"),
        dict(ffn="relu2"),
        dict(qk_norm=True),
        dict(num_kv_heads=6),
        dict(attention="naive"),
        dict(attention="naive", num_kv_heads=6),
        dict(num_experts=5),
        dict(num_experts=7, experts_per_token=3, shared_experts=1, moe_every=2, norm="post"),
    ],
    ids=str,
)
def test_activation_memory_is_what_autograd_saves(switches):
    """The activation formula is within 2 % of the bytes of the distinct storages that autograd really keeps."""
    model = small_model(**(dict(attention="sdpa") | switches)).train()
    expected = training_memory(model.config, 7, 39)["activations"]
    measured = bytes_saved_by_autograd(model, random_tokens(7, 39))
    assert measured == pytest.approx(expected, rel=0.02), f"measured {measured}, formula {expected}"

@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_loss_memory_is_what_autograd_saves(norm):
    """With training's loss, the gradients of hidden states and lm_head are kept, instead of what lm_head would read;
    `loss` counts them beside the logits of one chunk, and those of all tokens where they are fewer."""
    from train import linear_cross_entropy

    model, ids = small_model(attention="sdpa", norm=norm).train(), random_tokens(7, 39)
    head = partial(linear_cross_entropy, targets=random_tokens(7, 39))
    tokens, hidden_states, lm_head = 7 * 39, 4 * 7 * 39 * 60, 4 * 211 * 60
    more = bytes_saved_by_autograd(model, ids, head=head) - bytes_saved_by_autograd(model, ids)
    assert more == lm_head, f"{more} bytes more are kept than before the loss, not {lm_head}"
    for chunk in (100, 512):
        expected = hidden_states + lm_head + 4 * min(chunk, tokens) * 211
        assert training_memory(model.config, 7, 39, chunk=chunk)["loss"] == expected

def test_other_parts_of_memory():
    """Parameters, gradients and AdamW's moments take 16 bytes a parameter; the loss has logits of 512 tokens only."""
    memory, size = training_memory(ModelConfig(), 32), 4 * 22_696_448
    assert [memory[part] for part in ("parameters", "gradients", "AdamW moments")] == [size, size, 2 * size]
    assert memory["loss"] == 4 * (32 * 256 * 512 + 10_000 * 512 + 512 * 10_000)

# --- command line ---

def test_tables(capsys):
    """With no flags every preset is shown in lines of at most 120 columns; --preset shows one with its exact totals."""
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    for name in PRESETS:
        assert sum(line.startswith(f"{name} ") for line in lines) == 3, name
    main(["--preset", "baseline", "--batch_size", "3", "--context_length", "100"])
    out = capsys.readouterr().out
    assert "22,696,448" in out
    assert f"{sum(training_memory(ModelConfig(), 3, 100).values()):,}" in out
    assert f"{sum(flops_per_token(ModelConfig(), 100).values()):,}" in out

@pytest.mark.parametrize(
    "argv, words",
    [(["--preset", "gpt5"], "gpt5"), (["--batch_size", "0"], "--batch_size"), (["--batch_size", "x"], "'x'"),
     (["--context_length", "-1"], "--context_length"), (["--presets"], "--presets")],
)
def test_mistakes_on_the_command_line(argv, words, capsys):
    """A user's mistake is one sentence on stderr and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.startswith("model.py: ") and error.count("\n") == 1
