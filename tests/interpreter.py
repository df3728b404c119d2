"""Triton's interpreter without work that it does again and again; what the kernels compute is its own.

Every call of a function inside a kernel has it look through all of `triton.language` for what to replace, though the
launch has replaced it; every value has it make a table of all dtypes; a reduction by a function of the kernel's is
done element by element. Together that is half of the time of an interpreted test. A Triton in which a name below is
missing is left as it is.
"""

import functools

import numpy as np


def quicken() -> None:
    """Does so for this process, whose Triton interprets."""
    from triton.runtime import interpreter

    for place, name, quicker in (
        (interpreter, "_patch_lang", _patched_once),
        (interpreter, "_get_np_dtype", _remembered),
        (getattr(interpreter, "ReduceOps", None), "generic_reduce", _by_slices),
    ):
        if hasattr(place, name):
            setattr(place, name, functools.wraps(getattr(place, name))(quicker(getattr(place, name))))


def _patched_once(patch):
    """`_patch_lang(fn)`, which replaces the builtins that `fn` sees until its result's `restore`: once a launch."""
    from triton import language

    begun = {}
    """The scope of the launch that is under way, and the modules in which it has replaced them."""
    seen = {}
    """Modules by the id of the globals that they are seen from, which are kept: no others may get it."""

    def patch_lang(fn):
        there = fn.__globals__
        if id(there) not in seen:
            modules = {m for m in (language, language.core) if any(value is m for value in there.values())}
            seen[id(there)] = modules, there
        modules, _ = seen[id(there)]
        if begun and modules <= begun["modules"]:
            return begun["scope"]
        scope = patch(fn)
        if begun:
            begun["modules"] |= modules
            return scope
        begun.update(scope=scope, modules=set(modules))
        restore = scope.restore

        def restored():
            begun.clear()
            restore()

        scope.restore = restored
        return scope

    return patch_lang


def _remembered(of_dtype):
    """`_get_np_dtype(dtype)`, which depends on the name of the elements' dtype only."""
    found = {}

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = of_dtype(dtype)
        return found[name]

    return np_dtype


def _by_slices(reduce):
    """`ReduceOps.generic_reduce`, in its order, over whole slices along an axis."""

    def generic_reduce(self, given):
        arrays = [tensor.handle.data for tensor in given]
        if self.axis is None or self.keep_dims or arrays[0].ndim < 2:
            return reduce(self, given)
        dtypes = [tensor.dtype for tensor in given]

        def slices(place):
            return [
                self.to_tensor(np.take(array, place, self.axis), dtype)
                for array, dtype in zip(arrays, dtypes, strict=True)
            ]

        folded = slices(0)
        for place in range(1, arrays[0].shape[self.axis]):
            combined = self.combine_fn.fn(*folded, *slices(place))
            combined = combined if isinstance(combined, tuple) else (combined,)
            folded = [
                self.to_tensor(value.handle.data, dtype)
                for value, dtype in zip(combined, dtypes, strict=True)
            ]
        return folded

    return generic_reduce
