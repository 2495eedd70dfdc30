"""KTO's mismatches: for each row another row, of another prompt, whose completion z0 reads after this row's prompt.

There are two rules, for what a caller knows. A run of the engine knows a whole epoch and a seed: `draw_mismatches`
draws each partner uniformly. A trainer that meets one step's rows at a time has `pair_mismatches`: the step's own
completions, each once where that is possible. Both put the rows of one prompt side by side and step over them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prefuse.tokens import group_prompts


def draw_mismatches(
    prompt_ids: Tensor,  # (E,) int64, from 0: equal for rows of one prompt
    uniform: Tensor,  # (E,) float64 in [0, 1)
) -> list[int]:
    """For each row i a row j with another prompt, uniformly among those. At least two prompts are expected."""
    sizes = torch.bincount(prompt_ids)  # (prompts,)
    by_prompt = torch.argsort(prompt_ids, stable=True)  # (E,)
    start, size = (sizes.cumsum(0) - sizes)[prompt_ids], sizes[prompt_ids]  # (E,) where the row's own prompt stands
    # The other rows are all but that one range: draw among E - size places, then step over the range.
    draw = (uniform * (len(prompt_ids) - size)).long()
    return by_prompt[torch.where(draw < start, draw, draw + size)].tolist()


def pair_mismatches(prompts: Sequence[Sequence[int]]) -> list[int | None]:
    """For each row of a step another row with another prompt.

    A permutation, as KTO's authors advise (the mismatched completions of a step are its own), where no prompt has more
    than half of the rows. Else the rest is used several times; None where all rows have one prompt.
    """
    groups = sorted(group_prompts(prompts), key=len, reverse=True)
    order = [i for group in groups for i in group]
    size, largest = len(order), len(groups[0]) if groups else 0
    others = size - largest
    partners: list[int | None] = [None] * size
    for place, row in enumerate(order):
        if others >= largest:  # each prompt's rows are end to end: a shift by the most that one has leaves them
            partners[row] = order[(place + largest) % size]
        elif others:
            partners[row] = order[largest + place % others if place < largest else place - largest]
    return partners
