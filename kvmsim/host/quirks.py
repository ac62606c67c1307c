"""Behaviour of a real kernel that looks like a mistake: one switch each, with its default.

Source of each: kvm.md of the specification, sections A.3, D.1, D.8 and H.9.
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
        mirror_drops_vmsa_features: a mirror does not inherit the VMSA features of its owner.
        receive_update_einval: ``KVM_SEV_RECEIVE_UPDATE_DATA`` refuses a VM that is no SEV guest
            with EINVAL, where all its neighbours say ENOTTY.
        move_charges_wrong_type: moving an SEV-ES guest to another cgroup moves a ``sev`` unit
            instead of its ``sev_es`` unit; counts fall below 0.
        move_mirror_leaks_charge: moving a mirror charges the destination, which never gives back.
        lbr_release_ignores_use: a vCPU that is descheduled with DEBUGCTL.LBR clear loses its
            last-branch records, read or not (6.12); off: not if it accessed them meanwhile.
        lbr_first_series: last-branch records by the rules of the series that brought them (v13,
            5.12): processors without call-stack mode too, PMU version 2 or later, a format that
            does not fit is cleared silently, and DEBUGCTL.LBR without records is #GP.
        amd_debugctl_drops_bits: DEBUGCTL bits 1 and 5:2 are dropped where LBR virtualization is
            on (AMD, before 6.16); off: bits 5:2 are #GP.
        move_keeps_need_init: after a move a VM of an encrypted type still waits for its init.
    """

    sticky_bus_lock: bool = True
    psp_fail_keeps_capacity: bool = True
    debug_exit_hides_bus_lock: bool = True
    mirror_drops_vmsa_features: bool = True
    receive_update_einval: bool = True
    move_charges_wrong_type: bool = False
    move_mirror_leaks_charge: bool = False
    move_keeps_need_init: bool = False
    lbr_release_ignores_use: bool = False
    lbr_first_series: bool = False
    amd_debugctl_drops_bits: bool = True
