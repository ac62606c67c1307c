"""What the comparison knows of opcodes: which flags they leave undefined, which it leaves out."""

CF, PF, AF, ZF, SF, OF = 1, 4, 16, 64, 128, 2048
STATUS = CF | PF | AF | ZF | SF | OF
LOGIC = frozenset(n + low for low in (0x08, 0x20, 0x30) for n in range(6)) | {
    0x84,
    0x85,
    0xA8,
    0xA9,
}


def undefined_flags(found):
    """Flags an instruction leaves undefined (SDM volume 1, appendix A)."""
    opcode, reg = found.opcode, found.modrm >> 3 & 7
    if opcode in LOGIC or (opcode in {0x80, 0x81, 0x82, 0x83} and reg in {1, 4, 6}):
        return AF
    if opcode in {0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3}:
        # Rotations change CF and OF, shifts all; OF is defined for one bit only.
        single = opcode in {0xD0, 0xD1}
        if reg < 4:
            return 0 if single else OF
        return AF if single else AF | OF | CF
    if opcode in {0xF6, 0xF7}:
        return _GROUP_3.get(reg, 0)
    return _UNDEFINED.get(opcode, 0)


_GROUP_3 = {
    **dict.fromkeys((0, 1), AF),
    **dict.fromkeys((4, 5), SF | ZF | AF | PF),
    **dict.fromkeys((6, 7), STATUS),
}
_UNDEFINED = {
    **dict.fromkeys((0x69, 0x6B, 0x0FAF), SF | ZF | AF | PF),
    **dict.fromkeys((0x0FA4, 0x0FA5, 0x0FAC, 0x0FAD), AF | OF | CF | SF | ZF | PF),
    **dict.fromkeys((0x0FBC, 0x0FBD), STATUS & ~ZF),
    **dict.fromkeys((0x0FA3, 0x0FAB, 0x0FB3, 0x0FBB, 0x0FBA), OF | SF | AF | PF),
    **dict.fromkeys((0x27, 0x2F), OF),  # DAA, DAS
    **dict.fromkeys((0x37, 0x3F), OF | SF | ZF | PF),  # AAA, AAS
    **dict.fromkeys((0xD4, 0xD5), OF | AF | CF),  # AAM, AAD
}
_CONDITIONS = (OF, CF, ZF, CF | ZF, SF, PF, SF | OF, ZF | SF | OF)


def reads_flags(found):
    """Status flags an instruction depends on."""
    opcode = found.opcode
    if opcode == 0x9F:
        return STATUS
    if 0x70 <= opcode <= 0x7F or opcode >> 4 in {0x0F8, 0x0F9, 0x0F4}:
        return _CONDITIONS[opcode >> 1 & 7]
    if opcode < 0x40 and opcode & 7 < 6 and opcode >> 3 in {2, 3}:
        return CF
    if opcode in {0x80, 0x81, 0x82, 0x83} and found.modrm >> 3 & 7 in {2, 3}:
        return CF
    if opcode in {0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3} and found.modrm >> 3 & 7 in {2, 3}:
        return CF
    return _READS.get(opcode, 0)


_READS = {
    **dict.fromkeys((0xE0, 0xE1), ZF),
    **dict.fromkeys((0xA6, 0xA7, 0xAE, 0xAF), 0),
    **dict.fromkeys((0x27, 0x2F), CF | AF),
    **dict.fromkeys((0x37, 0x3F), AF),
    0xF5: CF,
    0xD6: CF,
    0xCE: OF,
    0x0F05: STATUS,
}

#: Two processors answer differently by their nature: identification, time, model-specific
#: registers, random numbers, monitoring, virtual machines, extended state.
_OWN = frozenset(
    {0x0FA2, 0x0F30, 0x0F31, 0x0F32, 0x0F33, 0x0FC7, 0x0FAE, 0x0F37, 0x0FAA, 0x0F78, 0x0F79}
)


def NOT_COMPARED(found):  # noqa: N802
    """Whether an instruction depends on the model of the processor."""
    if found.opcode == 0x0F01:
        return found.modrm >= 0xC0 and found.modrm & 0x38 not in {0x20, 0x30}
    if found.opcode == 0x0FC7:
        return found.modrm >> 3 & 7 != 1
    return found.opcode in _OWN
