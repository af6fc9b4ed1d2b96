"""Methods of a class in cells of their own: a notebook defines a class, then adds each method where it explains it.

Written by hand. nbdev recognises methods of a class by the names of these decorators.
"""

import builtins, inspect


def patch_to(cls, cls_method=False, as_prop=False):
    "Decorator: make a function a method (or a property) of `cls`. Its name keeps what it meant in the module before."

    def add(function):
        name = function.__name__
        function.__qualname__ = f"{cls.__name__}.{name}"
        made = classmethod if cls_method else property if as_prop else lambda f: f
        setattr(cls, name, made(function))
        return inspect.unwrap(function).__globals__.get(name, getattr(builtins, name, None))

    return add


def patch(function=None, *, cls_method=False, as_prop=False):
    "Decorator: make a function a method of the class that its first parameter is annotated with."
    if function is None:
        return lambda function: patch(function, cls_method=cls_method, as_prop=as_prop)
    first = next(iter(inspect.signature(function).parameters.values()))
    if not isinstance(first.annotation, type) or first.annotation is first.empty:
        raise TypeError(f"annotate the first parameter of {function.__name__} with a class")
    return patch_to(first.annotation, cls_method, as_prop)(function)


def delegates(to):
    "Decorator: the signature shows the optional parameters of `to` in the place of `**kwargs`."

    def add(function):
        own = dict(inspect.signature(function).parameters)
        del own["kwargs"]
        for name, p in inspect.signature(to).parameters.items():
            if name not in own and p.default is not p.empty:
                own[name] = p.replace(kind=p.KEYWORD_ONLY)
        function.__signature__ = inspect.Signature(
            own.values(), return_annotation=inspect.signature(function).return_annotation
        )
        return function

    return add
