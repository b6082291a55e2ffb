"""Makes Triton's interpreter faster; it takes most of the tests' time."""

import inspect

import numpy as np


def quicken_interpreter() -> None:
    """Leave out most of the interpreter's bookkeeping, none of which changes a result.

    The functions of Triton's language are replaced again at every call of one jit function by another, through a
    wrapper in a wrapper; sums of integers are checked for overflow and the answer is dropped unless `debug` is set; a
    dictionary of all types is made whenever one is looked up. Shapes are checked, made tuples with types of their own
    and compared element by element at every operation; numbers become tensors anew. `quick_operations` has the rest.
    """
    from triton.runtime import interpreter

    language, patch, look_up = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    core, semantic, dtypes = language.core, interpreter.TritonSemantic, {}
    uses = {}

    def patch_once(fn):
        if fn not in uses:
            uses[fn] = [m for m in (language, core) if any(m is value for value in fn.__globals__.values())]
        for module in uses[fn]:
            if core.is_builtin(module.arange):
                return patch(fn)
        return interpreter._LangPatchScope()

    def np_dtype(tt_dtype):
        name = tt_dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = look_up(tt_dtype)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    members, quick = {}, quick_operations(interpreter)

    def patched(obj, name, member):
        fn = inspect.unwrap(member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return fn(*args, **kwargs)

        return quick[name](call) if name in quick and obj in (language, core, core.tensor) else call

    def patch_builtin(obj, builder, scope):
        if obj not in members:
            found = [(name, member) for name, member in inspect.getmembers(obj) if core.is_builtin(member)]
            members[obj] = [(name, patched(obj, name, member)) for name, member in found]
        for name, member in members[obj]:
            scope.set_attr(obj, name, member)

    if "scope" in inspect.signature(interpreter._patch_builtin).parameters:
        interpreter._patch_builtin = patch_builtin

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
        self.kind = self.dtype.name, dims

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


FLOATS, INTEGERS = {"fp32", "fp64"}, {"int32", "int64"}


def quick_operations(interpreter) -> dict:
    """Return by name what makes a quick function of one of Triton's language.

    The first call with operands of one kind, which is dtypes and shapes, goes through Triton's checks, promotions and
    broadcasts. If NumPy alone gives the same bits, later ones are left to it.
    """
    core, constexpr, tensor = interpreter.tl.core, interpreter.tl.core.constexpr, interpreter.tl.core.tensor
    handle_of, new, load_from, store_to = (
        interpreter.TensorHandle, object.__new__, interpreter._interpreter.load, interpreter._interpreter.store,
    )  # fmt: skip

    class Like:
        """What a result is but for its data."""

        def __init__(self, result):
            self.fields = {name: value for name, value in vars(result).items() if name != "handle"}
            self.dtype = result.handle.dtype

        def make(self, data):
            handle, made = new(handle_of), new(tensor)
            handle.data, handle.dtype, handle.attr = data, self.dtype, {}
            vars(made).update(self.fields)
            made.handle = handle
            return made

    def learn(known, key, result, compute, *data):
        """Note that `compute` gives the data of results of this kind, if it does so here."""
        known[key] = None
        if type(result) is tensor:
            got, want = compute(*data), result.handle.data
            if got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes():
                known[key] = compute, Like(result)
        return result

    def pointer_sum(width):
        return lambda pointers, offsets: pointers + width * offsets.astype(np.uint64)

    def operation(ufunc, dtypes, pointers=False):
        """Elementwise on two tensors of one dtype, integers of two, or a tensor and a number."""
        known = {}

        def computes(a, b):
            if a in dtypes:
                return ufunc if a == b or {a, b} <= INTEGERS else None
            return pointer_sum if pointers and a.startswith("pointer") and b in INTEGERS else None

        def quick(slow):
            def call(self, other):
                kind = type(other)
                if kind is constexpr:
                    other = other.value
                    kind = type(other)
                if kind is tensor:
                    number, key = None, (self.kind, other.kind)
                elif kind is int or kind is float:
                    number, key = other, (self.kind, other or repr(other), kind)
                else:
                    return slow(self, other)
                if key in known:
                    found = known[key]
                    if found is None:
                        return slow(self, other)
                    return found[1].make(found[0](self.handle.data, other.handle.data if number is None else None))
                result, a = slow(self, other), self.kind[0]
                if number is None:
                    compute, data = computes(a, other.kind[0]), other.handle.data
                else:
                    compute, data = computes(a, a if a in dtypes else "int32"), None
                    whole = kind is int and -(2**31) <= other < 2**31
                    fits = whole or (kind is float and a in FLOATS)
                    if not fits or repr(other) == "-0.0":  # Triton 3.6 makes it 0.0
                        compute = None
                if compute is None:
                    known[key] = None
                    return result
                if compute is pointer_sum:
                    compute = pointer_sum(max(1, self.dtype.element_ty.primitive_bitwidth // 8))
                if number is not None:
                    constant = np.array([other], self.handle.data.dtype if a in dtypes else np.int32)
                    two = compute
                    return learn(known, key, result, lambda x, _: two(x, constant), self.handle.data, None)
                return learn(known, key, result, compute, self.handle.data, data)

            return call

        return quick

    def to(slow):
        known, numbers = {}, INTEGERS | FLOATS | {"int8", "int16", "fp16"}

        def call(self, dtype, *rest, **options):
            dtype = dtype.value if type(dtype) is constexpr else dtype
            if rest or options or type(dtype) is not core.dtype:
                return slow(self, dtype, *rest, **options)
            key = self.kind, dtype.name
            if key not in known:
                result = slow(self, dtype)
                known[key] = None
                if self.kind[0] in numbers | {"int1"} and dtype.name in numbers and result is not self:
                    kind = result.handle.data.dtype
                    learn(known, key, result, lambda x: x.astype(kind), self.handle.data)
                return result
            if self.kind[0] == dtype.name:
                return self
            found = known[key]
            return slow(self, dtype) if found is None else found[1].make(found[0](self.handle.data))

        return call

    def operand(x):
        """A tensor's kind, or a number."""
        if type(x) is tensor:
            return x.kind
        return (x or repr(x), type(x)) if type(x) in (int, float) else None

    def fitting(x, name, dtype):
        """Data of a tensor of the dtype of that name or of a number that it has."""
        if type(x) is tensor:
            return x.handle.data if x.kind[0] == name else None
        if (name in FLOATS and repr(x) != "-0.0") or (name in INTEGERS and type(x) is int and -(2**31) <= x < 2**31):
            return np.array([x], dtype)
        return None

    def where(slow):
        known = {}

        def call(condition, x, y):
            x, y = (v.value if type(v) is constexpr else v for v in (x, y))
            kinds = operand(x), operand(y)
            if type(condition) is not tensor or condition.kind[0] != "int1" or None in kinds:
                return slow(condition, x, y)
            key = condition.kind, *kinds
            if key in known:
                found = known[key]
                if found is None:
                    return slow(condition, x, y)
                a, b = found[2]
                a, b = x.handle.data if a is None else a, y.handle.data if b is None else b
                return found[1].make(np.where(condition.handle.data, a, b))
            result = slow(condition, x, y)
            name, dtype = result.kind[0], result.handle.data.dtype
            data = [fitting(v, name, dtype) for v in (x, y)]
            known[key] = None
            if (name in INTEGERS or name in FLOATS) and not any(v is None for v in data):
                learn(known, key, result, np.where, condition.handle.data, *data)
                constants = [None if type(v) is tensor else d for v, d in zip((x, y), data, strict=True)]
                known[key] = known[key] and (*known[key], constants)
            return result

        return call

    def spread(data, shape):
        return data if data.shape == shape else np.broadcast_to(data, shape)

    def load(slow):
        known = {}

        def call(pointer, mask=None, other=None, **options):
            other = other.value if type(other) is constexpr else other
            filled, masked = other is None or operand(other), mask is None or (type(mask) is tensor and mask.kind)
            if type(pointer) is not tensor or not filled or not masked or (masked is not True and masked[0] != "int1"):
                return slow(pointer, mask, other, **options)
            key = pointer.kind, masked, filled, *options.items()
            found = known.get(key)
            if found is not None:
                compute, like = found
                data = None if mask is None else mask.handle.data, other.handle.data if type(other) is tensor else None
                return like.make(compute(pointer.handle.data, *data))
            result = slow(pointer, mask, other, **options)
            if key in known or result.kind[0] == "int1":
                return result
            shape, dtype = result.handle.data.shape, result.handle.data.dtype
            zero = np.zeros(shape, dtype) if other is None or repr(other) in ("0", "0.0") else None
            fill = zero if zero is not None else fitting(other, result.kind[0], dtype)
            known[key] = None
            if fill is not None:
                constant = None if type(other) is tensor else spread(fill, shape)
                all_of_it = np.ones(shape, bool)

                def compute(pointers, mask, other):
                    return load_from(
                        spread(pointers, shape), all_of_it if mask is None else spread(mask, shape),
                        spread(other, shape) if constant is None else constant, dtype,
                    )  # fmt: skip

                data = None if mask is None else mask.handle.data, fill if constant is None else None
                learn(known, key, result, compute, pointer.handle.data, *data)
            return result

        return call

    def store(slow):
        known = {}

        def call(pointer, value, mask=None, **options):
            masked = mask is None or (type(mask) is tensor and mask.kind)
            if type(pointer) is not tensor or type(value) is not tensor or not masked:
                return slow(pointer, value, mask, **options)
            key = pointer.kind, value.kind, masked, *options.items()
            if known.get(key) is None:
                result = slow(pointer, value, mask, **options)
                shape = pointer.handle.data.shape
                if pointer.kind[0] == f"pointer<{value.kind[0]}>" and value.kind[0] != "int1":
                    if masked is True or masked[0] == "int1":
                        known[key] = shape, np.ones(shape, bool)
                return result
            shape, all_of_it = known[key]
            mask = all_of_it if mask is None else spread(mask.handle.data, shape)
            return store_to(pointer.handle.data, spread(value.handle.data, shape), mask)

        return call

    def getitem(slow):
        known = {}

        def call(self, slices):
            if type(slices) is not tuple or not all(s is None or s == slice(None) for s in slices):
                return slow(self, slices)
            key = self.kind, *(s is None for s in slices)
            found = known.get(key)
            if found is not None:
                return found[1].make(self.handle.data[slices])
            return learn(known, key, slow(self, slices), lambda x: x[slices], self.handle.data)

        return call

    def constant(slow):
        """A function of numbers, which has one result for each."""
        known = {}

        def call(*args):
            key = []
            for arg in args:
                arg = arg.value if type(arg) is constexpr else arg
                if type(arg) in (list, tuple):
                    key.append(tuple(d.value if type(d) is constexpr else d for d in arg))
                elif type(arg) is core.dtype:
                    key.append(arg.name)
                elif type(arg) in (int, float):
                    key.append((repr(arg), type(arg)))
                else:
                    return slow(*args)
            key = tuple(key)
            if key in known:
                found = known[key]
                return found[1].make(found[0])
            result = slow(*args)
            known[key] = result.handle.data, Like(result)
            known[key][0].flags.writeable = False
            return result

        return call

    numbers = FLOATS | INTEGERS
    compared = {name: operation(ufunc, numbers) for name, ufunc in [
        ("__lt__", np.less), ("__le__", np.less_equal), ("__gt__", np.greater), ("__ge__", np.greater_equal),
        ("__eq__", np.equal), ("__ne__", np.not_equal),
    ]}  # fmt: skip
    bitwise = {name: operation(ufunc, INTEGERS | {"int1"}) for name, ufunc in [
        ("__and__", np.bitwise_and), ("__or__", np.bitwise_or), ("__xor__", np.bitwise_xor),
    ]}  # fmt: skip
    return {
        "__add__": operation(np.add, numbers, pointers=True), "__sub__": operation(np.subtract, numbers),
        "__mul__": operation(np.multiply, numbers), "__truediv__": operation(np.divide, FLOATS),
        "__floordiv__": operation(lambda a, b: (a - np.fmod(a, b)) // b, INTEGERS),
        "__mod__": operation(np.fmod, INTEGERS), "__getitem__": getitem, "to": to, "where": where, "load": load,
        "store": store, "arange": constant, "full": constant, **compared, **bitwise,
    }  # fmt: skip
