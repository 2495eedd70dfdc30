"""Answers of a model: transformers' own batched generate with its cache, shaped by the settings alone.

`prefuse generate`, `eval`, `label`, `revise`, `online` and judges sample here. Prompts are padded on the left. What a
generation_config.json asks for besides (penalties, beams, forbidden tokens) is not used, and that is said; of it only
the tokens that end an answer are taken.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.data.encode import continuation
from prefuse.engine.errors import UserError
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.report.log import progress, say

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# What a generation_config.json may say without an effect here.
NOT_OF_THE_TEXT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "max_length", "max_new_tokens",
    "transformers_version", "_from_model_config", "use_cache", "cache_implementation", "output_attentions",
    "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip


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
class Answer:
    """What a model said after one prompt."""

    ids: list[int]  # as they were generated, the token that ended them included
    text: str  # without that token and without special ones
    stopped: bool  # False: max_new_tokens cut it off
    round_trip: bool = True  # False: a server gave the text alone, and the ids made of it say something else
    logps: list[float] | None = None  # of ids, by a server that sampled them


class AnswerStore(Protocol):
    """Answers that outlive the process (rounds/kept.py)."""

    def answers(self, asked: Any, make: Callable[[], list[Answer]]) -> list[Answer]:
        """What `asked` was answered before, else what `make` samples now."""


def shape_of(config: Config) -> Shape:
    return Shape(config.max_new_tokens, config.temperature, config.top_p, config.min_p)


@torch.no_grad()
def sample(
    lm: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    shape: Shape,
    batch_size: int,
    seeds: int | Callable[[int], int],  # one stream for all batches; or the number of a batch -> a seed of its own
    *,
    synced: bool = False,  # over ranks: all of them generate until the last is done
    continuous: bool = False,  # a new prompt takes the place of an answer that has ended; one seed for all
    store: AnswerStore | None = None,  # with a seed for each batch
    what: str = "generating",
) -> list[Answer]:
    """One answer to each of `prompts`, in their order; repeat a prompt for more.

    With a seed for each batch, the answers to a prompt depend on the weights, the seed and the batch it stands in, and
    on nothing that was drawn before.
    """
    from transformers import GenerationConfig

    _say_what_is_not_used(lm.model)
    stops = ending_tokens(lm.model.generation_config.eos_token_id, tokenizer)
    own = GenerationConfig(
        max_new_tokens=shape.max_new_tokens, bos_token_id=lm.model.generation_config.bos_token_id, eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), None),
        **shape.settings(),
    )  # fmt: skip
    kept, lm.model.generation_config = lm.model.generation_config, own  # generate fills what is not set from it
    devices = [lm.device] if lm.device.type == "cuda" else []
    starts = range(0, len(prompts), batch_size)
    answers: list[Answer] = []
    try:
        with torch.random.fork_rng(devices), lm.autocast():
            if continuous:
                torch.manual_seed(seeds(0) if callable(seeds) else seeds)
                said = _generate_continuously(lm, prompts, own, batch_size, what)
                return [_answer(tokenizer, *both, stops) for both in zip(prompts, said, strict=True)]
            for number, start in enumerate(progress(starts, what, len(starts))):
                batch = prompts[start : start + batch_size]

                def of_batch(number: int = number, batch: Sequence[Sequence[int]] = batch) -> list[Answer]:
                    if callable(seeds) or number == 0:
                        torch.manual_seed(seeds(number) if callable(seeds) else seeds)
                    said = _generate(lm, batch, own, synced)
                    return [_answer(tokenizer, *both, stops) for both in zip(batch, said, strict=True)]

                answers += of_batch() if store is None else store.answers([seeds(number), *batch], of_batch)
    finally:
        lm.model.generation_config = kept
    return answers


def _generate(
    lm: LanguageModel, batch: Sequence[Sequence[int]], own: "GenerationConfig", synced: bool
) -> list[list[int]]:
    ids, mask = pad_left(batch)
    out = lm.model.generate(
        input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), generation_config=own, synced_gpus=synced
    )
    return out[:, ids.shape[1] :].tolist()


def sample_for(config: Config, lm: LanguageModel, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    """`sample` as `generate` and `eval` are told to: one stream of draws for all prompts."""
    continuous, size = config.use_transformers_continuous_batching, config.per_device_eval_batch_size
    return sample(lm, tokenizer, prompts, shape_of(config), size, config.seed, continuous=continuous)


PAGE = 32  # tokens of the cache's pages


def _generate_continuously(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], own: "GenerationConfig", at_once: int, what: str
) -> list[list[int]]:
    """transformers' `generate_batch`, with a cache for `at_once` answers of the greatest length.

    All prompts wait before it starts, so what runs beside what, and so each draw, does not depend on the clock.
    (`generate_batch` itself starts first, and takes a cache as large as the memory: seconds on a CPU.)
    """
    from transformers import ContinuousBatchingConfig

    if not prompts:
        return []
    longest = max(map(len, prompts))
    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=min(at_once, len(prompts)) * -(-(longest + own.max_new_tokens) // PAGE),
        max_batch_tokens=max(longest, at_once), use_cuda_graph=False,
        drop_unsupported_processors=False,  # min_p is none that it knows to be right, and it is
    )  # fmt: skip
    logger = logging.getLogger("ContinuousBatchingLogger")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        manager = lm.model.init_continuous_batching(generation_config=own, continuous_batching_config=settings)
        names = manager.add_requests([list(prompt) for prompt in prompts], max_new_tokens=own.max_new_tokens)
        manager.start()
        try:
            found = dict(progress(_results(manager, len(names)), what, len(names)))
        finally:
            manager.stop(block=True, timeout=5)
            manager.destroy()
    finally:
        logger.setLevel(level)
    if len(found) < len(names) or any(one.error is not None for one in found.values()):
        fault = next((one.error for one in found.values() if one.error is not None), "its thread has ended")
        raise UserError(
            f"continuous batching fails for {type(lm.model).__name__}: {fault}; drop "
            "use_transformers_continuous_batching"
        )
    return [list(found[name].generated_tokens) for name in names]


def _results(manager: Any, count: int) -> Iterator[tuple[str, Any]]:
    """(name, result) of the requests as they end; fewer than `count` where generation has failed."""
    done = 0
    while done < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            done += 1
            yield result.request_id, result
        elif result is None and not manager.is_running():
            return


def _answer(tokenizer: Any, prompt: Sequence[int], said: list[int], stops: Sequence[int]) -> Answer:
    """Without the padding behind the token that ended it. That token may be no special one; the text is without it."""
    end = next((i for i, token in enumerate(said) if token in stops), None)
    if end is None:
        return Answer(said, continuation(tokenizer, prompt, said), False)
    return Answer(said[: end + 1], continuation(tokenizer, prompt, said[:end]), True)


_told: WeakSet["PreTrainedModel"] = WeakSet()


def _say_what_is_not_used(model: "PreTrainedModel") -> None:
    """Once for a model."""
    if model in _told:
        return
    _told.add(model)
    asked = model.generation_config.to_diff_dict()
    unused = sorted(name for name in asked if name not in NOT_OF_THE_TEXT)
    if unused:
        said = ", ".join(f"{name} {asked[name]}" for name in unused)
        say(f"not used, though generation_config.json of {model.name_or_path} has it: {said:.300}")


def ending_tokens(own: int | list[int] | None, tokenizer: Any) -> list[int]:
    """The tokenizer's EOS, and whatever else the model says ends a turn (such as <|im_end|>): `own`, of its
    generation_config."""
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T) ids, (B, T) mask
    """So that every answer starts in the same column; the mask tells the model where a prompt begins."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
