"""`prefuse reward`: scores are transformers' own, runs learn, go on where they were killed, and are read by others."""

import dataclasses
import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

import prefuse
from prefuse.engine.cli import main
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.data import load_examples
from prefuse.engine.data.batches import collate, examples_of
from prefuse.engine.data.ranked import rankings_of
from prefuse.engine.data.stops import last_tokens
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.model.reward_model import load_reward_model, loader_of, pad_apart
from prefuse.engine.run.guards import Guards
from prefuse.engine.train import train
from prefuse.losses.rewards import BradleyTerry
from prefuse.models.score import check_score, sequence_scores, step_scores
from prefuse.models.trunk import UnsupportedModel
from prefuse.packing import pack, padded
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
CPU = torch.device("cpu")
GROUPS = [([5, 6, 7], [[8, 9, 10], [11], [12, 13]]), ([20, 21], [[22]]), ([30], [[31, 32, 33, 34], [35, 36]])]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def reward(model, pairs="d", out="o", **changes) -> Config:
    base = {"model_name_or_path": str(model), "dataset_name": pairs, "output_dir": str(out), "eval_fraction": 0.25}
    return settings("reward", **base | {"num_train_epochs": 4.0} | changes)


@pytest.fixture(scope="module")
def run(model, pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "rm"
    train(reward(model, pairs, out, save_steps=4), "reward")
    return out


def texts_of(pairs, folder):
    """Each side's whole text, as somebody else would write it, and its score in the run's own file."""
    return [row for line in (folder / "held_out_scores.jsonl").read_text().splitlines() for row in [json.loads(line)]]


# ---------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("make", ["packed", "padded"])
def test_scores_are_those_of_transformers_on_each_row_alone(kind, make, model, tmp_path):
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
        model = save_model(tmp_path, model=GPT2LMHeadModel(GPT2Config(**shape)))
    own = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).double().eval()
    sequences = [(prompt, answer) for prompt, answers in GROUPS for answer in answers]
    tokens = pack(GROUPS) if make == "packed" else padded(sequences)
    got = sequence_scores(own, tokens)
    alone = torch.cat([own(torch.tensor([prompt + answer])).logits[:, 0] for prompt, answer in sequences])
    torch.testing.assert_close(got.double(), alone, rtol=1e-6, atol=1e-7)

    got.sum().backward()
    gradients = {name: p.grad.clone() for name, p in own.named_parameters()}
    own.zero_grad()
    alone.sum().backward()
    for name, p in own.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6 * p.grad.abs().max().item())


@pytest.mark.parametrize("make", ["packed", "padded"])
def test_scores_of_steps_and_their_loss_are_token_classification(make, model):
    """As TRL's process reward models have it: cross-entropy of two labels at the tokens that end steps."""
    own = AutoModelForTokenClassification.from_pretrained(model, num_labels=2).double().eval()
    sequences = [(prompt, answer) for prompt, answers in GROUPS for answer in answers]
    tokens = pack(GROUPS) if make == "packed" else padded(sequences)
    ends = torch.tensor([i % 2 == 1 for i in range(len(tokens.targets))])
    right = torch.arange(int(ends.sum())) % 3 == 0
    scores = step_scores(own, tokens, ends)
    logits = torch.cat([own(torch.tensor([p + a])).logits[0, len(p) :] for p, a in sequences])[ends]
    torch.testing.assert_close(scores.double(), logits[:, 1] - logits[:, 0], rtol=1e-5, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(logits, right.long()).item()
    assert prefuse.reward_loss(scores, prefuse.StepReward(), labels=right).loss.item() == pytest.approx(
        expected, rel=1e-5
    )


def test_the_prompt_runs_once_for_all_its_answers(model):
    """K = 8 answers of a quarter of their prompt's length: 0.3 of the tokens that separate rows run."""
    packed = pack([(list(range(5, 69)), [[70 + i] * 16 for i in range(8)])])
    assert packed.num_tokens == 64 + 8 * 16
    assert packed.num_tokens <= 0.35 * packed.unshared_tokens


def test_a_model_with_another_head_is_refused_by_its_scores(model):
    own = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).eval()
    check_score(own, torch.arange(10, 20)[None])
    forward = own.forward
    own.forward = lambda *args, **kwargs: (
        dataclasses.replace(out, logits=out.logits * 2) if (out := forward(*args, **kwargs)) else None
    )
    with pytest.raises(UnsupportedModel, match="the scores of LlamaForSequenceClassification are not its score"):
        check_score(own, torch.arange(10, 20)[None])


def test_a_new_head_is_drawn_from_the_seed_and_a_causal_lm_alone_may_lack_it(model, run):
    heads = []
    for seed in 1, 1, 2:
        torch.manual_seed(len(heads))
        heads.append(load_reward_model(model, reward(model, seed=seed), CPU).model.score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    again = load_reward_model(str(run), reward(run), CPU)
    assert torch.equal(again.model.score.weight, weights(run)["score.weight"])
    assert loader_of(run) is load_reward_model
    assert loader_of(model) is load_model


# ---------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_learns_and_logs_trls_names(run):
    rows = read_log(run)
    steps, evals = ([row for row in rows if key in row] for key in ("loss", "eval_loss"))
    assert {"accuracy", "margin", "min_reward", "mean_reward", "max_reward", "grad_norm"} <= steps[0].keys()
    assert sum(row["loss"] for row in steps[-2:]) < 0.5 * sum(row["loss"] for row in steps[:2])
    assert {"eval_accuracy", "eval_ece", "eval_length_correlation", "eval_std_reward"} <= evals[-1].keys()
    scored = texts_of(None, run)
    share = sum(row["scores"][0] > row["scores"][1] for row in scored) / len(scored)
    assert evals[-1]["eval_accuracy"] == pytest.approx(share)


def test_what_a_run_leaves_scores_the_same_in_transformers_and_its_pipeline(run, pairs):
    tokenizer = AutoTokenizer.from_pretrained(run)
    own = AutoModelForSequenceClassification.from_pretrained(run).eval()
    assert own.config.num_labels == 1
    assert own.config.pad_token_id == tokenizer.pad_token_id
    scored = {row["row"]: row["scores"] for row in texts_of(pairs, run)}
    classify = pipeline("text-classification", model=own, tokenizer=tokenizer, function_to_apply="none")
    for number, row in enumerate(PAIRS):
        name = next((name for name in scored if name.endswith(f":{number + 1}")), None)
        if name is None:
            continue
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
        with torch.no_grad():
            together = own(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
        torch.testing.assert_close(together, torch.tensor(scored[name]), rtol=1e-4, atol=1e-5)
        assert [out["score"] for out in classify(texts)] == pytest.approx(scored[name], rel=1e-4, abs=1e-5)


def test_a_padding_token_that_ends_answers_is_replaced(model, pairs):
    """Else transformers takes the score one token early."""
    tokenizer = load_tokenizer(model)
    tokenizer.pad_token = tokenizer.eos_token
    lm = load_reward_model(model, reward(model), CPU)
    examples = examples_of(load_examples(pairs, "pair", tokenizer, 64).examples)
    lm.model.config.pad_token_id = tokenizer.eos_token_id
    lm.check(torch.tensor([examples.longest_sequence()]))  # whatever its padding token is
    assert tokenizer.eos_token_id in last_tokens(examples)
    assert "also ends answers" in pad_apart(lm.model, tokenizer, [examples])
    assert tokenizer.pad_token_id not in last_tokens(examples)
    assert lm.model.config.pad_token_id == tokenizer.pad_token_id
    batch = collate(examples, [0, 1])
    rows = [prompt + answer for i in (0, 1) for prompt, answer in examples.sequences_of(i)]
    ids = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    got = lm.scores_of_states(lm.states(batch))
    torch.testing.assert_close(lm.model(**ids).logits[:, 0], got, rtol=1e-5, atol=1e-6)


def test_adapters_and_what_merge_makes_of_them_score_the_same(model, pairs, tmp_path):
    out, whole = tmp_path / "lora", tmp_path / "whole"
    train(reward(model, pairs, out, use_peft=True, lora_r=4), "reward")
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(["what is the sky?it is blue</s>"], return_tensors="pt")
    read = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1).eval()
    assert main(["merge", "--model_name_or_path", str(out), "--output_dir", str(whole)]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(whole).eval()
    assert merged.config.pad_token_id == tokenizer.pad_token_id
    ours = load_reward_model(str(out), reward(out), CPU)
    with torch.no_grad():
        score = read(**ids).logits
        assert torch.equal(ours.model(**ids).logits, score)
        torch.testing.assert_close(merged(**ids).logits, score, rtol=1e-5, atol=1e-6)
    fresh = load_reward_model(model, reward(model), CPU)
    assert not torch.allclose(fresh.model(**ids).logits, score, atol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"use_peft": True, "lora_r": 4}], ids=["full", "lora"])
def test_a_resumed_run_ends_with_the_same_weights_bit_by_bit(changes, model, pairs, tmp_path):
    out = tmp_path / "run"
    config = reward(model, pairs, out, max_steps=4, save_steps=2, eval_fraction=0.0, **changes)
    train(config, "reward")
    expected = weights(out)
    (out / "checkpoint-4").rename(tmp_path / "gone")
    (out / "run.json").write_text(json.dumps(json.loads((out / "run.json").read_text()) | {"state": "training"}))
    train(dataclasses.replace(config, resume=True), "reward")
    got = weights(out)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_accumulation_makes_the_same_update(model, pairs, tmp_path):
    for name, size, steps in ("one", 4, 1), ("four", 1, 4):
        config = reward(model, pairs, tmp_path / name, max_steps=2, eval_fraction=0.0, learning_rate=1e-3)
        config = dataclasses.replace(config, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        train(config, "reward")
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=0, atol=2e-5)


RANKED = [
    {"prompt": f"what is {noun}?", "responses": ["it is blue", "hello there", f"it is {noun}", "no"], "scores": scores}
    for noun in ("the sky", "the sea", "grass", "a house", "the sun", "ice")
    for scores in ([4, 1, 2.5, 1], [4.0, 2.0, 3.0, 1.0])
]


def test_pairs_of_a_row_come_together_as_a_ranking(model, tmp_path):
    tokenizer = load_tokenizer(model)
    path = write_rows(tmp_path / "ranked.jsonl", RANKED)
    pairs = load_examples(path, "pair", tokenizer, 64, pairs="all").examples
    rankings = rankings_of(pairs)
    assert len(rankings) == len(RANKED)
    assert [ranking.ranks for ranking in rankings[:2]] == [[0, 1, 2, 2], [0, 1, 2, 3]]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in rankings[1].answers]
    assert texts == ["it is blue", "it is the sky", "hello there", "no"]
    assert rankings.lengths.tolist() == [max(len(r.prompt) + len(a) for a in r.answers) for r in rankings]
    assert rankings.counts.tolist() == [sum(map(len, r.answers)) for r in rankings]
    assert len(rankings.longest_sequence()) == rankings.lengths.max()
    some = rankings.select([5, 0])
    assert list(some) == [rankings[5], rankings[0]]
    assert some.fingerprint() != rankings.select([0, 5]).fingerprint()
    assert len(set(rankings.rows_as_bytes())) == len(RANKED)
    batch = collate(dataclasses.replace(some, padding_free=True), [1, 0])
    assert (batch.cu_groups.tolist(), batch.ranks.tolist()) == ([0, 4, 8], [0, 1, 2, 2, 0, 1, 2, 3])
    assert batch.tokens.num_tokens == int((some.prompts.lengths + some.counts).sum())  # each answer and prompt once
    plain = load_examples(write_rows(tmp_path / "p.jsonl", PAIRS), "pair", tokenizer, 64).examples
    two = rankings_of(plain)
    assert [(r.prompt, *r.answers) for r in two] == [(p.prompt, p.chosen, p.rejected) for p in plain]


@pytest.mark.parametrize("loss", ["plackett_luce", "all_pairs"])
def test_a_run_on_rankings(loss, model, tmp_path):
    path = write_rows(tmp_path / "ranked.jsonl", RANKED)
    config = reward(model, path, tmp_path / "run", reward_loss=loss, num_train_epochs=6.0, save_steps=2)
    train(config, "reward")
    rows = read_log(tmp_path / "run")
    assert [row for row in rows if "eval_accuracy" in row][-1]["eval_accuracy"] > 0.9
    scored = texts_of(None, tmp_path / "run")
    assert all(len(row["scores"]) == 4 for row in scored)
    with pytest.raises(UserError, match="label_smoothing has no meaning with reward_loss plackett_luce"):
        reward(model, path, tmp_path / "x", reward_loss="plackett_luce", label_smoothing=0.1)


WEIGHTED = [
    pair | {"margin": margin, "weight": weight}
    for pair, margin, weight in zip(PAIRS, (0.0, 1.5, -0.5, 3.0), (1.0, 2.0, 0.0, 0.25), strict=False)
]


def test_margins_and_weights_of_rows_reach_the_loss(model, tmp_path, capsys):
    """-w log sigmoid(s_chosen - s_rejected - margin), a mean over the rows whose weight is not 0."""
    config = reward(model, write_rows(tmp_path / "rows.jsonl", WEIGHTED), tmp_path / "run", eval_fraction=0.0)
    config = dataclasses.replace(config, max_steps=1)
    train(config, "reward")
    assert "margin" in capsys.readouterr().out
    tokenizer, losses = load_tokenizer(model), []
    own = load_reward_model(model, config, CPU).model.double()
    for row in WEIGHTED:
        if row["weight"]:
            texts = [row["prompt"] + row[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
            scores = [own(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
            losses.append(-row["weight"] * torch.nn.functional.logsigmoid(scores[0] - scores[1] - row["margin"]))
    expected = torch.stack(losses).mean().item()
    assert read_log(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["plackett_luce", "all_pairs"])
def test_weights_of_rankings_reach_the_loss(loss, model, tmp_path):
    rows = [row | {"weight": 1.0 + i % 3} for i, row in enumerate(RANKED[:4])]
    config = reward(model, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", reward_loss=loss)
    config = dataclasses.replace(config, max_steps=1, eval_fraction=0.0)
    train(config, "reward")
    tokenizer, losses = load_tokenizer(model), []
    own = load_reward_model(model, config, CPU).model.double()
    for row in rows:  # each alone, by transformers
        texts = [row["prompt"] + answer + tokenizer.eos_token for answer in row["responses"]]
        scores = torch.stack([own(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts])
        ranks = torch.tensor([sum(other > score for other in row["scores"]) for score in row["scores"]])
        groups = torch.tensor([0, len(texts)])
        alone = prefuse.reward_loss(scores, config.scores_loss(), cu_groups=groups, ranks=ranks).loss.item()
        losses.append(row["weight"] * alone)
    assert read_log(tmp_path / "run")[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_guards_of_scores():
    guards = Guards(reward("m"))
    sound = {
        "mean_reward": 3.0,
        "std_reward": 1.0,
        "unequal_lengths": 100,
        "prefers_longer": 0.6,
        "longer_is_chosen": 0.5,
    }
    guards.on_evaluation(1, sound)
    guards.on_evaluation(2, sound | {"unequal_lengths": 10, "prefers_longer": 1.0})
    assert guards.fired == []
    guards.on_evaluation(3, sound | {"prefers_longer": 0.75})
    assert guards.fired == ["length"]
    guards.on_evaluation(4, sound | {"mean_reward": -11.0})
    assert guards.fired == ["length", "score drift"]


def test_settings():
    config = validate(Config(model_name_or_path="m", dataset_name="d", output_dir="o"), "reward")
    assert config.scores_loss() == BradleyTerry()
    assert config.learning_rate == 2e-5
    assert config.learn_after_stop
    with pytest.raises(UserError, match="label_smoothing must be"):
        reward("m", label_smoothing=0.7)


def test_an_encoder_is_no_reward_model(tmp_path, pairs):
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    made = BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=1, **shape))
    folder = save_model(tmp_path / "bert", model=made)
    with pytest.raises(UserError, match="BertForSequenceClassification"):
        train(reward(folder, pairs, tmp_path / "run"), "reward")
