"""Triton kernels run for real where there is a GPU and in Triton's interpreter elsewhere; fresh memory is poisoned."""

import gc
import os

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before sparc_kernels is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # deterministic algorithms on CUDA: before its first product

import pytest

DEVICE = "cuda" if CUDA else "cpu"
# fp64 kernels exist in the interpreter only; there they leave no rounding to hide behind
KERNEL_DTYPE = torch.float32 if CUDA else torch.float64

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


if not CUDA and os.environ.get("PLAIN_INTERPRETER") != "1":  # to see whether a failure is the quick one's
    from quick_interpreter import quicken_interpreter

    quicken_interpreter()


# By CPU seconds, the most first: what is long must not begin when the other worker is about to end.
LONG = [
    "gpu_report",
    "wheel",
    "stand_in",
    "verify",
    "module",
    "graphed",
    "contract",
    "optimizer",
    "audit",
    "trainer",
    "benchmarks",
    "documents",
    "encode",
    "official_replay",
    "faults",
    "compiler",
    "plan",
    "decode",
    "tune",
    "adversarial",
    "runs",
    "cost",
    "host",
    "step",
    "sharded_latents",
    "bytes",
    "by_rows",
    "wrappers",
    "data",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay in one worker (pytest -n 2), so that what its fixtures make is made once."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
    for item in items:
        if not CUDA and getattr(item, "callspec", None) and item.callspec.params.get("impl") == "triton":
            item.add_marker("interpreter")


def pytest_collection_finish():
    gc.freeze()  # what the imports made lives on: looking through it took an eighth of the interpreter's time


def pytest_unconfigure():
    gc.unfreeze()  # or libraries call it leaked at the end


@pytest.fixture(autouse=True)
def new_plans():
    """Tests change launch settings and kernels by hand, which a plan of another test would not see."""
    from sparc_kernels.core.plan import forget_plans

    forget_plans()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN (and the largest integers), so a place left unwritten is noticed."""
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import the compiler
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session")
def quick_streams(tmp_path_factory):
    """`unicode_streams(0, quick=True)`, built once for all workers: drawing and reducing it takes 13 CPU seconds."""
    import fcntl

    from sparc_kernels.data import unicode_streams

    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "quick_streams.pt"
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            torch.save(unicode_streams(0, quick=True), file)
    return torch.load(file, weights_only=False)


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    return request.param
