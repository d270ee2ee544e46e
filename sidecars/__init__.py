"""Frozen encoders of other projects: images, sound and video become features that an ARB model reads.

A sidecar is a network that somebody else trained. Its own library loads it. It is held in int8 and never trained, so that it is no
state of the model. This package alone imports these libraries (`pip install "arbitor[sidecars,media]"`).
Prose: docs/spec/sidecars.md.
"""

from arbitor.sidecars.audio import AudioSidecar, audio_frames
from arbitor.sidecars.audit import SidecarAudit, audit_of, counted_mib, standard_audit
from arbitor.sidecars.encoders import Encoders
from arbitor.sidecars.features import FeatureCache
from arbitor.sidecars.media import (
    Blob,
    read_audio,
    read_frames,
    read_image,
    read_video,
    write_audio,
    write_image,
    write_video,
)
from arbitor.sidecars.sidecar import MachineError, MissingLibraryError, Sidecar, SidecarError
from arbitor.sidecars.video import VideoSidecar, whole_clip
from arbitor.sidecars.vision import VisionSidecar

__all__ = [
    "AudioSidecar",
    "Blob",
    "Encoders",
    "FeatureCache",
    "MachineError",
    "MissingLibraryError",
    "Sidecar",
    "SidecarAudit",
    "SidecarError",
    "VideoSidecar",
    "VisionSidecar",
    "audio_frames",
    "audit_of",
    "counted_mib",
    "read_audio",
    "read_frames",
    "read_image",
    "read_video",
    "standard_audit",
    "whole_clip",
    "write_audio",
    "write_image",
    "write_video",
]
