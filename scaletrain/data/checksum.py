"""CRC-32 as zlib has it, by the processor's own instructions where Intel's library is there: ten times as fast, equal bits."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32

__all__ = ["crc32"]
