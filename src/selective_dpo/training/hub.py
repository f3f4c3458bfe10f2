"""Sending a finished policy to the hub. The local result is complete before, and stays whatever happens."""

from __future__ import annotations

from pathlib import Path

from selective_dpo.artifacts import read_json, read_manifest, write_json
from selective_dpo.config import TrainConfig
from selective_dpo.digests import digest
from selective_dpo.errors import PublishError


def push_policy(policy: Path, receipt: Path, config: TrainConfig) -> bool:
    """Upload the folder `policy` to `config.hub_id`, unless `receipt` says that was done with these files.

    Returns whether it was uploaded now.

    Raises:
        PublishError: the hub refused or could not be reached; running the command again tries again.
    """
    content = {"hub_id": config.hub_id, "files": digest(read_manifest(policy).files)}
    if receipt.is_file() and read_json(receipt) == content:
        return False
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(config.hub_id, private=config.hub_private, exist_ok=True)
        api.upload_folder(repo_id=config.hub_id, folder_path=policy)
    except Exception as error:
        # The hub's client raises many kinds (network, authorization, names): all mean "not sent".
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PublishError(
            f"the policy is complete in {policy}, but was not pushed to {config.hub_id} ({reason[:200]}); "
            "run the same command again to push it"
        ) from error
    write_json(receipt, content)
    return True
