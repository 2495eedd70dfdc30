"""Settings of where answers are sampled: in this process, or by a server."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.generation import ANSWERING
from prefuse.engine.config.setting import Topic, above, at_least, setting
from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class SamplingSettings(Topic):
    title: ClassVar[str] = "Where answers are sampled (docs/online.md)"
    commands: ClassVar[tuple[str, ...]] = ANSWERING

    server_base_url: str | None = setting(
        None,
        "OpenAI-compatible server that samples in place of this process: its URL up to /v1. `online` hands each "
        "round's weights to it. With the other commands it answers for model_name_or_path.",
        may_differ=True,
    )
    server_type: Literal["transformers", "vllm", "sglang", "openai"] | None = setting(
        None,
        "What that server is, which decides how it is asked and how it gets new weights. openai: any other; it keeps "
        "the weights that it has, and `staleness` says how old they are.",
    )
    server_model: str | None = setting(
        None, "The model's name there. None: model_name_or_path, or the folder of a round's weights.", may_differ=True
    )
    server_api_key_env: str = setting(
        "PREFUSE_SERVER_API_KEY",
        "Environment variable with the key of that server. The key is never written anywhere.",
        may_differ=True,
    )
    server_timeout: float = setting(
        600.0, "Seconds that it may take for one request, or to come up.", rule=above(0), may_differ=True
    )
    server_workers: int = setting(8, "Requests to it at once.", rule=at_least(1), most=256, may_differ=True)
    use_transformers_continuous_batching: bool = setting(
        False,
        "In this process, let a new prompt take the place of an answer that has ended (transformers' generate_batch): "
        "sooner where answers differ in length. per_device_eval_batch_size answers run at once.",
    )

    def check(self, command: str) -> None:
        if (self.server_base_url is None) != (self.server_type is None):
            raise UserError(
                "server_base_url and server_type go together: give both, such as --server_base_url "
                "http://localhost:8000/v1 --server_type vllm"
            )
        if self.server_type is None:
            return
        if self.use_transformers_continuous_batching:
            raise UserError(
                "use_transformers_continuous_batching is for sampling in this process: drop server_base_url"
            )
        if self.server_type == "openai" and self.min_p is not None:
            raise UserError("OpenAI's API has no min_p: drop it, or say what the server is (server_type)")
        if self.server_type in ("transformers", "sglang") and command == "online" and self.use_peft:
            raise UserError(
                f"a {self.server_type} server takes whole weights: drop use_peft, or serve adapters with vllm"
            )
