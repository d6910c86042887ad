"""Orbax folders: the layout against a second conversion written from the table of shapes, and LoRA against its formula."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from vivace.checkpoints.open import open_checkpoint
from vivace.checkpoints.openpi_jax import merge_lora
from vivace.errors import CheckpointError, Unsupported

ts = pytest.importorskip("tensorstore", reason="the extra jax-checkpoints is not installed")
CPU = torch.device("cpu")


def stored(params, name):
    """One array, straight from tensorstore."""
    kvstore = {"driver": "ocdbt", "base": f"file://{params}/", "path": f"params.{name.replace('/', '.')}.value/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result().read().result()


def test_layout_equals_a_conversion_written_with_numpy(golden_dir):
    folder = golden_dir / "openpi_jax_pi05" / "checkpoint"
    tensors = open_checkpoint(folder).tensors
    a = lambda name: stored(folder / "params", name)  # noqa: E731
    img, llm = "PaliGemma/img", "PaliGemma/llm"
    block, layers = f"{img}/Transformer/encoderblock", f"{llm}/layers"
    mha = f"{block}/MultiHeadDotProductAttention_0"
    want = {
        "vision.patch.weight": a(f"{img}/embedding/kernel").transpose(3, 2, 0, 1),
        "vision.position.weight": a(f"{img}/pos_embedding").squeeze(0),
        "vision.norm.weight": a(f"{img}/Transformer/encoder_norm/scale"),
        "projector.weight": a(f"{img}/head/kernel").T,
        "embedding.weight": a(f"{llm}/embedder/input_embedding"),
        "expert.norm.modulation.weight": a(f"{llm}/final_norm_1/Dense_0/kernel").T,
        "action_in.weight": a("action_in_proj/kernel").T,
        "time_out.bias": a("time_mlp_out/bias"),
    }
    for i in (0, 1):
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")):
            want[f"vision.layers.{i}.attn.{ours}.weight"] = a(f"{mha}/{theirs}/kernel")[i].reshape(48, 48).T
            want[f"vision.layers.{i}.attn.{ours}.bias"] = a(f"{mha}/{theirs}/bias")[i].reshape(48)
        want[f"vision.layers.{i}.attn.o.weight"] = a(f"{mha}/out/kernel")[i].reshape(48, 48).T
        want[f"vision.layers.{i}.norm1.weight"] = a(f"{block}/LayerNorm_0/scale")[i]
        want[f"vision.layers.{i}.norm2.bias"] = a(f"{block}/LayerNorm_1/bias")[i]
        want[f"vision.layers.{i}.mlp.fc1.weight"] = a(f"{block}/MlpBlock_0/Dense_0/kernel")[i].T
        want[f"vision.layers.{i}.mlp.fc2.bias"] = a(f"{block}/MlpBlock_0/Dense_1/bias")[i]
        for suffix, stack, width in (("", "prefix", 64), ("_1", "expert", 32)):
            ours = f"{stack}.layers.{i}"
            want[f"{ours}.attn.q.weight"] = (
                a(f"{layers}/attn/q_einsum{suffix}/w")[i].transpose(0, 2, 1).reshape(128, width)
            )
            want[f"{ours}.attn.k.weight"] = a(f"{layers}/attn/kv_einsum{suffix}/w")[i, 0, 0].T
            want[f"{ours}.attn.v.weight"] = a(f"{layers}/attn/kv_einsum{suffix}/w")[i, 1, 0].T
            want[f"{ours}.attn.o.weight"] = a(f"{layers}/attn/attn_vec_einsum{suffix}/w")[i].reshape(128, width).T
            want[f"{ours}.mlp.gate.weight"] = a(f"{layers}/mlp{suffix}/gating_einsum")[i, 0].T
            want[f"{ours}.mlp.up.weight"] = a(f"{layers}/mlp{suffix}/gating_einsum")[i, 1].T
            want[f"{ours}.mlp.down.weight"] = a(f"{layers}/mlp{suffix}/linear")[i].T
        want[f"prefix.layers.{i}.norm2.weight"] = a(f"{layers}/pre_ffw_norm/scale")[i]
        want[f"expert.layers.{i}.norm1.modulation.weight"] = a(f"{layers}/pre_attention_norm_1/Dense_0/kernel")[i].T
    for name, value in want.items():
        assert np.array_equal(tensors[name].read(CPU).numpy(), value), name


def lora_of(golden_dir):
    folder = golden_dir / "openpi_jax_pi0_lora" / "checkpoint"
    return open_checkpoint(folder).tensors, lambda name: stored(folder / "params", f"PaliGemma/llm/layers/{name}")


@pytest.mark.parametrize(("suffix", "stack", "width"), [("", "prefix", 64), ("_1", "expert", 32)])
def test_merged_lora_computes_what_the_two_branches_compute(golden_dir, suffix, stack, width):
    """y = x W + (x a) b with openpi's own einsum labels, in float64, against x @ merged.T."""
    tensors, a = lora_of(golden_dir)
    rng = np.random.default_rng(0)
    x, heads = rng.standard_normal((5, width)), rng.standard_normal((5, 8, 16))

    def branches(label, base, name, value):
        """`label` with the two factor labels that replace the weight's last and next-to-last axis by the rank L."""
        inputs, output = label.split("->")
        left, weight = inputs.split(",")
        label_a, label_b = weight[:-1] + "L", weight[:-2] + "L" + weight[-1]
        middle = "".join(c for c in output if c != weight[-1]) + "L"
        i = 1
        out = np.einsum(label, value, a(base)[i])
        low = np.einsum(f"{left},{label_a}->{middle}", value, a(name + "lora_a")[i])
        return out, out + np.einsum(f"{middle},{label_b}->{output}", low, a(name + "lora_b")[i])

    q, k = f"attn/q_einsum{suffix}/", f"attn/kv_einsum{suffix}/"
    o, m = f"attn/attn_vec_einsum{suffix}/", f"mlp{suffix}/"
    merged = lambda name: tensors[f"{stack}.layers.1.{name}.weight"].read(CPU).double().numpy()  # noqa: E731
    checks = {
        "q": (branches("TD,NDH->TNH", q + "w", q, x), (x @ merged("attn.q").T).reshape(5, 8, 16)),
        "kv": (
            branches("TD,CKDH->CTKH", k + "w", k, x),
            np.stack([x @ merged("attn.k").T, x @ merged("attn.v").T])[:, :, None],
        ),
        "o": (branches("TNH,NHD->TD", o + "w", o, heads), heads.reshape(5, 128) @ merged("attn.o").T),
        "gate": (
            branches("TD,CDF->CTF", m + "gating_einsum", m + "gating_einsum_", x),
            np.stack([x @ merged("mlp.gate").T, x @ merged("mlp.up").T]),
        ),
    }
    for name, ((without, want), got) in checks.items():
        scale = np.abs(want).max()
        assert np.abs(got - want).max() < 1e-5 * scale, name
        assert np.abs(without - want).max() > 1e-2 * scale, f"{name}: ignoring LoRA would pass"


def test_the_output_projection_is_not_merged_per_head(golden_dir):
    """Negative control: the per-head product a[n] @ b[n] differs from what openpi computes."""
    _, a = lora_of(golden_dir)
    weight, low, high = (torch.from_numpy(a(f"attn/attn_vec_einsum/{n}")[0]) for n in ("w", "lora_a", "lora_b"))
    right = merge_lora(weight, low, high, output=True)
    per_head = merge_lora(weight, low, high, output=False)
    assert (right - per_head).norm() > 0.1 * (right - weight).norm()


def read_all(folder) -> None:
    for ref in open_checkpoint(folder).tensors.values():
        ref.read(CPU)


def damaged(made, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(made(format="jax"), folder)
    return folder


def test_a_params_folder_and_a_step_folder_open_too(made, tmp_path):
    folder = made(format="jax")
    assert open_checkpoint(folder / "params").path == folder
    bare = tmp_path / "bare"
    shutil.copytree(folder / "params", bare)
    assert open_checkpoint(bare).robot.stats == {}
    shutil.copytree(folder, tmp_path / "run" / "100")
    shutil.copytree(folder, tmp_path / "run" / "2000")
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.path.name == "2000"
    assert "2000" in checkpoint.notes[0]


def test_missing_data_files_are_an_error(made, tmp_path):
    folder = damaged(made, tmp_path)
    for file in (folder / "params" / "d").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"damaged|cannot"):
        read_all(folder)


def test_a_broken_or_missing_manifest_is_an_error(made, tmp_path):
    folder = damaged(made, tmp_path)
    (folder / "params" / "manifest.ocdbt").write_bytes(b"not a manifest")
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(folder)
    (folder / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.ocdbt"):
        open_checkpoint(folder)


def test_a_missing_chunk_is_not_read_as_zeros(made, tmp_path):
    folder = damaged(made, tmp_path)
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder / 'params'}/"}).result()
    chunk = "params.PaliGemma.llm.layers.attn.q_einsum.w.value/1.0.0.0"
    assert chunk.encode() in store.list().result()
    store.write(chunk, None).result()
    with pytest.raises(CheckpointError, match=r"q_einsum.*1 of 2 chunks"):
        open_checkpoint(folder)


def test_missing_and_foreign_arrays_are_listed(made, tmp_path):
    folder = damaged(made, tmp_path)
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder / 'params'}/"}).result()
    for key in store.list().result():
        if b"q_einsum_1" in key:
            store.write(key, None).result()
    with pytest.raises(CheckpointError, match=r"2 missing:\s+expert\.layers\.0\.attn\.q\.weight"):
        open_checkpoint(folder)
    base = {"driver": "ocdbt", "base": f"file://{folder / 'params'}/", "path": "params.PaliGemma.other.value/"}
    metadata = {"shape": [2], "chunks": [2], "dtype": "<f4", "compressor": None}
    spec = {"driver": "zarr", "kvstore": base, "metadata": metadata}
    ts.open(spec, create=True).result().write(np.ones(2, np.float32)).result()
    with pytest.raises(CheckpointError, match="PaliGemma/other"):
        open_checkpoint(folder)


def test_lora_that_does_not_fit_is_refused_by_name(golden_dir, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(golden_dir / "openpi_jax_pi0_lora" / "checkpoint", folder)
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder / 'params'}/"}).result()
    for key in store.list().result():
        if b"layers.attn.q_einsum.lora_b" in key:
            store.write(key, None).result()
    with pytest.raises(CheckpointError, match=r"q_einsum/w is incomplete"):
        open_checkpoint(folder)
    name = "params.PaliGemma.llm.layers.attn.q_einsum.lora_b.value/"
    base = {"driver": "ocdbt", "base": f"file://{folder / 'params'}/", "path": name}
    metadata = {"shape": [2, 8, 5, 16], "chunks": [2, 8, 5, 16], "dtype": "<f4", "compressor": None}
    spec = {"driver": "zarr", "kvstore": base, "metadata": metadata}
    ts.open(spec, create=True).result().write(np.ones((2, 8, 5, 16), np.float32)).result()
    with pytest.raises(CheckpointError, match=r"q_einsum/w cannot be merged"):
        open_checkpoint(folder)


def test_orbax_metadata_of_made_folders_names_every_array(made):
    folder = made(format="jax")
    table = json.loads((folder / "params" / "_METADATA").read_text())["tree_metadata"]
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder / 'params'}/"}).result()
    arrays = {key.decode().removesuffix("/.zarray") for key in store.list().result() if key.endswith(b"/.zarray")}
    assert {".".join(part["key"] for part in entry["key_metadata"]) for entry in table.values()} == arrays


def test_without_tensorstore_the_error_names_the_extra(made, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    with pytest.raises(Unsupported, match=r"vivace\[jax-checkpoints\]"):
        open_checkpoint(made(format="jax"))
