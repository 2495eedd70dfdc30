"""`transformers serve`, a real server on loopback, samples for `prefuse online`: the weights of each round by name."""

import json

import pytest
import torch

from online_runs import online
from prefuse.engine.model.sampling import Shape, sample
from serving import NEEDS, serving_transformers
from tiny_run import save_model, settings, weights

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NEEDS is not None, reason=str(NEEDS))]


def rounds_of(folder):
    return [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("samples/*.jsonl"))
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = save_model(tmp_path_factory.mktemp("model"))
    with serving_transformers(tmp_path_factory.mktemp("log") / "serve.log") as url:
        yield model, {"server_base_url": url, "server_type": "transformers", "server_timeout": 60.0}


def test_rounds_are_sampled_by_their_own_weights(server, tmp_path):
    model, at = server
    steps = online(model, tmp_path, max_steps=3, learning_rate=0.05, **at)
    assert [line["staleness"] for line in steps] == [0, 0, 0]
    assert all(0 <= line["reward"] <= 1 for line in steps)
    rounds = rounds_of(tmp_path / "run")
    assert [head["weights"] for head, *_ in rounds] == [0, 1, 2]
    again = online(model, tmp_path, out="again", max_steps=3, learning_rate=0.05, **at)
    assert rounds_of(tmp_path / "again") == rounds  # seeds decide, whatever the folder of the weights is called
    assert [line["loss"] for line in again] == [line["loss"] for line in steps]
    for x, y in zip(weights(tmp_path / "run").values(), weights(tmp_path / "again").values(), strict=True):
        assert torch.equal(x, y)
    # Other weights than the first, or their samples would be those of a run that learns nothing.
    online(model, tmp_path, out="still", max_steps=3, learning_rate=1e-12, **at)
    still = rounds_of(tmp_path / "still")
    assert still[0] == rounds[0]
    assert [row["answers"] for row in still[2][1:]] != [row["answers"] for row in rounds[2][1:]]


def test_greedy_answers_are_those_of_this_process(server, tmp_path):
    """All but the sampling is the same: prompts, stop tokens, lengths, text."""
    from prefuse.engine.data.dataset import read_prompts
    from prefuse.engine.model.load import load_model, load_tokenizer
    from prefuse.engine.rounds.served import sampling_server
    from tiny_run import PAIRS, write_rows

    model, at = server
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    given = {"model_name_or_path": model, "dataset_name": rows, "max_new_tokens": 10, "num_prompts": 0}
    config = settings("generate", **given, **at, eval_fraction=1.0)
    tokenizer = load_tokenizer(model, config)
    prompts = read_prompts(config, tokenizer)
    served = [own[0] for own in sampling_server(config, tokenizer).answers(prompts, 1, 0, "sampling")]
    lm = load_model(model, config, torch.device("cpu"))
    here = sample(lm, tokenizer, [p.ids for p in prompts], Shape(10, temperature=0.0), 1, 0)
    assert [one.text for one in served] == [one.text for one in here]
    ended = [(a, b) for a, b in zip(served, here, strict=True) if a.round_trip and a.stopped == b.stopped]
    assert len(ended) > len(here) / 2
    assert all(tokenizer.decode(a.ids) == tokenizer.decode(b.ids) for a, b in ended)
