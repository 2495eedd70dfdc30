"""Compile a Triton kernel for a chip that is not there, and read what the compiler made of it.

    compiled = compile_for(kernel, {"x": "tensordesc<bf16[128, 64]>", "out_ptr": "*fp32", "N": "i32"},
                           {"BLOCK": 128}, aligned=("out_ptr", "N"), arch=90, num_warps=8, num_stages=3)
    report = resources(compiled)
    assert not report.problems(), report

Needs the triton wheel alone, with the ptxas and cuobjdump inside of it: no GPU, no driver. It cannot share a
process with Triton's interpreter: TRITON_INTERPRET must have been unset when triton was imported.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Chip:
    target: GPUTarget
    shared_limit: int  # bytes that one block may ask for; compiling does not check it
    matrix_op: str  # what a tl.dot should become: another one runs at a fraction of the rate, or not in the unit
    tensor_memory_limit: int = 0  # columns


CHIPS = {
    80: Chip(GPUTarget("cuda", 80, 32), 166912, "HMMA"),
    86: Chip(GPUTarget("cuda", 86, 32), 101376, "HMMA"),
    89: Chip(GPUTarget("cuda", 89, 32), 101376, "HMMA"),
    90: Chip(GPUTarget("cuda", 90, 32), 232448, "HGMMA"),
    100: Chip(GPUTarget("cuda", 100, 32), 232448, "UTCHMMA", tensor_memory_limit=512),
    120: Chip(GPUTarget("cuda", 120, 32), 101376, "HMMA"),
    "gfx90a": Chip(GPUTarget("hip", "gfx90a", 64), 65536, "v_mfma"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, "v_mfma"),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), 163840, "v_mfma"),
}


# By tensor descriptor (TMA), asynchronously past the registers (cp.async), and plainly.
CUDA_COPIES = ("UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG")
HIP_COPIES = r"(?:global|buffer)_(?:load|store)"


@dataclass(frozen=True)
class Compiled:
    kernel: CompiledKernel
    arch: int | str
    log: str  # of the assembler


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of its chip."""

    arch: int | str
    registers: int  # per thread
    spill_bytes: int  # per thread: stores and loads of registers that did not fit, on AMD the memory set aside for them
    local_ops: int  # instructions on thread-private memory: spills, and arrays indexed by a variable
    shared: int  # bytes per block
    tensor_memory: int  # columns per block, Blackwell
    matrix_ops: Mapping[str, int]  # instructions of the matrix unit, by name
    copies: Mapping[str, int]  # instructions that move blocks between global and shared memory, or registers
    wgmma_serialized: bool  # ptxas waits after every wgmma (its warning C7514): correct, and slow

    def problems(self, *, matrix_unit: bool = True) -> list[str]:
        """Why this kernel should not ship, in words; `matrix_unit` is whether it should use one. Empty: it may."""
        chip = CHIPS[self.arch]
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes per thread at {self.registers} registers")
        if self.local_ops:
            found.append(f"{self.local_ops} operations on local memory")
        if self.wgmma_serialized:
            found.append("every wgmma is serialized (ptxas C7514)")
        if self.shared > chip.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, limit {chip.shared_limit}")
        if self.tensor_memory > chip.tensor_memory_limit:
            found.append(f"{self.tensor_memory} columns of tensor memory, limit {chip.tensor_memory_limit}")
        if matrix_unit and not self.matrix_ops.get(chip.matrix_op):
            found.append(f"no {chip.matrix_op}, found {dict(self.matrix_ops) or 'no matrix instruction'}")
        return found


def compile_for(
    fn: JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    aligned: Collection[str],
    arch: int | str,
    **options,
) -> Compiled:
    """Compiles `fn` as the JIT would for a launch on `arch`, a key of CHIPS.

    signature:  types of the parameters that are not constexpr: "*bf16", "i32", "fp32", and for a host
                TensorDescriptor "tensordesc<bf16[128, 64]>", with its block shape
    constexprs: values of the others. An int argument that is 1, such as a unit stride, belongs here too: the JIT
                makes a constant of it, and without that another, slower kernel is compiled.
    aligned:    parameters divisible by 16 (pointers: in bytes); the JIT finds out by itself, with the same effect
    options:    num_warps, num_stages, maxnreg, enable_fp_fusion, ...
    """
    if not isinstance(fn, JITFunction):
        raise TypeError(
            f"expected a @triton.jit function, got {type(fn).__name__}; under TRITON_INTERPRET=1 nothing can be "
            "compiled: use another process, without it"
        )
    if arch not in CHIPS:
        raise ValueError(f"arch {arch!r} is unknown, expected one of {list(CHIPS)}")
    types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    if set(types) != set(fn.arg_names) or not set(aligned) <= set(types):
        raise ValueError(
            f"{fn.__name__} takes {fn.arg_names}; signature and constexprs name {sorted(types)}, "
            f"aligned names {sorted(aligned)}"
        )
    source = ASTSource(
        fn,
        {name: types[name] for name in fn.arg_names},
        dict(constexprs),
        {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # a cached kernel comes without its log
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton_compile(source, target=CHIPS[arch].target, options=options)
    return Compiled(kernel, arch, log.getvalue())


def resources(compiled: Compiled) -> Resources:
    is_cuda = CHIPS[compiled.arch].target.backend == "cuda"
    return _cuda_resources(compiled) if is_cuda else _hip_resources(compiled)


def _cuda_resources(compiled: Compiled) -> Resources:
    sass = _disassemble(compiled.kernel.asm["cubin"])
    ops = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE))
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log).groups()
    return Resources(
        arch=compiled.arch,
        registers=int(re.search(r"Used (\d+) registers", compiled.log)[1]),
        spill_bytes=int(stores) + int(loads),
        local_ops=ops["LDL"] + ops["STL"],
        shared=compiled.kernel.metadata.shared,
        tensor_memory=compiled.kernel.metadata.tmem_size or 0,
        matrix_ops={name: count for name, count in ops.items() if name.endswith("MMA")},
        copies={name: ops[name] for name in CUDA_COPIES if ops[name]},
        wgmma_serialized="C7514" in compiled.log,
    )


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _hip_resources(compiled: Compiled) -> Resources:
    assembly = compiled.kernel.asm["amdgcn"]

    def metadata(name):
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)[1])

    matrix = len(re.findall(r"^\tv_mfma", assembly, re.MULTILINE))
    copies = Counter(re.findall(rf"^\t({HIP_COPIES})", assembly, re.MULTILINE))
    return Resources(
        arch=compiled.arch,
        registers=metadata("vgpr_count"),
        # Spilled scalar registers go to lanes of vector registers, not to memory: they do not count.
        spill_bytes=max(4 * metadata("vgpr_spill_count"), metadata("private_segment_fixed_size")),
        local_ops=len(re.findall(r"^\tscratch_", assembly, re.MULTILINE)),
        shared=compiled.kernel.metadata.shared,
        tensor_memory=0,
        matrix_ops={"v_mfma": matrix} if matrix else {},
        copies=dict(copies),
        wgmma_serialized=False,
    )
