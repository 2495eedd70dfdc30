"""`prefuse online`: every algorithm's round, the first ratio of exactly 1, the same bits after a kill, the metrics."""

import json
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from online_runs import online
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.errors import UserError
from prefuse.engine.rounds import learn, samples
from prefuse.engine.run.ranks import ALONE
from prefuse.engine.score import scorers
from prefuse.engine.score.judge import Judge, Reply
from tiny_run import save_model, settings, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def rounds_of(folder):
    return [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("samples/*.jsonl"))
    ]


def without_clocks(log):
    clocks = ("tokens_per_second", "samples_per_second", "pairs_per_second", "mfu")
    return [{name: value for name, value in line.items() if name not in clocks} for line in log]


SETTINGS = {
    "grpo": {"beta": 0.1}, "rloo": {}, "reinforce": {}, "ppo": {}, "online_dpo": {},
    "iterative_dpo": {"pairs": "all"}, "kto": {}, "best_of_n": {},
}  # fmt: skip


QUICK = ("grpo", "online_dpo")


@pytest.mark.parametrize(
    "algorithm", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_an_algorithm_samples_scores_and_learns(algorithm, model, tmp_path):
    steps = online(model, tmp_path, algorithm=algorithm, **SETTINGS[algorithm])
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert 0 <= line["reward"] <= 1
        assert line["completions/mean_length"] <= 8
    moved = [
        not torch.equal(a, b) for a, b in zip(weights(model).values(), weights(tmp_path / "run").values(), strict=True)
    ]
    assert any(moved)
    first = {"online_dpo": math.log(2), "iterative_dpo": math.log(2), "kto": 0.5}
    if algorithm in first:  # the policy still is its reference
        assert steps[0]["loss"] == pytest.approx(first[algorithm], abs=1e-6)
    if algorithm in ("grpo", "rloo", "ppo"):
        assert steps[0]["clip_ratio/region_mean"] == 0
    if algorithm in ("grpo", "rloo", "reinforce", "ppo"):
        assert 0 < steps[0]["entropy"] < math.log(300)
    if "beta" in SETTINGS[algorithm] or algorithm in ("rloo", "ppo"):
        assert steps[0]["kl"] == 0
        assert steps[1]["kl"] != 0


def test_a_round_is_kept_with_its_samples_and_scores(model, tmp_path):
    online(model, tmp_path, max_steps=3)
    rounds = rounds_of(tmp_path / "run")
    assert [head["round"] for head, *_ in rounds] == [0, 1, 2]
    seen = [row["row"] for _, *rows in rounds for row in rows]
    assert len(seen) == 12
    assert len(set(seen)) == 12  # an epoch meets no prompt twice
    for _, *rows in rounds:
        assert len(rows) == 4  # 16 answers, 4 to each prompt
        for row in rows:
            assert len(row["answers"]) == len(row["ids"]) == len(row["scores"]) == 4
            assert row["scores"] == [sum(c in "aeiou" for c in answer) / 8 for answer in row["answers"]]
            assert [ids[-1] == 1 for ids in row["ids"]] == row["stopped"] or not all(row["stopped"])
            assert all(len(ids) <= 8 for ids in row["ids"])


def test_the_first_ratio_is_exactly_1(model, tmp_path):
    """Old log-probabilities come from a pass of their own, before the first of several steps on a round's samples: the
    first step on each sample finds none of them changed, even with a clip of 0."""
    bounds = {"epsilon": 0.0, "epsilon_high": 0.0}
    steps = online(model, tmp_path, num_iterations=2, max_steps=2, **bounds)
    assert (tmp_path / "run/samples/round-00000.safetensors").exists()
    assert steps[0]["clip_ratio/region_mean"] == 0
    assert steps[0]["clip_ratio/high_max"] == 0
    assert steps[1]["clip_ratio/region_mean"] > 0
    assert [line["staleness"] for line in steps] == [0, 1]


@pytest.mark.slow
def test_the_same_run_has_the_same_bits_and_another_seed_other_samples(model, tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        online(model, tmp_path, out=name, seed=seed)
    a, b, c = (rounds_of(tmp_path / name) for name in ("one", "same", "other"))
    assert a == b
    assert a != c
    for x, y in zip(weights(tmp_path / "one").values(), weights(tmp_path / "same").values(), strict=True):
        assert torch.equal(x, y)


CUT = {name: {"num_iterations": 2} for name in SETTINGS} | {
    "grpo": {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.05}, "best_of_n": {"steps_per_generation": 2},
    "online_dpo": {"num_iterations": 2, "pairs": "all"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", CUT)
def test_a_run_that_is_cut_off_within_a_round_goes_on_to_the_same_bits(algorithm, model, tmp_path, monkeypatch):
    changes = CUT[algorithm] | {"algorithm": algorithm}
    whole = online(model, tmp_path, out="whole", max_steps=5, **changes)
    calls = []

    def cut_off(run, *args):  # after the third step, as if killed: nothing more is written
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return original(run, *args)

    from prefuse.engine import train

    original = train.optimizer_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", cut_off)
        with pytest.raises(RuntimeError, match="killed"):
            online(model, tmp_path, out="cut", max_steps=5, save_steps=3, **changes)
    resumed = online(model, tmp_path, out="cut", max_steps=5, save_steps=3, resume=True, **changes)
    for x, y in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values(), strict=True):
        assert torch.equal(x, y)
    assert without_clocks(whole) == without_clocks(resumed)
    assert rounds_of(tmp_path / "whole") == rounds_of(tmp_path / "cut")


def test_a_run_that_is_killed_between_its_last_step_and_its_model_is_finished(model, tmp_path, monkeypatch):
    from prefuse.engine import train

    def cut_off(*_):
        raise RuntimeError("killed")

    online(model, tmp_path, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "publish_model", cut_off)
        with pytest.raises(RuntimeError, match="killed"):
            online(model, tmp_path, out="cut", save_steps=1)
    online(model, tmp_path, out="cut", save_steps=1, resume=True)
    for x, y in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
def test_held_out_prompts_are_answered_and_scored(model, tmp_path):
    rules = tmp_path / "rules.py"
    steps = online(
        model, tmp_path, eval_fraction=0.25, eval_steps=1, gold_scorer=[f"{rules}:gold"], max_steps=2,
    )  # fmt: skip
    evaluations = [line for line in steps if "eval_reward" in line]
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    for line in evaluations:
        assert line["eval_gold"] == pytest.approx(-line["eval_reward"])
        assert line["eval_completions/mean_length"] > 0
    trained = {row["row"] for _, *rows in rounds_of(tmp_path / "run") for row in rows}
    assert len(trained) <= 12


@pytest.mark.slow
def test_answers_are_shaped_by_top_p_and_min_p(model, tmp_path):
    """The narrowest nucleus is the most likely token: all answers of a group are one."""
    for name, how in (("nucleus", {"top_p": 1e-6}), ("min_p", {"min_p": 1.0})):
        online(model, tmp_path, out=name, max_steps=1, **how)
        for _, *rows in rounds_of(tmp_path / name):
            assert all(len(set(row["answers"])) == 1 for row in rows)


@pytest.mark.slow
def test_groups_share_the_run_of_their_prompt(model, tmp_path, monkeypatch):
    """The trunk sees each prompt once for its four answers."""
    seen = []
    original = learn.batch_of

    def spy(*args, **kwargs):
        batch = original(*args, **kwargs)
        seen.append((batch.tokens.num_tokens, batch.tokens.unshared_tokens, len(batch.targets)))
        return batch

    from prefuse.engine import online as story

    monkeypatch.setattr(story, "batch_of", spy)
    online(model, tmp_path, max_steps=1)
    runs, unshared, answers = seen[0]
    assert unshared - runs == 3 * (runs - answers)


# ---- what is made of scores ----------------------------------------------------------------------


def a_round(scores, lengths=None, stopped=True):
    groups = [
        [[5 + k] * (lengths[p][k] if lengths else 2) for k in range(len(group))] for p, group in enumerate(scores)
    ]
    kept = [[stopped] * len(group) for group in scores]
    names = [f"row{p}" for p in range(len(scores))]
    texts = [["x"] * len(group) for group in scores]
    scores, whole = torch.tensor(scores).double(), [[True] * len(group) for group in scores]
    return samples.Round(0, 0, 1, list(range(len(scores))), names, groups, texts, kept, whole, scores)


PROMPT_IDS = [[1, 2, 3], [4, 2], [9]]


def made(scores, algorithm, **changes):
    config = settings("online", model_name_or_path="m", dataset_name="d", output_dir="o", scorer=["length=5"],
                      algorithm=algorithm, num_generations=4, **changes)  # fmt: skip
    round_ = a_round(scores)
    return learn.material_of(round_, PROMPT_IDS, config, ALONE, config.algorithm_beta()), round_


def test_pairs_labels_and_demonstrations_of_scores():
    nan = math.nan
    scores = [[1.0, 3.0, 2.0, nan], [5.0, 5.0, 5.0, 5.0], [0.0, 1.0, 1.0, nan]]
    best, _ = made(scores, "online_dpo")
    assert [(e.prompt, e.chosen[0], e.rejected[0]) for e in best.examples] == [([1, 2, 3], 6, 5), ([9], 6, 5)]
    every, _ = made(scores, "online_dpo", pairs="all")
    assert [(e.chosen[0], e.rejected[0]) for e in every.examples] == [(6, 5), (7, 5), (6, 7), (6, 5), (7, 5)]
    labels, _ = made(scores, "kto")
    assert [(e.completion[0], e.label) for e in labels.examples] == [
        (5, False),
        (6, True),
        (5, False),
        (6, True),
        (7, True),
    ]
    chosen, _ = made(scores, "best_of_n")
    assert [e.completion[0] for e in chosen.examples] == [6, 6]
    nothing, _ = made([[2.0, 2.0, 2.0, 2.0]], "online_dpo")
    assert nothing is None


def test_advantages_of_scores():
    scores = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    material, _ = made(scores, "grpo")
    spread = torch.tensor(scores[0]).std().item() + 1e-4
    expected = [0.5 / spread, -0.5 / spread, -0.5 / spread, 0.5 / spread, 0, 0, 0, 0]
    assert [x[0].item() for x in material.advantages] == pytest.approx(expected, rel=1e-6)
    plain, _ = made(scores, "grpo", scale_rewards="none")
    assert [x[0].item() for x in plain.advantages] == pytest.approx([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])
    others, _ = made(scores, "rloo", beta=0.0)
    assert [x[0].item() for x in others.advantages] == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0])


def test_cut_off_answers_lose_or_are_left_out():
    config = settings("online", model_name_or_path="m", dataset_name="d", output_dir="o", scorer=["length=5"],
                      num_generations=4, missing_eos_penalty=2.0)  # fmt: skip
    round_ = a_round([[1.0, 2.0, 3.0, 4.0]])
    round_.stopped[0][1] = False
    assert learn.adjusted_scores(round_, config).tolist() == [[1.0, 0.0, 3.0, 4.0]]
    masked = settings("online", model_name_or_path="m", dataset_name="d", output_dir="o", scorer=["length=5"],
                      num_generations=4, mask_truncated_completions=True)  # fmt: skip
    material = learn.material_of(round_, PROMPT_IDS, masked, ALONE, 0.0)
    assert [bool(material.examples.learned_of(i).all()) for i in range(4)] == [True, False, True, True]


def test_a_damaged_or_foreign_round_is_not_taken(tmp_path):
    round_ = a_round([[1.0, math.nan], [0.0, 2.0]])
    samples.save_round(tmp_path, round_, ALONE)
    back = samples.load_round(tmp_path, 0, 0, 1, [0, 1], ALONE)
    assert back.ids == round_.ids
    assert torch.equal(back.scores.nan_to_num(9.0), round_.scores.nan_to_num(9.0))
    for step, seed, prompts in ((1, 1, [0, 1]), (0, 2, [0, 1]), (0, 1, [1, 0])):
        assert samples.load_round(tmp_path, 0, step, seed, prompts, ALONE) is None
    path = samples.path_of(tmp_path, 0, ALONE)
    path.write_text(path.read_text()[:40])
    assert samples.load_round(tmp_path, 0, 0, 1, [0, 1], ALONE) is None


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": None}, "scorer is required"),
        ({"num_generations": 1}, "grpo compares answers to one prompt: set num_generations to 2 or more"),
        ({"num_generations": 3}, "which num_generations 3 does not divide"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"beta_horizon": 10}, "give kl_target"),
        ({"kl_target": 0.1, "beta_horizon": 10}, "it is for rloo and ppo, not grpo"),
        ({"algorithm": "rloo", "delta": 2.0}, "delta has a meaning only with algorithm grpo, got algorithm rloo"),
        ({"algorithm": "best_of_n", "beta": 0.1}, "beta has a meaning only with algorithm grpo, rloo"),
        ({"delta": 0.5}, "delta must be above 1, got 0.5"),
        ({"scorer_weights": [1.0, 2.0]}, "scorer_weights has 2 numbers for 1 scorers"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, message):
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "scorer": ["length=5"]}
    with pytest.raises(UserError, match=message):
        validate(Config(**given | changes), "online")


def test_a_run_without_any_pair_says_so(model, tmp_path, caplog):
    """All rewards equal: no step makes an update, and the guard names the reason."""
    with pytest.raises(UserError, match="no round had anything to learn from: with online_dpo"):
        online(model, tmp_path, algorithm="online_dpo", rule="same", max_steps=4)


@pytest.mark.slow
def test_several_objectives_are_learned_by_their_weights(model, tmp_path):
    """The sum of scores times weights is what a round learns from, and each objective is logged by itself."""
    rules = tmp_path / "rules.py"
    both = {"scorer": [f"{rules}:vowels", f"{rules}:gold"], "scorer_weights": [1.0, 0.25]}
    steps = online(model, tmp_path, max_steps=2, **both)
    for line in steps:
        first, second = (line[f"rewards/{rules}:{name}/mean"] for name in ("vowels", "gold"))
        assert second == pytest.approx(-first)
        assert line["reward"] == pytest.approx(0.75 * first)
    for _, *rows in rounds_of(tmp_path / "run"):
        for row in rows:
            vowels, gold = row["parts"].values()
            assert row["scores"] == pytest.approx([a + 0.25 * b for a, b in zip(vowels, gold, strict=True)])


def test_mismatches_of_a_round_are_of_other_prompts_and_one_prompt_alone_teaches_nothing():
    """KTO's z0 reads a prompt's answer after another prompt; a prompt that stands twice in the round is one prompt."""
    scores = [[1.0, 3.0, 2.0, math.nan], [0.0, 1.0, 1.0, 0.0]]
    material, round_ = made(scores, "kto")
    config = settings("online", model_name_or_path="m", dataset_name="d", output_dir="o", scorer=["length=5"],
                      algorithm="kto", num_generations=4, max_length=64)  # fmt: skip
    kept, mismatches = learn.with_mismatches(material, round_, config, ALONE)
    assert kept is material
    both = {tuple(PROMPT_IDS[p]): {tuple(ids) for ids in round_.ids[p]} for p in (0, 1)}
    for i, (prompt, completion) in enumerate(zip(mismatches.prompts, mismatches.completions, strict=True)):
        assert list(prompt) == PROMPT_IDS[material.owners[i]]
        assert any(tuple(completion) in own for other, own in both.items() if other != tuple(prompt))
    alone, round_ = made(scores[:1], "kto")
    assert learn.with_mismatches(alone, round_, config, ALONE) == (None, None)
    twice, round_ = made(scores, "kto")
    first = twice.examples.prompts.take(np.zeros(len(twice.owners), np.int64))
    same = replace(twice, examples=replace(twice.examples, prompts=first))
    assert learn.with_mismatches(same, round_, config, ALONE) == (None, None)


@dataclass
class ShorterIsBetter:
    """A judge that reads what it is asked, and is sure of the shorter answer with probability 0.9."""

    name: str
    key: str = "shorter"

    def ask(self, questions, keep, cache):
        replies = {}
        for key, question in zip(keep, questions, strict=True):
            found = re.search(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\n\[End\]", question[0]["content"], re.S)
            a, b = map(len, found.groups())
            share = 0.5 if a == b else 0.9 if a < b else 0.1
            replies[key] = Reply("", {"A": share, "B": 1 - share})
        return replies


def test_a_judge_scores_in_the_loop_and_one_that_judges_itself_is_named(model, tmp_path, caplog, monkeypatch):
    """Reinforcement learning from AI feedback without a reward model: the score is the share of comparisons won."""
    judge = Judge(ShorterIsBetter(model))
    monkeypatch.setattr(scorers, "scorer_of", lambda specs, config, device: judge)
    online(model, tmp_path, num_generations=2, per_device_train_batch_size=4, max_steps=2)
    assert f"judge {model} judges its own answers" in caplog.text
    for _, *rows in rounds_of(tmp_path / "run"):
        for row in rows:
            (a, b), (first, second) = map(len, row["answers"]), row["scores"]
            assert first + second == pytest.approx(1)  # of two answers what one wins the other loses
            assert (first > second) == (a < b)


def test_a_judge_that_says_nothing_of_use_leaves_a_run_without_rewards(model, tmp_path):
    """Random weights as a judge: no verdict. The run goes on, learns nothing and draws its curves without a reward."""
    (line,) = online(model, tmp_path, scorer=[f"judge={model}"], num_generations=2, per_device_train_batch_size=4,
                     max_steps=1, max_completion_length=4)  # fmt: skip
    assert line["unscored"] == 1
    assert line["reward"] is None
    assert line["grad_norm"] == 0
    assert (tmp_path / "run" / "curves.png").is_file()
