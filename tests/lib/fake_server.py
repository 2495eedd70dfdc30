"""A stand-in on loopback for servers that sample: vLLM, SGLang, and any that knows OpenAI's completions alone.

It draws words from each request's seed, so that the same request has the same answer, and keeps what it was asked.
"""

import http.server
import json
import random
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

WORDS = ("it is", "blue", "green and", "no", "hello", "a very old", "the the", "good")


@dataclass
class FakeServer:
    tokenizer: object
    says_tokens: bool = True  # as vLLM does
    refuse: dict = field(default_factory=dict)  # {path: (status, body)}
    odd: bool = False  # the text of its answers does not come back from their tokens
    once: bool = False  # a seed that comes again is an error: that answer should have been kept
    asked: list = field(default_factory=list)  # (path, body)
    url: str = ""

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def completions(self) -> list[dict]:
        return [body for path, body in self.asked if path == "/v1/completions"]

    def reply(self, path: str, body: dict) -> tuple[int, dict | str]:
        if path in self.refuse:
            return self.refuse[path]
        if path == "/update_weights_from_disk":
            return 200, {"success": True, "message": "updated"}
        if path != "/v1/completions":
            return 200, "Success"  # no JSON, as vLLM's LoRA endpoints have it
        if self.once and [b["seed"] for b in self.completions()].count(body["seed"]) > 1:
            return 400, {"error": "this seed was asked for before"}
        rng = random.Random(body["seed"])
        return 200, {"choices": [self.choice(rng, k, body["max_tokens"]) for k in range(body.get("n", 1))][::-1]}

    def choice(self, rng: random.Random, index: int, most: int) -> dict:
        text = " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 2)))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = len(ids) < most
        ids = [*ids, self.tokenizer.eos_token_id] if ends else ids[:most]
        said = self.tokenizer.decode(ids, skip_special_tokens=True) + (self.tokenizer.eos_token if self.odd else "")
        choice = {"index": index, "text": said, "finish_reason": "stop" if ends else "length"}
        if self.says_tokens:
            choice |= {"token_ids": ids, "logprobs": {"token_logprobs": [-5.0] * len(ids)}}
        return choice


@contextmanager
def serving(tokenizer, **options):
    fake = FakeServer(tokenizer, **options)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.say(200, {"data": []})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.asked.append((self.path, body))
            self.say(*fake.reply(self.path, body))

        def say(self, status, content):
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
