"""The ops of `arbitor.reference.ops` on Triton: same names, signatures, results and refusals.

They run on CUDA, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before the import).
"""

from arbitor.optimized.ops.activations import *
from arbitor.optimized.ops.attention import *
from arbitor.optimized.ops.codebook import *
from arbitor.optimized.ops.conv import *
from arbitor.optimized.ops.denoise import *
from arbitor.optimized.ops.dither import *
from arbitor.optimized.ops.edges import *
from arbitor.optimized.ops.embedding import *
from arbitor.optimized.ops.experts import *
from arbitor.optimized.ops.layout import *
from arbitor.optimized.ops.linear import *
from arbitor.optimized.ops.memory import *
from arbitor.optimized.ops.norm import *
from arbitor.optimized.ops.orthogonal import *
from arbitor.optimized.ops.packing import *
from arbitor.optimized.ops.scale import *
from arbitor.optimized.ops.update import *
from arbitor.optimized.ops.votes import *
from arbitor.reference.op_table import OP_TABLE

# A function without a row in the table is no op.
__all__ = [name for name in sorted(OP_TABLE) if callable(globals().get(name))]
