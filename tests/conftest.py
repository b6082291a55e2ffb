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


def quicken_interpreter() -> None:
    """Leave out half of what Triton's interpreter does, none of which changes a result: the functions of its language
    are replaced again at every call of one jit function by another; sums of integers are checked for overflow and the
    answer is dropped unless `debug` is set; a dictionary of all types is made whenever one is looked up."""
    from triton.runtime import interpreter

    language, patch, look_up = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    dtypes = {}

    def patch_once(fn):
        modules = [m for m in (language, language.core) if any(m is value for value in fn.__globals__.values())]
        done = not any(language.core.is_builtin(m.arange) for m in modules)
        return interpreter._LangPatchScope() if done else patch(fn)

    def np_dtype(tt_dtype):
        name = tt_dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = look_up(tt_dtype)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if not CUDA:
    quicken_interpreter()


def pytest_collection_finish():
    gc.freeze()  # what the imports made lives on: looking through it took an eighth of the interpreter's time


def pytest_unconfigure():
    gc.unfreeze()  # or libraries call it leaked at the end


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN (and the largest integers), so a place left unwritten is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    return request.param
