"""``arb smoke`` as a module, ``python -m arbitor.smoke``, as the seed documents call it. The options are the same."""

from __future__ import annotations

import sys

from arbitor.optimized.cli import main

if __name__ == "__main__":
    main(["smoke", *sys.argv[1:]])
