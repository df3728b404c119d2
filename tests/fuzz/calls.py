"""Made-up arguments of the ops, and what a call made of them: the same of every backend, or an exception that changed
nothing."""

import math

import torch

from lbdt import ops
from lbdt.int8_screen import Screen
from lbdt.ops import _dispatch
from tests.layouts import bits

DOCUMENTED = (ValueError, TypeError, IndexError, RuntimeError)
ODD = (math.nan, math.inf, -math.inf, -0.0, 3.0)
NUMBERS = (-1, 0, 1, 3, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), 2**63)
INTERPRETED = 100  # one case in so many: the interpreter is slow


def floats(random, shape, dtype):
    """Small integers, whose sums are exact in every order, now and then with odd values among them."""
    g = torch.Generator().manual_seed(random.getrandbits(31))
    values = torch.randint(-3, 4, shape, generator=g).to(dtype)
    if random.random() < 0.2 and values.numel():
        for _ in range(3):
            values.view(-1)[random.randrange(values.numel())] = random.choice(ODD)
    return values


def bools(random, shape):
    g = torch.Generator().manual_seed(random.getrandbits(31))
    return torch.rand(shape, generator=g) < random.choice((0.0, 0.1, 0.5, 1.1))


def integers(random, count, end):
    return torch.tensor([random.randrange(end) for _ in range(count)], dtype=torch.int64)


def laid_out(random, t):
    """The values of `t` somewhere else in memory: turned, between others, with gaps."""
    kind = random.randrange(6)
    if kind == 0 and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1:
        wide = torch.ones([size + 2 for size in t.shape], dtype=t.dtype)
        inner = wide[tuple(slice(1, 1 + size) for size in t.shape)]
        return inner.copy_(t)
    if kind == 2:
        return torch.stack([t, torch.ones_like(t)], dim=-1)[..., 0]
    if kind == 3 and t.dim() > 0 and t.shape[0] > 0:
        return t[:1].expand(t.shape)
    return t


def with_screen(random, arguments):
    """The arguments of a screen and an order: none, those of `weight` and `bias` where they have some, or one of these
    changed."""
    none = dict.fromkeys((*Screen._fields, "order"))
    try:
        weight, bias = arguments["weight"], arguments["bias"]
        order = random.choice((None, torch.tensor(random.sample(range(len(weight)), len(weight)))))
        centre = floats(random, (weight.shape[1],), torch.float32).nan_to_num(0, 0, 0)
        screen = Screen.of(weight, bias, centre, order)._asdict() | {"order": order}
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, NotImplementedError):
        return none
    chosen = random.random()
    return (
        none | {"order": order} if chosen < 0.4 else spoiled_size(random, screen) if chosen < 0.5 else screen
    )


def spoiled_size(random, arguments):
    """`arguments` with one of these tensors gone or shorter."""
    name = random.choice([name for name, value in arguments.items() if value is not None])
    return {**arguments, name: random.choice((None, arguments[name][:-1]))}


def spoiled(random, arguments):
    """`arguments` with one of them changed, mostly for the worse."""
    name = random.choice([n for n, v in arguments.items() if v is not None])
    value = arguments[name]
    if isinstance(value, list) or (isinstance(value, torch.Tensor) and (value.is_meta or value.is_sparse)):
        return arguments  # spoiled before
    if isinstance(value, str):
        return {**arguments, name: random.choice(("", "far", "mean ", "random"))}
    if isinstance(value, int):
        return {**arguments, name: random.choice((*NUMBERS, value + 1, value - 1))}
    change = random.choice(
        (
            lambda t: t.to(
                random.choice((torch.float64, torch.float16, torch.int32, torch.uint8, torch.complex64))
            ),
            lambda t: t[..., :-1] if t.dim() else t,
            lambda t: torch.cat([t, t], dim=-1) if t.dim() else t,
            lambda t: t.unsqueeze(0),
            lambda t: t.flatten(),
            lambda t: t[:0] if t.dim() else t,
            lambda t: t.to("meta"),
            lambda t: t.to_sparse(),
            lambda t: t.unsqueeze(-1).expand(*t.shape, 2),
            lambda t: (
                t.clone() if t.is_floating_point() else (t.long() + random.choice(NUMBERS[:-1])).to(t.dtype)
            ),
            lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t.clone(),
            lambda t: t.tolist(),
            lambda t: None,
        )
    )
    return {**arguments, name: change(value)}


def copied(arguments):
    """Copies that lie in memory as the arguments do, and share it as they do."""
    storages = {}

    def copy(value):
        if not isinstance(value, torch.Tensor) or value.is_meta or value.is_sparse:
            return value
        storage = value.untyped_storage()
        own = storages.setdefault(storage.data_ptr() or id(storage), storage.clone())
        there = torch.empty(0, dtype=value.dtype)
        there.set_(own, value.storage_offset(), value.shape, value.stride())
        own.resize_(storage.nbytes())  # where it was too small for the tensor, it has grown
        return there.requires_grad_(value.requires_grad)

    return {name: copy(value) for name, value in arguments.items()}


def memory(arguments):
    """The bytes of each tensor's storage, with what lies around the tensor."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and not value.is_meta and not value.is_sparse:
            found[name] = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).clone()
    return found


def changed(arguments, before):
    return {name for name, now in memory(arguments).items() if not torch.equal(now, before[name])}


def outcome(call, arguments):
    """What `call` gives, or the type of a documented exception, after which nothing has changed; and its arguments."""
    arguments = copied(arguments)
    before = memory(arguments)
    try:
        return call(**arguments), arguments
    except DOCUMENTED as error:
        assert str(error), "an exception without a word"
        assert not changed(arguments, before), f"changed something, then raised {error!r}"
        return type(error), arguments


def backends(random, op, arguments):
    """The other backends that can serve the call; Triton's interpreter in few cases."""
    small = all(v.numel() <= 200 for v in arguments.values() if isinstance(v, torch.Tensor))
    interpret = small and random.randrange(INTERPRETED) == INTERPRETED // 2  # hypothesis is fond of 0
    for name in ("cpp", "triton") if interpret else ("cpp",):
        backend = _dispatch._registry[op].get(name)
        try:
            if backend is not None and backend.supports(**arguments) is None:
                yield name
        except (AttributeError, IndexError):
            yield name  # not even tensors: refused before a backend is asked


def agree(op, arguments, random, same):
    """The reference's outcome, which all others share, `same(got, expected, arguments)` looking at the results."""
    call = getattr(ops, op)
    expected, left = outcome(lambda **given: call(**given, backend="reference"), arguments)
    for backend in backends(random, op, arguments):
        got, after = outcome(lambda backend=backend, **given: call(**given, backend=backend), arguments)
        if isinstance(expected, type) or isinstance(got, type):
            assert got == expected, backend
        else:
            same(got, expected, after, left)
    return expected, left


def equal(got, expected):
    """The same bits, any NaN being like any other."""
    nan = expected != expected
    return torch.equal(got != got, nan) and torch.equal(
        bits(torch.where(nan, 0, got)), bits(torch.where(nan, 0, expected))
    )


def feature_map(random, dtype, least=0):
    shape = [random.randint(0, 3), random.randint(least, 9), random.randint(0, 7), random.randint(0, 7)]
    return floats(random, shape, dtype)
