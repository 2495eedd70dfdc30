"""What is refused at the door, each with what was expected, what came, and the way out."""

import importlib.util
import re

import pytest
import torch
import torch.distributed as dist

import prefuse
from prefuse import DPO, IPO, KTO, SFT
from prefuse.kernels.tiles import table as configs

HIDDEN, WEIGHT, TARGETS, BIAS = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 1, 6, -100]), torch.randn(7)


def call(**changes):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "impl": "torch"} | changes
    return prefuse.linear_logprobs(**arguments)


def test_the_call_that_the_others_change_one_thing_of_is_fine():
    assert call(bias=BIAS, outputs=("entropy",))[0].shape == (4,)


# ---- linear_logprobs: tensors --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "bias"])
def test_not_a_tensor(name):
    with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got list"):
        call(**{name: [1.0]})


@pytest.mark.parametrize("name", ["weight", "targets", "bias"])
def test_tensors_on_several_devices(name):
    elsewhere = {"weight": WEIGHT, "targets": TARGETS, "bias": BIAS}[name].to("meta")
    with pytest.raises(TypeError, match=f"{name} is on meta but hidden is on cpu; move one of them"):
        call(**{name: elsewhere})


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_tensor_that_does_not_hold_real_numbers(name, dtype):
    x = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS}[name].to(dtype)
    with pytest.raises(TypeError, match=rf"{name} must be a floating-point tensor, got {dtype}"):
        call(**{name: x})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_targets_that_are_no_ids(dtype):
    with pytest.raises(TypeError, match=f"targets must hold integer token ids, got {dtype}"):
        call(targets=TARGETS.to(dtype))


@pytest.mark.parametrize(
    ("hidden", "weight"), [((4, 3), (7, 2)), ((2, 2, 3), (7, 3)), ((3,), (7, 3)), ((4, 3), (7, 3, 1)), ((4, 3), (3,))]
)
def test_hidden_and_weight_that_do_not_fit(hidden, weight):
    message = (
        f"expected hidden (N, D) and weight (V, D) with the same D, got {hidden} and {weight}; "
        "flatten batches to (N, D) first"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        call(hidden=torch.randn(hidden), weight=torch.randn(weight))


@pytest.mark.parametrize("shape", [(3,), (4, 1), ()])
def test_targets_of_another_length(shape):
    with pytest.raises(ValueError, match=re.escape(f"expected targets (4,), one per row of hidden, got {shape}")):
        call(targets=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(0, 3), (7, 0)])
def test_an_empty_head(shape):
    with pytest.raises(ValueError, match=re.escape(f"weight (V, D) must not be empty, got {shape}")):
        call(hidden=torch.randn(4, shape[1]), weight=torch.randn(shape))


@pytest.mark.parametrize("shape", [(6,), (7, 1), ()])
def test_a_bias_of_another_length(shape):
    with pytest.raises(ValueError, match=re.escape(f"expected bias (7,), one per row of weight, got {shape}")):
        call(bias=torch.zeros(shape))


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("target", [7, -1, -2, 1000])
def test_a_target_outside_of_the_vocabulary(target, impl):
    targets = torch.tensor([0, 1, target, -100])
    message = f"targets[2] = {target} is outside the vocabulary [0, 7) and is not ignore_index = -100"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(targets=targets, impl=impl)


def test_another_ignore_index_makes_minus_100_a_target_like_any():
    with pytest.raises(ValueError, match=re.escape("targets[3] = -100 is outside the vocabulary")):
        call(ignore_index=2)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_dtensor(name, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor({"hidden": HIDDEN, "weight": WEIGHT}[name], init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=rf"{name} is a DTensor.*FSDP root module, with the head in the root unit"):
            call(**{name: sharded})
    finally:
        dist.destroy_process_group()


# ---- linear_logprobs: options --------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("softcap", [0.0, -1.0, NAN, float("inf")])
def test_a_softcap_that_caps_nothing(softcap):
    with pytest.raises(ValueError, match=rf"softcap must be > 0, or None for no cap, got {softcap}"):
        call(softcap=softcap)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, float("inf")])
def test_a_temperature_of_nothing(temperature):
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
        call(temperature=temperature)


@pytest.mark.parametrize("scale", [NAN, float("inf")])
def test_a_logit_scale_that_is_no_number(scale):
    with pytest.raises(ValueError, match=f"logit_scale must be a finite number, got {scale}"):
        call(logit_scale=scale)


def test_outputs_as_one_string():
    with pytest.raises(TypeError, match=re.escape("a tuple of names, got the string 'entropy'; write ('entropy',)")):
        call(outputs="entropy")


def test_an_unknown_output():
    with pytest.raises(
        ValueError, match=re.escape("unknown outputs ['entropi']; choose from ['entropy', 'mean_logits'")
    ):
        call(outputs=("entropy", "entropi"))


def test_an_unknown_impl():
    with pytest.raises(
        ValueError, match=re.escape("impl must be one of ['auto', 'triton', 'torch', 'reference'], got")
    ):
        call(impl="cuda")


# ---- linear_logprobs: an impl that cannot run here ------------------------------------------------


def test_triton_without_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find_spec(name, *a))
    with pytest.raises(RuntimeError, match='impl="triton" needs the triton package; install it, or use impl="torch"'):
        call(impl="triton")
    assert torch.equal(call(impl="auto"), call(impl="torch"))


def test_triton_in_float64():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match='impl="triton" has no float64; use impl="torch" or "reference"'):
        call(hidden=HIDDEN.double(), weight=WEIGHT.double(), impl="triton")


def test_triton_on_cpu_tensors_without_the_interpreter(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=r'needs CUDA tensors, got cpu; use impl="torch", or set TRITON_INTERPRET=1'):
        call(impl="triton")


def test_a_chip_too_old_for_the_kernels():
    with pytest.raises(RuntimeError, match=r"need compute capability 8\.0, this device has 7\.5"):
        configs.choose("fold", 75, torch.bfloat16, descriptors=False, d=64, v=1000)


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DPO, IPO, KTO])
@pytest.mark.parametrize("beta", [0.0, -0.1, NAN])
def test_beta_that_is_not_positive(loss, beta):
    with pytest.raises(ValueError, match=f"beta must be > 0, got {beta}"):
        loss(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, NAN])
def test_label_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match=re.escape(f"label_smoothing must be in [0, 0.5), got {smoothing}")):
        DPO(label_smoothing=smoothing)


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("weight", [-1.0, NAN])
def test_a_negative_kto_weight(name, weight):
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got {weight}"):
        KTO(**{name: weight})


# ---- preference_loss -----------------------------------------------------------------------------

LOGPS, REF_LOGPS = torch.full((5,), -1.0), torch.full((5,), -2.0)
CU_SEQLENS = torch.tensor([0, 2, 5], dtype=torch.int32)
LABELS = torch.tensor([True, False])


def prefer(**changes):
    arguments = {"logps": LOGPS, "ref_logps": REF_LOGPS, "cu_seqlens": CU_SEQLENS} | changes
    return prefuse.preference_loss(**arguments)


def test_the_preference_that_the_others_change_one_thing_of_is_fine():
    assert prefer().losses.shape == (1,)
    assert prefer(loss=KTO(), labels=LABELS, z0=0.0).losses.shape == (2,)


@pytest.mark.parametrize("cu_seqlens", [[0, 2, 5], torch.tensor(5), torch.tensor([[0, 2, 5]]), torch.tensor([]).int()])
def test_offsets_of_another_shape(cu_seqlens):
    with pytest.raises(
        ValueError, match=re.escape("cu_seqlens must be a tensor (S + 1,) of offsets, beginning with 0")
    ):
        prefer(cu_seqlens=cu_seqlens)


def test_offsets_that_are_no_integers():
    with pytest.raises(TypeError, match=re.escape("cu_seqlens must hold integers (int32), got torch.float32")):
        prefer(cu_seqlens=CU_SEQLENS.float())


@pytest.mark.parametrize("offsets", [[0, 2, 4], [1, 2, 5], [0, 6, 5], [0, 3, 2, 4, 5], [0, 2, 6]])
def test_offsets_that_do_not_rise_from_0_to_n(offsets):
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to N = 5, got \["):
        prefer(cu_seqlens=torch.tensor(offsets))


def test_padded_logps():
    with pytest.raises(
        ValueError, match=re.escape("expected logps (N,), the completion tokens of all sequences end to end")
    ):
        prefer(logps=LOGPS[None])


@pytest.mark.parametrize("shape", [(3,), (6,), (1,), (), (5, 1)])
def test_a_reference_of_another_shape(shape):
    message = f"expected ref_logps (5,) per token or (2,) per sequence, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        prefer(ref_logps=torch.zeros(shape))
    with pytest.raises(ValueError, match=re.escape(message)):
        prefuse.kto_reference_point(LOGPS, torch.zeros(shape), CU_SEQLENS)


@pytest.mark.parametrize("loss", [DPO(), IPO()])
def test_an_odd_number_of_sequences_for_pairs(loss):
    message = f"{type(loss).__name__} takes pairs (chosen, rejected adjacent), got an odd number of sequences: 3"
    with pytest.raises(ValueError, match=re.escape(message)):
        prefer(loss=loss, cu_seqlens=torch.tensor([0, 2, 4, 5]))


@pytest.mark.parametrize("loss", [DPO(), IPO(), KTO()])
def test_a_missing_reference(loss):
    options = {"labels": LABELS, "z0": 0.0} if isinstance(loss, KTO) else {}
    with pytest.raises(ValueError, match=re.escape(f"{type(loss).__name__} needs ref_logps; for a uniform reference")):
        prefer(loss=loss, ref_logps=None, **options)


def test_the_zeros_that_the_message_names_are_a_uniform_reference():
    out = prefer(ref_logps=torch.zeros(2, dtype=torch.float64))
    assert out.rewards.tolist() == pytest.approx([-0.2, -0.3])


def test_a_reference_for_a_loss_without():
    with pytest.raises(ValueError, match="SFT uses no reference, so ref_logps must be None"):
        prefer(loss=SFT())


@pytest.mark.parametrize("extra", [{"labels": LABELS}, {"z0": 0.0}])
@pytest.mark.parametrize("loss", [DPO(), IPO(), SFT()])
def test_labels_or_a_reference_point_for_a_loss_without(loss, extra):
    ref_logps = REF_LOGPS if loss.uses_reference else None
    with pytest.raises(ValueError, match=f"{type(loss).__name__} takes no {next(iter(extra))}: leave it out, or"):
        prefer(loss=loss, ref_logps=ref_logps, **extra)


@pytest.mark.parametrize("given", [{}, {"labels": LABELS}, {"z0": 0.0}])
def test_kto_without_labels_or_reference_point(given):
    message = "KTO needs labels (S,) bool and z0, from kto_reference_point (or a number, or Mismatched)"
    with pytest.raises(ValueError, match=re.escape(message)):
        prefer(loss=KTO(), **given)


def test_labels_that_are_not_bool():
    with pytest.raises(TypeError, match=r"labels must be bool, got torch\.int64"):
        prefer(loss=KTO(), labels=LABELS.long(), z0=0.0)


@pytest.mark.parametrize("shape", [(1,), (3,), (5,), ()])
def test_labels_of_another_length(shape):
    with pytest.raises(ValueError, match=re.escape(f"expected labels (2,), one per sequence, got {shape}")):
        prefer(loss=KTO(), labels=torch.ones(shape, dtype=torch.bool), z0=0.0)


@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_a_reference_point_that_is_not_one_number(shape):
    message = f"z0 must be one number for all sequences, shape (), got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        prefer(loss=KTO(), labels=LABELS, z0=torch.zeros(shape))


@pytest.mark.parametrize("loss", ["dpo", DPO])
def test_a_loss_that_is_not_an_instance(loss):
    with pytest.raises(TypeError, match=re.escape("loss must be an instance such as prefuse.DPO(beta=0.1), got")):
        prefer(loss=loss)


@pytest.mark.parametrize("count", [0, -1])
def test_a_mean_over_no_items(count):
    with pytest.raises(ValueError, match=f"num_items must be at least 1, got {count}"):
        prefer(num_items=count)


def test_the_fused_loss_refuses_what_its_halves_refuse():
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "ref_logps": torch.zeros(4), "impl": "torch"}
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 4"):
        prefuse.linear_preference_loss(cu_seqlens=CU_SEQLENS, **arguments)
    with pytest.raises(ValueError, match="softcap must be > 0"):
        prefuse.linear_preference_loss(cu_seqlens=torch.tensor([0, 2, 4]), softcap=-1.0, **arguments)
    with pytest.raises(ValueError, match="got an odd number of sequences"):
        prefuse.linear_preference_loss(cu_seqlens=torch.tensor([0, 4]), **arguments)
