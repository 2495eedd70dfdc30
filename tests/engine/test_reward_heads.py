"""`prefuse reward --reward_heads k`: an ensemble in one folder that transformers reads; each head has its own rows."""

import math

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefuse import BradleyTerry
from prefuse.engine.cli import main
from prefuse.engine.data.batches import collate
from prefuse.engine.data.examples import load_examples
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import load_tokenizer
from prefuse.engine.model.reward_model import bootstrap_weight, heads_of, load_reward_model
from prefuse.engine.score.classifier import load_classifier
from prefuse.engine.score.scorers import scorer_of
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
CPU = torch.device("cpu")
HEADS = 3
PROMPT, ANSWERS = "what is the sky?", ["it is blue", "no no no"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model_name_or_path": save_model(folder / "model", chat_template=None),
            "dataset_name": write_rows(folder / "pairs.jsonl", PAIRS)}  # fmt: skip


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """{whole, lora}: folders of runs with three heads."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name, more in ("whole", {}), ("lora", {"use_peft": True, "lora_r": 4}):
        made[name] = folder / name
        options = {"reward_heads": HEADS, "eval_fraction": 0.25, "max_steps": 6, **more}
        train(settings("reward", **files, output_dir=str(made[name]), **options), "reward")
    return made


def by_transformers(model, folder):  # (2, k)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for answer in ANSWERS:
        ids = tokenizer(PROMPT)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            rows.append(model.eval()(input_ids=ids).logits[0])
    return torch.stack(rows).double()


def test_the_heads_samples_are_drawn_with_replacement():
    drawn = torch.tensor(
        [[bootstrap_weight(5, head, f"rows.jsonl:{i}") for head in (0, 1)] for i in range(4000)]
    ).double()
    assert drawn.mean(0).tolist() == pytest.approx([1, 1], abs=0.06)
    assert drawn.var(0).tolist() == pytest.approx([1, 1], abs=0.1)
    assert (drawn == 0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.02)
    assert abs(torch.corrcoef(drawn.T)[0, 1]) < 0.05
    assert (
        bootstrap_weight(5, 0, "rows.jsonl:7") != bootstrap_weight(6, 0, "rows.jsonl:7") or drawn.unique().numel() > 3
    )


def test_the_loss_is_the_mean_of_the_heads_own(files):
    config = settings("reward", **files, output_dir="-", reward_heads=HEADS)
    tokenizer = load_tokenizer(files["model_name_or_path"])
    lm = load_reward_model(files["model_name_or_path"], config, CPU, trains=True)
    batch = collate(load_examples(files["dataset_name"], "pair", tokenizer, 64).examples, [0, 3, 5, 7])
    states = lm.states(batch)
    out = lm.loss_of_states(states, batch, BradleyTerry(), None)
    out.loss.backward()
    scores = states.double() @ lm.model.score.weight.double().T  # (8, k)
    weights = torch.tensor([[bootstrap_weight(config.seed, head, row) for head in range(HEADS)] for row in batch.rows])
    margins = scores[0::2] - scores[1::2]
    expected = (weights * torch.nn.functional.softplus(-margins)).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    slopes = -weights / margins.numel() * torch.sigmoid(-margins)  # d loss / d margin, (4, k)
    wanted = slopes.T @ (states[0::2] - states[1::2]).double()
    torch.testing.assert_close(lm.model.score.weight.grad.double(), wanted, rtol=1e-4, atol=1e-7)
    assert out.metrics["margin"].tolist() == pytest.approx([margins.mean(1).sum().item(), 4], rel=1e-4)
    config = settings("reward", **files, output_dir="-", reward_heads=HEADS, head_bootstrap=False)
    alike = load_reward_model(files["model_name_or_path"], config, CPU, trains=True)
    even = alike.loss_of_states(states.detach(), batch, BradleyTerry(), None).loss.item()
    assert even == pytest.approx(torch.nn.functional.softplus(-margins).mean().item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_transformers_reads_all_heads_and_the_scorer_combines_them(trained, kind, tmp_path):
    folder = trained[kind]
    assert heads_of(str(folder)) == HEADS
    read = {"whole": AutoModelForSequenceClassification, "lora": AutoPeftModelForSequenceClassification}[kind]
    logits = by_transformers(read.from_pretrained(folder, num_labels=HEADS), folder)
    assert logits.std(1).min() > 1e-3
    common = {"model_name_or_path": "-", "dataset_name": "-", "eval_fraction": 1.0, "loss_type": "sft"}
    common |= {"scorer_spread_weight": 0.5, "score_cache": str(tmp_path)}
    spread = 0.5 * logits.std(1, correction=0)
    expected = {"mean": logits.mean(1), "min": logits.amin(1), "mean_minus_std": logits.mean(1) - spread}
    for how, values in expected.items():
        changed = settings("eval", **common, scorer_combine=how)
        scores = scorer_of([str(folder)], changed, CPU).score([PROMPT], [ANSWERS])
        assert scores.values[0].tolist() == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)
    alone = load_classifier(str(folder), CPU, 4, None)
    assert alone.score([PROMPT], [ANSWERS]).values[0].tolist() == pytest.approx(
        logits.mean(1).tolist(), rel=1e-4, abs=1e-5
    )
    both = scorer_of([str(folder), "length"], settings("eval", **common), CPU).score([PROMPT], [ANSWERS[:1]])
    assert both.values.item() == pytest.approx((logits[0].sum().item() + 3) / (HEADS + 1), rel=1e-4)


def test_what_is_logged_and_merged(trained, tmp_path):
    log = read_log(trained["whole"])
    assert all(row["head_spread"] > 0 for row in log if "loss" in row)
    assert log[-1]["eval_head_spread"] > 0
    words = ["merge", "--model_name_or_path", str(trained["lora"]), "--output_dir", str(tmp_path / "merged")]
    assert main(words) == 0
    merged = by_transformers(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), tmp_path / "merged"
    )
    own = AutoPeftModelForSequenceClassification.from_pretrained(trained["lora"], num_labels=HEADS)
    torch.testing.assert_close(merged, by_transformers(own, trained["lora"]), rtol=1e-4, atol=1e-5)
    assert heads_of(str(tmp_path / "merged")) == HEADS


def test_what_cannot_be(trained, files):
    with pytest.raises(UserError, match="has 3 heads"):
        load_reward_model(str(trained["whole"]), settings("reward", **files, output_dir="-", reward_heads=2), CPU)
    with pytest.raises(UserError, match="a process reward model has one"):
        settings("reward", **files, output_dir="-", reward_heads=2, reward_loss="steps")


def test_the_mean_of_the_heads_is_one_head(trained, tmp_path):
    """What docs/rewards.md shows for TRL, which reads the first label alone."""
    folder = trained["whole"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = by_transformers(model, folder).mean(1, keepdim=True)
    model.score.weight = torch.nn.Parameter(model.score.weight.mean(0, keepdim=True))
    model.num_labels = model.config.num_labels = 1
    model.save_pretrained(tmp_path / "mean")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "mean")
    one = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean")
    torch.testing.assert_close(by_transformers(one, folder), expected, rtol=1e-5, atol=1e-6)
    scores = load_classifier(str(tmp_path / "mean"), CPU, 4, None).score([PROMPT], [ANSWERS])
    assert scores.values[0].tolist() == pytest.approx(expected[:, 0].tolist(), rel=1e-4, abs=1e-5)
