"""`prefuse bench head`: what is wrong gets no time, what is absent has its reason, and flags say what they mean."""

import argparse
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch

import prefuse
from prefuse.bench import head, implementations, roofline, scale, timing
from prefuse.bench.implementations import IMPLEMENTATIONS, Implementation, eager_path
from prefuse.bench.record import RESULTS, ROOT, read_result
from prefuse.bench.truth import oracle
from prefuse.kernels import HeadOptions
from prefuse.kernels.cost import count_cost
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within

SHAPE = (64, 16, 200)
EAGER = "HALOs, DPO repository (eager)"
HERE = ("prefuse", "prefuse, kept", "prefuse, workspace=0", EAGER)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def truth(request):
    x = implementations.draw(*SHAPE, 8, getattr(torch, request.param), "cpu")
    return head.truth_of(x, implementations.LOSSES)


def measured(truth, names, mode="trainable", loss_type="logps"):
    key = {"shape": "64x16x200", "dtype": str(truth.x.hidden.dtype)[6:], "mode": mode, "loss_type": loss_type}
    rows, _ = head.measure_group(truth, key, list(names), 2)
    return {row["implementation"]: row for row in rows}


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("loss_type", implementations.LOSSES)
def test_right_implementations_get_times_and_errors(truth, loss_type):
    names = [name for name in HERE if implementations.applies(name, loss_type)]
    rows = measured(truth, names, loss_type=loss_type)
    assert rows.keys() == {head.GEMMS, *names}
    for name in names:
        row = rows[name]
        assert "error" not in row, row
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["peak_mib"] > 0
        assert row["deterministic"]
    if loss_type == "logps":
        assert rows["prefuse"]["batch_invariant"]
        assert rows["prefuse"]["log_ratio_error_nats"] < 1e-5
        if truth.x.hidden.dtype == torch.bfloat16:  # logits rounded to bf16 are no error, and seen
            assert rows[EAGER]["log_ratio_error_nats"] > 100 * rows["prefuse"]["log_ratio_error_nats"]


class _HalvedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.9 * grad


WRONG = {
    "log-probabilities of the wrong token": (lambda h, w, t: eager_path(h, w, (t + 1) % len(w)), "wrong loss"),
    "a gradient that is a tenth too small": (
        lambda h, w, t: eager_path(_HalvedGradient.apply(h), w, t),
        "wrong hidden",
    ),
    "the head's gradient lost": (lambda h, w, t: eager_path(h, w.detach(), t) + 0 * w.sum(), "wrong weight"),
    "a NaN": (lambda h, w, t: eager_path(h, w, t) * float("nan"), "wrong loss"),
    "it raises": (lambda h, w, t: 1 // 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_gets_no_time(truth, name, monkeypatch):
    path, said = WRONG[name]
    monkeypatch.setitem(IMPLEMENTATIONS, "planted", Implementation("torch", path))
    row = measured(truth, ["planted"])["planted"]
    assert said in row["error"]
    assert not {"ms", "ratio_to_gemms", "tflops"} & row.keys()
    assert head.peers(["planted"], [row])["planted"]["absent"] == row["error"]


def test_flags_see_chance_and_neighbours(truth, monkeypatch):
    def by_chance(h, w, t):
        return eager_path(h, w, t) + 1e-7 * torch.randn(len(t))

    def by_neighbours(h, w, t):
        return eager_path(h, w, t) + 1e-7 * len(t) * (torch.arange(len(t)) == 0)

    for name, path in {"chance": by_chance, "neighbours": by_neighbours}.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation("torch", path))
    rows = measured(truth, ["chance", "neighbours"])
    assert [rows["chance"][flag] for flag in ("deterministic", "batch_invariant")] == [False, False]
    assert [rows["neighbours"][flag] for flag in ("deterministic", "batch_invariant")] == [True, False]


def test_absent_peers_have_a_reason(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "absent", Implementation("no-such-package", eager_path))
    found = head.peers(["absent"], [])
    assert found == {"absent": {"version": None, "absent": "no-such-package is not installed"}}


def test_the_formulas_are_the_papers(truth):
    """The float64 truth of a loss is the oracle's; torch's formula around the same log-probabilities gives it too."""
    if truth.x.hidden.dtype != torch.float32:
        return
    ref = torch.log_softmax(truth.x.ref_hidden.double() @ truth.x.ref_weight.double().T, -1)
    ref_logps = ref.gather(1, truth.x.targets[:, None])[:, 0]
    exact = replace(truth.x, grad=truth.x.grad.double())
    for loss_type in implementations.LOSSES:
        made = implementations.loss_of_logps(loss_type, truth.logps, ref_logps, exact).item()
        assert abs(made - truth.loss(loss_type)) < 1e-12


# ------------------------------------------------------------------------------------------ how it is measured


def test_formulas_of_halos_and_the_dpo_repository_are_the_papers_and_ours():
    """Each peer's formula, the equation of its paper on Python's numbers, and prefuse's loss, of float64 numbers."""
    logps, refs = -2 * torch.rand(2, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    desirable, cu_seqlens = torch.tensor([True, False, False, True, True, False]), torch.arange(0, 25, 4).int()
    beta, z0 = implementations.BETA, implementations.Z0
    ratios = [math.fsum(row) for row in (logps - refs).view(6, 4).tolist()]
    pairs = zip(ratios[0::2], ratios[1::2], strict=True)
    papers = {
        "dpo": statistics.mean(oracle.dpo(chosen, rejected, beta) for chosen, rejected in pairs),
        "kto": statistics.mean(oracle.kto(r, y, z0, beta) for r, y in zip(ratios, desirable.tolist(), strict=True)),
    }
    peers = {
        "dpo": implementations.dpo_repository(logps, refs, 4),
        "kto": implementations.halos_kto(logps, refs, desirable, 4),
    }
    ours = {
        "dpo": prefuse.preference_loss(logps.float(), refs.float(), cu_seqlens, loss=prefuse.DPO(beta=beta)),
        "kto": prefuse.preference_loss(
            logps.float(), refs.float(), cu_seqlens, loss=prefuse.KTO(beta=beta), labels=desirable, z0=z0
        ),
    }
    for name, paper in papers.items():
        assert peers[name].item() == pytest.approx(paper, rel=1e-12), name
        assert ours[name].loss.item() == pytest.approx(paper, rel=1e-6), name
        said = implementations.log_ratios(name, logps, refs, 4).tolist()
        assert said == pytest.approx(ratios, rel=1e-12), name


def test_every_run_is_warmed_up_and_comes_once_a_round():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleaved(runs, 4)
    assert calls[:3] == list("abc")
    rounds = [calls[i : i + 3] for i in range(3, 15, 3)]
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1  # nobody always comes first
    assert all(len(times) == 4 for times in seconds.values())
    assert timing.paired_ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2.0


def test_peak_memory_is_the_most_held_at_once():
    def run():
        first = torch.zeros(1 << 20)  # 4 MiB
        second = first + 1  # and 4 more
        del first
        return second + 1  # no more than two at a time

    assert timing.peak_bytes(run) == pytest.approx(8 << 20, rel=0.01)


def test_exponents_are_those_of_the_law():
    sizes = [256, 512, 1024, 2048]
    for exponent in (-1.0, 0.0, 1.0, 1.5):
        slope, distance = scale.fit(sizes, [3 * size**exponent for size in sizes])
        assert slope == pytest.approx(exponent, abs=1e-9)
        assert distance < 1e-9
    assert scale.fit(sizes, [1, 2, 4, 16])[1] > 0.1


def test_shapes_are_read_from_words():
    parser = argparse.ArgumentParser()
    head.add_arguments(parser)
    assert parser.parse_args(["--shapes", "256x64x1000", "8x8x8"]).shapes == [(256, 64, 1000), (8, 8, 8)]


# ------------------------------------------------------------------------------------------ what the results say


def test_every_peer_with_bf16_numbers_is_two_orders_of_magnitude_off():
    """The accuracy figure's claim, of the committed numbers: at every length, on average and at worst."""
    rows = [row for row in read_result(RESULTS / "accuracy.json").rows if row["tokens_of_sequence"] > 1]
    ours = {row["tokens_of_sequence"]: row for row in rows if row["implementation"] == "prefuse"}
    peers = [row for row in rows if row["implementation"] != "prefuse"]
    assert len({row["implementation"] for row in peers}) >= 5
    for row in peers:
        for measure in ("error_nats", "error_nats_max"):
            assert row[measure] >= 100 * ours[row["tokens_of_sequence"]][measure], row


@pytest.mark.parametrize("page", ["README.md", "docs/bench.md"])
def test_the_words_of_the_accuracy_figure_are_those_of_the_result(page):
    """Who does not see the figure reads its numbers: of sequences from 64 tokens on, on average."""
    rows = [row for row in read_result(RESULTS / "accuracy.json").rows if row["tokens_of_sequence"] > 1]
    ours, peers = (
        [x["error_nats"] for x in rows if (x["implementation"] == "prefuse") is own] for own in (True, False)
    )
    (alt,) = re.findall(r"!\[(Error of a sequence's log-ratio.*?)\]", (ROOT / page).read_text(encoding="utf-8"))
    near, low, high = map(float, re.search(r"near (\S+) nats.* between (\S+) and (\S+)$", alt).groups())
    assert all(near / 4 < error < 4 * near for error in ours)
    assert (f"{min(peers):.1g}", f"{max(peers):.1g}") == (f"{low:.1g}", f"{high:.1g}")


# ------------------------------------------------------------------------------------------ the roofline


@pytest.mark.parametrize("mode", roofline.MODES)
def test_the_roofline_counts_what_the_launchers_report(mode, device):
    """Operations exactly, bytes but for the rows' own numbers."""
    n, d, v = 32, 16, 320
    needs = {"no grad": (), "frozen": ("hidden",)}.get(mode, ("hidden", "weight"))
    x = {"hidden": 0.3 * torch.randn(n, d), "weight": torch.randn(v, d)}
    x = {name: part.bfloat16().to(device).requires_grad_(name in needs) for name, part in x.items()}
    targets = torch.randint(v, (n,)).to(device)
    workspace = 1 << 40 if mode in ("frozen", "trainable, kept") else 0
    with count_cost() as cost, torch.set_grad_enabled(bool(needs)):
        logps = logprobs_within(workspace, *x.values(), targets, None, HeadOptions(), (), "triton")
        if needs:
            logps.sum().backward()
    found = [roofline.passes(n, d, v)[name] for name in roofline.MODES[mode]]
    assert cost.flops == sum(one.operations for one in found)
    assert cost.read + cost.written == pytest.approx(sum(one.bytes for one in found), rel=0.25)


def test_a_roof_is_the_lower_of_two_lines():
    h100 = next(gpu for gpu in roofline.GPUS if gpu.gpu == "H100 SXM")
    assert roofline.ridge(h100) == pytest.approx(989 / 3.35)
    few = roofline.fewest_tokens(h100, 4096, 128256)
    assert roofline.passes(few - 32, 4096, 128256)["fold"].binds(h100) == "memory"
    assert roofline.passes(few, 4096, 128256)["fold"].binds(h100) == "compute"
    assert few == pytest.approx(roofline.ridge(h100), abs=40)  # N operations a byte, where V is much larger
    one = roofline.Pass(10**15, 10**9)
    assert one.seconds(h100) == pytest.approx(10**15 / 989e12)
    times = [roofline.seconds(mode, h100, 8192, 4096, 128256) for mode in ("no grad", "frozen", "trainable")]
    assert statistics.mean(times) > 0
    assert times == sorted(times)
