"""What a recorder gives back: calls in order, rings that have wrapped, masks that have gone."""

import pytest
import torch

from lbdt.hooks import recorder
from lbdt.hooks.recorder import Recorder

CPU = torch.device("cpu")


def add(record: Recorder, number: int, batch: int = 2, height: int = 3, width: int = 4):
    """A call at timestep `number` in which image i has i + 1 detected patches, all but the last replaced."""
    mask = torch.arange(height * width).expand(batch, -1) < torch.arange(1, batch + 1).unsqueeze(1)
    replaced = mask.clone()
    replaced[-1] = False
    sums = torch.zeros(batch, height * width)
    record.add(torch.full((batch,), float(number)), mask, replaced, sums, height, width, halves=2)
    return mask, replaced


def test_a_call_comes_back_as_it_was():
    record = Recorder(CPU, masks=True)
    mask, replaced = add(record, 981)
    (call,) = record.read()
    assert call[:9] == (981.0, 2, 2, 3, 4, 3, 1, 1, 1)
    assert torch.equal(call.cells & 1 > 0, mask.view(2, 3, 4))
    assert torch.equal(call.cells & 2 > 0, replaced.view(2, 3, 4))


def test_full_images_with_and_without_a_bank():
    record = Recorder(CPU)
    mask = torch.ones(3, 4, dtype=torch.bool)
    replaced = torch.tensor([[True] * 4, [False] * 4, [True, True, True, False]])
    record.add(torch.zeros(3), mask, replaced, torch.zeros(3, 4), 2, 2, halves=1)
    (call,) = record.read()
    assert (call.detected, call.replaced, call.full, call.unchanged) == (12, 7, 2, 1)
    assert call.cells is None


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_oldest_calls_go_first_and_whole(batch, monkeypatch):
    monkeypatch.setattr(recorder, "_ROWS", 10)
    record = Recorder(CPU)
    for number in range(25):
        add(record, number, batch)
    kept = record.read()
    assert [call.timestep for call in kept] == list(range(25 - 10 // batch, 25))
    assert all(call.rows == batch for call in kept)


def test_masks_go_before_counts(monkeypatch):
    monkeypatch.setattr(recorder, "_CELLS", 60)
    record = Recorder(CPU, masks=True)
    wanted = [add(record, number, batch=1 + number % 2) for number in range(6)]
    calls = record.read()
    assert len(calls) == 6 and [call.cells is None for call in calls] == [True] * 3 + [False] * 3
    for call, (mask, _) in zip(calls[3:], wanted[3:], strict=True):
        assert torch.equal((call.cells & 1 > 0).flatten(1), mask)


def test_calls_of_several_sizes():
    record = Recorder(CPU, masks=True)
    add(record, 5, batch=4, height=1, width=9)
    add(record, 4, batch=1, height=8, width=2)
    assert [(c.rows, c.height, c.width, tuple(c.cells.shape)) for c in record.read()] == [
        (4, 1, 9, (4, 1, 9)),
        (1, 8, 2, (1, 8, 2)),
    ]
    record.to(CPU)
    assert len(record.read()) == 2


def test_a_call_tells_of_every_row_how_much_was_changed():
    record = Recorder(CPU)
    for number, batch in ((981, 4), (961, 2)):
        add(record, number, batch)
    assert [call.changed for call in record.read()] == [(1, 2, 3, 0), (1, 0)]
