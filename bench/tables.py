"""Tables of the docs, made of the results. blocks.py says which stands where."""

from __future__ import annotations

from collections.abc import Callable

from prefuse.bench.found import Results, Row, link, row, where
from prefuse.bench.record import Record, markdown
from prefuse.bench.show import absent, columns, number

TRAINED = {"full": "all weights", "lora": "LoRA"}


def accuracy(results: Results) -> str:
    record = results.newest("accuracy")
    lengths = sorted({x["tokens_of_sequence"] for x in record.rows})
    names = dict.fromkeys(x["implementation"] for x in record.rows)
    cells = [
        [name, *(_mean_and_worst(row(record, implementation=name, tokens_of_sequence=n)) for n in lengths)]
        for name in names
    ]
    settings = record.settings
    said = f"bfloat16 inputs, D = {settings['D']}, V = {settings['V']}, {where(record)}, {link(record)}."
    table = markdown(["mean (worst) |error| in nats", "token", *(f"{n} tokens" for n in lengths[1:])], cells)
    return "\n\n".join([said, table])


def _mean_and_worst(x: Row) -> str:
    return f"{x['error_nats']:.1e} ({x['error_nats_max']:.1e})"


DOORS = {
    "TRL": "TRL",
    "TRL, prefuse.trl.enable()": "`enable()`",
    "TRL, prefuse.trl.enable(workspace=1 << 30)": "`enable(workspace=1 << 30)`",
    "prefuse.trl.DPOTrainer": "[`prefuse.trl.DPOTrainer`](trl_trainers.md)",
}


def trl_step(results: Results) -> str:
    record = results.newest("seam")
    cells = [
        [f"{x['trained']}: {DOORS[x['implementation']]}", f"{x['seconds_per_step']:.2f}", f"{x['ratio_to_trl']:.2f}",
         f"{x['peak_mib']:.0f}"]
        for x in record.rows
    ]  # fmt: skip
    return markdown(["trained: head", "s per step", "speed / TRL's", "peak MiB"], cells)


def trl_trainers(results: Results) -> str:
    record = results.newest("seam")
    cells = []
    for trained in ("all weights", "LoRA"):
        both = [row(record, trained=trained, implementation=x) for x in ("TRL", "prefuse.trl.DPOTrainer")]
        cells.append(
            [trained, *(f"{x['seconds_per_step']:.2f}" for x in both), *(f"{x['peak_mib']:.0f}" for x in both)]
        )
    return markdown(["trained", "TRL: s per step", "here", "TRL: peak MiB", "here"], cells)


def trl_real(results: Results) -> str:
    record = results.newest("real", train="lora", model="SmolLM2-135M-Instruct")
    tolerance = f"`prefuse train --gradient_tolerance {record.settings['tolerance']}`"
    names = {
        "TRL": f"TRL {record.environment['packages']['trl']}",
        "prefuse.trl.DPOTrainer": "`prefuse.trl.DPOTrainer`",
        "engine": "`prefuse train`",
        "engine, tolerance": tolerance,
    }
    measured = {x["implementation"]: x for x in record.rows}
    cells = [
        [text, f"{x['seconds_per_step']:.1f}", f"{x['ratio_to_trl']:.2f}", f"{x['peak_mib']:.0f}"]
        for name, text in names.items()
        if (x := measured.get(name))
    ]
    return markdown([f"{record.settings['model']}, LoRA", "CPU s per step", "times TRL", "peak MiB"], cells)


def model_step(results: Results) -> str:
    record = results.newest("model")
    cells = [[x["implementation"], f"{x['seconds']:.2f}", f"{x['peak_mib']:.0f}"] for x in record.rows]
    return markdown(["forward and backward", "s", "peak MiB"], cells)


def liger_losses(results: Results) -> str:
    record = results.newest("losses")
    names = ("prefuse", "lean", "Liger")
    cells = []
    for loss in dict.fromkeys(x["loss_type"] for x in record.rows):
        found = [row(record, loss_type=loss, implementation=name) for name in names]
        seconds = [f"{x['cpu_seconds']:.2f}" for x in found]
        cells.append([loss, *seconds, f"{found[0]['ratio_to_liger']:.2f}",
                      *(f"{x['peak_mib_beyond_gradients']:.0f}" for x in found)])  # fmt: skip
    header = ["loss", *(f"{x}, s" for x in names), "Liger / prefuse", *(f"{x}, MiB" for x in names)]
    return markdown(header, cells)


def whole(verb: str) -> Callable[[Results], str]:
    """Every row of the newest record of a verb, as it is, with what was absent."""
    return lambda results: _as_it_is(results.newest(verb))


def _as_it_is(record: Record, titled: bool = False) -> str:
    names = [name for name in columns(record) if name not in ("ms_low", "ms_high")]
    cells = [[number(x.get(name)) for name in names] for x in record.rows]
    title = [f"{record.settings['rows']:,} rows, {record.settings['name']}."] if titled else []
    said = [*title, f"{where(record)[0].upper()}{where(record)[1:]}, {link(record)}.", *record.notes]
    return "\n".join([" ".join(said), "", markdown(names, cells), *(f"\n{line}" for line in absent(record))])


def dpo_steps(record: Record) -> list[Row]:
    """Times of a DPO step in which everything is trained."""
    chosen = {"mode": "trainable", "loss_type": "dpo"}
    return [x for x in record.rows if chosen.items() <= x.items() and "ms" in x]


def head_steps(results: Results) -> str:
    """A DPO step with everything trained, by dtype, and whether log-probabilities keep their bits in any batch."""
    texts = []
    for record in results.every("head"):
        rows = dpo_steps(record)
        if not rows:  # measured for something else
            continue
        bits = {x["implementation"]: x.get("batch_invariant") for x in record.rows if x["loss_type"] == "logps"}
        cells = [
            [x["implementation"], f"{x['ratio_to_gemms']:.2f}", number(x.get("peak_mib")),
             *(f"{x[key]:.1e}" if key in x else "" for key in ("log_ratio_error_nats", "gradient_error")),
             number(x.get("deterministic")), number(bits.get(x["implementation"]))]
            for x in rows
        ]  # fmt: skip
        header = ["DPO step, all trained", "time / 4 bare products", "peak MiB", "log-ratio error, nats"]
        header += ["gradient error", "same bits again", "in any batch"]
        shape, dtype = record.rows[0]["shape"], record.rows[0]["dtype"]
        about = f"{dtype}, N x D x V = {shape}, {where(record)}, {link(record)}. {' '.join(record.notes)}"
        missing = sorted({f"{name}: {peer['absent']}" for name, peer in record.peers.items() if peer["absent"]})
        texts.append("\n".join([about, "", markdown(header, cells), "", f"Not measured: {'; '.join(missing)}."]))
    return "\n\n".join(texts)


def memory_peaks(results: Results) -> str:
    """MiB beyond inputs and gradients of a DPO step, by shape."""
    record, texts = results.newest("memory"), []
    shapes = list(dict.fromkeys(x["shape"] for x in record.rows))
    for mode in ("trainable", "frozen"):
        found = {
            (x["implementation"], x["shape"]): x["peak_mib_beyond_gradients"]
            for x in record.rows
            if x["mode"] == mode and "peak_mib" in x
        }
        names = dict.fromkeys(name for name, _ in found)
        cells = [[name, *(f"{found[name, shape]:.1f}" for shape in shapes)] for name in names]
        texts.append(markdown([f"MiB, {mode}, N x D x V =", *shapes], cells))
    said = f"{where(record)[0].upper()}{where(record)[1:]}, {record.rows[0]['dtype']}, {link(record)}."
    return "\n\n".join([said, *texts])


def scale_exponents(results: Results) -> str:
    """How time and peak memory grow: slopes of the line through the logarithms."""
    record = results.newest("scale")
    slopes = {(x["what"], x["implementation"]): x for x in record.rows if "exponent" in x}
    axes = [(measure, axis) for axis in ("tokens", "vocabulary", "ranks") for measure in ("ms", "peak_mib")]
    words = {"ms": "time", "peak_mib": "memory"}

    def cell(name: str, measure: str, axis: str) -> str:
        found = slopes.get((f"exponent of {measure} in {axis}", name))
        return f"{found['exponent']:.2f}" if found else ""

    names = dict.fromkeys(x["implementation"] for x in record.rows if "ms" in x)
    cells = [[name, *(cell(name, *axis) for axis in axes)] for name in names]
    ranks = ", ".join(f"{x['size']}: {x['ms']:.0f} ms" for x in record.rows if x["what"] == "ranks" and "ms" in x)
    said = f"{where(record)[0].upper()}{where(record)[1:]}, {link(record)}. {' '.join(record.notes)}"
    table = markdown(["exponent of", *(f"{words[measure]} in {axis}" for measure, axis in axes)], cells)
    return "\n\n".join([said, table, f"CPU milliseconds of the slowest rank, by ranks: {ranks}."])


def every(verb: str) -> Callable[[Results], str]:
    """The same of each result of a verb, by what was measured."""

    def block(results: Results) -> str:
        return "\n\n".join(_as_it_is(record, titled=True) for record in results.every(verb))

    return block


def cpu_shares(results: Results) -> str:
    """Of the portable head: how near it is to its own products and to TRL, and where its time goes."""
    records = [record for record in results.every("cpuhead") if "shares" in record.details]
    records.sort(key=lambda record: (record.device["threads"], record.settings["D"]))
    names = list(records[0].details["shares"]["forward"])
    cells = []
    for record in records:
        shape = " x ".join(str(record.settings[name]) for name in "NDV")
        clock = {"cpu": "processor time", "wall": "time"}[record.settings["clock"]]
        for kind, shares in record.details["shares"].items():
            ratios = {x["implementation"]: x["ratio_to_gemms"] for x in record.rows if x["pass"] == kind}
            times_trl = f"{ratios['TRL'] / ratios['prefuse']:.2f}" if "TRL" in ratios else ""
            cells.append(
                [link(record, shape), f"{record.device['threads']}, {clock}", kind, f"{1 / ratios['prefuse']:.1%}",
                 times_trl, *(f"{shares[name]:.1%}" for name in names)]
            )  # fmt: skip
    machine = f"{records[0].device['name']}, torch {records[0].environment['packages']['torch'].split('+')[0]}"
    header = ["N x D x V", "threads, clock", "pass", "of its own bare products' speed", "times TRL's speed", *names]
    return "\n\n".join([f"{machine}, float32.", markdown(header, cells)])


def ranks(results: Results) -> str:
    """Held-out metrics of one process, and how far those of several are from them."""
    record = results.newest("ranks")
    held = [x for x in record.rows if "away_from_one_process" in x]
    ways = list(dict.fromkeys(x["implementation"] for x in held))
    cells = []
    for name in dict.fromkeys(x["what"] for x in held):
        first, *others = (row(record, what=name, implementation=way) for way in ways)
        cells.append([f"`{name}`", number(first["value"]), *(f"{x['away_from_one_process']:.0e}" for x in others)])
    settings = record.settings
    what = f"{settings['max_steps']} steps of {settings['items']} rows, loss {settings['loss_type']}"
    header = [what, ways[0], *(f"off by with {way}" for way in ways[1:])]
    return "\n\n".join([f"{where(record)[0].upper()}{where(record)[1:]}, {link(record)}.", markdown(header, cells)])


def policy_parity(results: Results) -> str:
    """Ours and TRL's loss of each variant, and what lies between them."""
    record = results.newest("policy")
    cells = [
        [x["loss_type"], f"{x['loss']:.6f}", *(f"{x[name]:.0e}" for name in
         ("largest_difference", "gradient_difference", "metrics_difference")), str(x["metrics_compared"])]
        for x in record.rows
    ]  # fmt: skip
    trl = record.environment["packages"]["trl"]
    bound = f"a difference above {record.settings['bound']:g} fails"
    said = f"{record.settings['dtype']}, beside TRL {trl}, {link(record)}; {bound}."
    header = ["variant", "loss", "off by", "its gradient", "its metrics", "metrics compared"]
    return "\n\n".join([said, markdown(header, cells)])


def judge(results: Results) -> str:
    """What a judge said of greedy and hot answers, and whether it named the answer that stood first."""
    record = results.newest("judge")
    x, settings = {made["what"]: made["value"] for made in record.rows}, record.settings

    def won(prefix: str) -> str:
        rate, low, high = (x[f"{prefix}win_rate{part}"] for part in ("", "_low", "_high"))
        counts = ", ".join(f"{x[prefix + name]:.0f} {name}" for name in ("wins", "ties", "losses"))
        return f"{rate:.4g} ({low:.4g}, {high:.4g}): {counts}"

    cells = [
        ["`win_rate` (`low`, `high`), by the judge", won("")],
        ["`first_shown_wins`", number(x["first_shown_wins"])],
        ["`length_controlled_win_rate`", number(x["length_controlled_win_rate"])],
        ["`gold_win_rate` (`low`, `high`), by the number of words", won("gold_")],
        ["`cohen_kappa`", number(x["cohen_kappa"])],
        ["`length`, `ref_length`", f"{x['length']:.0f}, {x['ref_length']:.0f} characters"],
    ]
    what = f"{settings['name']}, greedy against temperature {settings['temperature']:g}, {settings['prompts']} prompts"
    said = f"{what} of one line, at most {settings['max_new_tokens']} tokens, {where(record)}, {link(record)}."
    first = f"The answer that is shown first wins {x['first_shown_wins']:.0%} of the judge's replies"
    found = f"{first}; asked in both orders, it says a tie of {x['ties']:.0f} of {settings['prompts']} prompts."
    return "\n\n".join([said, markdown(["metric", "value"], cells), found])


def sparse_heads(results: Results) -> str:
    """What the sparse backward takes and what it leaves out, by model."""
    records = results.every("sparse")
    rows: dict[str, list[str]] = {}
    for record in records:
        ours = {x["what"]: x for x in record.rows if x["implementation"] == "tolerance 2^-9"}
        trl = {x["what"]: x for x in record.rows if x["implementation"] == "TRL"}
        errors = {x["implementation"]: x for x in record.rows if x["what"] == "error"}
        for what in ("all weights", "frozen head"):
            rows.setdefault(f"{what}, times as fast as the exact mode", []).append(
                f"{ours[what]['ratio_to_exact']:.2f}"
            )
            if what in trl:
                times = ours[what]["ratio_to_exact"] / trl[what]["ratio_to_exact"]
                rows.setdefault(f"{what}, times as fast as TRL's head", []).append(f"{times:.1f}")
        rows.setdefault("columns kept", []).append(f"{ours['error']['kept_columns']:.1%}")
        rows.setdefault("mass skipped", []).append(f"{ours['error']['skipped_mass']:.1e}")
        for name in ("dhidden", "dweight"):
            others = "; ".join(
                f"{errors[x][f'{name}_error']:.1e}" for x in ("dlogits rounded to bfloat16", "eager bfloat16")
            )
            said = f"{ours['error'][f'{name}_error']:.1e} ({others})"
            rows.setdefault(f"error of {name} (dlogits rounded to bfloat16; eager bfloat16)", []).append(said)
    names = [link(record, record.settings["name"]) for record in records]
    rows = {name: cells for name, cells in rows.items() if len(cells) == len(records)}
    return markdown(["", *names], [[name, *cells] for name, cells in rows.items()])


def sparse_trained(results: Results) -> str:
    """Runs with an exact head, a sparse backward and rounded dlogits."""
    cells = []
    for record in results.every("tolerance"):
        what = link(record, TRAINED[record.settings["train"]])
        for x in record.rows:
            cells.append([
                f"{what}: {x['implementation']}",
                *(f"{x[name]:.5f}" for name in ("last_loss", "held_out_loss")), f"{x['held_out_accuracy']:.2f}",
                f"{x['held_out_margin']:.5f}", f"{x['away_from_exact']:.1%}",
            ])  # fmt: skip
    header = [
        "trained: head's gradient",
        "last loss",
        "held-out loss",
        "accuracy",
        "margin",
        "weights off exact",
    ]
    return markdown(header, cells)


def real_steps(results: Results) -> str:
    """A DPO step of real models on real rows."""
    names = {
        "TRL": "TRL", "prefuse.trl.enable()": "`prefuse.trl.enable()`",
        "prefuse.trl.enable(), tolerance": "`prefuse.trl.enable()`, a tolerance",
        "prefuse.trl.DPOTrainer": "`prefuse.trl.DPOTrainer`",
        "prefuse.trl.DPOTrainer, tolerance": "`prefuse.trl.DPOTrainer`, a tolerance", "engine": "`prefuse train`",
        "engine, tolerance": "`prefuse train`, a tolerance",
    }  # fmt: skip
    cells = []
    for record in results.every("real"):
        found = {x["implementation"]: x for x in record.rows}
        what = link(record, f"{record.settings['model']}, {TRAINED[record.settings['train']]}")
        for name, text in names.items():
            if x := found.get(name):
                numbers = [f"{x['seconds_per_step']:.1f}", f"{x['ratio_to_trl']:.2f}", f"{x['peak_mib']:.0f}"]
                cells.append([f"{what}: {text}", *numbers])
    return markdown(["a step by", "CPU s", "times TRL", "peak MiB"], cells)
