"""The recipes of docs/verl.md on the tensor shapes of verl and OpenRLHF, and every snippet of the trainers' pages."""

import re
from pathlib import Path

import pytest
import torch

import prefuse
from prefuse.bench.truth import oracle

DOCS = Path(__file__).resolve().parents[2] / "docs"
SNIPPETS = {
    (page, number): text
    for page in ("verl", "transformers", "pytorch")
    for number, text in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.M)
    )
}
V, D = 61, 16


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT still calls it
@pytest.mark.parametrize(("page", "number"), SNIPPETS)
def test_snippets_run(page, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[page, number], f"docs/{page}.md, snippet {number}", "exec"), {"__name__": "__main__"})


def recipe(name):
    """The function of this name, as the page shows it."""
    (text,) = (text for (page, _), text in SNIPPETS.items() if page == "verl" and f"def {name}(" in text)
    namespace = {"__name__": "__main__"}
    exec(text, namespace)
    return namespace[name]


def inputs(*shape):
    hidden = torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, V, shape)


def truth(hidden, weight, labels, temperature):
    """Log-probability and entropy of every label, from the logits."""
    logps, outputs = oracle.head(hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature)
    return logps.view(labels.shape), outputs["entropy"].view(labels.shape)


def assert_same(got, wanted, leaves):
    """Values, and gradients with different weights for every number of every output."""
    upstream = [torch.randn_like(x) for x in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    found, expected = (
        torch.autograd.grad(sum((x * u).sum() for x, u in zip(xs, upstream, strict=True)), leaves, retain_graph=True)
        for xs in (got, wanted)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 13), (1, 37), (29,), (2, 1)], ids=["padded", "packed", "flat", "one token"])
def test_verls_function_on_padded_and_on_packed_shapes(shape):
    hidden, weight, input_ids = inputs(*shape)
    labels = input_ids.roll(-1, -1)  # as verl rolls them
    got = recipe("linear_cross_entropy")(hidden, weight, labels, 0.7)
    assert_same(got, truth(hidden, weight, labels, 0.7), (hidden, weight))


def test_verls_function_gives_log_probabilities_as_float32_of_half_precision():
    hidden, weight, labels = inputs(2, 11)
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    got, entropy = recipe("linear_cross_entropy")(hidden, weight, labels)
    wanted, expected = truth(hidden.double(), weight.double(), labels, 1.0)
    assert got.dtype == entropy.dtype == torch.float32
    bound = 32 * torch.finfo(torch.float32).eps * wanted.abs().max()
    assert (got - wanted).abs().max() <= bound
    assert (entropy - expected).abs().max() <= bound
    assert (got <= 0).all()


MASKS = {
    "ragged": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
    "turns of a tool between": torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_response_tokens_alone(mask):
    hidden, weight, input_ids = inputs(4, 12)
    responses = input_ids[:, -5:]
    logps, entropy = truth(hidden[:, -6:-1], weight, responses, 1.3)
    got = recipe("response_log_probs")(hidden, weight, input_ids, mask, temperature=1.3)
    assert_same(got, (logps * mask, entropy * mask), (hidden, weight))
    actions = recipe("action_log_probs")(hidden, weight, input_ids, mask, temperature=1.3)
    assert_same((actions,), (logps * mask,), (hidden, weight))
    assert torch.equal(actions, got[0])


def test_masked_tokens_never_reach_the_head(monkeypatch):
    mask = MASKS["ragged"]
    functions = [recipe("response_log_probs"), recipe("action_log_probs")]
    seen = []
    plain = prefuse.linear_logprobs
    monkeypatch.setattr(prefuse, "linear_logprobs", lambda h, w, t, **o: seen.append(len(h)) or plain(h, w, t, **o))
    hidden, weight, input_ids = inputs(4, 12)
    for function in functions:
        function(hidden, weight, input_ids, mask)
    assert seen == [9, 9]


def test_the_first_update_has_ratios_of_exactly_one():
    """Old log-probabilities without a gradient, then new ones with it, in another batch: the same bits."""
    hidden, weight, input_ids = inputs(4, 12)
    hidden, weight, mask = (
        hidden.detach().float().requires_grad_(),
        weight.detach().float().requires_grad_(),
        MASKS["ragged"],
    )
    function = recipe("response_log_probs")
    with torch.no_grad():
        old = torch.cat(
            [function(hidden[i : i + 1], weight, input_ids[i : i + 1], mask[i : i + 1])[0] for i in range(4)]
        )
    new, _ = function(hidden, weight, input_ids, mask)
    assert torch.equal((new - old).exp(), torch.ones_like(new))
