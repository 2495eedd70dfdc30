"""`prefuse bench templates`: its checks see a wrong reading, and its table holds for templates of every sort."""

import pytest

from prefuse.bench import templates
from prefuse.engine.model.tokenizer import shipped_templates


@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "gptoss", "gemma3", "idefics3", "qwen3_5_think", "glm4moe"])
def test_a_template_that_trl_ships_is_read_right_or_refused_with_a_fix(name):
    found = templates.outcomes(shipped_templates()[name].read_text(encoding="utf-8"))
    assert found["plain"].word == "right"
    assert {outcome.word for outcome in found.values()} <= {"right", "refused"}
    said = [o.why for o in found.values() if o.word == "refused"]
    assert all("Fix: " in why or "the chat template refuses it" in why for why in said)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


ASKED, SAID = "<|im_start|>user\nWhat is six times seven?<|im_end|>\n<|im_start|>assistant\n", "The answer is 42."
WRONG = {
    "another prompt": (ASKED + "\n", SAID + "<|im_end|>", "the prompt's ids are not those met at inference"),
    "another text": (ASKED, SAID + "!<|im_end|>", "decode(prompt + completion) is not the rendered text"),
    "a lost answer": (ASKED, "The answer", "text of the answer is missing"),
    "no stop token": (ASKED, SAID, "the stop token is not learned"),
}


@pytest.mark.parametrize(("prompt", "completion", "why"), WRONG.values(), ids=WRONG)
def test_a_wrong_reading_is_seen(prompt, completion, why):
    tokenizer = templates.tokenizer_for(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    kind = templates.KINDS["plain"]
    right = templates.check(tokenizer, kind, ids(tokenizer, ASKED), ids(tokenizer, SAID + "<|im_end|>"), dict)
    assert right.word == "right"
    wrong = templates.check(tokenizer, kind, ids(tokenizer, prompt), ids(tokenizer, completion), dict)
    assert (wrong.word, wrong.why) == ("WRONG", why)
