"""A request that could not be done, as a person and a script see it.

The message is the one line that goes to standard error (without the program's name), the exit
code is one of sysexits.h, the errno is the system's word for the reason, 0 where there is none.
"""

import errno as errno_names
import os

# What the number says to the script that called us; the rest of sysexits.h is not used.
EXIT_OF_ERRNO = {
    errno_names.EACCES: os.EX_NOPERM,
    errno_names.EPERM: os.EX_NOPERM,
    errno_names.EAGAIN: os.EX_TEMPFAIL,
    errno_names.EBUSY: os.EX_TEMPFAIL,
    errno_names.EINVAL: os.EX_USAGE,
    errno_names.ENODEV: os.EX_UNAVAILABLE,
    errno_names.ENOENT: os.EX_UNAVAILABLE,
    errno_names.ENOTTY: os.EX_UNAVAILABLE,
    errno_names.EEXIST: os.EX_UNAVAILABLE,
    errno_names.ESRCH: os.EX_UNAVAILABLE,
    errno_names.EOPNOTSUPP: os.EX_UNAVAILABLE,
}


class CommandError(Exception):
    """One clear line, an exit code and an errno."""

    def __init__(self, message: str, exit_code: int = os.EX_UNAVAILABLE, errno: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.errno = errno


def errno_word(number: int) -> str:
    """The symbol of an errno, ``EBUSY``; its number where Linux has no symbol."""
    if number == errno_names.EOPNOTSUPP:
        return "EOPNOTSUPP"  # Python says ENOTSUP, which the C library has for the same number
    return errno_names.errorcode.get(number, str(number))


def from_errno(message: str, number: int) -> CommandError:
    """A failure whose line ends with the errno's symbol, as ``… (EBUSY)``."""
    code = EXIT_OF_ERRNO.get(number, os.EX_OSERR)
    return CommandError(f"{message} ({errno_word(number)})", code, number)


def from_oserror(error: OSError, doing: str) -> CommandError:
    """A failed system call, told as what was being done and why it did not work."""
    reason = error.strerror or str(error)
    number = error.errno or 0
    code = EXIT_OF_ERRNO.get(number, os.EX_OSERR)
    return CommandError(f"{doing}: {reason}", code, number)
