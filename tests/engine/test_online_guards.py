"""Guards of online training: each is provoked by what it is for, says it once with what to do, and is silent else."""

import pytest

from online_runs import online
from prefuse.engine.rounds.guards import FIRST, LAST, OnlineGuards
from tiny_run import save_model, settings

USUAL = {
    "reward": 0.5, "completions/mean_length": 20.0, "completions/duplicates": 0.1, "frac_reward_zero_std": 0.2,
    "completions/clipped_ratio": 0.0, "unscored": 0.0,
}  # fmt: skip


def guards(**changes) -> OnlineGuards:
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "scorer": ["length=5"]}
    return OnlineGuards(settings("online", **given | {"num_generations": 4} | changes))


def rounds(guard: OnlineGuards, count: int, **changes) -> None:
    for number in range(count):
        guard.on_round(number, {**USUAL, **changes}, 16)


PROVOKED = {
    "length growth": {"completions/mean_length": 41.0},
    "duplicate samples": {"completions/duplicates": 0.95},
    "rewards all equal": {"frac_reward_zero_std": 1.0},
    "truncated answers rewarded": {"completions/clipped_ratio": 0.5, "reward": 0.5, "reward_truncated": 0.9},
    "answers without a score": {"unscored": 0.75},
}


@pytest.mark.parametrize("name", PROVOKED)
def test_a_round_gone_wrong_is_named_once(name, caplog):
    guard = guards()
    rounds(guard, FIRST)
    assert guard.fired == []
    rounds(guard, LAST + 2, **PROVOKED[name])
    assert guard.fired == [name]
    said = [record.message for record in caplog.records if f"guard, {name}" in record.message]
    assert len(said) == 1
    assert guard.stop == ""


def test_usual_rounds_are_silent(caplog):
    guard = guards()
    rounds(guard, 30, **{"completions/clipped_ratio": 0.5, "reward_truncated": 0.1})
    guard.on_log(1, {"entropy": 2.0})
    guard.on_evaluation(1, {"reward": 0.5, "reward_std": 0.5})
    assert guard.fired == []
    assert not caplog.records


def test_guard_action_stop_ends_the_run():
    guard = guards(guard_action="stop")
    rounds(guard, FIRST)
    rounds(guard, LAST, **PROVOKED["length growth"])
    assert guard.stop.startswith("length growth")


def test_entropy_that_collapses(caplog):
    guard = guards()
    for entropy in [2.0] * FIRST + [1.0] * LAST:
        guard.on_log(1, {"entropy": entropy})
    assert guard.fired == []
    for _ in range(LAST):
        guard.on_log(2, {"entropy": 0.1})
    assert guard.fired == ["entropy collapse"]


@pytest.mark.parametrize("what", ["gold", "reward"])
def test_reward_that_rises_while_gold_falls(what, caplog):
    guard = guards()
    rounds(guard, LAST)
    guard.on_evaluation(1, {what: 0.5, f"{what}_std": 1.0})
    rounds(guard, LAST, reward=0.8)
    guard.on_evaluation(2, {what: 0.45, f"{what}_std": 1.0})
    assert guard.fired == []  # within max_gold_drop of its spread
    guard.on_evaluation(3, {what: 0.3, f"{what}_std": 1.0})
    assert guard.fired == ["over-optimization"]
    assert "from 0.5 to 0.8" in caplog.text


def test_gold_that_falls_with_the_reward_is_no_over_optimization():
    guard = guards()
    rounds(guard, LAST)
    guard.on_evaluation(1, {"gold": 0.5, "gold_std": 1.0})
    rounds(guard, LAST, reward=0.3)
    guard.on_evaluation(2, {"gold": 0.1, "gold_std": 1.0})
    assert guard.fired == []


def test_the_kl_budget_is_said_or_followed_by_beta():
    said = guards(kl_target=0.1)
    said.on_kl(1, 0.09, 16)
    assert said.fired == []
    said.on_kl(2, 0.11, 16)
    assert said.fired == ["KL budget"]
    followed = guards(kl_target=0.1, beta_horizon=160, algorithm="rloo", beta=0.05)
    followed.on_kl(1, 0.5, 16)  # far above: the error is clipped at 0.2 (arXiv 1909.08593)
    assert followed.penalty == pytest.approx(0.05 * (1 + 0.2 * 16 / 160))
    followed.on_kl(2, 0.09, 16)
    assert followed.penalty == pytest.approx(0.05 * 1.02 * (1 - 0.1 * 16 / 160))
    assert followed.fired == []


def test_what_a_resumed_run_knows():
    guard = guards()
    rounds(guard, FIRST)
    guard.on_evaluation(1, {"gold": 0.5, "gold_std": 1.0})
    again = guards()
    again.restore(guard.state())
    rounds(again, LAST, **PROVOKED["length growth"])
    assert again.fired == ["length growth"]
    assert again.best_gold == 0.5


def test_a_run_with_equal_rewards_is_told_so(tmp_path, caplog):
    """By the whole way: a rule that says 1 to everything."""
    model = save_model(tmp_path / "model")
    steps = online(model, tmp_path, rule="same", max_steps=LAST, learning_rate=1e-4)
    assert "guard, rewards all equal" in caplog.text
    assert all(line["frac_reward_zero_std"] == 1 and line["grad_norm"] == 0 for line in steps)


@pytest.mark.slow
def test_a_rule_that_pays_what_gold_does_not(tmp_path, caplog):
    """The rule pays vowels, gold takes them off: as the reward rises, gold falls."""
    model = save_model(tmp_path / "model")
    steps = online(
        model, tmp_path, max_steps=20, learning_rate=2e-3, lr_scheduler_type="constant", warmup_ratio=0.0,
        num_generations=8, eval_fraction=0.25, eval_steps=4, missing_eos_penalty=0.0,
        gold_scorer=[f"{tmp_path / 'rules.py'}:gold"], per_device_eval_batch_size=16,
    )  # fmt: skip
    assert "guard, over-optimization: the reward in training has risen" in caplog.text
    assert "loss explosion" not in caplog.text  # the loss of a policy hovers about 0
    rewards = [line["reward"] for line in steps if "reward" in line]
    gold = [line["eval_gold"] for line in steps if "eval_gold" in line]
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])
    assert gold[-1] < max(gold)
