"""Answers to the prompts of a data set, by one model or by two side by side.

prefuse generate --model_name_or_path run --ref_model_name_or_path base --dataset_name pairs.jsonl

Prompts are padded on the left. Only the settings shape the text: greedy, or the plain distribution at a temperature.
What the model's generation_config.json asks for besides (penalties, top_p, beams, forbidden tokens) is not used, and
that is said; of it only the tokens that end an answer are taken.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import hold_out_rows, text_options
from prefuse.engine.data.encode import continuation
from prefuse.engine.data.examples import Prompt, load_prompts
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.limits import check_prompts
from prefuse.engine.model.load import device_of, load_model, load_tokenizer
from prefuse.engine.report.log import progress_bar, say, table
from prefuse.engine.run.files import write_whole

if TYPE_CHECKING:
    from transformers import GenerationConfig

# What a generation_config.json may say without an effect here.
NOT_OF_THE_TEXT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "max_length", "max_new_tokens",
    "transformers_version", "_from_model_config", "use_cache", "cache_implementation", "output_attentions",
    "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip
SHOWN_CHARACTERS = 300  # of a prompt; output_file has it whole
SHOWN_ANSWERS = 20  # where output_file has all


def generate(config: Config) -> list[dict[str, str]]:
    """`prefuse generate`: prints a table, writes JSONL to output_file; one {row, prompt, model, reference} a prompt."""
    device = device_of(config)
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    prompts = _read_prompts(config, tokenizer)
    names = {"model": config.model_name_or_path}
    if config.ref_model_name_or_path is not None:
        names = {"reference": config.ref_model_name_or_path, **names}
    answers = {}
    for role, path in names.items():
        lm = load_model(path, config, device)
        rows = [prompt.row for prompt in prompts]
        check_prompts(lm, [prompt.ids for prompt in prompts], rows, config.max_new_tokens)
        answers[role] = answer(lm, tokenizer, [prompt.ids for prompt in prompts], config)

    results = [
        {"row": prompt.row, "prompt": prompt.text} | {role: answers[role][i] for role in names}
        for i, prompt in enumerate(prompts)
    ]
    if config.output_file is not None:  # before they are shown: a screen may be gone
        lines = (json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        text = "".join(lines).encode("utf-8", errors="backslashreplace").decode()  # half a surrogate pair is no UTF-8
        write_whole(Path(config.output_file), text)
    title = f"greedy, at most {config.max_new_tokens} tokens"
    if config.temperature > 0:
        title = f"temperature {config.temperature}, at most {config.max_new_tokens} tokens"
    shown = results if config.output_file is None else results[:SHOWN_ANSWERS]
    rows = [[_end_of(result["prompt"]), *(result[role] for role in names)] for result in shown]
    table(title, ["prompt", *(f"{role}: {names[role]}" for role in names)], rows)
    if config.output_file is not None:
        say(f"wrote {len(results)} answers to {config.output_file}")
    return results


@torch.no_grad()
def answer(lm: LanguageModel, tokenizer, prompts: list[list[int]], config: Config) -> list[str]:
    """The text each prompt is continued with, special tokens left out. The seed decides what is sampled."""
    torch.manual_seed(config.seed)
    ours = _generation_config(lm, tokenizer, config)
    lm.model.generation_config = ours  # generate fills what is not set from it
    texts = []
    size, stops = config.per_device_eval_batch_size, _stop_tokens(lm, tokenizer)
    with progress_bar() as bar, lm.autocast():
        task = bar.add_task("generating", total=len(prompts))
        for start in range(0, len(prompts), size):
            ids, mask = pad_left(prompts[start : start + size])
            out = lm.model.generate(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=ours,
            )
            answers = [_up_to(stops, answer) for answer in out[:, ids.shape[1] :].tolist()]
            texts += [
                continuation(tokenizer, *both) for both in zip(prompts[start : start + size], answers, strict=True)
            ]
            bar.update(task, completed=start + len(ids))
    return texts


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


def pad_left(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T) ids, (B, T) mask
    """So that every answer starts in the same column; the mask tells the model where a prompt begins."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _end_of(text: str) -> str:
    """What fits in a cell of the screen's table."""
    return text if len(text) <= SHOWN_CHARACTERS else "… " + text[-SHOWN_CHARACTERS:]


def _read_prompts(config: Config, tokenizer) -> list[Prompt]:
    """The first num_prompts distinct prompts of eval_dataset, or of what dataset_name holds out."""
    rest, reading = (tokenizer, config.max_length), {**config.reading(), "text": text_options(config)}
    if config.eval_dataset is not None:
        prompts = load_prompts(config.eval_dataset, *rest, split=config.dataset_test_split, **reading)
    else:
        source = config.datasets or config.dataset_name
        prompts = load_prompts(source, *rest, split=config.dataset_train_split, **reading)
        _, held = hold_out_rows([prompt.ids for prompt in prompts], config)
        prompts = [prompts[i] for i in held]
    prompts = list({tuple(prompt.ids): prompt for prompt in reversed(prompts)}.values())[::-1]  # the first of each
    return prompts[: config.num_prompts or None]
