"""Run as a program of its own, and imported by nothing: whole fp32 weights of a DeepSpeed checkpoint, written as safetensors.

DeepSpeed's own reader unpickles the checkpoint's files, which is to run them. Arguments: the folder, the tag (empty: the one in
``latest``), and the file to write.
"""

from __future__ import annotations

import sys

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file

if __name__ == "__main__":
    folder, tag, output = sys.argv[1:]
    found = get_fp32_state_dict_from_zero_checkpoint(folder, tag or None)
    # Copies: tied weights are one storage under two names, which the format does not have.
    save_file({name: value.detach().clone().contiguous() for name, value in found.items()}, output, metadata={"format": "pt"})
