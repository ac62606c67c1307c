"""Unicorn, as the engine uses it: the only importer of the package.

Its C library is called without the binding's layers, which cost more than the guest's work, and
the CPU's state is read and written where it lives. Offsets into that state belong to one release:
they are checked against registers written through the public interface when an instance is made,
and refused on mismatch.

Rules of the library kept here (release 2.1.4):

* ``emu_stop`` is only called by callbacks, unless ``native`` has made it safe to call by another
  thread: it would execute read-modify-write instructions twice.
* ``old_exception`` is never cleared by it; :meth:`Unicorn.start` does.
* Unmapping memory and dropping translations walk the guest's page tables with side effects on CR2
  and the exception state: :meth:`Unicorn.preserved` puts the whole state back.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kvmsim.engine.x86 import native
from kvmsim.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RELEASE = (2, 1, 4)
ENV_BYTES = 5608
PAGE = 4096

# Hook types (unicorn.h).
HOOK_INTR = 1
HOOK_CODE = 4
HOOK_BLOCK = 8
HOOK_UNMAPPED = 0x70
HOOK_PROTECTED = 0x380
HOOK_READ, HOOK_WRITE = 1024, 2048
HOOK_INVALID = 16384
HOOK_EDGE = 32768

# Kinds of access (uc_mem_type).
ACCESS_READ = 16
ACCESS_WRITES = frozenset({17, 20, 22})
ACCESS_FETCHES = frozenset({18, 21, 24})


PROT_READ_EXEC = 5
PROT_ALL = 7

_ARCH_X86, _MODE_64 = 4, 8
_CTL_USE_EXITS, _CTL_CPU_MODEL, _CTL_REMOVE_CACHE, _CTL_FLUSH_TB = 4, 7, 9, 10
_CTL_FLUSH_TLB, _CTL_TCG_BUFFER = 11, 13
_CPU_SKYLAKE_SERVER = 22
#: Room for translated code: what small guests need, and all that a system with its programs gets.
CODE_BYTES, MOST_CODE_BYTES = 4 << 20, 64 << 20
_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42
_CPU_SEARCH_BYTES = 8192
_ENV_SEARCH_BYTES = 128 << 10

# uc_x86_reg numbers of the registers used for calibration, and the flags.
_REG_RFLAGS = 253
_REG_GPRS = (35, 38, 40, 37, 44, 36, 43, 39, 106, 107, 108, 109, 110, 111, 112, 113)
_REG_CR3, _REG_DR0 = 53, 66

CODE_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
)
#: The same without its arguments: converting them takes longer than most callbacks.
_BARE_CALLBACK = ctypes.CFUNCTYPE(None)
_INTR_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_INVALID_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)
_MEMORY_CALLBACK = ctypes.CFUNCTYPE(
    *(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int),
    *(ctypes.c_uint64, ctypes.c_void_p),
)
_ACCESS_CALLBACK = ctypes.CFUNCTYPE(
    *(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int),
    *(ctypes.c_int64, ctypes.c_void_p),
)
_MMIO_READ = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p
)
_MMIO_WRITE = ctypes.CFUNCTYPE(
    *(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p)
)


#: A function for the library: a callback, or the address of machine code.
Callback: TypeAlias = Any


class _Block(ctypes.Structure):
    """``uc_tb``: a translation block."""

    _fields_ = (("pc", ctypes.c_uint64), ("icount", ctypes.c_uint16), ("size", ctypes.c_uint16))


_EDGE_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(_Block), ctypes.POINTER(_Block), ctypes.c_void_p
)


def load() -> ctypes.CDLL:
    """The C library.

    Raises:
        ConfigError: Unicorn is not installed, or is another release; one line.
    """
    try:
        from unicorn.unicorn_py3.unicorn import uclib  # noqa: PLC0415 - an optional extra
    except ImportError:
        msg = "executing x86 code needs Unicorn: install kvmsim with the extra x86"
        raise ConfigError(msg) from None
    library = ctypes.CDLL(uclib._name)  # noqa: SLF001 - CDLL's own name of its file
    version = library.uc_version(None, None)
    found = (version >> 24, version >> 16 & 0xFF, version >> 8 & 0xFF)
    if found != RELEASE:
        wanted, has = (".".join(map(str, release)) for release in (RELEASE, found))
        msg = f"executing x86 code needs Unicorn {wanted}, not {has}"
        raise ConfigError(msg)
    return library


class BackendError(Exception):
    """The library refused a call that cannot fail."""


class Unicorn:
    """One instance of the emulator.

    Args:
        code_bytes: room for translated code; when it is full, translation begins anew.

    Attributes:
        env: its CPU's state, in place, by bytes.
        q: the same by 64-bit words.
        d: the same by 32-bit words.
        native: its machine code; None where there is none.
        env_address: where ``env`` is in this process.
    """

    def __init__(self, code_bytes: int = CODE_BYTES) -> None:
        lib = self._lib = load()
        # Called from hooks on every locked instruction: no lookups on the way.
        self._start = lib.uc_emu_start
        self._start.argtypes = (ctypes.c_void_p, *[ctypes.c_uint64] * 3, ctypes.c_size_t)
        handle = ctypes.c_void_p()
        self._check(lib.uc_open(_ARCH_X86, _MODE_64, ctypes.byref(handle)))
        self._uc = handle
        self._handle = handle.value
        self._stop = lib.uc_emu_stop
        self._stop.argtypes = (ctypes.c_void_p,)
        self._read = lib.uc_reg_read
        self._read.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self._value = ctypes.c_uint64()
        self._value_at = ctypes.addressof(self._value)
        self._keep: list[Any] = []
        self._mmio_callbacks: dict[int, Any] = {}
        self.native: native.Native | None = None
        try:
            with _small_pages(lib):
                self._begin(code_bytes)
        except BaseException:
            self._free()
            raise

    def _begin(self, code_bytes: int) -> None:
        self._ctl(_CTL_CPU_MODEL, _CPU_SKYLAKE_SERVER)
        self._ctl(_CTL_TCG_BUFFER, code_bytes)
        self._ctl(_CTL_USE_EXITS, 1)
        self.env_address = self._find_env()
        self._map_state(self.env_address)
        self._prime()

    def _map_state(self, address: int) -> None:
        buffer = (ctypes.c_char * ENV_BYTES).from_address(address)
        self.env = memoryview(buffer).cast("B")
        self.q = self.env.cast("Q")
        self.d = self.env.cast("I")
        self._calibrate()
        self.native = self._make_native(address)

    @property
    def stop_address(self) -> int:
        """Where the library's function to stop is, for native code."""
        return ctypes.cast(self._stop, ctypes.c_void_p).value or 0

    def close(self) -> None:
        """Free the instance; nothing of it may be used afterwards."""
        if self._uc.value:
            self.env.release()
            self.q.release()
            self.d.release()
            self._free()

    def _free(self) -> None:
        if self.native is not None:
            self.native.forget()
        self._lib.uc_close(self._uc)
        self._uc = ctypes.c_void_p()

    # -- execution ---------------------------------------------------------------------------

    def start(self, address: int) -> int:
        """Execute from an offset in CS until a callback stops; the library's error number."""
        if self.native is not None:
            return self.native.start(address)
        self.d[5496 // 4] = 0xFFFF_FFFF  # old_exception: none
        status: int = self._start(self._handle, address, 0xFFFF_FFFF_FFFF_FFFF, 0, 0)
        return status

    def stop(self) -> None:
        """Stop; from a callback only."""
        self._stop(self._handle)

    def gave_up(self) -> bool:
        """Whether it stopped because it does not know how to go on."""
        return self.native is not None and self.native.aborted()

    def flags(self) -> int:
        """RFLAGS when it stopped."""
        if self.native is not None:
            return self.native.flags
        return self.computed_flags()

    def computed_flags(self) -> int:
        """RFLAGS at this moment, in a callback too."""
        self._read(self._handle, _REG_RFLAGS, self._value_at)
        return self._value.value

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Put the CPU's state back after calls that change it on the way."""
        saved = bytes(self.env)
        try:
            yield
        finally:
            self.env[:] = saved

    def flush_tlb(self) -> None:
        """Forget address translations."""
        self._ctl(_CTL_FLUSH_TLB)

    def flush_code(self) -> None:
        """Forget all translated code."""
        self._ctl(_CTL_FLUSH_TB)

    def drop_code(self, begin: int, end: int) -> None:
        """Forget translations of code at linear addresses [begin, end), page by page."""
        with self.preserved():
            while begin < end:
                page_end = min(end, (begin | (PAGE - 1)) + 1)
                self._ctl(_CTL_REMOVE_CACHE, begin, page_end, check=False)
                begin = page_end

    # -- memory ------------------------------------------------------------------------------

    def map(self, gpa: int, size_bytes: int, address: int, *, writable: bool = True) -> None:
        """Show host memory at a guest-physical address."""
        prot = PROT_ALL if writable else PROT_READ_EXEC
        arguments = (ctypes.c_uint64(gpa), ctypes.c_uint64(size_bytes), ctypes.c_uint32(prot))
        self._check(self._lib.uc_mem_map_ptr(self._uc, *arguments, ctypes.c_void_p(address)))

    def map_mmio(
        self, gpa: int, read: Callable[[int, int], int], write: Callable[[int, int, int], None]
    ) -> None:
        """Answer accesses to one page by callbacks of (offset, size) and (offset, size, value)."""

        def on_read(_uc: int, offset: int, size: int, _data: int) -> int:
            return read(offset, size)

        def on_write(_uc: int, offset: int, size: int, value: int, _data: int) -> None:
            write(offset, size, value)

        callbacks = (_MMIO_READ(on_read), _MMIO_WRITE(on_write))
        self._mmio_callbacks[gpa] = callbacks
        status = self._lib.uc_mmio_map(
            *(self._uc, ctypes.c_uint64(gpa), ctypes.c_size_t(PAGE)),
            *(callbacks[0], None, callbacks[1], None),
        )
        self._check(status)

    def unmap(self, gpa: int, size_bytes: int) -> None:
        """Take memory away."""
        with self.preserved():
            arguments = (ctypes.c_uint64(gpa), ctypes.c_uint64(size_bytes))
            self._check(self._lib.uc_mem_unmap(self._uc, *arguments))

    # -- hooks -------------------------------------------------------------------------------

    def hook_code(self, function: Callable[[], None], address: int) -> None:
        """Call back before the instruction at a linear address."""
        self.hook_code_at(self.callback(function), address)

    def hook_code_at(self, callback: int, address: int) -> None:
        """Call a function of machine code before the instruction at a linear address."""
        self._hook(HOOK_CODE, ctypes.c_void_p(callback), address, address)
        if self.native is not None:
            self.native.found_at(address, callback)

    def callback(self, function: Callable[[], None]) -> int:
        """Make a function of machine code that calls one of Python; its address."""
        callback = _BARE_CALLBACK(function)
        self._keep.append(callback)
        return ctypes.cast(callback, ctypes.c_void_p).value or 0

    def hook_block(self, callback: Callback, data: int = 0) -> int:
        """Call back at the start of each block, as long as the caller keeps the callback.

        Returns:
            A handle for :meth:`unhook`.
        """
        return self._hook(HOOK_BLOCK, callback, 1, 0, data)

    def unhook(self, handle: int) -> None:
        """Remove a hook."""
        with self.preserved():
            self._check(self._lib.uc_hook_del(self._uc, ctypes.c_size_t(handle)))

    def hook_interrupts(self, function: Callable[[int], None]) -> None:
        """Call back with the vector of each exception and software interrupt."""
        callback = _INTR_CALLBACK(lambda _uc, vector, _data: function(vector))
        self._keep.append(callback)
        self._hook(HOOK_INTR, callback, 1, 0)

    def hook_invalid(self, function: Callable[[], None]) -> None:
        """Call back at instructions that do not exist."""

        def on_invalid(_uc: int, _data: int) -> bool:
            function()
            return True

        callback = _INVALID_CALLBACK(on_invalid)
        self._keep.append(callback)
        self._hook(HOOK_INVALID, callback, 1, 0)

    def hook_blocks_made(self, function: Callable[[int, int], None]) -> None:
        """Call back with (linear address, size) of each block that was translated, once."""
        callback = _EDGE_CALLBACK(lambda _uc, tb, _last, _data: function(tb[0].pc, tb[0].size))
        self._keep.append(callback)
        self._hook(HOOK_EDGE, callback, 1, 0)

    def memory_callback(self, function: Callable[[int, int, int, int], None]) -> Callback:
        """Make a callback with (kind, gpa, size, value) of accesses that do not go through."""

        def on_access(_uc: int, kind: int, gpa: int, size: int, value: int, _data: int) -> bool:
            function(kind, gpa, size, value)
            return False

        callback = _MEMORY_CALLBACK(on_access)
        self._keep.append(callback)
        if self.native is None:
            return callback
        return ctypes.c_void_p(self.native.leaving(ctypes.cast(callback, ctypes.c_void_p)))

    def hook_memory(self, callback: Callback, begin: int, end: int) -> int:
        """Call back on accesses that do not go through at [begin, end]; a handle."""
        return self._hook(HOOK_UNMAPPED | HOOK_PROTECTED, callback, begin, end)

    def hook_accesses(self, function: Callable[[int, int, int], None], begin: int, end: int) -> int:
        """Call back with (kind, gpa, size) of accesses that begin at [begin, end]; a handle.

        With begin beyond end: of all accesses. Blocks translated before do not call.
        """
        callback = _ACCESS_CALLBACK(
            lambda _uc, kind, gpa, size, _value, _data: function(kind, gpa, size)
        )
        self._keep.append(callback)
        return self._hook(HOOK_READ | HOOK_WRITE, callback, begin, end)

    def write_callback(self, function: Callable[[int, int], None]) -> Callback:
        """Make a callback with (gpa, size) of stores."""
        callback = _ACCESS_CALLBACK(
            lambda _uc, _kind, gpa, size, _value, _data: function(gpa, size)
        )
        self._keep.append(callback)
        return callback

    def hook_writes(self, callback: Callback, begin: int, end: int, data: int) -> int:
        """Call back on stores at [begin, end]; a handle. Not for blocks translated before."""
        return self._hook(HOOK_WRITE, callback, begin, end, data)

    def _hook(self, kind: int, callback: Callback, begin: int, end: int, data: int = 0) -> int:
        handle = ctypes.c_size_t()
        status = self._lib.uc_hook_add(
            *(self._uc, ctypes.byref(handle), ctypes.c_int(kind), callback),
            *(ctypes.c_void_p(data), ctypes.c_uint64(begin), ctypes.c_uint64(end)),
        )
        self._check(status)
        return handle.value

    # -- making ------------------------------------------------------------------------------

    def _check(self, status: int) -> None:
        if status:
            msg = f"unicorn: error {status}"
            raise BackendError(msg)

    def _ctl(self, control: int, *values: int, check: bool = True) -> None:
        number = control | len(values) << 26 | 1 << 30
        arguments = [ctypes.c_uint64(value) for value in values]
        status = self._lib.uc_ctl(self._uc, ctypes.c_int(number), *arguments)
        if check:
            self._check(status)

    def _write(self, register: int, value: int) -> None:
        self._lib.uc_reg_write(self._uc, register, ctypes.byref(ctypes.c_uint64(value)))

    def _find_env(self) -> int:
        """Address of the CPU's state: sixteen registers with values nothing else has.

        Pointers of the instance are followed through ``/proc/self/mem``, which answers an error
        where a plain read would fault.
        """
        values = [0x5EED_0000_0000_0000 | n * 0x0101_0101_0101 for n in range(1, 17)]
        for register, value in zip(_REG_GPRS, values, strict=True):
            self._write(register, value)
        pattern = b"".join(value.to_bytes(8, "little") for value in values)
        instance = memoryview(_peek(self._uc.value or 0, _CPU_SEARCH_BYTES))
        words = instance[: len(instance) // 8 * 8].cast("Q")
        for pointer in dict.fromkeys(words):
            if pointer % 8 or not PAGE <= pointer < 1 << 47:
                continue
            at = _peek(pointer, _ENV_SEARCH_BYTES).find(pattern)
            if at >= 0 and self._follows(pointer + at, values[0]):
                for register in _REG_GPRS:
                    self._write(register, 0)
                return pointer + at
        raise ConfigError("this build of Unicorn keeps its CPU's state in an unknown way")

    def _follows(self, address: int, value: int) -> bool:
        """Whether RAX is at an address: copies of the state, of earlier instances say, stay."""
        self._write(_REG_GPRS[0], value + 1)
        found = _peek(address, 8)
        self._write(_REG_GPRS[0], value)
        return int.from_bytes(found, "little") == value + 1

    def _calibrate(self) -> None:
        """Check the offsets the engine uses against what the public interface writes."""
        self._write(_REG_CR3, 0x1234_5000)
        self._write(_REG_DR0, 0x5EED_1234)
        self._write(_REG_RFLAGS, 0x0000_0CD7)  # CF PF AF ZF SF OF DF
        found = (
            self.q[(424 + 24) // 8],
            self.q[5400 // 8],
            self.q[136 // 8] & 0x202,
            self.d[172 // 4],
            self.computed_flags() & 0xCD5,
        )
        if found != (0x1234_5000, 0x5EED_1234, 0x002, 0xFFFF_FFFF, 0xCD5):
            raise ConfigError("this build of Unicorn keeps its CPU's state in an unknown way")
        self._write(_REG_CR3, 0)
        self._write(_REG_DR0, 0)
        self._write(_REG_RFLAGS, 2)

    def _make_native(self, env: int) -> native.Native | None:
        owner = native.process(self._lib._name)  # noqa: SLF001 - CDLL's own name of its file
        cpu = self._find_cpu(env)
        if owner is None or cpu is None:
            return None
        try:
            return native.Native(owner, self._handle or 0, cpu, env)
        except LookupError:
            return None

    def _find_cpu(self, env: int) -> int | None:
        """Address of the object the CPU's state is part of: it points to that, and to its owner."""
        instance = memoryview(_peek(self._handle or 0, _CPU_SEARCH_BYTES))
        words = instance[: len(instance) // 8 * 8].cast("Q")
        near = sorted({p for p in words if p % 8 == 0 and 0 < env - p < _ENV_SEARCH_BYTES})
        for pointer in reversed(near):
            held = memoryview(_peek(pointer, (env - pointer) // 8 * 8)).cast("Q")
            if env in held and self._handle in held:
                return pointer
        return None

    def _prime(self) -> None:
        """Execute a block and its successor: the first block of an instance is never reported."""
        scratch = ctypes.create_string_buffer(2 * PAGE)
        address = (ctypes.addressof(scratch) + PAGE - 1) & -PAGE
        ctypes.memmove(address, b"\xeb\x00\xf4", 3)  # jmp +0; hlt
        with self.preserved():
            self.map(0, PAGE, address)
            owner = native.process(self._lib._name)  # noqa: SLF001 - CDLL's own name of its file
            if self.native is None or owner is None or owner.exact:
                self.start(0)
            else:
                self._learn_checks(owner)
            self.unmap(0, PAGE)

    def _learn_checks(self, owner: native.Process) -> None:
        """Execute the block with a code callback, to see who asks for the look behind that."""
        nothing = _BARE_CALLBACK(lambda: None)
        hook = self._hook(HOOK_CODE, nothing, 0, 0)
        place = owner.record_checks()
        self.start(0)
        owner.keep_checks_of(place.value)
        self.unhook(hook)


@contextmanager
def _small_pages(library: ctypes.CDLL) -> Iterator[None]:
    """No huge pages for what is touched first in here.

    The emulator asks for huge pages for its translated code, of which most guests have little: two
    megabytes of every instance.
    """
    before = library.prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0)
    library.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        library.prctl(_PR_SET_THP_DISABLE, max(before, 0), 0, 0, 0)


def _peek(address: int, size_bytes: int) -> bytes:
    """Read this process's memory; as much as is there, in halves."""
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        while size_bytes >= 8:
            try:
                return os.pread(memory.fileno(), size_bytes, address)
            except OSError:
                size_bytes //= 2
    return b""
