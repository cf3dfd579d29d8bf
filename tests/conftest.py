import contextlib
import os
import zlib
from collections import Counter
from pathlib import Path

import pytest
import second_device
import torch
from placement import placed

TESTS = Path(__file__).parent
ON_THE_CPU = {
    "bench": "measures in processes of its own",
    "compat": "the calls of another library, whose numbers are those of our posteriors",
    "calibration": "a command, which chooses its device by its configuration",
    "data": "files and pictures, which are read on the CPU",
    "experiments": "programs, which run in processes of their own",
    "hard": "files, processes and threads",
    "hostile": "sentences, some of which name the device",
    "report": "pages and pictures",
    "selection": "a command, which chooses its device by its configuration",
    "test_cli.py": "commands, which choose their device by their configuration",
    "test_files.py": "files, whose tensors are on the CPU",
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
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="run each test with the first, and then every N-th, of its sets of parameters: a cross-section in little time",
    )
    parser.addoption(
        "--hard",
        action="store_true",
        help="repeat the attacks of tests/hard as often as docs/reliability.md reports, a tenth of it otherwise; run all "
        "tests that are marked as long or many",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "not_simulated(reason): the simulated device lacks something that a GPU has")
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


def on_the_cpu(node):
    """Why a test, or a file of tests, has no use for a device, or None."""
    return next((why for part, why in ON_THE_CPU.items() if node.path.is_relative_to(TESTS / part)), None)


def placed_for(node):
    """What a test makes is on the device that was asked for."""
    device = node.config.getoption("device")
    is_missing = device == second_device.NAME and second_device.why_not()
    return contextlib.nullcontext() if device == "cpu" or is_missing or on_the_cpu(node) else placed(device)


def is_left_to_test_hard(item):
    """Whether a test is one of the sets of parameters that a mark `many` leaves out: by its name, so that no value is always left out."""
    mark = item.get_closest_marker("many")
    if mark is None or item.config.getoption("hard"):
        return False
    if "always" in mark.kwargs and mark.kwargs["always"] in item.name:
        return False
    return zlib.crc32(item.name.encode()) % mark.args[0] > 0


def pytest_collection_modifyitems(config, items):
    device = config.getoption("device")
    for item in items:
        mark = item.get_closest_marker("not_simulated")
        reason = second_device.why_not() or on_the_cpu(item) or (mark and mark.args[0])
        if device == second_device.NAME and reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("long") and not config.getoption("hard"):
            item.add_marker(pytest.mark.skip(reason="long: `make test-hard` runs it"))
    places, chosen, others = Counter(), [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        every = config.getoption("every")
        is_left_out = places[function] % every if every > 1 else places[function] and is_left_to_test_hard(item)
        (others if is_left_out else chosen).append(item)
        places[function] += 1
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    with placed_for(collector):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    with placed_for(item):
        return (yield)


@pytest.fixture
def hard(request):
    """Whether all attacks are asked for, by `--hard`."""
    return request.config.getoption("hard")


@pytest.fixture
def attacks(request):
    """How often to attack: what is asked for with `--hard`, a tenth of it otherwise."""
    return lambda n: n if request.config.getoption("hard") else max(1, n // 10)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors: threads cost more than they bring."""
    torch.set_num_threads(1)
