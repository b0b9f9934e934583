"""Options of the test run."""


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="how often tests/test_faults.py kills a run (default: 10)")
    parser.addoption("--flips", type=int, default=300, help="how many bytes of a file it changes, one a time")
