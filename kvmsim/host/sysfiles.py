"""Texts by which programs recognise the machine: module parameters and ``/proc/cpuinfo``.

Which parameters exist and how they print: Linux 6.12 ``arch/x86/kvm``; all are 0444 here because
nothing in the emulator can change them after loading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmsim.host.presets import Preset
    from kvmsim.host.sev_setup import SevSetup

_COMMON_FLAGS = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse "
    "sse2 ht syscall nx pdpe1gb rdtscp lm constant_tsc rep_good nopl nonstop_tsc cpuid pni "
    "pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 x2apic movbe popcnt aes xsave avx f16c rdrand lahf_lm"
)
_AMD_FLAGS = "cmp_legacy svm extapic cr8_legacy abm sse4a"
_INTEL_FLAGS = "vmx est tm2 abm"


def _yes_no(value: bool) -> str:
    return "Y\n" if value else "N\n"


def module_parameters(preset: Preset, sev: SevSetup) -> dict[str, str]:
    """Map ``module/parameters/name`` below ``/sys/module`` to the file's text."""
    values = {
        "kvm/parameters/eager_page_split": "Y\n",
        "kvm/parameters/enable_pmu": _yes_no(preset.pmu is not None),
        "kvm/parameters/force_emulation_prefix": "0\n",
        "kvm/parameters/halt_poll_ns": "200000\n",
        "kvm/parameters/ignore_msrs": "N\n",
        "kvm/parameters/tdp_mmu": "Y\n",
    }
    if preset.vendor == "amd":
        values |= {
            "kvm_amd/parameters/avic": "N\n",
            "kvm_amd/parameters/debug_swap": _yes_no(sev.debug_swap),
            "kvm_amd/parameters/nested": "0\n",
            "kvm_amd/parameters/npt": _yes_no(preset.sev is None or preset.sev.nested_paging),
            "kvm_amd/parameters/sev": _yes_no(sev.sev),
            "kvm_amd/parameters/sev_es": _yes_no(sev.sev_es),
            "kvm_amd/parameters/sev_snp": _yes_no(sev.sev_snp),
        }
    else:
        values |= {
            "kvm_intel/parameters/ept": "Y\n",
            "kvm_intel/parameters/nested": "N\n",
            "kvm_intel/parameters/tdx": _yes_no(preset.tdx is not None),
            "kvm_intel/parameters/unrestricted_guest": "Y\n",
        }
    return values


def cpu_flags(preset: Preset) -> list[str]:
    """The ``flags`` of ``/proc/cpuinfo``.

    AMD's bus lock threshold and Intel's bus lock exit have no name there: their comments in the
    kernel's feature tables carry no quoted string.
    """
    flags = _COMMON_FLAGS.split()
    if preset.vendor == "intel":
        flags += _INTEL_FLAGS.split()
    else:
        flags += _AMD_FLAGS.split()
        flags += _svm_flags(preset)
    if preset.pmu is not None:
        flags += ["pdcm", "arch_perfmon"]
    if preset.rtm:
        flags.append("rtm")
    if preset.bus_lock.detect:
        flags.append("bus_lock_detect")
    if preset.bus_lock.split_lock_detect:
        flags.append("split_lock_detect")
    if preset.tdx is not None:
        flags.append("tdx_host_platform")
    return flags


def _svm_flags(preset: Preset) -> list[str]:
    sev = preset.sev
    if sev is None:
        return ["npt", "nrip_save", "flushbyasid", "decodeassists"]
    present = {
        "npt": sev.nested_paging,
        "lbrv": sev.lbr_virtualization,
        "nrip_save": sev.next_rip,
        "flushbyasid": sev.flush_by_asid,
        "decodeassists": sev.decode_assists,
        "sme": True,
        "sev": True,
        "sev_es": sev.es,
        "sev_snp": sev.snp,
        "debug_swap": sev.debug_swap,
    }
    return [name for name, has in present.items() if has]


def cpuinfo(preset: Preset) -> str:
    """The text of ``/proc/cpuinfo``: one paragraph per logical CPU."""
    vendor_id = "AuthenticAMD" if preset.vendor == "amd" else "GenuineIntel"
    mhz = f"{preset.tsc_khz // 1000}.{preset.tsc_khz % 1000:03d}"
    bits = 52 - preset.sev.reduced_phys_bits if preset.sev is not None else 52
    # BogoMIPS is twice the TSC frequency in MHz where the TSC calibrates the delay loop.
    bogomips = f"{preset.tsc_khz // 500}.{preset.tsc_khz % 500 // 5:02d}"
    shared = (
        f"vendor_id\t: {vendor_id}\n"
        f"cpu family\t: {preset.family}\n"
        f"model\t\t: {preset.model}\n"
        f"model name\t: {preset.model_name}\n"
        f"stepping\t: {preset.stepping}\n"
        f"cpu MHz\t\t: {mhz}\n"
    )
    tail = (
        "fpu\t\t: yes\n"
        "fpu_exception\t: yes\n"
        f"flags\t\t: {' '.join(cpu_flags(preset))}\n"
        f"bogomips\t: {bogomips}\n"
        "clflush size\t: 64\n"
        "cache_alignment\t: 64\n"
        f"address sizes\t: {bits} bits physical, 48 bits virtual\n"
    )
    cpus = preset.cpus
    return "".join(
        f"processor\t: {cpu}\n{shared}"
        f"physical id\t: 0\nsiblings\t: {cpus}\ncore id\t\t: {cpu}\ncpu cores\t: {cpus}\n"
        f"apicid\t\t: {cpu}\ninitial apicid\t: {cpu}\n{tail}\n"
        for cpu in range(cpus)
    )
