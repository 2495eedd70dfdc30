"""TRL's trainers on prefuse's head: the same runs as on TRL's own, alone and on two ranks, and the same in one call."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import prefuse.trl.switch
import ranks
import trl_runs
from prefuse.bench.truth import oracle
from prefuse.kernels.cost import count_cost
from trl_cases import EXTRAS, OWN, D, N, V, _left_as_found, _quiet, call, head_inputs, utils  # noqa: F401

# What TRL itself does, as the versions that are tested stand.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning"),
]


# ------------------------------------------------------------------------------------- whole runs


def run_both(run, folder, monkeypatch):
    """{"theirs" | "ours": (logs, weights)}; while ours runs, TRL's function must not be called."""
    theirs = trl_runs.train(run, folder)
    calls = []
    compute = prefuse.trl.switch.logprobs_within

    def counted(*args, **options):
        calls.append(len(args[1]))
        return compute(*args, **options)

    def forbidden(*_):
        raise AssertionError("TRL's own function was called")

    with prefuse.trl.enabled(), monkeypatch.context() as patch:
        patch.setattr(prefuse.trl.switch, "logprobs_within", counted)
        patch.setattr(OWN["function"], "forward", forbidden)
        ours = trl_runs.train(run, folder)
    assert len(calls) >= 5
    return {"theirs": theirs, "ours": ours}


def assert_same_logs(theirs, ours):
    """Every number of every line to 1e-5, relative above 1."""
    assert [list(line) for line in theirs] == [list(line) for line in ours]
    for a, b in zip(theirs, ours, strict=True):
        for key, value in a.items():
            assert abs(value - b[key]) <= 1e-5 * max(1.0, abs(value)), f"step {a['step']}, {key}: {value} and {b[key]}"


def assert_same_weights(theirs, ours, start):
    assert theirs.keys() == ours.keys()
    moved = 0.0
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if name in start:
            moved = max(moved, (value - start[name]).abs().max().item())
    assert moved > 1e-3  # else it would be no comparison


MIX = {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.01, 0.3]}
RUNS = {
    "dpo": {"trainer": "dpo"},
    "dpo ipo gemma2": {"trainer": "dpo", "model": "gemma2", "loss_type": "ipo"},
    "dpo mixture qwen3": {"trainer": "dpo", "model": "qwen3", **MIX},
    "dpo tied, weighted by WPO": {"trainer": "dpo", "model": "tied", "use_weighting": True},
    "dpo lora": {"trainer": "dpo", "lora": {}},
    "dpo lora and a head to save": {"trainer": "dpo", "lora": {"modules_to_save": ["lm_head"]}},
    "dpo frozen head": {"trainer": "dpo", "frozen_head": True},
    "dpo accumulated": {"trainer": "dpo", "gradient_accumulation_steps": 2, "max_steps": 3},
    "sft": {"trainer": "sft"},
    "sft gemma2": {"trainer": "sft", "model": "gemma2"},
    "sft tied": {"trainer": "sft", "model": "tied"},
    "kto": {"trainer": "kto"},
}
MORE = {
    "dpo ipo": {"trainer": "dpo", "loss_type": "ipo"},
    "dpo ipo qwen3": {"trainer": "dpo", "model": "qwen3", "loss_type": "ipo"},
    "dpo gemma2": {"trainer": "dpo", "model": "gemma2"},
    "dpo qwen3": {"trainer": "dpo", "model": "qwen3"},
    "dpo tied": {"trainer": "dpo", "model": "tied"},
    "dpo mixture": {"trainer": "dpo", **MIX},
    "dpo mixture gemma2": {"trainer": "dpo", "model": "gemma2", **MIX},
    "dpo cohere": {"trainer": "dpo", "model": "cohere"},
    "dpo granite": {"trainer": "dpo", "model": "granite"},
    "dpo reference computed before": {"trainer": "dpo", "reference": False, "precompute_ref_log_probs": True},
    "kto gemma2": {"trainer": "kto", "model": "gemma2"},
    "kto qwen3": {"trainer": "kto", "model": "qwen3"},
    "kto tied": {"trainer": "kto", "model": "tied"},
    "kto lora": {"trainer": "kto", "lora": {}},
    "sft qwen3": {"trainer": "sft", "model": "qwen3"},
    "sft lora": {"trainer": "sft", "lora": {}},
    "grpo": {"trainer": "grpo"},
    "grpo gemma2": {"trainer": "grpo", "model": "gemma2"},
    "grpo lora": {"trainer": "grpo", "lora": {}},
    "grpo with an entropy bonus": {"trainer": "grpo", "entropy_coef": 0.1},
    "grpo head in fp32": {"trainer": "grpo", "cast_lm_head_to_fp32": True},
    "rloo": {"trainer": "rloo"},
}
ALL = [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.mark.quick_cases(every=5)
@pytest.mark.parametrize("name", ALL)
def test_a_run_is_the_same_as_on_trls_own_function(name, tmp_path, monkeypatch):
    run = (RUNS | MORE)[name]
    runs = run_both(run, tmp_path, monkeypatch)
    (their_logs, their_weights), (our_logs, our_weights) = runs["theirs"], runs["ours"]
    assert_same_logs(their_logs, our_logs)
    trainer = trl_runs.make_trainer(run, tmp_path)
    assert_same_weights(their_weights, our_weights, trl_runs.weights_of(trainer))


def float64_head(hidden, weight, bias, targets, temperature, _, softcap=None, logit_scale=1.0, outputs=()):
    """The truth for runs in bf16: the same hidden states and weights, the head in float64."""
    with torch.autocast("cpu", enabled=False):
        # What bf16 makes of them, without its rounding of their gradients.
        hidden, weight = (x.double() + (x.detach().bfloat16().double() - x.detach().double()) for x in (hidden, weight))
        logps, extra = oracle.head(
            hidden, weight, targets, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature
        )
    extra["is_top1"] = extra["is_top1"].bool()
    return logps, *(extra[name] if name in outputs else None for name in EXTRAS)


class Judge:
    """Trains on the truth, and keeps how far TRL's and prefuse's heads are from it, given the same at every call:
    {what: {who: [root mean square of the error over that of the truth, per call]}}.
    """

    def __init__(self):
        self.errors = {}

    def apply(self, hidden, weight, *others):
        truth = float64_head(hidden, weight, *others)
        heads = {"theirs": OWN["function"], "ours": prefuse.trl.switch.Replacement(0, "torch")}
        found = {}
        for who, head in heads.items():
            copies = [x.detach().requires_grad_() for x in (hidden, weight)]
            with torch.enable_grad():
                found[who] = (copies, head.apply(*copies, *others))
            for what, x, true in zip(("log_probs", *EXTRAS), found[who][1], truth, strict=True):
                if x is not None and x.is_floating_point():
                    self.keep(what, who, x, true)
        if truth[0].requires_grad:
            truth[0].register_hook(lambda grad: self.keep_gradients(hidden, weight, others, found, grad))
        return truth

    def keep_gradients(self, hidden, weight, others, found, grad):
        with torch.enable_grad():
            copies = [x.detach().double().requires_grad_() for x in (hidden, weight)]
            exact = torch.autograd.grad(float64_head(*copies, *others)[0], copies, grad)
        for who, (inputs, results) in found.items():
            gradients = torch.autograd.grad(results[0], inputs, grad.float())
            for what, x, true in zip(("dhidden", "dweight"), gradients, exact, strict=True):
                self.keep(what, who, x, true)

    def keep(self, what, who, x, truth):
        error = torch.linalg.vector_norm(x.detach() - truth.detach()) / torch.linalg.vector_norm(truth.detach())
        self.errors.setdefault(what, {}).setdefault(who, []).append(error.item())


BF16 = {
    "dpo": {"trainer": "dpo"},
    "dpo mixture gemma2": {"trainer": "dpo", "model": "gemma2", **MIX},
    "kto qwen3": {"trainer": "kto", "model": "qwen3"},
    "sft": {"trainer": "sft"},
}


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("name", BF16)
def test_in_bf16_every_step_is_closer_to_float64_than_on_trls_own_function(name, tmp_path, monkeypatch, capsys):
    """What is logged in the first step, and at every call of five steps the same hidden states and upstream gradients.

    (Runs of their own tell no more: after an update all of them are as far apart as the trunk rounds weights to bf16.)
    """
    run = BF16[name] | {"bf16": True}
    judge = Judge()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", judge)
        truth, _ = trl_runs.train(run, tmp_path)
    runs = run_both(run, tmp_path, monkeypatch)

    keys = [key for key in truth[0] if key != "grad_norm"]  # of all weights, the trunk's in bf16
    off = {who: max(abs(logs[0][key] - truth[0][key]) for key in keys) for who, (logs, _) in runs.items()}
    lines = [f"farthest number of the first log line: TRL {off['theirs']:.1e}, prefuse {off['ours']:.1e}"]
    for what, errors in judge.errors.items():
        assert len(errors["theirs"]) >= 5
        theirs, ours = (sum(errors[who]) / len(errors[who]) for who in ("theirs", "ours"))
        lines.append(f"{what}: TRL {theirs:.1e}, prefuse {ours:.1e}")
    with capsys.disabled():
        print(f"\n{name} in bf16, from float64: {'; '.join(lines)}", end=" ")

    assert off["ours"] < off["theirs"]
    for what, errors in judge.errors.items():
        if what == "dhidden":
            # Autocast's leaves prefuse in bf16, as it leaves eager torch: one rounding from the truth. (TRL rounds the
            # logits' gradient instead, and comes as near.)
            assert max(errors["ours"]) < torch.finfo(torch.bfloat16).eps / 2
        else:
            assert all(a < 0.1 * b for a, b in zip(errors["ours"], errors["theirs"], strict=True)), what


# ------------------------------------------------------------------------------------- one call


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 20.0, "temperature": 1.3},
    "scale": {"logit_scale": 0.25, "temperature": 0.5},
    "all": {"softcap": 25.0, "logit_scale": 1.7, "temperature": 0.8, "bias": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_are_float64s(dtype, name):
    """No farther than the rounding of the dtype allows; TRL's own function is the yardstick."""
    options = OPTIONS[name]
    inputs = head_inputs(dtype, options.get("bias", False))
    numbers = {key: value for key, value in options.items() if key != "bias"}
    leaves = [x for x in inputs[:3] if x is not None]
    weights = torch.randn(2, N)

    def with_gradients(results):
        loss = (results[0] * weights[0]).sum() + (results[1] * weights[1]).sum()
        return [*(x.detach() for x in results), *torch.autograd.grad(loss, leaves)]

    doubles = [None if x is None else x.detach().double().requires_grad_() for x in inputs[:3]]
    logps, extra = oracle.head(doubles[0], doubles[1], inputs[3], doubles[2], **numbers)
    loss = (logps * weights[0]).sum() + (extra["entropy"] * weights[1]).sum()
    truth = [logps, *(extra[x] for x in EXTRAS), *torch.autograd.grad(loss, [x for x in doubles if x is not None])]
    theirs = with_gradients(call(OWN["function"], inputs, options))
    with prefuse.trl.enabled():
        ours = with_gradients(call(utils._ChunkedLogProbFunction, inputs, options))
    largest = oracle.logits(doubles[0], doubles[1], doubles[2], **numbers).abs().max().item()
    names = ("log_probs", *EXTRAS, "dhidden", "dweight", "dbias")
    for what, a, b, true in zip(names, ours, theirs, truth, strict=False):
        assert a.dtype == b.dtype
        if what == "is_top1":
            top = true.bool()
            assert torch.equal(a, top)
            assert 0 < top.sum() < N
            continue
        # Log-probabilities are differences of logits.
        kept, magnitude = (dtype, true.abs().max().item()) if what in names[-3:] else (torch.float32, largest)
        bound = oracle.tolerance(true, b, kept, magnitude)
        oracle.assert_within(a, true.detach(), bound, what)


@pytest.mark.parametrize("asked", [(), ("log_probs",), ("log_probs", "is_top1"), ("mean_logits", "entropy"), EXTRAS])
def test_what_was_not_asked_for_is_none(asked):
    inputs = head_inputs()
    with prefuse.trl.enabled():
        results = call(utils._ChunkedLogProbFunction, inputs, {}, asked)
    theirs = call(OWN["function"], inputs, {}, asked)
    assert [x is None for x in results] == [x is None for x in theirs]
    assert [x.dtype for x in results if x is not None] == [x.dtype for x in theirs if x is not None]
    assert [x.requires_grad for x in results if x is not None] == [x.requires_grad for x in theirs if x is not None]


def test_arguments_have_their_defaults():
    hidden, weight, _, targets = head_inputs()
    with prefuse.trl.enabled():
        results = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 128)
    for a, b in zip(results, OWN["function"].apply(hidden, weight, None, targets, 1.0, 128), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_of_equal_words_the_first_is_the_most_likely():
    weight = torch.randint(-2, 3, (V, D)).float()  # whole numbers: no order of a sum changes it
    hidden = torch.randint(-2, 3, (1, D)).float()
    weight[7] = weight[200] = 4 * hidden[0]  # in different chunks of TRL's
    for target, top in ((7, True), (200, False)):
        inputs = (hidden, weight, None, torch.tensor([target]))
        with prefuse.trl.enabled():
            ours = call(utils._ChunkedLogProbFunction, inputs, {})
        assert ours[4].tolist() == [top] == call(OWN["function"], inputs, {})[4].tolist()


@pytest.mark.parametrize("place", range(5))
def test_results_may_be_changed_in_place(place):
    """As those of an autograd function may; the other results and the gradients do not notice."""
    inputs = head_inputs()
    with prefuse.trl.enabled():
        untouched = call(utils._ChunkedLogProbFunction, inputs, {})
        expected = torch.autograd.grad(untouched[0].sum() + untouched[1].sum(), inputs[0])[0]
        results = call(utils._ChunkedLogProbFunction, inputs, {})
        loss = results[0].sum() + results[1].sum()
        results[place].fill_(0)
    for i, (a, b) in enumerate(zip(results, untouched, strict=True)):
        assert torch.equal(a, torch.zeros_like(b) if i == place else b)
    assert torch.equal(torch.autograd.grad(loss, inputs[0])[0], expected)


def test_no_tokens_at_all():
    hidden, weight, _, targets = head_inputs()
    with prefuse.trl.enabled():
        results = call(utils._ChunkedLogProbFunction, (hidden[:0], weight, None, targets[:0]), {})
    assert all(x.shape == (0,) for x in results)
    (results[0].sum() + results[1].sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize(("trainable", "workspace", "units"), [(False, 0, 2), (True, 0, 4), (True, 1 << 30, 3)])
def test_a_step_takes_as_many_passes_over_the_vocabulary_as_the_readme_says(trainable, workspace, units):
    """With all that TRL asks for: an entropy that is logged and not differentiated costs no pass."""
    hidden = torch.randn(256, D, requires_grad=True)  # whole tiles: padded ones count too
    weight = torch.randn(4096, D, requires_grad=trainable)
    targets = torch.randint(4096, (256,))
    costs = []
    for backward in (False, True):
        with prefuse.trl.enabled(workspace=workspace), count_cost() as cost, torch.set_grad_enabled(backward):
            results = call(utils._ChunkedLogProbFunction, (hidden, weight, None, targets), {})
            if backward:
                (results[0].sum() + results[1].detach().sum()).backward()
        costs.append(cost.flops)
    assert costs[1] == units * costs[0]


def test_a_compiled_caller_sees_one_graph_and_follows_the_switch():
    hidden, weight, _, targets = head_inputs()

    def through(hidden, weight, targets):
        results = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.7, 128, 20.0, 1.3, EXTRAS)
        return results[0].sum() + results[1].sum()

    def operators(*, fullgraph):
        """How many of our operators are in each graph that dynamo makes of it."""
        found = []

        def backend(graph, example):
            found.append(sum("prefuse" in str(node.target) for node in graph.graph.nodes))
            return graph.forward

        torch._dynamo.reset()
        torch.compile(through, backend=backend, fullgraph=fullgraph)(hidden, weight, targets)
        return found

    expected = through(hidden, weight, targets)  # TRL's own
    with prefuse.trl.enabled():
        assert operators(fullgraph=True) == [1]
        torch._dynamo.reset()
        result = torch.compile(through, backend="aot_eager", fullgraph=True)(hidden, weight, targets)
    torch.testing.assert_close(result, expected)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (result, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own, when it gives up on TRL's function
        assert sum(operators(fullgraph=False)) == 0
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------- two ranks


FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
EVERY_LINEAR = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Linear"]}}
RANKS = {
    "dpo ddp": {"trainer": "dpo"},
    "dpo lora ddp": {"trainer": "dpo", "lora": {}},
    "dpo ipo gemma2 ddp": {"trainer": "dpo", "model": "gemma2", "loss_type": "ipo"},
    "kto ddp": {"trainer": "kto"},
    "sft qwen3 ddp": {"trainer": "sft", "model": "qwen3"},
    "grpo ddp": {"trainer": "grpo"},
    "dpo fsdp": {"trainer": "dpo", **FSDP},
    "dpo mixture tied fsdp": {"trainer": "dpo", "model": "tied", **MIX, **FSDP},
    "dpo gemma2 fsdp": {"trainer": "dpo", "model": "gemma2", **FSDP},
    "dpo lora fsdp": {"trainer": "dpo", "lora": {}, **FSDP},
    "kto fsdp": {"trainer": "kto", **FSDP},
    "sft fsdp": {"trainer": "sft", **FSDP},
    "head alone fsdp": {"trainer": "dpo", **EVERY_LINEAR},
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """{case: folder}, all run by one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(RANKS))
    ranks.run(2, folder, ranks.LIB / "trl_worker.py", "cases.json", "out", timeout=280)
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RANKS if name != "head alone fsdp"])
def test_two_ranks_log_and_learn_what_they_do_on_trls_own_function(name, two_ranks):
    out = two_ranks / name
    wrapped = json.loads((out / "wrapped.json").read_text())
    assert wrapped["ddp"] == name.endswith("ddp")
    assert ("lm_head" in str(wrapped["fsdp_units"])) == name.endswith("fsdp")
    assert_same_logs(*(json.loads((out / f"{who}.json").read_text()) for who in ("theirs", "ours")))
    theirs, ours = (load_file(out / f"{who}.safetensors") for who in ("theirs", "ours"))
    assert_same_weights(theirs, ours, load_file(out / "start.safetensors"))


@pytest.mark.slow
def test_sharded_weights_become_those_of_whole_ones(two_ranks):
    """So the head's gradient is summed over the ranks, whoever computed it."""
    sharded, whole = (load_file(two_ranks / name / "ours.safetensors") for name in ("dpo fsdp", "dpo ddp"))
    for name, x in sharded.items():
        torch.testing.assert_close(x, whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_head_that_is_an_fsdp_unit_of_its_own_is_refused_on_every_rank(two_ranks):
    for rank in range(2):
        message = (two_ranks / "head alone fsdp" / f"refused{rank}.txt").read_text()
        assert message.startswith("the head is an FSDP2 unit of its own")
        assert "transformer_layer_cls_to_wrap" in message
    # And rightly so: TRL trains another head there than whole ones become.
    alone, whole = (load_file(two_ranks / name / "theirs.safetensors") for name in ("head alone fsdp", "dpo ddp"))
    assert (alone["lm_head.weight"] - whole["lm_head.weight"]).abs().max() > 1e-3
