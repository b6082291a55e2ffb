"""Triton kernels run for real where there is a GPU and in Triton's interpreter elsewhere; fresh memory is poisoned."""

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


def patched_once() -> None:
    """Triton's interpreter replaces the functions of its language again at every call of one jit function by another,
    which is a third of its time: not where they are replaced already."""
    from triton.runtime import interpreter

    language = interpreter.tl
    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope

    def once(fn):
        modules = [m for m in (language, language.core) if any(m is value for value in fn.__globals__.values())]
        return patch(fn) if any(language.core.is_builtin(m.arange) for m in modules) else nothing()

    interpreter._patch_lang = once


if not CUDA:
    patched_once()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN (and the largest integers), so a place left unwritten is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    return request.param
