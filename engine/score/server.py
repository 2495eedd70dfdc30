"""A judge behind an OpenAI-compatible server: POST URL/chat/completions, by the standard library alone.

The key comes from the environment variable that `judge_api_key_env` names, goes into one header, is never written, and
is struck out of every message. Redirects are refused: they would carry it elsewhere. What fails for a while (no
connection, a time-out, status 429 or 5xx) is tried again, later each time; a server that stays away is not asked about
the rest, and the next run, whose cache has all that was said, asks for that alone.
"""

import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import progress, say
from prefuse.engine.score.cache import Cache, json_digest
from prefuse.engine.score.contract import NoScore
from prefuse.engine.score.judge import Reply
from prefuse.engine.score.rubric import LETTERS

MOST_BYTES = 8 << 20  # of a reply
MOST_PAUSE = 60.0  # seconds before one more try
MOST_LOST = 3  # questions in a row that a server did not answer in all tries: it is gone
TOP_LOGPROBS = 20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


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
        self.requests = self.failures = 0
        self._lost = 0  # questions in a row
        self._logprobs = True
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def name(self) -> str:
        return f"{self.model} at {urlsplit(self.url).netloc.rpartition('@')[2]}"

    @property
    def key(self) -> str:
        return json_digest("server", self.url, self.model, self.max_tokens)

    def ask(self, questions: Sequence[list[dict]], keep: Sequence[str], cache: Cache) -> dict[str, Reply | NoScore]:
        self._lost = 0
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
        fault = NoScore("server", "not asked")
        for attempt in range(self.retries + 1):
            if self._lost >= MOST_LOST:
                return NoScore("not asked", f"the server did not answer {MOST_LOST} questions in a row")
            outcome, pause = self._try(messages)
            if pause is None:
                self._lost = 0
                return outcome
            fault = outcome
            if attempt < self.retries:
                time.sleep(min(MOST_PAUSE, max(pause, self.first_pause * 2**attempt)))
        self._lost += 1
        return fault

    def _try(self, messages: list[dict]) -> tuple[Reply | NoScore, float | None]:
        """(outcome, None), or (fault, seconds that the server asks to wait) where another try may help."""
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        wanted = self._logprobs
        if wanted:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with self._lock:
            self.requests += 1
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content = response.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            return self._refused(error, messages, wanted)
        except (OSError, http.client.HTTPException) as error:  # no connection, a time-out, cut off half-way
            return self._failed("server", str(getattr(error, "reason", None) or error or type(error).__name__)), 0.0
        return self._read(content)

    def _refused(self, error: urllib.error.HTTPError, messages: list[dict], wanted: bool) -> tuple:
        said = error.read(2000).decode("utf-8", "replace")
        if error.code in (401, 403):
            raise UserError(self._without_secret(
                f"{self.name} refuses the key (status {error.code}): put it into the environment variable that "
                "judge_api_key_env names"
            ))  # fmt: skip
        if error.code in (301, 302, 303, 307, 308, 404, 405):
            raise UserError(self._without_secret(
                f"{self.url}/chat/completions: status {error.code} ({said[:120]!r}); expected the URL of an "
                "OpenAI-compatible server up to /v1, and a model that it serves"
            ))  # fmt: skip
        if error.code in (400, 422) and wanted:
            with self._lock:
                if self._logprobs:
                    say(f"{self.name} gives no probabilities (status {error.code}): its words alone count")
                self._logprobs = False
            return self._try(messages)
        if error.code == 429 or error.code >= 500:
            pause = error.headers.get("Retry-After") or ""
            return self._failed("server", f"status {error.code}"), float(pause) if pause.isdigit() else 0.0
        return self._failed("refused", f"status {error.code}: {said[:120]}"), None

    def _failed(self, kind: str, detail: str) -> NoScore:
        with self._lock:
            self.failures += 1
        return NoScore(kind, self._without_secret(detail)[:200])

    def _without_secret(self, text: str) -> str:
        return text.replace(self.secret, "***") if self.secret else text

    def _read(self, content: bytes) -> tuple[Reply | NoScore, float | None]:
        if len(content) > MOST_BYTES:
            return self._failed("refused", f"a reply of more than {MOST_BYTES} bytes"), None
        try:
            body = json.loads(content)
            choice = body["choices"][0]
            text = choice["message"].get("content") or ""
            usage = body.get("usage") or {}
            tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
            letters = letter_shares(choice.get("logprobs"))
            assert isinstance(text, str)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RecursionError):
            return self._failed("no reply", f"not as OpenAI's API has it: {content[:80]!r}"), 0.0
        with self._lock:
            self.tokens = [total + own for total, own in zip(self.tokens, tokens, strict=True)]
        return Reply(self._without_secret(text), letters, tokens), None


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
    if urlsplit(url).username or urlsplit(url).password:
        raise UserError("a judge's URL holds no user or password: put the key into the variable of judge_api_key_env")
    most = 16 if config.judge_mode == "letter" else config.judge_max_tokens
    return Server(
        url.rstrip("/"), model, os.environ.get(config.judge_api_key_env), config.judge_timeout, config.judge_retries,
        config.judge_workers, most, _prices(config.judge_price),
    )  # fmt: skip


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
        if not (0 <= read < math.inf and 0 <= written < math.inf):
            raise ValueError
    except ValueError:
        raise UserError(f"judge_price must be two numbers, USD a million tokens read and written, got {text}") from None
    return read, written
