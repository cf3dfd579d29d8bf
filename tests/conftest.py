import contextlib
import os
from pathlib import Path

import pytest
import second_device
import torch
from placement import placed

TESTS = Path(__file__).parent
ON_THE_CPU = {
    "bench": "measures in processes of its own",
    "calibration": "a command, which chooses its device by its configuration",
    "data": "files and pictures, which are read on the CPU",
    "experiments": "programs, which run in processes of their own",
    "report": "pages and pictures",
    "selection": "a command, which chooses its device by its configuration",
    "test_cli.py": "commands, which choose their device by their configuration",
    "test_docs.py": "examples of the pages, as a reader runs them",
}
"""Tests that gain nothing from a device, and why. With `--device cuda` they run as always, with the simulated device not at all."""


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", second_device.NAME],
        default="cpu",
        help="where the tests' tensors and models live: the CPU, a GPU, or a second device that is simulated on the CPU",
    )


def pytest_configure(config):
    device = config.getoption("device")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what chooses its device by itself, too
    elif device == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no GPU")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # runs are compared with their repetition, bit by bit
        torch.backends.cudnn.allow_tf32 = False
    elif second_device.why_not() is None:
        second_device.register()


def on_the_cpu(item):
    """Why a test has no use for a device, or None."""
    return ON_THE_CPU.get(item.path.relative_to(TESTS).parts[0])


def pytest_collection_modifyitems(config, items):
    device = config.getoption("device")
    for item in items:
        if device == second_device.NAME and (reason := second_device.why_not() or on_the_cpu(item)):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    device = item.config.getoption("device")
    with contextlib.nullcontext() if device == "cpu" or on_the_cpu(item) else placed(device):
        return (yield)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors: threads cost more than they bring."""
    torch.set_num_threads(1)
