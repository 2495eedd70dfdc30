"""What rows bring beside their text reaches the loss, to the last digit; what is lacking is said in one line.

Weights, margins, scores, KTO's weights by the counts, control text, a reference that follows, and the held-out split of
conversations. First losses are known: the policy still is its reference.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prefuse.engine.cli import main
from prefuse.engine.data import DataError, load_examples
from prefuse.engine.data.feed import one_of_each_prompt
from prefuse.engine.data.order import hold_out
from prefuse.engine.errors import UserError
from prefuse.engine.evaluate import evaluate_command
from prefuse.engine.train import train
from tiny_run import LABELLED, PAIRS, read_log, save_model, settings, weights, write_rows
from tiny_tokenizer import tiny_tokenizer

LN2 = math.log(2)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("prefuse.engine.train.plot_curves", lambda log, picture: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def run(model, rows, folder, **changes):
    config = settings(
        model_name_or_path=model, dataset_name=write_rows(folder / "rows.jsonl", rows), output_dir=str(folder / "run"),
        **{"max_steps": 1, "per_device_train_batch_size": len(rows), "max_loss_ratio": 1e9} | changes,
    )  # fmt: skip
    train(config, "train")
    return [row for row in read_log(folder / "run") if "loss" in row]


def test_a_column_of_weights_multiplies_the_loss_of_its_rows_and_can_be_left_out(model, tmp_path, capsys):
    values = [0.5 + i % 3 for i in range(len(PAIRS))]
    rows = [row | {"weight": value} for row, value in zip(PAIRS, values, strict=True)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    weighted = run(model, rows, tmp_path / "a")[0]["loss"]
    assert weighted == pytest.approx(LN2 * sum(values) / len(values), rel=1e-6)
    said = capsys.readouterr().out
    assert "weight -> weight of the row" in said
    assert "rows are weighted: from 0.5 to 2.5, mean 1.5" in said
    assert run(model, rows, tmp_path / "b", row_weights=False)[0]["loss"] == pytest.approx(LN2, rel=1e-6)


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({"margin": 1.5, "score_chosen": 9, "score_rejected": 1}, 1.5),  # a margin wins over scores
        ({"chosen_rating": "4", "rejected_rating": "1"}, 3.0),
        ({"chosenScore": 0.75, "rejectedScore": 0.5}, 0.25),
    ],
)
def test_margins_stand_in_the_sigmoid(columns, margin, model, tmp_path):
    loss = run(model, [row | columns for row in PAIRS], tmp_path, loss_type="odpo", odpo_scale=2.0)[0]["loss"]
    assert loss == pytest.approx(math.log1p(math.exp(2 * margin)), rel=1e-6)


def test_scores_of_several_objectives_are_the_margin_of_modpo(model, tmp_path):
    rows = [
        row | {"safety_chosen": 0.2, "safety_rejected": 1.0, "chosen_brevity": 3, "rejected_brevity": 1}
        for row in PAIRS
    ]
    asked = {"objective_weights": "safety=0.5,brevity=0.1", "modpo_weight": 0.4, "loss_type": "modpo"}
    margin = 0.5 * (0.2 - 1.0) + 0.1 * (3 - 1)
    assert run(model, rows, tmp_path, **asked)[0]["loss"] == pytest.approx(math.log1p(math.exp(margin / 0.4)), rel=1e-6)


def test_scores_become_0_to_1(model, tmp_path, capsys):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "score": i % 5} for i, row in enumerate(PAIRS)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    loss = run(model, rows, tmp_path / "a", loss_type="una_score", una_distance="mse")[0]["loss"]
    assert loss == pytest.approx(sum((0.5 - i % 5 / 4) ** 2 for i in range(len(PAIRS))) / len(PAIRS), rel=1e-6)
    loss = run(model, rows, tmp_path / "b", loss_type="una_score", una_distance="mse", score_low=1.0, score_high=3.0)
    wanted = [(0.5 - min(max(i % 5 - 1, 0) / 2, 1)) ** 2 for i in range(len(PAIRS))]
    assert loss[0]["loss"] == pytest.approx(sum(wanted) / len(PAIRS), rel=1e-6)
    said = capsys.readouterr().out
    assert "scores from 0 to 4 become 0 to 1" in said
    assert "scores from 1 to 3 become 0 to 1 (score_low, score_high); 5 beyond count as the nearer end" in said


def test_kto_weights_come_from_the_counts_in_training_and_in_evaluation(model, tmp_path, capsys):
    rows = [*LABELLED[1::2], *LABELLED[1::2], *LABELLED[0::2]]
    loss = run(model, rows, tmp_path, loss_type="kto", kto_weights="auto")[0]["loss"]
    said = "KTO weights of 12 desirable and 6 undesirable rows: desirable_weight 1, undesirable_weight 1.5"
    assert said in capsys.readouterr().out
    assert loss == pytest.approx((12 * 1.0 + 6 * 1.5) / 2 / 18, rel=1e-6)
    config = settings(
        "eval", model_name_or_path=model, ref_model_name_or_path=model, dataset_name=str(tmp_path / "rows.jsonl"),
        eval_fraction=1.0, loss_type="kto", kto_weights="auto",
    )  # fmt: skip
    assert evaluate_command(config)["loss"] == pytest.approx(loss, rel=1e-6)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (PAIRS, {"loss_type": "odpo"}, 'the loss needs margins of its rows, and they have none. Fix: a "margin"'),
        (LABELLED, {"loss_type": "mo_kto"}, "the loss needs margins of its rows, and they have none"),
        (PAIRS, {"loss_type": "una_score"}, "the loss needs scores of its rows, and they have none"),
        (PAIRS, {"loss_type": "modpo", "objective_weights": "safety=1"}, 'objective_weights names "safety", and there'),
        (PAIRS, {"loss_type": "modpo", "objective_weights": "safety"}, 'objective_weights has "safety"; expected NAME'),
        (LABELLED[1::2], {"loss_type": "kto", "kto_weights": "auto"}, "kto_weights auto: expected rows of both kinds"),
        (PAIRS, {"loss_type": "csft", "control_good": "a", "control_bad": "a"}, "have the same tokens"),
    ],
)  # fmt: skip
def test_what_rows_lack_is_said_in_a_line(rows, changes, message, model, tmp_path):
    with pytest.raises((UserError, DataError), match=message.replace("(", r"\(")) as caught:
        run(model, rows, tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "kto", "kto_weights": "auto", "desirable_weight": 2.0}, "drop them, or it"),
        ({"loss_type": "dpo", "kto_weights": "auto"}, "kto_weights has a meaning only with loss_type kto, mo_kto"),
        ({"loss_type": "simpo", "sync_ref_model": True}, "sync_ref_model has a meaning only with loss_type dpo"),
        ({"sync_ref_model": True, "use_peft": True}, "the base of the adapters"),
        ({"sync_ref_model": True, "reference_cache": "x"}, "reference_cache keeps what stays the same"),
        ({"ref_model_sync_steps": 3}, "has a meaning only with sync_ref_model true"),
        ({"loss_type": "kto", "use_weighting": True}, "use_weighting has a meaning only with loss_type"),
        ({"loss_type": "dpo", "control_good": "x"}, "control_good has a meaning only with loss_type csft"),
        ({"loss_type": "una_score", "score_low": 2.0, "score_high": 1.0}, "score_low 2 must be below score_high 1"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        settings(model_name_or_path="m", dataset_name="d", output_dir="o", **changes)


def test_control_text_stands_before_each_prompt_and_generation_asks_for_the_good_one(model, tmp_path, monkeypatch):
    run(model, LABELLED, tmp_path, loss_type="csft", control_good="good", control_bad="bad", eval_fraction=0.3)
    first = {"model_name_or_path": str(tmp_path / "run"), "dataset_name": str(tmp_path / "rows.jsonl")}
    words = [word for name, value in first.items() for word in (f"--{name}", value)]
    asked: list = []
    monkeypatch.setattr(
        "prefuse.engine.generate.sample_for", lambda config, lm, tokenizer, prompts, *_: asked.append(prompts) or []
    )
    for more in (["--control", "bad"], []):
        with pytest.raises(IndexError):  # nobody answers here
            main(["generate", *words, "--device", "cpu", "--max_length", "64", *more])
    tokenizer = tiny_tokenizer()
    for prompts, control in zip(asked, ("bad", "good"), strict=True):
        assert all(tokenizer.decode(ids, skip_special_tokens=True).startswith(f"{control}what") for ids in prompts)


def test_of_each_prompt_one_answer_is_drawn():
    rows = [{"prompt": f"p {i // 3}", "completion": f"a {i}", "label": True} for i in range(60)]
    examples = load_examples(rows_file(rows), "labelled", tiny_tokenizer(), 64).examples
    first, second = (one_of_each_prompt(examples, seed) for seed in (0, 1))
    assert first == one_of_each_prompt(examples, 0) != second
    assert [i // 3 for i in first] == [i // 3 for i in second] == list(range(20))


def rows_file(rows):
    import tempfile
    from pathlib import Path

    return write_rows(Path(tempfile.mkdtemp()) / "rows.jsonl", rows)


# ---------------------------------------------------------------------------------------------------------
# A reference that follows

TR = {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 6, "save_steps": 1, "eval_fraction": 0.3,
      "eval_steps": 3, "per_device_train_batch_size": 3}  # fmt: skip


def reference_of(checkpoint):
    return load_file(checkpoint / "reference-00001.safetensors")


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_the_reference_is_what_the_paper_says_after_each_step(alpha, model, tmp_path):
    run(model, PAIRS, tmp_path, **TR, ref_model_mixup_alpha=alpha, save_total_limit=0)
    expected = {name: value.double() for name, value in weights(model).items()}
    for step in range(1, 7):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        if step % 2 == 0:
            policy = weights(folder)
            expected = {name: alpha * policy[name].double() + (1 - alpha) * x for name, x in expected.items()}
            expected = {name: x.float().double() for name, x in expected.items()}
        found = reference_of(folder)
        assert all(torch.equal(found[name].double(), value) for name, value in expected.items() if name in found)
        assert len(found.keys() & expected.keys()) > 10


@pytest.mark.parametrize("loss_type", ["dpo", "kto"])
def test_a_run_with_a_following_reference_resumes_to_the_last_bit(loss_type, model, tmp_path):
    rows = PAIRS if loss_type == "dpo" else LABELLED
    run(model, rows, tmp_path, **TR, loss_type=loss_type, save_total_limit=0)
    whole, wanted = weights(tmp_path / "run"), read_log(tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "model.safetensors").unlink()
    run(model, rows, tmp_path, **TR, loss_type=loss_type, save_total_limit=0, resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "run").items())
    timed = {"tokens_per_second", "pairs_per_second", "samples_per_second", "mfu", "seconds"}
    for before, now in zip(wanted, read_log(tmp_path / "run"), strict=True):
        assert {k: v for k, v in before.items() if k not in timed} == {k: v for k, v in now.items() if k not in timed}


def test_a_damaged_reference_is_passed_over(model, tmp_path, caplog):
    run(model, PAIRS, tmp_path, **TR, save_total_limit=0)
    (tmp_path / "run" / "model.safetensors").unlink()
    newest = tmp_path / "run" / "checkpoint-6" / "reference-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8] + bytes(8))
    run(model, PAIRS, tmp_path, **TR, save_total_limit=0, resume=True)
    assert "reference-00001.safetensors does not have the hash" in caplog.text


def test_the_strength_of_beta_dpo_follows_and_is_resumed(model, tmp_path):
    changes = {"loss_type": "beta_dpo", "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
    run(model, PAIRS, tmp_path, **changes, save_total_limit=0)
    whole = weights(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["loss"]["baseline"] != 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "model.safetensors").unlink()
    run(model, PAIRS, tmp_path, **changes, save_total_limit=0, resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "run").items())


# ---------------------------------------------------------------------------------------------------------
# The held-out split


def test_the_parts_of_one_conversation_stay_on_one_side():
    tree = []
    for number in range(30):
        root, answer, follow = (f"{number}{part}" for part in "abc")
        tree += [
            {"message_id": root, "parent_id": None, "text": f"q {number}", "role": "prompter", "rank": None},
            {"message_id": answer, "parent_id": root, "text": f"yes {number}", "role": "assistant", "rank": 0},
            {"message_id": f"{number}x", "parent_id": root, "text": "no", "role": "assistant", "rank": 1},
            {"message_id": follow, "parent_id": answer, "text": f"and {number}", "role": "prompter", "rank": None},
            {"message_id": f"{number}d", "parent_id": follow, "text": "so", "role": "assistant", "rank": 0},
            {"message_id": f"{number}e", "parent_id": follow, "text": "or", "role": "assistant", "rank": 1},
        ]
    examples = load_examples(rows_file(tree), "pair", tiny_tokenizer(), 64).examples
    assert len(examples) == 60
    kept, held = hold_out(examples.prompts, 0.3, 0, threads=examples.threads)
    assert len(held) == 18
    assert not {examples.threads[i] for i in kept} & {examples.threads[i] for i in held}
    _, alone = hold_out(examples.prompts, 0.3, 0)
    assert {examples.threads[i] for i in alone} & {examples.threads[i] for i in range(60) if i not in alone}


def test_sft_learns_the_best_ranked_answers_of_trees_and_says_so():
    tree = [
        {"message_id": "a", "parent_id": None, "text": "q", "role": "prompter", "rank": None},
        {"message_id": "b", "parent_id": "a", "text": "middling", "role": "assistant", "rank": 1},
        {"message_id": "c", "parent_id": "a", "text": "best", "role": "assistant", "rank": 0},
        {"message_id": "d", "parent_id": "a", "text": "worst", "role": "assistant", "rank": 2},
    ]
    tokenizer = tiny_tokenizer()
    data = load_examples(rows_file(tree), "sft", tokenizer, 64)
    (learned,) = data.examples
    assert tokenizer.decode(learned.completion, skip_special_tokens=True).strip() == "best"
    assert (
        "of rows with a better and a worse answer, or with ranked ones, the best is learned and no other" in data.notes
    )


def test_texts_without_a_prompt_are_held_out_too(model, tmp_path):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": f"the sky is {word}"} for word in ("blue", "green", "a", "no")])
    out = {"model_name_or_path": model, "dataset_name": texts, "output_dir": str(tmp_path / "run")}
    train(settings("sft", **out, eval_fraction=0.25, max_steps=1), "sft")
    assert any("eval_loss" in row for row in read_log(tmp_path / "run"))


def test_an_id_that_is_an_object_is_one_skipped_row():
    rows = [
        {"message_id": "a", "parent_id": None, "text": "q", "role": "prompter", "rank": None},
        {"message_id": "b", "parent_id": "a", "text": "yes", "role": "assistant", "rank": 0},
        {"message_id": "c", "parent_id": "a", "text": "no", "role": "assistant", "rank": 1},
        {"message_id": {"x": 1}, "parent_id": "a", "text": "odd", "role": "assistant", "rank": 2},
        {"message_id": "d", "parent_id": ["a"], "text": "odd", "role": "assistant", "rank": 2},
    ]
    data = load_examples(rows_file(rows), "pair", tiny_tokenizer(), 64)
    assert len(data.examples) == 1
    assert [skip.reason for skip in data.skipped] == ["its message_id and parent_id must be texts or numbers"] * 2
