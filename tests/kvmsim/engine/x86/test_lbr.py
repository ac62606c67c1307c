"""Last-branch records as a model: the ring, its filter, its registers."""

import pytest

from kvmsim.engine.x86.decode import Branch
from kvmsim.engine.x86.lbr import FROM, INFO, LBR_SELECT, LBR_TOS, TO, LastBranches


@pytest.fixture
def lbr():
    found = LastBranches(depth=8)
    found.enabled = True
    return found


def test_a_record_goes_to_the_next_index_and_wraps(lbr):
    for number in range(1, 11):
        lbr.branch(number, number + 100, Branch.JUMP)
    assert lbr.tos == 2
    assert [source for source, _ in lbr.newest()] == [10, 9, 8, 7, 6, 5, 4, 3]
    assert (lbr.read(FROM + 2), lbr.read(TO + 2)) == (10, 110)


def test_nothing_is_recorded_while_it_is_off(lbr):
    lbr.enabled = False
    lbr.branch(1, 2, Branch.CALL)
    assert (lbr.tos, lbr.read(FROM + 1)) == (0, 0)


@pytest.mark.parametrize("kind", list(Branch))
def test_each_bit_of_the_filter_hides_its_kind_only(lbr, kind):
    assert lbr.write(LBR_SELECT, 1 << kind)
    for other in Branch:
        lbr.branch(int(other), 0x1000, other)
    recorded = {source for source, _ in lbr.newest() if source}
    assert recorded == {int(other) for other in Branch} - {int(kind)}


@pytest.mark.parametrize(("select", "seen"), [(1, [3]), (2, [0]), (3, []), (0, [3, 0])])
def test_privilege_levels_are_filtered(lbr, select, seen):
    lbr.write(LBR_SELECT, select)
    lbr.branch(0xA0, 1, Branch.CALL, cpl=0)
    lbr.branch(0xA3, 1, Branch.CALL, cpl=3)
    assert [source & 0xF for source, _ in lbr.newest() if source] == seen


def test_in_call_stack_mode_returns_take_the_call_away(lbr):
    lbr.write(LBR_SELECT, 1 << 9)
    lbr.branch(0x10, 0x100, Branch.CALL)
    lbr.branch(0x110, 0x200, Branch.INDIRECT_CALL)
    lbr.branch(0x208, 0x300, Branch.CONDITIONAL)
    lbr.branch(0x210, 0x112, Branch.RETURN)
    assert next(lbr.newest()) == (0x10, 0x100)
    assert lbr.tos == 1


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (LBR_SELECT, 0x400),
        (LBR_TOS, 8),
        (FROM, 1 << 47),
        (TO + 7, 1 << 63),
        (FROM + 8, 0),
        (0x40, 0),
    ],
)
def test_values_and_registers_that_do_not_exist_are_refused(lbr, index, value):
    assert not lbr.write(index, value)
    assert lbr.tos == lbr.select == 0


def test_registers_keep_what_is_written(lbr):
    for index, value in ((LBR_SELECT, 0x3FF), (LBR_TOS, 7), (FROM, 0xFFFF800000000000), (TO, 5)):
        assert lbr.write(index, value)
        assert lbr.read(index) == value
    assert lbr.write(INFO + 1, 1 << 63 | 7)
    assert lbr.read(INFO + 1) == 1 << 63 | 7


def test_without_info_there_are_no_info_registers():
    lbr = LastBranches(depth=16, info_base=0)
    assert lbr.read(INFO) is None
    assert not lbr.write(INFO, 0)


def test_info_has_the_cycles_since_the_last_record(lbr):
    lbr.branch(1, 2, Branch.JUMP, cycles=70)
    lbr.branch(1, 2, Branch.JUMP, cycles=1 << 20)
    assert (lbr.read(INFO + 1), lbr.read(INFO + 2)) == (70, 0xFFFF)


def test_reset_forgets(lbr):
    lbr.branch(1, 2, Branch.JUMP)
    lbr.reset()
    assert (lbr.tos, lbr.read(FROM + 1)) == (0, 0)
