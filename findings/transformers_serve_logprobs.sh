#!/bin/bash
# transformers 5.23.0: `transformers serve` answers a request for log-probabilities with status 200 and none.
#
# POST /v1/chat/completions with {"logprobs": true, "top_logprobs": 5}, and POST /v1/completions with {"logprobs": 1,
# "n": 2}: OpenAI's API has choices[].logprobs (and two choices) in the reply. The server reads the fields, warns once in
# its own log ("Ignoring unsupported fields in the request"), and replies 200 with one choice without logprobs: a client
# that computes with them, such as a judge or an evaluation harness, cannot tell this from a model that is sure. Fields
# that it does not know at all are refused with 422.
#
# Expected: status 400 or 422, or the log-probabilities. Seen with transformers 5.23.0, torch 2.13.0, on a CPU:
#   chat: status 200, choices 1, logprobs None
#   completions: status 200, choices 1 of 2, logprobs None
#   unknown field: status 422
#
# Exit 1 if that changes. Needs python 3.11 and network access to a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "transformers[serving]==5.23.0" torch==2.13.0
cd "$work"
export HF_HUB_OFFLINE=1 HF_HUB_CACHE="$work/cache"
mkdir -p "$work/cache"
"$work/venv/bin/python" - <<'PY'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<end>", "<unk>", "a", "b", "c", "d"])}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
torch.manual_seed(0)
config = LlamaConfig(vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, bos_token_id=None, eos_token_id=0, pad_token_id=0)
LlamaForCausalLM(config).save_pretrained("model")
tokenizer.save_pretrained("model")
PY
port=18437
"$work/venv/bin/transformers" serve --host 127.0.0.1 --port $port --device cpu > serve.log 2>&1 &
server=$!
"$work/venv/bin/python" - "$port" <<'PY'
import json, sys, time, urllib.error, urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}"
for _ in range(240):
    try:
        urllib.request.urlopen(url + "/health", timeout=2)
        break
    except OSError:
        time.sleep(0.5)

def post(path, **body):
    body = json.dumps({"model": "model", "max_tokens": 3, **body}).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)["choices"]
    except urllib.error.HTTPError as error:
        return error.code, []

status, choices = post("/v1/chat/completions", messages=[{"role": "user", "content": "a b"}], logprobs=True, top_logprobs=5)
first = (status, len(choices), choices and choices[0].get("logprobs"))
print(f"chat: status {first[0]}, choices {first[1]}, logprobs {first[2]}")
status, choices = post("/v1/completions", prompt="a b", logprobs=1, n=2)
second = (status, len(choices), choices and choices[0].get("logprobs"))
print(f"completions: status {second[0]}, choices {second[1]} of 2, logprobs {second[2]}")
third, _ = post("/v1/completions", prompt="a b", no_such_field=1)
print(f"unknown field: status {third}")
sys.exit(0 if (first, second, third) == ((200, 1, None), (200, 1, None), 422) else 1)
PY
