# SPDX-License-Identifier: Apache-2.0
"""Prints, at each step of a soak, what only the trainer's process can count; ``scripts/soak.py`` has verl import it."""

import json

from verl_dvpo.health import Watch

_moved = Watch.moved


def moved(self: Watch, phase: str, step: int) -> None:
    """Counts where a step begins: what is left of the step before."""
    _moved(self, phase, step)
    if phase == "weight_transfer":
        import ray
        import transfer_queue as tq
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        found = {f"queue_entries/{name}": len(keys) for name, keys in (tq.kv_list() or {}).items()}
        store = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
        found["ray_objects/store"] = store.num_local_objects
        found["ray_mb/store"] = store.object_store_bytes_used / 2**20
        print("soak-probe", json.dumps(found), flush=True)


Watch.moved = moved  # type: ignore[method-assign]
