"""Rows in flat arrays: what went in comes out, whatever is chosen, repeated, replaced or cut into blocks."""

import dataclasses
import hashlib
import json
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefuse import SFT
from prefuse.engine.data import Demonstration, Labelled, Pair, examples, load_examples
from prefuse.engine.data import ragged as ragged_module
from prefuse.engine.data.batches import IGNORE_INDEX, collate, examples_of
from prefuse.engine.data.ragged import Ragged, Texts, framed, framed_rows
from prefuse.engine.data.table import Examples
from prefuse.engine.model.forward import count_items
from prefuse.losses.likelihood import CPO
from tiny_run import PAIRS, write_rows
from tiny_tokenizer import tiny_tokenizer

rows = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=20)
few = st.lists(st.sampled_from([[], [1], [1, 2], [2, 1], [3]]), max_size=20)


@given(rows, st.data())
@settings(deadline=None)
def test_rows_come_out_as_they_went_in(rows, data):
    ragged = Ragged.of(rows)
    assert list(ragged) == rows
    assert ragged.joined().tolist() == [value for row in rows for value in row]
    assert list(ragged[1::2]) == rows[1::2]
    if rows:
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=30))
        taken = ragged.take(np.asarray(chosen, np.int64))
        assert list(taken) == [rows[i] for i in chosen]
        assert taken.joined().tolist() == [value for i in chosen for value in rows[i]]
        assert np.shares_memory(taken.values, ragged.values) or not len(ragged.values)
        at = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True))
        others = ragged.replaced(np.asarray(at, np.int64), Ragged.of([[7] * n for n in range(len(at))]))
        assert list(others) == [[7] * at.index(i) if i in at else row for i, row in enumerate(rows)]


@given(few, st.data())
@settings(deadline=None)
def test_equal_rows_have_the_same_number_in_the_order_of_their_first(rows, data):
    def expected(rows):
        seen = {}
        return [seen.setdefault(tuple(row), len(seen)) for row in rows]

    ragged = Ragged.of(rows)
    assert ragged.same.tolist() == expected(rows)
    if rows:
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=30))
        for source in ragged, Ragged.of(rows):  # numbers that are there already are used
            assert source.take(np.asarray(chosen, np.int64)).same.tolist() == expected([rows[i] for i in chosen])


@given(st.integers(0, 10), st.integers(1, 3), st.integers(1, 4))
@settings(deadline=None)
def test_frames_are_each_row_behind_its_length(count, parts, block):
    lists = [[[part, row] * (row % 3) for row in range(count)] for part in range(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_module, "BLOCK_ROWS", block)
        got = [frame.tobytes() for frame in framed([Ragged.of(rows) for rows in lists])]
        by_row = [bytes(row) for row in framed_rows([Ragged.of(rows) for rows in lists])]
        assert len(got) == -(-count // block)
    expected = [b"".join(array("q", [len(rows[i]), *rows[i]]).tobytes() for rows in lists) for i in range(count)]
    assert b"".join(got) == b"".join(expected)
    assert by_row == expected


def test_texts_of_any_kind():
    texts = ["", "pairs.jsonl:17", "ü, 空", "a name that is no Unicode \udcff"]
    assert list(Texts.of(texts)) == texts


PAIR = [Pair([1, 2], [3], [4, 5], "f:0"), Pair([1], [6, 7], [8], "f:1"), Pair([1, 2], [9], [3], "g:2")]
LABELLED = [Labelled([1, 2], [3], True, "f:0"), Labelled([4], [5, 6], False, "f:1")]
PLAIN = [Demonstration([1, 2], [3, 4], "f:0"), Demonstration([5], [6], "f:1")]
MASKED = [
    Demonstration([1, 2], [3, 4], "f:0", [True, True]),
    Demonstration([5], [6, 7, 8], "f:1", [False, True, False]),
]


@pytest.mark.parametrize("given", [PAIR, LABELLED, PLAIN, MASKED], ids=["pair", "labelled", "plain", "masked"])
def test_examples_come_out_as_they_went_in(given):
    table = examples_of(given)
    assert list(table) == given
    assert table == given
    assert table[-1] == given[-1]
    assert list(table[1:]) == given[1:]
    assert list(table.select([1, 0, 1])) == [given[1], given[0], given[1]]
    assert table.rows[1] == given[1].row
    with pytest.raises(IndexError):
        table[len(given)]
    last = given[-1]
    sides = (last.chosen, last.rejected) if isinstance(last, Pair) else (last.completion,)
    assert table.sequences[-1] == [(last.prompt, side) for side in sides]
    assert table.lengths[-1] == len(last.prompt) + max(map(len, sides))
    assert table.counts[-1] == sum(map(len, sides))


def test_some_may_say_what_is_learned_and_others_not():
    mixed = Examples.of([PLAIN[0], MASKED[1], PLAIN[1]])
    assert [example.learned for example in mixed] == [[True, True], [False, True, False], [True]]
    assert (
        mixed.fingerprint()
        != Examples.of([PLAIN[0], dataclasses.replace(MASKED[1], learned=None), PLAIN[1]]).fingerprint()
    )


def test_what_is_not_learned_is_no_target_and_no_item():
    table = examples_of([PLAIN[0], MASKED[1], PLAIN[1]])
    for padding_free in False, True:
        batch = collate(dataclasses.replace(table, padding_free=padding_free), [1, 0])
        assert batch.targets.tolist() == [IGNORE_INDEX, 7, IGNORE_INDEX, 3, 4]
        assert batch.cu_seqlens.tolist() == [0, 3, 5]
        assert count_items(batch, SFT()) == 3
        assert count_items(batch, CPO()) == 2


def test_the_longest_sequence_and_the_largest_token():
    table = examples_of(PAIR)
    assert table.longest_sequence() == [1, 2, 4, 5]
    assert table.largest_token() == 9
    assert table.select([1]).largest_token() == 8
    assert table.select([1, 2]).longest_sequence() == [1, 6, 7]


def test_the_fingerprint_goes_over_every_sequence_as_lengths_and_ids():
    digest = hashlib.sha256()
    for ids in [1, 2], [3], [1, 2], [4, 5], [1], [6, 7], [1], [8], [1, 2], [9], [1, 2], [3]:
        digest.update(array("q", [len(ids), *ids]).tobytes())
    assert examples_of(PAIR).fingerprint() == digest.hexdigest()


@pytest.mark.parametrize("kind", ["pair", "labelled", "sft"])
def test_blocks_make_no_difference(kind, tmp_path, monkeypatch):
    bad = [{"prompt": 7, "chosen": "a", "rejected": "b"}]
    source = write_rows(tmp_path / "rows.jsonl", PAIRS[:5] + bad + PAIRS[5:])
    whole = load_examples(source, kind, tiny_tokenizer(), 24)
    sizes, real = [], examples.tokenize
    monkeypatch.setattr(examples, "BLOCK_ROWS", 4)
    monkeypatch.setattr(
        examples, "tokenize", lambda block, tokenizer: sizes.append(len(block)) or real(block, tokenizer)
    )
    cut = load_examples(source, kind, tiny_tokenizer(), 24)
    assert sizes == [4, 4, 4, 1]
    assert cut == whole
    assert (cut.rows, cut.prompts_cut, len(cut.skipped)) == (13, whole.prompts_cut, 1)
    assert whole.prompts_cut > 0
    assert json.dumps(cut.skipped, default=vars) == json.dumps(whole.skipped, default=vars)
