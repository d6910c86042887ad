"""The records that travel through vivace, in the order in which an observation becomes actions. No logic.

Axis letters, here and everywhere: B batch, V views, L prompt tokens, S prefix tokens, H action horizon, A action dims
(`A` = the robot's, 32 = the model's padded width), N heads, D width, F mlp width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # `vivace doctor` must start where torch or numpy cannot be imported
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

PolicyKind = Literal["pi0", "pi05"]
NormMode = Literal["identity", "mean_std", "min_max", "quantiles", "quantile10"]
PromptFlavour = Literal["openpi_pi0", "openpi_pi05", "lerobot_pi0", "lerobot_pi05", "lerobot04_pi05"]
ImageFlavour = Literal["pil", "torch"]


# --- what a robot sends -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """One moment of one robot.

    views    {view name: uint8 [h, w, 3]}; the names are the embodiment's
    state    float [state_dim], robot units, unnormalised; None only where the policy does not use it
    prompt   the instruction as a person typed it
    t_obs    seconds on the caller's monotonic clock at exposure; None = not known
    tokens   int [L], an already tokenised prompt that replaces `prompt`; None = tokenise here
    """

    views: Mapping[str, NDArray[np.uint8]]
    state: NDArray[Any] | None
    prompt: str = ""
    t_obs: float | None = None
    tokens: NDArray[np.int32] | None = None


# --- what a robot is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera:
    """Where one view comes from.

    view      the model's name of the view; views enter the prefix in the order of `Embodiment.cameras`
    key       path of the array in a request, nested keys joined by "/" (openpi style), e.g. "observation/image"
    required  False: the view is left out when the request lacks it (masked in the originals, exactly removable)
    chw       True: the request carries [3, h, w] instead of [h, w, 3]
    aliases   other paths under which a request may carry the same camera
    """

    view: str
    key: str
    required: bool = True
    chw: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class StatePart:
    """One array of the request that is concatenated into the state.

    key    path in the request, nested keys joined by "/"
    size   number of values; a bare number counts as one
    units  for people: "rad", "m", "0 open .. 1 closed"
    aliases  other paths under which a request may carry the same array
    """

    key: str
    size: int
    units: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embodiment:
    """A robot as data: what it sends, what its actions mean. One TOML file describes one (docs/guides).

    delta_mask       per action dim: True = the policy predicts a difference to the current state; () = none
    action_dim       leading action dims that the robot takes
    joint_signs      multiplies state and actions on the way in and out (ALOHA); () = none
    gripper_adapter  named conversion of the gripper dims: "none" or "aloha"
    state_in_prompt  pi0.5 only: whether the discretised state is written into the prompt (openpi pi05_libero: no)
    ignored_keys     request keys that are accepted and dropped (ALOHA's cam_low)
    control_hz       control ticks per second; 0 = not known
    metadata         sent to every client on connection (openpi's policy_metadata)
    """

    name: str
    cameras: tuple[Camera, ...]
    state: tuple[StatePart, ...]
    action_dim: int
    delta_mask: tuple[bool, ...] = ()
    joint_signs: tuple[float, ...] = ()
    gripper_dims: tuple[int, ...] = ()
    gripper_adapter: Literal["none", "aloha"] = "none"
    state_in_prompt: bool = True
    prompt_key: str = "prompt"
    ignored_keys: tuple[str, ...] = ()
    control_hz: float = 0.0
    action_units: tuple[str, ...] = ()
    default_prompt: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NormStats:
    """Statistics of one vector (state or action), each float64 [n] or None where the file has none."""

    mean: NDArray[np.float64] | None = None
    std: NDArray[np.float64] | None = None
    min: NDArray[np.float64] | None = None
    max: NDArray[np.float64] | None = None
    q01: NDArray[np.float64] | None = None
    q99: NDArray[np.float64] | None = None
    q10: NDArray[np.float64] | None = None
    q90: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Normalization:
    """How state and actions are scaled. `flavour` fixes arithmetic and epsilon: openpi float64, LeRobot float32."""

    flavour: Literal["openpi", "lerobot"]
    state_mode: NormMode
    action_mode: NormMode
    state: NormStats
    action: NormStats
    eps: float


@dataclass(frozen=True)
class RobotIO:
    """Everything between a request and the model's inputs, and back; built by `robots.io.resolve`.

    image_pad           letterbox value in [0, 1] space before x*2-1 (LeRobot 0.4: -1, so that padding becomes -3)
    pad_state_to        state width before discretisation (LeRobot 0.4: 32); 0 = not padded
    max_prompt_tokens   longer prompts are an error that names the length
    action_width        the model's padded action width (32)
    image_size          pixels per side of a view as the model sees it (224)
    vocab_size          rows of the model's embedding, which bound the token ids; 0 = not known
    """

    embodiment: Embodiment
    normalization: Normalization
    prompt: PromptFlavour
    image: ImageFlavour
    image_pad: float = 0.0
    pad_state_to: int = 0
    max_prompt_tokens: int = 200
    action_width: int = 32
    image_size: int = 224
    vocab_size: int = 0


@dataclass(frozen=True)
class RobotFacts:
    """What a checkpoint folder itself says about its robot; everything else must come from the user.

    source              which family wrote the folder
    stats               {asset id: (state, action)}; LeRobot folders have the single id ""
    state_mode ...      normalisation modes (LeRobot: from norm_map; openpi: by policy kind)
    cameras             LeRobot: names of the VISUAL features in order, "observation.images." kept; openpi: ()
    relative_mask       LeRobot relative actions: per action dim; () = absolute
    rename              LeRobot rename_map {name in request: name in config}
    max_prompt_tokens   None = the family's default
    tokenizer_dir       the checkpoint's own tokenizer folder, if it ships one
    """

    source: Literal["openpi", "lerobot"]
    stats: Mapping[str, tuple[NormStats, NormStats]]
    state_mode: NormMode
    action_mode: NormMode
    eps: float
    prompt: PromptFlavour
    image_pad: float = 0.0
    pad_state_to: int = 0
    cameras: tuple[str, ...] = ()
    state_dim: int | None = None
    action_dim: int | None = None
    relative_mask: tuple[bool, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    tokenizer_dir: Path | None = None
    notes: tuple[str, ...] = ()


# --- what the model takes and gives -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedObservation:
    """One observation in model space, on the host (numpy); what `robots` hands to `runtime`.

    images       [V, 3, 224, 224]; uint8 (value/255*2-1 is left to the model) or float32 already in [-1, 1]
    tokens       int32 [L], valid tokens only
    state        float32 [32], normalised and zero-padded (pi0's continuous state; pi0.5 ignores it)
    state_robot  float64 or float32 [state_dim], before normalisation, after the embodiment's adapter: the reference of
                 delta actions
    state_normalized  [state_dim], unpadded, dtype of the flavour
    """

    images: NDArray[Any]
    tokens: NDArray[np.int32]
    state: NDArray[np.float32]
    state_robot: NDArray[Any]
    state_normalized: NDArray[Any]
    views: tuple[str, ...]
    prompt_text: str = ""
    t_obs: float | None = None


@dataclass(frozen=True)
class ModelInputs:
    """A batch in model space, on the backend's device.

    images      [B, V, 3, 224, 224], float32 in [-1, 1] or uint8
    tokens      int64 [B, L]
    view_mask   bool [B, V], None = all valid. Compaction leaves only valid views, so None is the normal case
    token_mask  bool [B, L], None = all valid; valid tokens come first
    state       float32 [B, 32], pi0 only
    """

    images: Tensor
    tokens: Tensor
    view_mask: Tensor | None = None
    token_mask: Tensor | None = None
    state: Tensor | None = None


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of the observation, read by every denoise step.

    k, v    one tensor per layer, [B, S, num_kv_heads, head_dim], K after RoPE, compute dtype
    mask    bool [B, S], None = every key valid
    length  int64 [B], valid tokens = position of the first suffix token. pi0: the state token is already appended
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    length: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class PreviousChunk:
    """Real-time chunking: what is left of the chunk that the robot is executing now.

    actions          float32 [B, H, 32], normalised, right-padded with zeros
    inference_delay  leading actions already committed to the robot, in control ticks
    mode             "trained": they are clamped, with flow time 0 per token; "guided": the velocity is pulled towards them
    weights          float32 [H], guided only, see `model.flow.prefix_weights`
    max_guidance     guided only, upper bound of the pull; a tensor [] where a captured graph reads it
    """

    actions: Tensor
    inference_delay: int
    mode: Literal["trained", "guided"]
    weights: Tensor | None = None
    max_guidance: float | Tensor = 10.0


@dataclass
class Trace:
    """Filled by a backend when the caller wants to see inside one inference; evidence commands only.

    vision_tokens  [B, V*256, D] after the projector        prefix_embeds  [B, S, D]
    x              N+1 tensors [B, H, 32], x[0] the noise   velocity       N tensors [B, H, 32], as the network gave it
    velocity_used  N tensors, what was integrated (differs from velocity only under guidance)
    cache          keys and values as the backend gave them     prepared  the observation in model space (first of a batch)
    """

    vision_tokens: Tensor | None = None
    prefix_embeds: Tensor | None = None
    x: list[Tensor] = field(default_factory=list)
    velocity: list[Tensor] = field(default_factory=list)
    velocity_used: list[Tensor] = field(default_factory=list)
    cache: PrefixCache | None = None
    prepared: PreparedObservation | None = None


@dataclass(frozen=True)
class ActionChunk:
    """The answer to one observation.

    actions             float [H, A], robot units, absolute; float64 for openpi's flavour, float32 for LeRobot's
    actions_normalized  float32 [H, 32], model space: what real-time chunking needs of the previous chunk
    milliseconds        {"total", "preprocess", "vision", "prefix", "denoise", "postprocess", ...}, host wall time of each
    engine              the ResolvedEngine that made it
    """

    actions: NDArray[Any]
    actions_normalized: NDArray[np.float32]
    t_obs: float | None
    control_hz: float
    milliseconds: Mapping[str, float]
    engine: Any
