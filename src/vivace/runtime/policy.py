"""A policy: checkpoint, robot, network and backend joined. `load_policy` builds one, `Policy.infer` runs it.

request --robots--> PreparedObservation --collate--> ModelInputs --backend--> actions --robots--> ActionChunk
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__
from ..backends import base
from ..backends.on_device import on
from ..backends.spans import Spans
from ..checkpoints.fingerprint import Fingerprint
from ..checkpoints.open import open_checkpoint
from ..checkpoints.source import Checkpoint
from ..config import EngineConfig, ResolvedEngine
from ..errors import ConfigError, NumericsError, ObservationError
from ..model import weights
from ..model.pi import Pi
from ..precision.coverage import grouped, summary
from ..precision.flavours import Dtype, parameter_dtype
from ..precision.plan import PrecisionPlan
from ..robots.io import resolve
from ..robots.pipeline import RobotPipeline
from ..robots.tokenizer import Tokenizer, load_tokenizer
from ..types import ActionChunk, Embodiment, Observation, PreparedObservation, PreviousChunk, RobotIO, Trace
from . import choice, coverage, gpu_memory
from . import noise as noise_source
from . import precision as precisions
from . import previous as previous_chunk
from .collate import SentViews, collate, page_locked, send_views, sent

logger = logging.getLogger(__name__)

Request = Observation | Mapping[str, Any]


class Policy:
    """Answers observations with action chunks. Safe to call from several threads: one inference runs at a time."""

    def __init__(
        self, *, checkpoint: Checkpoint, io: RobotIO, pipeline: RobotPipeline, backend: base.Backend, model: Pi,
        engine: ResolvedEngine, plan: PrecisionPlan | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.io, self.pipeline = checkpoint, io, pipeline
        self.backend, self.model, self.engine, self.plan = backend, model, engine, plan
        self._lock = threading.Lock()

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told when it connects: the embodiment's metadata."""
        return dict(self.io.embodiment.metadata)

    @property
    def quick(self) -> bool:
        """Whether answers take milliseconds, on any thread: replays of graphs do, once `warmup` has recorded them."""
        return self.backend.name == "cuda_graph"

    def prepare(self, request: Request) -> PreparedObservation:
        """Robot data to model space (host). Raises ObservationError naming the key that does not fit."""
        return self.pipeline.prepare(request)

    def infer(
        self,
        request: Request,
        *,
        noise: NDArray[np.float32] | None = None,
        previous: PreviousChunk | None = None,
        trace: Trace | None = None,
    ) -> ActionChunk:
        """Answer one observation.

        request   Observation, or a dict as an openpi client sends it; it may carry "noise" itself
        noise     float32 [H, 32], None = drawn (see EngineConfig.seed)
        previous  what is left of the chunk being executed, for real-time chunking
        trace     filled with intermediate tensors if given; for evidence, not for speed
        Raises    ObservationError, ShapeError, NumericsError
        """
        given = None if noise is None else np.asarray(noise)[None]
        return self._infer([request], given, previous, trace)[0]

    def infer_batch(
        self, requests: Sequence[Request], *, noise: NDArray[np.float32] | None = None,
        previous: PreviousChunk | None = None,
    ) -> list[ActionChunk]:  # fmt: skip
        """Answer several observations in one forward. Each answer equals the one alone, to rounding.

        noise     float32 [B, H, 32], None = drawn
        previous  what is left of the chunks being executed, actions [B, H, 32]; one delay and mode for all
        Raises    as `infer`
        """
        if not requests:
            return []
        return self._infer(requests, noise, previous, None)

    def warmup(
        self, prompt_tokens: Sequence[int] | None = None, *, chunking: Sequence[Literal["trained", "guided"]] = ()
    ) -> None:
        """Run once per prompt length, so that compilation, capture and page faults are over before a robot waits.

        prompt_tokens  lengths to run, with all cameras; None = what the backend needs so that no prompt that fits is its
                       first of a kind, and no missing optional camera either where the backend can afford it.
        chunking       kinds of real-time chunking that requests will use (`previous=`), beside requests without

        Also records, once, what the operations really ran: `engine.coverage`, and what the backend holds: `engine.details`.
        """
        cameras = self.io.embodiment.cameras
        counts = range(len(cameras), max(1, sum(camera.required for camera in cameras)) - 1, -1)
        if prompt_tokens is None:
            shapes = self.backend.warm_shapes(self.io.max_prompt_tokens, views=counts)
        else:
            shapes = tuple((len(cameras), length) for length in prompt_tokens)
        # longest first: the graphs of shorter prompts then fit into the working memory of longer ones
        rows = [self._blank(length, views) for views, length in sorted(shapes, reverse=True)]
        noise = np.zeros((1, self.engine.horizon, self.io.action_width), dtype=np.float32)
        with self._lock, on(self.model.device):
            for row in rows:
                for previous in (None, *(self._blank_chunk(noise, mode) for mode in chunking)):
                    self._rehearse(row, noise, previous)
            if rows and self.engine.coverage is None:
                seen = coverage.record(self, lambda: self._rehearse(rows[0], noise, None))
                self.engine = replace(self.engine, coverage={**summary(seen), "parts": grouped(seen)})
            self.describe_engine()

    def describe_engine(self) -> None:
        """Put into `engine.details` what the backend holds by now: graphs and kernels are there after a first call only."""
        self.engine = replace(self.engine, details={**self.engine.details, **self.backend.describe()})

    def _rehearse(
        self, row: PreparedObservation, noise: NDArray[np.float32], previous: PreviousChunk | None
    ) -> None:  # fmt: skip
        self._run([row], self._look([row.images]), noise, previous, None, Spans())

    @staticmethod
    def _blank_chunk(noise: NDArray[np.float32], mode: Literal["trained", "guided"]) -> PreviousChunk:
        """An older chunk of which nothing is committed."""
        weights = torch.zeros(noise.shape[1]) if mode == "guided" else None
        return PreviousChunk(torch.from_numpy(noise), 0, mode, weights)

    def _blank(self, tokens: int, views: int) -> PreparedObservation:
        """An observation of the first `views` cameras with a prompt of `tokens` tokens."""
        V, size = views, self.io.image_size
        return PreparedObservation(
            # the type that `prepare` hands over in this flavour: static programs depend on it
            images=np.zeros((V, 3, size, size), dtype=np.uint8 if self.io.image == "pil" else np.float32),
            tokens=np.full(min(tokens, self.io.max_prompt_tokens), 2, dtype=np.int32),
            state=np.zeros(self.io.action_width, dtype=np.float32),
            state_robot=np.zeros(0), state_normalized=np.zeros(0),
            views=tuple(camera.view for camera in self.io.embodiment.cameras[:V]),
        )  # fmt: skip

    def _infer(
        self,
        requests: Sequence[Request],
        noise: NDArray[np.float32] | None,
        previous: PreviousChunk | None,
        trace: Trace | None,
    ) -> list[ActionChunk]:
        total, spans = Spans(), Spans(cuda=self.model.device.type == "cuda")
        with total("total"):
            with total("preprocess"):
                empty = page_locked if self.model.device.type == "cuda" else np.empty
                seen = [self.pipeline.see(request, empty=empty) for request in requests]
            with self._lock, on(self.model.device):
                views = self._look([one.images for one in seen], ahead=trace is None)
                with total("preprocess"):  # on a GPU: while it runs vision
                    rows = [self.pipeline.read(one) for one in seen]
                    drawn = self._noise(requests, rows, noise)
                normalized = self._run(rows, views, drawn, previous, trace, spans)
                device_ms = spans.milliseconds()  # here: the next request records the same events again
            with total("postprocess"):
                actions = [self.pipeline.finish(a, row) for a, row in zip(normalized, rows, strict=True)]
        milliseconds = {**device_ms, **total.milliseconds()}
        return [
            ActionChunk(
                actions=a,
                actions_normalized=n,
                t_obs=row.t_obs,
                control_hz=self.io.embodiment.control_hz,
                milliseconds=milliseconds,
                engine=self.engine,
            )
            for a, n, row in zip(actions, normalized, rows, strict=True)
        ]

    def _look(self, images: Sequence[NDArray[Any]], *, ahead: bool = True) -> SentViews:
        """Send the pictures of the requests to the device, and let the backend begin with them."""
        device = self.model.device
        with gpu_memory.explained("an inference", device=device):
            views = send_views(images, device)
            if ahead:
                self.backend.look(views.images)
        return views

    def _run(
        self,
        rows: Sequence[PreparedObservation],
        views: SentViews,
        noise: NDArray[np.float32],
        previous: PreviousChunk | None,
        trace: Trace | None,
        spans: Spans,
    ) -> NDArray[np.float32]:
        device = self.model.device
        previous = previous_chunk.checked(previous, shape=noise.shape, device=device)
        with gpu_memory.explained("an inference", device=device):
            inputs = collate(rows, kind=self.model.config.kind, device=device, views=views)
            start = sent(noise, device)
            if trace is None:
                x = self.backend.infer(inputs, start, previous=previous, spans=spans)
            else:
                trace.cache, trace.prepared = self.backend.prefill(inputs, trace=trace, spans=spans), rows[0]
                x = self.backend.denoise(trace.cache, start, previous=previous, trace=trace, spans=spans)
            actions: NDArray[np.float32] = x.float().cpu().numpy()
        if not np.isfinite(actions).all():
            raise NumericsError(
                "the policy produced actions that are not finite", got=f"engine {self.engine.backend}",
                do="run `vivace check` on this checkpoint and precision",
            )  # fmt: skip
        return actions

    def _noise(
        self, requests: Sequence[Request], rows: Sequence[PreparedObservation], noise: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        shape = (self.engine.horizon, self.io.action_width)
        if noise is not None:
            return noise_source.checked(noise, shape=(len(rows), *shape))
        drawn = []
        for request, row in zip(requests, rows, strict=True):
            own = request.get("noise") if isinstance(request, Mapping) else None
            if own is not None:
                drawn.append(noise_source.checked(own, shape=shape))
            else:
                drawn.append(noise_source.draw(self.engine.seed, row, horizon=shape[0], width=shape[1]))
        return np.stack(drawn)


def load_policy(
    path: str | Path,
    *,
    embodiment: Embodiment | str | Path | None = None,
    tokenizer: str | Path | None = None,
    config: EngineConfig | None = None,
    asset_id: str | None = None,
    horizon: int | None = None,
    vision_heads: int | None = None,
    default_prompt: str | None = None,
    max_prompt_tokens: int | None = None,
    lerobot_version: Literal["auto", "0.4", "0.5", "0.6"] = "auto",
) -> Policy:
    """Load a checkpoint and make it ready to answer.

    path          openpi (safetensors or Orbax) or LeRobot folder
    embodiment    name ("libero", "droid", "aloha", ...), a TOML file, or None = what the folder says
    tokenizer     .model or tokenizer.json, "splintr", or None = the checkpoint's own or the usual caches
    config        how to run it; None = EngineConfig()
    asset_id      openpi: which norm_stats to use where there are several
    horizon       actions per chunk where the checkpoint does not say
    vision_heads  attention heads of the vision tower where they are not 72 wide
    max_prompt_tokens  longest prompt where training used another limit than the family's (48 for pi0, 200 for pi0.5)
    Raises        CheckpointError, ConfigError, Unsupported
    """
    config = config if config is not None else EngineConfig()
    checkpoint = open_checkpoint(path, horizon=horizon, vision_heads=vision_heads, lerobot_version=lerobot_version)
    pipeline = _robot(
        checkpoint, embodiment=embodiment, tokenizer=tokenizer, asset_id=asset_id, default_prompt=default_prompt,
        max_prompt_tokens=max_prompt_tokens,
    )  # fmt: skip
    io = pipeline.io
    if config.num_denoise_steps is None:
        config = replace(config, num_denoise_steps=checkpoint.num_denoise_steps)
    device, precision = choice.device(config), precisions.resolve(config.precision, checkpoint)
    choice.refuse_early(config, device)
    seen = Fingerprint()
    model, plan, chosen, backend = _built(checkpoint, config, precision, device=device, seen=seen)
    engine = ResolvedEngine(
        backend=chosen.name, device=str(device), precision=precision.label, num_denoise_steps=config.steps,
        seed=config.seed, checkpoint=str(checkpoint.path), policy_kind=checkpoint.model.kind,
        horizon=checkpoint.model.horizon, action_dim=io.embodiment.action_dim, flavour=checkpoint.model.flavour,
        version=__version__, details={**backend.describe(), **chosen.facts}, checkpoint_hash=seen.digest(), plan=plan,
    )  # fmt: skip
    logger.info("engine: %s", engine.to_json())
    return Policy(
        checkpoint=checkpoint, io=io, pipeline=pipeline, backend=backend, model=model, engine=engine,
        plan=precision.plan,
    )  # fmt: skip


def _built(
    checkpoint: Checkpoint, config: EngineConfig, precision: precisions.Precision, *, device: torch.device,
    seen: Fingerprint,
) -> tuple[Pi, dict[str, Any] | None, choice.Chosen, base.Backend]:  # fmt: skip
    """The network on the device under its plan, that plan's facts, and the backend that will run it."""
    with gpu_memory.explained("loading the weights", device=device), on(device):
        model = load_model(checkpoint, device=device, precision=precision.dtype, seen=seen)
        plan = precisions.quantise(model, precision, checkpoint_hash=seen.digest())
        chosen = choice.backend(config, device, model, quantised=bool(plan and plan["layers"]))
        return model, plan, chosen, base.build(chosen.name, model, config, plan=precision.plan)


def _robot(
    checkpoint: Checkpoint, *, embodiment: Embodiment | str | Path | None, tokenizer: str | Path | None,
    asset_id: str | None, default_prompt: str | None, max_prompt_tokens: int | None,
) -> RobotPipeline:  # fmt: skip
    """Everything between a request and the model's inputs: what the folder says, and what the caller adds."""
    io = resolve(
        checkpoint.robot, checkpoint.model.kind, embodiment=embodiment, asset_id=asset_id,
        image_size=checkpoint.model.vision.image_size, action_width=checkpoint.model.action_width,
        max_prompt_tokens=max_prompt_tokens, vocab_size=checkpoint.model.vocab_size,
    )  # fmt: skip
    if default_prompt is not None:
        io = replace(io, embodiment=replace(io.embodiment, default_prompt=default_prompt))
    return RobotPipeline(io, _tokenizer(tokenizer, checkpoint))


def load_model(checkpoint: Checkpoint, *, device: torch.device, precision: Dtype, seen: Fingerprint) -> Pi:
    """The checkpoint's network on `device`, in the checkpoint's own flavour of `precision`; `seen` hashes what is read."""
    flavour = checkpoint.model.flavour
    return weights.load(
        checkpoint.model,
        seen.watch(checkpoint.tensors),
        device=device,
        dtype_of=lambda name: parameter_dtype(name, precision=precision, flavour=flavour),
    )


class _NoTokenizer:
    """Stands in where no tokenizer was found: pre-tokenised requests work, text explains what is missing."""

    source = "none"

    def __init__(self, reason: ConfigError) -> None:
        self._reason = reason

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Always raises: says where to get a tokenizer."""
        raise ObservationError(
            "this request carries text, but no tokenizer was found", got=repr(text[:40]), do=str(self._reason)
        )


def _tokenizer(explicit: str | Path | None, checkpoint: Checkpoint) -> Tokenizer:
    try:
        return load_tokenizer(explicit, checkpoint_dir=checkpoint.path)
    except ConfigError as error:
        if explicit is not None:
            raise
        logger.warning("%s", error)
        return _NoTokenizer(error)
