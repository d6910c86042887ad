"""FLOPs and bytes against the independently worked out table for pi0 and pi0.5, and against a literal count of weights."""

import pytest
import torch

from vivace.check.gpus import GPUS, find_gpu, match_gpu
from vivace.check.roofline import Workload, prefix_tokens, stage_costs, stage_floors
from vivace.config import ModelConfig
from vivace.errors import ConfigError
from vivace.model.pi import Pi

# views, prompt tokens, S, vision GFLOP, prefix GFLOP, K/V MB, pi0 step, pi0.5 step chunk 50, chunk 10 (GFLOP)
TABLE = [
    (1, 48, 304, 220, 1152, 5.60, 34.1, 33.8, 6.7),
    (1, 200, 456, 220, 1737, 8.40, 35.2, 34.9, 6.9),
    (2, 48, 560, 440, 2141, 10.32, 36.0, 35.7, 7.1),
    (2, 200, 712, 440, 2737, 13.12, 37.1, 36.8, 7.3),
    (3, 48, 816, 661, 3149, 15.04, 37.9, 37.5, 7.5),
    (3, 200, 968, 661, 3756, 17.84, 39.0, 38.7, 7.7),
]


def costs(kind, views, tokens, horizon, steps=1, precision="bfloat16"):
    return stage_costs(ModelConfig(kind=kind), Workload(views, tokens, horizon, steps), precision=precision)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} views, {row[1]} tokens")
def test_table_of_flops_and_bytes(row):
    views, tokens, length, vision_gf, prefix_gf, cache_mb, pi0_gf, pi05_gf, chunk10_gf = row
    vision, prefix, denoise = costs("pi05", views, tokens, 50)
    assert prefix_tokens(ModelConfig(), Workload(views, tokens, 50)) == length
    assert vision.flops / 1e9 == pytest.approx(vision_gf, abs=0.6)
    assert prefix.flops / 1e9 == pytest.approx(prefix_gf, abs=0.6)
    assert prefix.cache_bytes / 1e6 == pytest.approx(cache_mb, abs=0.006)
    assert denoise.flops / 1e9 == pytest.approx(pi05_gf, abs=0.06)
    assert costs("pi05", views, tokens, 10)[2].flops / 1e9 == pytest.approx(chunk10_gf, abs=0.06)
    assert costs("pi0", views, tokens, 50)[2].flops / 1e9 == pytest.approx(pi0_gf, abs=0.06)


def test_attention_is_the_part_that_has_no_weights():
    """Twice the tokens: products double, attention of the prefix grows fourfold."""
    config = ModelConfig()
    products = 2 * 968 * (17 * 2048 * (2 * 2048 + 2 * 256 + 3 * 16384) + 2 * 2048 * 256)
    _, prefix, denoise = costs("pi05", 3, 200, 50, steps=10)
    assert prefix.flops - prefix.attention_flops == products
    assert prefix.attention_flops == 17 * 4 * 968 * 968 * 8 * 256
    assert denoise.attention_flops == 10 * config.expert.layers * 4 * 50 * (968 + 50) * 8 * 256
    vision = costs("pi05", 3, 200, 50)[0]
    assert vision.attention_flops == 3 * config.vision.layers * 4 * 256 * 256 * 1152


def test_table_of_weight_bytes():
    vision, prefix, denoise = costs("pi05", 3, 0, 50)
    assert vision.weight_bytes / 1e6 == pytest.approx(825 + 5, abs=1)
    assert prefix.weight_bytes / 1e6 == pytest.approx(3746, abs=1)
    assert denoise.weight_bytes / 1e6 == pytest.approx(623 + 0.22, abs=0.5)
    assert costs("pi05", 3, 0, 50, precision="float32")[1].weight_bytes == 2 * prefix.weight_bytes
    assert costs("pi05", 3, 0, 50, precision="fp8")[1].weight_bytes == prefix.weight_bytes / 2


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_weights_are_those_of_the_network(kind):
    """Every parameter that an inference reads is counted once; the modulation linears are replaced by a table."""
    config = ModelConfig(kind=kind)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Pi(config).named_parameters()}
    vision = sum(n for name, n in sizes.items() if name.startswith(("vision.", "projector.")))
    counted = stage_costs(config, Workload(1, 0, 50, 1))
    assert counted[0].weight_bytes == 2 * vision
    prefix = sum(n for name, n in sizes.items() if name.startswith("prefix.") and "norm" not in name)
    assert counted[1].weight_bytes == 2 * prefix
    expert = sum(n for name, n in sizes.items() if name.startswith("expert.layers") and "norm" not in name)
    assert counted[2].weight_bytes / 2 == pytest.approx(expert, rel=0.011)  # + heads, time inputs, table


def test_work_grows_as_it_must():
    one, two = stage_costs(ModelConfig(), Workload(2, 40, 50, 5)), stage_costs(ModelConfig(), Workload(2, 40, 50, 10))
    assert two[2].flops == 2 * one[2].flops
    assert two[2].total_bytes == 2 * one[2].total_bytes
    assert two[0] == one[0]
    batch = stage_costs(ModelConfig(), Workload(2, 40, 50, 5, batch=3))
    assert batch[1].flops == 3 * one[1].flops
    assert batch[2].weight_bytes == one[2].weight_bytes  # weights are read once for the whole batch


def test_floors_against_the_worked_example_for_h100():
    floors = stage_floors(costs("pi05", 3, 200, 50, steps=10), find_gpu("h100"))
    assert [floor.floor_ms for floor in floors] == pytest.approx([0.67, 3.80, 1.91], abs=0.01)
    assert [floor.bound for floor in floors] == ["compute", "compute", "memory"]
    floors = stage_floors(costs("pi05", 2, 200, 50, steps=10), find_gpu("h100"))
    assert sum(floor.floor_ms for floor in floors) == pytest.approx(5.1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "wanted_ms", "within"),
    [("a100", 5.4, 0.1), ("rtx-4090", 10.7, 0.3), ("rtx-5090", 6.0, 0.2), ("thor", 40, 1.5), ("orin", 53, 2)],
)
def test_bandwidth_floors_of_other_gpus(name, wanted_ms, within):
    floors = stage_floors(costs("pi05", 2, 200, 50, steps=10), find_gpu(name))
    assert sum(floor.memory_ms for floor in floors) == pytest.approx(wanted_ms, abs=within)


def test_a_precision_the_hardware_lacks_is_an_error():
    with pytest.raises(ConfigError, match=r"A100.*fp8"):
        stage_floors(costs("pi05", 2, 48, 50, precision="fp8"), find_gpu("a100"), precision="fp8")
    with pytest.raises(ConfigError, match="precision"):
        costs("pi05", 2, 48, 50, precision="int3")
    with pytest.raises(ConfigError, match="at least one"):
        costs("pi05", 0, 48, 50)


def test_gpus_carry_sources_and_consistent_rates():
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert "NVIDIA" in gpu.source
        assert gpu.verified or gpu.remark, f"{gpu.name}: an unverified number must say how it was derived"
        assert gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.bfloat16, rel=0.02)
        assert gpu.fp4 is None or gpu.fp4 == pytest.approx(2 * gpu.fp8, rel=0.01) or gpu.name == "rtx-5090"


@pytest.mark.parametrize(
    ("driver", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA Thor", "thor"),
        ("NVIDIA GB200", None),
        ("", None),
        (None, None),
    ],
)
def test_device_names_are_matched_only_with_certainty(driver, row):
    found = match_gpu(driver)
    assert (found.name if found else None) == row


def test_unknown_gpu_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"h100.*thor"):
        find_gpu("tpu")
    assert find_gpu("Jetson_AGX_Thor").name == "thor"
    assert find_gpu("4090").name == "rtx-4090"
