"The command `cpcl`."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    program="COMMANDS main parse",
    flags="flag_settings",
    training="result_table",
)
