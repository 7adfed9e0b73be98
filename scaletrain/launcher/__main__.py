"""``python -m scaletrain.launcher ORDER``: what ssh or pdsh start on a node."""

from __future__ import annotations

import os
import sys

from scaletrain.launcher import node

if __name__ == "__main__":
    os.umask(os.umask(0o077) | 0o077)  # as cli.main does
    sys.exit(node.main(sys.argv[1:]))
