"""JSON to an OpenAI-compatible server and back, by the standard library alone.

A key goes into one header, is never written, and is struck out of every message. Redirects are refused: they would
carry it elsewhere. What fails for a while (no connection, a time-out, status 429 or 5xx, a reply that cannot be read)
is tried again, later each time; a server that stays away is not asked about the rest.
"""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prefuse.engine.errors import UserError
from prefuse.engine.score.contract import NoScore

T = TypeVar("T")
MOST_BYTES = 8 << 20  # of a reply
MOST_PAUSE = 60.0  # seconds before one more try
MOST_LOST = 3  # questions in a row that a server did not answer in all tries: it is gone
UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RecursionError)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Refused(Exception):
    """A status with which the server says that the request itself is wrong."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"status {code}: {said[:120]}")
        self.code = code


@dataclass
class Client:
    url: str  # up to /v1
    name: str  # for people
    secret: str | None = field(repr=False)
    key_setting: str  # that names the environment variable with the key
    timeout: float = 60.0
    retries: int = 4
    first_pause: float = 1.0
    most_bytes: int = MOST_BYTES

    def __post_init__(self) -> None:
        self.requests = self.failures = 0
        self.lost = 0  # questions in a row
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, path: str, body: dict, read: Callable[[Any], T]) -> T | NoScore:
        """`read` of the JSON that answers `body` at URL/path, or why there is none. Raises Refused, and UserError for a
        key or an address that the server does not know."""
        return self._post(path, body, lambda content: read(json.loads(content)))

    def tell(self, path: str, body: dict) -> NoScore | None:
        """`post`, where it is of no matter what the server answers."""
        return self._post(path, body, lambda content: None)

    def _post(self, path: str, body: dict, read: Callable[[bytes], T]) -> T | NoScore:
        fault = NoScore("server", "not asked")
        for attempt in range(self.retries + 1):
            if self.lost >= MOST_LOST:
                return NoScore("not asked", f"the server did not answer {MOST_LOST} questions in a row")
            outcome, pause = self._try(path, body, read)
            if pause is None:
                self.lost = 0
                return outcome
            fault = outcome
            if attempt < self.retries:
                time.sleep(min(MOST_PAUSE, max(pause, self.first_pause * 2**attempt)))
        self.lost += 1
        return fault

    def _try(self, path: str, body: dict, read: Callable[[bytes], T]) -> tuple[T | NoScore, float | None]:
        """(outcome, None), or (fault, seconds that the server asks to wait) where another try may help."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers)
        with self._lock:
            self.requests += 1
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content = response.read(self.most_bytes + 1)
        except urllib.error.HTTPError as error:
            return self._refused(error, path)
        except (OSError, http.client.HTTPException) as error:  # no connection, a time-out, cut off half-way
            return self.failed("server", str(getattr(error, "reason", None) or error or type(error).__name__)), 0.0
        if len(content) > self.most_bytes:
            return self.failed("refused", f"a reply of more than {self.most_bytes} bytes"), None
        try:
            return read(content), None
        except UNREADABLE:
            return self.failed("no reply", f"not as OpenAI's API has it: {content[:80]!r}"), 0.0

    def _refused(self, error: urllib.error.HTTPError, path: str) -> tuple[NoScore, float]:
        said = error.read(2000).decode("utf-8", "replace")
        if error.code in (401, 403):
            raise UserError(self.without_secret(
                f"{self.name} refuses the key (status {error.code}): put it into the environment variable that "
                f"{self.key_setting} names"
            ))  # fmt: skip
        if error.code in (301, 302, 303, 307, 308, 404, 405):
            raise UserError(self.without_secret(
                f"{self.url}/{path}: status {error.code} ({said[:120]!r}); expected the URL of an OpenAI-compatible "
                "server up to /v1, and a model that it serves"
            ))  # fmt: skip
        if error.code == 429 or error.code >= 500:
            pause = error.headers.get("Retry-After") or ""
            return self.failed("server", f"status {error.code}"), float(pause) if pause.isdigit() else 0.0
        raise Refused(error.code, self.without_secret(said))

    def failed(self, kind: str, detail: str) -> NoScore:
        with self._lock:
            self.failures += 1
        return NoScore(kind, self.without_secret(detail)[:200])

    def without_secret(self, text: str) -> str:
        return text.replace(self.secret, "***") if self.secret else text


def checked_url(url: str, what: str, key_setting: str) -> str:
    """The address of a server, without a slash at its end."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{what} {url}: expected the URL of a server, as in http://localhost:8000/v1")
    if parts.username or parts.password:
        raise UserError(f"{what} holds no user or password: put the key into the variable of {key_setting}")
    return url.rstrip("/")
