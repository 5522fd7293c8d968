"""Speeds and memory of chips, from their makers' data sheets, for plans and utilisation."""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ChipSpec:
    """One jax device.

    Attributes:
      name: the chip's usual name.
      peak_flops: peak speed with dense bfloat16, in FLOP/s.
      hbm_bytes: device memory; drivers and compilers keep some percent of it for themselves.
      hbm_bandwidth: bandwidth of that memory, in bytes/s.
      ici_bandwidth: bandwidth to the neighbouring chips, in one direction over all links, in bytes/s (ICI or
        NVLink; PCIe where there is neither).
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float


# TPUs: docs.cloud.google.com/tpu/docs/<name>: peak compute per chip (bf16), HBM, and half of the
# bidirectional inter-chip interconnect bandwidth. jax sees each of TPU7x's two TensorCores as a device,
# with half of the chip's memory.
# GPUs: NVIDIA's data sheets: BFLOAT16 Tensor Core without sparsity (which doubles it), GPU memory,
# and half of the NVLink or PCIe bandwidth, which is given for both directions together.
_SPECS = {
    "TPU v4": ChipSpec("TPU v4", 275e12, 32 * _GIB, 1200e9, 300e9),
    "TPU v5 lite": ChipSpec("TPU v5e", 197e12, 16 * _GIB, 819e9, 200e9),
    "TPU v5": ChipSpec("TPU v5p", 459e12, 95 * _GIB, 2765e9, 600e9),
    "TPU v6 lite": ChipSpec("TPU v6e", 918e12, 32 * _GIB, 1640e9, 400e9),
    "TPU7x": ChipSpec("TPU7x (one of two cores)", 2307e12 / 2, 96 * _GIB, 7380e9 / 2, 600e9 / 2),
    "NVIDIA A100-SXM4-40GB": ChipSpec("A100 40GB", 312e12, 40 * _GIB, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": ChipSpec("A100 80GB", 312e12, 80 * _GIB, 2039e9, 300e9),
    "NVIDIA A100 80GB PCIe": ChipSpec("A100 80GB PCIe", 312e12, 80 * _GIB, 1935e9, 32e9),
    "NVIDIA H100 80GB HBM3": ChipSpec("H100", 989.5e12, 80 * _GIB, 3350e9, 450e9),
    "NVIDIA H100 PCIe": ChipSpec("H100 PCIe", 756e12, 80 * _GIB, 2000e9, 64e9),
    "NVIDIA H200": ChipSpec("H200", 989.5e12, 141 * 10**9, 4800e9, 450e9),
    "NVIDIA L4": ChipSpec("L4", 121e12, 24 * _GIB, 300e9, 32e9),
}
_OTHER_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite", "TPU7": "TPU7x"}


def spec(device_kind: str) -> ChipSpec | None:
    """Returns the data sheet of a device.

    Args:
      device_kind: jax's `device.device_kind`, "TPU v5 lite" or "NVIDIA H200" for instance.

    Returns:
      The data sheet; None for an unknown device, and for every CPU.
    """
    return _SPECS.get(_OTHER_NAMES.get(device_kind, device_kind))
