"""Answers by a server that speaks OpenAI's API: vLLM, SGLang, `transformers serve`, or any other.

What it is (`server_type`) decides how it is asked. vLLM and SGLang take prompts as token ids, so they read what the
trainer reads. The others take text; a prompt whose text they would read otherwise is counted and said. Where the server
says which tokens it has sampled (vLLM), these are the answer; else its text is tokenized again behind the prompt, and
answers whose text does not come back are counted (`completions/not_round_trip`). Samples decide what is learned, so
one that does not come ends the run: there is nothing in its place.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from prefuse.engine.config.settings import Config
from prefuse.engine.data.encode import Encoder, continuation
from prefuse.engine.data.examples import Prompt
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import load_model
from prefuse.engine.model.sampling import Answer, AnswerStore, Shape, ending_tokens, shape_of
from prefuse.engine.report.log import progress, say
from prefuse.engine.rounds.kept import kept_of_model, kept_of_server
from prefuse.engine.rounds.sampler import AnswerSource, OwnModel, seed_of
from prefuse.engine.rounds.samples import Round
from prefuse.engine.run.ranks import ALONE, Ranks
from prefuse.engine.score.client import Client, Refused, checked_url
from prefuse.engine.score.contract import NoScore

logger = logging.getLogger(__name__)

MOST_BYTES = 256 << 20  # of a reply: n answers with their tokens and log-probabilities


class Kind(NamedTuple):
    """How servers of one kind are asked."""

    takes_ids: bool  # prompts as token ids
    takes_n: bool  # several answers to one request
    one_at_a_time: bool  # its seed is the whole process's
    body: Callable[[Shape, list[int]], dict]


def _of_vllm(shape: Shape, stops: list[int]) -> dict:
    """All that the server would else take from the model's generation_config.json."""
    body = {"max_tokens": shape.max_new_tokens, "temperature": shape.temperature, "top_p": shape.top_p, "top_k": -1}
    body |= {"min_p": shape.min_p or 0.0, "repetition_penalty": 1.0, "stop_token_ids": stops}
    return body | {"return_token_ids": True, "logprobs": 1}


def _of_sglang(shape: Shape, stops: list[int]) -> dict:
    return {name: x for name, x in _of_vllm(shape, stops).items() if name not in ("return_token_ids", "logprobs")}


def _of_transformers(shape: Shape, stops: list[int]) -> dict:
    own = {"max_new_tokens": shape.max_new_tokens, "eos_token_id": stops, "pad_token_id": next(iter(stops), None)}
    return {"max_tokens": shape.max_new_tokens, "generation_config": json.dumps(own | shape.settings())}


def _of_openai(shape: Shape, stops: list[int]) -> dict:
    return {"max_tokens": shape.max_new_tokens, "temperature": shape.temperature, "top_p": shape.top_p}


KINDS = {
    "vllm": Kind(True, True, False, _of_vllm), "sglang": Kind(True, True, False, _of_sglang),
    "transformers": Kind(False, False, True, _of_transformers), "openai": Kind(False, True, False, _of_openai),
}  # fmt: skip


@dataclass
class Served:
    """A `AnswerSource`: the answers of a server."""

    client: Client
    kind: Kind
    tokenizer: Any
    shape: Shape
    stops: list[int]
    model: Callable[[], str]  # the name to ask for; where weights change, they are handed over first
    workers: int = 8
    ranks: Ranks = ALONE
    store: AnswerStore | None = None

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.tokenizer)
        self.warned = False

    def answers(self, prompts: Sequence[Prompt], count: int, seed: int, what: str) -> list[list[Answer]]:
        model = self.model()
        return self.ranks.together(lambda: self._answers(model, prompts, count, seed, what))

    def check(self, prompts: Sequence[Prompt]) -> None:
        """The server says itself what it does not take."""

    def _answers(
        self, model: str, prompts: Sequence[Prompt], count: int, seed: int, what: str
    ) -> list[list[Answer]]:  # fmt: skip
        at_once = count if self.kind.takes_n else 1
        asked = [(p, k) for p in range(len(prompts)) for k in range(0, count, at_once)]
        texts = None if self.kind.takes_ids else self._texts(prompts)

        def one(place: tuple[int, int]) -> list[Answer]:
            p, k = place
            body = {"model": model, "prompt": prompts[p].ids if texts is None else texts[p]}
            body |= {"seed": seed_of(seed, p, k) & 0x7FFFFFFF} | ({"n": count} if at_once > 1 else {})
            body |= self.kind.body(self.shape, self.stops)

            def of_request() -> list[Answer]:
                return [self._answer(prompts[p].ids, choice) for choice in self._ask(body, at_once, prompts[p].row)]

            return of_request() if self.store is None else self.store.answers([body, prompts[p].ids], of_request)

        self.client.lost = 0
        with ThreadPoolExecutor(1 if self.kind.one_at_a_time else self.workers) as pool:
            try:
                parts = list(progress(pool.map(one, asked), f"{what} at {self.client.name}", len(asked)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        flat = [answer for part in parts for answer in part]
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the server reads as the prompt's tokens, BOS put before it where the tokenizer has that habit."""
        texts, otherwise = [], []
        for prompt in prompts:
            bos = self.tokenizer.bos_token_id
            tried = [prompt.ids, prompt.ids[1:]] if prompt.ids[:1] == [bos] else [prompt.ids]
            written = [self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in tried]
            right = [text for text in written if self.tokenizer(text, verbose=False)["input_ids"] == prompt.ids]
            texts.append((right or written[-1:])[0])
            otherwise += [] if right else [prompt.row]
        if otherwise and not self.warned:
            self.warned = True
            logger.warning(
                "%d of %d prompts have no text that the server's tokenizer reads as the trainer's tokens (%s): its "
                "answers are to another prompt by some tokens", len(otherwise), len(prompts), ", ".join(otherwise[:5]),
            )  # fmt: skip
        return texts

    def _ask(self, body: dict, count: int, row: str) -> list[dict]:
        def read(reply: Any) -> list[dict]:
            choices = sorted(reply["choices"], key=lambda choice: choice.get("index") or 0)
            assert len(choices) == count
            assert all(isinstance(choice["text"], str) for choice in choices)
            return choices

        try:
            found = self.client.post("completions", body, read)
        except Refused as error:
            found = NoScore("refused", str(error))
        if isinstance(found, NoScore):
            raise UserError(
                f"{self.client.name} gave no answer to {row} ({found}): nothing stands in for a sample. Mend the "
                "server; in a run, --resume goes on from the last checkpoint with the samples that are there"
            )
        return found

    def _answer(self, prompt: list[int], choice: dict) -> Answer:
        stopped = choice.get("finish_reason") == "stop"
        text, ids, logps = choice["text"], choice.get("token_ids"), None
        if ids:
            said = (choice.get("logprobs") or {}).get("token_logprobs") or []
            logps = [float("nan") if x is None else float(x) for x in said] if len(said) == len(ids) else None
            if stopped and ids[-1] not in self.stops:
                ids = [*ids, self.tokenizer.eos_token_id]
                logps = None if logps is None else [*logps, float("nan")]
            bare = ids[:-1] if stopped else ids
            return Answer(list(ids), continuation(self.tokenizer, prompt, bare), stopped, True, logps)
        before = self.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        (ids,) = self.encoder.encode_after([before], [text])
        came_back = continuation(self.tokenizer, prompt, ids) == text
        if stopped or not ids:  # an answer has a token
            ids = [*ids, self.tokenizer.eos_token_id]
        return Answer(list(ids), text, stopped, came_back and (stopped or bool(text)))


def client_of(config: Config, url: str | None = None) -> Client:
    """To the server of these settings; `url`: another address of it."""
    given = checked_url(config.server_base_url, "server_base_url", "server_api_key_env")
    name = f"{config.server_type} server at {urlsplit(given).netloc}"
    secret = os.environ.get(config.server_api_key_env)
    return Client(url or given, name, secret, "server_api_key_env", config.server_timeout, most_bytes=MOST_BYTES)


def served_by(config: Config, tokenizer: Any, shape: Shape, stops: list[int], model: Callable[[], str] | None = None,
              ranks: Ranks = ALONE) -> Served:  # fmt: skip
    """The source of these settings. Without `model`, the server has the weights of model_name_or_path."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS: give --eos_token, with which an answer is to end")
    name = config.server_model or config.model_name_or_path
    if config.server_type == "transformers" and Path(name).is_dir():  # its folder is another
        name = str(Path(name).absolute())
    source = Served(
        client_of(config), KINDS[config.server_type], tokenizer, shape, stops, model or (lambda: name),
        config.server_workers, ranks,
    )  # fmt: skip
    say(f"answers are sampled by the {source.client.name}")
    return source


def source_of(config: Config, tokenizer: Any, device: torch.device) -> AnswerSource:
    """Answers of model_name_or_path, by the server that has it or loaded here, for `label` and `revise`: kept in
    score_cache."""
    if config.server_type is not None:
        return replace(sampling_server(config, tokenizer), store=kept_of_server(config))
    lm = load_model(config.model_name_or_path, config, device)
    store = kept_of_model(config, lm, tokenizer)
    size, continuous = config.per_device_eval_batch_size, config.use_transformers_continuous_batching
    return OwnModel(lm, tokenizer, shape_of(config), size, continuous=continuous, store=store)


def sampling_server(config: Config, tokenizer: Any) -> Served:
    """The server that has model_name_or_path, whose folder says which tokens end an answer."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(config.model_name_or_path).eos_token_id
    except (OSError, ValueError):
        own = None
    return served_by(config, tokenizer, shape_of(config), ending_tokens(own, tokenizer))


# ---- what is said of a round ---------------------------------------------------------------------


def logps_of_sampler(samples: Sequence[Sequence[Answer]]) -> Tensor | None:  # (N,)
    """As the server gave them; None if it gave none."""
    flat = [answer for own in samples for answer in own]
    if all(answer.logps is None for answer in flat):
        return None
    return torch.tensor([x for a in flat for x in (a.logps or [math.nan] * len(a.ids))])


def served_summary(made: Round, ranks: Ranks) -> dict[str, Tensor]:
    """{name: (2,) [sum, count]} over all ranks: text that did not come back, and how far the server's probabilities are
    from the trainer's (TRL's name). Its temperature must be in them: vLLM's --logprobs-mode processed_logprobs."""
    flags = [kept for own in made.round_trip for kept in own]
    sums = torch.tensor([float(flags.count(False)), float(len(flags)), 0.0, 0.0], dtype=torch.float64)
    most = torch.zeros((), dtype=torch.float64)
    if made.sampler_logps is not None and made.old_logps is not None:
        apart = (made.old_logps.double() - made.sampler_logps.double()).abs()
        apart = apart[~apart.isnan()]
        sums[2:] = torch.tensor([apart.sum().item(), float(len(apart))])
        most = apart.max() if len(apart) else most
    sums, most = ranks.sum_(sums), ranks.gather(most).max()
    found = {"completions/not_round_trip": sums[:2]}
    if sums[3] > 0:
        name = "sampling/sampling_logp_difference"
        found |= {f"{name}/mean": sums[2:], f"{name}/max": torch.stack([most, torch.ones_like(most)])}
    return found
