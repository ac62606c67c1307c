"""Priorities and acknowledgement of the two PICs; their registers are compared in real/guest."""

import pytest

from kvmsim.kvm import pic
from kvmsim.kvm.pic import Pics


class Board:
    """PICs initialised as a PC does: vectors from 8 and from 0x70."""

    def __init__(self):
        self.ended, self.rises, self.unmasked = [], 0, []
        self.pics = Pics(lambda pin, _: self.ended.append(pin), self._rise, self.unmasked.append)
        for port, values in ((0x20, (0x11, 0x08, 0x04, 0x01)), (0xA0, (0x11, 0x70, 0x02, 0x01))):
            self.out(port, values[0])
            for value in values[1:]:
                self.out(port + 1, value)

    def _rise(self, _now_ns):
        self.rises += 1

    def out(self, port, value):
        self.pics.write(port, bytes([value]), 0)

    def pulse(self, *pins):
        for pin in pins:
            self.pics.set_line(pin, 0, 0, up=True)
            self.pics.set_line(pin, 0, 0, up=False)

    def take(self):
        """Vectors taken one after the other, each ended at once at both."""
        taken = []
        while self.pics.output:
            taken.append(self.pics.acknowledge(0))
            if taken[-1] >= 0x70:
                self.out(0xA0, 0x20)
            self.out(0x20, 0x20)
        return taken


@pytest.fixture
def board():
    return Board()


def test_pins_come_by_number_and_the_slaves_in_place_of_pin_2(board):
    board.pulse(5, 9, 1, 14, 3)
    assert board.take() == [0x09, 0x71, 0x76, 0x0B, 0x0D]
    assert board.ended == [1, 9, 2, 14, 2, 3, 5]


def test_one_in_service_holds_less_urgent_ones_off(board):
    board.pulse(3)
    assert board.pics.acknowledge(0) == 0x0B
    board.pulse(5)
    assert not board.pics.output
    board.pulse(1)
    assert board.pics.acknowledge(0) == 0x09
    board.out(0x20, 0x20)
    board.out(0x20, 0x20)
    assert board.take() == [0x0D]


def test_output_rises_once_per_wait(board):
    board.pulse(5, 6)
    assert board.rises == 1
    board.pics.acknowledge(0)
    board.out(0x20, 0x20)
    assert board.rises == 2


def test_nothing_left_is_a_spurious_interrupt_that_is_not_in_service(board):
    assert board.pics.acknowledge(0) == 0x0F
    assert board.pics.chips[0][pic.ISR] == 0


def test_masked_pin_waits_until_its_mask_goes(board):
    board.out(0x21, 0x20)
    board.pulse(5)
    assert not board.pics.output
    board.out(0x21, 0x00)
    assert (board.unmasked, board.take()) == ([5], [0x0D])


def test_level_pin_comes_again_while_it_is_up(board):
    board.out(0x4D1, 0x04)
    board.pics.set_line(10, 0, 0, up=True)
    for _ in range(2):
        assert board.pics.acknowledge(0) == 0x72
        board.out(0xA0, 0x20)
        board.out(0x20, 0x20)
    board.pics.set_line(10, 0, 0, up=False)
    # The master still has the edge of the cascade, and the slave nothing: a spurious interrupt.
    assert board.take() == [0x77]


def test_line_is_up_while_one_of_its_sources_holds_it(board):
    board.out(0x4D0, 0x20)
    for source in (0, 1):
        board.pics.set_line(5, source, 0, up=True)
    board.pics.set_line(5, 0, 0, up=False)
    assert board.pics.chips[0][pic.IRR] == 0x20
    board.pics.set_line(5, 1, 0, up=False)
    assert board.pics.chips[0][pic.IRR] == 0


def test_automatic_end_with_rotation_makes_the_last_one_least_urgent(board):
    for value, port in ((0x11, 0x20), (0x08, 0x21), (0x04, 0x21), (0x03, 0x21), (0x80, 0x20)):
        board.out(port, value)
    board.pulse(1)
    assert board.pics.acknowledge(0) == 0x09
    board.pulse(1, 3)
    assert [board.pics.acknowledge(0) for _ in range(2)] == [0x0B, 0x09]
    assert board.pics.chips[0][pic.ISR] == 0
