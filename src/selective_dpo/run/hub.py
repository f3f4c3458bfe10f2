"""The hub: a run's policy and its curriculum, each pushed once and linked to each other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from selective_dpo.curriculum.table import Curriculum
from selective_dpo.data.store import pairs_file
from selective_dpo.errors import ConfigError, PublishError
from selective_dpo.report.hub_dataset import write_hub_dataset
from selective_dpo.run.folder import RunDirectory
from selective_dpo.storage.artifacts import folder_digests, read_json, read_manifest, write_json
from selective_dpo.storage.digests import digest

POLICY, CURRICULUM = "hub.json", "hub-curriculum.json"
"""Receipts in the run's folder: where to, and digests of what was sent."""


def push_policy(run: RunDirectory, hub_id: str, *, private: bool) -> bool:
    """Upload the run's policy to `hub_id`, unless that was done with these files.

    Where the curriculum was pushed, the card names it. The local result is complete before, and stays
    whatever happens. Returns whether it was uploaded now.

    Raises:
        PublishError: the hub refused or could not be reached; running the command again tries again.
    """
    receipt, curriculum = run.root / POLICY, _pushed_to(run, CURRICULUM)
    content = {"hub_id": hub_id, "files": digest(read_manifest(run.policy).files)}
    content |= {"curriculum": curriculum} if curriculum else {}
    if receipt.is_file() and read_json(receipt) == content:
        return False
    card = _linked_card(run.policy / "README.md", curriculum) if curriculum else None
    told = f"the policy is complete in {run.policy}"
    _upload(run.policy, hub_id, "model", private=private, told=told, card=card)
    write_json(receipt, content)
    return True


def push_curriculum(
    run: RunDirectory, hub_id: str, *, private: bool, with_text: bool = False, licence: str = ""
) -> bool:
    """Upload the run's curriculum as a data set (see `report.hub_dataset`), unless that was done with it.

    A policy that was pushed before gets a card that names it. Returns whether it was uploaded now.

    Raises:
        ConfigError: texts are to be published and no licence is named.
        PublishError: as for `push_policy`.
    """
    if with_text and not licence:
        raise ConfigError("--with-text publishes other people's texts: name their licence with --license")
    curriculum = Curriculum.load(run.curriculum)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_hub_dataset(
            folder,
            curriculum,
            run=run.root,
            pairs=pairs_file(run.pairs) if with_text else None,
            repository=hub_id,
            licence=licence,
        )
        content = {"hub_id": hub_id, "files": digest(folder_digests(folder))}
        receipt = run.root / CURRICULUM
        is_new = not receipt.is_file() or read_json(receipt) != content
        if is_new:
            told = f"the curriculum is complete in {run.curriculum}"
            _upload(folder, hub_id, "dataset", private=private, told=told)
            write_json(receipt, content)
    if policy := _pushed_to(run, POLICY):
        push_policy(run, policy, private=private)
    return is_new


def _pushed_to(run: RunDirectory, receipt: str) -> str:
    path = run.root / receipt
    return str(read_json(path)["hub_id"]) if path.is_file() else ""


def _linked_card(path: Path, curriculum: str) -> bytes:
    from huggingface_hub import ModelCard

    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.datasets = [curriculum]
    card.text += f"\nThe curriculum: [{curriculum}](https://huggingface.co/datasets/{curriculum}).\n"
    return str(card).encode("utf-8")


def _upload(
    folder: Path,
    hub_id: str,
    kind: Literal["model", "dataset"],
    *,
    private: bool,
    told: str,
    card: bytes | None = None,
) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(hub_id, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, repo_type=kind)
        if card is not None:
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=hub_id, repo_type=kind)
    except Exception as error:
        # The hub's client raises many kinds (network, authorization, names): all mean "not sent".
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PublishError(
            f"{told}, but was not pushed to {hub_id} ({reason[:200]}); run the same command again to push it"
        ) from error
