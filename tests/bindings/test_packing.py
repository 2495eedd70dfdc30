"""What a flat batch is, and how flat batches are filled: every token once, prompts shared, no budget broken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefuse.packing import Segments, fill, pack

PAIR = ([5, 6, 7], [[8, 9], [10]])
FIVE = ([1], [[2], [3, 4], [5], [6, 7, 8], [9]])


def test_a_pair_and_a_demonstration():
    packed = pack([PAIR, ([3, 4], [[11, 12]])])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 3, 4, 11, 12]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert packed.predictors.tolist() == [2, 3, 2, 7, 8]  # the prompt's last token predicts both sides
    assert packed.targets.tolist() == [8, 9, 10, 11, 12]
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 5]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.num_tokens == 10
    assert packed.unshared_tokens == 5 + 4 + 4
    assert packed.padded_tokens == 3 * 5
    parts = [(list(s.prompt), list(s.own)) for s in packed.segments.all]
    assert parts == [([], [0, 1, 2]), ([0, 1, 2], [3, 4]), ([0, 1, 2], [5]), ([], [6, 7]), ([6, 7], [8, 9])]


ids = st.lists(st.integers(0, 99), min_size=1, max_size=6)
groups = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=5)), min_size=1, max_size=6)


@given(groups)
@settings(deadline=None)
def test_every_sequence_can_be_read_back(groups):
    """From the segments, the positions and the predictors alone: nothing is lost, shifted or given to another."""
    packed = pack(groups)
    tokens, positions = packed.input_ids[0], packed.position_ids[0]
    assert len(tokens) == packed.num_tokens == sum(len(p) + sum(map(len, cs)) for p, cs in groups)
    completions = [s for s in packed.segments.all if len(s.prompt)]
    sequences = [(prompt, completion) for prompt, cs in groups for completion in cs]
    assert len(completions) == len(sequences) == len(packed.cu_seqlens) - 1
    starts = packed.cu_seqlens.tolist()
    for i, (segment, (prompt, completion)) in enumerate(zip(completions, sequences, strict=True)):
        places = torch.tensor([*segment.prompt, *segment.own])
        assert tokens[places].tolist() == prompt + completion
        assert positions[places].tolist() == list(range(len(prompt + completion)))
        mine = slice(starts[i], starts[i + 1])
        assert packed.targets[mine].tolist() == completion
        assert packed.predictors[mine].tolist() == places[len(prompt) - 1 : -1].tolist()
    assert packed.unshared_tokens == sum(len(prompt + completion) for prompt, completion in sequences)


def test_what_is_derived_from_segments_is_made_once():
    made = []
    segments = Segments([[3, 2]])
    for _ in range(2):
        assert segments.once(lambda s, *key: made.append(key) or len(made), "a") == len(made)
    double = lambda s, key: made.append(key) or [key]  # noqa: E731
    assert segments.once(double, 4) is segments.once(double, 4)
    assert segments.once(double, 5) == [5]


def test_moving_a_batch_moves_its_tensors():
    moved = pack([PAIR]).to("meta")
    assert {x.device.type for x in (moved.input_ids, moved.position_ids, moved.predictors, moved.targets)} == {"meta"}
    assert moved.cu_seqlens.device.type == "meta"
    assert moved.num_tokens == 6
    assert moved.unshared_tokens == 9


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], r"got no groups: expected at least one \(prompt ids, \[completion ids, \.\.\.\]\)"),
        ([PAIR, ([], [[1]])], r"prompt of group 1 is empty: .* put the tokenizer's BOS there"),
        ([([1], [])], r"group 0 has completions of \[\] tokens: expected one completion or more"),
        ([([1], [[2], []])], r"group 0 has completions of \[1, 0\] tokens: .* leave such rows out"),
    ],
)
def test_what_cannot_be_packed_is_named(groups, message):
    with pytest.raises(ValueError, match=message):
        pack(groups)


def naive_first_fit_decreasing(lengths, budget):
    bins = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for chosen in bins:
            if sum(lengths[i] for i in chosen) + lengths[item] <= budget:
                chosen.append(item)
                break
        else:
            bins.append([item])
    return bins


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60))
@settings(deadline=None)
def test_fill_is_first_fit_decreasing(lengths, budget):
    bins = fill(lengths, budget)
    assert bins == naive_first_fit_decreasing(lengths, budget)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in chosen) <= budget or len(chosen) == 1 for chosen in bins)


def test_fill_on_a_case_done_by_hand():
    assert fill([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]  # 8 + 2, 4 + 4 + 1 + 1
    assert fill([25, 3], 10) == [[0], [1]]  # too long for any bin: one of its own, and nothing joins it
    assert fill([], 10) == []


def test_a_large_data_set_is_filled_in_no_time():
    lengths = torch.randint(1, 1000, (100_000,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = fill(lengths, 8192)  # quadratic, this would take minutes
    assert len(bins) <= sum(lengths) / 8192 * 11 / 9 + 1


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="budget is 0: expected the tokens of a bin, at least 1"):
        fill([1, 2], 0)
