"""Published peaks of named GPUs, with the document that states each, for roofline arithmetic.

Dense rates only: datasheets print the rate with 2:4 sparsity first, and a dense network reaches half of it. Rates are for
products accumulated in float32, which is what an accurate inference uses; consumer cards run float16 accumulation twice as
fast. A peak is a bound, not a promise: good matrix kernels reach 60 to 80 % of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates in TFLOP/s (TOP/s for int8), dense; None = the hardware has no such unit. Bandwidth in GB/s.

    source     the document the numbers come from
    remark     what was derived and how; "" = every number stands in the source
    verified   False: a number was derived or is second-hand, and results say so
    """

    name: str
    label: str
    float32: float
    bfloat16: float
    fp8: float | None
    int8: float | None
    fp4: float | None
    bandwidth_gb_s: float
    source: str
    remark: str = ""
    verified: bool = True


_HALF = "dense = half of the sparse rate printed there"

GPUS: tuple[Gpu, ...] = (
    Gpu(
        "h100",
        "H100 SXM 80 GB",
        66.9,
        989.4,
        1978.9,
        1978.9,
        None,
        3350,
        "NVIDIA H100 Tensor Core GPU datasheet",
        _HALF,
    ),
    Gpu(
        "h100-pcie",
        "H100 PCIe 80 GB",
        51.2,
        756.5,
        1513.0,
        1513.0,
        None,
        2000,
        "NVIDIA H100 Tensor Core GPU datasheet",
        _HALF,
    ),
    Gpu(
        "h200",
        "H200 SXM 141 GB",
        66.9,
        989.4,
        1978.9,
        1978.9,
        None,
        4800,
        "NVIDIA H200 Tensor Core GPU datasheet",
        _HALF,
    ),
    Gpu(
        "b200",
        "B200 SXM 180 GB",
        75.0,
        2250,
        4500,
        4500,
        9000,
        8000,
        "NVIDIA DGX B200 datasheet, one GPU of eight",
        "an eighth of the system's rate, halved for dense; float32 is second-hand",
        verified=False,
    ),
    Gpu("a100", "A100 SXM 80 GB", 19.5, 312, None, 624, None, 2039, "NVIDIA A100 Tensor Core GPU datasheet"),
    Gpu(
        "rtx-4090",
        "GeForce RTX 4090",
        82.6,
        165.2,
        330.3,
        660.6,
        None,
        1008,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A",
    ),
    Gpu(
        "rtx-5090",
        "GeForce RTX 5090",
        104.8,
        209.5,
        419.0,
        838.0,
        1676,
        1792,
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A",
    ),
    Gpu("l4", "L4", 30.3, 121.0, 242.5, 242.5, None, 300, "NVIDIA L4 Tensor Core GPU datasheet", _HALF),
    Gpu("l40s", "L40S", 91.6, 362.05, 733, 733, None, 864, "NVIDIA L40S datasheet"),
    Gpu(
        "orin",
        "Jetson AGX Orin 64 GB",
        5.3,
        42.5,
        None,
        85.0,
        None,
        204.8,
        "NVIDIA Jetson AGX Orin Series Technical Brief",
        "GPU only, without the two DLA; int8 = half of 170 sparse TOPS, bfloat16 = half of int8",
        verified=False,
    ),
    Gpu(
        "thor",
        "Jetson AGX Thor (T5000)",
        8.0,
        258.8,
        517.5,
        517.5,
        1035,
        273,
        "NVIDIA Jetson Thor Series Modules datasheet",
        "from 2,070 sparse FP4 TFLOPS by halving: sparse -> dense -> FP8 -> bfloat16; float32 and int8 are estimates",
        verified=False,
    ),
)


def find_gpu(name: str) -> Gpu:
    """Look up a GPU by its short name. Raises ConfigError that lists the known ones."""
    wanted = name.lower().replace("_", "-").removeprefix("jetson-").removeprefix("agx-")
    for gpu in GPUS:
        if wanted in (gpu.name, gpu.name.replace("rtx-", "")):
            return gpu
    raise ConfigError("unknown GPU", got=repr(name), wanted=f"one of {[gpu.name for gpu in GPUS]}")


def match_gpu(device_name: str | None) -> Gpu | None:
    """Which row a driver's device name ("NVIDIA H100 80GB HBM3") means; None when no row is meant with certainty."""
    text = (device_name or "").lower()
    if "laptop" in text or "mig" in text.split():
        return None
    if "h100" in text:
        return find_gpu("h100-pcie" if "pcie" in text else "h100") if "nvl" not in text else None
    if "a100" in text:
        return find_gpu("a100") if "sxm" in text and "80gb" in text else None
    for key, row in (
        ("h200", "h200"),
        ("b200", "b200"),
        ("rtx 4090", "rtx-4090"),
        ("rtx 5090", "rtx-5090"),
        ("l40s", "l40s"),
        ("nvidia l4", "l4"),
        ("orin", "orin"),
        ("thor", "thor"),
    ):
        if key in text:
            return (
                None if (key == "nvidia l4" and "l40" in text) or "gb200" in text or "4090 d" in text else find_gpu(row)
            )
    return None
