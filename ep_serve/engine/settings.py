"""Server settings and the request fields that may override them.

Server settings come from vLLM's own options: `--additional-config '{"ep_serve": {...}}'` for what
belongs to this project and `--mm-processor-kwargs '{...}'` for the processing of media. A request
may override the fields of `RequestOptions`, inside the bounds that the server sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from vllm.exceptions import VLLMValidationError

from ep_serve.checkpoint.config import MEDIA_DEFAULTS, MODEL_TYPE, ReductionConfig
from ep_serve.contract.generation import DEFAULT_MAX_N
from ep_serve.contract.request_options import (
    MAX_FPS,
    MAX_PIXELS,
    MIN_FPS,
    TOKEN_PIXELS,
    RequestOptions,
    describe_option_error,
)
from ep_serve.sieve import Budget, get_sieve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import ModelConfig, VllmConfig

ADDITIONAL_CONFIG_KEY = "ep_serve"
"""The entry of vLLM's `additional_config` that holds this project's settings."""

_HF_ATTRIBUTE = "ep_serve_settings"
"""Where the resolved settings travel to every process: an attribute of the model's config."""

_T = TypeVar("_T")

OPTIONS_KEY = "ep_serve"
"""Entry of `media_io_kwargs` in which the options of a request reach the media connector."""


class MediaSettings(BaseModel):
    """How media become tokens; the defaults are those of the Qwen2.5-Omni processor.

    `--mm-processor-kwargs` sets them for the server.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the AV tokens to keep; the checkpoint's `compression_ratio` if not given."""
    rho_audio: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the audio tokens to drop, for sieves with separate rates."""
    rho_video: float | None = Field(default=None, ge=0, le=1)
    """The same for the pictures of clips."""
    fps: float = Field(default=2.0, ge=MIN_FPS, le=MAX_FPS)
    """Frames sampled from each second of a video."""
    min_pixels: int | None = Field(default=None, ge=TOKEN_PIXELS, le=MAX_PIXELS)
    """Smaller frames and pictures are enlarged to this many pixels."""
    max_pixels: int | None = Field(default=None, ge=TOKEN_PIXELS, le=MAX_PIXELS)
    """Larger frames and pictures are shrunk to this many pixels; also the bound for requests.

    By default `FRAME_PIXELS` for video frames and the checkpoint's own bound for pictures.
    """
    max_frames: int = Field(default=768, ge=2, le=100_000)
    """Frames sampled from one video at most; longer videos are sampled more sparsely."""
    max_fps: float = Field(default=4.0, ge=MIN_FPS, le=MAX_FPS)
    """The highest `fps` a request may ask for."""
    use_audio_in_video: bool = True
    """Whether the sound track of a video is used."""

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        low, high = self.min_pixels, self.max_pixels
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_pixels ({low}) is greater than max_pixels ({high})")
        if self.fps > self.max_fps:
            raise ValueError(f"fps ({self.fps}) is greater than max_fps ({self.max_fps})")
        self.budget()
        return self

    def pixel_limit(self, own: int) -> int:
        """The most pixels a request may ask for, where `own` is the model's bound."""
        return self.max_pixels or max(own, self.min_pixels or 0)

    def budget(self, keep_ratio: float | None = None) -> Budget:
        """The budget of a request without options; `keep_ratio` if the server sets none."""
        if self.rho_audio is None and self.rho_video is None:
            return Budget(keep_ratio=self.keep_ratio or keep_ratio)
        return Budget(self.keep_ratio, self.rho_audio, self.rho_video)


class EngineSettings(BaseModel):
    """The `ep_serve` entry of vLLM's `additional_config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sieve: str | None = None
    """Name of the sieve in the registry; that of an EchoingPixels checkpoint is cs2."""
    max_full_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt before reduction, in tokens; four times `max_model_len` if not given.

    Device memory is profiled with a prompt of this length, longer ones are refused.
    """
    tower_cache_gib: float = Field(default=1.0, ge=0)
    """Memory for the tower outputs of recent media, on the device of the model."""
    media_cache_gib: float = Field(default=2.0, ge=0)
    """Memory for the processed pixels and spectra of recent media, in the API process."""
    decode_memory_gib: float = Field(default=4.0, gt=0)
    """Memory for decoding media and computing their features at the same time, in the API process.

    Media whose estimated need is not free wait for those before them.
    """
    request_memory_gib: float = Field(default=4.0, gt=0)
    """Memory for request bodies and the media fetched from their URLs, in the API process.

    One request may take a quarter of it (HTTP 413); a body counts five times. Requests beyond all
    of it are refused (HTTP 503).
    """
    max_media_seconds: float = Field(default=1800.0, gt=0)
    """Longest video or sound that is decoded."""
    decode_timeout_s: float = Field(default=60.0, gt=0)
    """Wall time for decoding one medium."""
    max_n: int = Field(default=DEFAULT_MAX_N, ge=1, le=16_384)
    """Most answers to one request (`n`)."""
    step_timeout_s: float | None = Field(default=None, gt=0)
    """Longest step of the engine: `/health` fails after that; see `health.py` for the default."""


SOUND_FIELD = "use_audio_in_video"
HIDDEN_SOUND_FIELD = "sound"
"""The name under which `use_audio_in_video` travels through vLLM.

vLLM's chat parser acts on that name itself: it would add the sound as one more medium.
"""
REQUEST_FIELDS = frozenset(RequestOptions.model_fields)
"""Names of the fields in a request."""


class Settings(BaseModel):
    """All settings of a running server."""

    model_config = ConfigDict(frozen=True)

    media: MediaSettings
    engine: EngineSettings
    sieve: str
    refines: bool
    """The checkpoint has a refiner: the whole prompt, text too, goes through it."""
    keep_ratio: float | None
    """That of the checkpoint, if it has one."""
    max_full_tokens: int

    @classmethod
    def resolve(cls, vllm_config: VllmConfig) -> Settings:
        """Read and check the settings of a server that starts.

        Raises:
            ValueError: one sentence for each setting that makes no sense.
        """
        model_config = vllm_config.model_config
        given: Any = vllm_config.additional_config or {}
        own = given.get(ADDITIONAL_CONFIG_KEY, {}) if isinstance(given, dict) else {}
        return cls._build(model_config, own)

    @classmethod
    def _build(cls, model_config: ModelConfig, own: Mapping[str, Any]) -> Settings:
        mm_config = model_config.multimodal_config
        media_kwargs = (mm_config.mm_processor_kwargs if mm_config else None) or {}
        trained_with = getattr(model_config.hf_config, MEDIA_DEFAULTS, None) or {}
        try:
            engine = EngineSettings(**own)
            media = MediaSettings(**(trained_with | media_kwargs))
        except ValidationError as error:
            raise ValueError(_sentences(error)) from None
        refines = model_config.hf_config.model_type == MODEL_TYPE
        reduction = ReductionConfig.from_hf(model_config.hf_config) if refines else None
        sieve = engine.sieve or ("cs2" if refines else None)
        if sieve is None:
            raise ValueError(
                "this checkpoint has no sieve: set --sieve to omnizip, uniform, random or none"
            )
        return cls(
            media=media,
            engine=engine,
            sieve=sieve,
            refines=refines,
            keep_ratio=reduction.keep_ratio if reduction else None,
            max_full_tokens=engine.max_full_tokens or 4 * model_config.max_model_len,
        )

    @property
    def whole_prompt(self) -> bool:
        """Whether the reduction of a clip depends on the text around it."""
        return self.refines or get_sieve(self.sieve).reads_text

    def attach(self, model_config: ModelConfig) -> None:
        """Keep the settings on the model's config, which every process receives."""
        setattr(model_config.hf_config, _HF_ATTRIBUTE, self.model_dump())

    @classmethod
    def of(cls, model_config: ModelConfig) -> Settings:
        """The settings attached to a model's config, or the defaults."""
        attached = getattr(model_config.hf_config, _HF_ATTRIBUTE, None)
        return cls(**attached) if attached else cls._build(model_config, {})

    def merge(self, request: Mapping[str, object]) -> MediaOptions:
        """Merge the options of a request with the server's, inside the server's bounds.

        Raises:
            VLLMValidationError: names the field, the limit and the value (HTTP 400).
        """
        requested = parse_request_options(request)
        media = self.media
        _check_at_most("fps", requested.fps, media.max_fps)
        if media.max_pixels is not None:
            _check_at_most("max_pixels", requested.max_pixels, media.max_pixels)
            _check_at_most("min_pixels", requested.min_pixels, media.max_pixels)
        low = requested.min_pixels if requested.min_pixels is not None else media.min_pixels
        high = requested.max_pixels if requested.max_pixels is not None else media.max_pixels
        if low is not None and high is not None and low > high:
            if requested.min_pixels is not None:
                raise _invalid("min_pixels", f"must be at most max_pixels ({high})", low)
            low = high
        budget = self._budget(requested)
        return MediaOptions(
            keep_ratio=budget.keep_ratio,
            rho_audio=budget.rho_audio,
            rho_video=budget.rho_video,
            fps=_first(requested.fps, media.fps),
            min_pixels=low,
            max_pixels=high,
            sound=_first(requested.use_audio_in_video, media.use_audio_in_video),
            return_selection=bool(requested.return_selection),
        )

    def _budget(self, requested: RequestOptions) -> Budget:
        given = (requested.keep_ratio, requested.rho_audio, requested.rho_video)
        if given == (None, None, None):
            return self.media.budget(self.keep_ratio)
        takes_rho = get_sieve(self.sieve).takes_rho
        for name in ("rho_audio", "rho_video"):
            value = getattr(requested, name)
            if value is not None and not takes_rho:
                raise _invalid(name, f"is not supported by the sieve {self.sieve!r}", value)
            if value is not None and requested.keep_ratio is not None:
                raise _invalid(name, "cannot be given together with keep_ratio", value)
        return Budget(*given)


class MediaOptions(BaseModel):
    """The options in force for one request."""

    model_config = ConfigDict(frozen=True)

    keep_ratio: float | None
    rho_audio: float | None
    rho_video: float | None
    fps: float
    min_pixels: int | None
    max_pixels: int | None
    sound: bool
    return_selection: bool = False

    @property
    def budget(self) -> Budget:
        """The budget, in the form that sieves take."""
        return Budget(self.keep_ratio, self.rho_audio, self.rho_video)

    @property
    def shaping(self) -> dict[str, object]:
        """The options that a medium's features depend on."""
        return self.model_dump(include={"fps", "min_pixels", "max_pixels", "sound"})


def parse_request_options(fields: Mapping[str, object]) -> RequestOptions:
    """Validate the request fields of this project.

    Raises:
        VLLMValidationError: names the field and what is wrong with its value (HTTP 400).
    """
    named = {
        SOUND_FIELD if name == HIDDEN_SOUND_FIELD else name: value for name, value in fields.items()
    }
    for name in named.keys() - REQUEST_FIELDS:
        known = ", ".join(sorted(REQUEST_FIELDS))
        raise _invalid(name, f"is not a supported option (supported: {known})", None)
    try:
        return RequestOptions.model_validate(named)
    except ValidationError as error:
        name, sentence = describe_option_error(error)
        raise VLLMValidationError(sentence, parameter=name) from None


def hide_sound_field(fields: Mapping[str, object]) -> dict[str, Any]:
    """The same fields, with `use_audio_in_video` under its hidden name."""
    return {
        HIDDEN_SOUND_FIELD if name == SOUND_FIELD else name: value for name, value in fields.items()
    }


def _first(requested: _T | None, default: _T) -> _T:
    return default if requested is None else requested


def _check_at_most(name: str, value: float | None, limit: float) -> None:
    if value is not None and value > limit:
        raise _invalid(name, f"must be at most {limit}, the limit of this server", value)


def _invalid(name: str, reason: str, value: object) -> VLLMValidationError:
    shown = "" if value is None else f" (got {value!r})"
    return VLLMValidationError(f"{name} {reason}{shown}.", parameter=name)


def _sentences(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'setting'}: {item['msg']}"
        for item in error.errors()
    )
