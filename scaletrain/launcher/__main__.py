"""``python -m scaletrain.launcher ORDER``: what ssh or pdsh start on a node."""

from __future__ import annotations

import sys

from scaletrain.launcher import node

if __name__ == "__main__":
    sys.exit(node.main(sys.argv[1:]))
