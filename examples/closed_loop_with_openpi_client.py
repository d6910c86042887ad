"""Pick cubes off a moving belt, with every look answered by a policy server over openpi's unmodified client.

    python examples/closed_loop_with_openpi_client.py conveyor-small --delay-ms 0 100 --episodes 4 -o closed-loop.json

Starts `vivace serve`, plays the same seeds at each simulated inference delay, and stops the server. The world is simulated
and waits while the server answers: the delay is a number of control ticks during which the robot goes on with the older
chunk (aligned execution, docs/guides/simulation.md), so success does not depend on this machine. openpi's protocol carries
an observation and nothing else: what the robot will do meanwhile cannot be told to the policy over it. Afterwards a sample
of the requests is answered by the same policy in this process. Exit code 1: an answer differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from server_process import served

import vivace
from vivace.check import environment, results
from vivace.sim import scene, stored
from vivace.sim.arms import Arm, Delay
from vivace.sim.campaign import finished_row
from vivace.sim.conveyor import ConveyorEnv
from vivace.sim.outcomes import outcome
from vivace.sim.rollout import Simulator, rollout, ticks
from vivace.sim.tasks import SPEEDS_M_S
from vivace.types import Observation

Request = dict[str, Any]


class Client(Protocol):
    """What is used of openpi's client."""

    def infer(self, obs: Request) -> dict[str, Any]:
        """One request, one answer."""


@dataclass(frozen=True)
class Answer:
    """actions: float [H, 4], robot units."""

    actions: NDArray[Any]


@dataclass
class Robot:
    """The client's side: sends what it sees, and keeps one request in `keep_every` with its answer."""

    client: Client
    keep_every: int = 5
    round_trip_ms: list[float] = field(default_factory=list)
    model_ms: list[float] = field(default_factory=list)
    kept: list[tuple[Request, NDArray[Any]]] = field(default_factory=list)

    def ask(self, seen: Observation) -> Answer:
        """One look, answered over the network."""
        request, start = as_sent(seen), time.perf_counter()
        answer = self.client.infer(request)
        self.round_trip_ms.append((time.perf_counter() - start) * 1e3)
        self.model_ms.append(float(answer["policy_timing"]["infer_ms"]))
        if len(self.round_trip_ms) % self.keep_every == 1 % self.keep_every:
            self.kept.append((request, np.array(answer["actions"])))
        return Answer(answer["actions"])


def as_sent(seen: Observation) -> Request:
    """A look as a robot sends it; the keys are those of the embodiment `conveyor`."""
    return {
        "observation/image": seen.views["base_0_rgb"],
        "observation/wrist_image": seen.views["left_wrist_0_rgb"],
        "observation/image_before": seen.views["right_wrist_0_rgb"],
        "observation/state": seen.state,
        "prompt": seen.prompt,
    }


def play(robot: Robot, env: Simulator, arms: Sequence[Arm], *, seeds: range, engine: Any) -> list[dict[str, Any]]:
    """Every arm on the same seeds; one row for each arm, as `vivace simulate` writes it."""
    rows = []
    for arm in arms:
        episodes = []
        for seed in seeds:
            episode = rollout(env, robot.ask, seed=seed, execution=arm.execution)
            episodes.append(finished_row(episode))
            end = "success" if episode.success else "no success"
            print(
                f"{arm.delay.name}, seed {seed}: {end} after {len(episode.actions) / env.control_hz:.2f} s",
                file=sys.stderr,
            )
        found = outcome(arm, episodes, engine=engine)
        rows.append({**asdict(found), "arm": arm.named()})
    return rows


def differing(kept: Sequence[tuple[Request, NDArray[Any]]], policy: vivace.Policy) -> int:
    """How many answers are not, bit for bit, what the policy says alone to the same request."""
    return sum(not np.array_equal(answer, policy.infer(request).actions) for request, answer in kept)


def document(robot: Robot, arms: list[dict[str, Any]], *, wrong: int, seeds: range, engine: Any) -> dict[str, Any]:
    """The findings; `passed` is about the answers alone, how often the policy succeeds is only counted."""
    answers = {"received": len(robot.round_trip_ms), "compared": len(robot.kept), "differing": wrong}
    return {
        "passed": wrong == 0 and bool(robot.kept),
        "arms": arms,
        "answers": answers,
        "round_trip_ms": _percentiles(robot.round_trip_ms),
        "model_ms": _percentiles(robot.model_ms),
        "seeds": {"first": seeds.start, "n": len(seeds)},
        "simulator": scene.versions(),
        "boundary": "B3: websocket round trip on this machine, openpi-client in another process than the server",
        "remarks": ["time is simulated: the delay is the one named, whatever the round trip took"],
        "engine": engine,
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {**{f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 95)}, "max": round(max(values), 2)}


def closed_loop(args: argparse.Namespace) -> dict[str, Any]:
    """Serve, play, stop the server, compare."""
    arms = [
        Arm(
            args.task, args.belt, str(args.checkpoint),
            delay=Delay(f"{delay:g} ms", ticks([delay], scene.CONTROL_HZ)),
        )
        for delay in args.delay_ms
    ]  # fmt: skip
    seeds = range(args.seed, args.seed + args.episodes)
    size = stored.read(str(args.checkpoint)).image_px or 224
    env = ConveyorEnv(args.task, belt_m_s=SPEEDS_M_S[args.belt] if args.belt else None, image_px=size)
    try:
        with served(args.checkpoint, "--embodiment", "conveyor") as port:
            client = WebsocketClientPolicy(host="127.0.0.1", port=port)
            robot, engine = Robot(client), client.get_server_metadata()["vivace"]
            rows = play(robot, env, arms, seeds=seeds, engine=engine)
    finally:
        env.close()
    alone = vivace.load_policy(args.checkpoint, embodiment="conveyor")
    wrong = differing(robot.kept, alone)
    return document(robot, rows, wrong=wrong, seeds=seeds, engine=engine)


def main() -> int:
    """Command line; exit code 1 if an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a folder, or a policy that comes with vivace: conveyor-small")
    parser.add_argument("--task", default="conveyor")
    parser.add_argument("--belt", choices=list(SPEEDS_M_S), help="default: the task's own")
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0.0, 100.0])
    parser.add_argument("--episodes", type=int, default=4, help="at each delay")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.episodes < 1 or args.seed < 0 or min(args.delay_ms) < 0:
        parser.error("--episodes must be at least 1, --seed and --delay-ms at least 0")
    found = results.result("serve-closed-loop", closed_loop(args), environment=environment.collect())
    if args.output:
        results.write_result(args.output, found)
    shown = {key: found[key] for key in ("passed", "answers", "round_trip_ms", "model_ms")}
    shown["success"] = {arm["arm"]["delay"]["name"]: f"{arm['successes']} of {arm['n']}" for arm in found["arms"]}
    print(json.dumps(shown, indent=1), file=sys.stderr)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
