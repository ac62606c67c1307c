"""Lines the emulated kernel prints."""

from kvmsim.host.kernel_log import LINES, KernelLog


def test_the_last_lines_are_kept_and_told():
    log, told = KernelLog(), []
    log.print("first")
    log.on_line = told.append
    for number in range(LINES):
        log.print(str(number))
    assert (log[0], log[-1], len(log)) == ("0", str(LINES - 1), LINES)
    assert len(told) == LINES
