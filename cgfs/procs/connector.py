"""The kernel's process connector: every fork and exit of the machine, in order, without loss.

The kernel queues a fork's message in our socket before the fork returns, and before the child runs
(Linux kernel/fork.c copy_process(): proc_fork_connector()). So reading the socket empty before a
question about membership gives the exact answer. The message of an exit comes late, however: by
then the parent may have reaped the child already (kernel/exit.c do_exit()). Pidfds tell of those.

What cannot be seen: which thread created a thread, and which process made a sibling of itself with
CLONE_PARENT; both are reported with the parent of the creating process (cn_proc.c uses
`real_parent`). Works in the initial user, network and pid namespaces only, and before Linux 6.6
with CAP_NET_ADMIN only.
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress

from cgfs.procs.forks import Fork, ForkSource, ThreadExit
from cgfs.procs.scan import children_since, clock_ticks

NETLINK_CONNECTOR = 11
CN_IDX_PROC = 1
CN_VAL_PROC = 1
NLMSG_DONE = 3
PROC_CN_MCAST_LISTEN = 1
PROC_CN_MCAST_IGNORE = 2
PROC_EVENT_NONE = 0x00000000
PROC_EVENT_FORK = 0x00000001
PROC_EVENT_EXIT = 0x80000000

# struct nlmsghdr, struct cn_msg, then struct proc_event: what, cpu, timestamp, data.
HEADER = struct.Struct("=IHHII IIIIHH")
WHAT = struct.Struct("=I")
WHAT_OFFSET = HEADER.size
DATA = struct.Struct("=IIII")
DATA_OFFSET = WHAT_OFFSET + 16

SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_DROP_MEMBERSHIP = 2
RECEIVE_BUFFER_BYTES = 8 << 20  # about 10,000 messages; only occupied while they wait
READ_AT_ONCE = 1 << 16  # bounds one `read` on a machine that forks faster than we look


class ProcConnector(ForkSource):
    """Forks, and exits of single threads, from the process connector's netlink socket.

    Raises:
        OSError: the kernel has no connector; the first `start` raises it where it is not permitted.
    """

    reports_threads = True

    def __init__(self, receive_buffer_bytes: int = RECEIVE_BUFFER_BYTES) -> None:
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_CONNECTOR)
        try:
            self._set_buffer(receive_buffer_bytes)
            self._attach_filter()
            self._socket.bind((0, 0))
        except OSError:
            self._socket.close()
            raise
        self._buffer = bytearray(256)
        self._since_ticks = 0  # everything before this was read
        self._listening = False

    def describe(self) -> str:
        """One line for a person."""
        return "process connector: forks and exits are followed exactly"

    def fileno(self) -> int:
        """The socket."""
        return self._socket.fileno()

    def start(self) -> None:
        """Subscribe.

        Being in the group is what brings messages once anybody on the machine listens; listening
        is what makes the kernel send them at all.
        """
        self._since_ticks = clock_ticks()
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, CN_IDX_PROC)
        self._tell(PROC_CN_MCAST_LISTEN)
        self._listening = True

    def stop(self) -> None:
        """Unsubscribe; what is queued is of no interest."""
        self._tell(PROC_CN_MCAST_IGNORE)
        self._listening = False
        self._socket.setsockopt(SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, CN_IDX_PROC)
        for _ in self.read({}):
            pass

    def close(self) -> None:
        """Unsubscribe and close; kernels before 6.6 count listeners that just close for ever."""
        if self._listening:
            with suppress(OSError):
                self._tell(PROC_CN_MCAST_IGNORE)
        self._socket.close()
        self._listening = False

    def read(self, watched: Mapping[int, int]) -> Iterator[Fork | ThreadExit]:
        """Read the socket empty; after an overflow, find the lost children in /proc."""
        lost = False
        begin_ticks = clock_ticks()
        receive, buffer = self._socket.recv_into, self._buffer
        for _ in range(READ_AT_ONCE):
            try:
                receive(buffer)
            except BlockingIOError:
                break
            except OSError as err:
                if err.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            news = _decode(buffer, watched)
            if news is not None:
                yield news
        if lost:
            yield from children_since(watched, self._since_ticks)
        self._since_ticks = begin_ticks

    def _tell(self, operation: int) -> None:
        """Send the connector one `enum proc_cn_mcast_op`."""
        payload = struct.pack("=I", operation)
        size = HEADER.size + len(payload)
        head = HEADER.pack(
            size, NLMSG_DONE, 0, 0, os.getpid(), CN_IDX_PROC, CN_VAL_PROC, 0, 0, len(payload), 0
        )
        self._socket.send(head + payload)

    def _set_buffer(self, size_bytes: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size_bytes)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)

    def _attach_filter(self) -> None:
        """Let only forks, exits and answers wake us: no exec, uid, session or name changes.

        Classic BPF loads are big-endian, the field is in the machine's order.
        """
        wanted = (PROC_EVENT_FORK, PROC_EVENT_EXIT, PROC_EVENT_NONE)
        load_word, jump_equal, give = 0x20, 0x15, 0x06
        program = [(load_word, 0, 0, WHAT_OFFSET)]
        for number, what in enumerate(wanted):
            program.append((jump_equal, len(wanted) - number, 0, socket.htonl(what)))
        program += [(give, 0, 0, 0), (give, 0, 0, 0xFFFFFFFF)]
        code = b"".join(struct.pack("=HBBI", *step) for step in program)
        holder = bytearray(code)
        address = _address(holder)
        self._socket.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), address)
        )


def _address(holder: bytearray) -> int:
    """Where the bytes lie; they must stay referenced while the address is used."""
    return ctypes.addressof((ctypes.c_char * len(holder)).from_buffer(holder))


def _decode(message: bytearray, watched: Mapping[int, int]) -> Fork | ThreadExit | None:
    """The news in one message, None if it is about processes that nobody watches."""
    (what,) = WHAT.unpack_from(message, WHAT_OFFSET)
    if what == PROC_EVENT_FORK:
        parent_tid, parent_tgid, child_tid, child_tgid = DATA.unpack_from(message, DATA_OFFSET)
        if child_tid != child_tgid:
            if child_tgid in watched:
                return Fork(child_tgid, child_tgid, child_tid, child_tgid)
        elif parent_tgid in watched or child_tgid in watched:
            return Fork(parent_tid, parent_tgid, child_tid, child_tgid)
    elif what == PROC_EVENT_EXIT:
        tid, tgid, _, _ = DATA.unpack_from(message, DATA_OFFSET)
        if tgid in watched and tid != tgid:
            return ThreadExit(tid, tgid)
    return None
