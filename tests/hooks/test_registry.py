"""Hooks come off in any order, beside anyone else's, and leave nothing."""

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from lbdt.hooks import registry


class Add(ModelHook):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def post_forward(self, module, output):
        return output + self.amount


class Twice(ModelHook):
    """Another library's hook with a forward of its own."""

    def new_forward(self, module, x):
        return 2 * self.fn_ref.original_forward(x)


def block() -> nn.Module:
    return nn.Identity()


def value(module: nn.Module) -> float:
    return float(module(torch.tensor(10.0)))


def is_clean(module: nn.Module) -> bool:
    return "forward" not in vars(module) and "_diffusers_hook" not in vars(module)


def test_removal_leaves_the_instance_as_it_was():
    module = block()
    before = dict(vars(module))
    registry.register(module, Add(1), "a")
    assert value(module) == 11
    registry.unregister(module, "a")
    assert value(module) == 10
    assert vars(module) == before


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")], ids=["first_first", "last_first"])
def test_two_hooks_in_either_order(order):
    module = block()
    registry.register(module, Add(1), "a")
    registry.register(module, Add(2), "b")
    assert value(module) == 13
    registry.unregister(module, order[0])
    assert value(module) == (12 if order[0] == "a" else 11)
    registry.unregister(module, order[1])
    assert value(module) == 10
    assert is_clean(module)


def test_a_later_hook_with_its_own_forward_stays_in_force():
    module = block()
    registry.register(module, Add(1), "a")
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Twice(), "twice")
    assert value(module) == 22
    registry.unregister(module, "a")
    assert value(module) == 20


def test_an_earlier_hook_of_someone_else_stays_in_force():
    module = block()
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Twice(), "twice")
    registry.register(module, Add(1), "a")
    assert value(module) == 21
    registry.unregister(module, "a")
    assert value(module) == 20
    assert "_diffusers_hook" in vars(module)


def test_a_wrapper_around_forward_stays_and_ours_does_nothing():
    module = block()
    registry.register(module, Add(1), "a")
    inner = module.forward
    module.forward = lambda x: inner(x) * 3
    assert value(module) == 33
    registry.unregister(module, "a")
    assert value(module) == 30
    assert not registry.is_registered(module, "a")


def test_a_name_is_taken_once():
    module = block()
    registry.register(module, Add(1), "a")
    with pytest.raises(ValueError, match="already exists"):
        registry.register(module, Add(2), "a")
    assert value(module) == 11
    registry.unregister(module, "a")
    registry.unregister(module, "a")
    assert is_clean(module)
