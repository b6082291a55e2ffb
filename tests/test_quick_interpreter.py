"""The tests' quick interpreter gives the bits of Triton's own, for numbers that it has not seen before."""

import inspect
import itertools

import numpy as np
import pytest
from quick_interpreter import quick_operations

from sparc_kernels.core._triton import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

COMMON = {
    "fp32": [1.5, 2.0, 3.0, -4.0],
    "int32": [1, 2, 3, 4],
    "int64": [4, 3, 2, 1],
    "int1": [True, False, True, True],
}
UNUSUAL = {
    "fp32": [float("nan"), -0.0, float("inf"), 3e38], "int32": [2**31 - 1, -(2**31), -7, 5],
    "int64": [2**63 - 1, -(2**63), -7, 5], "int1": [True, True, False, False],
}  # fmt: skip
COMMON |= {"fp64": COMMON["fp32"], "int8": COMMON["int32"], "fp16": COMMON["fp32"]}
UNUSUAL |= {"fp64": [float("nan"), -0.0, 1e300, 1 / 3], "int8": [-128, 127, 5, -1], "fp16": [*COMMON["fp16"]]}


SETS = COMMON, UNUSUAL


def own_functions() -> dict:
    """Triton's functions by the names of the quick ones."""
    from triton.runtime import interpreter

    core, names = interpreter.tl.core, quick_operations(interpreter)
    owners = {name: core.tensor if hasattr(core.tensor, name) else core for name in names}
    owners |= dict.fromkeys(("load", "store"), core)
    return {name: inspect.unwrap(getattr(owner, name)) for name, owner in owners.items()}


SLOW = own_functions() if INTERPRETED else {}  # before a kernel runs: an error in one leaves others in their place


class Language:
    """Tensors of the interpreter, and its functions as they are and quick."""

    def __init__(self):
        from triton.runtime import interpreter

        self.interpreter, self.core = interpreter, interpreter.tl.core
        self.quick = quick_operations(interpreter)
        self.slow = SLOW

    def tensor(self, dtype, values, shape=(4,)):
        kind = getattr(self.core, {"fp": "float", "in": "int"}[dtype[:2]] + dtype.lstrip("fpint"))
        data = np.array(values).astype(self.interpreter._get_np_dtype(kind)).reshape(shape)
        type_of = self.core.block_type(kind, list(shape)) if shape != (1,) else kind
        return self.core.tensor(self.interpreter.TensorHandle(data, kind), type_of)

    def pointer(self, array, shape):
        """Pointers to all elements of an array, in its order."""
        kind = self.core.pointer_type(getattr(self.core, f"{array.dtype}"))
        data = (array.ctypes.data + array.itemsize * np.arange(array.size)).astype(np.uint64).reshape(shape)
        return self.core.tensor(self.interpreter.TensorHandle(data, kind), self.core.block_type(kind, list(shape)))

    def interpreted(self, name):
        """Triton's own function."""
        return lambda *args, **named: self.slow[name](*args, **named, _semantic=self.interpreter.interpreter_semantic)

    def both(self, name, *calls, **options):
        """Compare the function and its quick form, which has learnt from the first of the calls."""
        asked, slow = [], self.interpreted(name)

        def noted(*args, **named):
            asked.append(name)
            return slow(*args, **named)

        quick, learnt = self.quick[name](noted), 0
        for args in calls:
            try:
                want = slow(*args, **options)
            except Exception as refused:
                with pytest.raises(type(refused)):
                    quick(*args, **options)
                continue
            asked.clear()
            got = quick(*args, **options)
            learnt += not asked
            a, b = got.handle.data, want.handle.data
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), (name, args, a, b)
            assert got.type == want.type and got.dtype == want.dtype
            assert [d.value for d in got.shape] == [d.value for d in want.shape]
            assert got.numel.value == want.numel.value and got.handle.dtype == want.handle.dtype
        return learnt


@pytest.fixture
def language():
    """Triton's language with the interpreter's meaning, as inside a kernel."""
    made = Language()

    def kernel():
        pass

    inside = type(kernel)(kernel.__code__, {"tl": made.interpreter.tl, "core": made.core})
    scope = made.interpreter._patch_lang(inside)
    yield made
    scope.restore()


OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne"]
NUMBERS = (3, 0.1, -0.0, 0, -7, 2**31, 2**40, float("nan"), True)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(language, name):
    learnt = 0
    for a, b in itertools.product(COMMON, COMMON):
        for shape, other in (((4,), (4,)), ((4, 1), (1, 4)), ((4,), (1,)))[: 3 if a == b else 1]:
            calls = [
                (language.tensor(a, x[a], shape), language.tensor(b, y[b][: np.prod(other)], other))
                for x, y in ((COMMON, COMMON), (UNUSUAL, UNUSUAL), (UNUSUAL, COMMON))
            ]
            learnt += language.both(f"__{name}__", *calls)
    for a, number in itertools.product(COMMON, NUMBERS):
        learnt += language.both(f"__{name}__", *[(language.tensor(a, x[a]), number) for x in (COMMON, UNUSUAL)])
    assert learnt > 5


def test_casts(language):
    learnt = 0
    for a, b in itertools.product(COMMON, COMMON):
        to = language.tensor(b, COMMON[b]).dtype
        learnt += language.both("to", *[(language.tensor(a, x[a]), to) for x in (COMMON, UNUSUAL)])
    assert learnt > 20


def test_where(language):
    learnt = 0
    masks = [language.tensor("int1", x["int1"], shape) for x in (COMMON, UNUSUAL) for shape in ((4,), (4, 1))]
    for a, b in itertools.product(COMMON, COMMON):
        for mask in range(2):
            calls = [(masks[mask + 2 * i], *[language.tensor(n, x[n]) for n in (a, b)]) for i, x in enumerate(SETS)]
            learnt += language.both("where", *calls)
    for a, number in itertools.product(COMMON, NUMBERS):
        for swap in (1, -1):
            calls = [(masks[2 * i], *[language.tensor(a, x[a]), number][::swap]) for i, x in enumerate(SETS)]
            learnt += language.both("where", *calls)
    assert learnt > 20


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "int32", "int64"])
def test_memory(language, dtype):
    first, second = np.arange(8).astype(dtype), -np.arange(8).astype(dtype) - 1
    name = {"f": "fp", "i": "int"}[dtype[0]] + dtype.lstrip("floatin")
    masks = [language.tensor("int1", row, (2, 1)) for row in ([True, False], [False, True])]
    pointers = [language.pointer(array, (2, 4)) for array in (first, second)]
    learnt = language.both("load", *[(p,) for p in pointers]) + language.both(
        "load", *zip(pointers, masks, strict=True), cache_modifier=".cg"
    )
    for other in (0, 0.0, -0.0, 7, 0.1, float("-inf"), 2**31, language.tensor(name, COMMON[name], (1, 4))):
        learnt += language.both("load", *[(p, m, other) for p, m in zip(pointers, masks, strict=True)])
    assert learnt > 3
    for mask, got in itertools.product((None, *masks), (*[language.tensor(name, x[name], (1, 4)) for x in SETS], 3)):
        stored = []
        slow = language.interpreted("store")
        for function in (slow, language.quick["store"](slow)):
            for _ in range(2):  # the first learns
                first.fill(9)
                function(pointers[0], got, mask)
            stored.append(first.tobytes())
        assert stored[0] == stored[1]
    wide = [language.tensor(n, x[n]) for n in ("int32", "int64") for x in SETS]
    for offsets in (*wide, 2, -3, 2**40):
        for p in pointers:
            learnt += language.both("__add__", (p, offsets), (p, offsets))


def test_shapes_and_constants(language):
    for shape in ((4,), (2, 2)):
        tensors = [language.tensor("fp32", x["fp32"], shape) for x in SETS]
        for slices in ((None, slice(None)), (slice(None), None), (slice(None), slice(None), None)):
            learnt = language.both("__getitem__", *[(t, slices) for t in tensors])
            assert learnt == (slices.count(slice(None)) <= len(shape))
    kinds = [language.tensor(name, COMMON[name]).dtype for name in COMMON]
    for kind, number in itertools.product(kinds, NUMBERS):
        language.both("full", *[((2, 4), number, kind)] * 2)
    assert language.both("full", ((4,), 0.0, kinds[0]), ((4,), 0.0, kinds[0]), ((4,), -0.0, kinds[0])) == 1
    assert language.both("arange", (0, 8), (0, 8), (8, 16)) == 1
