"""Options of the test run, and Triton's interpreter where there is no GPU."""

import os
import sys

import torch

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
