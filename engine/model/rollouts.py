"""Answers that the policy samples: several to each prompt, batched, with transformers' own generate and its cache.

Only the settings shape them: temperature, top_p, min_p, the most tokens. What a generation_config.json asks for besides
has no effect, but for the tokens that end an answer. Each batch is drawn from a seed of its own, so the answers to a
prompt depend on the weights, the seed and the batch it stands in, and on nothing that was drawn before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.report.log import progress


@dataclass(frozen=True)
class Shape:
    """What decides the next token beside the model."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    min_p: float | None = None

    def settings(self) -> dict:
        if self.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p, "min_p": self.min_p,
        }  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What the policy said after a prompt."""

    ids: list[int]  # with the token that ended it
    stopped: bool  # False: the most tokens cut it off


@torch.no_grad()
def sample_answers(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    shape: Shape,
    stops: Sequence[int],
    pad: int,
    batch_size: int,
    seed_of: Callable[[int], int],  # the number of a batch -> its seed
    *,
    synced: bool = False,  # over ranks: all of them generate until the last is done
    what: str = "sampling",
) -> list[Sample]:
    """One answer for each of `prompts`, in their order; repeat a prompt for more."""
    from transformers import GenerationConfig

    own = GenerationConfig(
        max_new_tokens=shape.max_new_tokens, bos_token_id=lm.model.generation_config.bos_token_id,
        eos_token_id=list(stops), pad_token_id=pad, **shape.settings(),
    )  # fmt: skip
    kept, lm.model.generation_config = lm.model.generation_config, own  # generate fills what is not set from it
    devices = [lm.device] if lm.device.type == "cuda" else []
    samples: list[Sample] = []
    starts = range(0, len(prompts), batch_size)
    try:
        with torch.random.fork_rng(devices), lm.autocast():
            for number, start in enumerate(progress(starts, what, len(starts))):
                torch.manual_seed(seed_of(number))
                ids, mask = pad_left(prompts[start : start + batch_size])
                out = lm.model.generate(
                    input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), generation_config=own,
                    synced_gpus=synced,
                )  # fmt: skip
                samples += [up_to_stop(said, stops) for said in out[:, ids.shape[1] :].tolist()]
    finally:
        lm.model.generation_config = kept
    return samples


def up_to_stop(said: list[int], stops: Sequence[int]) -> Sample:
    """Without the padding behind the token that ended it."""
    end = next((i for i, token in enumerate(said) if token in stops), None)
    return Sample(said, False) if end is None else Sample(said[: end + 1], True)


def pad_left(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T) ids, (B, T) mask
    """So that every answer starts in the same column; the mask tells the model where a prompt begins."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def stop_tokens_of(lm: LanguageModel, tokenizer) -> list[int]:
    """The tokenizer's EOS, and whatever else the model says ends a turn (such as <|im_end|>)."""
    own = lm.model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})
