"""Settings of the models: which ones, and where and in which precision they compute."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import LOADING, TRAINING, Topic, require, setting


@dataclass(frozen=True)
class ModelSettings(Topic):
    title: ClassVar[str] = "Model"

    model_name_or_path: str = setting(
        "",
        "Model to start from: a folder with safetensors weights, or a hub name. `merge`: a folder with adapters.",
        commands=LOADING,
    )
    gguf_file: str | None = setting(
        None,
        "A file in GGUF form in the folder of model_name_or_path (or of the reference) to read weights and tokenizer "
        "from. What is saved is safetensors. Needs `pip install gguf`.",
        commands=("sft", "train", "eval", "generate"),
    )
    ref_model_name_or_path: str | None = setting(
        None,
        "Reference model. `train`: the initial model if not given. `eval`, `generate`: the model to compare with.",
        commands=("train", "eval", "generate", "online"),
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Dtype of the weights and of the optimizer's states. Float32 unless memory forbids it: at learning rates near "
        "5e-7 most bfloat16 weights do not move at all. `merge`: dtype of the files.",
        commands=LOADING,
    )
    bf16: bool | None = setting(
        None, "Compute in bfloat16 by autocast. None: where the GPU supports it; never by default on CPU."
    )
    device: str = setting(
        "auto",
        "Device to run on: auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, ...",
        may_differ=True,
    )
    impl: Literal["auto", "triton", "torch", "reference"] = setting(
        "auto",
        "Which implementation of the fused head runs (see prefuse.linear_logprobs).",
        commands=(*TRAINING, "eval"),
    )
    trust_remote_code: bool = setting(
        False,
        "Run the Python code that a model's folder or hub repository brings with it. Read that code first: it can do "
        "whatever you can.",
        commands=LOADING,
        may_differ=True,
    )

    def check(self, command: str) -> None:
        answered = command == "label" or (command == "eval" and (self.model_answers or self.checkpoints))
        if not answered:
            require(self, "model_name_or_path")
