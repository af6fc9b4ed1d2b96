"An index over a folder of crops: a sentence in, pictures out; in a notebook, on a page, or from a program."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    index="Index",
    app="serve",
    layout="build_page",
)
