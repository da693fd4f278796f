"""Media files to arrays: untrusted bytes in, bounded numpy arrays out.

Independent of the model. Decoding happens in memory, in the calling thread, and opens no file
and no address; several threads may decode at once.
"""

from ep_serve.media.clip import Clip, ClipPlan, decode_clip, plan_clip
from ep_serve.media.counter import DecodeCounter, decodes
from ep_serve.media.errors import MediaError
from ep_serve.media.image import decode_image, image_size
from ep_serve.media.limits import MediaLimits
from ep_serve.media.sampling import SamplingRule
from ep_serve.media.sound import SAMPLE_RATE, decode_sound, sound_seconds

__all__ = [
    "SAMPLE_RATE",
    "Clip",
    "ClipPlan",
    "DecodeCounter",
    "MediaError",
    "MediaLimits",
    "SamplingRule",
    "decode_clip",
    "decode_image",
    "decode_sound",
    "decodes",
    "image_size",
    "plan_clip",
    "sound_seconds",
]
