"Data sets: images, captions and which caption belongs to which image; tokens, augmentation, batches; a check before a run."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    read="Split detect has_split load_split load_person load_camera",
    images="read_image PixelCache",
    tokens="tokenize",
    augment="AugmentConfig",
    batches="image_loader caption_loader pair_loader",
)
