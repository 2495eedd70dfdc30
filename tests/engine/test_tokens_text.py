"""Text -> ids for every kind of tokenizer: decode(prompt + completion) is the text of the row, and the prompt keeps
the ids that it has alone."""

import json

import pytest

from prefuse.engine.data import load_examples, load_prompts
from prefuse.engine.data.encode import Encoder, continuation, is_context_free
from prefuse.engine.data.stops import describe_unknown
from tokenizer_kinds import MADE, REAL, made, real

LOSSY = {"WordPiece"}  # blanks and unknown letters do not come back: the text is what it makes of the whole
EVERY_REAL = [*REAL, *(f"{name}, legacy" for name in REAL), "tekken"]
KINDS = [*MADE, *EVERY_REAL]

# Where a prompt may end and a completion begin: within a word, at a blank on either side, at a newline on either side.
CUTS = [("the sk", "y is blue"), ("the sky", " is blue"), ("the sky ", "is blue"), ("the sky:\n", "it is blue")]
CUTS += [("what colour?", "\nblue"), ("yes:", "  no"), ("the  ", " sky"), ("the sky\n\n", "\n\nx"), ("0123", "456")]
CUTS += [("red blue", "ish sky"), ("hello", "."), ("hello ,", " world"), ("tell me\t", "\ttell")]
SCRIPTS = [
    ("Какого цвета", " небо? Синего"), ("ماذا", " هناك في السماء"), ("आकाश का", " रंग नीला"), ("ท้องฟ้า", "สีอะไร"),
    ("하늘은 무슨", " 색입니까"), ("空は何色", "ですか"), ("天空是什么", "颜色"), ("ሰማዩ ምን", " አይነት ቀለም"),
    ("🙂 fine", " 🙂🙂"), ("naïve", " café"), ("x", "字"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return lambda kind: made(kind) if kind in MADE else real(kind, tmp_path_factory.getbasetemp())


def text(tokenizer, ids):
    """Less the blank that a byte-level tokenizer with a blank before a text adds at the very start, and decodes."""
    start = tokenizer.decode(tokenizer("a", add_special_tokens=False).input_ids).removesuffix("a")
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix(start)


def behind(tokenizer, prompt, completion):
    encoder = Encoder(tokenizer)
    return encoder.encode([prompt])[0], encoder.encode_after([prompt], [completion])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_decode_to_their_text(tokenizers, kind):
    tokenizer = tokenizers(kind)
    for prompt, completion in [*CUTS, *(SCRIPTS if kind not in LOSSY | {"unigram"} else ())]:
        first, rest = behind(tokenizer, prompt, completion)
        assert first == tokenizer(prompt, add_special_tokens=False).input_ids
        if kind in LOSSY and prompt != "the sk":  # of that word, "y" is known only behind other letters
            whole = text(tokenizer, tokenizer(prompt + completion, add_special_tokens=False).input_ids)
            assert text(tokenizer, first + rest) == whole, (prompt, completion)
        elif kind not in LOSSY:
            assert text(tokenizer, first + rest) == prompt + completion, (prompt, completion)


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_whole_begins_with_the_prompts_ids_the_rest_is_the_completion(tokenizers, kind):
    """Then there is one natural reading, and TRL takes it too; a text cut within a word may have two."""
    tokenizer = tokenizers(kind)
    agreeing = 0
    for prompt, completion in CUTS[1:] + SCRIPTS:
        first, rest = behind(tokenizer, prompt, completion)
        whole = tokenizer(prompt + completion, add_special_tokens=False).input_ids
        if whole[: len(first)] == first:
            agreeing += 1
            assert rest == whole[len(first) :], (prompt, completion)
    assert agreeing > 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_level_tokenizer_is_seen_to_need_no_context(tokenizers, kind):
    assert is_context_free(tokenizers(kind)) == (kind in ("byte level", "tekken"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_keeps_its_own_leading_blank(tokenizers, kind):
    tokenizer = tokenizers(kind)
    for prompt, answer in CUTS + SCRIPTS * (kind not in LOSSY | {"unigram"}):
        first, rest = behind(tokenizer, prompt, answer)
        expected = answer if kind not in LOSSY else text(tokenizer, first + rest)[len(text(tokenizer, first)) :]
        assert continuation(tokenizer, first, rest) == expected
        eos = [tokenizer.eos_token_id]
        assert continuation(tokenizer, first, rest + eos) == expected


def test_an_answer_to_a_prompt_cut_within_a_character_is_its_own_text():
    tokenizer = made("byte level")
    ids = tokenizer("é字", add_special_tokens=False).input_ids
    assert [continuation(tokenizer, ids[:n], ids[n:]) for n in (0, 1, 2, 3)] == ["é字", "é字", "字", "字"]


def load(tmp_path, rows, kind, tokenizer):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return load_examples(str(path), kind, tokenizer, 512)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_strings_decode_to_their_text_in_every_form(tmp_path, tokenizers, kind):
    tokenizer = tokenizers(kind)
    cuts = [cut for cut in CUTS + SCRIPTS if kind not in LOSSY | {"unigram"} or cut in CUTS[1:3]]
    pairs = [{"prompt": p, "chosen": c, "rejected": "#" + c} for p, c in cuts]
    for pair, (prompt, completion) in zip(load(tmp_path, pairs, "pair", tokenizer).examples, cuts, strict=True):
        for ids, expected in ((pair.chosen, completion), (pair.rejected, "#" + completion)):
            assert ids[-1] == tokenizer.eos_token_id
            if kind not in LOSSY:
                bos = pair.prompt[:1] == [tokenizer.bos_token_id]
                assert text(tokenizer, pair.prompt[bos:] + ids[:-1]) == prompt + expected
    rows = [{"prompt": p, "completion": c, "label": True} for p, c in cuts]
    sft, labelled = (load(tmp_path, rows, form, tokenizer).examples for form in ("sft", "labelled"))
    read = load(tmp_path, pairs, "pair", tokenizer).examples
    assert [(e.prompt, e.completion) for e in sft] == [(e.prompt, e.completion) for e in labelled]
    assert [(e.prompt, e.completion) for e in sft] == [(pair.prompt, pair.chosen) for pair in read]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": p} for p, _ in cuts]), encoding="utf-8")
    assert [prompt.ids for prompt in load_prompts(str(path), tokenizer, 512)] == [pair.prompt for pair in read]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LOSSY])
def test_a_leading_blank_is_a_difference(tmp_path, tokenizers, kind):
    rows = [{"prompt": "hello", "chosen": " world", "rejected": "world"}]
    (pair,) = load(tmp_path, rows, "pair", tokenizers(kind)).examples
    assert pair.chosen != pair.rejected


def test_characters_that_a_tokenizer_lacks_are_counted(tmp_path):
    rows = [
        {"prompt": p, "chosen": c, "rejected": "sea"} for p, c in (("the ☃", " blue"), ("sky", "☃ ☃"), ("sky", " is"))
    ]
    tokenizer = made("WordPiece")
    said = describe_unknown(load(tmp_path, rows, "pair", tokenizer).examples, tokenizer)
    assert said == (
        "2 of 3 examples hold characters that the tokenizer does not have: the model reads and learns <unk> in their "
        "place"
    )
    assert describe_unknown(load(tmp_path, rows[2:], "pair", tokenizer).examples, tokenizer) is None
    whole = made("SentencePiece, Prepend")  # falls back on bytes
    assert describe_unknown(load(tmp_path, rows, "pair", whole).examples, whole) is None


# "\n<|im_start|>assistant\n" ends in special tokens and plain text, in plain text alone, or in a special token.
TEMPLATES = {
    "special": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "plain": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}",
    "bare": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "special token last": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}",
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LOSSY | {"unigram"}])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_conversations_decode_to_what_the_template_wrote(tmp_path, tokenizers, kind, template):
    tokenizer = tokenizers(kind)
    tokenizer.chat_template = template
    answers = ["it is blue", " it is", "\nblue", "字", "สีอะไร", "0"]
    turns = [[{"role": "user", "content": "what colour?"}, {"role": "assistant", "content": a}] for a in answers]
    for example, conversation in zip(
        load(tmp_path, [{"messages": t} for t in turns], "sft", tokenizer).examples, turns, strict=True
    ):
        prompt = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(conversation, tokenize=False)
        assert example.prompt == tokenizer(prompt, add_special_tokens=False).input_ids
        said = text(tokenizer, example.prompt)  # some put blanks between special tokens and text: the model meets them
        both = text(tokenizer, example.prompt + example.completion)
        assert both.startswith(said)
        assert both[len(said) :].rstrip() == whole[len(prompt) :].rstrip()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LOSSY | {"unigram"}])
@pytest.mark.parametrize("template", [TEMPLATES[name] for name in ("special", "plain")], ids=["special", "plain"])
def test_what_stands_before_a_later_answer_has_the_ids_that_the_model_meets(tmp_path, tokenizers, kind, template):
    """Those of the text as a whole, also where the tokenizer puts a blank behind special tokens."""
    tokenizer = tokenizers(kind)
    tokenizer.chat_template = template
    turns = [("user", "what colour?"), ("assistant", "it is blue"), ("user", "and the sea"), ("assistant", "green")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = load(tmp_path, [{"messages": messages}], "sft", tokenizer).examples
    asked = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(asked, add_special_tokens=False).input_ids
    assert (example.prompt + example.completion)[: len(ids)] == ids
