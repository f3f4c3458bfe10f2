"""Records to curriculum, through files and back."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selective_dpo.config import SelectConfig
from selective_dpo.curriculum.build import build_curriculum
from selective_dpo.curriculum.records import Records, concat_records, read_records, write_records
from selective_dpo.curriculum.table import Curriculum
from selective_dpo.errors import ArtifactError, ConfigError, RecordsError


def make_records(pairs: int = 12, seeds: tuple[int, ...] = (41, 42), evaluations: int = 2) -> Records:
    """Pair i of prompt i // 2 has loss i / 10 + seed's last digit / 100 + evaluation / 1000."""
    pair, seed, evaluation = (
        grid.ravel()
        for grid in np.meshgrid(
            np.arange(pairs), np.array(seeds), np.arange(1, evaluations + 1), indexing="ij"
        )
    )
    loss = pair / 10 + (seed % 10) / 100 + evaluation / 1000
    zeros = np.zeros(len(pair))
    return Records(
        pair_id=np.array([f"pair{index:02d}" for index in pair]),
        prompt_id=np.array([f"prompt{index // 2}" for index in pair]),
        seed=seed,
        fold=pair % 2,
        evaluation=evaluation,
        step=evaluation * 10,
        policy_chosen_logp=zeros,
        policy_rejected_logp=zeros,
        reference_chosen_logp=zeros,
        reference_rejected_logp=zeros,
        margin=zeros,
        loss=loss,
    )


def rows_of(records: Records, rows: np.ndarray) -> Records:
    return Records(**{name: column[rows] for name, column in vars(records).items()})


def test_the_table_by_hand() -> None:
    curriculum = build_curriculum(make_records(4))
    rows = curriculum.table.to_pylist()
    # Seeds 41, 42 and evaluations 1, 2: the mean adds (.01 + .02) / 2 + (.001 + .002) / 2 = .0165.
    assert [row["difficulty"] for row in rows] == pytest.approx([0.0165, 0.1165, 0.2165, 0.3165])
    assert [row["rank"] for row in rows] == [0, 1, 2, 3]
    assert [row["selected"] for row in rows] == [True, True, False, False]
    assert [row["position"] for row in rows] == [0, 1, -1, -1]
    assert [row["prompt_id"] for row in rows] == ["prompt0", "prompt0", "prompt1", "prompt1"]
    assert rows[3]["loss_seed42_evaluation2"] == pytest.approx(0.3 + 0.02 + 0.002)
    assert rows[0]["count"] == 4
    assert curriculum.order == ["pair00", "pair01"]
    facts = curriculum.facts
    assert (facts["pairs"], facts["selected"], facts["partial"]) == (4, 2, 0)
    assert facts["seeds"] == [41, 42]
    assert facts["evaluations"] == [1, 2]
    assert facts["agreement"]["bootstrap"]["clusters"] == 2


def test_row_order_of_the_records_has_no_effect() -> None:
    records = make_records()
    mixed = rows_of(records, np.random.default_rng(0).permutation(len(records)))
    assert build_curriculum(mixed).table.equals(build_curriculum(records).table)


def test_facts_hold_the_selection_with_its_defaults() -> None:
    def select_of(**keys) -> dict:
        return build_curriculum(make_records(), keys).facts["select"]

    assert select_of()["fraction"] == 0.5
    assert select_of(count=3)["fraction"] is None
    assert select_of(rule="random")["seed"] == 0
    assert select_of(order="shuffled", seed=5)["seed"] == 5
    assert select_of(rule="band", band=(0.2, 0.8))["fraction"] is None
    assert SelectConfig(**select_of(rule="random")).fraction == 0.5


@pytest.mark.parametrize(
    ("select", "size"),
    [
        ({"rule": "hardest", "fraction": 0.25}, 3),
        ({"rule": "random", "count": 5}, 5),
        ({"rule": "below", "threshold": 0.35}, 4),
        ({"rule": "band", "band": (0.25, 0.75)}, 6),
        ({"rule": "all", "order": "shuffled"}, 12),
        ({"aggregate": "rank-mean"}, 6),
    ],
)
def test_every_rule_reaches_the_table(select, size) -> None:
    curriculum = build_curriculum(make_records(), select)
    assert curriculum.facts["selected"] == size == len(curriculum.order)


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"fraction": 1.7}, "fraction is 1.7"),
        ({"tau": 0.5}, "tau: unknown key"),
        ({"threshold": 0.5}, "threshold works only with rule 'below'"),
        ({"count": 13}, "count is 13, but there are 12"),
        ({"count": 0}, "count is 0"),
        ({"fraction": 0.5, "count": 2}, "not both"),
        ({"rule": "below"}, "needs a threshold"),
        ({"rule": "band"}, "needs a band"),
        ({"rule": "band", "band": [0.5, 0.2]}, "rising"),
        ({"rule": "random", "seed": -1}, "seed is -1"),
    ],
)
def test_wrong_selections_are_config_errors_of_one_line(select, words) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_curriculum(make_records(), select)
    assert "\n" not in str(caught.value)


def test_missing_records_need_allow_partial() -> None:
    records = make_records()
    lacking = rows_of(records, np.arange(1, len(records)))
    with pytest.raises(RecordsError, match="pair00"):
        build_curriculum(lacking)
    curriculum = build_curriculum(lacking, {"allow_partial": True})
    assert curriculum.facts["partial"] == 1
    row = curriculum.table.to_pylist()[0]
    assert row["loss_seed41_evaluation1"] is None
    assert row["count"] == 3


def test_saved_and_loaded(tmp_path) -> None:
    made = build_curriculum(make_records(), provenance={"model": "m"}, cost={"seconds": 1.5}, key="k")
    made.save(tmp_path)
    loaded = Curriculum.load(tmp_path)
    assert loaded.table.equals(made.table)
    assert loaded.facts == json.loads(json.dumps(made.facts))
    assert loaded.facts["key"] == "k"
    assert loaded.facts["cost"] == {"seconds": 1.5}


def test_records_survive_their_file(tmp_path) -> None:
    records = make_records()
    path = tmp_path / "records.parquet"
    write_records(records, path)
    again = read_records(path)
    assert pq.read_schema(path).names == list(vars(records))
    for name, column in vars(records).items():
        np.testing.assert_array_equal(getattr(again, name), column)
    assert len(concat_records([again, records])) == 2 * len(records)


def test_no_records_survive_too(tmp_path) -> None:
    write_records(rows_of(make_records(), np.arange(0)), tmp_path / "records.parquet")
    assert len(read_records(tmp_path / "records.parquet")) == 0


def test_files_that_are_not_records_are_refused(tmp_path) -> None:
    path = tmp_path / "records.parquet"
    with pytest.raises(ArtifactError, match="does not exist"):
        read_records(path)
    path.write_text("nothing of the kind")
    with pytest.raises(ArtifactError, match="not a Parquet file"):
        read_records(path)
    write_records(make_records(), path)
    whole = pq.read_table(path)
    pq.write_table(whole.drop_columns(["step"]), path)
    with pytest.raises(ArtifactError, match="step"):
        read_records(path)
    pq.write_table(whole.set_column(0, "pair_id", pa.nulls(len(whole), pa.string())), path)
    with pytest.raises(ArtifactError, match=r"nulls in column.* pair_id"):
        read_records(path)
