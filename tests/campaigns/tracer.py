"""Kills a process before its Nth system call that changes the world, counted over all of its threads.

strace can kill before the Nth call too, but counts for each thread by itself, and which thread of a pool makes a call
is another one in each run: some calls would never be the Nth of any thread.  Here one tracer (ptrace(2), with a
seccomp(2) filter that stops only at the calls of interest) holds every thread at the entry of its call and counts them
in one row.  The call that is counted as N has not been made when the process dies.

What changes the world: files made, written, synced, renamed, linked, removed, resized, stamped; directories made and
removed; bytes given to a TCP connection, and connections opened.  A file opened for reading, and writing to what only
the process itself can see (pipes, socket pairs, event descriptors), changes nothing: dying before such a call is dying
before the next one that counts.  Memory that is shared with a file is no system call; the only one here is LMDB's table
of readers, which belongs to living processes.

Linux on x86-64 and AArch64; :func:`why_not` says what is missing elsewhere.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

# -- which calls

_X86_64: Final = {
    "write": 1, "open": 2, "pwrite64": 18, "writev": 20, "msync": 26, "sendfile": 40, "connect": 42, "sendto": 44,
    "sendmsg": 46, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83,
    "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "utime": 132,
    "utimes": 235, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "fchmodat": 268, "splice": 275, "sync_file_range": 277, "utimensat": 280, "fallocate": 285, "pwritev": 296,
    "sendmmsg": 307, "renameat2": 316, "copy_file_range": 326, "pwritev2": 328, "io_uring_enter": 426, "openat2": 437,
}  # fmt: skip
_AARCH64: Final = {
    "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "truncate": 45, "ftruncate": 46,
    "fallocate": 47, "fchmod": 52, "fchmodat": 53, "openat": 56, "write": 64, "writev": 66, "pwrite64": 68,
    "pwritev": 70, "sendfile": 71, "splice": 76, "fsync": 82, "fdatasync": 83, "sync_file_range": 84, "utimensat": 88,
    "connect": 203, "sendto": 206, "sendmsg": 211, "msync": 227, "sendmmsg": 269, "renameat2": 276,
    "copy_file_range": 285, "pwritev2": 287, "io_uring_enter": 426, "openat2": 437,
}  # fmt: skip
_TABLES: Final = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

_OPENS: Final = {"open": 1, "openat": 2}
"""Which argument of the call holds the flags."""
_ON_DESCRIPTOR: Final = {
    "write": 0, "pwrite64": 0, "writev": 0, "pwritev": 0, "pwritev2": 0, "sendfile": 0, "connect": 0, "sendto": 0,
    "sendmsg": 0, "sendmmsg": 0, "fsync": 0, "fdatasync": 0, "ftruncate": 0, "fchmod": 0, "sync_file_range": 0,
    "fallocate": 0, "splice": 2, "copy_file_range": 2,
}  # fmt: skip
"""Which argument of the call is the descriptor that is written to."""
_CHANGES: Final = os.O_CREAT | os.O_TRUNC

CALLS: Final = tuple(_TABLES.get(platform.machine(), (0, {}))[1])
"""The calls that are stopped at."""

# -- ptrace and seccomp, as of their manual pages and <linux/ptrace.h>, <linux/seccomp.h>, <linux/filter.h>

_PTRACE_CONT: Final = 7
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_GET_SYSCALL_INFO: Final = 0x420E
_O_TRACEFORK, _O_TRACEVFORK, _O_TRACECLONE, _O_TRACESECCOMP, _O_EXITKILL = 0x2, 0x4, 0x8, 0x80, 0x100000
_EVENT_SECCOMP: Final = 7
_EVENT_STOP: Final = 128
_WALL: Final = 0x40000000
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_RET_ALLOW: Final = 0x7FFF0000
_RET_TRACE: Final = 0x7FF00000
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Traced(msgspec.Struct):
    """How a traced process ended: its exit code, or minus the signal; the calls that it made, in their order."""

    status: int
    calls: list[str]


def why_not() -> str | None:
    """Returns what keeps this machine from tracing; None when nothing does."""
    if platform.machine() not in _TABLES or not CALLS:
        return f"no table of system calls for {platform.machine()}"
    try:
        ended = run_traced(lambda: os.close(os.open(os.devnull, os.O_WRONLY | os.O_CREAT)))
    except OSError as error:
        return f"ptrace or seccomp are not allowed here: {os.strerror(error.errno or 0)}"
    return None if ended.status == 0 and len(ended.calls) == 1 else f"tracing does not work here: {ended}"


def run_traced(work: Callable[[], object], *, kill_at: int | None = None, of: str | None = None) -> Traced:
    """Forks a process that does ``work``, and kills it before its ``kill_at``-th call, from 1.

    ``of``: only calls of this name count, as they are named in :attr:`Traced.calls`.  The caller must have no threads.
    Never leaves the process behind.
    """
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        _be_traced(work, ready_read, ready_write)
    os.close(ready_read)
    try:
        options = _O_TRACEFORK | _O_TRACEVFORK | _O_TRACECLONE | _O_TRACESECCOMP | _O_EXITKILL
        _ptrace(_PTRACE_SEIZE, child, 0, options)
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(ready_write)
    return _follow(child, kill_at, of)


def _be_traced(work: Callable[[], object], ready_read: int, ready_write: int) -> NoReturn:
    status = 1
    try:
        os.close(ready_write)
        os.read(ready_read, 1)  # until the tracer has closed its end
        os.close(ready_read)
        _install_filter()
        work()
        status = 0
    except BaseException:  # noqa: BLE001  a fork must not go on with what its parent was about
        traceback.print_exc()
    finally:
        os._exit(status)


def _follow(child: int, kill_at: int | None, of: str | None) -> Traced:
    calls: list[str] = []
    counted = 0
    kinds: dict[str, str | None] = {}
    is_killed = False
    while True:
        tid, status = os.waitpid(-1, _WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if tid == child:
                return Traced(os.waitstatus_to_exitcode(status), calls)
            continue
        if not os.WIFSTOPPED(status) or is_killed:
            continue
        event, stopped_by = status >> 16, os.WSTOPSIG(status)
        if event == _EVENT_SECCOMP:
            call = _call_of(tid, kinds)
            if call is not None:
                counts = of in (None, call)
                counted += counts
                if counts and counted == kill_at:
                    os.kill(child, signal.SIGKILL)
                    is_killed = True
                    continue
                calls.append(call)
        # A signal on its way to the process is passed on; every other stop is one of tracing.
        passed_on = stopped_by if event == 0 and stopped_by != signal.SIGTRAP else 0
        try:
            _ptrace(_PTRACE_CONT, tid, 0, passed_on)
        except ProcessLookupError:
            pass  # it died meanwhile


def _call_of(tid: int, kinds: dict[str, str | None]) -> str | None:
    """Returns what the call that a thread stands before does, as text; None when it changes nothing."""
    buffer = ctypes.create_string_buffer(88)
    try:
        _ptrace(_PTRACE_GET_SYSCALL_INFO, tid, len(buffer), ctypes.addressof(buffer))
    except ProcessLookupError:
        return None
    number, *arguments = struct.unpack_from("<7Q", buffer, 24)
    name = _NAMES[number]
    if name in _OPENS:
        return name if arguments[_OPENS[name]] & _CHANGES else None
    if name not in _ON_DESCRIPTOR:
        return name
    try:
        descriptor = ctypes.c_int(arguments[_ON_DESCRIPTOR[name]] & 0xFFFFFFFF).value
        target = str(Path(f"/proc/{tid}/fd/{descriptor}").readlink())
    except OSError:
        return None  # a descriptor that is not open: the call fails
    if target not in kinds:
        kinds[target] = _kind_of(tid, target, name)
    return None if kinds[target] is None else f"{name} {kinds[target]}"


def _kind_of(tid: int, target: str, name: str) -> str | None:
    if target.startswith("/") and not target.startswith("/dev/"):
        return "file"
    if not target.startswith("socket:["):
        return None
    if name == "connect":
        return "socket"
    inode = target[len("socket:[") : -1]
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{tid}/net/{table}") as lines:  # noqa: PTH123  small, and often
                if any(line.split()[9] == inode for line in lines):
                    return "socket"
        except OSError:
            continue
    return None


def _install_filter() -> None:
    architecture, numbers = _TABLES[platform.machine()]
    program = [(_LOAD_WORD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _RET_ALLOW)]
    program.append((_LOAD_WORD, 0, 0, 0))
    wanted = list(numbers.values())
    for place, number in enumerate(wanted):
        program.append((_JUMP_EQUAL, len(wanted) - place, 0, number))
    program += [(_RETURN, 0, 0, _RET_ALLOW), (_RETURN, 0, 0, _RET_TRACE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("@H0PP", len(program), ctypes.addressof(code)))
    zero = ctypes.c_ulong(0)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    if _libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(header), zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def _ptrace(request: int, tid: int, address: int, data: int) -> int:
    answer: int = _libc.ptrace(request, tid, address, data)
    if answer == -1:
        number = ctypes.get_errno()
        if number == errno.ESRCH:
            raise ProcessLookupError(number, "ptrace")
        raise OSError(number, "ptrace")
    return answer


_NAMES: Final = {number: name for name, number in _TABLES.get(platform.machine(), (0, {}))[1].items()}
