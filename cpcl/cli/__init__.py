"The command `cpcl`."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    program="COMMANDS main parse",
    training="flag_settings result_table",
)
