"Configuration, labels of an epoch, the training loop, checkpoints, several processes."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    config="PRESETS TrainConfig OptimConfig MemoryConfig make_config",
    labels="LabelConfig epoch_labels",
    loop="fit train_run score_run score_split",
    checkpoint="load_run read_config read_history",
)
