"""What a causal LM does with tokens, logits and labels, found by running it on a few tokens.

A config says little of what a forward does, and names are chosen anew for every model. So the first time that a model
is used, its own forward runs on TOKENS tokens, in eval mode and without gradients, and is compared with what this
library computes: no weight, no random state and no number of the caller changes.

`states(input_ids, **inputs)` runs the model and returns its last hidden states, (B, T) -> (B, T, D).

B rows of T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from prefuse.kernels.attention.shared_prefix import attention_dtype
from prefuse.models.trunk import UnsupportedModel, class_of, trunk_hidden
from prefuse.packing import pad

TOKENS = 12
States = Callable[..., Tensor]


@contextlib.contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Without gradients and without dropout, whatever mode each of the modules is in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def probe_ids(causal: nn.Module, count: int = TOKENS) -> Tensor:  # (count,)
    """Ids of words: what is special (padding, images) stands at either end of a vocabulary."""
    vocabulary = causal.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 8, max(vocabulary // 2, vocabulary // 8 + 2), (count,), generator=generator)
    return ids.to(next(causal.parameters()).device)


def bound_of(states: Tensor, causal: nn.Module) -> float:
    """How far rounding may move a hidden state, of its size. What a model does wrong moves it by some tenth."""
    dtype = attention_dtype(torch.empty(0, device=states.device), next(causal.parameters()))
    return max(1e-4, 16 * torch.finfo(dtype).eps)


def moved(got: Tensor, expected: Tensor) -> float:
    """The largest difference of a hidden state, of its size."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)).max().item()


def check_causal(causal: nn.Module, states: States) -> None:
    """Refuse a model whose states depend on tokens that come later: it would see what it is to predict."""
    ids = probe_ids(causal)
    other = ids.clone()
    other[-1] = ids[0] if ids[0] != ids[-1] else ids[1]
    before, after = states(ids[None])[0, :-1], states(other[None])[0, :-1]
    difference = moved(after, before)
    if not difference <= bound_of(before, causal):
        raise UnsupportedModel(
            f"{class_of(causal).__name__} looks ahead: another last token moves the states before it by "
            f"{difference:.2g} of their size, so it would see the tokens that it is to predict. "
            f"{_decoder_hint(causal)}"
        )


def _decoder_hint(causal: nn.Module) -> str:
    if getattr(causal.config, "is_decoder", True) is False:
        return "Set is_decoder to true in its config.json"
    return "Expected a model with causal attention"


def check_padding(
    causal: nn.Module, states: States, inputs_of: Callable[[Tensor], dict] | None = None, *, left: bool = False
) -> None:
    """Refuse a model whose states of a padded row are not those of the row alone.

    `inputs_of(attention_mask)`: what the model is given beside the ids. Raises UnsupportedModel.
    """
    keys = getattr(causal.config.get_text_config(decoder=True), "keep_window_size", None)
    if keys is not None:
        raise UnsupportedModel(
            f"{class_of(causal).__name__} chooses {keys} keys (keep_window_size) from the whole row with its padding, "
            "so a row's numbers depend on its batch: give rows of one length"
        )
    ids = probe_ids(causal)
    short = ids[: TOKENS - 5]
    both, mask = (x.to(ids.device) for x in pad([ids.tolist(), short.tolist()]))
    if left:
        both, mask = (torch.stack([x[0], x[1].roll(5)]) for x in (both, mask))
    inputs = {"attention_mask": mask} if inputs_of is None else inputs_of(mask)
    got = states(both, **inputs)
    for row, real, alone in zip(got, mask.bool(), (ids, short), strict=True):
        expected = states(alone[None])[0]
        difference = moved(row[real], expected)
        if not difference <= bound_of(expected, causal):
            side, fix = ("left", "pad on the right") if left else ("right", "give rows of one length")
            raise UnsupportedModel(
                f"{class_of(causal).__name__}: the states of a row padded on the {side} differ from those of the row "
                f"alone by {difference:.2g} of their size, so its numbers depend on its batch: {fix}"
            )


def check_padded_trunk(model: nn.Module) -> None:
    """`check_padding` of a model whose trunk is called without its head."""
    with quietly(model):
        check_padding(model, lambda ids, **inputs: trunk_hidden(model, ids, **inputs))


# ---------------------------------------------------------------------------------------------------------
# Logits and loss


def loud_logits(count: int, vocabulary: int, device: torch.device) -> Tensor:  # (1, count, V) float32
    """Logits small and large, no two rows alike: a cut, a factor, a cap or a shift shows in some of them."""
    places = torch.arange(count * vocabulary, device=device, dtype=torch.float64)
    return ((places * 0.6180339887498949) % 1 * 400 - 200).float().view(1, count, vocabulary)


def check_logits(causal: nn.Module, got: object, expected: Tensor, about: dict) -> None:  # (1, T, V)
    """Refuse the model if its forward made something else of its head's output than its config tells."""
    fits = isinstance(got, Tensor) and got.shape == expected.shape
    if fits:
        bound = 4 * torch.finfo(got.dtype).eps * expected.abs().clamp(min=1)
        fits = bool(((got.double() - expected.double()).abs() <= bound).all())
    if not fits:
        cut = isinstance(got, Tensor) and got.shape[:-1] == expected.shape[:-1] and got.shape != expected.shape
        seen = f" (they have {got.shape[-1]} columns, its head {expected.shape[-1]})" if cut else ""
        raise UnsupportedModel(
            f"the forward of {class_of(causal).__name__} does something to its logits that its config does not tell of"
            f"{seen} (known here are {about}), so their log-probabilities cannot be computed without them"
        )


def check_causal_loss(causal: nn.Module, got: object, logits: Tensor, labels: Tensor, extra: Tensor | float) -> None:
    """Refuse the model if its loss is not the cross-entropy of the next token, plus `extra`."""
    expected = nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:]) + float(extra)
    if isinstance(got, Tensor) and got.numel() == 1 and abs(got.item() - expected.item()) <= 1e-3 * abs(expected):
        return
    unshifted = nn.functional.cross_entropy(logits[0].double(), labels[0]).item()
    value = got.item() if isinstance(got, Tensor) and got.numel() == 1 else None
    if value is not None and abs(value - unshifted) <= 1e-3 * unshifted:
        what = "does not shift its labels: a token's label stands at its own place"
    else:
        what = "is not the cross-entropy of the next token" + ("" if value is not None else ": there is none")
    raise UnsupportedModel(
        f"the loss of {class_of(causal).__name__} {what}, so it would become another: compute it from token_logps"
    )
