"""LeRobot's dataset format, v3.0: written for recorded episodes, read back for calibration and training.

    meta/info.json                               features with dtype and shape, counts, path templates
    meta/stats.json                              {feature: {min, max, mean, std, count, q01 ... q99}}; of images per channel
    meta/tasks.parquet                           instruction -> task_index
    meta/episodes/chunk-000/file-000.parquet     episode -> length, rows, instructions
    data/chunk-000/file-000.parquet ...          one row a frame; images are {bytes: PNG, path}

Read with pyarrow alone, no LeRobot. Images are stored as PNG, losslessly: a training example is then exactly what a policy
sees. Datasets whose images are in video files, and those of v2.1, are refused with what to do.
Source: lerobot datasets (0.4 to 0.6): utils.py, lerobot_dataset.py, compute_stats.py.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ConfigError, Unsupported

VERSION = "v3.0"
DATA, EPISODES = (
    "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "meta/episodes/chunk-000/file-000.parquet",
)
INDEX = {name: "int64" for name in ("frame_index", "episode_index", "index", "task_index")} | {"timestamp": "float32"}
EPISODES_PER_FILE = 50
FILES_PER_CHUNK = 1000
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
PIXEL_SAMPLE = 16
"""Every 16th pixel row of every frame is enough for the statistics of a picture."""


@dataclass(frozen=True)
class Episode:
    """T frames. images {feature: uint8 [T, h, w, 3]}; vectors {feature: float32 [T, n]}; tasks T instructions."""

    images: Mapping[str, NDArray[np.uint8]]
    vectors: Mapping[str, NDArray[np.float32]]
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True)
class Frame:
    """One row. images {feature: uint8 [h, w, 3]}; vectors {feature: float32 [n]}."""

    episode: int
    index: int
    images: Mapping[str, NDArray[np.uint8]]
    vectors: Mapping[str, NDArray[np.float32]]
    task: str


def is_dataset(folder: Path) -> bool:
    """Whether a folder looks like a LeRobot dataset."""
    return (folder / "meta" / "info.json").is_file()


# --- writing --------------------------------------------------------------------------------------------------------


def write_dataset(
    folder: Path,
    episodes: Iterable[Episode],
    *,
    fps: int,
    robot_type: str,
    names: Mapping[str, list[str]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a new dataset and return its info. Holds at most 50 episodes at a time.

    names   {vector feature: names of its numbers}
    extra   more keys for info.json, which LeRobot ignores (seeds, versions)
    Raises: ConfigError for a folder that is not empty, or without episodes; Unsupported without pyarrow.
    """
    _pyarrow()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already", wanted="a new or empty folder")
    writer = _Writer(folder, fps)
    for episode in episodes:
        writer.add(episode)
    if not writer.rows:
        raise ConfigError("no episodes to write", wanted="at least one")
    return writer.finish(robot_type, dict(names or {}), dict(extra or {}))


class _Writer:
    """Rows of the present file, and what the meta folder needs of all."""

    def __init__(self, folder: Path, fps: int) -> None:
        self.folder, self.fps = folder, fps
        self.rows: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._features: dict[str, dict[str, Any]] = {}
        self._values: dict[str, list[NDArray[Any]]] = {}
        self._frames, self._file = 0, 0

    def add(self, episode: Episode) -> None:
        """Append one episode."""
        features = _features(episode)
        if self._features and features != self._features:
            raise ConfigError("episodes of one dataset differ", got=features, wanted=self._features)
        self._features = features
        number = len(self.rows)
        for i, task in enumerate(episode.tasks):
            row: dict[str, Any] = {name: _png(images[i]) for name, images in episode.images.items()}
            row |= {name: vectors[i].tolist() for name, vectors in episode.vectors.items()}
            row |= {
                "timestamp": i / self.fps, "frame_index": i, "episode_index": number, "index": self._frames + i,
                "task_index": self._tasks.setdefault(task, len(self._tasks)),
            }  # fmt: skip
            self._pending.append(row)
        every: dict[str, NDArray[Any]] = {**episode.images, **episode.vectors}
        for name, values in every.items():
            sample = values[:, ::PIXEL_SAMPLE, ::PIXEL_SAMPLE] if values.ndim == 4 else values
            self._values.setdefault(name, []).append(sample)
        chunk, file = divmod(self._file, FILES_PER_CHUNK)
        self.rows.append(
            {
                "episode_index": number, "tasks": list(dict.fromkeys(episode.tasks)), "length": len(episode),
                "data/chunk_index": chunk, "data/file_index": file, "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + len(episode), "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )  # fmt: skip
        self._frames += len(episode)
        if len(self.rows) % EPISODES_PER_FILE == 0:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        pa = _pyarrow()
        picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        fields, hints = [], {}
        for name, feature in self._features.items():
            image = feature["dtype"] == "image"
            fields.append(pa.field(name, picture if image else pa.list_(pa.float32())))
            value = {"dtype": "float32", "_type": "Value"}
            hints[name] = (
                {"_type": "Image"} if image else {"feature": value, "length": feature["shape"][0], "_type": "List"}
            )
        for name, kind in INDEX.items():
            fields.append(pa.field(name, pa.float32() if kind == "float32" else pa.int64()))
            hints[name] = {"dtype": kind, "_type": "Value"}
        schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": hints}})})
        chunk, file = divmod(self._file, FILES_PER_CHUNK)
        _write_table(
            self.folder / DATA.format(chunk_index=chunk, file_index=file),
            pa.Table.from_pylist(self._pending, schema=schema),
        )
        self._pending, self._file = [], self._file + 1

    def finish(self, robot_type: str, names: dict[str, list[str]], extra: dict[str, Any]) -> dict[str, Any]:
        """Write what is left and the meta folder."""
        self._flush()
        pa = _pyarrow()
        _write_table(self.folder / EPISODES, pa.Table.from_pylist(self.rows))
        pandas = {
            "index_columns": ["task"], "column_indexes": [],
            "columns": [
                {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}
                for name, kind, numpy_kind in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
            ],
        }  # fmt: skip
        table = pa.table({"task_index": list(self._tasks.values()), "task": list(self._tasks)})
        tasks = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
        _write_table(self.folder / "meta" / "tasks.parquet", tasks)
        for name, labels in names.items():
            self._features[name]["names"] = labels
        index = {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in INDEX.items()}
        info = {
            "codebase_version": VERSION, "robot_type": robot_type, "total_episodes": len(self.rows),
            "total_frames": self._frames, "total_tasks": len(self._tasks), "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": self.fps,
            "splits": {"train": f"0:{len(self.rows)}"}, "data_path": DATA, "video_path": None,
            "features": {**self._features, **index}, **extra,
        }  # fmt: skip
        _write_json(self.folder / "meta" / "info.json", info)
        stats = {name: _stats(np.concatenate(values)) for name, values in self._values.items()}
        _write_json(self.folder / "meta" / "stats.json", stats)
        return info


def _features(episode: Episode) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, images in episode.images.items():
        shape = list(images.shape[1:])
        if images.dtype != np.uint8 or len(images) != len(episode) or len(shape) != 3 or shape[2] != 3:
            raise ConfigError(f"images {name}", got=f"{images.dtype} {images.shape}", wanted="uint8 [T, h, w, 3]")
        found[name] = {"dtype": "image", "shape": shape, "names": ["height", "width", "channels"]}
    for name, vectors in episode.vectors.items():
        if vectors.ndim != 2 or len(vectors) != len(episode) or not np.isfinite(vectors).all():
            raise ConfigError(f"vectors {name}", got=f"{vectors.dtype} {vectors.shape}", wanted="finite [T, n]")
        found[name] = {"dtype": "float32", "shape": [vectors.shape[1]], "names": None}
    return found


def _stats(values: NDArray[Any]) -> dict[str, Any]:
    """Of a feature over all frames; pictures per channel, in [0, 1], shaped [3, 1, 1] as LeRobot has them."""
    picture = values.ndim == 4
    rows = values.reshape(-1, 3).astype(np.float64) / 255.0 if picture else values.astype(np.float64)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    found |= {name: np.quantile(rows, q, axis=0) for name, q in QUANTILES.items()}
    shaped = {name: (value.reshape(3, 1, 1) if picture else value).tolist() for name, value in found.items()}
    return {**shaped, "count": [len(values)]}


def _png(image: NDArray[np.uint8]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


# --- reading --------------------------------------------------------------------------------------------------------


def read_info(folder: Path) -> dict[str, Any]:
    """meta/info.json, checked. Raises ConfigError or Unsupported for what cannot be read here."""
    file = folder / "meta" / "info.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}", got=error, wanted="a LeRobot dataset") from error
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict) or "total_frames" not in info:
        raise ConfigError(f"{file} does not describe a dataset", wanted="features and total_frames")
    if info.get("codebase_version") != VERSION:
        raise Unsupported(
            f"{folder} is a dataset of another version", got=info.get("codebase_version"), wanted=VERSION,
            do="convert it with LeRobot: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30",
        )  # fmt: skip
    videos = [name for name, feature in info["features"].items() if feature.get("dtype") == "video"]
    if videos:
        raise Unsupported(
            f"{folder} keeps its images in video files", got=videos, wanted="images in the parquet files",
            do="record with --dataset.video=false, or export the episodes as images with LeRobot",
        )  # fmt: skip
    return info


def read_frames(folder: Path, *, wanted: int | None = None) -> Iterator[Frame]:
    """Rows in order; with `wanted`, that many spread evenly over the dataset. Raises as `read_info`."""
    info = read_info(folder)
    total = int(info["total_frames"])
    picked = None if wanted is None else set(np.linspace(0, total - 1, min(wanted, total)).round().astype(int).tolist())
    tasks = _tasks(folder)
    images = [name for name, feature in info["features"].items() if feature["dtype"] == "image"]
    vectors = [
        name for name, feature in info["features"].items()
        if name not in INDEX and str(feature["dtype"]).startswith("float") and len(feature["shape"]) == 1
    ]  # fmt: skip
    count = 0
    for file in sorted((folder / "data").rglob("*.parquet")):
        for row in _rows(file, [*images, *vectors, "episode_index", "index", "task_index"]):
            count += 1
            if picked is None or row["index"] in picked:
                yield Frame(
                    episode=row["episode_index"], index=row["index"],
                    images={name: _pixels(row[name], file) for name in images},
                    vectors={name: np.asarray(row[name], np.float32).reshape(-1) for name in vectors},
                    task=tasks[row["task_index"]],
                )  # fmt: skip
    if count != total:
        raise ConfigError(f"{folder} is incomplete", got=f"{count} frames", wanted=f"{total}, as meta/info.json says")


def _rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    pa = _pyarrow()
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(64, columns=columns):
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read {file}", got=error, wanted="a parquet file of a LeRobot dataset") from error


def _tasks(folder: Path) -> dict[int, str]:
    pa = _pyarrow()
    from pyarrow import parquet

    file = folder / "meta" / "tasks.parquet"
    try:
        rows = parquet.read_table(file).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read {file}", got=error) from error
    # pandas calls an index without a name __index_level_0__
    return {row["task_index"]: next(str(row[key]) for key in row if key != "task_index") for row in rows}


def _pixels(value: Any, file: Path) -> NDArray[np.uint8]:
    if not isinstance(value, dict) or not value.get("bytes"):
        raise ConfigError(f"an image in {file} is not stored in the file", got=str(value)[:60], wanted="{bytes, path}")
    try:
        with Image.open(io.BytesIO(value["bytes"])) as image:
            return np.asarray(image.convert("RGB"), np.uint8)
    except OSError as error:
        raise ConfigError(f"an image in {file} cannot be decoded", got=error) from error


def _pyarrow() -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise Unsupported("datasets need pyarrow, which is not installed", do="pip install 'vivace[dataset]'")
    import pyarrow

    return pyarrow


def _write_table(file: Path, table: Any) -> None:
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file)


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
