"""Order -> policy: what was trained on, and under which keys all of it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from selective_dpo.identity import ids_digest
from selective_dpo.run.verification.check import DAMAGE, Checks
from selective_dpo.run.verification.curricula import Arm, Written
from selective_dpo.run.verification.files import artifact_name
from selective_dpo.storage.artifacts import MANIFEST, read_json, read_manifest
from selective_dpo.storage.digests import digest

ORDER = "order.json"


def check_policy(checks: Checks, root: Path, arm: Arm, curriculum: Written | None) -> None:
    """An arm's policy: safetensors weights, trained on the curriculum's pairs in its order."""
    folder = arm.folder / "policy"
    name = artifact_name(root, folder)
    with checks.of(f"policy {arm.name}", name) as check:
        if not folder.is_dir():
            check.absent()
            return
        weights = sorted(path.name for path in folder.glob("*.safetensors"))
        check.require(bool(weights), name, "there are no weights (*.safetensors)")
        order = read_json(folder / ORDER)
        check.counted = f"{order['pairs']:,} pairs consumed {order['epochs']:g} time(s)"
        place = f"{name}/{ORDER}"
        check.equal(place, "consumed_digest", order["consumed_digest"], order["expected_digest"])
        check.equal(place, "matches", order["matches"], True)
        if curriculum is None:
            return
        ids = curriculum.order
        check.equal(place, "pairs", order["pairs"], len(ids))
        check.equal(place, "epochs", order["epochs"], order["consumed"] / max(1, len(ids)))
        repetitions = -(-int(order["consumed"]) // max(1, len(ids)))
        again = ids_digest((ids * repetitions)[: int(order["consumed"])])
        check.equal(place, "expected_digest", order["expected_digest"], again)


def check_keys(checks: Checks, root: Path, keys: Mapping[Path, Callable[[], str]]) -> None:
    """The keys in the manifests of published folders against those that recipe and inputs give now."""
    with checks.of("keys", str(root)) as check:
        compared = 0
        for folder, key in keys.items():
            if not (folder / MANIFEST).is_file():
                continue
            name = artifact_name(root, folder)
            try:
                wanted = key()
            except DAMAGE as error:
                lines = str(error).splitlines() or [type(error).__name__]
                check.wrong(name, f"its key cannot be worked out: {lines[0]}")
                continue
            is_same = read_manifest(folder).key == wanted
            problem = "made from other inputs than config.json and the folders before it name"
            check.require(is_same, f"{name}/{MANIFEST}", problem)
            compared += 1
        check.counted = f"{compared:,} folders were made from what is here" if compared else "absent"


def check_receipt(checks: Checks, root: Path) -> None:
    """What was pushed to the hub is the policy that is here."""
    receipt = root / "hub.json"
    if not receipt.is_file():
        return
    with checks.of("hub", receipt.name) as check:
        content = read_json(receipt)
        check.counted = f"pushed to {content['hub_id']}"
        wanted = digest(read_manifest(root / "policy").files)
        check.equal(receipt.name, "files", content["files"], wanted)
