"""Trainers for TRL on flat batches: the same logs and weights as TRL's trainers, on one rank and on two."""

import copy
import json
import socket
from itertools import product

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file

import ranks
import trainer_runs
import trl_trainer_cases
from prefuse.trl.trainers import DPOTrainer, KTOTrainer
from trainer_runs import CHATS, ROWS, assert_same_log, assert_same_weights, build, log_of
from trl_trainer_cases import KINDS, LORA, _quiet, compare  # noqa: F401

# What TRL 1.16 itself says on the transformers of constraints.txt.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")


def models_and(first, *others):
    """Every kind of model with the loss `first`, and one of them with the `others`; the rest of the pairs are slow."""
    names = [*trainer_runs.MODELS, "lora"]
    slow = [pytest.param(name, other, marks=pytest.mark.slow) for name in names[1:] for other in others]
    return [(name, first) for name in names] + [(names[0], other) for other in others] + slow


def test_they_stand_in_prefuse_trl():
    from prefuse import trl as door

    assert (door.DPOTrainer, door.KTOTrainer) == (DPOTrainer, KTOTrainer)


# ---- DPO equals TRL's ----------------------------------------------------------------------------


@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize(("name", "loss_type"), models_and("sigmoid", "ipo"))
def test_dpo_trains_and_logs_as_trls_trainer(name, loss_type, models, tmp_path):
    options = {"peft_config": LORA} if name == "lora" else {}
    model = models["llama" if name == "lora" else name]
    got = compare("dpo", model, tmp_path, options=options, loss_type=loss_type, beta=0.5)
    assert got._collate.flat
    first = log_of(got)[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0


TRLS_OTHERS = ["hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
               "apo_down", "discopop", "sigmoid_norm"]  # fmt: skip


@pytest.mark.quick_cases(every=5)
@pytest.mark.parametrize("loss_type", TRLS_OTHERS)
def test_dpo_has_trls_other_losses(loss_type, models, tmp_path):
    smoothing = 0.1 if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    settings = {"beta": 0.5, "label_smoothing": smoothing, "discopop_tau": 0.3}
    compare("dpo", models["llama"], tmp_path, loss_type=loss_type, **settings)


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(
    "settings",
    [
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"use_weighting": True},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_dpo_has_trls_divergences_and_weights(settings, models, tmp_path):
    # exp(-log-ratio) turns the absolute error of TRL's float32 sums, some eps * |log-probability| = 6e-8 * 100 nats for
    # each of four sums, into a relative one.
    exponential = settings.get("f_divergence_type") in ("forward_kl", "alpha_divergence")
    compare("dpo", models["llama"], tmp_path, beta=0.5, tolerance=2.4e-5 if exponential else 1e-5, **settings)


def test_ld_dpo_trains_as_trls(models, tmp_path, monkeypatch):
    """TRL logs log-probabilities with the weighed tail in them; here `logps/*` stay those of the completions."""

    def without_logps(trainer):
        rows = trainer_runs.log_of(trainer)
        return [{name: value for name, value in row.items() if not name.startswith("logps/")} for row in rows]

    monkeypatch.setattr(trl_trainer_cases, "log_of", without_logps)
    compare("dpo", models["llama"], tmp_path, beta=0.5, ld_alpha=0.4)


def test_conversations(models, tmp_path):
    compare("dpo", models["llama"], tmp_path, rows=CHATS)


UNCHECKPOINTED = {"activation_checkpointing": False, "gradient_checkpointing": False}
# One thing each that changes what a microbatch or a log line is.
CHANGES = {
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2},
    "a last step of fewer": {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": 4},
    "truncated": {"max_length": 12},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "no checkpointing": UNCHECKPOINTED,
    "clipped": {"max_grad_norm": 0.1},
}


@pytest.mark.quick_cases(every=5)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_settings_mean_what_they_mean_in_trl(kind, change, models, tmp_path):
    compare(kind, models["llama"], tmp_path, **CHANGES[change])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(kind, models, tmp_path):
    """Before, during and after training, on data sets given at construction and later."""
    theirs, ours, config, rows, ours_alone = KINDS[kind]
    logs = []
    for trainer, more in (theirs, {}), (ours, ours_alone):
        changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "logging_steps": 3}
        options = {"eval_rows": rows[4:11]} | more
        run = build(trainer, models["llama"], rows[:8], tmp_path / trainer.__module__, config, options, **changes)
        metrics = [run.evaluate()]
        run.train()
        metrics.append(run.evaluate(trainer_runs.Dataset.from_list(rows[1:4])))
        keep = [
            {k: v for k, v in m.items() if k not in trainer_runs.TIMES} | {"step": i} for i, m in enumerate(metrics)
        ]
        logs.append(log_of(run) + keep)
    assert any("eval_rewards/margins" in row for row in logs[0])
    assert_same_log(logs[1], logs[0])


@pytest.mark.quick_cases(every=5)
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["explicit", "lora", "trained adapter"])
def test_every_kind_of_reference(reference, kind, precompute, models, tmp_path):
    model, options = models["llama"], {}
    if reference == "explicit":
        options = {"ref_model": transformers.AutoModelForCausalLM.from_pretrained(models["other"])}
    elif reference == "lora":
        options = {"peft_config": LORA}
    else:
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model), copy.deepcopy(LORA))
        with torch.no_grad():  # the reference is this adapter's copy, not the model without it
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    got = compare(kind, model, tmp_path, options=options, precompute_ref_log_probs=precompute)
    first = log_of(got)[0]
    assert abs(first["rewards/chosen"]) > 1e-3 if reference == "explicit" else abs(first["rewards/chosen"]) < 1e-5


def test_mixtures_of_losses(models, tmp_path):
    for loss_type, weights in (["sigmoid", "sft"], [0.8, 0.3]), (["ipo", "sigmoid"], None), (["sft"], None):
        compare("dpo", models["llama"], tmp_path, loss_type=loss_type, loss_weights=weights)


@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize(("name", "loss_type"), models_and("kto", "apo_zero_unpaired"))
def test_kto_trains_and_logs_as_trls_trainer_where_it_samples_alike(name, loss_type, models, tmp_path):
    options = {"peft_config": LORA} if name == "lora" else {}
    model = models["llama" if name == "lora" else name]
    changes = {"loss_type": loss_type, "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    got = compare("kto", model, tmp_path, options=options, **changes)
    log = [row for row in log_of(got) if "kl" in row]
    assert any(row["kl"] > 0 for row in log) == (loss_type == "kto")
    assert any("rewards/margins" in row for row in log)


def test_unpaired_rows_come_from_pairs_too(models, tmp_path):
    """TRL puts all desirable rows first, so microbatches have one class; margins are logged where both are there."""
    got = compare("kto", models["llama"], tmp_path, rows=ROWS, per_device_train_batch_size=5)
    assert [("rewards/margins" in row) for row in log_of(got)[:5]] == [False, False, True, False, False]


# ---- several ranks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    """name -> (log, reductions, weights) of each of two ranks, for all cases in one pair of processes."""
    settings = {
        "plain": {"per_device_train_batch_size": 3},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2},
        "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2} | UNCHECKPOINTED,
        "precomputed": {},
    }
    cases = {}
    for kind, (name, changes) in product(("trl dpo", "dpo", "trl kto", "kto"), settings.items()):
        options = {"sampling": "trl"} if kind == "kto" else {}
        if name == "precomputed":  # which TRL's own cannot, on several ranks, for a data set in memory
            options["reference"] = models["other"]
            changes = {"max_steps": 3} | ({} if kind.startswith("trl") else {"precompute_ref_log_probs": True})
        cases[f"{kind} {name}"] = {"trainer": kind, "settings": changes, "options": options}
    for kind in "trl dpo", "dpo":
        cases[f"{kind} lora"] = {"trainer": kind, "settings": {}, "options": {"lora": True}}
    cases["dpo gone"] = {"trainer": "dpo", "settings": {"precompute_ref_log_probs": True}}
    cases["kto shuffled"] = {"trainer": "kto", "settings": settings["accumulated"]}
    for case in cases.values():
        case["model"] = models["llama"]
        case["settings"] = {"per_device_train_batch_size": 3} | case["settings"]
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(key, value)
        ranks.run(2, folder, ranks.LIB / "trainer_worker.py", folder / "cases.json", folder / "out")
    return {name: [rank_of(folder / "out" / name, rank) for rank in range(2)] for name in cases}


def rank_of(out, rank):
    written = json.loads((out / f"log.{rank}.json").read_text())
    return written["log"], written["reductions"], load_file(out / f"weights.{rank}.safetensors")


CASES_OF_RANKS = [(kind, name) for kind in KINDS for name in ("plain", "accumulated", "evaluated", "precomputed")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [*CASES_OF_RANKS, ("dpo", "lora")])
def test_two_ranks_train_and_log_as_trls_trainer_on_two_ranks(kind, name, two_ranks):
    expected, got = two_ranks[f"trl {kind} {name}"], two_ranks[f"{kind} {name}"]
    for (log, _, weights), (trls_log, _, trls_weights) in zip(got, expected, strict=True):
        assert_same_log(log, trls_log)
        assert_same_weights(weights, trls_weights)
    for key, value in got[0][2].items():
        assert torch.equal(value, got[1][2][key])


@pytest.mark.slow
def test_each_rank_has_the_reference_numbers_of_all(two_ranks):
    """Rows change ranks as they are shuffled, and nobody keeps a reference model."""
    for (log, _, weights), (trls_log, _, trls_weights) in zip(
        two_ranks["dpo gone"], two_ranks["trl dpo plain"], strict=True
    ):
        assert_same_log(log, trls_log)
        assert_same_weights(weights, trls_weights)


@pytest.mark.slow
def test_metrics_are_reduced_once_for_each_log_line(two_ranks):
    for name in "plain", "accumulated", "evaluated", "precomputed", "lora":
        log, reductions, _ = two_ranks[f"dpo {name}"][0]
        assert reductions == sum("entropy" in row or "eval_entropy" in row for row in log)


@pytest.mark.slow
def test_ranks_share_the_z0_of_a_step(two_ranks):
    (log, reductions, weights), (_, _, other) = two_ranks["kto shuffled"]
    assert max(row.get("kl", 0.0) for row in log) > 0
    assert reductions == 5 + 2 + 1  # one z0 for each step; log lines after steps 2 and 4, and of the end
    for key, value in weights.items():
        assert torch.equal(value, other[key])
