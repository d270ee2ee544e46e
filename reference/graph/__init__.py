"""The ARB graph: modules that compose ops and hold state, with no ternary arithmetic of their own.

One graph serves every op set: `ArbModel(config, ops=...)` computes with the ops that it is given.
"""

from arbitor.reference.graph.attention import LatentAttention
from arbitor.reference.graph.context import GraphContext
from arbitor.reference.graph.heads import ByteHead
from arbitor.reference.graph.layers import TernaryEmbedding, TernaryLinear, TernaryRMSNorm
from arbitor.reference.graph.model import ArbModel
from arbitor.reference.graph.module import TernaryModule
from arbitor.reference.graph.moe import SharedProjectionMoE
from arbitor.reference.graph.sequencer import ByteEmbedding, TrigramSequencer
from arbitor.reference.graph.targets import Targets
from arbitor.reference.graph.trunk import ArbLayer
from arbitor.reference.graph.voting import Voting

__all__ = [
    "ArbLayer",
    "ArbModel",
    "ByteEmbedding",
    "ByteHead",
    "GraphContext",
    "LatentAttention",
    "SharedProjectionMoE",
    "Targets",
    "TernaryEmbedding",
    "TernaryLinear",
    "TernaryModule",
    "TernaryRMSNorm",
    "TrigramSequencer",
    "Voting",
]
