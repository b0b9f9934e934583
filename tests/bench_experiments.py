"""What is each part worth? Experiments: every one is a handful of runs of train.py, a table and a picture.

    python tests/bench_experiments.py                       the list, with the number of runs
    python tests/bench_experiments.py norms                 run what is missing, read back the rest, print the table
    python tests/bench_experiments.py norms --seeds 0 --plot norms.png --jobs 2

A run lives in a folder of --out_dir that is named after its flags, so experiments share the runs that they have in
common, and its flags stand beside its result. What is compared has the same seeds, so the same first parameters (where
shapes agree) and the same batches. Scores are of the whole validation text, in nats per byte; below the entropy of
their grammar (the floor) stories cannot get. Runs that share the cores (--jobs) are good for scores, not for seconds.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bpe import END_OF_TEXT, KINDS, Problem, arithmetic_problems, story_nats  # noqa: E402

SHORT = ("--dataset stories --data_bytes 2500000 --max_steps 100 --warmup_steps 10 --eval_interval 100 "
         "--eval_tokens 1000000 --log_interval 5")  # 280,000 tokens, less than a minute
CHARACTERS = ("--dataset shakespeare --vocab_size 256 --no-tie_embeddings --context_length 128 --batch_size 8 "
              "--warmup_steps 50 --eval_interval 500 --eval_tokens 1000000 --log_interval 25")
# 374 tokens: parts of words, but no two digits in one. doc_mask: a window holds three problems, and with another one's
# rules in sight the model does not learn to follow a chain of them.
SUMS = ("--dataset arithmetic --vocab_size 374 --context_length 160 --batch_size 32 --doc_mask --lr 1.2e-2 "
        "--eval_interval 250 --eval_tokens 60000 --log_interval 50")
BEST_MUON, BEST_ADAMW = "--lr 4.8e-2", "--optimizer adamw --lr 8e-3"  # as learning-rates finds

# name -> (what is asked, flags of all runs, {variant: its flags}, seeds). What is not said is train.py's default.
EXPERIMENTS: dict[str, tuple[str, str, dict[str, str], int]] = {
    "learning-rates": ("which rate is best, and where does training break?", SHORT, {
        **{f"muon-{lr}": f"--lr {lr}" for lr in ("1.5e-3", "6e-3")}, "muon-1.2e-2": "",
        **{f"muon-{lr}": f"--lr {lr}" for lr in ("2.4e-2", "4.8e-2", "0.1", "0.4", "1.6")},
        **{f"adamw-{lr}": f"--optimizer adamw --lr {lr}"
           for lr in ("4e-3", "8e-3", "1.2e-2", "1.6e-2", "3.2e-2", "6.4e-2", "1")},
    }, 3),
    "optimizers": ("Muon against AdamW, both at their best rate, at equal tokens and with fewer steps", SHORT, {
        "adamw": BEST_ADAMW, "muon": BEST_MUON, "muon-65-steps": f"{BEST_MUON} --max_steps 65 --warmup_steps 6"}, 3),
    "batch-sizes": ("the same tokens in fewer, larger steps; the rate by the square root of the batch", SHORT, {
        "16": BEST_MUON, **{
            f"{size}": f"--batch_size {size} --max_steps {1600 // size} --warmup_steps {160 // size} --lr {lr:.2g}"
            for size in (4, 8, 32, 64) for lr in [4.8e-2 * math.sqrt(size / 16)]}}, 3),
    "norms": ("RMSNorm before each branch, after each sum, or none", SHORT, {
        "pre": "", "post": "--norm post", "none": "--norm none", "none, lower rate": "--norm none --lr 6e-3",
        "pre, 2.4e-2": "--lr 2.4e-2", "post, 2.4e-2": "--lr 2.4e-2 --norm post"}, 3),
    "qk-norm": ("with and without norms of queries and keys", SHORT, {"with": "", "without": "--no-qk_norm"}, 3),
    "positions": ("rotary positions, or none at all", SHORT, {"rope": "", "none": "--pos none"}, 3),
    "activations": ("the gated network against two matrices of as many parameters", SHORT, {
        "swiglu": "", **{ffn: f"--ffn {ffn}" for ffn in ("silu", "relu", "relu2")}}, 3),
    "documents": ("attention to the own document only, or to all before", SHORT, {"all": "", "own": "--doc_mask"}, 3),
    "experts": ("two experts of half the width for each token, of 8 and of 3, against one network", SHORT, {
        "dense": "", "8, top 2": "--num_experts 8 --experts_per_token 2 --d_ff 160",  # half of 320: as many FLOPs
        "3, top 2": "--num_experts 3 --experts_per_token 2 --d_ff 160",
        "dense, as long as 8": "--max_steps 130 --warmup_steps 13"}, 3),
    "shakespeare": ("Tiny Shakespeare, byte by byte", CHARACTERS, {"muon": "--lr 1e-2 --max_steps 1000"}, 3),
    "arithmetic": ("problems solved to the letter, of the sizes trained on and beyond", SUMS, {
        "muon": "--max_steps 5000"}, 1),
}


Run = tuple[str, str, int]  # experiment, variant, seed


def folder_of(run: Run, out_dir: Path) -> Path:
    experiment, variant, seed = run
    _, common, variants, _ = EXPERIMENTS[experiment]
    kind = {SHORT: "short", CHARACTERS: "characters", SUMS: "sums"}[common]
    return out_dir / f"{kind} {variants[variant]} s{seed}".replace("--", "").replace(" ", "-")


def result_of(folder: Path) -> dict | None:
    """The last evaluation of a run that came to its end, {"diverged": step} of one that broke, None of any other."""
    if (folder / "diverged").exists():
        return {"diverged": (folder / "diverged").read_text()}
    with contextlib.suppress(OSError, ValueError, IndexError):
        steps = json.loads((folder / "config.json").read_text())["train"]["max_steps"]
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        if last["step"] == steps and "val_loss" in last:
            return {**last, "nats/byte": last["val_bits_per_byte"] * math.log(2)}
    return None


def run_all(runs: list[Run], out_dir: Path, jobs: int) -> None:
    """Run what is missing, several at once; a stopped run goes on."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    missing = {folder_of(run, out_dir): run for run in runs if not result_of(folder_of(run, out_dir))}
    waiting, lock = iter(missing.items()), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                folder, (experiment, variant, seed) = next(waiting, (None, ("", "", 0)))
            if folder is None:
                return
            _, common, variants, _ = EXPERIMENTS[experiment]
            place = ["--out_dir", str(out_dir), "--run_name", folder.name]
            flags = shlex.split(f"{common} {variants[variant]} --seed {seed}")  # of a flag twice the last one counts
            if (folder / "config.json").exists():  # it was stopped
                flags = ["--resume"]
            done = subprocess.run([sys.executable, "train.py", *place, *flags], cwd=ROOT, env=environment,
                                  capture_output=True, text=True)
            if done.returncode and "is not finite" not in done.stderr and "the loss is" not in done.stderr:
                print(f"{folder.name}: {done.stderr.strip()}", file=sys.stderr)
            elif done.returncode:
                (folder / "diverged").write_text(done.stderr.strip().removeprefix("train.py: ").split(":")[0])
            print(f"{folder.name}: {(done.stdout.strip().splitlines() or ['?'])[-2:][0]}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def table_of(experiment: str, seeds: list[int], out_dir: Path) -> str:
    """One row a variant: its scores, seed by seed; how far it is from the first variant, seed by seed; its seconds."""
    _, common, variants, _ = EXPERIMENTS[experiment]
    found = {v: {s: r for s in seeds if (r := result_of(folder_of((experiment, v, s), out_dir)))} for v in variants}
    first = next(iter(variants))
    rows = [["variant", "nats/byte, seed by seed", "over the first", "seconds", "flags"], ["---"] * 5]
    for variant, results in found.items():
        scores = {s: r.get("nats/byte", math.inf) for s, r in results.items()}
        ratios = [scores[s] / found[first][s]["nats/byte"] for s in scores if "nats/byte" in found[first].get(s, {})]
        shown = [f"broke at {r['diverged']}" if "diverged" in r else
                 f"{r['exact_match']:.1%} solved" if "exact_match" in r else f"{r['nats/byte']:.4f}"
                 for r in results.values()]
        seconds = [r["seconds"] for r in results.values() if "seconds" in r]
        median = statistics.median(seconds) if seconds else math.nan
        rows.append([variant, " ".join(shown) or "-", f"{statistics.median(ratios):.3f}" if ratios else "-",
                     f"{median:.0f}", f"`{variants[variant]}`" if variants[variant] else ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\nall with `{common}`"


def plot(experiments: list[str], seed: int, out_dir: Path, picture: Path) -> None:
    """Training loss by step, a panel for each experiment."""
    from matplotlib import pyplot, ticker

    pyplot.switch_backend("Agg")
    columns = min(3, len(experiments))
    rows = math.ceil(len(experiments) / columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4.5 * columns, 3.5 * rows), squeeze=False,
                                     layout="constrained")
    for experiment, panel in itertools.zip_longest(experiments, panels.flat):
        if experiment is None:
            panel.axis("off")
            continue
        for number, variant in enumerate(EXPERIMENTS[experiment][2]):
            log = folder_of((experiment, variant, seed), out_dir) / "log.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            lines = [line for line in lines if "train_loss" in line and line["step"] > 1]
            panel.plot([line["step"] for line in lines], [line["train_loss"] for line in lines], label=variant,
                       color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
        panel.set(xlabel="step", ylabel="training loss, nats per token", title=experiment, yscale="log")
        panel.yaxis.set_major_formatter(ticker.ScalarFormatter())
        low, high = panel.get_ylim()
        panel.yaxis.set_minor_locator(ticker.LogLocator(subs=range(2, 10) if high < 10 * low else (2, 5)))
        panel.yaxis.set_minor_formatter(ticker.ScalarFormatter())
        panel.legend(fontsize=7 if number < 9 else 5.5, ncols=1 + number // 9)
    figure.savefig(picture, dpi=110)
    print(f"picture: {picture}")


def of_size(form: str, size: int, seed: int = 7) -> Problem:
    """A problem of arithmetic's grammar whose size is chosen: digits of the number to add to (trained on: 3), digits of
    the left factor (2), length of the chain of rules (3 to 6)."""
    rng = random.Random(f"{form} {size} {seed}")
    if form == "chain":
        chain, start, asked = rng.sample(KINDS, size), *rng.sample(range(size), 2)
        rules = rng.sample([f"Every {a} is a {b}." for a, b in itertools.pairwise(chain)], size - 1)
        return Problem(f"{' '.join(rules)} Ada is a {chain[start]}. Must Ada be a {chain[asked]}?", "",
                       "yes" if asked > start else "no")
    a_digits, b_digits = (size, 2) if form == "sum" else (3, size)
    a, b = (rng.randint(10 ** (n - 1), 10**n - 1) for n in (a_digits, b_digits))
    c = rng.randint(2, 9)
    return Problem(f"What is {a} + {b} * {c}?", "", str(a + b * c))


def solved(folder: Path, problems: list[Problem]) -> float:
    """The share of problems whose written answer, always the likeliest token, is right to the letter."""
    import torch

    from sample import generate, load_run

    model, tokenizer, _ = load_run(folder, torch.device("cpu"), torch.float32)
    end = tokenizer.token_ids[END_OF_TEXT.encode()]
    right = 0
    for batch in (problems[n : n + 200] for n in range(0, len(problems), 200)):
        prompts = [[end, *tokenizer.encode(f"{p.question}\n")] for p in batch]
        room = model.config.context_length - max(map(len, prompts))
        steps = list(generate(model, prompts, room, temperature=0, stop_id=end))
        for row, problem in enumerate(batch):
            text = tokenizer.decode([step[row] for step in steps if step[row] is not None])
            right += text.endswith(f"Answer: {problem.answer}")
    return right / len(problems)


def beyond(folder: Path, picture: Path | None) -> str:
    """All problems of the validation text that are not in the training text (there are only so many sums in words), and
    problems of other sizes, written out by the model."""
    forms: dict[str, list[Problem]] = {}
    train, val = ((ROOT / "data" / "arithmetic" / f"{split}.txt").read_text().split(END_OF_TEXT)[:-1]
                  for split in ("train", "val"))
    seen = {document.partition("\n")[0] for document in train}
    for problem in itertools.islice(arithmetic_problems(1), len(val)):  # 1 is the validation text's seed
        words = problem.question.split()
        if problem.question in seen:
            continue
        form = "chain" if words[0] == "Every" else "story" if words[0] != "What" else (
            "digits" if words[2].isdigit() else "words")
        forms.setdefault(form, []).append(problem)
    by_form = {form: solved(folder, problems) for form, problems in sorted(forms.items())}
    new = sum(map(len, forms.values()))
    everything = sum(by_form[form] * len(forms[form]) for form in forms) / new
    rows = [["problems", "solved"], ["---"] * 2,
            [f"all {new:,} of the {len(val):,} validated that were not trained on", f"{everything:.2%}"]]
    rows += [[f"{len(forms[form]):,} as trained on: {form}", f"{share:.1%}"] for form, share in by_form.items()]
    curves = {}
    for form, title, trained, sizes in (("sum", "digits of the first summand", "3", range(1, 7)),
                                        ("product", "digits of the factor", "2", range(1, 5)),
                                        ("chain", "length of the chain of rules", "3 to 6", range(2, 11))):
        shares = [solved(folder, [of_size(form, size, seed) for seed in range(100)]) for size in sizes]
        rows.append([f"{title}, {sizes[0]} to {sizes[-1]} (trained on: {trained})",
                     " ".join(f"{share:.0%}" for share in shares)])
        curves[f"{title} (trained on: {trained})"] = sizes, shares
    if picture:
        from matplotlib import pyplot

        pyplot.switch_backend("Agg")
        figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for title, (sizes, shares) in curves.items():
            panel.plot(sizes, [100 * share for share in shares], marker="o", label=title)
        panel.set(xlabel="size", ylabel="problems solved, %", title="arithmetic, of the sizes trained on and beyond")
        panel.legend(fontsize=8)
        figure.savefig(picture, dpi=110)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plain_gpt(folder: Path) -> str:
    """What nanoGPT's recipe for a CPU (4 layers, 128 wide, 64 characters, batches of 12, 2,000 steps) takes here, in
    torch's own layers, on the same training text; scored once, on all of the validation text, as train.py scores."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    train, val = (torch.frombuffer(bytearray((folder / f"{split}.txt").read_bytes()), dtype=torch.uint8).long()
                  for split in ("train", "val"))
    layer = nn.TransformerEncoderLayer(128, 4, 512, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
    parts = nn.ModuleDict({"tokens": nn.Embedding(256, 128), "places": nn.Embedding(64, 128),
                           "layers": nn.TransformerEncoder(layer, 4, nn.LayerNorm(128), enable_nested_tensor=False)})
    for p in parts.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.02)
    mask = nn.Transformer.generate_square_subsequent_mask(64)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:  # (B, 65)
        x = parts["tokens"](rows[:, :-1]) + parts["places"].weight
        logits = parts["layers"](x, mask, is_causal=True) @ parts["tokens"].weight.T
        return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    groups = [{"params": [p for p in parts.parameters() if (p.ndim >= 2) == big], "weight_decay": 0.1 * big}
              for big in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    start = time.perf_counter()
    for step in range(2000):
        rate = min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * max(0, step - 100) / 1900)) * 1e-3
        rows = torch.stack([train[n : n + 65] for n in torch.randint(len(train) - 65, (12,))])
        loss_of(rows).backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    parts.eval()
    with torch.no_grad():
        loss = statistics.mean(loss_of(rows).item() for rows in val[: (len(val) - 1) // 6400 * 6400 + 1]
                               .unfold(0, 65, 64).split(100))
    return f"plain GPT by nanoGPT's CPU recipe: {loss:.4f} nats/character in {seconds:.0f} s of training"


def texts_by_temperature(folder: Path, num: int = 100) -> str:
    """For temperatures and top-p: how many of `num` stories the grammar could have written, word for word, how many
    different words they use, and how many come to an end."""
    import torch

    from sample import generate, load_run

    model, tokenizer, _ = load_run(folder, torch.device("cpu"), torch.float32)
    end = tokenizer.token_ids[END_OF_TEXT.encode()]
    rows = [["temperature", "top-p", "stories without a fault", "different words in 1,000", "an end is found"],
            ["---"] * 5]
    for temperature, top_p in ((0.2, None), (0.4, None), (0.6, None), (0.8, None), (1.0, None), (1.3, None),
                               (1.0, 0.9), (1.0, 0.7), (1.0, 0.5)):
        steps = list(generate(model, [[end]] * num, model.config.context_length - 1, temperature=temperature,
                              top_p=top_p, stop_id=end))
        texts = [b"".join(tokenizer.vocab.get(step[row], b"\xff") for step in steps if step[row] is not None)
                 .decode(errors="replace") for row in range(num)]
        faultless = 0
        for text in texts:
            with contextlib.suppress(ValueError):
                story_nats(text)
                faultless += 1
        words = " ".join(texts).split()[: 20 * num]
        rows.append([f"{temperature}", f"{top_p or '-'}", f"{faultless} of {num}",
                     f"{1000 * len(set(words)) / len(words):.0f}", f"{sum(step is None for step in steps[-1])}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="*", choices=[*EXPERIMENTS, []], help="which (none: list them)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: as many as the experiment asks for")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "runs" / "experiments")
    parser.add_argument("--plot", type=Path, help="draw training losses of the first seed (arithmetic: solved by size)")
    parser.add_argument("--json", type=Path, help="write all results")
    parser.add_argument("--texts", type=Path, metavar="RUN", help="temperature and top-p, on texts of a stories run")
    args = parser.parse_args(argv)
    if not args.experiment and not args.texts:
        for name, (question, _, variants, seeds) in EXPERIMENTS.items():
            print(f"{name:<16}{len(variants) * seeds:>3} runs   {question}")
    if args.texts:
        print(texts_by_temperature(args.texts))
    results = {}
    for experiment in args.experiment:
        seeds = args.seeds or list(range(EXPERIMENTS[experiment][3]))
        runs = [(experiment, variant, seed) for seed in seeds for variant in EXPERIMENTS[experiment][2]]
        run_all(runs, args.out_dir, args.jobs)
        print(f"\n{experiment}: {EXPERIMENTS[experiment][0]}\n\n{table_of(experiment, seeds, args.out_dir)}")
        if experiment == "arithmetic":
            picture = args.plot if args.experiment == ["arithmetic"] else None
            print("\n" + beyond(folder_of(runs[0], args.out_dir), picture))
        if experiment == "shakespeare":
            print("\n" + plain_gpt(ROOT / "data" / "shakespeare"))
        folders = [folder_of(run, args.out_dir) for run in runs]
        results[experiment] = {folder.name: result_of(folder) for folder in folders}
    if args.plot and args.experiment != ["arithmetic"]:  # which draws its own
        plot(args.experiment, (args.seeds or [0])[0], args.out_dir, args.plot)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
