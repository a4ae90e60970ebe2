"""What a user touches: the handles `LLM` and `Client`, their parameters, results and errors.

The names are those of `cluster.api`, which imports torch and Ray. It is imported when the
first of them is asked for: `ringspan doctor` is to work where torch or Ray do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        # Modules of this package are in lower case, and are found without this.
        if name[:1].isupper() or name == "__all__":
            return getattr(importlib.import_module("cluster.api"), name)
        raise AttributeError(f"module 'cluster' has no attribute {name!r}")
