"Data sets: images, captions and which caption belongs to which image; tokens, augmentation, batches; a check-up."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    read="Split detect has_split load_split load_person read_image",
    batches="AugmentConfig PixelCache augment tokenize image_loader caption_loader pair_loader",
)
