"""Order, mismatches and batches: every row once, the same on every machine, and the right hidden state per token."""

import dataclasses
from collections import Counter
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefuse.engine.data import Labelled, Pair
from prefuse.engine.data.batches import collate, examples_of, mismatched, padded_tokens
from prefuse.engine.data.order import hold_out, mismatches_of_epoch, plan_epoch, plan_evaluation
from prefuse.engine.errors import UserError
from prefuse.packing import pad

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths, st.integers(1, 5), st.integers(1, 4), st.integers(0, 9), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_holds_every_row_once_in_full_steps_but_the_last(sizes, microbatch, accumulation, seed, epoch):
    plan = list(plan_epoch(sizes, microbatch, accumulation, seed, epoch))
    flat = [index for step in plan for indices in step for index in indices]
    assert sorted(flat) == list(range(len(sizes)))
    per_step = [sum(map(len, step)) for step in plan]
    assert all(count == microbatch * accumulation for count in per_step[:-1])
    assert all(len(indices) == microbatch for step in plan[:-1] for indices in step)
    assert plan == list(plan_epoch(sizes, microbatch, accumulation, seed, epoch))


def test_bins_cut_a_step_and_leave_its_rows():
    sizes = [7 * i % 11 + 1 for i in range(20)]
    plan = plan_epoch(sizes, 8, 1, 3, 0, bins=lambda step: [step[:3], step[3:]])
    plain = plan_epoch(sizes, 8, 1, 3, 0)
    assert [sorted(chain(*step)) for step in plan] == [sorted(chain(*step)) for step in plain]
    assert [list(map(len, step)) for step in plan] == [[3, 5], [3, 5], [3, 1]]
    assert plan_evaluation(sizes, 2, bins=lambda step: [list(step)]) == [list(range(20))]


def test_how_a_step_is_cut_does_not_change_its_rows():
    sizes = [7 * i % 11 + 1 for i in range(20)]
    one, eight = plan_epoch(sizes, 8, 1, 3, 0), plan_epoch(sizes, 1, 8, 3, 0)
    assert [sorted(chain(*step)) for step in one] == [sorted(chain(*step)) for step in eight]


def test_epochs_and_seeds_differ():
    plans = [list(plan_epoch([1] * 20, 4, 1, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(plan) for plan in plans}) == 4


def test_evaluation_holds_every_row_once_and_is_longest_first():
    sizes = [3, 9, 1, 9, 4]
    assert plan_evaluation(sizes, 2) == [[1, 3], [4, 0], [2]]


# Prompts repeat, as they do in real preference data.
prompts = st.lists(st.sampled_from([[1], [1, 2], [2, 1], [3], [5, 5, 5]]), min_size=2, max_size=30)


@given(prompts, st.floats(0.01, 0.9), st.integers(0, 5))
@settings(deadline=None)
def test_held_out_prompts_are_never_trained_on(prompts, fraction, seed):
    distinct = {tuple(prompt) for prompt in prompts}
    if max(1, round(fraction * len(distinct))) == len(distinct):
        with pytest.raises(UserError, match="leaves nothing to train on"):
            hold_out(prompts, fraction, seed)
        return
    kept, held = hold_out(prompts, fraction, seed)
    assert sorted(kept + held) == list(range(len(prompts)))
    assert kept
    assert held
    assert not {tuple(prompts[i]) for i in kept} & {tuple(prompts[i]) for i in held}


def test_hold_out_depends_on_the_prompts_and_the_seed_alone():
    prompts = [[i] for i in range(50)]
    _, held = hold_out(prompts, 0.2, seed=1)
    _, held_of_shuffled = hold_out(prompts[::-1], 0.2, seed=1)
    assert {49 - i for i in held_of_shuffled} == set(held)
    assert len(held) == 10
    assert held != hold_out(prompts, 0.2, seed=2)[1]
    assert len(hold_out(prompts, 0.01, seed=1)[1]) == 1
    assert len(hold_out(prompts, 0.01, seed=1, at_least=2)[1]) == 2
    assert hold_out(prompts, 0.0, seed=1) == (list(range(50)), [])
    assert hold_out(prompts, 1.0, seed=1) == ([], list(range(50)))


@given(prompts, st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None)
def test_a_mismatch_never_has_the_same_prompt(prompts, seed, epoch):
    if len({tuple(prompt) for prompt in prompts}) == 1:
        with pytest.raises(UserError, match=r"all rows have the same prompt: .* use loss_type dpo or ipo"):
            mismatches_of_epoch(prompts, seed, epoch)
        return
    draws = mismatches_of_epoch(prompts, seed, epoch)
    assert all(prompts[i] != prompts[j] for i, j in enumerate(draws))
    assert draws == mismatches_of_epoch(prompts, seed, epoch)


def test_mismatches_are_drawn_evenly_and_anew_each_epoch():
    prompts = [[i // 2] for i in range(10)]  # pairs of rows share a prompt: 8 others for each
    counts = Counter(j for epoch in range(400) for i, j in enumerate(mismatches_of_epoch(prompts, 0, epoch)) if i == 4)
    assert set(counts) == set(range(10)) - {4, 5}
    assert all(25 <= count <= 75 for count in counts.values())  # 50 expected, with a standard deviation of 6.6
    assert mismatches_of_epoch(prompts, 0, 0) != mismatches_of_epoch(prompts, 0, 1)


def test_mismatched_prompts_lose_their_start_where_the_completion_needs_room():
    rows = [Labelled([1, 2, 3, 4], [5], True, "f:0"), Labelled([6], [7, 8, 9], False, "f:1")]
    swapped = mismatched(examples_of(rows), [1, 0], max_length=5)
    assert swapped.sequences == [[([3, 4], [7, 8, 9])], [([6], [5])]]
    assert not swapped.padding_free
    kept = mismatched(examples_of(rows, bos=1), [1, 0], max_length=5)  # as where a prompt is too long for its own row
    assert kept.sequences == [[([1, 4], [7, 8, 9])], [([6], [5])]]
    assert mismatched(examples_of(rows, bos=1), [1, 0], max_length=4).sequences[0] == [([4], [7, 8, 9])]
    assert kept.select([1]).bos == 1
    assert mismatched(FLAT, [1, 0, 3, 2], max_length=5).padding_free


def test_a_batch_says_which_position_predicts_which_token():
    pairs = [Pair([1, 2], [3], [4, 5, 6], "f:0"), Pair([7], [8, 9], [10], "f:1")]
    refs = [torch.arange(4.0), torch.arange(10.0, 13.0)]
    batch = collate(examples_of(pairs), [1, 0], refs)
    assert batch.rows == ["f:1", "f:0"]
    assert batch.targets.tolist() == [8, 9, 10, 3, 4, 5, 6]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4, 7]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.ref_logps.tolist() == [10.0, 11.0, 12.0, 0.0, 1.0, 2.0, 3.0]
    assert batch.num_tokens == 3 + 2 + 3 + 5
    assert batch.tokens.num_tokens == 4 * 5
    # The token after each predictor, in the padded ids, is the target: no completion token is missed or shifted.
    flat = batch.tokens.input_ids.flatten()
    assert torch.equal(flat[batch.tokens.predictors + 1], batch.targets)
    assert batch.tokens.attention_mask.flatten()[batch.tokens.predictors + 1].all()


FLAT = dataclasses.replace(
    examples_of(
        [Labelled([1, 2, 3], [4], True, "f:0"), Labelled([9], [8, 7], False, "f:1"),
         Labelled([1, 2, 3], [5, 6], False, "f:2"), Labelled([1, 2], [3], True, "f:3")]
    ),
    padding_free=True,
)  # fmt: skip


def test_neighbours_with_the_same_prompt_share_it():
    refs = [torch.tensor([0.0]), torch.tensor([1.0, 1.1]), torch.tensor([2.0, 2.1]), torch.tensor([3.0])]
    batch = collate(FLAT, [2, 0, 1], refs)
    assert batch.tokens.input_ids.tolist() == [[1, 2, 3, 5, 6, 4, 9, 8, 7]]
    assert batch.rows == ["f:2", "f:0", "f:1"]
    assert batch.numbers["labels"].tolist() == [False, True, False]
    assert batch.ref_logps.tolist() == pytest.approx([2.0, 2.1, 0.0, 1.0, 1.1])
    assert batch.targets.tolist() == [5, 6, 4, 8, 7]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5]
    assert (batch.num_tokens, batch.tokens.num_tokens) == (5 + 4 + 3, 9)
    apart = collate(FLAT, [2, 1, 0])  # not neighbours
    assert apart.tokens.num_tokens == 12
    assert collate(FLAT.select([2, 0]), [0, 1]).tokens.num_tokens == 6


def test_bins_put_examples_with_the_same_prompt_side_by_side():
    assert FLAT.bins(100)([0, 1, 2, 3]) == [[0, 2, 1, 3]]  # prompts of 3 + (1 + 2), 1 + 2, 2 + 1 tokens
    assert FLAT.bins(8)([3, 2, 1, 0]) == [[2, 0], [3, 1]]
    assert FLAT.bins(5)([0, 1, 2, 3]) == [[2], [0], [1], [3]]  # too many with one prompt are parted
    assert FLAT.bins(1)([0, 1]) == [[0], [1]]  # none is split or lost


prompted = st.lists(st.tuples(st.sampled_from([(1,), (1, 2), (3, 4, 5)]), st.integers(1, 9)), min_size=1, max_size=30)


@given(prompted, st.integers(1, 40))
@settings(deadline=None)
def test_bins_hold_every_index_once_and_their_budget(rows, budget):
    data = [Labelled(list(prompt), [7] * size, True, "f:0") for prompt, size in rows]
    examples = dataclasses.replace(examples_of(data), padding_free=True)
    indices = list(range(0, len(rows), 2)) or [0]
    bins = examples.bins(budget)(indices)
    assert sorted(chain(*bins)) == indices
    assert bins == examples.bins(budget)(indices)
    for chosen in bins:
        batch = collate(examples, chosen)
        assert batch.tokens.num_tokens <= budget or len(chosen) == 1
        prompts = [rows[i][0] for i in chosen]
        shared = sum(a == b for a, b in pairwise(prompts)) + len(set(prompts))
        assert shared >= len(prompts) or budget < 40  # neighbours, where everything fits


def test_what_padding_would_cost():
    a, b = collate(FLAT, [0, 1]), collate(FLAT, [2])
    assert padded_tokens([a, b], 1) == 4 + 3 + 5
    assert padded_tokens([a, b], 2) == 2 * 5 + 3
    assert padded_tokens([a, b], 8) == 3 * 5
    pairs = examples_of([Pair([1, 2], [3], [4, 5, 6], "f:0"), Pair([7], [8], [9], "f:1")])
    assert padded_tokens([collate(pairs, [0, 1])], 2) == 4 * 5 == collate(pairs, [0, 1]).tokens.num_tokens


def test_the_mask_comes_from_the_lengths_whatever_the_ids():
    ids, mask = pad([[0, 0], [0], [5, 0, 0]])  # 0 is also what padding is filled with
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert ids.tolist() == [[0, 0, 0], [0, 0, 0], [5, 0, 0]]


def test_the_fingerprint_changes_with_any_token_and_with_the_border():
    base = examples_of([Pair([1, 2], [3], [4], "f:0")]).fingerprint()
    assert base == examples_of([Pair([1, 2], [3], [4], "elsewhere:9")]).fingerprint()
    for other in Pair([1], [2, 3], [4], "f:0"), Pair([1, 2], [4], [3], "f:0"), Pair([1, 2], [3], [5], "f:0"):
        assert base != examples_of([other]).fingerprint()
