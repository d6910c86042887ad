"""Examples, the step, resume; export and the served policy against the trained network."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vivace
from vivace.checkpoints.names import expected_shapes
from vivace.config import EngineConfig
from vivace.errors import CheckpointError, ConfigError, NumericsError
from vivace.model.pi import Pi
from vivace.robots.tokenizer import SentencePieceModel
from vivace.train import export, learner, objective
from vivace.train.config import Optimise, Recipe, build, read_recipe
from vivace.train.frames import Frames, statistics, ticks_left
from vivace.train.loop import Run, answering
from vivace.train.pieces import Piece
from vivace.train.simulator import Look
from vivace.train.tokenizer import conveyor_tokenizer, pieces
from vivace.types import ActionChunk, Observation

CPU = torch.device("cpu")
STATIC = [{"task": "static", "episodes": 1}]
NETWORK = {
    "vision": {"width": 16, "layers": 1, "mlp_width": 32, "num_heads": 2, "patch_size": 8, "image_size": 16},
    "prefix": {"width": 32, "layers": 2, "mlp_width": 32, "num_heads": 2, "head_dim": 16},
    "expert": {"width": 16, "layers": 2, "mlp_width": 32, "num_heads": 2, "head_dim": 16},
    "horizon": 4,
}
RECIPE = build(Recipe, {"network": NETWORK, "data": {"folder": "somewhere"}, "optimise": {
    "steps": 6, "batch": 4, "flows": 2, "warmup_steps": 2, "max_committed": 2}}, where="test")  # fmt: skip


def piece(rows: int = 6, *, seed: int = 0) -> Piece:
    """Labels at `rows` ticks, images at every second."""
    rng = np.random.default_rng(seed)
    ticks = np.arange(0, rows, 2)
    return Piece(
        ticks=ticks,
        views=rng.integers(0, 256, (len(ticks), 3, 16, 16, 3), dtype=np.uint8),
        state=rng.normal(size=(len(ticks), 7)).astype(np.float32),
        prompts=("pick up the red cube",) * len(ticks),
        executed=rng.uniform(-1, 1, (rows, 4)).astype(np.float32),
        chunk=rng.uniform(-1, 1, (rows, 4, 4)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def blob():
    return conveyor_tokenizer()


@pytest.fixture
def tokenizer(blob, tmp_path):
    (tmp_path / "t.model").write_bytes(blob)
    return SentencePieceModel(tmp_path / "t.model")


@pytest.fixture
def frames(tokenizer):
    return Frames([piece(seed=0), piece(seed=1)], tokenizer=tokenizer, width=8, max_tokens=48, device=CPU)


def test_targets_are_executed_actions_then_the_later_plan(frames):
    source = [piece(seed=0), piece(seed=1)]
    scale = lambda x: 2 * (x - frames.action_stats.q01) / (frames.action_stats.q99 - frames.action_stats.q01) - 1  # noqa: E731
    row = torch.tensor([4])  # second piece, tick 2
    got = frames.targets(row, torch.tensor([[0, 2]]))[0].numpy()
    assert np.allclose(got[0, :, :4], scale(source[1].chunk[2]), atol=1e-5)
    assert np.allclose(got[1, :2, :4], scale(source[1].executed[2:4]), atol=1e-5)
    assert np.allclose(got[1, 2:, :4], scale(source[1].chunk[4][:2]), atol=1e-5)
    assert (got[..., 4:] == 0).all()
    assert frames.left.tolist() == [5, 3, 1] * 2


def test_corrections_join_later_and_may_have_committed_actions_too(frames):
    before = len(frames)
    frames.add([piece(seed=2)])
    assert len(frames) == before + 3
    assert frames.left[before:].tolist() == [5, 3, 1]
    got = frames.targets(torch.tensor([before]), torch.tensor([[2]]))[0, 0, :2, :4].numpy()
    low, high = frames.action_stats.q01, frames.action_stats.q99
    assert np.allclose((got + 1) / 2 * (high - low) + low, piece(seed=2).executed[:2], atol=1e-5)
    images = frames.rows(torch.tensor([before + 1])).images[0, 2].numpy()
    assert (images == piece(seed=2).views[1, 2]).all()


def test_no_plan_for_a_new_instruction_continues_an_older_one():
    """Looks at 0, 2, 4 of 6 ticks; the cube that is named changes between the second and the third."""
    source = replace(piece(), prompts=("red", "red", "blue"))
    assert ticks_left(source).tolist() == [2, 0, 1]
    assert ticks_left(piece()).tolist() == [5, 3, 1]


def test_another_instruction_shares_the_picture(tokenizer):
    chunk = np.full((3, 4, 4), 0.25, np.float32)
    source = replace(piece(seed=0), other_prompts=("pick up the blue cube",) * 3, other_chunk=chunk)
    frames = Frames([source, piece(seed=1)], tokenizer=tokenizer, width=8, max_tokens=48, device=CPU)
    assert (len(frames), len(frames.views)) == (9, 6)
    mine, other = frames.rows(torch.tensor([1])), frames.rows(torch.tensor([4]))
    assert torch.equal(mine.images, other.images)
    assert (mine.tokens != other.tokens).sum() == 1
    assert frames.left.tolist() == [5, 3, 1, 0, 0, 0, 5, 3, 1]
    got = frames.targets(torch.tensor([4]), torch.tensor([[0]]))[0, 0, :, :4].numpy()
    low, high = frames.action_stats.q01, frames.action_stats.q99
    assert np.allclose((got + 1) / 2 * (high - low) + low, 0.25, atol=1e-5)
    assert torch.equal(frames.rows(torch.tensor([7])).images[0, 0], torch.from_numpy(piece(seed=1).views[1, 0]))


def test_statistics_refuse_a_constant_dimension():
    rows = np.random.default_rng(0).normal(size=(50, 3))
    assert statistics(rows).q99.shape == (3,)
    rows[:, 1] = 1.0
    with pytest.raises(ConfigError, match="normalised"):
        statistics(rows)


def test_a_run_cut_off_and_resumed_is_the_run_that_was_not(frames, tmp_path):
    config = RECIPE.network.model(544)
    whole = learner.Learner(config, RECIPE.optimise, device=CPU)
    for _ in range(4):
        whole.learn(*whole.draw(frames))
        if whole.step == 2:
            whole.save(tmp_path / "state.safetensors")
    again = learner.Learner(config, RECIPE.optimise, device=CPU)
    again.resume(tmp_path / "state.safetensors")
    assert again.step == 2
    for _ in range(2):
        again.learn(*again.draw(frames))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.average.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(one, other)
    wrong = learner.Learner(RECIPE.network.model(560), RECIPE.optimise, device=CPU)
    with pytest.raises(CheckpointError, match="another network"):
        wrong.resume(tmp_path / "state.safetensors")


def test_it_learns_and_a_broken_target_does_not(frames):
    config = RECIPE.network.model(544)
    optimise = Optimise(steps=150, batch=8, flows=4, warmup_steps=5, learning_rate=3e-3, max_committed=2, ema=0.9)
    one = learner.Learner(config, optimise, device=CPU)
    losses = [float(one.learn(*one.draw(frames)).loss) for _ in range(optimise.steps)]
    broken = learner.Learner(config, optimise, device=CPU)
    shuffled = []
    for step in range(optimise.steps):
        batch, draws = broken.draw(frames)
        noise = torch.randn(batch.actions.shape, generator=torch.Generator().manual_seed(step))
        shuffled.append(float(broken.learn(objective.Batch(batch.images, batch.tokens, None, noise), draws).loss))
    assert np.mean(losses[-20:]) < 0.6 * np.mean(shuffled[-20:])


def test_rate_warms_up_and_falls():
    one = learner.Learner(RECIPE.network.model(544), Optimise(steps=100, warmup_steps=10), device=CPU)
    rates = [one.rate(step) for step in range(101)]
    assert rates[0] < rates[9] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5)
    with pytest.raises(NumericsError):
        learner.check_loss(3, float("nan"))


def test_the_exported_policy_is_the_trained_network(frames, blob, tmp_path):
    """float32 folders of all three formats answer with what the network in training would sample."""
    one = learner.Learner(RECIPE.network.model(544), RECIPE.optimise, device=CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in one.average.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    trained = export.Trained(
        one.average, frames.state_stats, frames.action_stats, cameras, blob, 48, 3, max_committed=2, dtype="float32"
    )
    source, noise = piece(seed=0), np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    views = {name: source.views[2, i] for i, name in enumerate(cameras)}
    observation = Observation(views, source.state[2], source.prompts[2])
    answers = {}
    for form in ("lerobot", "openpi", "jax"):
        export.export(tmp_path / form, trained, format=form)
        arguments = {} if form == "lerobot" else {"embodiment": "conveyor", "horizon": 4, "vision_heads": 2}
        config = EngineConfig(num_denoise_steps=3, precision="float32")
        policy = vivace.load_policy(tmp_path / form, config=config, **arguments)
        answers[form] = policy.infer(observation, noise=noise).actions
        if form == "lerobot":
            prepared = policy.prepare(observation)
            assert prepared.tokens.tolist() == frames.tokens[2].tolist(), "training built another prompt"
            served = torch.as_tensor(np.asarray(prepared.images)).reshape(3, 3, 16, 16)
            undimmed = drawn(frames, brightness=0.0)[0].images
            assert any(torch.allclose(served, image, atol=1e-6) for image in undimmed), "training sees other pixels"
            assert policy.checkpoint.rtc.training_max_delay == 2
            assert policy.checkpoint.num_denoise_steps == 3
            own = json.loads((tmp_path / form / "vivace.json").read_text())
            assert own == {"vision_num_attention_heads": 2, "rtc_training_max_delay": 2}
            config = json.loads((tmp_path / form / "config.json").read_text())
            assert not own.keys() & config.keys(), "LeRobot refuses fields that it does not know"
    images = torch.from_numpy(np.stack(list(views.values()))).permute(0, 3, 1, 2)[None].float() / 255 * 2 - 1
    inputs = objective.ModelInputs(images=images, tokens=frames.tokens[2:3])
    model = one.average
    cache = model.prefill(*model.embed_prefix(inputs, model.embed_views(images)))
    x = torch.from_numpy(noise)[None]
    for step in range(3):
        t = torch.tensor([1.0 - step / 3])
        condition = objective.conditions(model, t, torch.zeros(1, 4, dtype=torch.bool))
        x = x - model.denoise_step(x, condition, cache, model.suffix_context(cache, 4)) / 3
    low, high = frames.action_stats.q01, frames.action_stats.q99
    wanted = (x[0, :, :4].detach().numpy() + 1) / 2 * (high - low) + low
    for form, actions in answers.items():
        assert np.allclose(actions, wanted, atol=2e-4), form
    with pytest.raises(ConfigError, match="exists already"):
        export.export(tmp_path / "lerobot", trained)


def test_prompts_of_a_task_have_one_length(tokenizer, blob):
    texts = [f"Task: pick up the {c} cube, State: {n};\nAction: " for c in ("red", "green") for n in ("-1 7", "255 30")]
    assert len({len(tokenizer.encode(text, add_bos=True)) for text in texts}) == 1
    assert pieces(blob) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimise]\nstep = 3\n[data]\nfolder='x'", "steps"),
        ("[optimise]\nsteps = 'many'\n[data]\nfolder='x'", "steps"),
        ("[optimise]\nsteps = 0\n[data]\nfolder='x'", "at least 1"),
        ("name = 'x'", "either sources or folder"),
        ("[data]\nsources=[{task='nonsense', episodes=1}]", "nonsense"),
        ("[data]\nsources=[{task='static'}]", "episodes"),
        ("[data]\nfolder='x'\n[network.prefix]\nlayers=7", "share keys"),
        ("[data\n", "cannot read"),
    ],
)
def test_bad_recipes_are_explained(tmp_path, text, message):
    sizes = "".join(f"\n[network.{name}]" for name in ("vision", "prefix", "expert") if f"network.{name}" not in text)
    (tmp_path / "r.toml").write_text(text + ("" if "[data\n" in text else sizes))
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / "r.toml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("closed_loop", "processes", 0), ("closed_loop", "execute_ticks", 0), ("network", "action_width", 2),
        ("network", "action_width", 4), ("network", "horizon", 0), ("network.prefix", "head_dim", 15),
        ("network.prefix", "num_heads", 0), ("network.prefix", "num_kv_heads", 2), ("network.vision", "num_heads", 0),
        ("network.expert", "width", 15), ("optimise", "learning_rate", -1.0), ("optimise", "learning_rate", math.nan),
        ("optimise", "max_committed", 4), ("optimise", "clip_norm", 0.0), ("optimise", "weight_decay", -0.1),
        ("optimise", "ema", 1.0), ("optimise", "brightness", 1.0), ("optimise", "committed_share", math.nan),
        ("optimise", "warmup_steps", -1), ("export", "num_denoise_steps", 0), ("data", "processes", 0),
        ("data", "stride", 0), ("data", "sigma", [math.nan]), ("data", "seed", -1),
        ("closed_loop", "corrections", [{"at": 1.0, "sources": STATIC}]),
        ("closed_loop", "corrections", [{"at": -0.1, "sources": STATIC}]),
        ("closed_loop", "corrections", [{"at": 0.5, "sources": []}]),
        ("closed_loop", "corrections", [{"at": 0.5, "sources": STATIC}] * 2),
        ("closed_loop", "corrections", [{"at": 0.5, "sources": STATIC, "delay_ticks": -1}]),
        ("closed_loop", "corrections", [{"at": 0.5, "sources": STATIC, "delay_ticks": 3}]),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_trained_are_refused_by_name(where, key, value):
    table = {"network": copy.deepcopy(NETWORK), "data": {"sources": STATIC}, "optimise": {"max_committed": 2}}
    build(Recipe, table, where="test")
    inner = table
    for name in where.split("."):
        inner = inner.setdefault(name, {})
    inner[key] = value
    if key in ("head_dim", "num_kv_heads") or where == "network.prefix":
        table["network"]["expert"][key] = value
    with pytest.raises(ConfigError) as caught:
        build(Recipe, table, where="test")
    assert key in str(caught.value)


def test_without_committed_actions_it_trains(frames):
    one = learner.Learner(RECIPE.network.model(544), replace(RECIPE.optimise, max_committed=0), device=CPU)
    batch, draws = one.draw(frames)
    assert not draws.committed.any()
    assert float(one.learn(batch, draws).loss) > 0


def drawn(frames, *, step=0, **optimise):
    """What a learner draws for a step, from large batches so that shares can be told."""
    one = learner.Learner(RECIPE.network.model(544), replace(RECIPE.optimise, batch=64, **optimise), device=CPU)
    one.step = step
    return one.draw(frames)


def test_every_step_has_random_numbers_of_its_own(frames):
    (one, first), (_, again), (other, second) = (drawn(frames, step=step) for step in (0, 0, 1))
    assert torch.equal(first.noise, again.noise)
    for a, b in ((first.noise, second.noise), (first.times, second.times), (one.images, other.images)):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_draws_with_committed_actions_is_the_recipes(frames, share):
    _, draws = drawn(frames, committed_share=share, max_committed=3)
    assert frames.left.min() > 0  # so that every row may have some
    assert float((draws.committed > 0).float().mean()) == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)


def test_the_average_moves_towards_the_weights_by_its_decay(frames):
    one = learner.Learner(RECIPE.network.model(544), replace(RECIPE.optimise, ema=0.9), device=CPU)
    for decay in (2 / 11, 3 / 12):  # early on, (1 + n) / (10 + n)
        before = [value.clone() for value in one.average.parameters()]
        one.learn(*one.draw(frames))
        for old, new, weight in zip(before, one.average.parameters(), one.model.parameters(), strict=True):
            torch.testing.assert_close(new, decay * old + (1 - decay) * weight)
    assert any(not torch.equal(a, b) for a, b in zip(one.average.parameters(), before, strict=True))


def test_a_delay_needs_draws_with_committed_actions():
    corrections = [{"at": 0.5, "sources": STATIC, "delay_ticks": 2}]
    table = {"network": NETWORK, "data": {"sources": STATIC}, "optimise": {"max_committed": 2, "committed_share": 0.1},
             "closed_loop": {"execute_ticks": 2, "corrections": corrections}}  # fmt: skip
    made = build(Recipe, table, where="test")
    assert (made.closed_loop.corrections[0].delay_ticks, made.optimise.told_ticks) == (2, 2)
    table["optimise"]["committed_share"] = 0.0
    assert replace(made.optimise, committed_share=0.0).told_ticks == 0
    with pytest.raises(ConfigError, match="at most the 0 committed actions"):
        build(Recipe, table, where="test")
    table["optimise"]["committed_share"] = 0.1
    table["closed_loop"]["execute_ticks"] = 3
    with pytest.raises(ConfigError, match="chunks of 4 that last 3 ticks longer"):
        build(Recipe, table, where="test")


def test_looks_are_answered_in_batches_of_equal_delay_and_in_their_order():
    calls = []

    class Told:
        def infer_batch(self, observations, *, previous):
            calls.append((len(observations), previous))
            return [
                ActionChunk(np.full((4, 4), one.state[0]), np.ones((4, 8)), None, 50.0, {}, None)
                for one in observations
            ]

    older = np.arange(32, dtype=np.float32).reshape(4, 8)
    looks = [
        Look(Observation({}, state=np.array([float(i)])), None if ticks == 0 else older + i, ticks)
        for i, ticks in enumerate((2, 0, 1, 2))
    ]
    answers = answering(Told())(looks)
    assert [one.actions[0, 0] for one in answers] == [0.0, 1.0, 2.0, 3.0]
    assert [(count, previous and previous.inference_delay) for count, previous in calls] == [(1, None), (1, 1), (2, 2)]
    assert np.array_equal(calls[2][1].actions.numpy(), np.stack([older, older + 3]))
    assert calls[2][1].mode == "trained"


def test_corrections_of_an_earlier_run_are_used_only_when_it_is_resumed(tmp_path, monkeypatch):
    """A folder that was left by a run that was cut off holds another run's weights."""
    written = []
    monkeypatch.setattr(export, "export", lambda folder, trained, *, format: written.append(folder) or folder.mkdir())
    monkeypatch.setattr(Run, "trained", lambda self: None)
    run = Run(RECIPE, None, None, b"", tmp_path, print)
    left = tmp_path / "correction_3"
    left.mkdir()
    (left / "model.safetensors").touch()
    assert run._as_then(3) == left
    assert (left / "model.safetensors").exists()
    assert run._as_now(3) == left
    assert not (left / "model.safetensors").exists()
    assert run._as_then(5) == tmp_path / "correction_5"
    assert written == [left, tmp_path / "correction_5"]


def test_every_correction_happens_also_in_a_short_run():
    corrections = [{"at": at, "sources": STATIC} for at in (0.98, 0.5, 0.52)]
    recipe = build(Recipe, {
        "network": NETWORK, "data": {"sources": STATIC}, "optimise": {"steps": 4, "max_committed": 2},
        "closed_loop": {"corrections": corrections}}, where="test")  # fmt: skip
    run = Run(recipe, None, None, b"", Path(), print)
    assert [(step, one.at) for step, one in run.corrections()] == [(2, 0.5), (2, 0.52), (3, 0.98)]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda file: file.stem
)
def test_committed_recipes_can_be_read_and_built(file):
    recipe = read_recipe(file)
    with torch.device("meta"):
        model = Pi(recipe.network.model(544))
    assert recipe.network.action_width >= 7, "the state has to fit"
    if recipe.name.startswith("conveyor-small"):
        stored = sum(torch.Size(shape).numel() for shape in expected_shapes(model.config).values()) * 2
        assert stored < 12e6 - 50_000
