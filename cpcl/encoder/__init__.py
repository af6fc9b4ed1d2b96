"CLIP's two towers, their weights, and features in row order."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    towers="Encoder EncoderConfig architecture",
    weights="load_encoder save_encoder",
    torchscript="convert",
    extract="features",
)
