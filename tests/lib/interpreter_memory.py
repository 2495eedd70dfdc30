"""Checked memory for the interpreter: bounds, races between programs, lanes that were masked off.

Every load, store and atomic of a kernel is held against the tensors it was launched with. The stock
interpreter reads and writes whatever address it is given, and runs programs in order, so no race can show.

Programs are ordered by atomics alone: what one did before it releases at a place comes before what another does after
it acquires there, as long as both are of scope "gpu" or wider.
"""

import copy
import math
import mmap
from dataclasses import dataclass, field

import numpy as np
import torch

from interpreter_numerics import poison
from interpreter_stock import interpreter, repair, tl

Builder = interpreter.InterpreterBuilder
TensorHandle = interpreter.TensorHandle

_MAP_NORESERVE = 0x4000  # Linux; named in mmap only since Python 3.13


class KernelFault(Exception):
    """A kernel did what is undefined on a GPU."""


class OutOfBounds(KernelFault):
    """An unmasked lane addresses no element of the tensor that its pointer comes from."""


class Race(KernelFault):
    """Two programs, or two lanes of one store, touch the same memory in no defined order."""


def lazy_zeros(count: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that take memory only where they are touched, however large."""
    size = max(count * np.dtype(dtype).itemsize, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype, count)


def sparse_tensor(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A copy of `values` with these strides, in elements, that takes memory only where it is touched.

    So 64-bit addressing is tested: a kernel that multiplies a row by a stride of 2**30 in 32 bits fails, and
    one that does it in 64 must produce the right numbers.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    memory = torch.from_numpy(lazy_zeros(extent * values.element_size(), np.uint8)).view(values.dtype)
    return memory.as_strided(values.shape, strides).copy_(values)


# ---- the memory of one launch --------------------------------------------------------------------


@dataclass(eq=False)
class Argument:
    """A tensor argument: its bytes [start, stop) and which of them are its elements."""

    name: str
    tensor: torch.Tensor

    def __post_init__(self):
        sizes, strides = self.tensor.shape, self.tensor.stride()
        spread = [(stride, size) for size, stride in zip(sizes, strides, strict=True) if size > 1 and stride != 0]
        self.dimensions = sorted(spread, reverse=True)  # (stride, size), outermost first
        self.width = self.tensor.element_size()
        self.extent = 1 + sum((size - 1) * stride for stride, size in self.dimensions) if self.tensor.numel() else 0
        self.start = self.tensor.data_ptr()
        self.stop = self.start + self.extent * self.width
        self.dense = self.extent == math.prod(size for _, size in self.dimensions)

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which accesses of `width` bytes lie on elements; a gap between the rows of a slice is not ours."""
        held = (addresses >= self.start) & (addresses + np.uint64(width) <= self.stop)
        offset = addresses - np.uint64(self.start)
        held &= (offset & np.uint64(width - 1)) == 0
        if self.dense or width != self.width:
            return held
        index = offset // np.uint64(width)
        for stride, size in self.dimensions:
            index -= np.minimum(index // np.uint64(stride), np.uint64(size - 1)) * np.uint64(stride)
        return held & (index == 0)

    def __str__(self):
        return f"{self.name!r} (shape {tuple(self.tensor.shape)}, strides {self.tensor.stride()})"


@dataclass
class Region:
    """Arguments whose bytes overlap, and what each program did to them."""

    arguments: list[Argument]
    marks: dict[str, np.ndarray] = field(default_factory=dict)  # kind of access -> who did it, per granule

    def __post_init__(self):
        self.start = min(argument.start for argument in self.arguments)
        self.stop = max(argument.stop for argument in self.arguments)
        self.granule = math.gcd(*(n for a in self.arguments for n in (a.width, a.start - self.start)))

    def granules(self, addresses: np.ndarray, width: int) -> np.ndarray:
        first = ((addresses - np.uint64(self.start)) // np.uint64(self.granule)).astype(np.int64)
        per_access = -(-width // self.granule)
        return first if per_access == 1 else (first[:, None] + np.arange(per_access)).ravel()

    def mark(self, kind: str) -> np.ndarray:
        if kind not in self.marks:
            self.marks[kind] = lazy_zeros((self.stop - self.start) // self.granule + 1, np.int32)
        return self.marks[kind]


# What an access may not meet at the same place from another program. Two loads are fine, and so are two
# atomics; a plain access beside an atomic is not ordered with it.
_CONFLICTS = {"load": ("store", "atomic"), "store": ("store", "load", "atomic"), "atomic": ("store", "load")}
_NOBODY, _SEVERAL = 0, -1  # marks; any other is the number of one stretch of a program, from 1 up


@dataclass
class Program:
    """The program that runs. A release ends a stretch of it: what it does later is not covered by that."""

    index: tuple[int, int, int]  # in the grid
    number: int  # of its present stretch
    before: set[int]  # stretches that are over for it: its own, and those it has acquired

    def may_follow(self, marks: np.ndarray) -> np.ndarray:
        """Which marks are no other program's, or of a stretch known to be over."""
        fine = (marks == _NOBODY) | (marks == self.number)
        return fine if fine.all() or not self.before else fine | np.isin(marks, list(self.before))


class LaunchMemory:
    """The tensors of one launch and the record of who touched what."""

    def __init__(self, arguments: list[Argument]):
        self.arguments = arguments
        self.running: Program | None = None
        self.stretches = 0
        self.released: dict[int, set[int]] = {}  # address -> the stretches that were over for those who released there
        self.regions = []
        for argument in sorted(arguments, key=lambda argument: argument.start):
            if self.regions and argument.start < self.regions[-1].stop:
                self.regions[-1] = Region([*self.regions[-1].arguments, argument])
            else:
                self.regions.append(Region([argument]))

    def program(self, index: tuple[int, int, int]) -> Program:
        if self.running is None or self.running.index != index:
            self.stretches += 1
            self.running = Program(index, self.stretches, set())
        return self.running

    def synchronize(self, addresses: np.ndarray, acquire: bool, release: bool):
        """An atomic of the running program, as far as it orders other accesses."""
        program = self.running
        if acquire:
            program.before.update(*(self.released.get(int(a), ()) for a in addresses))
        if release:
            program.before.add(program.number)
            for a in addresses:
                self.released.setdefault(int(a), set()).update(program.before)
            self.stretches += 1
            program.number = self.stretches

    def owner(self, tensor: torch.Tensor) -> Argument:
        view = (tensor.data_ptr(), tensor.shape, tensor.stride())
        return next(a for a in self.arguments if view == (a.start, a.tensor.shape, a.tensor.stride()))

    def access(self, kind: str, addresses: np.ndarray, width: int, owner: Argument | None, program: Program):
        """Checks and records accesses of `width` bytes to their owner or, if unknown, to any argument."""
        if addresses.size == 0:
            return
        candidates = [owner] if owner else self.arguments
        held = np.zeros(addresses.shape, bool)
        for argument in candidates:
            held |= argument.holds(addresses, width)
        if not held.all():
            where = self._place(addresses[~held][0], width, candidates)
            raise OutOfBounds(f"{kind} of {where}, which is no element of it, by program {program.index}")

        for region in self.regions:
            if owner is None:
                inside = (addresses >= region.start) & (addresses < region.stop)
                self._record(region, kind, addresses[inside], width, program)
            elif owner in region.arguments:
                self._record(region, kind, addresses, width, program)

    def _record(self, region, kind, addresses, width, program):
        granules = region.granules(addresses, width)
        for other in _CONFLICTS[kind]:
            if other in region.marks:
                clash = ~program.may_follow(region.marks[other][granules])
                if clash.any():
                    address = region.start + int(granules[clash][0]) * region.granule
                    where = self._place(address, width, region.arguments)
                    raise Race(f"{kind} of {where} by program {program.index}, beside another's {other}")
        mark = region.mark(kind)
        mark[granules] = np.where(program.may_follow(mark[granules]), program.number, _SEVERAL)

    def _place(self, address: int, width: int, candidates: list[Argument]) -> str:
        if not candidates:
            return f"{width} bytes at {int(address):#x}"
        address = int(address)
        near = min(candidates, key=lambda a: max(a.start - address, address - a.stop, 0))
        return f"{width} bytes at byte {address - near.start} from the start of {near}"


def tensor_arguments(names: list[str], values: list) -> list[Argument]:
    """The tensors among the arguments of a launch, inside of tuples and descriptors too."""
    found = []
    for name, value in zip(names, values, strict=True):
        value = interpreter._unwrap_tensor(value)
        if isinstance(value, tuple):
            found += tensor_arguments([f"{name}[{i}]" for i in range(len(value))], list(value))
        elif isinstance(value, interpreter.TensorDescriptor):
            found += tensor_arguments([name], [value.base])
        elif isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise TypeError(f"the strict interpreter checks CPU tensors only, got {name} on {value.device}")
            found.append(Argument(name, value))
    return found


# ---- repairs of the builder's memory operations --------------------------------------------------

_launch = LaunchMemory([])


def begin_launch(arguments: list[Argument]):
    global _launch
    _launch = LaunchMemory(arguments)


@repair(interpreter)
def _implicit_cvt(stock, value):
    """Makes a pointer of a tensor. Its type carries the argument, being the one thing that arithmetic on pointers
    hands on: so an access that runs into the next argument is out of bounds too."""
    converted, tensor = stock(value), interpreter._unwrap_tensor(value)
    if isinstance(tensor, torch.Tensor):
        converted.handle.dtype.argument = _launch.owner(tensor)
    return converted


def _access(builder, kind, pointers, mask):
    lanes = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
    program = _launch.program(tuple(builder.grid_idx))
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    owner = getattr(pointers.dtype.scalar, "argument", None)
    _launch.access(kind, pointers.data[lanes], width, owner, program)


def _synchronize(pointers, mask, semantic, scope):
    if scope == interpreter._ir.MEM_SYNC_SCOPE.CTA:
        return
    lanes = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
    acquire, release, both = (
        getattr(interpreter._ir.MEM_SEMANTIC, x) for x in ("ACQUIRE", "RELEASE", "ACQUIRE_RELEASE")
    )
    _launch.synchronize(pointers.data[lanes], semantic in (acquire, both), semantic in (release, both))


@repair(Builder)
def create_masked_load(stock, self, pointers, mask, other, *policy, **named_policy):
    """Masked-off lanes without an `other` hold anything on a GPU, zeros in the stock: here, poison."""
    _access(self, "load", pointers, mask)
    if other is None and not np.all(mask.data):
        dtype = pointers.get_element_ty()
        other = TensorHandle(np.full(pointers.data.shape, poison(dtype)), dtype)
    return stock(self, pointers, mask, other, *policy, **named_policy)


@repair(Builder)
def create_masked_store(stock, self, pointers, value, mask, *policy, **named_policy):
    _access(self, "store", pointers, mask)
    element = interpreter._get_np_dtype(pointers.get_element_ty())
    value = TensorHandle(np.ascontiguousarray(value.data, element), pointers.get_element_ty())
    stock(self, pointers, value, mask, *policy, **named_policy)
    # Which of two lanes wins is undefined unless they agree: each must find what it wrote.
    found = interpreter._interpreter.load(pointers.data, mask.data, value.data, element)
    if found.tobytes() != value.data.tobytes():
        raise Race(f"two lanes of a store by program {self.grid_idx} write different values to one place")


@repair(Builder)
def create_atomic_rmw(stock, self, operation, pointers, value, mask, semantic, scope):
    if value.dtype.scalar == tl.bfloat16:
        raise NotImplementedError("bfloat16 atomics: the stock interpreter adds bit patterns")
    _access(self, "atomic", pointers, mask)
    _synchronize(pointers, mask, semantic, scope)
    return stock(self, operation, pointers, value, mask, semantic, scope)


@repair(Builder)
def create_atomic_cas(stock, self, pointers, expected, value, semantic, scope):
    everyone = TensorHandle(np.ones_like(pointers.data, bool), tl.int1)
    _access(self, "atomic", pointers, everyone)
    _synchronize(pointers, everyone, semantic, scope)
    return stock(self, pointers, expected, value, semantic, scope)


@repair(Builder)
def create_descriptor_load(stock, self, descriptor, offsets, *policy):
    """Past a descriptor's shape lies padding, not a fault. The stock cannot pad bfloat16 with NaN."""
    nan_padded = descriptor.padding == interpreter._ir.PADDING_OPTION.PAD_NAN
    if not (nan_padded and descriptor.base.dtype.element_ty == tl.bfloat16):
        return stock(self, descriptor, offsets, *policy)
    zero_padded = copy.copy(descriptor)
    zero_padded.padding = interpreter._ir.PADDING_OPTION.PAD_ZERO
    block = stock(self, zero_padded, offsets, *policy)
    _, mask = descriptor.materialize_pointers(offsets)
    block.data = np.where(np.asarray(mask.data, bool), block.data, np.uint16(0x7FC0))
    return block
