"""Online training: prompts -> samples -> scores -> batches -> the step of `prefuse train`, round by round.

    prefuse online --algorithm grpo --model_name_or_path sft --dataset_name prompts.jsonl \\
        --scorer rewards.py:my_rule --output_dir grpo

A round samples num_generations answers to each of its prompts, scores them, and is learned from in steps_per_generation
x num_iterations optimizer steps: the same steps, checkpoints, guards and ranks as those of `prefuse train`. Each rank
samples and learns its own prompts. Log-probabilities of samples are computed by the head that trains, so the first
ratio is 1. Samples and scores stand in the run folder before the first update; a resumed run goes on with them.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor

import prefuse
from prefuse.engine.config.online import OVER_TOKENS
from prefuse.engine.config.settings import Config
from prefuse.engine.config.yaml_file import write_yaml
from prefuse.engine.data.batches import Batch, Examples, collate, examples_of
from prefuse.engine.data.dataset import columns_of_rows, text_options
from prefuse.engine.data.encode import continuation
from prefuse.engine.data.examples import Prompt, load_prompts
from prefuse.engine.data.fit import character_parts
from prefuse.engine.data.order import generator, hold_out
from prefuse.engine.data.table import Demonstration
from prefuse.engine.errors import UserError
