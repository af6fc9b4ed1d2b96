"Experiments: runs that leave records, tables made from records, the tiny CLIP's pre-training, the demo."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    records=(
        "Spec run_missing bench_set seed_table mean_table val_table seed_plot difference against "
        "gap_closed"
    ),
    demo="sample_set ranked_picture",
    pretrain="PretrainConfig",
)
