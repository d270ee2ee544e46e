"""``arb train`` as a module, which torchrun starts on every rank:

    torchrun --nproc-per-node 2 -m arbitor.train --preset small --data FILE_OR_FOLDER --out runs/mine

The options are those of ``arb train``. torchrun takes ``--run`` for the beginning of an option of its own, so ``--out`` names the
run folder.
"""

from __future__ import annotations

import sys

from arbitor.optimized.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
