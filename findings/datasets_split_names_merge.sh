#!/bin/bash
# datasets 5.2.0: the same files are six splits in a folder, and two when the folder of the files itself is named.
#
# A common preference dataset (UltraFeedback, binarized) keeps data/train_prefs-00000-of-00001.parquet, train_sft-...,
# train_gen-... and three test_ files. load_dataset(folder) takes the names before the shard's number as splits: six. The
# pattern for that wants the parent to be called "data" and the shard's number to be there; where it does not match, as in
# load_dataset(folder/data), or after the files were copied next to each other elsewhere, or renamed train_prefs.parquet,
# the next pattern looks for the word "train" between delimiters, and "_" is one. Then rows kept for preferences, for
# supervised training and for generation are one split "train", and "test" has the held-out rows of all: a preference run
# trains on rows of another purpose, on some of them several times, and nothing says so.
#
# Expected: six splits by their names in each case, or a warning that three names were read as one.
# Seen with datasets 5.2.0:
#   folder: {'test_gen': 3, 'test_prefs': 1, 'test_sft': 2, 'train_gen': 5, 'train_prefs': 4, 'train_sft': 3}
#   folder/data: {'train': 12, 'test': 6}
#   renamed in data: {'train': 12, 'test': 6}
#   said meanwhile: nothing
#
# Exit 1 if that changes. Needs python 3.11 and network access to a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home"
"$work/venv/bin/python" - <<'PY'
import io
import logging
import sys
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = {"train_prefs": 4, "train_sft": 3, "train_gen": 5, "test_prefs": 1, "test_sft": 2, "test_gen": 3}
for folder, shard in (("sharded", "-00000-of-00001"), ("renamed", "")):
    Path(folder, "data").mkdir(parents=True)
    for split, rows in SPLITS.items():
        names = [f"{split} {i}" for i in range(rows)]
        table = pa.table({"prompt": names, "chosen": names, "rejected": names})
        pq.write_table(table, f"{folder}/data/{split}{shard}.parquet")

said = io.StringIO()
logging.getLogger("datasets").addHandler(logging.StreamHandler(said))
datasets.disable_progress_bars()
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    found = {
        name: {split: len(rows) for split, rows in datasets.load_dataset(path).items()}
        for name, path in {"folder": "sharded", "folder/data": "sharded/data", "renamed in data": "renamed"}.items()
    }
spoken = said.getvalue() + "".join(str(warning.message) for warning in warned if "split" in str(warning.message))
print("datasets", datasets.__version__)
for name, splits in found.items():
    print(f"{name}: {splits}")
print("said meanwhile:", spoken or "nothing")
two = {"train": 12, "test": 6}
sys.exit(found != {"folder": SPLITS, "folder/data": two, "renamed in data": two} or bool(spoken))
PY
