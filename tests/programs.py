"""Programs that tests start."""

import os
import sys


def environment(**more: str) -> dict[str, str]:
    """This process's, in which Python finds the modules that this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}
