"""What is kept on disk: model directories (directory.py), and stores of snapshots (snapshots.py) with their guard.

Refuses to import torch before a model is written or read. Source: DESIGN; the layouts are ours.
"""

from selfparam.store.directory import (
    RECORD,
    check_out,
    history_of,
    model_card,
    number,
    read_record,
    unfinished_beside,
    write_model,
    writing_beside,
)

__all__ = ["RECORD", "check_out", "history_of", "model_card", "number", "read_record", "unfinished_beside",
           "write_model", "writing_beside"]
