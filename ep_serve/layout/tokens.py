"""The special token ids and time constants of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ep_serve.layout.kinds import Kind


@dataclass(frozen=True, slots=True)
class MediaTokens:
    """Token ids that mark media in a prompt, and the constants that turn seconds into positions.

    Attributes:
        audio, image, video: Placeholder ids, `<|AUDIO|>`, `<|IMAGE|>` and `<|VIDEO|>`.
        audio_bos, audio_eos, vision_bos, vision_eos: Ids of the tokens around a medium.
        position_id_per_seconds: Temporal positions in a second; audio tokens in a second, too.
        seconds_per_chunk: Length of the pieces in which picture and sound of a clip alternate.
        spatial_merge_size: Patches along each side of one vision token.
    """

    audio: int
    image: int
    video: int
    audio_bos: int
    audio_eos: int
    vision_bos: int
    vision_eos: int
    position_id_per_seconds: int = 25
    seconds_per_chunk: int = 2
    spatial_merge_size: int = 2

    @classmethod
    def from_config(
        cls,
        thinker_config: object,
        *,
        vision_bos: int | None = None,
        vision_eos: int | None = None,
    ) -> MediaTokens:
        """Read a thinker config, be it a config object or the mapping out of `config.json`.

        Args:
            thinker_config: Object or mapping with the names of Qwen2.5-Omni's thinker config.
            vision_bos: Id used where the config has no `vision_start_token_id`.
            vision_eos: Id used where the config has no `vision_end_token_id`.

        Raises:
            ValueError: A token id is in neither the config nor the arguments, or a number in the
                config is not a positive integer.
        """
        vision = _get(thinker_config, "vision_config")
        return cls(
            audio=_token(thinker_config, "audio_token_index", "audio_token_id"),
            image=_token(thinker_config, "image_token_index", "image_token_id"),
            video=_token(thinker_config, "video_token_index", "video_token_id"),
            audio_bos=_token(thinker_config, "audio_start_token_id"),
            audio_eos=_token(thinker_config, "audio_end_token_id"),
            vision_bos=_token(thinker_config, "vision_start_token_id", default=vision_bos),
            vision_eos=_token(thinker_config, "vision_end_token_id", default=vision_eos),
            position_id_per_seconds=_constant(thinker_config, "position_id_per_seconds", 25),
            seconds_per_chunk=_constant(thinker_config, "seconds_per_chunk", 2),
            spatial_merge_size=_constant(vision, "spatial_merge_size", 2),
        )

    def placeholder(self, kind: Kind) -> int:
        """Return the id that stands for a medium of this kind, and for each of its tokens.

        Raises:
            KeyError: The kind is `TEXT`.
        """
        return {Kind.VIDEO: self.video, Kind.AUDIO: self.audio, Kind.IMAGE: self.image}[kind]


def _get(config: object, name: str) -> object:
    if isinstance(config, Mapping):
        return config.get(name)
    return getattr(config, name, None)


def _token(config: object, *names: str, default: int | None = None) -> int:
    found = next((value for name in names if (value := _get(config, name)) is not None), default)
    if found is None:
        raise ValueError(f"the thinker config has no {' or '.join(names)}")
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"{names[0]} must be a token id, not {found!r}")
    return found


def _constant(config: object, name: str, default: int) -> int:
    found = _get(config, name)
    if found is None:
        return default
    if not isinstance(found, int | float) or found < 1 or found != int(found):
        raise ValueError(f"{name} must be a positive integer, not {found!r}")
    return int(found)
