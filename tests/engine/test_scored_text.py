"""What a scorer reads: its own template, with the arguments, the system prompt and the day of training.

The template here prints the day and reads `enable_thinking`, so that whatever is left out changes the text.
"""

import datetime
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from prefuse.engine.data.dataset import text_options
from prefuse.engine.data.of_run import text_of_scorer
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.steps import load_steps
from prefuse.engine.data.templates import TextOptions
from prefuse.engine.revise import tokens_of
from prefuse.engine.rounds.sampler import Sampler
from prefuse.engine.rounds.step_labels import read_solved
from prefuse.engine.score import classifier
from prefuse.engine.score.scorers import scorer_of
from tiny_run import SHAPE, save_model, settings, write_rows
from tiny_tokenizer import CHATML, tiny_tokenizer

CPU = torch.device("cpu")
DATED = "{{ strftime_now('%d %b %Y') }} {{ 'on' if enable_thinking else 'off' }}\n" + CHATML
PROMPT = [{"role": "user", "content": "what colour is the sky?"}]
ANSWERED = [*PROMPT, {"role": "assistant", "content": "blue"}]
SYSTEM = [{"role": "system", "content": "hello"}]
RUN = {"chat_template_kwargs": '{"enable_thinking": true}', "system_prompt": "hello", "template_date": "2026-02-28"}


def asking(**changes):
    """The settings of a command that asks for scores."""
    needed = {"model_name_or_path": "m", "dataset_name": "d", "eval_fraction": 1.0, "loss_type": "sft"}
    return settings("eval", **(needed | changes))


def reward_model(folder, kind=LlamaForSequenceClassification, **trained):
    """A reward model; of a run, if settings are given with which it was trained."""
    tokenizer = tiny_tokenizer(chat_template=DATED)
    torch.manual_seed(0)
    labels = 1 if kind is LlamaForSequenceClassification else 2
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=labels, bos_token_id=0, eos_token_id=1, **SHAPE)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if trained:
        lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in trained.items())
        (folder / "config.yaml").write_text(f"# prefuse reward --config config.yaml\n{lines}")
    return str(folder)


@pytest.fixture
def another_day(monkeypatch):
    """Midnight has passed since the run began."""

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 6)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    later = SimpleNamespace(datetime=datetime.datetime, date=SimpleNamespace(today=Tomorrow.now))
    monkeypatch.setattr("prefuse.engine.data.rendering.datetime", later)


def read_by(scorer, monkeypatch):
    """The text of the one sequence that the scorer reads."""
    seen = []
    monkeypatch.setattr(type(scorer), "_fault", lambda self, ids: seen.append(ids) or classifier.NoScore("seen", ""))
    scorer.score([PROMPT], [["blue"]])
    return scorer.tokenizer.decode(seen[0] if isinstance(seen[0], list) else seen[0].prompt + seen[0].ids)


def test_a_foreign_reward_model_gets_the_arguments_and_the_day_of_the_run(tmp_path, monkeypatch, another_day):
    scorer = scorer_of([reward_model(tmp_path)], asking(**RUN), CPU)
    said = read_by(scorer, monkeypatch)
    assert said == ChatTemplate(scorer.tokenizer, {"enable_thinking": True}, "2026-02-28").text(ANSWERED)
    assert said.startswith("28 Feb 2026 on\n")
    assert "system" not in said  # its own conversations may have none


def test_a_reward_model_of_a_run_reads_what_it_was_trained_on(tmp_path, monkeypatch, another_day):
    path = reward_model(tmp_path, **RUN, learn_after_stop=True)
    other = {"template_date": "2030-01-01", "chat_template_kwargs": '{"enable_thinking": false}'}
    scorer = scorer_of([path], asking(**other), CPU)
    whole = ChatTemplate(scorer.tokenizer, {"enable_thinking": True}, "2026-02-28").text([*SYSTEM, *ANSWERED])
    assert read_by(scorer, monkeypatch) == whole
    assert whole.endswith("\n")  # learn_after_stop, as in training: the score stands at the end of the whole text


def test_steps_are_scored_in_the_text_they_were_learned_in(tmp_path, monkeypatch, another_day):
    path = reward_model(tmp_path, LlamaForTokenClassification, **RUN)
    config = asking(**RUN)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": PROMPT, "completions": ["blue"], "labels": [True]}])
    scorer = scorer_of([path], asking(), CPU)
    (learned,), _ = load_steps(rows, "train", scorer.tokenizer, config)
    trained = scorer.tokenizer.decode(learned.prompt + learned.completion)
    assert read_by(scorer, monkeypatch) == trained
    assert "28 Feb 2026 on\n" in trained
    assert "system\nhello" in trained


def test_a_local_judge_is_asked_with_the_arguments_and_the_day(tmp_path, another_day):
    path = save_model(tmp_path / "judge", chat_template=DATED)
    config = asking(score_cache="none", **RUN)
    judge = scorer_of([f"judge={path}"], config, CPU).backend
    text = ChatTemplate(judge.tokenizer, {"enable_thinking": True}, "2026-02-28").text(PROMPT, generation_prompt=True)
    assert judge.tokenizer.decode(judge._tokens(PROMPT)) == text
    other = scorer_of([f"judge={path}"], asking(), CPU).backend
    assert other.key != judge.key  # its replies are kept apart


def test_rollouts_go_on_from_the_text_that_the_model_was_trained_on(tmp_path, another_day):
    model = save_model(tmp_path / "model", chat_template=DATED)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": PROMPT, "completions": ["blue"]}])
    config = asking(model_name_or_path=model, dataset_name=rows, **RUN)
    tokenizer = tiny_tokenizer(chat_template=DATED)
    source = type("Source", (), {"tokenizer": tokenizer})()
    (solved,), _ = read_solved(config, Sampler(source, type("Scorer", (), {"columns": ()})(), {}), "\n")
    begun = ChatTemplate(tokenizer, {"enable_thinking": True}, "2026-02-28").text(
        [*SYSTEM, *PROMPT], generation_prompt=True
    )
    assert tokenizer.decode(solved.ids[0]) == "<s>" + begun + "blue\n"


def test_revisions_are_asked_in_the_text_of_the_run(another_day):
    tokenizer = tiny_tokenizer(chat_template=DATED)
    config = asking(**RUN)
    ids = tokens_of(tokenizer, [("user", "hello")], text_options(config))
    begun = ChatTemplate(tokenizer, {"enable_thinking": True}, "2026-02-28").text(
        [*SYSTEM, {"role": "user", "content": "hello"}], generation_prompt=True
    )
    assert tokenizer.decode(ids) == begun


def test_scores_of_another_day_or_argument_are_kept_apart(tmp_path):
    path = reward_model(tmp_path)
    keys = set()
    for changes in {}, {"template_date": "2026-02-28"}, {"template_date": "2026-02-27"}, RUN:
        config = asking(**changes)
        keys.add(scorer_of([path], config, CPU).key)
    assert len(keys) == 4
    plain = tiny_tokenizer(chat_template=CHATML)
    plain.save_pretrained(path)
    keys = {
        classifier.load_classifier(path, CPU, 2, None, asked=TextOptions(date=day)).key for day in ("1999-01-01", None)
    }
    assert len(keys) == 1  # the template prints no date


def test_a_file_of_the_user_s_own_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("system_prompt: hello\n")
    assert text_of_scorer(str(tmp_path), TextOptions(date="2026-02-28")) == TextOptions(date="2026-02-28")
