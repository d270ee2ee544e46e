"""``arb finetune`` as a module, which torchrun starts on every rank:

    torchrun --nproc-per-node 2 -m arbitor.finetune --base runs/mine --data FILE_OR_FOLDER --out runs/adapted

The options are those of ``arb finetune``, with ``--out`` for ``--run`` as in `arbitor.train`.
"""

from __future__ import annotations

import sys

from arbitor.optimized.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
