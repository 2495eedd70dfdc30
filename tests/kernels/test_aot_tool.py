"""Ahead-of-time compilation finds what would make a kernel slow or refuse to launch, on chips that are not here.

One kernel, a product folded by a maximum, in a shape that is clean and in shapes that each have one fault.
"""

import pytest
import torch

import aot_kernels
from aot_worker import compiling_processes
from prefuse.kernels.tiles import aot


@pytest.fixture(scope="module")
def compiler():
    with compiling_processes() as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(timeout=120)


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(
    ("arch", "shape", "matrix_op"),
    [
        (80, (64, 64), "HMMA"),  # 128 x 128 with host descriptors spills there
        (89, (64, 64), "HMMA"),
        (90, (128, 256), "HGMMA"),
        (100, (128, 256), "UTCHMMA"),
        ("gfx942", (128, 128), "v_mfma"),
    ],
)
def test_a_good_configuration_has_no_problems(compiler, arch, shape, matrix_op):
    report = compiler(aot_kernels.fold_resources, arch, *shape)
    assert report.problems() == []
    assert list(report.matrix_ops) == [matrix_op]
    assert 0 < report.registers <= 255
    assert 0 < report.shared <= aot.CHIPS[arch].shared_limit


def test_a_host_descriptor_becomes_tma_loads_where_the_chip_has_them(compiler):
    # Of sm_120 no more is asked: triton 3.6 leaves a few local-memory operations beside its descriptors.
    reports = {arch: compiler(aot_kernels.fold_resources, arch, 64, 128) for arch in (80, 90, 120)}
    assert {arch: "UTMALDG" in report.copies for arch, report in reports.items()} == {80: False, 90: True, 120: True}
    assert list(reports[120].matrix_ops) == ["HMMA"]


def test_spills_are_reported(compiler):
    report = compiler(aot_kernels.fold_resources, 90, 128, 256, num_warps=4)
    assert report.spill_bytes > 1000
    assert report.local_ops > 100
    spills, local_ops = report.problems()
    assert spills == f"spills {report.spill_bytes} bytes per thread at 255 registers"
    assert local_ops == f"{report.local_ops} operations on local memory"


def test_spills_to_scratch_are_reported_on_amd(compiler):
    report = compiler(aot_kernels.fold_resources, "gfx942", 256, 256, num_warps=4, num_stages=2)
    assert report.spill_bytes > 100
    assert report.local_ops > 10
    assert report.problems()[0] == f"spills {report.spill_bytes} bytes per thread at {report.registers} registers"


def test_copies_are_counted_by_the_way_they_go(compiler):
    report = {arch: compiler(aot_kernels.row_dot_resources, arch).copies for arch in (80, "gfx942")}
    assert set(report[80]) == {"LDG", "STG"}
    assert set(report["gfx942"]) == {"global_load", "global_store"}


def test_serialized_wgmmas_are_reported(compiler):
    report = compiler(aot_kernels.fold_resources, 90, flat=True)
    assert report.problems() == ["every wgmma is serialized (ptxas C7514)"]


def test_too_much_shared_memory_is_reported(compiler):
    report = compiler(aot_kernels.fold_resources, 90, 128, 256, num_stages=5)
    assert report.problems() == [f"{report.shared} bytes of shared memory, limit 232448"]


def test_a_tile_too_small_for_the_chips_own_matrix_instruction_is_reported(compiler):
    report = compiler(aot_kernels.fold_resources, 90, 16, 128)
    assert report.problems() == [f"no HGMMA, found {{'HMMA': {report.matrix_ops['HMMA']}}}"]


def test_a_kernel_without_a_product_needs_no_matrix_unit(compiler):
    report = compiler(aot_kernels.row_dot_resources, 90)
    assert report.problems() == ["no HGMMA, found no matrix instruction"]
    assert report.problems(matrix_unit=False) == []


def test_an_unknown_chip_is_refused(compiler):
    with pytest.raises(ValueError, match="arch 70 is unknown, expected one of"):
        compiler(aot_kernels.fold_resources, 70)


def test_a_signature_that_does_not_fit_the_kernel_is_refused(compiler):
    with pytest.raises(ValueError, match=r"row_dot takes \['x_ptr', .* signature and constexprs name \['D'\]"):
        compiler(aot_kernels.compile_with_signature, {"D": "i32"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
def test_compiling_beside_the_interpreter_is_refused():
    with pytest.raises(TypeError, match="under TRITON_INTERPRET=1 nothing can be compiled"):
        aot_kernels.fold_resources(90)
