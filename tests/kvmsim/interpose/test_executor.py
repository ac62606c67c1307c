import threading
import weakref

import pytest
import trio

from kvmsim.engine.base import Executing
from kvmsim.interpose import executor as module
from kvmsim.interpose.executor import Executor, Stuck, Watchdog
from kvmsim.vmm.run_loop import RunLoop
from kvmsim.vmm.timeline import Timeline


class Code:
    """Guest code that executes until it is kicked, or for so many turns of its own."""

    def __init__(self, name, log, executor, *, turns=1, spins=False, error=None):
        self.name = name
        self.log = log
        self.executor = executor
        self.turns = turns
        self.spins = spins
        self.error = error
        self.is_due = False
        self.kicked = threading.Event()
        self.began = threading.Event()
        self.over = trio.Event()
        self.failed = None

    def hand_over(self, **options):
        self.kicked.clear()
        self.executor.hand_over(self, Executing(work=self.work, kick=self.kicked.set), **options)

    def work(self):
        self.began.set()
        if self.error is not None:
            raise self.error
        self.log.append(f"{self.name} in")
        if self.spins:
            assert self.kicked.wait(10)
        self.log.append(f"{self.name} out")

    def executed(self, error):
        self.log.append(f"{self.name} heard")
        self.failed = error
        self.turns -= 1
        self.is_due = False
        if self.turns and error is None:
            self.hand_over()
        else:
            self.over.set()


@pytest.fixture
async def log():
    return []


@pytest.fixture
async def executor(log, nursery):
    loop = RunLoop(Timeline())
    await nursery.start(loop.run)
    watchdog = Watchdog()
    made = Executor(loop, watchdog, lambda: log.append("before"), lambda: log.append("after"))
    yield made
    made.close()
    watchdog.close()


async def test_code_executes_on_a_thread_between_before_and_after(executor, log):
    code = Code("a", log, executor)
    code.hand_over()
    assert executor.is_executing
    await code.over.wait()
    assert log == ["before", "a in", "a out", "after", "a heard"]
    assert not executor.is_executing


@pytest.mark.parametrize(
    ("turn_ns", "order"), [(0, "a a a b b b a a a"), (10**12, "a a a a a a b b b")]
)
async def test_next_turn_begins_when_the_last_one_was_heard_and_was_long_enough(
    executor, log, monkeypatch, turn_ns, order
):
    monkeypatch.setattr(module, "TURN_NS", turn_ns)
    first, second = Code("a", log, executor, turns=2), Code("b", log, executor)
    first.hand_over()
    second.hand_over()
    await first.over.wait()
    await second.over.wait()
    told = [line.split() for line in log if " " in line]
    assert " ".join(name for name, _ in told) == order
    assert [what for _, what in told] == ["in", "out", "heard"] * 3


async def test_who_comes_from_its_client_shortens_the_turn_of_others(executor, log, monkeypatch):
    monkeypatch.setattr(module, "TURN_NS", 10**12)
    spinning, comes = Code("a", log, executor, turns=2, spins=True), Code("b", log, executor)
    spinning.hand_over()
    comes.hand_over(comes=True)
    with trio.fail_after(5):
        await comes.over.wait()
    executor.forget(spinning)


async def test_short_code_is_executed_on_the_event_loop(executor, monkeypatch):
    monkeypatch.setattr(Watchdog, "PERIOD_S", 0.2)
    thread = []
    stop = Executing(work=lambda: thread.append(threading.get_ident()))
    assert executor.execute_here(stop) is True
    assert thread == [threading.get_ident()]


async def test_code_that_spins_does_not_keep_the_event_loop(executor):
    kicked = threading.Event()
    stop = Executing(work=lambda: kicked.wait(10), kick=kicked.set)
    assert executor.execute_here(stop) is False


async def test_nothing_is_executed_on_the_event_loop_while_others_want_to(executor, log):
    spinning = Code("a", log, executor, spins=True)
    spinning.hand_over()
    assert executor.execute_here(Executing(work=lambda: log.append("wrong"))) is None
    executor.forget(spinning)
    assert "wrong" not in log


async def test_code_that_spins_is_kicked_when_others_wait(executor, log):
    spinning = Code("a", log, executor, turns=3, spins=True)
    others = Code("b", log, executor, turns=2)
    spinning.hand_over()
    others.hand_over()
    with trio.fail_after(5):
        await others.over.wait()
    assert executor.nr_kicks >= 1
    executor.forget(spinning)


async def test_code_that_spins_alone_is_left_alone(executor, log):
    spinning = Code("a", log, executor, spins=True)
    spinning.hand_over()
    await trio.sleep(0.02)
    assert (executor.nr_kicks, executor.is_executing) == (0, True)
    executor.forget(spinning)


async def test_paused_code_has_stopped_but_is_not_heard_yet(executor, log):
    spinning = Code("a", log, executor, spins=True)
    spinning.hand_over()
    executor.pause()
    assert not executor.is_executing
    assert log == ["before", "a in", "a out"]
    await spinning.over.wait()


async def test_turn_that_has_not_begun_is_withdrawn_at_once(executor, log):
    spinning, waiting = Code("a", log, executor, spins=True), Code("b", log, executor)
    spinning.hand_over()
    waiting.hand_over()
    assert not executor.withdraw(waiting)
    assert executor.withdraw(spinning)
    await spinning.over.wait()
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert not waiting.began.is_set()


async def test_forgotten_code_has_stopped_and_is_not_heard(executor, log):
    spinning = Code("a", log, executor, spins=True)
    spinning.hand_over()
    executor.forget(spinning)
    after = Code("b", log, executor)
    after.hand_over()
    await after.over.wait()
    assert "a heard" not in log


async def test_error_of_the_engine_is_told(executor, log):
    wrong = Code("a", log, executor, error=ZeroDivisionError())
    wrong.hand_over()
    await wrong.over.wait()
    assert isinstance(wrong.failed, ZeroDivisionError)


async def test_code_that_does_not_stop_is_given_up(executor, log, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    released = threading.Event()
    stuck = Code("a", log, executor)
    executor.hand_over(stuck, Executing(work=lambda: released.wait(10)))
    with pytest.raises(Stuck):
        executor.pause()
    with pytest.raises(Stuck):
        executor.forget(stuck)
    released.set()
    await stuck.over.wait()


async def test_who_is_due_enters_anew_and_goes_on_at_once(executor, log):
    spinning = Code("a", log, executor, spins=True)
    due, last = Code("b", log, executor, turns=2), Code("c", log, executor)
    spinning.hand_over()
    due.hand_over()
    last.hand_over()
    assert not executor.kick(due)
    due.is_due = True
    assert executor.kick(spinning)
    await last.over.wait()
    assert log.index("b heard") < log.index("b in")
    assert log.index("b out") < log.index("c in")


async def test_turn_without_code_lets_others_go_first(executor, log):
    first, second = Code("a", log, executor, turns=1), Code("b", log, executor)
    executor.hand_over(first, None)
    second.hand_over()
    await second.over.wait()
    assert [line for line in log if line[0] in "ab" and line[1] == " "] == [
        "a heard",
        "b in",
        "b out",
        "b heard",
    ]


async def test_a_guest_that_is_gone_is_not_kept_by_the_watchdog(executor, monkeypatch):
    monkeypatch.setattr(Watchdog, "LOOKS", 2)
    kicked = threading.Event()

    class Memory:
        def work(self):
            assert kicked.wait(10)

    memory = Memory()
    gone = threading.Event()
    weakref.finalize(memory, gone.set)
    stop = Executing(work=memory.work, kick=kicked.set)
    assert not executor.execute_here(stop)
    del stop, memory
    assert gone.wait(5)


async def test_a_kick_that_fails_leaves_the_watchdog_alive(executor, caplog):
    kicked = threading.Event()

    def fail():
        kicked.set()
        raise RuntimeError("cannot be kicked")

    for _ in range(2):
        kicked.clear()
        stop = Executing(work=lambda: kicked.wait(10), kick=fail)
        assert not executor.execute_here(stop)
        assert kicked.is_set()
    assert "cannot be kicked" in caplog.text


@pytest.mark.parametrize(("spins", "short"), [(False, True), (True, False)])
async def test_executor_knows_whether_code_stopped_soon(executor, log, monkeypatch, spins, short):
    monkeypatch.setattr(module, "SHORT_NS", 10**12 if short else 0)
    code = Code("a", log, executor, spins=spins)
    code.hand_over()
    if spins:
        await trio.to_thread.run_sync(code.began.wait)
        executor.kick(code)
    await code.over.wait()
    assert executor.was_short is short


async def test_turn_without_code_was_short(executor, log):
    code = Code("a", log, executor)
    executor.hand_over(code, None)
    await code.over.wait()
    assert executor.was_short
    assert log[-1] == "a heard"
