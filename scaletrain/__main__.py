"""``python -m scaletrain VERB ...``: what launchers start on each rank."""

from __future__ import annotations

import sys

from scaletrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
