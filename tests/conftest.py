"""Options of the test run, Triton's interpreter where there is no GPU, and a forkserver for tests of many processes."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

MANY_PROCESSES = {"test_ddp", "test_faults", "test_shard_opt", "test_train"}

if not torch.cuda.is_available() and "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: before any test imports flash.py
    try:
        import triton.experimental.gluon  # noqa: F401  (the interpreter loads it late and looks at the switch again)
    except ImportError:
        pass
    import flash  # noqa: F401

    del os.environ["TRITON_INTERPRET"]  # torch.compile in other tests must not find it


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="how often tests/test_faults.py kills a run (default: 10)")
    parser.addoption("--flips", type=int, default=300, help="how many bytes of a file it changes, one a time")
    parser.addoption("--full", action="store_true", help="its long runs and long lines in full length: some minutes")


@pytest.fixture(scope="session", autouse=True)
def processes_start_quickly(request):
    """While the first tests run, a forkserver imports torch and the tests: processes forked from it start in 0.05 s."""
    modules = sorted({item.module.__name__ for item in request.session.items} & MANY_PROCESSES)
    if modules and hasattr(os, "fork"):
        folder = Path(__file__).parent
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("PYTHONPATH", os.pathsep.join((str(folder.parent), str(folder))))
            multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", *modules])
            forkserver.ensure_running()
