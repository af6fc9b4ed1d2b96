"Configuration, labels of an epoch, the training loop, checkpoints, several processes."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    config="MemoryConfig OptimConfig TrainConfig make_config",
    presets="PRESETS",
    labels="Features LabelConfig Labels epoch_labels",
    loop="fit",
    runs="RunResult score_run score_split train_run",
    checkpoint="load_run read_config read_history",
    hooks="load_function",
    settings="list_settings read_settings",
)
