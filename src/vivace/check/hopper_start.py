"""The process whose start and memory are measured: `... -m vivace.check.hopper_start SETTING SEED OUTLIERS one|all [PLAN]`.

Draws the network on the GPU, quantises it, captures the setting's graphs and answers one request; with "all" it then
captures every bucket that a prompt of up to 200 tokens can fall into. Prints when each was done, in seconds since 1970, and
its memory, with the graphs of one bucket and with all.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from ..config import EngineConfig, ModelConfig
from ..precision import plan as plans
from .hopper_engines import OURS, make, policy_of
from .hopper_machine import serving_peaks
from .hopper_robot import Scenes, pipeline, request, toy_tokenizer
from .hopper_rows import kv_bytes
from .hopper_weights import load, random_checkpoint
from .targets import parse_size

LONGEST_PROMPT = 200


def main(arguments: list[str]) -> None:
    """See the module."""
    imported = time.time()
    size, seed, outliers = parse_size(arguments[0]), int(arguments[1]), int(arguments[2])
    every = arguments[3] == "all"
    plan = plans.read(Path(arguments[4])) if len(arguments) > 4 else None
    config = ModelConfig()
    checkpoint = random_checkpoint(config, seed=seed, outliers=outliers)
    network = load(checkpoint, device=torch.device("cuda"), precision="bfloat16")
    torch.cuda.synchronize()
    loaded = time.time()
    engine = make(OURS, network, plan=plan, config=EngineConfig(num_denoise_steps=10), in_place=True)
    pipe = pipeline(size, config, toy_tokenizer(config.vocab_size))
    policy = policy_of(engine, size, pipe, checkpoint)
    one = request(pipe, size, Scenes.make(1, views=3, image_size=config.vision.image_size, seed=seed), 0)
    policy.infer(one)
    first = time.time()
    peak_start = torch.cuda.max_memory_allocated()
    needed = engine.weights_bytes + kv_bytes(config, size)
    one_bucket = serving_peaks(lambda: policy.infer(one), needed=needed)
    times = {"imported_s": imported, "weights_s": loaded, "first_action_s": first}
    peaks = one_bucket
    if every:
        again = time.time()  # what was spent on looking at the memory is no part of the start
        policy.warmup([length for _, length in engine.backend.warm_shapes(LONGEST_PROMPT, views=[size.views])])
        times["every_bucket_s"] = first + (time.time() - again)
        peaks = serving_peaks(lambda: policy.infer(one), needed=needed)
    buckets = len(engine.backend.describe()["buckets"])
    facts = {"weights_bytes": engine.weights_bytes, "kv_bytes": kv_bytes(config, size), "needed_bytes": needed}
    memory = {
        "peak_start_bytes": peak_start,
        **peaks,
        "one_bucket": one_bucket,
        "buckets": buckets,
        **facts,
        "precision": engine.precision,
    }
    print(json.dumps({"times": times, "memory": memory}))


if __name__ == "__main__":
    main(sys.argv[1:])
