"""Weakly supervised text-based person retrieval: CPCL, its relatives, and what they need.

The names below are the front door. Each is imported from its own module when it is first asked for, so that
`import cpcl` is quick and brings in no torch. Every folder has a front door of its own: `from cpcl.data import ...`.
"""

__version__ = "0.1.0"

from . import _idle_threads as _idle_threads  # before anything imports torch
from ._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    data="load_split",
    encoder="EncoderConfig load_encoder features",
    cluster="pseudo_labels",
    oplm="mine",
    pmm="PrototypeMemory",
    hcm="Batch Loss Prototypes hcm_loss",
    eval="evaluate",
    train="fit make_config train_run load_run",
    hub="CPCL",
    search="Index",
)
