"""The supervised phase of Constitutional AI: answer, critique by a drawn principle, revision -> rows for `prefuse sft`.

    prefuse revise --model_name_or_path model --dataset_name prompts.jsonl --constitution c.yaml --output_file sft.jsonl

Bai et al. 2022 (arXiv 2212.08073), section 3.1. The model itself critiques and revises, num_revisions times, each time
by another pair of requests from the constitution. With a scorer, the mean score before and after each revision is
printed: whether revision helps by a rule or a reward model.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import columns_of_rows, read_prompts, text_options
from prefuse.engine.data.examples import Prompt
from prefuse.engine.data.templates import TextOptions, template_of
from prefuse.engine.errors import UserError
from prefuse.engine.model.limits import position_limit
from prefuse.engine.model.load import device_of, load_tokenizer
from prefuse.engine.report.log import print_table, say
from prefuse.engine.rounds.sampler import OwnModel, Sampler, seed_of
from prefuse.engine.rounds.served import source_of
from prefuse.engine.run.files import write_whole
from prefuse.engine.score.constitution import Constitution, Critique, read_constitution
from prefuse.engine.score.contract import Text
from prefuse.engine.score.scorers import scorer_of


@dataclass
class Draft:
    """One prompt with all that was said of it."""

    prompt: Prompt
    answers: list[str] = field(default_factory=list)  # the first, then each revision
    critiques: list[str] = field(default_factory=list)
    requests: list[Critique] = field(default_factory=list)


def revise(config: Config) -> dict[str, float]:
    """`prefuse revise`: writes output_file; prints how much was changed, and by a scorer whether for the better."""
    device = device_of(config)
    constitution = read_constitution(config.constitution)
    if not constitution.critiques:
        raise UserError(f"constitution {config.constitution} has no critiques: give pairs of critique and revision")
    scorer = scorer_of(config.scorer, config, device) if config.scorer else None
    columns = list(scorer.columns) if scorer is not None else []
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    prompts = read_prompts(config, tokenizer, columns)
    values = columns_of_rows(config, prompts, columns)
    writer = Sampler(source_of(config, tokenizer, device), scorer, values)
    drafts = [Draft(prompt) for prompt in prompts]
    say_each(writer, drafts, "answers", [prompt.ids for prompt in prompts], config)
    for number in range(config.num_revisions):
        revise_once(writer, drafts, constitution, number, config)
    rows = [row_of(draft, config) for draft in drafts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(Path(config.output_file), lines.encode("utf-8", errors="backslashreplace").decode())
    metrics = summary(writer, drafts)
    print_table("answers and revisions", ["", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()])
    say(f"wrote {len(rows)} rows to {config.output_file}")
    return metrics


def revise_once(
    writer: Sampler, drafts: Sequence[Draft], constitution: Constitution, number: int, config: Config
) -> None:
    """A critique of each answer, then its revision."""
    for draft in drafts:
        draft.requests.append(constitution.critique_of(config.seed, draft.prompt.row, number))
    critiques = [conversation(draft, draft.requests[-1].critique, "Critique") for draft in drafts]
    tokenizer, text = writer.source.tokenizer, text_options(config)
    said = say_each(writer, drafts, "critiques", [tokens_of(tokenizer, one, text) for one in critiques], config)
    revisions = [
        [*one, ("assistant", critique), ("user", draft.requests[-1].revision)]
        for one, critique, draft in zip(critiques, said, drafts, strict=True)
    ]
    say_each(writer, drafts, "answers", [tokens_of(tokenizer, one, text) for one in revisions], config)


Turns = list[tuple[str, str]]  # (role, text)


def conversation(draft: Draft, request: str, name: str) -> Turns:
    prompt = draft.prompt.raw
    turns = [("user", prompt)] if isinstance(prompt, str) else [(t["role"], t.get("content") or "") for t in prompt]
    return [*turns, ("assistant", draft.answers[-1]), ("user", request)]


def tokens_of(tokenizer: Any, turns: Turns, options: TextOptions) -> list[int]:
    """By the chat template, or, without one, as the paper writes conversations."""
    if not tokenizer.chat_template:
        names = {"user": "Human", "assistant": "Assistant", "system": "System"}
        text = "\n\n".join([*(f"{names.get(role, role)}: {said}" for role, said in turns), "Assistant:"])
        return tokenizer(text)["input_ids"]
    messages = [{"role": role, "content": said} for role, said in turns]
    template = template_of(tokenizer, options)
    return template.ids(template.begun(messages), generation_prompt=True)


def say_each(
    writer: Sampler, drafts: Sequence[Draft], kind: str, asked: Sequence[list[int]], config: Config
) -> list[str]:  # fmt: skip
    """What the model says to each, kept in the drafts. What does not fit is left as it was, and named."""
    limit = position_limit(writer.source.lm.model) if isinstance(writer.source, OwnModel) else None
    fits = [limit is None or len(ids) + config.max_new_tokens <= limit for ids in asked]
    left = [draft.prompt.row for draft, fit in zip(drafts, fits, strict=True) if not fit]
    if left:
        say(f"{len(left)} conversations are longer than the model takes, and stay as they are: {', '.join(left[:5])}")
    prompts = [d.prompt._replace(ids=ids) for d, ids, fit in zip(drafts, asked, fits, strict=True) if fit]
    seed = seed_of(config.seed, "revise", kind, len(drafts[0].answers) if drafts else 0)
    samples = writer.sample(prompts, 1, seed, f"sampling {kind}") if prompts else []
    texts = iter(own[0].text.strip() for own in samples)
    said = []
    for draft, fit in zip(drafts, fits, strict=True):
        kept = getattr(draft, kind)
        text = next(texts) if fit else (kept[-1] if kept else "")
        kept.append(text)
        said.append(text)
    return said


def row_of(draft: Draft, config: Config) -> dict:
    """A demonstration with its provenance."""
    prompt: Text = draft.prompt.raw
    last = draft.answers[-1]
    completion = last if isinstance(prompt, str) else [{"role": "assistant", "content": last}]
    about = {
        "meta_row": draft.prompt.row, "meta_model": config.model_name_or_path, "meta_first_answer": draft.answers[0],
        "meta_critiques": draft.critiques, "meta_requests": [request.critique for request in draft.requests],
    }  # fmt: skip
    return {"prompt": prompt, "completion": completion, **about}


def summary(writer: Sampler, drafts: Sequence[Draft]) -> dict[str, float]:
    count = len(drafts[0].answers)
    metrics = {"prompts": float(len(drafts))}
    for number in range(count):
        answers = [draft.answers[number] for draft in drafts]
        metrics[f"length/{number}"] = sum(map(len, answers)) / len(answers)
        if number:
            changed = sum(draft.answers[number] != draft.answers[number - 1] for draft in drafts)
            metrics[f"changed/{number}"] = changed / len(drafts)
        if writer.scorer is not None:
            scores = writer.score(range(len(drafts)), [d.prompt for d in drafts], [[answer] for answer in answers])
            known = scores[~scores.isnan()]
            metrics[f"score/{number}"] = float(known.mean()) if len(known) else math.nan
    return metrics
