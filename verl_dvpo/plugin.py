# SPDX-License-Identifier: Apache-2.0
"""Registers this package with verl in every process of a run; ``import verl`` loads it.

verl imports this module from ``verl/__init__.py`` while that module is still running, and logs a failure at DEBUG only.
So nothing of verl is imported here: each change of ``verl_dvpo.compat`` waits for the module that it belongs to and
runs right after that module's first import. A failure is logged with its traceback at ERROR, and raised.
"""

import logging

logger = logging.getLogger("verl_dvpo")


def register() -> None:
    """Registers everything that verl should know of verl-dvpo; a second call changes nothing."""
    from hydra.core.plugins import Plugins

    from verl_dvpo.compat import apply
    from verl_dvpo.health import answer_with_stacks
    from verl_dvpo.hydra_plugin import VerlDvpoSearchPath

    Plugins.instance().register(VerlDvpoSearchPath)
    apply.install()
    answer_with_stacks()


try:
    register()
except BaseException:
    logger.exception("verl-dvpo could not be registered with verl; none of its algorithms will be found")
    raise
