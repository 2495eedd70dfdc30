"""The pieces of text that tokens stand for make the decoded text, for every kind of tokenizer."""

import pytest

import tokenizer_kinds
from prefuse.engine.data.pieces import pieces_of

TEXTS = ["a question of colour? Yes: no.", " red  blue\n\n x", "字 é 🙂 the apple, 0123", "🙂🙂字字", ""]


@pytest.fixture(scope="module", params=[*tokenizer_kinds.MADE, *tokenizer_kinds.REAL])
def tokenizer(request, tmp_path_factory):
    if request.param in tokenizer_kinds.MADE:
        return tokenizer_kinds.made(request.param)
    return tokenizer_kinds.real(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_decoded_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert len(pieces) == len(ids)
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == whole
