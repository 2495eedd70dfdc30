"""The switch that puts prefuse's head into TRL: on and off in any order, and nothing replaced that is not known."""

import importlib.machinery
import re
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import prefuse.trl.switch
import trl_runs
from trl_cases import EXTRAS, OWN, _left_as_found, _quiet, assert_own, call, head_inputs, utils  # noqa: F401

# What TRL itself does, as the versions that are tested stand.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning"),
]


# ------------------------------------------------------------------------------------- the switch


def holder(**names):
    """A module of someone who imported the function under names of their own."""
    module = types.ModuleType("tests_holder")
    vars(module).update(names)
    return module


def test_every_module_that_has_the_function_gets_the_replacement_and_back(monkeypatch):
    early = holder(Function=OWN["function"], other=1)
    monkeypatch.setitem(sys.modules, "tests_early", early)
    monkeypatch.setitem(sys.modules, "tests_no_module", 3)
    prefuse.trl.enable()
    assert isinstance(early.Function, prefuse.trl.switch.Replacement)
    assert early.Function is utils._ChunkedLogProbFunction is sys.modules["trl.kernels"].ChunkedLogProbFunction
    late = holder(Function=utils._ChunkedLogProbFunction)  # imported while enabled
    monkeypatch.setitem(sys.modules, "tests_late", late)
    prefuse.trl.disable()
    assert early.Function is late.Function is OWN["function"]
    assert early.other == 1


def test_the_line_of_the_page_enables():
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(snippet, {})
    assert prefuse.trl.is_enabled()


def test_enable_and_disable_twice():
    prefuse.trl.enable()
    replacement = utils._ChunkedLogProbFunction
    prefuse.trl.enable()
    assert utils._ChunkedLogProbFunction is replacement
    prefuse.trl.disable()
    assert_own()
    prefuse.trl.disable()
    assert_own()


def test_what_another_put_there_since_is_left_to_them(monkeypatch):
    prefuse.trl.enable()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", "theirs")
        prefuse.trl.disable()
        assert utils._ChunkedLogProbFunction == "theirs"
    vars(utils)["_ChunkedLogProbFunction"] = OWN["function"]  # the patch put ours back


def test_blocks_nest():
    with prefuse.trl.enabled():
        with prefuse.trl.enabled():
            assert prefuse.trl.is_enabled()
        assert prefuse.trl.is_enabled()
        with pytest.raises(KeyError), prefuse.trl.enabled():
            raise KeyError
        assert prefuse.trl.is_enabled()
    assert_own()


def test_a_block_inside_enable_leaves_it_on():
    prefuse.trl.enable()
    with prefuse.trl.enabled():
        pass
    assert prefuse.trl.is_enabled()


def test_enable_and_disable_inside_a_block_take_effect_at_its_end():
    with prefuse.trl.enabled():
        prefuse.trl.enable()
    assert prefuse.trl.is_enabled()
    with prefuse.trl.enabled():
        prefuse.trl.disable()
        assert prefuse.trl.is_enabled()
    assert_own()


def test_blocks_of_threads_overlap():
    """The first to come is the first to go, while the second is still inside."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with prefuse.trl.enabled():
            first_in.set()
            second_in.wait(20)
        first_out.set()

    def second():
        first_in.wait(20)
        with prefuse.trl.enabled():
            second_in.set()
            first_out.wait(20)
            seen.append(prefuse.trl.is_enabled() and utils._ChunkedLogProbFunction is not OWN["function"])

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [True]
    assert_own()


def test_many_threads_leave_trl_as_it_was():
    failures = []

    def work():
        for _ in range(5):
            with prefuse.trl.enabled():
                if utils._ChunkedLogProbFunction is OWN["function"]:
                    failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert_own()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace": -1}, "workspace must be a whole number of bytes, 0 or more, got -1"),
        ({"workspace": 1e9}, "workspace must be a whole number of bytes, 0 or more, got 1000000000.0"),
        ({"workspace": True}, "workspace must be a whole number of bytes, 0 or more, got True"),
        ({"impl": "cuda"}, r"impl must be one of \['auto', 'triton', 'torch', 'reference'\], got 'cuda'"),
    ],
)
def test_options_out_of_range(options, message):
    for switch in (prefuse.trl.enable, lambda **options: prefuse.trl.enabled(**options).__enter__()):
        with pytest.raises(ValueError, match=message):
            switch(**options)
        assert_own()


def test_other_options_than_those_in_force():
    with prefuse.trl.enabled(workspace=5):
        replacement = utils._ChunkedLogProbFunction
        with pytest.raises(
            ValueError, match=r"enabled already, as .*workspace=5.* not as .*workspace=6.*: disable it first"
        ):
            prefuse.trl.enable(workspace=6)
        assert utils._ChunkedLogProbFunction is replacement
    assert_own()


# ------------------------------------------------------------------------------------- what is refused


def assert_refused(message):
    """By an UnsupportedTRL that says so and what to do; nothing that TRL has was touched."""
    names = ("trl.trainer.utils", "trl.kernels", "trl.kernels.chunked_logprob")
    before = {name: dict(vars(sys.modules[name])) for name in names}
    for switch in (prefuse.trl.enable, lambda: prefuse.trl.enabled().__enter__()):
        with pytest.raises(prefuse.trl.UnsupportedTRL, match=message) as caught:
            switch()
        assert "pip install 'trl>=1.16,<2'" in str(caught.value)
        assert not prefuse.trl.is_enabled()
        for name in names:
            after = vars(sys.modules[name])
            assert after.keys() == before[name].keys()
            assert all(after[key] is value for key, value in before[name].items())


@pytest.mark.parametrize("version", ["0.24.0", "1.14.2", "2.0.0", "2.0.0.dev0", "10.1", "unknown"])
def test_a_version_that_is_not_known(version, monkeypatch):
    import trl

    with monkeypatch.context() as patch:
        patch.setattr(trl, "__version__", version)
        assert_refused(f"TRL {version} is not known to prefuse.trl: expected 1.15 or later, below 2")


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0", "1.16.0.dev0", "1.29.3"])
def test_a_version_that_is_known(version, monkeypatch):
    import trl

    with monkeypatch.context() as patch:
        patch.setattr(trl, "__version__", version)
        prefuse.trl.enable()
        prefuse.trl.disable()


def test_no_trl_at_all(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl", None)
        with pytest.raises(
            ImportError, match=r"prefuse.trl needs TRL, and importing it failed.*pip install 'trl>=1.16"
        ):
            prefuse.trl.enable()
    assert_own()


class Likeness(torch.autograd.Function):
    """The same arguments; tests change what it makes of them."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=EXTRAS,
    ):  # fmt: skip
        raise NotImplementedError


def altered(change):
    """TRL's function, another's results: `change(results, arguments)`."""

    class Altered(Likeness):
        @staticmethod
        def apply(*arguments):
            return change(OWN["function"].apply, arguments)

    return Altered


def positions(*order):
    return altered(lambda apply, a: tuple(apply(*a)[i] for i in order))


ALTERED = {
    "an entropy in bits": (altered(lambda apply, a: _at(apply(*a), 1, lambda x: x / 0.6931)), "entropy"),
    "another order of results": (positions(0, 1, 3, 2, 4), "log_sum_sq_probs"),
    "losses, not log-probabilities": (altered(lambda apply, a: _at(apply(*a), 0, lambda x: -x)), "log_probs"),
    "numbers where there were booleans": (altered(lambda apply, a: _at(apply(*a), 4, lambda x: x.float())), "is_top1"),
    "a temperature that multiplies": (altered(lambda apply, a: apply(*a[:4], 1 / a[4], *a[5:])), "log_probs"),
    "a scale behind the cap": (altered(lambda apply, a: apply(*a[:4], a[4] / a[7], *a[5:7], 1.0, a[8])), "log_probs"),
    "no bias": (altered(lambda apply, a: apply(*a[:2], 0 * a[2], *a[3:])), "log_probs"),
    "half of the gradient": (
        altered(lambda apply, a: apply(a[0], (a[1] + a[1].detach()) / 2, *a[2:])), "the gradient of weight",
    ),
    "an entropy without gradient": (altered(lambda apply, a: _at(apply(*a), 1, lambda x: x.detach())), "the gradient"),
}  # fmt: skip


def _at(results, place, change):
    return tuple(change(x) if i == place else x for i, x in enumerate(results))


@pytest.mark.parametrize("name", ALTERED)
def test_a_function_that_computes_something_else(name, monkeypatch):
    function, what = ALTERED[name]
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", function)
        assert_refused(f"TRL 1.16.0 is not as prefuse.trl knows it: {what}.* of a small head is .* there and .* here")


def test_a_function_with_other_arguments(monkeypatch):
    class More(Likeness):
        @staticmethod
        def forward(
            ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
            outputs=EXTRAS, label_smoothing=0.0,
        ):  # fmt: skip
            raise NotImplementedError

    class OtherDefault(Likeness):
        @staticmethod
        def forward(
            ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
            outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "varentropy"),
        ):  # fmt: skip
            raise NotImplementedError

    class OtherOrder(Likeness):
        @staticmethod
        def forward(
            ctx, weight, hidden, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
            outputs=EXTRAS,
        ):  # fmt: skip
            raise NotImplementedError

    for function, words in (
        (More, "label_smoothing=0.0"),
        (OtherDefault, "varentropy"),
        (OtherOrder, "weight, hidden"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(utils, "_ChunkedLogProbFunction", function)
            assert_refused(rf"_ChunkedLogProbFunction.forward takes \(.*{words}")


def test_a_function_that_fails_or_returns_more(monkeypatch):
    def more(apply, arguments):
        return *apply(*arguments), torch.zeros(5)

    def fails(*_):
        raise ValueError("not on this device")

    for change, words in (more, "returns 6 results, expected 5"), (fails, r"small head fails: ValueError\('not on"):
        with monkeypatch.context() as patch:
            patch.setattr(utils, "_ChunkedLogProbFunction", altered(change))
            assert_refused(words)


def test_a_function_that_is_gone_or_another_librarys(monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(utils, "_ChunkedLogProbFunction")
        assert_refused("trl.trainer.utils._ChunkedLogProbFunction is None, expected an autograd function")
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", types.SimpleNamespace(apply=print))
        assert_refused(r"is namespace\(.*, expected an autograd function \(is it patched\?\)")


def test_a_head_that_does_not_use_the_function(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(utils, "add_fused_lm_head", lambda model: model)
        assert_refused("add_fused_lm_head does not use _ChunkedLogProbFunction, so replacing it would change nothing")


# The head as TRL hands it over: a parameter of what it is stored as.
HEADS = {
    "int8, as bitsandbytes has it": lambda w: w.to(torch.int8),
    "four bits, two to a byte": lambda w: torch.zeros(w.numel() // 2, 1, dtype=torch.uint8),
    "four bits, kept as bf16": lambda w: torch.zeros(w.numel() // 4, 1, dtype=torch.bfloat16),
    "float8": lambda w: w.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_quantized_head_is_refused_by_name(name):
    model = trl_runs.tiny_model("llama")
    utils.add_fused_lm_head(model)
    ids = torch.arange(3, 12)[None]
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(HEADS[name](head.weight.detach()), requires_grad=False)
    with prefuse.trl.enabled():
        message = r"the head's weight is a Parameter of torch\.\w+ and shape .*quantized head.*llm_int8_skip_modules"
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, labels=ids, fused_lm_head=True)


def test_a_head_of_a_tensor_subclass_is_refused_by_name():
    from torch.testing._internal.two_tensor import TwoTensor

    hidden, weight, _, targets = head_inputs()
    wrapped = TwoTensor(weight.detach(), weight.detach())
    with prefuse.trl.enabled(), pytest.raises(ValueError, match=r"the head's weight is a TwoTensor of torch.float32"):
        call(utils._ChunkedLogProbFunction, (hidden, wrapped, None, targets), {})


def test_zero_3_is_refused_by_name(monkeypatch):
    inputs = head_inputs()
    with prefuse.trl.enabled(), monkeypatch.context() as patch:
        patch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match=r"does not run under DeepSpeed ZeRO-3.*ZeRO-2 or FSDP2.*disable\(\)"):
            call(utils._ChunkedLogProbFunction, inputs, {})


@pytest.mark.parametrize(("dimension", "trainable", "refused"), [
    ("fsdp", True, True), ("fsdp", False, False), ("tp", True, False),
])  # fmt: skip
def test_a_weight_that_trl_gathered_itself(dimension, trainable, refused, tmp_path):
    """Wrong where the ranks see different rows and the weight is trained."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, _, targets = head_inputs()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=(dimension,))
        shard = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_(trainable)
        with prefuse.trl.enabled():
            function = utils._ChunkedLogProbFunction
            if refused:
                with pytest.raises(ValueError, match="the head is an FSDP2 unit of its own"):
                    call(function, (hidden, shard.full_tensor(), None, targets), {})
            else:
                call(function, (hidden, shard.full_tensor(), None, targets), {})[0].sum().backward()
                assert (shard.grad is not None) == trainable
            with torch.no_grad():  # a reference
                call(function, (hidden, shard.full_tensor(), None, targets), {})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("trainer", ["dpo", "kto", "sft", "grpo", "rloo"])
def test_lora_on_the_head_is_refused_by_trl_itself(trainer, tmp_path):
    run = {"trainer": trainer, "lora": {"target_modules": ["q_proj", "lm_head"]}}
    with prefuse.trl.enabled(), pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trl_runs.make_trainer(run, tmp_path)


def test_trainers_are_looked_up_when_they_are_asked_for(monkeypatch):
    trainers = holder(DPOTrainer="the trainer")
    trainers.__spec__ = importlib.machinery.ModuleSpec("prefuse.trl.trainers", None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "prefuse.trl.trainers", trainers)
        assert prefuse.trl.DPOTrainer == "the trainer"
    with pytest.raises(AttributeError, match="no attribute 'GRPOTrainer'"):
        prefuse.trl.GRPOTrainer  # noqa: B018
