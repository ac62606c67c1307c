"""The model's errors as the one line and the exit code of a command."""

import os
from errno import EBUSY, ENOSPC

from cgfs.control.errors import EXIT_OF_ERRNO, CommandError, from_errno
from cgfs.errors import CgroupError, ChargeRefused
from kvmsim.errors import ConfigError, KvmError, KvmsimError

# KVM means keys by it, which come back; for anybody else it is a full disk.
EXIT_OF_IOCTL = {**EXIT_OF_ERRNO, ENOSPC: os.EX_TEMPFAIL}

# What a person calls the resource that has run out.
UNIT_OF_RESOURCE = {"sev": "SEV ASID", "sev_es": "SEV-ES ASID", "tdx": "TDX key"}


def explain(error: BaseException | None) -> CommandError | None:
    """The failure that an exception of the model means; None for a bug of ours."""
    known: CommandError | None = None
    match error:
        case CommandError():
            known = error
        case ChargeRefused():
            known = from_errno(_refusal(error), error.errno)
        case KvmError():
            # A refused charge knows more than the ioctl that passes it on.
            known = explain(error.__cause__) or _with_code(str(error), error.errno)
        case CgroupError() if error.errno == EBUSY:
            # Not a limit: a cgroup that takes no processes will not by being asked again.
            known = CommandError(from_errno(str(error), EBUSY).message, errno=EBUSY)
        case CgroupError():
            known = from_errno(str(error), error.errno)
        case ConfigError():
            known = CommandError(str(error), os.EX_CONFIG)
        case KvmsimError():
            known = CommandError(str(error), os.EX_SOFTWARE)
        case _:
            pass
    return known


def _with_code(message: str, errno: int) -> CommandError:
    return CommandError(message, EXIT_OF_IOCTL.get(errno, os.EX_OSERR), errno)


def _refusal(error: ChargeRefused) -> str:
    unit = UNIT_OF_RESOURCE.get(error.resource, error.resource)
    place = "the host" if error.cgroup == "/" else f"cgroup {error.cgroup}"
    return f'no {unit}: {place} is at {error.file} "{error.value}"'
