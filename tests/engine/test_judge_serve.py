"""A judge behind `transformers serve`, a real server on loopback: the same verdicts as by its words in this process."""

import pytest
import torch

from prefuse.engine.score.scorers import scorer_of
from serving import NEEDS, serving_transformers
from tiny_run import save_model, settings


@pytest.mark.slow
@pytest.mark.skipif(NEEDS is not None, reason=str(NEEDS))
def test_a_judge_behind_transformers_serve(tmp_path):
    model = save_model(tmp_path / "judge")
    names = {"model_name_or_path": "-", "dataset_name": "-", "eval_fraction": 1.0, "loss_type": "sft"}
    how = {"judge_workers": 1, "judge_mode": "reason", "judge_max_tokens": 6}
    config = settings("eval", **names, **how, score_cache=str(tmp_path / "cache"))
    sides = (["the sky?", "grass?"], ["it is blue", "green"], ["no", "hello there"])
    with serving_transformers(tmp_path / "serve.log") as url:
        served = scorer_of([f"judge={url}#{model}"], config, torch.device("cpu"))
        found = served.compare(*sides)
        assert served.backend.failures == 0, served.backend.spent()
        assert served.backend.tokens[0] > 100
        assert not {"server", "not asked", "no reply", "refused"} & set(found.outcomes)
        local = scorer_of([f"judge={model}"], config, torch.device("cpu")).compare(*sides)
        assert found.outcomes == local.outcomes
        assert [str(reason) for reason in found.reasons] == [str(reason) for reason in local.reasons]
        requests = served.backend.requests
        served.compare(*sides)
        assert served.backend.requests == requests  # the cache has them
