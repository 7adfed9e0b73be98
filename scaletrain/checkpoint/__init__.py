"""Checkpoints that exist whole or not at all, and fit any number of ranks.

::

    RUN/checkpoints/
        step-00000400/
            state-00000-of-00002.safetensors     the pieces of rank 0: weight/NAME, exp_avg/NAME, exp_avg_sq/NAME, buffer/NAME
            state-00001-of-00002.safetensors     the pieces of rank 1; state-00001-of-00002-00001.safetensors has more of them
            MANIFEST.json                        written last: step, cursor, identity, shapes, and size and SHA-256 of every file
        .step-00000800.partial/                  a save that was cut short: ignored, swept by the next save
        latest                                   the newest step's name: a hint for people, never trusted

A checkpoint exists if and only if its manifest verifies. It is written beside its place, made durable, and renamed, by all ranks
together: see :mod:`scaletrain.commit`. A :class:`Saver` does so beside the training; :func:`save` waits.

What is kept beside a model, without moments (a Fisher diagonal), is written by :func:`write_state` in the same form: a folder of
one part, with a file per rank and a manifest.

Every piece is flat fp32 and says in the file's own header where it starts in its flattened parameter. Reading at another world
size is therefore arithmetic on ranges; nothing is converted and nothing is unpickled.
"""

from scaletrain.checkpoint.finding import find, newest, of_step, set_aside
from scaletrain.checkpoint.manifest import Checkpoint, CheckpointConfig, Progress
from scaletrain.checkpoint.pieces import Piece
from scaletrain.checkpoint.reading import check_identity, differences, read_state, restore, state_shapes, weights
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.writing import go_back, save, write_state

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "Piece",
    "Progress",
    "Saver",
    "check_identity",
    "differences",
    "find",
    "go_back",
    "newest",
    "of_step",
    "read_state",
    "restore",
    "save",
    "set_aside",
    "state_shapes",
    "weights",
    "write_state",
]
