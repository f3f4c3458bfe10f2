"""What a cheaper scoring protocol keeps, measured on existing records of the full one.

    python benchmarks/protocol_agreement.py --records ../shared/data/learning_records --json out.json

Reads every folder below --records that holds the original repository's CSVs or a `curriculum.parquet`,
and takes seeds and evaluations out of it: `fast` is one seed with the middle and the last evaluation,
`paper` all of them. Prints (1) the agreement of each protocol with `paper`, (2) the predictions by which
`certified` stops, and (3) predictions from two seeds against the third. docs/protocols.md explains them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selective_dpo.curriculum.agreement import agreement
from selective_dpo.curriculum.import_ import import_records
from selective_dpo.curriculum.records import LossTable
from selective_dpo.curriculum.select import Rule, select
from selective_dpo.curriculum.stability import is_stable, predict_overlap, seeds_needed
from selective_dpo.curriculum.table import TABLE, Curriculum, curriculum_losses

RECORDS = Path(__file__).resolve().parents[2] / "shared" / "data" / "learning_records"
TARGETS = (0.95, 0.98, 0.99)
CHECKED = (Rule(fraction=0.3), Rule(fraction=0.5))
"""Selections of the printed comparison; `COVERED` adds some to count how often intervals hold."""
COVERED = (
    *CHECKED,
    *(Rule(fraction=fraction) for fraction in (0.2, 0.7, 0.8)),
    *(Rule("hardest", fraction=fraction) for fraction in (0.3, 0.5)),
    Rule("band", band=(0.25, 0.75)),
)


def main() -> None:
    options = _options()
    folders = sorted(path for path in options.records.iterdir() if path.is_dir())
    result = {
        "name": "protocol_agreement",
        "models": {folder.name: measure(read(folder)) for folder in folders},
    }
    result["coverage"] = coverage(result["models"])
    print(as_text(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def read(folder: Path) -> LossTable:
    """The losses of a run, or of a folder of the original's CSVs."""
    if (folder / TABLE).is_file():
        return curriculum_losses(Curriculum.load(folder))
    return curriculum_losses(import_records(folder).curriculum)


def measure(table: LossTable) -> dict[str, Any]:
    """All three parts for one model."""
    seeds, evaluations = len(table.seeds_S), table.evaluations_E
    late = (evaluations[(len(evaluations) - 1) // 2], evaluations[-1])
    couples = list(itertools.combinations(range(seeds), 2))
    return {
        "pairs": len(table.pair_ids_P),
        "seeds": list(table.seeds_S),
        "evaluations": list(evaluations),
        "late": list(late),
        "fast": [kept(table, (s,), late) for s in range(seeds)],
        "two seeds": [kept(table, couple, late) for couple in couples],
        "certified": [certified(part(table, couple, late)) for couple in couples],
        "paper": certified(table) if seeds > 1 else None,
        "predictions": [
            {"evaluations": list(used), **against_the_rest(table, couple, used, rule)}
            for used in (evaluations, late, late[-1:])
            for couple in couples
            if seeds > 2
            for rule in COVERED
        ],
    }


def part(table: LossTable, seeds: tuple[int, ...], evaluations: tuple[int, ...]) -> LossTable:
    """Some of the seeds (by index) and evaluations."""
    columns = [table.evaluations_E.index(evaluation) for evaluation in evaluations]
    return replace(
        table,
        seeds_S=tuple(table.seeds_S[s] for s in seeds),
        evaluations_E=evaluations,
        losses_PSE=table.losses_PSE[:, seeds][:, :, columns],
    )


def kept(table: LossTable, seeds: tuple[int, ...], evaluations: tuple[int, ...]) -> dict[str, Any]:
    """Agreement of a part of the records with all of them, and with all those of the other seeds."""
    cheap_P = part(table, seeds, evaluations).losses_PSE.mean(axis=(1, 2))
    others = tuple(s for s in range(len(table.seeds_S)) if s not in seeds)
    return {
        "seeds": [table.seeds_S[s] for s in seeds],
        "paper": _compared(table, cheap_P, table.losses_PSE.mean(axis=(1, 2))),
        "others": _compared(table, cheap_P, table.losses_PSE[:, others].mean(axis=(1, 2)))
        if others
        else None,
    }


def _compared(table: LossTable, one_P: NDArray[np.float64], other_P: NDArray[np.float64]) -> dict[str, Any]:
    """Spearman and overlap of the easiest half, with intervals clustered by prompt."""
    both = np.stack([one_P, other_P], axis=1)[:, :, None]
    two = replace(table, seeds_S=(0, 1), evaluations_E=(1,), losses_PSE=both)
    (between,) = agreement(two, rule=Rule(fraction=0.5))["seeds"]
    return {name: between[name] for name in ("spearman", "overlap")}


def certified(table: LossTable) -> dict[str, Any]:
    """What the stopping rule says after these seeds."""
    prediction = predict_overlap(table, rule=Rule(fraction=0.5))
    return {
        "prediction": prediction.as_json(),
        "stops": is_stable(prediction),
        "seeds_needed": {str(target): seeds_needed(prediction, target) for target in TARGETS},
    }


def against_the_rest(
    table: LossTable, couple: tuple[int, ...], evaluations: tuple[int, ...], rule: Rule
) -> dict[str, Any]:
    """The predicted overlap of a two-seed selection with one fresh seed's, and what the next one gave."""
    prediction = predict_overlap(part(table, couple, evaluations), rule=rule, replicates=300)
    third = next(s for s in range(len(table.seeds_S)) if s not in couple)
    first, second = (
        select(
            part(table, seeds, evaluations).losses_PSE.mean(axis=(1, 2)), table.pair_ids_P, rule
        ).selected_P
        for seeds in (couple, (third,))
    )
    overlap = float((first & second).sum() / first.sum())
    single = prediction.single
    return {
        "seeds": [table.seeds_S[s] for s in couple],
        "third": table.seeds_S[third],
        "rule": f"{rule.name} {rule.band or rule.fraction}",
        "predicted": single._asdict(),
        "observed": overlap,
        "error": single.value - overlap,
        "covered": single.low <= overlap <= single.high,
    }


def coverage(models: dict[str, Any]) -> dict[str, Any]:
    """Over all predictions: how large the errors are, and how often the interval holds the observation."""
    every = [each for model in models.values() for each in model["predictions"]]
    if not every:
        return {"predictions": 0}
    errors = np.array([each["error"] for each in every])
    return {
        "predictions": len(every),
        "covered": sum(each["covered"] for each in every) / len(every),
        "error_mean": float(errors.mean()),
        "error_rms": float(np.sqrt((errors**2).mean())),
        "error_largest": float(np.abs(errors).max()),
    }


def as_text(result: dict[str, Any]) -> str:
    """Markdown tables."""
    models = result["models"]
    lines = [
        "| model | protocol | seeds | Spearman with `paper` | overlap with `paper` "
        "| overlap with the other seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in models.items():
        for protocol in ("fast", "two seeds"):
            lines += [_kept_row(name, protocol, each) for each in model[protocol]]
    lines += [
        "",
        "| model | seeds | evaluations | overlap between seeds | rho | overlap with a repetition, predicted "
        "| lower end reaches 0.95 | seeds for " + " / ".join(map(str, TARGETS)) + " |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in models.items():
        lines += [_certified_row(name, model["late"], each) for each in model["certified"]]
        if model["paper"]:
            lines.append(_certified_row(name, model["evaluations"], model["paper"]))
    names = [f"{rule.name} {rule.fraction}" for rule in CHECKED]
    lines += [
        "",
        "| model | evaluations | from seeds | against | "
        + " | ".join(f"{name}: predicted | observed | error" for name in names)
        + " |",
        "| --- | --- | --- | --- |" + " --- | --- | --- |" * len(names),
    ]
    for name, model in models.items():
        shown = [model["evaluations"], model["late"]]
        for used, couple in itertools.product(shown, [each["seeds"] for each in model["two seeds"]]):
            cells = [
                each
                for each in model["predictions"]
                if each["evaluations"] == used and each["seeds"] == couple and each["rule"] in names
            ]
            if cells:
                lines.append(_prediction_row(name, used, cells))
    total = result["coverage"]
    if total["predictions"]:
        lines += [
            "",
            f"{total['predictions']} predictions in all ({len(COVERED)} selections, three sets of "
            f"evaluations): the interval holds the observation in {100 * total['covered']:.1f}%, mean error "
            f"{total['error_mean']:+.4f}, root mean square {total['error_rms']:.4f}, "
            f"largest {total['error_largest']:.4f}.",
        ]
    return "\n".join(lines)


def _kept_row(model: str, protocol: str, each: dict[str, Any]) -> str:
    paper, others = each["paper"], each["others"]
    cells = [
        model,
        protocol,
        _joined(each["seeds"]),
        _interval(paper["spearman"], digits=4),
        _interval(paper["overlap"]),
        _interval(others["overlap"]) if others else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _certified_row(model: str, evaluations: list[int], each: dict[str, Any]) -> str:
    prediction = each["prediction"]
    between = [couple["overlap"] for couple in prediction["observed"]]
    seeds = {couple[end]: None for end in "ab" for couple in prediction["observed"]}
    cells = [
        model,
        _joined(list(seeds)),
        _joined(evaluations),
        f"{np.mean(between):.3f}",
        f"{prediction['rho']:.4f}",
        _interval(prediction["repetition"]),
        "yes" if each["stops"] else "no",
        " / ".join("-" if number is None else str(number) for number in each["seeds_needed"].values()),
    ]
    return f"| {' | '.join(cells)} |"


def _prediction_row(model: str, used: list[int], cells: list[dict[str, Any]]) -> str:
    figures = [
        f"{_interval(each['predicted'])} | {each['observed']:.3f} | {each['error']:+.4f}" for each in cells
    ]
    head = [model, _joined(used), _joined(cells[0]["seeds"]), str(cells[0]["third"])]
    return f"| {' | '.join([*head, *figures])} |"


def _interval(estimate: dict[str, Any], digits: int = 3) -> str:
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(d=digits, **estimate)


def _joined(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of folders with records")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
