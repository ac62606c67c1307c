"""A program that uses KVM as it is told, line by line; each answer is a line of JSON.

Also the other end of it: `KvmClient` starts one under ``kvmsim run`` and talks to it.
"""

import contextlib
import json
import subprocess
import sys
import threading

SOURCE = r"""
import errno, fcntl, json, mmap, os, signal, sys, threading

vms, vcpus, pages = [], [], []
kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)


def call(fd, request, arg=0):
    try:
        return fcntl.ioctl(fd, request, arg)
    except OSError as error:
        return errno.errorcode[error.errno]


def do(word, *args):
    if word == "version":
        return call(kvm, 0xAE00)
    if word == "vm":
        result = call(kvm, 0xAE01)
        if isinstance(result, int):
            vms.append(result)
        return result
    if word == "init":
        return call(vms[-1], 0xC008AEBA, bytearray(24))
    if word == "vcpu":
        result = call(vms[-1], 0xAE41, len(vcpus))
        vcpus.append(result)
        pages.append(mmap.mmap(result, 12288))
        return result
    if word == "buslock":  # KVM_ENABLE_CAP of KVM_CAP_X86_BUS_LOCK_EXIT
        cap = bytearray(104)
        cap[0], cap[8] = 193, 2
        return call(vms[-1], 0x4068AEA3, cap)
    if word == "run":
        count = int(args[0]) if args else 1
        for _ in range(count):
            result = call(vcpus[-1], 0xAE80)
            if result != 0:
                break
        return [result, int.from_bytes(pages[-1][8:12], "little")]
    if word == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, float(args[0]))
        return 0
    if word == "move":
        with open(args[0], "w") as procs:
            procs.write("0")
        return 0
    if word == "fork-init":  # a child makes and initialises a VM and keeps it
        ours, theirs = os.pipe()
        if os.fork() == 0:
            vm = call(kvm, 0xAE01)
            os.write(theirs, str(call(vm, 0xC008AEBA, bytearray(24))).encode())
            signal.pause()
        return os.read(ours, 64).decode()
    if word == "close":
        while pages:
            pages.pop().close()
        for fd in vcpus + vms:
            os.close(fd)
        vms.clear()
        vcpus.clear()
        return 0
    if word == "pid":
        return os.getpid()
    raise SystemExit(3)


for line in sys.stdin:
    print(json.dumps(do(*line.split())), flush=True)
"""


class KvmClient:
    """A client under ``kvmsim run``.

    Args:
        shell: the session it runs in.
        options: of ``kvmsim run``.
    """

    def __init__(self, shell, *options):
        command = ["kvmsim", "run", *map(str, options), "--", sys.executable, "-c", SOURCE]
        self.process = subprocess.Popen(
            command,
            cwd=shell.home,
            env=shell.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._watchdog = threading.Timer(60, self.process.kill)
        self._watchdog.start()

    def tell(self, line):
        """Gives an order without waiting for its answer."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self):
        """The answer to the oldest order; None when it has ended."""
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def __call__(self, *lines):
        """Gives orders; the last answer."""
        result = None
        for line in lines:
            self.tell(line)
            result = self.answer()
        return result

    def end(self):
        """Lets it end; its exit status."""
        self.process.stdin.close()
        return self.wait()

    def wait(self):
        """Waits for its end; its exit status."""
        status = self.process.wait()
        self._watchdog.cancel()
        self.process.stdout.close()
        self.process.stderr.close()
        if not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        return status
