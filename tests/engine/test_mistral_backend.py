"""mistral-common's own tokenizer in transformers, for real: a folder that has only its tekken.json ends in one line."""

import json
import shutil
from pathlib import Path

import pytest

from prefuse.engine.errors import UserError
from prefuse.engine.model.load import load_tokenizer


@pytest.mark.slow
def test_a_folder_with_mistral_commons_tokenizer_alone_is_refused_in_one_line(tmp_path):
    mistral_common = pytest.importorskip("mistral_common")
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copy(next(data.glob("tekken_*.json")), tmp_path / "tekken.json")
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 131072}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    said = str(caught.value)
    assert "\n" not in said
    assert "mistral-common's, which writes no prompt without its answer. Fix: save it as" in said
