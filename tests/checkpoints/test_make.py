"""Generated checkpoints: the same network in every format, complete, deterministic, written in little memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.checkpoints.names import expected_shapes
from vivace.checkpoints.open import open_checkpoint
from vivace.checkpoints.random_values import OUTLIER_GAIN, outlier_channels, random_blocks, random_tensor
from vivace.checkpoints.sizes import SIZES, network
from vivace.checkpoints.toy_tokenizer import train_toy_tokenizer
from vivace.config import ModelConfig
from vivace.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_three_formats_hold_the_same_tensors(made, kind, dtype):
    pytest.importorskip("tensorstore", reason="the extra jax-checkpoints is not installed")
    opened = [open_checkpoint(made(format=f, kind=kind, dtype=dtype, seed=3)) for f in ("lerobot", "openpi", "jax")]
    shapes = expected_shapes(network("tiny", kind, horizon=50))
    for name, shape in shapes.items():
        want = random_tensor(name, shape, seed=3, outliers=0).to(getattr(torch, dtype))
        for checkpoint in opened:
            got = checkpoint.tensors[name].read(CPU)
            assert got.dtype == want.dtype
            assert torch.equal(got, want), (name, checkpoint.origin)
    assert [c.origin for c in opened] == ["lerobot", "openpi_torch", "openpi_jax"]
    dims = {(c.model.kind, c.model.vision, c.model.prefix, c.model.expert, c.model.vocab_size) for c in opened}
    assert len(dims) == 1
    assert [c.model.declared_dtype for c in opened] == [dtype, dtype, "bfloat16"]


@pytest.mark.parametrize("fmt", ["lerobot", "openpi"])
def test_the_same_recipe_gives_the_same_bytes(tmp_path, fmt):
    def digest(name: str, seed: int) -> dict[str, str]:
        make_checkpoint(tmp_path / name, Recipe(format=fmt, seed=seed))
        files = (file for file in sorted((tmp_path / name).rglob("*")) if file.is_file())
        return {str(f.relative_to(tmp_path / name)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    first = digest("a", 1)
    assert digest("b", 1) == first
    other = digest("c", 2)
    assert other.keys() == first.keys()
    assert other["model.safetensors"] != first["model.safetensors"]
    assert "tokenizer/tokenizer.model" in first


def test_the_library_reads_the_weights(made):
    folder = made(format="openpi")
    stored = load_file(folder / "model.safetensors")
    opened = open_checkpoint(folder)
    assert len(stored) == len(opened.tensors) + len(opened.dead)


def test_full_size_is_the_real_thing():
    """Parameter counts of the released networks, without the dead lm_head: 3,353.4 M and 3,238.0 M."""
    assert network("full", "pi05", horizon=50) == ModelConfig()
    for kind, millions in (("pi05", 3353.4), ("pi0", 3238.0)):
        count = Recipe(size="full", kind=kind).parameters()
        assert round((count + 2048) / 1e6, 1) == millions


@pytest.mark.parametrize(("size", "low", "high"), [("tiny", 0.05, 0.25), ("small", 10, 20), ("base", 250, 350)])
def test_sizes_are_what_they_say(size, low, high):
    assert low < Recipe(size=size).parameters() / 1e6 < high
    model = SIZES[size].model
    assert model.vision.width % model.vision.num_heads == 0
    assert model.prefix.head_dim == model.expert.head_dim
    assert model.prefix.width != model.expert.width  # a mix-up of the two must not fit by accident


def test_tiny_is_tiny(made):
    assert (made(format="lerobot") / "model.safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_no_tensor_is_constant_or_zero(made, kind):
    """A zero modulation or norm would make whole parts of the network invisible to tests."""
    for name, ref in open_checkpoint(made(format="openpi", kind=kind)).tensors.items():
        tensor = ref.read(CPU)
        assert tensor.std() > 0.01, name
        assert tensor.abs().max() < 10, name


def test_matrices_keep_the_scale_of_their_input():
    weight = random_tensor("prefix.layers.0.mlp.down.weight", (256, 1024), seed=0, outliers=0)
    assert abs(float(weight.std()) * 1024**0.5 - 0.6) < 0.02
    gain = random_tensor("vision.layers.0.norm1.weight", (4096,), seed=0, outliers=0)
    assert abs(float(gain.mean()) - 1) < 0.01


def test_blocks_join_to_the_same_tensor(monkeypatch):
    whole = random_tensor("embedding.weight", (100, 32), seed=5, outliers=0)
    monkeypatch.setattr("vivace.checkpoints.random_values.BLOCK_VALUES", 96)
    blocks = list(random_blocks("embedding.weight", (100, 32), seed=5, outliers=0))
    assert len(blocks) == 34
    assert torch.equal(torch.cat(blocks), whole)


def test_outlier_channels_are_loud_and_the_same_in_every_layer(made):
    plain, loud = (open_checkpoint(made(format="openpi", outliers=n)).tensors for n in (0, 3))
    for stack, last, width in (("vision", "mlp.fc2", 24), ("prefix", "mlp.down", 32), ("expert", "mlp.down", 24)):
        for layer in (0, 1):
            for kind in ("attn.o", last):
                name = f"{stack}.layers.{layer}.{kind}.weight"
                ratio = loud[name].read(CPU) / plain[name].read(CPU)
                channels = outlier_channels(name, width, seed=0, outliers=3)
                assert len(channels) == 3
                assert torch.allclose(ratio[channels], torch.tensor(OUTLIER_GAIN))
                assert int((ratio != 1).any(dim=1).sum()) == 3
    assert torch.equal(
        plain["prefix.layers.0.mlp.up.weight"].read(CPU), loud["prefix.layers.0.mlp.up.weight"].read(CPU)
    )


def test_the_robot_of_a_lerobot_folder(made):
    robot = open_checkpoint(
        made(format="lerobot", kind="pi0", cameras=("top",), state_dim=6, action_dim=5, horizon=12)
    ).robot
    assert (robot.cameras, robot.state_dim, robot.action_dim) == (("observation.images.top",), 6, 5)
    assert (robot.state_mode, robot.prompt) == ("mean_std", "lerobot_pi0")
    state, action = robot.stats[""]
    assert state.q01 is not None
    assert action.std is not None
    assert (state.q01.shape, action.std.shape) == ((6,), (5,))


@pytest.mark.parametrize(("robot", "asset", "dims"), [("droid", "droid", (8, 8)), ("aloha", "trossen", (14, 14))])
def test_statistics_of_an_openpi_robot(made, robot, asset, dims):
    stats = open_checkpoint(made(format="openpi", robot=robot)).robot.stats
    state, action = stats[asset]
    assert state.q99 is not None
    assert action.mean is not None
    assert (state.q99.shape[0], action.mean.shape[0]) == dims
    assert (state.std > 0).all() and (state.q99 > state.q01).all()  # noqa: PT018


def test_made_folders_are_complete(tmp_path):
    for fmt in ("lerobot", "openpi"):
        make_checkpoint(tmp_path / fmt, Recipe(format=fmt))
        checkpoint = open_checkpoint(tmp_path / fmt)
        assert checkpoint.robot.tokenizer_dir == tmp_path / fmt / "tokenizer"
        assert not checkpoint.guesses
        assert [note.split(";")[0] for note in checkpoint.notes] == (
            ["lm_head and embed_tokens are both stored"] if fmt == "lerobot" else []
        )
        assert checkpoint.model.horizon == 50


def test_the_toy_tokenizer_has_paligemmas_options():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = train_toy_tokenizer(512)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert train_toy_tokenizer(512) == model
    assert tokenizer.vocab_size() <= 512
    assert [tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id()] == [0, 1, 2, 3]
    text = "  Task: pick up the red block, State: 12 255 -1;\nAction: \u00e9\u4e2d "
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text  # identity, byte fallback, no dummy prefix
    assert tokenizer.unk_id() not in ids
    assert len(tokenizer.encode("\n")) == 1
    assert len(tokenizer.encode("255")) == 3


def test_existing_folders_are_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="exists"):
            make_checkpoint(tmp_path / "mine", Recipe(), overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    make_checkpoint(tmp_path / "new", Recipe())
    with pytest.raises(ConfigError, match="overwrite"):
        make_checkpoint(tmp_path / "new", Recipe())
    make_checkpoint(tmp_path / "new", Recipe(kind="pi0"), overwrite=True)
    assert open_checkpoint(tmp_path / "new").model.kind == "pi0"


@pytest.mark.parametrize(
    "field", [{"horizon": 0}, {"state_dim": 33}, {"cameras": ()}, {"cameras": ("a", "a")}, {"outliers": -1}]
)
def test_recipes_that_make_no_sense(tmp_path, field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        make_checkpoint(tmp_path / "x", Recipe(**field))
    assert not (tmp_path / "x").exists()


MEASURE = """
import sys
from pathlib import Path
from vivace.checkpoints.make import Recipe, make_checkpoint
make_checkpoint(Path(sys.argv[1]) / "tiny", Recipe())  # imports and their buffers
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
make_checkpoint(Path(sys.argv[1]) / "base", Recipe(size="base", dtype="bfloat16"))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_writing_takes_little_memory(tmp_path):
    """600 MB of weights in less than 100 MB."""
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    growth = float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout)
    assert (tmp_path / "base" / "model.safetensors").stat().st_size > 500e6
    assert growth < 100
