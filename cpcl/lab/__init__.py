"Experiments: runs that leave records, tables made from records, the tiny CLIP's pre-training, the demo."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    records="Spec Record read_records by_device",
    grid="run_missing bench_set",
    tables=(
        "seed_table mean_table val_table device_tables seed_plot difference against gap_closed "
        "answer verdict verdicts share_text with_missing"
    ),
    notebooks="run_notebook measured",
    demo="sample_set ranked_picture",
    pretrain="PretrainConfig",
)
