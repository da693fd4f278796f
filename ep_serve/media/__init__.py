"""Media files to arrays: untrusted bytes in, bounded numpy arrays out.

Nothing here knows a model. Decoding happens in memory, in the calling thread, and opens no file
and no address; several threads may decode at once.
"""

from ep_serve.media.clip import Clip, decode_clip
from ep_serve.media.counter import DecodeCounter, decodes
from ep_serve.media.errors import MediaError
from ep_serve.media.image import decode_image
from ep_serve.media.limits import MediaLimits
from ep_serve.media.sampling import SamplingRule
from ep_serve.media.sound import SAMPLE_RATE, decode_sound

__all__ = [
    "SAMPLE_RATE",
    "Clip",
    "DecodeCounter",
    "MediaError",
    "MediaLimits",
    "SamplingRule",
    "decode_clip",
    "decode_image",
    "decode_sound",
    "decodes",
]
