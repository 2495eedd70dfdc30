"""What the stock interpreter computes wrongly, repaired: bfloat16, fma, minimum and maximum, reductions.

A value here is a `TensorHandle`: a numpy array and a Triton dtype. A bfloat16 one holds bit patterns in
uint16, which is why the stock interpreter computes nonsense with it, silently.
"""

import numpy as np

from interpreter_stock import interpreter, repair, tl

Builder = interpreter.InterpreterBuilder
TensorHandle = interpreter.TensorHandle

# ---- poison: what a masked-off lane holds when the kernel named no `other` -----------------------
# A NaN with a payload of its own. Arithmetic carries it along, and unlike any other NaN it passes through
# `tl.maximum` and `tl.max`: what they would hide is a lane that holds anything at all on a GPU.

_POISON_BF16 = np.uint16(0x7FDE)
_UINT = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def poison(dtype: tl.dtype) -> np.generic:
    numpy_dtype = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        return _POISON_BF16
    if numpy_dtype.kind == "f":
        return bf16_to_float32(np.array([_POISON_BF16])).astype(numpy_dtype)[0]
    if numpy_dtype.kind == "b":
        return np.True_
    return numpy_dtype.type(np.iinfo(numpy_dtype).max // 2 + 12345)  # as an index: far outside of any tensor


def is_poison(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return np.zeros(values.shape, bool)
    as_bits = _UINT[values.dtype.itemsize]
    mark = bf16_to_float32(np.array([_POISON_BF16])).astype(values.dtype).view(as_bits)
    return values.view(as_bits) == mark


def _keep_poison(result, *operands):
    for operand in operands:
        if np.isnan(operand).any():
            result = np.where(is_poison(operand), operand, result)
    return result


# ---- bfloat16 ------------------------------------------------------------------------------------


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even. The stock cast truncates."""
    values = np.asarray(values)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet_nan, nearest).astype(np.uint16).reshape(values.shape)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    """A bfloat16 handle as float32, any other as it is."""
    return TensorHandle(bf16_to_float32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle):
    return TensorHandle(float32_to_bf16(handle.data), tl.bfloat16)


@repair(Builder)
def cast_impl(stock, self, source, destination_type):
    """The stock casts the bit pattern as an integer, or truncates."""
    to_bf16 = destination_type.scalar == tl.bfloat16
    if to_bf16 and _is_bf16(source):
        return source
    if to_bf16:
        return _narrow(stock(self, source, tl.float32))
    wide = _widen(source)
    return wide if wide.dtype.scalar == destination_type.scalar else stock(self, wide, destination_type)


@repair(Builder)
def get_bf16(stock, self, value):
    """A bfloat16 constant; missing before triton 3.9."""
    return _narrow(self.get_fp32(value))


@repair(Builder)
def binary_op(stock, self, left, right, op):
    # One rounding after a float32 operation equals bfloat16 arithmetic: 24 bits are more than 2 * 8 + 2.
    if not _is_bf16(left):
        return stock(self, left, right, op)
    result = op(_widen(left).data, _widen(right).data)
    if result.dtype == np.bool_:
        return TensorHandle(result, tl.int1)
    return _narrow(TensorHandle(result, tl.float32))


@repair(Builder)
def unary_op(stock, self, operand, op):
    wide = _widen(operand)
    result = stock(self, wide, op)
    if wide.data.dtype.kind == "f":
        result.data = _keep_poison(result.data, wide.data)
    return _narrow(result) if _is_bf16(operand) else result


@repair(Builder)
def create_dot(stock, self, left, right, accumulator, *precision):
    """The stock multiplies with a BLAS, which on some CPUs gives a row other bits in another place of the tile."""
    a, b = _widen(left).data, _widen(right).data
    if a.dtype.kind != "f":
        return stock(self, left, right, accumulator, *precision)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf and the like, as silently as a GPU
        # Products of float32 are exact in float64; their sum is rounded to the accumulator's type once.
        products = a.astype(np.float64)[..., :, :, None] * b.astype(np.float64)[..., None, :, :]
        total = products.sum(-2) + accumulator.data
        return TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)


# ---- fused multiply-add: the stock rounds twice before triton 3.9 --------------------------------


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """float32 x * y + z, rounded once: in float64 the product is exact and the sum is rounded to odd."""
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    is_even = (total.view(np.int64) & 1) == 0
    towards_error = np.where((error > 0) == (total > 0), 1, -1)
    to_odd = np.where(is_even & np.isfinite(error) & (error != 0), towards_error, 0)
    return (total.view(np.int64) + to_odd).view(np.float64).astype(np.float32)


@repair(Builder)
def create_fma(stock, self, x, y, z):
    wide = [_widen(operand) for operand in (x, y, z)]
    if wide[2].data.dtype != np.float32:
        return stock(self, x, y, z)
    result = TensorHandle(fused_multiply_add(*(operand.data for operand in wide)), tl.float32)
    return _narrow(result) if _is_bf16(z) else result


# ---- minimum and maximum: of a NaN and a number a GPU returns the number, the stock before 3.9 the NaN


def maximum_number(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _keep_poison(np.fmax(a, b), a, b)


def minimum_number(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _keep_poison(np.fmin(a, b), a, b)


@repair(Builder)
def create_maxnumf(stock, self, left, right):
    return self.binary_op(left, right, maximum_number)


@repair(Builder)
def create_minnumf(stock, self, left, right):
    return self.binary_op(left, right, minimum_number)


@repair(Builder)
def create_clampf(stock, self, value, low, high, propagate_nans):
    if propagate_nans == interpreter._ir.PROPAGATE_NAN.NONE:
        return self.create_minnumf(self.create_maxnumf(value, low), high)
    return self.create_minimumf(self.create_maximumf(value, low), high)


# ---- reductions and scans: the stock ignores bfloat16, and is slow with a combine of the kernel's own


def _reduce_poisoned(ufunc, values, **axis):
    result = ufunc.reduce(values, **axis)
    poisoned = is_poison(values)
    return np.where(poisoned.any(**axis), values[poisoned][0], result) if poisoned.any() else result


_REDUCTIONS = {
    tl.standard._sum_combine: (lambda values, **axis: np.sum(values, **axis),),
    tl.standard._elementwise_max: (lambda values, **axis: _reduce_poisoned(np.fmax, values, **axis),),
    tl.standard._elementwise_min: (lambda values, **axis: _reduce_poisoned(np.fmin, values, **axis),),
    # With an index, whether a NaN wins depends on the order that a GPU reduces in: here it shows.
    tl.standard._argmax_combine_tie_break_left: (np.max, np.argmax),
    tl.standard._argmax_combine_tie_break_fast: (np.max, np.argmax),
    tl.standard._argmin_combine_tie_break_left: (np.min, np.argmin),
    tl.standard._argmin_combine_tie_break_fast: (np.min, np.argmin),
}


@repair(interpreter.ReduceOps)
def apply_impl(stock, self, inputs):
    if self.combine_fn not in _REDUCTIONS:
        return self.generic_reduce(inputs)
    dtype = inputs[0].dtype
    values = _widen(inputs[0].handle).data
    results = [reduce(values, axis=self.axis, keepdims=self.keep_dims) for reduce in _REDUCTIONS[self.combine_fn]]
    if dtype == tl.bfloat16:
        results[0] = float32_to_bf16(results[0])
    return tuple(self.to_tensor(result, kind) for result, kind in zip(results, (dtype, tl.int32), strict=False))


def _combine(operation, state, row, dtypes):
    """One step of a reduction or a scan, over all other axes at once; `state`, `row`: one array per input."""
    tensors = [operation.to_tensor(values, dtype) for values, dtype in zip(state + row, dtypes * 2, strict=True)]
    combined = operation.combine_fn.fn(*tensors)
    combined = combined if isinstance(combined, tuple) else (combined,)
    return [
        result.handle.data.reshape(old.shape).astype(old.dtype) for result, old in zip(combined, state, strict=True)
    ]


def _rows(inputs, axis):
    """The inputs' slices along `axis`, in order, each a list with one array per input."""
    arrays = [np.moveaxis(tensor.handle.data, axis, 0) for tensor in inputs]
    return [[array[i] for array in arrays] for i in range(len(arrays[0]))]


@repair(interpreter.ReduceOps)
def generic_reduce(stock, self, inputs):
    ndim = inputs[0].handle.data.ndim
    flat, axis = self.unravel(inputs, self.axis)
    dtypes = [tensor.dtype for tensor in flat]
    state, *rows = _rows(flat, axis)
    for row in rows:
        state = _combine(self, state, row, dtypes)
    if self.keep_dims:
        kept = range(ndim) if self.axis is None else axis
        state = [np.expand_dims(values, tuple(kept) if self.axis is None else kept) for values in state]
    return tuple(self.to_tensor(values, dtype) for values, dtype in zip(state, dtypes, strict=True))


@repair(interpreter.ScanOps)
def generic_scan(stock, self, inputs):
    dtypes = [tensor.dtype for tensor in inputs]
    first, *rows = _rows(inputs, self.axis)
    states = [first]
    for row in rows:
        states.append(_combine(self, states[-1], row, dtypes))
    outputs = (np.stack(values, axis=self.axis) for values in zip(*states, strict=True))
    return [self.to_tensor(values, dtype) for values, dtype in zip(outputs, dtypes, strict=True)]


def _scan_bf16(scan, self, values):
    if values.dtype != tl.bfloat16:
        return scan(self, values)
    wide = self.to_tensor(bf16_to_float32(values.handle.data), tl.float32)
    return [self.to_tensor(float32_to_bf16(result.handle.data), tl.bfloat16) for result in scan(self, wide)]


@repair(interpreter.ScanOps)
def cumsum(stock, self, values):
    return _scan_bf16(stock, self, values)


@repair(interpreter.ScanOps)
def cumprod(stock, self, values):
    return _scan_bf16(stock, self, values)
