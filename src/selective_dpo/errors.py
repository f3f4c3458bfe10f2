"""The mistakes a user can mend. Each is one clear line with the remedy; the command line exits with 2."""

from __future__ import annotations

from collections.abc import Iterable


class SelectiveDPOError(Exception):
    """Base of every error that the user, not this package, has to mend."""


class ConfigError(SelectiveDPOError):
    """A recipe, flag or argument is wrong, unknown, contradictory or without effect."""


class DataError(SelectiveDPOError):
    """Preference data cannot be read, or too little of it is left to work with."""


class TemplateError(DataError):
    """The chat template and the tokenizer do not give a usable prompt/completion boundary."""


class ModelError(SelectiveDPOError):
    """The model or tokenizer cannot be loaded, or cannot do what the recipe asks of it."""


class ArtifactError(SelectiveDPOError):
    """A published file is missing, incomplete, of another schema, or not what its digest says."""


class IdentityError(SelectiveDPOError):
    """Ids that should match one to one do not: missing, extra or repeated ones are named."""


class RecordsError(SelectiveDPOError):
    """Held-out records are incomplete or not finite where a complete set is needed."""


class RunChangedError(SelectiveDPOError):
    """The recipe differs from the one that the run directory was made with."""


class PublishError(SelectiveDPOError):
    """The result is complete on disk but could not be sent to where the recipe wants it."""


def name_some(items: Iterable[object], limit: int = 5) -> str:
    """The first `limit` items, comma-separated, and how many more there are."""
    listed = [str(item) for item in items]
    shown = ", ".join(listed[:limit])
    more = len(listed) - limit
    return f"{shown} and {more:,} more" if more > 0 else shown
