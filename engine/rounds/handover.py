"""A round's weights, from the trainer to the server that samples: through a folder that both see.

transformers    output_dir/served/weights-...; the next requests ask for the model of that name
vllm            with use_peft: POST load_lora_adapter. Else output_dir/served/weights, always the same: sleep, wake
                up the weights, reload_weights, wake up the cache (vLLM's sleep mode; it serves that folder)
sglang          POST update_weights_from_disk
openai          nothing: the server keeps its weights, and `staleness` grows
"""

from __future__ import annotations

import secrets
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import save_model, trained_weights
from prefuse.engine.model.sampling import Shape, ending_tokens
from prefuse.engine.report.log import say
from prefuse.engine.rounds.sampler import AnswerSource, OwnModel
from prefuse.engine.rounds.served import client_of, served_by
from prefuse.engine.run.checkpoint import model_bytes
from prefuse.engine.run.files import published_folder, require_space
from prefuse.engine.run.ranks import Ranks
from prefuse.engine.score.client import Client, Refused
from prefuse.engine.score.contract import NoScore

FOLDER = "served"


@dataclass
class Handover:
    """`current()` is the name of the model that has the policy's weights, which the server then has."""

    config: Config
    lm: LanguageModel
    tokenizer: Any
    folder: Path  # of the run
    ranks: Ranks
    step: int = 0  # optimizer steps that the policy has made
    served_step: int = 0  # of the weights that the server has
    name: str | None = None
    fresh: bool = False  # the server has the policy's weights as they are
    written: Path | None = None
    waited: bool = False
    api: Client = field(init=False)
    root: Client = field(init=False)

    def __post_init__(self) -> None:
        self.api = client_of(self.config)
        parts = urlsplit(self.api.url)
        self.root = client_of(self.config, f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix('/v1')}")

    def begin(self, step: int) -> None:
        """The policy is that of `step`; an evaluation may have handed it over already."""
        self.step = step
        self.served_step = step if self.fresh else self.served_step

    def moved(self) -> None:
        """The policy has made a step."""
        self.step, self.fresh = self.step + 1, False

    def current(self) -> str:
        if self.config.server_type == "openai":
            self.ranks.from_main(self._wait)
            return self.config.server_model or self.config.model_name_or_path
        if not self.fresh:
            weights = trained_weights(self.lm, self.ranks)
            self.name = self.ranks.from_main(lambda: self._hand_over(weights))
            self.served_step, self.fresh = self.step, True
        return self.name

    def _hand_over(self, weights: dict[str, Tensor]) -> str:
        """Returns the name to ask for."""
        kind, before = self.config.server_type, self.name
        whole_vllm = kind == "vllm" and self.lm.adapters is None
        # Never a name that it had before: a server may keep what it has once read.
        name = "weights" if whole_vllm else f"weights-{self.step:06}-{secrets.token_hex(4)}"
        folder = (self.folder / FOLDER / name).absolute()
        folder.parent.mkdir(exist_ok=True)
        for old in folder.parent.glob("weights*"):
            if old not in (folder, self.written):  # the server may still read the last one
                shutil.rmtree(old, ignore_errors=True)
        require_space(folder.parent, model_bytes(self.lm), "the weights for the server")
        with published_folder(folder) as aside:
            save_model(self.lm, self.tokenizer, aside, weights)
        self.written = folder
        self._wait()
        if kind == "transformers":
            return self.config.server_model or str(folder)
        if kind == "sglang":
            self._ask(self.root, "update_weights_from_disk", {"model_path": str(folder)}, _success)
            return self.config.server_model or self.config.model_name_or_path
        if whole_vllm:
            for path in ("sleep?level=2", "wake_up?tags=weights"):
                self._ask(self.root, path, {})
            self._ask(self.root, "collective_rpc", {"method": "reload_weights"})
            self._ask(self.root, "wake_up?tags=kv_cache", {})
            return self.config.server_model or str(folder)
        self._ask(self.api, "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if before is not None:
            self._ask(self.api, "unload_lora_adapter", {"lora_name": before})
        return name

    def _wait(self) -> None:
        """Until the server is there: it may be started once the first weights are."""
        if self.waited:
            return
        until, told = time.monotonic() + self.config.server_timeout, False
        while not _is_up(f"{self.api.url}/models"):
            if not told:
                say(f"  waiting for the {self.api.name}; weights are in {self.folder / FOLDER}")
                told = True
            if time.monotonic() > until:
                raise UserError(
                    f"the {self.api.name} did not come up within server_timeout {self.config.server_timeout:g} s: "
                    f"start it, or give another server_base_url than {self.api.url}"
                )
            time.sleep(0.5)
        self.waited = True

    def _ask(self, client: Client, path: str, body: dict, read: Callable[[Any], Any] | None = None) -> None:
        try:
            found = client.tell(path, body) if read is None else client.post(path, body, read)
        except Refused as error:
            found = NoScore("refused", str(error))
        if isinstance(found, NoScore):
            raise UserError(
                f"the {self.api.name} did not take the weights of step {self.step} ({path}: {found}): see "
                "docs/online.md for how it is to be started"
            )


def source_of_policy(
    config: Config, lm: LanguageModel, tokenizer: Any, ranks: Ranks, folder: Path
) -> tuple[AnswerSource, Handover | None]:
    """Where the policy's samples come from."""
    shape = Shape(config.max_completion_length, config.temperature, config.top_p, config.min_p)
    if config.server_base_url is not None:
        handover = Handover(config, lm, tokenizer, folder, ranks)
        stops = ending_tokens(lm.model.generation_config.eos_token_id, tokenizer)
        return served_by(config, tokenizer, shape, stops, handover.current, ranks), handover
    size, synced = config.per_device_eval_batch_size * config.num_generations, ranks.sharded and ranks.size > 1
    if synced and config.use_transformers_continuous_batching:
        raise UserError(
            "use_transformers_continuous_batching runs on each rank by itself, and fsdp's ranks run together: take "
            "parallel ddp, or drop it"
        )
    return OwnModel(lm, tokenizer, shape, size, synced, config.use_transformers_continuous_batching), None


def _success(reply: Any) -> NoScore | None:
    return None if reply["success"] else NoScore("refused", str(reply.get("message"))[:200])


def _is_up(url: str) -> bool:
    """Whether anything answers there, be it with a status of its own."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (502, 503, 504)  # a proxy, behind which nobody is yet
    except OSError:
        return False
