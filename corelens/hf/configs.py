"""Where a model came from, as its config remembers it."""

from typing import Any


def source_of(config: Any) -> str:
    """The Hub name or the folder that a config was loaded from; "" for one made by hand."""
    return str(getattr(config, "_name_or_path", "") or "")


def revision_of(config: Any) -> str | None:
    """The commit on the Hub that a config was loaded from; None for a folder."""
    return getattr(config, "_commit_hash", None)
