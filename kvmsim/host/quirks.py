"""Behaviour of a real kernel that looks like a mistake: one switch each, with its default.

Source of each: kvm.md of the specification, sections A.3, D.1 and H.9.
"""

from __future__ import annotations

import msgspec


class Quirks(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The switches of one machine; a preset sets them in its ``[quirks]`` table.

    Attributes:
        sticky_bus_lock: ``KVM_BUS_LOCK_DETECTION_OFF`` does not turn detection off once it is on.
        psp_fail_keeps_capacity: the ASID capacities stay registered although the platform did not
            initialise and SEV is off.
        debug_exit_hides_bus_lock: the DR6 a debugger gets says "no bus lock" whatever the cause
            (Intel).
    """

    sticky_bus_lock: bool = True
    psp_fail_keeps_capacity: bool = True
    debug_exit_hides_bus_lock: bool = True
