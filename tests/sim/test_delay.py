"""What a delay means, tick by tick: an action's value is the tick that it was planned for."""

from __future__ import annotations

import numpy as np
import pytest
from toy import HZ, Chunk, Line, clock, follow

from vivace.errors import ConfigError, NumericsError, ShapeError
from vivace.sim.episode import HELD, expected_reaction_ticks, hand_velocity_jumps, reaction_ticks, rms_jerk
from vivace.sim.faults import blanked
from vivace.sim.rollout import Execution, rollout, ticks

WAIT = -1000.0
DELAYS = (0, 1, 3, 8, 11)


def run(mode, delay, *, horizon=40, execute=8, policy=clock, env=None, **kwargs):
    execution = Execution(mode, execute_ticks=execute, delay_ticks=delay)
    return rollout(env or Line(), policy(horizon), seed=0, execution=execution, **kwargs)


@pytest.mark.parametrize("delay", DELAYS)
def test_aligned_plays_the_action_of_the_present_tick(delay):
    values = run("aligned", delay).actions[:, 0]
    assert values[:delay].tolist() == [WAIT] * delay  # nothing to do before the first answer
    assert values[delay:].tolist() == list(range(delay, 60))


@pytest.mark.parametrize("delay", DELAYS)
def test_naive_plays_everything_one_delay_late(delay):
    values = run("naive", delay).actions[:, 0]
    assert values[:delay].tolist() == [WAIT] * delay
    assert values[delay:].tolist() == list(range(60 - delay))


@pytest.mark.parametrize("delay", DELAYS)
def test_pause_stands_still_for_the_delay_and_runs_eight(delay):
    values = run("pause", delay).actions[:, 0]
    cycle = delay + 8
    wanted = [WAIT if tick % cycle < delay else tick - delay for tick in range(60)]
    assert values.tolist() == wanted


@pytest.mark.parametrize(("delay", "looks"), [(0, 8), (5, 8), (8, 8), (11, 11)])
@pytest.mark.parametrize("mode", ["naive", "aligned"])
def test_a_look_every_execution_horizon_but_not_before_the_answer(mode, delay, looks):
    assert run(mode, delay).looks == tuple(range(0, 60, looks))


@pytest.mark.parametrize("mode", ["naive", "aligned"])
@pytest.mark.parametrize("delay", DELAYS)
def test_observation_age_runs_from_delay_to_delay_plus_period(mode, delay):
    age = run(mode, delay).age_ticks
    period = max(8, delay)
    assert age[:delay].tolist() == [HELD] * delay
    assert age[delay:].tolist() == [delay + tick % period for tick in range(60 - delay)]
    summary = run(mode, delay).summary()
    assert summary["observation_age_ms"]["mean"] == pytest.approx(age[delay:].mean() * 20)
    assert summary["held_ticks"] == delay


def test_a_chunk_that_is_too_short_starves_and_is_counted():
    episode = run("aligned", 3, horizon=6)
    held = episode.age_ticks == HELD
    assert episode.starved > 0
    assert held.sum() == episode.starved + 3
    assert (episode.actions[held, 0] == WAIT).all()


def test_drawn_delays_depend_on_the_seed_alone():
    drawn = [run("naive", (1, 2, 5)).delays for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {1, 2, 5}
    other = rollout(Line(), clock(40), seed=1, execution=Execution("naive", delay_ticks=(1, 2, 5)))
    assert other.delays != drawn[0]


def test_seams_show_how_far_two_chunks_are_apart():
    """Naive with changing delays: the plan jumps by the change of delay; aligned: chunks that agree have no seam."""
    episode = run("naive", (1, 2, 5))
    assert [seam.tick for seam in episode.seams] == [
        look + delay for look, delay in zip(episode.looks[1:], episode.delays[1:], strict=True) if look + delay < 60
    ]
    changes = np.abs(np.diff(episode.delays))
    assert [seam.apart for seam in episode.seams] == changes[: len(episode.seams)].tolist()
    assert {seam.apart for seam in run("aligned", (1, 2, 5)).seams} == {0.0}


@pytest.mark.parametrize("mode", ["pause", "naive", "aligned"])
@pytest.mark.parametrize("event", [16, 17, 23])
def test_reaction_is_the_wait_for_the_next_look_plus_the_delay(mode, event):
    for delay in DELAYS:
        changed = run(mode, delay, policy=follow, env=Line(event_tick=event))
        twin = run(mode, delay, policy=follow, env=Line(event_tick=event), options={"event": False})
        period = delay + 8 if mode == "pause" else max(8, delay)
        by_hand = -event % period + delay
        assert reaction_ticks(changed, twin, event_tick=event) == by_hand
        assert expected_reaction_ticks(changed, event_tick=event) == by_hand


def test_an_injected_delay_moves_the_reaction_by_exactly_that_much():
    reactions = []
    for delay in range(9):  # up to the execution horizon the looks stay where they are
        changed = run("aligned", delay, policy=follow, env=Line(event_tick=18))
        twin = run("aligned", delay, policy=follow, env=Line(event_tick=18), options={"event": False})
        reactions.append(reaction_ticks(changed, twin, event_tick=18))
    assert reactions == [6 + delay for delay in range(9)]


def test_only_a_look_makes_images():
    env = Line()
    episode = run("naive", 3, env=env)
    assert env.looked == len(episode.looks) == 8
    run("naive", 3, env=env, images=False)
    assert env.looked == 8


def test_blanked_images_reach_the_policy_black():
    seen = []
    rollout(Line(length=3), blanked(lambda o: seen.append(o.views["base"]) or Chunk(np.zeros((4, 2)))), seed=0)
    assert seen
    assert not np.any(seen)


def test_latencies_become_delays_by_rounding_up():
    assert ticks([0.0, 0.1, 19.9, 20.0, 20.1, 40.0, 1000.0], HZ) == (0, 1, 1, 1, 2, 2, 50)


def test_a_jump_of_the_hand_is_one_of_velocity():
    """At rest, then 1 cm a tick at 50 Hz: from 0 to 0.5 m/s and back."""
    path = np.zeros((6, 3))
    path[3:, 1] = [0.01, 0.02, 0.02]
    assert hand_velocity_jumps(path, 50.0) == pytest.approx([0, 0.5, 0, 0.5])


def test_jerk_of_a_cubic_is_its_third_derivative():
    time = np.arange(50) / HZ
    assert rms_jerk(np.stack([2 * time**3, 0 * time, time**2], axis=1), HZ) == pytest.approx(12.0)
    assert rms_jerk(np.zeros((3, 3)), HZ) is None


# --- committed actions, the real clock, watching ---------------------------------------------------------------------


def told(mode, delay, *, horizon=40, **kwargs):
    """Every look as (tick of the committed actions' first value or None, how many); the policy is `clock`."""
    seen = []

    def policy(observation):
        seen.append((None, 0))
        return clock(horizon)(observation)

    def continuing(observation, committed):
        seen.append((committed.actions[0, 0], committed.ticks))
        assert len(committed.actions) == committed.ticks
        return clock(horizon)(observation)

    execution = Execution(mode, execute_ticks=8, delay_ticks=delay)
    episode = rollout(Line(), policy, seed=0, execution=execution, continuing=continuing, **kwargs)
    return episode, seen


def test_committed_actions_begin_at_the_look_and_last_for_the_delay():
    episode, seen = told("aligned", 3)
    assert seen == [(None, 0), *[(tick, 3) for tick in episode.looks[1:]]]


def test_committed_actions_end_where_the_chunk_does():
    """Chunks of 10: at the look at tick 8 two actions are left, for a delay of 3."""
    episode, seen = told("aligned", 3, horizon=10)
    assert seen[1] == (8.0, 2)
    assert episode.starved > 0


@pytest.mark.parametrize(("mode", "delay"), [("naive", 3), ("pause", 3), ("aligned", 0)])
def test_nothing_is_committed_without_a_delay_or_alignment(mode, delay):
    assert {count for _, count in told(mode, delay)[1]} == {0}


def test_the_real_clock_adds_what_the_inference_took(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vivace.sim.rollout.time.perf_counter", lambda: now[0])
    waits = [0.005, 0.030, 0.075]

    def slow(observation):
        now[0] += waits[min(len(taken), 2)]
        taken.append(1)
        return clock(60)(observation)

    taken = []
    execution = Execution("aligned", 8, delay_ticks=1, measured=True)
    episode = rollout(Line(), slow, seed=0, execution=execution)
    assert episode.delays[:4] == (1 + 1, 1 + 2, 1 + 4, 1 + 4)
    assert episode.inference_ms[:3] == pytest.approx([5.0, 30.0, 75.0])


def test_a_watcher_sees_every_tick_and_changes_nothing():
    seen = []
    watched = run("aligned", 3, watch=seen.append)
    assert np.array_equal(watched.actions, run("aligned", 3).actions)
    assert [one.tick for one in seen] == list(range(60))
    assert [one.age_ticks for one in seen] == watched.age_ticks.tolist()
    assert [(one.chunk, one.index) for one in seen[2:5]] == [(0, None), (1, 3), (1, 4)]
    assert (seen[11].chunk, seen[11].index) == (2, 3)


def test_plans_that_lie_apart_are_as_far_apart_as_they_lead():
    """Naive, delay changed from 1 to 2 or 5: the plans differ by a constant, which adds up over the execution horizon."""
    seams = run("naive", (1, 2, 5)).seams
    assert all(seam.ahead == pytest.approx(8 * seam.apart) for seam in seams)
    assert any(seam.ahead for seam in seams)


def test_an_action_that_is_no_number_is_named():
    chunk = np.zeros((4, 2))
    chunk[2, 1] = np.inf
    with pytest.raises(NumericsError, match="action 2, dim 1"):
        rollout(Line(), lambda _: Chunk(chunk), seed=0)


def test_bad_settings_and_chunks_are_named():
    with pytest.raises(ConfigError, match="execution mode"):
        Execution("asap")
    with pytest.raises(ConfigError, match="delay_ticks"):
        Execution(delay_ticks=())
    with pytest.raises(ConfigError, match="delay_ticks"):
        Execution(delay_ticks=-1)
    with pytest.raises(ConfigError, match="execute_ticks"):
        Execution(execute_ticks=0)
    with pytest.raises(ShapeError, match="actions of a chunk"):
        rollout(Line(), lambda _: Chunk(np.zeros((0, 2))), seed=0)
