"""Which pairs of a run look wrong: written beside its curriculum, with how well planted labels are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from selective_dpo.config import FLAGS, IssuesConfig
from selective_dpo.config.messages import explain
from selective_dpo.curriculum.issues import (
    TABLE,
    Issues,
    issues_of,
    meaning,
    prompts_of,
    save_issues,
)
from selective_dpo.curriculum.table import P_WRONG, PAIR_ID, Curriculum, paths_of
from selective_dpo.data.store import pairs_file
from selective_dpo.errors import ConfigError
from selective_dpo.run.folder import CONFIG
from selective_dpo.stats.estimates import clustered_share
from selective_dpo.stats.spike_in import (
    CONFIDENCE,
    SpikeIn,
    limit_false_alarms,
    measure_spike_in,
    plant,
)
from selective_dpo.storage.artifacts import file_digest, read_json
from selective_dpo.storage.locks import holding, lock_beside

FALSE_ALARMS = 0.2
"""Bound on the share of false alarms, where none is given."""

_FEWEST_PLANTED = 5


def find_issues(
    run: str | Path,
    *,
    config: IssuesConfig | None = None,
    plant: float = 0.0,
    seed: int = 0,
    false_alarms: float = FALSE_ALARMS,
) -> Issues:
    """Flag the pairs of the run in the folder `run`, and write `issues.parquet` and `issues.json` there.

    Args:
        run: the folder of a run that has a curriculum of its own measurements.
        config: thresholds; default: those of the run's recipe.
        plant: this share of the labels is turned round on purpose, and counted when found; 0: none.
        seed: decides which ones.
        false_alarms: bound on the share of false alarms among pairs that are flagged.

    Raises:
        ArtifactError: there is no curriculum, no folder of pairs, or no `p_wrong`.
        ConfigError: a share that is out of range, or too few pairs to plant labels.
        BusyError: another process is writing it.
    """
    folder = Path(run)
    if not 0.0 <= plant <= 0.5:
        raise ConfigError(f"plant is {plant:g}: give a share of the pairs of at most 0.5, such as 0.05")
    if not 0.0 < false_alarms < 1.0:
        raise ConfigError(f"false alarms: {false_alarms:g} is no share of the flagged pairs, such as 0.2")
    curriculum = Curriculum.load(folder)
    given = config or recipe_issues(folder)
    issues = issues_of(curriculum, pairs_file(folder / "pairs"), given)
    selected = np.asarray(curriculum.measured.table["selected"], dtype=np.bool_)
    facts: dict[str, Any] = {
        "curriculum_sha256": file_digest(paths_of(folder)[0]),
        "thresholds": given.model_dump(mode="json"),
        "pairs": len(issues),
        "selected": int(selected.sum()),
        "flags": _flag_counts(issues, selected, given),
    }
    if plant:
        facts["plant"] = plant_in(issues, plant, seed=seed, bound=false_alarms)
    with holding(lock_beside(folder / TABLE), what=str(folder / TABLE)):
        save_issues(folder, issues, facts)
    return Issues(issues, facts)


def recipe_issues(folder: Path) -> IssuesConfig:
    """The thresholds of the recipe that a run was made with; the defaults where it does not say."""
    path = folder / CONFIG
    given = read_json(path).get("issues") if path.is_file() else None
    try:
        return IssuesConfig.model_validate(given or {})
    except ValidationError as error:
        raise ConfigError(f"{path}: issues: {explain(error, IssuesConfig)}") from None


def _flag_counts(
    issues: pa.Table, selected_P: NDArray[np.bool_], config: IssuesConfig
) -> dict[str, dict[str, Any]]:
    prompts = prompts_of(issues)
    counts: dict[str, dict[str, Any]] = {}
    for flag in FLAGS:
        flagged_P = np.asarray(issues[flag], dtype=np.bool_)
        counts[flag] = {
            "pairs": int(flagged_P.sum()),
            "share": clustered_share(flagged_P, prompts).as_json(),
            "selected": int((flagged_P & selected_P).sum()),
            "meaning": meaning(flag, config),
        }
    return counts


def plant_in(issues: pa.Table, share: float, *, seed: int, bound: float) -> dict[str, Any]:
    """What is found of labels that are turned round on purpose; JSON values.

    No scorer that measures a pair has learned from its prompt. So under the other label, all other labels
    being as they are, its record is the one it has with chosen and rejected exchanged: the margin turns its
    sign, and `p_wrong` becomes 1 - `p_wrong`. Nothing has to be scored again.
    """
    p_wrong_P, prompts = issues[P_WRONG].to_numpy(), prompts_of(issues)
    planted_P = plant(issues[PAIR_ID].to_pylist(), share, seed)
    count = int(planted_P.sum())
    if count < _FEWEST_PLANTED:
        raise ConfigError(
            f"{share:.3g} of {len(issues):,} pairs are {count} planted labels, too few to say anything: "
            f"plant a larger share, of {_FEWEST_PLANTED} pairs at least"
        )
    score_P = np.where(planted_P, 1.0 - p_wrong_P, p_wrong_P)
    sizes = sorted({-(-count // 4), -(-count // 2), count})
    found = measure_spike_in(score_P, planted_P, prompts, sizes, seed=seed)
    limit = limit_false_alarms(score_P, planted_P, prompts, bound)
    own = {} if limit is None else {"own_flagged": int((p_wrong_P >= limit.threshold).sum())}
    return {
        "share": share,
        "seed": seed,
        "planted": count,
        **_spike_in_json(found),
        "bound": bound,
        "confidence": CONFIDENCE,
        "limit": None if limit is None else {**limit._asdict(), **own},
    }


def _spike_in_json(found: SpikeIn) -> dict[str, Any]:
    precision = {str(size): each.as_json() for size, each in found.precision.items()}
    return {"auroc": found.auroc.as_json(), "precision": precision}
