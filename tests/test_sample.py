"""sample.py: distributions against brute force, the cache against recomputing, text against its bytes."""

import doctest
import json
import shutil
from pathlib import Path

import pytest
import torch

import sample
import train
from bpe import Tokenizer
from flash import positions_in_segments, segment_ids_from_tokens
from model import ModelConfig, TransformerLM
from sample import draw, generate, next_token_probabilities, write_samples

CAPACITY = 16  # tokens that the tiny model sees

def tiny_model(**more) -> TransformerLM:
    torch.manual_seed(0)
    config = dict(vocab_size=50, context_length=CAPACITY, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2)
    model = TransformerLM(ModelConfig(**{**config, **more})).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform, so that greedy choices mean something
    return model

def brute_force(logits, temperature, top_k, top_p):
    """The definition, token by token in Python floats."""
    p = torch.softmax(logits.double() / temperature, -1).tolist()
    order = sorted(range(len(p)), key=lambda v: (-p[v], v))
    kept = order[:top_k]
    if top_p is not None:
        total, nucleus = sum(p[v] for v in kept), []
        for v in kept:
            nucleus.append(v)
            if sum(p[u] for u in nucleus) / total >= top_p:
                break
        kept = nucleus
    total = sum(p[v] for v in kept)
    return torch.tensor([p[v] / total if v in kept else 0.0 for v in range(len(p))])

@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k, top_p", [(None, None), (5, None), (None, 0.6), (7, 0.8), (1, None), (None, 1e-9)])
def test_filters_equal_the_definition(temperature, top_k, top_p):
    """Temperature, top-k and top-p, alone and together, equal a loop over sorted probabilities."""
    logits = torch.randn(31, generator=torch.Generator().manual_seed(1)) * 2
    ours = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(ours, brute_force(logits, temperature, top_k, top_p), atol=1e-6, rtol=1e-5)
    assert ours.sum().item() == pytest.approx(1)

def test_draws_follow_the_probabilities():
    """50,000 draws lie within four standard deviations of every probability, and one of probability 0 never comes."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.1999, 0.0001, 0.0])
    counts = torch.bincount(torch.tensor(draw(p.expand(50_000, 7), [torch.Generator().manual_seed(3)] * 50_000)))
    counts = torch.nn.functional.pad(counts, (0, 7 - len(counts))).double()
    assert counts[p == 0].sum() == 0, f"drawn with probability 0: {counts}"
    deviation = (counts - 50_000 * p).abs() / (50_000 * p * (1 - p)).sqrt().clamp(min=1)
    assert deviation.max() < 4, f"{counts} against {50_000 * p}"

def test_zero_temperature_is_greedy():
    """temperature 0 puts everything on the greatest logit, row by row, and so does one too small to divide by."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    greedy = torch.nn.functional.one_hot(logits.argmax(-1), 9).float()
    for temperature in (0.0, 1e-60, 1e-38, 2e-6):
        assert torch.equal(next_token_probabilities(logits, temperature=temperature), greedy), temperature

@pytest.mark.parametrize("more", [{}, {"num_kv_heads": 4}, {"pos": "none"}, {"qk_norm": True, "ffn": "relu2"}])
@pytest.mark.parametrize("prompts", [[[1]], [[1, 2, 3, 4, 5], [7], [8, 9, 10]], [list(range(40))]])
def test_cache_equals_recomputing(more, prompts):
    """Token for token the same text with and without the cache, over full windows, for prompts of unequal lengths."""
    model = tiny_model(**more)
    for options in ({"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.98, "seed": 5}):
        naive = list(generate(model, prompts, 45, use_cache=False, **options))
        cached = list(generate(model, prompts, 45, use_cache=True, **options))
        assert naive == cached
        assert len(naive) == 45
    if "pos" not in more:  # without positions an untrained model soon repeats itself
        assert len(set(map(tuple, naive))) > 3, "a text that never changes would prove nothing"

@pytest.mark.parametrize("prompt", [[7], [7, 3, 4], [3, 4, 7, 5, 6], [7, 7, 9], list(range(40))])
def test_a_doc_mask_model_reads_documents_as_in_training(prompt):
    """With doc_mask every token is the argmax over its own document alone, counted from 0, where token 7 ends one; rows
    of a batch, the cache and no cache agree; without a stop_id nothing is a boundary."""
    model = tiny_model(doc_mask=True)
    for use_cache in (True, False):
        window = list(prompt)[-CAPACITY:]
        for token, _ in generate(model, [prompt, [1]], 45, temperature=0.0, stop_id=7, use_cache=use_cache):
            segment_ids = segment_ids_from_tokens(torch.tensor([window]), 7)
            positions = positions_in_segments(segment_ids)
            packed = model(torch.tensor([window]), positions=positions, segment_ids=segment_ids)[0, -1]
            document = window[-1 - window[-2::-1].index(7) :] if 7 in window[:-1] else window
            alone = model(torch.tensor([document]))[0, -1]
            torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
            assert token in (alone.argmax().item(), None) and (token is not None or alone.argmax().item() == 7)
            if token is None:
                break
            window = [*(window[-8:] if len(window) == CAPACITY else window), token]
        plain = list(generate(model, [prompt], 20, temperature=0.0, use_cache=use_cache))
        assert plain == list(generate(tiny_model(), [prompt], 20, temperature=0.0)), "no boundaries: one document"

def test_greedy_text_is_the_argmax_of_the_whole_context():
    """Without the cache and before the window is full, every token is the argmax of a plain forward over all so far."""
    model, text = tiny_model(), [3, 1, 4]
    for (token,) in generate(model, [[3, 1, 4]], 12, temperature=0.0, use_cache=False):
        assert token == model(torch.tensor([text]))[0, -1].argmax().item()
        text.append(token)

def test_a_full_window_keeps_its_last_half():
    """When 16 tokens are there, the next prediction reads the last 8 and the new one: the rule as stated."""
    model, prompt = tiny_model(), [5, 6, 7]
    text = prompt + [row[0] for row in generate(model, [prompt], 40, temperature=0.0)]
    window = list(prompt)
    for token in text[len(prompt) :]:
        assert token == model(torch.tensor([window]))[0, -1].argmax().item()
        window = (window[-8:] if len(window) == 16 else window) + [token]

@pytest.mark.parametrize("context_length", [1, 2, 3])
def test_smallest_windows(context_length):
    """Windows of one, two and three tokens are halved (1 -> 0, 3 -> 1) and go on, with the cache as without."""
    model = tiny_model(context_length=context_length)
    texts = [list(generate(model, [[7, 8], [9]], 12, seed=1, use_cache=use_cache)) for use_cache in (True, False)]
    assert texts[0] == texts[1] and len(texts[0]) == 12

@pytest.mark.parametrize("prompts", [[[1], []], [[50]], [[3, -1]]])
def test_prompts_that_the_model_cannot_read(prompts):
    """An empty prompt and ids that the vocabulary does not have are one sentence, not an IndexError or another row."""
    with pytest.raises(ValueError, match="outside 0 .. 49"):
        next(generate(tiny_model(), prompts, 5))

def test_rows_do_not_depend_on_their_neighbours():
    """A prompt among longer and shorter ones continues as it does alone with the same seed."""
    model = tiny_model()
    together = list(generate(model, [[1, 2, 3, 4], [9]], 10, seed=3))
    alone = list(generate(model, [[9]], 10, seed=4))
    assert [row[1] for row in together] == [row[0] for row in alone]

def test_stop_token_ends_a_row_and_then_the_text():
    """A row is None from its stop token on, the stop token is not shown, and the loop ends when all have stopped."""
    model = tiny_model()
    free = [row[0] for row in generate(model, [[1]], 30, seed=1)]
    stop = free[6]
    stopped = [row[0] for row in generate(model, [[1]], 30, seed=1, stop_id=stop)]
    assert stopped == free[: free.index(stop)]

def test_text_is_never_half_a_character(monkeypatch):
    """Characters of two to four bytes, cut anywhere, come out whole; bytes that are no character become U+FFFD."""
    def printed(vocab: dict[int, bytes], *rows: list) -> list[str]:
        pieces = []
        monkeypatch.setattr(sample, "generate", lambda *_, **__: zip(*rows))
        monkeypatch.setattr(sample, "print", lambda *text, **_: pieces.extend(text), raising=False)
        assert len(write_samples(None, vocab, [0], len(rows))) == 1 + len(rows[0])
        return pieces
    text = "naïve – 牛 🙂!"
    pieces = printed({b: bytes([b]) for b in range(256)}, list(text.encode("utf-8")))
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces)
    pieces = printed({0: b"a", 1: b"\xf0\x9f"}, [0, 1, None], [0, 1, 7])
    assert "".join(pieces) == "a\ufffd\n--- 2 ---\na\ufffd\ufffd", "a character that is not ended, an id without bytes"

@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("the cat sat on the mat. " * 400, encoding="utf-8")
    train.main([f"--dataset={folder / 'text.txt'}", f"--data_dir={folder / 'data'}", f"--out_dir={folder}",
                "--vocab_size=270", "--context_length=16", "--d_model=32", "--num_layers=1", "--num_heads=2",
                "--batch_size=8", "--max_steps=30", "--eval_interval=30", "--lr=0.02", "--device=cpu"])
    return folder / "text-1"

def test_command_line_writes_a_text(run, capsys):
    """The prompt comes first, the text is the same with and without the cache, and the seed decides it."""
    texts, cpu = [], ["--device=cpu"]
    for more in ([], ["--no_cache"], ["--seed=1"]):
        sample.main([f"--run={run}", "--prompt=the cat", "--max_new_tokens=30", "--temperature=2", *cpu, *more])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("the cat") and len(texts[0]) > 20
    assert texts[0] == texts[1] != texts[2]

def test_no_token_is_prepended_that_training_never_met(run, tmp_path, capsys, monkeypatch):
    """Where the checkpoint says that the text had no documents, a text begins with the prompt or a line's end."""
    prompts = []
    monkeypatch.setattr(sample, "write_samples", lambda model, tokenizer, prompt, *_, **__: prompts.append(prompt))
    monkeypatch.setattr(sample, "cost_of", lambda *_: "")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = max(copy.glob("checkpoint_*.pt"))
    payload = torch.load(path, weights_only=True)
    for documents in (True, False):
        torch.save({**payload, "documents": documents}, path)
        for text in ("the cat", ""):
            sample.main([f"--run={copy}", "--device=cpu", "--prompt", text])
    tokenizer = Tokenizer.load(run)
    end_of_text, the_cat = tokenizer.token_ids[b"<|endoftext|>"], tokenizer.encode("the cat")
    assert prompts == [[end_of_text, *the_cat], [end_of_text], the_cat, tokenizer.encode("\n")]

def test_several_samples_and_a_long_prompt(run, capsys):
    """Four samples are four texts, each behind the prompt; one longer than the context is cropped and said; special
    tokens are read."""
    prompt = "the cat sat. " * 20 + "<|endoftext|>"
    sample.main([f"--run={run}", "--num_samples=4", "--max_new_tokens=12", "--device=cpu", "--prompt", prompt])
    printed = capsys.readouterr()
    assert printed.out.count(prompt) == 4
    assert printed.out.count("\n--- ") == 3 and "sees the last 16" in printed.err
    assert "tokens/s" in printed.err and "bytes a token" in printed.err

@pytest.mark.parametrize("more, said", [
    (["--temperature=-1"], "temperature"), (["--temperature=nan"], "temperature"), (["--num_samples=0"], "num_samples"),
    (["--top_p=0"], "top_p"), (["--top_k=0"], "top_k"),
    (["--max_new_tokens=0"], "max_new_tokens"), (["--device=cuda:9"], "--device"),
    (["--run=no/such/run"], "no/such/run"), (["--seed=-1"], "--seed"), (["--top_q=1"], "--top_q"),
    (["--top_k=few"], "--top_k"), (["--dtype=int8"], "--dtype"),
])
def test_mistakes_are_one_sentence(run, capsys, more, said):
    """A mistake ends in one line on stderr and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--run={run}", "--device=cpu", *more])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and said in error, error

def test_damaged_runs_are_refused(run, tmp_path, capsys):
    """A cut checkpoint, a flipped bit, a tokenizer that is missing or not the run's: one sentence each."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    checkpoint = max(copy.glob("checkpoint_*.pt"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        sample.main([f"--run={copy}", "--device=cpu"])
    assert "unreadable checkpoint" in capsys.readouterr().err
    shutil.copyfile(max(run.glob("checkpoint_*.pt")), checkpoint)
    theirs = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    theirs["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(theirs), encoding="utf-8")
    for said in ("is damaged", "is not what this run was trained with"):  # by merges.txt, then by the checkpoint
        with pytest.raises(SystemExit) as stopped:
            sample.main([f"--run={copy}", "--device=cpu"])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
        (copy / "merges.txt").unlink(missing_ok=True)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--run={copy}", "--device=cpu"])
    assert stopped.value.code == 2 and "tokenizer.json" in capsys.readouterr().err
    damaged = bytearray(checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit in the midst of the weights, which torch.load would not notice
    checkpoint.write_bytes(damaged)
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--run={copy}", "--device=cpu"])
    assert stopped.value.code == 2 and "unreadable checkpoint" in capsys.readouterr().err

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(run, capsys, dtype):
    """A model in half precision writes a text too, and its cache takes half the bytes."""
    sample.main([f"--run={run}", "--max_new_tokens=30", "--device=cpu", f"--dtype={dtype}"])
    printed = capsys.readouterr()
    assert len(printed.out) > 20 and "a cache takes 128 bytes a token" in printed.err

def test_doctests():
    """The worked examples in the docstrings are true."""
    assert doctest.testmod(sample).failed == 0
