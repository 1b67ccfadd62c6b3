# SPDX-License-Identifier: Apache-2.0
"""Keeps what torch compiles from one run to the next, while a run's other temporary files go with it."""

import getpass
import os
import tempfile
from pathlib import Path

CACHE_ENV = "TORCHINDUCTOR_CACHE_DIR"


def compiled_code() -> dict[str, str]:
    """The variable that tells a run's processes where torch keeps compiled code: where this process would keep it.

    torch's own default is below the folder of temporary files, which is another for each run.
    """
    own = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return {CACHE_ENV: os.environ.get(CACHE_ENV) or str(own)}
