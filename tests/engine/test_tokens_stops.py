"""Where answers end: the token that ends trained answers is known, learned last, saved, and stops generation."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prefuse.engine.data import load_examples
from prefuse.engine.data.endings import ending_of
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.stops import describe_unstopped, stop_tokens
from prefuse.engine.data.templates import TextOptions
from prefuse.engine.errors import UserError
from prefuse.engine.generate import generate
from prefuse.engine.model.load import load_tokenizer
from prefuse.engine.train import train
from tiny_run import save_model, settings, write_rows
from tiny_tokenizer import tiny_tokenizer

BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}ENDING{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# What stands behind an answer: in a list, (template's code, stop, after, the token that is missing).
ENDINGS = {
    "ChatML": ("<|im_end|>{{ '\n' }}", "<|im_end|>", "\n", None),
    "EOS at the very end, as Phi 3": (
        "<|im_end|>{{ '\n' }}{{ eos_token if loop.last and m.role == 'assistant' }}", "<|im_end|>", "\n</s>", None,
    ),
    "another token behind the last answer, as GPT-OSS": (
        "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}", "</s>", "", None,
    ),
    "the next header behind the last answer, as Command A": (
        "<|im_end|>{{ '<|im_start|>assistant' if loop.last and m.role == 'assistant' }}",
        "<|im_end|>", "<|im_start|>assistant", None,
    ),
    "none behind the last answer, as Qwen 1.5": (
        "{{ '' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}", None, "", "<|im_end|>",
    ),
    "none at all, as GLM": ("", None, "", "<|im_start|>"),
    "its own text only": ("{{ '\n' }}", None, "", "<|im_start|>"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "stop", "after", "missing"), ENDINGS.values(), ids=ENDINGS)
def test_how_a_template_ends_an_answer(code, stop, after, missing):
    found = ending_of(ChatTemplate(tiny_tokenizer(chat_template=BODY.replace("ENDING", code) + PROMPT)))
    assert (found.stop, found.after, found.missing) == (stop, after, missing)


def conversation(answer="A"):
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]}


def load(tmp_path, rows, tokenizer, **options):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return load_examples(str(path), "sft", tokenizer, 512, text=TextOptions(**options)).examples


@pytest.mark.parametrize(("code", "stop", "after", "missing"), ENDINGS.values(), ids=ENDINGS)
def test_the_stop_token_is_learned_last_or_its_lack_is_said_with_the_fix(tmp_path, code, stop, after, missing):
    tokenizer = tiny_tokenizer(chat_template=BODY.replace("ENDING", code) + PROMPT)
    examples = load(tmp_path, [conversation()], tokenizer)
    line = describe_unstopped(examples, tokenizer, 0)
    if stop is not None:
        assert tokenizer.decode(examples[0].completion) == "A" + stop
        assert stop_tokens(examples, tokenizer) == [tokenizer.convert_tokens_to_ids(stop)]
        assert line is None
        return
    assert stop_tokens(examples, tokenizer) == []
    assert line == (
        "1 of 1 answers end with no stop token: a model that learns them does not learn to stop. "
        f"Fix: --eos_token '{missing}'"
    )
    mended = load(tmp_path, [conversation()], tokenizer, eos_token=missing)
    assert tokenizer.decode(mended[0].completion) == "A" + missing
    assert describe_unstopped(mended, tokenizer, 0) is None


def test_strings_of_a_tokenizer_without_eos_are_said_to_have_no_end(tmp_path):
    tokenizer = tiny_tokenizer(eos=False)
    examples = load(tmp_path, [{"prompt": "Q", "completion": "A"}], tokenizer)
    assert "1 of 1 answers end with no stop token" in describe_unstopped(examples, tokenizer, 0)


def test_the_settings_of_template_and_eos_are_saved_with_the_tokenizer(tmp_path):
    model = save_model(tmp_path / "model", chat_template=None)
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    config = settings(model_name_or_path=model, dataset_name="x", output_dir="y", eos_token="<|im_end|>")
    for name, expected in (
        ("mine.jinja", "{{ messages[0].content }}"),
        ("chatml", "<|im_start|>"),
        ("qwen3", "tool_call"),
    ):
        name = str(tmp_path / name) if name == "mine.jinja" else name
        tokenizer = load_tokenizer(model, settings(**vars(config) | {"chat_template": name}))
        assert expected in tokenizer.chat_template
        assert tokenizer.eos_token == "<|im_end|>"
    with pytest.raises(UserError, match=r"chat_template no_such: no such file, and no .* known: chatml, "):
        load_tokenizer(model, settings(**vars(config) | {"chat_template": "no_such"}))
    with pytest.raises(UserError, match="eos_token <x> is no token of this tokenizer"):
        load_tokenizer(model, settings(**vars(config) | {"eos_token": "<x>"}))


def test_tokenizers_of_mistral_common_are_refused_in_one_line_with_the_fix(tmp_path, monkeypatch):
    """Whether mistral-common is there, and loads them, or not. What the fix writes is read: test_tokens_text.py."""

    class MistralCommonBackend:
        pass

    def lacking(*_, **__):
        raise ImportError("MistralConverter requires mistral-common\nand more")

    model, real = Path(save_model(tmp_path / "model")), AutoTokenizer.from_pretrained
    first = lambda path, *, mistral_format=True, **more: (  # noqa: E731
        MistralCommonBackend() if mistral_format else real(path, **more)
    )
    (model / "tekken.json").write_text("{}")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", first)
    assert load_tokenizer(str(model)).eos_token == "</s>"  # transformers' own stands beside it
    (model / "tekken.json").unlink()
    (model / "tokenizer.json").unlink()
    for name, fix in (
        ("tekken.json", r"save_pretrained\('FOLDER', save_format='hf'\)\"; and put its files into .*model"),
        ("tokenizer.model.v3", "rename tokenizer.model.v3 to tokenizer.model, .* and give --chat_template"),
    ):
        (model / name).write_text("{}")
        for loads in (lambda *_, **__: MistralCommonBackend(), lacking):
            monkeypatch.setattr(AutoTokenizer, "from_pretrained", loads)
            with pytest.raises(UserError, match=rf"is mistral-common's \({name}\), .*without its answer. Fix: .*{fix}"):
                load_tokenizer(str(model))
        (model / name).unlink()
    with pytest.raises(UserError, match=r"no tokenizer in .*: MistralConverter requires mistral-common$"):
        load_tokenizer(str(model))


# The base model's EOS is </s>; the template ends turns with <|im_end|>. Three rows, learned by heart.
WORDS = ("sky", "sea", "green")
ROWS = [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]} for w in WORDS]
PAIRS = [
    {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [row["messages"][1] | {"content": "no"}]}
    for row in ROWS
]


@pytest.mark.parametrize("way", ["sft", "LoRA", "train"])
def test_a_base_model_learns_to_stop_at_the_templates_end_of_turn(tmp_path, way):
    base = save_model(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS if way == "train" else ROWS)
    out = str(tmp_path / "run")
    changes = {"model_name_or_path": base, "dataset_name": rows, "output_dir": out, "learning_rate": 2e-2}
    if way == "LoRA":
        changes |= {"use_peft": True}
    command = "train" if way == "train" else "sft"
    train(settings(command, **changes, max_steps=2 if way == "train" else 60), command)
    tokenizer = AutoTokenizer.from_pretrained(out)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(out).eos_token_id == [tokenizer.eos_token_id, end]
    if way == "train":
        return
    config = {"model_name_or_path": out, "dataset_name": rows, "max_new_tokens": 40, "eval_fraction": 1.0}
    answers = generate(settings("generate", **config))
    assert [answer["model"] for answer in answers] == list(WORDS)
    model = AutoModelForCausalLM.from_pretrained(out)
    if way == "LoRA":  # as the end of the run says: transformers took the base's
        model.generation_config = GenerationConfig.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(ROWS[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    said = ids[0, prompt["input_ids"].shape[1] :]
    assert said[-1] == end
    assert tokenizer.decode(said[:-1]) == WORDS[0]
