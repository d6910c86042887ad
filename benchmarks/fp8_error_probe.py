"""Where the error of E4M3 comes from, on full-size random weights: weights or activations, which part, and how much of it a
static centre would take away (x = c + r, of which only r is rounded, and c W^T is a bias).

    PYTHONPATH=src python benchmarks/fp8_error_probe.py --out results.json

Everything is simulated in float32 with reference operations, so nothing but the rounding to E4M3 differs from the truth.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gpu_probe
import torch
from torch import Tensor, nn

from vivace.backends import eager
from vivace.checkpoints import random_values
from vivace.config import EngineConfig, ModelConfig
from vivace.model.pi import Pi
from vivace.ops.table import reference_ops
from vivace.precision import quantize
from vivace.precision.calibrate import READERS
from vivace.precision.flavours import parameter_dtype

PARTS = {"vision": r"vision\.layers", "prefix": r"prefix\.layers", "expert": r"expert\.layers",
         "all": r"(vision|prefix|expert)\.layers"}  # fmt: skip


def canonical_model(config: ModelConfig, outliers: int, device: str = "cuda") -> Pi:
    """The distribution of `vivace make-checkpoint`, drawn on the device; packed layers get their parts' own loud rows."""
    with torch.device("meta"):
        model = Pi(config)
    for path, meta in list(model.named_parameters()):
        name = path.replace(".qkv", ".attn.qkv").replace("vision.position", "vision.position.weight")
        name = name.replace(".o.weight", ".attn.o.weight").replace(".down.", ".mlp.down.").replace(".fc2.", ".mlp.fc2.")
        name = re.sub(r"\.(attn|mlp)\.(attn|mlp)\.", r".\1.", name)
        name = "embedding.weight" if path == "embedding" else name
        center, scale = random_values.distribution(name, tuple(meta.shape))
        g = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()))
        value = torch.randn(meta.shape, generator=g, device=device) * scale + center
        loud = random_values.outlier_channels(name, meta.shape[0], seed=0, outliers=outliers)
        value[torch.from_numpy(loud).to(device)] *= random_values.OUTLIER_GAIN
        dtype = parameter_dtype(name, precision="bfloat16", flavour="openpi_torch")
        owner = model.get_submodule(path.rpartition(".")[0])
        setattr(owner, path.rpartition(".")[2], nn.Parameter(value.to(dtype).float(), requires_grad=False))
    return model.eval()


class Statistics:
    """Mean and extremes per input channel of every linear, over all it sees; and the share of the mean in the energy."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.energy: dict[str, Tensor] = {}
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        seen = name in self.total
        self.total[name] = x.sum(0, dtype=torch.float64) + (self.total[name] if seen else 0)
        self.energy[name] = x.double().square().sum() + (self.energy[name] if seen else 0)
        self.count[name] = x.shape[0] + self.count.get(name, 0)
        self.low[name] = torch.minimum(x.amin(0), self.low[name]) if seen else x.amin(0)
        self.high[name] = torch.maximum(x.amax(0), self.high[name]) if seen else x.amax(0)

    def centre(self, name: str) -> Tensor:
        return (self.total[name] / self.count[name]).float()

    def mean_share(self, name: str) -> float:
        return float((self.total[name] / self.count[name]).square().sum() / (self.energy[name] / self.count[name]))


def rounded(x: Tensor, amax: Tensor | float) -> Tensor:
    """x through E4M3 under a static scale and back."""
    scale = amax / 448.0
    return (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale


def simulated(model: Pi, statistics: Statistics, part: str, *, weights: bool, activations: bool, centred: bool) -> Any:
    """Change the float32 model to a simulated plan; returns a function that undoes it."""
    undo: list[Callable[[], None]] = []
    chosen = {}
    for _, _, layer in quantize.linears(model):
        if not re.match(PARTS[part], layer.name) or layer.name not in statistics.total:
            continue
        centre = statistics.centre(layer.name) if centred else torch.zeros_like(statistics.centre(layer.name))
        spread = torch.maximum(statistics.high[layer.name] - centre, centre - statistics.low[layer.name])
        chosen[layer.name] = (centre, float(spread.amax()))
        if weights:
            before, bias = layer.weight.data, layer.bias
            codes, scale = quantize.quantise_weight(before, "channel")
            layer.weight.data = codes.float() * scale[:, None]
            if centred:
                lost = (before - layer.weight.data) @ centre
                layer.bias = nn.Parameter(lost if bias is None else bias.data + lost, requires_grad=False)
            undo.append(lambda layer=layer, before=before, bias=bias: (
                setattr(layer.weight, "data", before), setattr(layer, "bias", bias)))  # fmt: skip
    table = reference_ops()

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, layer: Any, *rest: Any) -> Any:
            if activations and layer.name in chosen:
                centre, amax = chosen[layer.name]
                x = rounded(x - centre, amax) + centre
            return operation(x, layer, *rest)

        return call

    model.ops = replace(table, **{name: wrap(getattr(table, name)) for name in READERS})
    return lambda: [step() for step in undo] and setattr(model, "ops", table)


@torch.no_grad()
def study(model: Pi, settings: list[str]) -> dict[str, Any]:
    config, engine = ModelConfig(), EngineConfig(num_denoise_steps=10)
    run = lambda inputs, noise: (b := eager.create(model, engine)).denoise(b.prefill(inputs), noise)  # noqa: E731
    statistics, table = Statistics(), reference_ops()

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, layer: Any, *rest: Any) -> Any:
            statistics.see(layer.name, x)
            return operation(x, layer, *rest)

        return call

    model.ops = replace(table, **{name: watched(getattr(table, name)) for name in READERS})
    for seed in (201, 202):
        run(*gpu_probe.request(gpu_probe.SETTINGS[settings[0]], config, seed))
    model.ops = table
    requests = [gpu_probe.request(gpu_probe.SETTINGS[s], config, seed) for s in settings for seed in (7, 8)]
    truth = [run(*request) for request in requests]
    report: dict[str, Any] = {
        "moved_from_noise": [gpu_probe.error(n, t) for (_, n), t in zip(requests, truth, strict=True)]
    }
    shares = {name: statistics.mean_share(name) for name in statistics.total}
    for kind in ("qkv", "attn.o", "gate_up", "down", "fc1", "fc2"):
        for part in ("vision", "prefix", "expert"):
            found = [v for k, v in shares.items() if k.startswith(part) and kind in k]
            if found:
                report[f"mean share {part} {kind}"] = [
                    round(found[0], 3),
                    round(sorted(found)[len(found) // 2], 3),
                    round(found[-1], 3),
                ]
    for part in PARTS:
        for label, how in {
            "W": {"weights": True, "activations": False, "centred": False},
            "A": {"weights": False, "activations": True, "centred": False},
            "WA": {"weights": True, "activations": True, "centred": False},
            "WA centred": {"weights": True, "activations": True, "centred": True},
        }.items():
            undo = simulated(model, statistics, part, **how)
            outs = [run(*request) for request in requests]
            undo()
            model.ops = table
            errors = [gpu_probe.error(o, t) for o, t in zip(outs, truth, strict=True)]
            cosines = [
                float(torch.nn.functional.cosine_similarity(o.flatten(), t.flatten(), dim=0))
                for o, t in zip(outs, truth, strict=True)
            ]
            report[f"{part} {label}"] = {
                "error": [round(e, 4) for e in errors],
                "cosine": [round(c, 5) for c in cosines],
            }
            print(part, label, report[f"{part} {label}"], flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": gpu_probe.environment()}
    for name in ("make-checkpoint, 8 outliers", "probe"):
        begin = time.perf_counter()
        model = gpu_probe.random_model(ModelConfig()).float() if name == "probe" else canonical_model(ModelConfig(), 8)
        report[name] = study(model, ["3,200,50"] if name == "probe" else ["3,200,50", "2,48,10"])
        print(
            name,
            json.dumps({k: v for k, v in report[name].items() if "share" in k or "moved" in k}),
            time.perf_counter() - begin,
            flush=True,
        )
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
