"""Environment variables that are switches."""

import os


def is_on(name: str) -> bool:
    """Whether Dynamo takes the variable for a yes, too."""
    return os.environ.get(name, "").strip().lower() in ("1", "true", "on", "yes")
