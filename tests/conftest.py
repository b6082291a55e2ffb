"""Triton kernels run for real where there is a GPU and in Triton's interpreter elsewhere; fresh memory is poisoned."""

import gc
import inspect
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
    """Leave out most of the interpreter's bookkeeping, none of which changes a result.

    The functions of Triton's language are replaced again at every call of one jit function by another, through a
    wrapper in a wrapper; sums of integers are checked for overflow and the answer is dropped unless `debug` is set; a
    dictionary of all types is made whenever one is looked up. Shapes are checked, made tuples with types of their own
    and compared element by element at every operation; numbers
    become tensors anew.
    """
    from triton.runtime import interpreter

    language, patch, look_up = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    core, semantic, dtypes = language.core, interpreter.TritonSemantic, {}
    uses = {}

    def patch_once(fn):
        if fn not in uses:
            uses[fn] = [m for m in (language, core) if any(m is value for value in fn.__globals__.values())]
        modules = uses[fn]
        done = not any(core.is_builtin(m.arange) for m in modules)
        return interpreter._LangPatchScope() if done else patch(fn)

    def np_dtype(tt_dtype):
        name = tt_dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = look_up(tt_dtype)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    def patch_attr(obj, name, member, builder, scope=None):
        fn = inspect.unwrap(member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return fn(*args, **kwargs)

        scope.set_attr(obj, name, call) if scope is not None else setattr(obj, name, call)

    if "_semantic" in inspect.getsource(interpreter._patch_attr):
        interpreter._patch_attr = patch_attr

    block_init, tensor_init, broadcast = core.block_type.__init__, core.tensor.__init__, semantic.broadcast_impl_value
    shapes, constants = {}, {}

    def block_type_init(self, element_ty, shape):
        key = tuple([d.value if type(d) is core.constexpr else d for d in shape])
        if key not in shapes:
            block_init(self, element_ty, shape)
            shapes[key] = {n: v for n, v in vars(self).items() if n != "element_ty"}
        vars(self).update(shapes[key], element_ty=element_ty, dims=key)

    def name(self):
        return f"<{self.shape}, {self.element_ty}>"

    def tensor_type_init(self, handle, type):
        dims = type.dims if type.is_block() else ()
        if dims not in constants:
            tensor_init(self, handle, type)
            constants[dims] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants[dims]

    def broadcast_impl_value(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() == b.is_block() and (not a.is_block() or a.dims == b.dims):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    check, arguments = semantic.binary_op_type_checking_impl, {}
    kept = {"fp32", "fp64", "int32", "int64", "int1"}  # two of one of these are neither promoted nor rounded

    def binary_op_type_checking_impl(self, lhs, rhs, *allow, **how):
        a, b = type(lhs) is core.tensor, type(rhs) is core.tensor
        if a and b and lhs.dtype is rhs.dtype and lhs.dtype.name in kept:
            if getattr(lhs.type, "dims", ()) == getattr(rhs.type, "dims", ()):
                return lhs, rhs
        if a == b or type(rhs if a else lhs) not in (int, float):
            return check(self, lhs, rhs, *allow, **how)
        given, number = (lhs, rhs) if a else (rhs, lhs)
        key = number or repr(number), type(number), given.dtype.name, getattr(given.type, "dims", ()), *how.items()
        if key not in arguments:
            made = check(self, lhs, rhs, *allow, **how)
            if made[not a] is not given:
                return made
            arguments[key] = made[a]
            made[a].handle.data.flags.writeable = False
        return (lhs, arguments[key]) if a else (arguments[key], rhs)

    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl
    equal, unwrap, plain = core.dtype.__eq__, core._unwrap_if_constexpr, {core.tensor, int, float, bool, str}

    def unwrap_if_constexpr(o):
        return o.value if type(o) is core.constexpr else o if type(o) in plain else unwrap(o)

    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    core._unwrap_if_constexpr = unwrap_if_constexpr
    core.block_type.__init__, core.block_type.name = block_type_init, property(name, lambda self, value: None)
    core.tensor.__init__, semantic.broadcast_impl_value = tensor_type_init, broadcast_impl_value


if not CUDA:
    quicken_interpreter()


# By CPU seconds, the most first: what is long must not begin when the other worker is about to end.
LONG = [
    "gpu_report",
    "wheel",
    "module",
    "verify",
    "optimizer",
    "stand_in",
    "audit",
    "benchmarks",
    "decode",
    "encode",
    "documents",
    "official_replay",
    "faults",
    "tune",
    "compiler",
    "contract",
    "step",
    "trainer",
    "runs",
    "cost",
    "adversarial",
    "distributed",
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
