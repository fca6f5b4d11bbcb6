"""Becomes nats-server, bound to the life of the process that started it.

Run by path, in an interpreter of its own (``python -I -S server_launcher.py <parent pid> <program> [argument…]``).
The usual ``preexec_fn`` would run Python between fork and exec of a process full of threads, where any lock can be
held for ever; here it runs in a fresh one.  The cost is some 15 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main(arguments: list[str]) -> None:
    """Asks the kernel for SIGKILL when the parent dies, then replaces this process by the program.

    SIGKILL, not SIGTERM: a server that cannot finish its clean stop would hold the port and the data directory.
    The setting survives exec, see prctl(2).
    """
    parent = int(arguments[0])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the line above
        sys.exit("parent process is gone")
    # Python ignores SIGPIPE, and what is ignored stays so across exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execv(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
