"""A judge behind an OpenAI-compatible server: POST URL/chat/completions (client.py).

The key comes from the environment variable that `judge_api_key_env` names. Every reply goes into the cache as it comes,
so that after a failure the next run asks for the rest alone.
"""

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prefuse.engine.config.scoring import prices_of
from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import progress, say
from prefuse.engine.score.cache import Cache, json_digest
from prefuse.engine.score.client import Client, Refused, checked_url
from prefuse.engine.score.contract import NoScore
from prefuse.engine.score.judge import Reply
from prefuse.engine.score.rubric import LETTERS

TOP_LOGPROBS = 20


@dataclass
class Server:
    url: str
    model: str
    secret: str | None = field(repr=False)
    timeout: float = 60.0
    retries: int = 4
    workers: int = 4
    max_tokens: int = 16
    prices: tuple[float, float] | None = None  # USD a million tokens, read and written
    first_pause: float = 1.0

    def __post_init__(self) -> None:
        self.tokens = [0, 0]  # read, written, in this run
        self._logprobs = True
        self._lock = threading.Lock()
        rest = (self.timeout, self.retries, self.first_pause)
        self._client = Client(self.url, self.name, self.secret, "judge_api_key_env", *rest)

    @property
    def name(self) -> str:
        return f"{self.model} at {urlsplit(self.url).netloc.rpartition('@')[2]}"

    @property
    def key(self) -> str:
        return json_digest("server", self.url, self.model, self.max_tokens)

    @property
    def requests(self) -> int:
        return self._client.requests

    @property
    def failures(self) -> int:
        return self._client.failures

    def ask(self, questions: Sequence[list[dict]], keep: Sequence[str], cache: Cache) -> dict[str, Reply | NoScore]:
        self._client.lost = 0
        replies: dict[str, Reply | NoScore] = {}

        def one(number: int) -> None:
            reply = self._reply(questions[number])
            if isinstance(reply, Reply):
                cache.put(keep[number], asdict(reply))
            replies[keep[number]] = reply

        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for _ in progress(pool.map(one, range(len(questions))), f"asking {self.name}", len(questions)):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        say(self.spent())
        return replies

    def spent(self) -> str:
        read, written = self.tokens
        line = f"{self.name}: {self.requests} requests, {self.failures} failed, {read} tokens read, {written} written"
        cost = self.cost()
        return line if cost is None else f"{line}, {cost:.4f} USD"

    def cost(self) -> float | None:
        if self.prices is None:
            return None
        return sum(count * price / 1e6 for count, price in zip(self.tokens, self.prices, strict=True))

    def _reply(self, messages: list[dict]) -> Reply | NoScore:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        wanted = self._logprobs
        if wanted:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            return self._client.post("chat/completions", body, self._read)
        except Refused as error:
            if error.code not in (400, 422) or not wanted:
                return self._client.failed("refused", str(error))
            with self._lock:
                if self._logprobs:
                    say(f"{self.name} gives no probabilities (status {error.code}): its words alone count")
                self._logprobs = False
        return self._reply(messages)

    def _read(self, body: Any) -> Reply:
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        usage = body.get("usage") or {}
        tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        letters = letter_shares(choice.get("logprobs"))
        assert isinstance(text, str)
        with self._lock:
            self.tokens = [total + own for total, own in zip(self.tokens, tokens, strict=True)]
        return Reply(self._client.without_secret(text), letters, tokens)


def letter_shares(logprobs: Any) -> dict[str, float] | None:
    """{"A": p, "B": p} at the first token that says a letter; None where the server gives none."""
    for place in (logprobs or {}).get("content") or []:
        if place["token"].strip() not in LETTERS:
            continue
        top = place.get("top_logprobs") or [place]
        shares = dict.fromkeys(LETTERS, 0.0)
        for one in top:
            if one["token"].strip() in LETTERS:
                shares[one["token"].strip()] += math.exp(min(0.0, float(one["logprob"])))
        return shares
    return None


def server_of(argument: str, config: Config) -> Server:
    url, _, model = argument.partition("#")
    if not model or not urlsplit(url).netloc:
        raise UserError(f"judge={argument}: expected URL#MODEL, as in judge=http://localhost:8000/v1#name")
    url = checked_url(url, "a judge's URL", "judge_api_key_env")
    most = 16 if config.judge_mode == "letter" else config.judge_max_tokens
    return Server(
        url, model, os.environ.get(config.judge_api_key_env), config.judge_timeout, config.judge_retries,
        config.judge_workers, most, prices_of(config.judge_price),
    )  # fmt: skip
