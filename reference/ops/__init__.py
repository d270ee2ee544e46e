"""The rules, as pure functions on tensors and ternary weights. A family is a file. `arbitor.optimized.ops` mirrors every name."""

from arbitor.reference.op_table import OP_TABLE
from arbitor.reference.ops.activations import *
from arbitor.reference.ops.attention import *
from arbitor.reference.ops.codebook import *
from arbitor.reference.ops.conv import *
from arbitor.reference.ops.denoise import *
from arbitor.reference.ops.dither import *
from arbitor.reference.ops.edges import *
from arbitor.reference.ops.embedding import *
from arbitor.reference.ops.experts import *
from arbitor.reference.ops.layout import *
from arbitor.reference.ops.linear import *
from arbitor.reference.ops.memory import *
from arbitor.reference.ops.norm import *
from arbitor.reference.ops.orthogonal import *
from arbitor.reference.ops.packing import *
from arbitor.reference.ops.scale import *
from arbitor.reference.ops.update import *
from arbitor.reference.ops.votes import *

# A function without a row in the table is no op.
__all__ = [name for name in sorted(OP_TABLE) if callable(globals().get(name))]
