"""The project as a whole: what its files promise about themselves and each other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for name in ("bpe", "model", "flash", "train", "ddp", "shard_opt", "sample")
         if (path := ROOT / f"{name}.py").exists()]
STAGES = {"bpe", "model", "flash", "train", "ddp", "shard_opt", "sample"}
AT_TOP = {"shard_opt": {"ddp"}, "train": {"bpe", "model", "ddp", "shard_opt"}, "sample": {"bpe", "model"}}


def imports(node: ast.AST) -> set[str]:
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name.split(".")[0] for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom):
            found.add((inner.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_imports_what_it_may(path):
    """At the top: the standard library, the packages of requirements.txt, and the local files that come before it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    requirements = set(re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), re.M))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {name for function in functions for name in imports(function)}
    statements = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    at_top = imports(ast.Module(statements, []))
    assert at_top & STAGES <= AT_TOP.get(path.stem, set()), f"{path.name} imports {at_top & STAGES} at the top"
    foreign = (at_top | inside) - STAGES - set(sys.stdlib_module_names) - requirements
    assert foreign <= {"matplotlib", "wandb"}, f"{path.name} needs {foreign}, which requirements.txt lacks"
    assert path.stem != "bpe" or "torch" not in at_top | inside, "a tokenizer does without torch"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_contents_equal_the_rulers(path):
    """The numbered contents in a file's docstring are its section rulers, in order."""
    text = path.read_text(encoding="utf-8")
    contents = dict(re.findall(r"(?:^|\s{2,})(\d+)\. (.+?)(?=\s{2,}|$)", ast.get_docstring(ast.parse(text)), re.M))
    rulers = re.findall(r"^# --- (\d+)\. (.+?) ---$", text, re.M)
    assert rulers == sorted(contents.items(), key=lambda item: int(item[0])), f"{contents} against {rulers}"


def test_minimal_is_part_of_the_mission():
    """The seven files together stay under 5,000 lines of at most 120 columns."""
    lines = [line for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) < 5000, f"{len(lines)} lines"
    assert max(map(len, lines)) <= 120


def test_importing_does_nothing():
    """Importing every file prints nothing, starts nothing and touches no device."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(f"import {path.stem}" for path in FILES)
    code += "\nimport torch, threading; assert not torch.cuda.is_initialized(); assert threading.active_count() == 1"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_unfinished(path):
    """No notes to self, and every assert says both sides."""
    text = path.read_text(encoding="utf-8")
    assert not re.search("TO" + "DO|FIX" + "ME|X" + "XX", text)
    bare = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert) and node.msg is None]
    assert not bare, f"asserts without a message in lines {bare}"
