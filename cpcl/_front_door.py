"What the packages of cpcl share: a front door, whose names are imported when they are first asked for."

from importlib import import_module


def front_door(package, **modules):
    """`__getattr__`, `__dir__` and `__all__` of a package that offers names of its modules (PEP 562).

    `package`: its `__name__`. `modules`: a module below it -> the names it is asked for, separated by spaces.
    Importing the package stays cheap: `import cpcl` brings in no torch.
    """
    home = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    def __dir__():
        return sorted(home)

    return __getattr__, __dir__, sorted(home)
