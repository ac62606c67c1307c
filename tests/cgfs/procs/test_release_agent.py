import trio

from cgfs.procs.release_agent import ReleaseAgent


async def runner(nursery):
    agent = ReleaseAgent()
    await nursery.start(agent.run)
    return agent


def script(tmp_path, text):
    path = tmp_path / "agent"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


async def done(tmp_path):
    with trio.fail_after(10):
        while not (tmp_path / "done").exists():  # noqa: ASYNC110  the agent is another process
            await trio.sleep(0.002)


async def said(tmp_path):
    await done(tmp_path)
    return (tmp_path / "out").read_text()


async def test_agent_gets_the_path_as_its_only_argument(nursery, tmp_path):
    agent = await runner(nursery)
    out = f'echo "$#:$1" >{tmp_path}/out; : >{tmp_path}/done'
    agent.submit(script(tmp_path, out), "/a b/c")
    assert await said(tmp_path) == "1:/a b/c\n"


async def test_agent_gets_the_kernels_environment(nursery, tmp_path):
    agent = await runner(nursery)
    out = f"tr '\\0' '\\n' </proc/$$/environ | sort >{tmp_path}/out; : >{tmp_path}/done"
    agent.submit(script(tmp_path, out), "/x")
    assert await said(tmp_path) == "HOME=/\nPATH=/sbin:/bin:/usr/sbin:/usr/bin\n"


async def test_agents_run_side_by_side(nursery, tmp_path):
    agent = await runner(nursery)
    slow = script(tmp_path, f'[ "$1" = /slow ] && read x <{tmp_path}/fifo; : >{tmp_path}$1')
    (tmp_path / "fifo").touch()
    agent.submit(slow, "/slow")
    agent.submit(slow, "/done")
    await done(tmp_path)


async def test_no_agent_is_no_release(nursery):
    agent = await runner(nursery)
    agent.submit("", "/x")
    await trio.testing.wait_all_tasks_blocked()


async def test_missing_agent_is_logged_and_the_next_one_runs(nursery, tmp_path, caplog):
    agent = await runner(nursery)
    agent.submit("/nonexistent/agent", "/x")
    agent.submit(script(tmp_path, f"echo ok >{tmp_path}/out; : >{tmp_path}/done"), "/x")
    assert await said(tmp_path) == "ok\n"
    with trio.fail_after(10):
        while "No such file" not in caplog.text:  # noqa: ASYNC110  started in a thread
            await trio.sleep(0.002)


async def test_submit_before_run_is_kept(nursery, tmp_path):
    agent = ReleaseAgent()
    agent.submit(script(tmp_path, f"echo ok >{tmp_path}/out; : >{tmp_path}/done"), "/x")
    await nursery.start(agent.run)
    assert await said(tmp_path) == "ok\n"
