# SPDX-License-Identifier: Apache-2.0
"""GPUs by name: memory, peak and bandwidth."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: bytes, as its driver reports.
        flops: peak in bf16 with dense matrices, operations a second.
        bandwidth: of its memory, bytes a second.
    """

    memory: float
    flops: float
    bandwidth: float


MIB = 1024**2
#: Name -> memory that nvidia-smi reports, peak and bandwidth of the data sheet (docs/estimate.md). SXM boards.
GPUS = {
    "A100-40G": Gpu(40960 * MIB, 312e12, 1.555e12),
    "A100-80G": Gpu(81920 * MIB, 312e12, 2.039e12),
    "H100": Gpu(81559 * MIB, 989e12, 3.35e12),
    "H200": Gpu(143771 * MIB, 989e12, 4.8e12),
    "B200": Gpu(183359 * MIB, 2250e12, 8.0e12),
    "L40S": Gpu(46068 * MIB, 362e12, 0.864e12),
}


def find_gpu(name: str) -> Gpu:
    """Finds a GPU by its name, whatever its case.

    Raises:
        ValueError: no GPU of the table.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise ValueError(f"--gpu is {name!r}; {', '.join(GPUS)} are known; choose one of them")
