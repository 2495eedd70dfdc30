"""Answers of a model: batched generation with key-value caches, shaped by the settings alone.

Prompts are padded on the left. Greedy, or the plain distribution at a temperature: what the model's
generation_config.json asks for besides (penalties, top_p, beams, forbidden tokens) is not used, and that is said; of it
only the tokens that end an answer are taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.data.encode import continuation
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.report.log import progress_bar, say

if TYPE_CHECKING:
    from transformers import GenerationConfig

# What a generation_config.json may say without an effect here.
NOT_OF_THE_TEXT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "max_length", "max_new_tokens",
    "transformers_version", "_from_model_config", "use_cache", "cache_implementation", "output_attentions",
    "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a model said after one prompt."""

    ids: list[int]  # as they were generated, the token that ended them included
    text: str  # without special tokens
    stopped: bool  # False: max_new_tokens cut it off


@torch.no_grad()
def sample(lm: LanguageModel, tokenizer, prompts: Sequence[list[int]], config: Config) -> list[Answer]:
    """One answer to each prompt, in order. The seed decides what is sampled."""
    torch.manual_seed(config.seed)
    ours = _generation_config(lm, tokenizer, config)
    lm.model.generation_config = ours  # generate fills what is not set from it
    answers = []
    size, stops = config.per_device_eval_batch_size, _stop_tokens(lm, tokenizer)
    with progress_bar() as bar, lm.autocast():
        task = bar.add_task("generating", total=len(prompts))
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            ids, mask = pad_left(batch)
            out = lm.model.generate(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=ours,
            )
            for prompt, said in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                told = _up_to(stops, said)
                text = continuation(tokenizer, prompt, told)
                answers.append(Answer(said[: len(told) + 1], text, len(told) < len(said)))
            bar.update(task, completed=start + len(ids))
    return answers


def _generation_config(lm: LanguageModel, tokenizer, config: Config) -> "GenerationConfig":
    """All that decides which token comes next, from the settings alone."""
    from transformers import GenerationConfig

    asked = lm.model.generation_config.to_diff_dict()
    unused = sorted(name for name in asked if name not in NOT_OF_THE_TEXT)
    if unused:
        said = ", ".join(f"{name} {asked[name]}" for name in unused)
        say(f"not used, though generation_config.json of {lm.model.name_or_path} has it: {said:.300}")
    how = {"do_sample": False}
    if config.temperature > 0:
        how = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        bos_token_id=lm.model.generation_config.bos_token_id,
        eos_token_id=_stop_tokens(lm, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **how,
    )


def _stop_tokens(lm: LanguageModel, tokenizer) -> list[int]:
    """The tokenizer's EOS, and whatever else the model says ends a turn (such as <|im_end|>)."""
    own = lm.model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})


def _up_to(stops: list[int], answer: list[int]) -> list[int]:
    """The answer before its stop token, which may be no special token, and before the padding behind it."""
    return answer[: next((i for i, token in enumerate(answer) if token in stops), len(answer))]


def pad_left(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T) ids, (B, T) mask
    """So that every answer starts in the same column; the mask tells the model where a prompt begins."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
