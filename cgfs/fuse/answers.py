"""Errors become errnos here, and only here."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from pyfuse3 import FUSEError

from cgfs.errors import CgroupError

log = logging.getLogger(__name__)

_Self = TypeVar("_Self")
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_Handler = Callable[Concatenate[_Self, _Args], _Result | Coroutine[Any, Any, _Result]]


def answers(
    handler: _Handler[_Self, _Args, _Result],
) -> Callable[Concatenate[_Self, _Args], Coroutine[Any, Any, _Result]]:
    """Makes a pyfuse3 handler of a method: the one place where errors become errnos.

    The method is plain where nothing has to be waited for, and returns a coroutine where
    something has.
    """
    plain: Callable[..., Any] = handler

    @functools.wraps(handler)
    async def answer(*args: Any) -> Any:  # noqa: ANN401
        try:
            result: Any = plain(*args)
            return await result if type(result) is CoroutineType else result
        except FUSEError:
            raise
        except CgroupError as error:
            raise FUSEError(error.errno) from None
        except Exception:
            log.exception("%s%r is answered with EIO", handler.__name__, args[1:])
            raise FUSEError(errno.EIO) from None

    return cast("Callable[Concatenate[_Self, _Args], Coroutine[Any, Any, _Result]]", answer)
