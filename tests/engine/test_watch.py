"""`prefuse eval --checkpoints`: rewards, exact KL, diversity, perplexity of each checkpoint, and where gold turns."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefuse.engine import cli
from prefuse.engine.data.table import Demonstration
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.model.sampling import Answer
from prefuse.engine.report.over_optimization import turning_point
from prefuse.engine.rounds.look import divergence, perplexity
from prefuse.engine.score.signs import distinct, is_refusal, self_similarity
from prefuse.engine.train import train
from tiny_run import PAIRS, save_model, settings, write_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model, pairs = save_model(folder / "model"), write_rows(folder / "pairs.jsonl", PAIRS)
    options = {"max_steps": 3, "save_steps": 1, "save_total_limit": 0}
    train(settings(model_name_or_path=model, dataset_name=pairs, output_dir=str(folder / "run"), **options), "train")
    (folder / "plain.txt").write_text("the sky is blue and the sea is green. " * 20)
    return {"model": model, "pairs": pairs, "run": folder / "run", "text": str(folder / "plain.txt")}


@pytest.mark.slow
def test_every_checkpoint_is_looked_at(made, tmp_path, capsys):
    out = tmp_path / "watch.json"
    words = ["eval", "--checkpoints", str(made["run"]), "--eval_dataset", made["pairs"], "--scorer", "length",
             "--gold_scorer", "regex=blue|green", "--temperature", "1", "--num_generations", "2", "--device", "cpu",
             "--max_new_tokens", "6", "--text_dataset", made["text"], "--max_length", "64",
             "--output_file", str(out)]  # fmt: skip
    assert cli.main(words) == 0
    found = json.loads(out.read_text())
    points = found["checkpoints"]
    assert [point["step"] for point in points] == [0, 1, 2, 3]
    assert points[0]["kl"] == 0
    assert all(point["kl"] > 0 for point in points[1:])
    assert all(point["sqrt_kl"] == pytest.approx(math.sqrt(point["kl"])) for point in points)
    for point in points:
        assert 0 < point["distinct_2"] <= 1
        assert 0 <= point["refusals"] <= 1
        assert 1 < point["perplexity"] < 1e4
        assert 0 <= point["gold_score"] <= 1
    assert (tmp_path / "watch.png").stat().st_size > 5000
    assert found["turn"]["best_step"] == max(points, key=lambda point: point["gold_score"])["step"]
    said = capsys.readouterr().out
    assert "best by gold_score: step" in said


def test_kl_and_perplexity_are_transformers_own(made):
    names = {"model_name_or_path": str(made["run"]), "ref_model_name_or_path": made["model"]}
    config = settings("eval", **names, dataset_name="-", eval_fraction=1.0, per_device_eval_batch_size=2)
    cpu = torch.device("cpu")
    lm, ref = (load_model(path, config, cpu) for path in names.values())
    prompts, answers = [[0, 7, 8, 9], [0, 20], [0, 7, 30]], [[10, 11, 12], [40, 1], [50]]
    found = divergence(lm, ref, prompts, [Answer(ids, "", True) for ids in answers], config)
    own, base = (AutoModelForCausalLM.from_pretrained(path).double() for path in names.values())
    total = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (own, base))
        total += float((p.exp() * (p - q)).sum())
    assert found["kl"] == pytest.approx(total / 3, rel=1e-4)
    assert found["kl_per_token"] == pytest.approx(total / 6, rel=1e-4)
    text = list(range(20, 60))
    with torch.no_grad():
        nll = own(torch.tensor([text]), labels=torch.tensor([text])).loss
    block = [Demonstration(text[:1], text[1:], "block 0")]
    assert perplexity(lm, block, config) == pytest.approx(math.exp(nll), rel=1e-4)


def test_a_turn_is_found_where_it_is():
    distances = [0, 0.5, 1, 1.5, 2, 3]
    turn = turning_point(distances, [1 + d * (2 - 0.8 * d) for d in distances])
    assert (turn.alpha, turn.beta, turn.turns_at) == pytest.approx((2, 0.8, 1.25))
    assert turn.best in (2, 3)
    assert turning_point(distances, [1 + 2 * d for d in distances]).turns_at is None
    assert turning_point([0, 1], [0, 1]) is None
    fallen = turning_point([0, 1, 4, 5, 6, 7], [0.5, 0.86, 0.1, 0, 0, 0])  # sooner than any such curve
    assert (fallen.by_fit, fallen.turns_at, fallen.best) == (False, 1, 1)
    assert turning_point([0, 1, 2, 3], [0, math.nan, 2, 1]).best == 2


def test_signs():
    assert distinct(["a b a", "A b"], 1) == 2 / 5
    assert distinct(["a b a", "A b"], 2) == 2 / 3
    assert math.isnan(distinct(["a"], 2))
    assert self_similarity([["a b c", "a b c"]]) == pytest.approx(1)
    assert self_similarity([["a b c"], ["d e f"]]) == 0
    assert self_similarity([["a b c d", "a b x y"]]) == pytest.approx(1 / 3)
    assert math.isnan(self_similarity([["a b"]]))
    refusals = ["I'm sorry, but I can't help.", "As an AI, no", "I’m unable to do that", "I cannot say"]
    assert all(map(is_refusal, refusals))
    assert not any(
        map(is_refusal, ["It is blue.", "Sorry to hear it! Try this", "I can do that", "x " * 150 + "I can't"])
    )


def test_text_without_text_is_refused(made, capsys):
    words = ["eval", "--checkpoints", str(made["run"]), "--eval_dataset", made["pairs"], "--scorer", "length"]
    assert cli.main([*words, "--text_dataset", made["pairs"], "--device", "cpu"]) == 2
    assert "rows with a text column" in capsys.readouterr().err
    tokenizer = load_tokenizer(made["model"])
    assert tokenizer.bos_token_id == 0
