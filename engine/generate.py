"""Answers to the prompts of a data set, by one model or by two side by side.

prefuse generate --model_name_or_path run --ref_model_name_or_path base --dataset_name pairs.jsonl

Only the settings shape the text: greedy, or sampled at a temperature (engine/model/sampling.py).
"""

import json
from pathlib import Path

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import read_prompts
from prefuse.engine.data.of_run import say_unlike_run
from prefuse.engine.model.limits import check_prompts
from prefuse.engine.model.load import device_of, load_model, load_tokenizer
from prefuse.engine.model.sampling import sample_for
from prefuse.engine.report.log import print_table, say
from prefuse.engine.rounds.served import sampling_server
from prefuse.engine.run.files import write_whole

SHOWN_CHARACTERS = 300  # of a prompt; output_file has it whole
SHOWN_ANSWERS = 20  # where output_file has all


def generate(config: Config) -> list[dict[str, str]]:
    """`prefuse generate`: prints a table, writes JSONL to output_file; one {row, prompt, model, reference} a prompt."""
    device = device_of(config)
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    say_unlike_run(config)
    prompts = read_prompts(config, tokenizer)
    names = {"model": config.model_name_or_path}
    if config.ref_model_name_or_path is not None:
        names = {"reference": config.ref_model_name_or_path, **names}
    answers = {}
    for role, path in names.items():
        if role == "model" and config.server_type is not None:
            said = sampling_server(config, tokenizer).answers(prompts, 1, config.seed, "generating")
            answers[role] = [own[0].text for own in said]
            continue
        lm = load_model(path, config, device)
        rows = [prompt.row for prompt in prompts]
        check_prompts(lm, [prompt.ids for prompt in prompts], rows, config.max_new_tokens)
        answers[role] = [a.text for a in sample_for(config, lm, tokenizer, [prompt.ids for prompt in prompts])]

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
    print_table(title, ["prompt", *(f"{role}: {names[role]}" for role in names)], rows)
    if config.output_file is not None:
        say(f"wrote {len(results)} answers to {config.output_file}")
    return results


def _end_of(text: str) -> str:
    """What fits in a cell of the screen's table."""
    return text if len(text) <= SHOWN_CHARACTERS else "… " + text[-SHOWN_CHARACTERS:]
