"""Makes guests: bytes at random, and instructions that mostly mean something."""

from fuzz.machine import CODE, DATA, MODES, STACK, Case

#: Opcodes with a ModRM byte, with how many bytes of immediate follow: "z" as wide as the operand.
WITH_MODRM = {
    **dict.fromkeys((base + low for base in range(0, 0x40, 8) for low in range(4)), ""),
    0x80: "b",
    0x81: "z",
    0x83: "b",
    0x69: "z",
    0x6B: "b",
    0x63: "",
    0xC0: "b",
    0xC1: "b",
    **dict.fromkeys((0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8B, 0x8C, 0x8D, 0x8E, 0x8F), ""),
    **dict.fromkeys((0xD0, 0xD1, 0xD2, 0xD3, 0xF6, 0xF7, 0xFE, 0xFF), ""),
    0xC6: "b",
    0xC7: "z",
    0xC4: "",
    0xC5: "",
    0x62: "",
    **dict.fromkeys((0x0FA3, 0x0FAB, 0x0FB3, 0x0FBB, 0x0FA5, 0x0FAD, 0x0FAF, 0x0FB0, 0x0FB1), ""),
    **dict.fromkeys((0x0FB2, 0x0FB4, 0x0FB5, 0x0FB6, 0x0FB7, 0x0FBC, 0x0FBD, 0x0FBE, 0x0FBF), ""),
    **dict.fromkeys((0x0FC0, 0x0FC1, 0x0FC7, 0x0F00, 0x0F01, 0x0F02, 0x0F03, 0x0F0D, 0x0F18), ""),
    **dict.fromkeys((0x0F1F, 0x0F0B, 0x0FB9, 0x0FFF), ""),
    0x0FBA: "b",
    0x0FA4: "b",
    0x0FAC: "b",
    **{0x0F40 + n: "" for n in range(16)},
    **{0x0F90 + n: "" for n in range(16)},
    **dict.fromkeys((0x0F20, 0x0F21, 0x0F22, 0x0F23), ""),
    **dict.fromkeys((0x0F6F, 0x0FEF, 0x0F7F, 0x0F10, 0x0F11, 0x0F28, 0x0F58, 0x0FD6, 0x0F2A), ""),
    **dict.fromkeys((0x0F3800, 0x0F38F0, 0x0F38F1), ""),
}
PLAIN = {
    **{base + 4: "b" for base in range(0, 0x40, 8)},
    **{base + 5: "z" for base in range(0, 0x40, 8)},
    **dict.fromkeys((0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F), ""),
    **dict.fromkeys(range(0x40, 0x62), ""),
    0x68: "z",
    0x6A: "b",
    0xA8: "b",
    0xA9: "z",
    0xC8: "wb",
    0xC9: "",
    0xCD: "b",
    0xD4: "b",
    0xD5: "b",
    0xD6: "",
    0xD7: "",
    0xC2: "w",
    0xC3: "",
    0xCA: "w",
    0xCB: "",
    0xCC: "",
    0xCE: "",
    **dict.fromkeys(range(0x70, 0x80), "j"),
    **dict.fromkeys((0xE0, 0xE1, 0xE2, 0xE3, 0xEB), "j"),
    **dict.fromkeys(range(0x90, 0xA0), ""),
    **dict.fromkeys(range(0xA4, 0xA8), ""),
    **dict.fromkeys(range(0xAA, 0xB0), ""),
    **dict.fromkeys(range(0xB0, 0xB8), "b"),
    **dict.fromkeys(range(0xB8, 0xC0), "z"),
    **dict.fromkeys((0xCF, 0xF4, 0xF5, 0xF8, 0xF9, 0xFA, 0xFB, 0xFC, 0xFD, 0xF1), ""),
    **dict.fromkeys((0x6C, 0x6D, 0x6E, 0x6F, 0xEC, 0xED, 0xEE, 0xEF), ""),
    **dict.fromkeys((0xE4, 0xE5, 0xE6, 0xE7), "b"),
    **dict.fromkeys((0x9A, 0xEA), "p"),
    **dict.fromkeys((0xE8, 0xE9), "J"),
    **dict.fromkeys((0xA0, 0xA1, 0xA2, 0xA3), "o"),
    **dict.fromkeys((0x0F05, 0x0F06, 0x0F07, 0x0F08, 0x0F09, 0x0F0B, 0x0F34, 0x0F35, 0x0FA0), ""),
    **dict.fromkeys((0x0FA1, 0x0FA8, 0x0FA9, 0x0F77, *range(0x0FC8, 0x0FD0)), ""),
    **dict.fromkeys(range(0x0F80, 0x0F90), "J"),
}
MODRM_OPCODES, PLAIN_OPCODES = tuple(WITH_MODRM), tuple(PLAIN)
PREFIXES = (0xF0, 0xF0, 0x66, 0x66, 0x67, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65)
SELECTORS = (0, 8, 0x10, 0x1B, 0x23, 0x28, 0x3B, 0x40, 0x48, 0x50, 0x4B, 0x13, 0x20, 0x100, 4)
FLAGS = (0x2, 0x2, 0x202, 0x402, 0x8D7, 0x3002, 0x4002, 0x40002, 0x10002)


def _bytes_of(opcode):
    return opcode.to_bytes(1 if opcode < 0x100 else 2 if opcode < 0x10000 else 3, "big")


class Streams:
    """A source of guests.

    Args:
        stream: where its chance comes from.
    """

    def __init__(self, stream):
        self.stream = stream

    def case(self):
        """The next guest."""
        stream = self.stream
        mode = stream.choice(MODES)
        style = stream.random()
        if style < 0.3:
            code = stream.randbytes(stream.choice((4, 16, 64)))
        else:
            bits = Case(mode, b"", [], 0, 0).bits
            count = stream.choice((1, 1, 2, 3, 6, 10))
            code = b"".join(self.instruction(bits) for _ in range(count))
        return Case(mode, code, self._general(mode), self._flags(mode), stream.getrandbits(16))

    def instruction(self, bits):
        """One instruction."""
        stream = self.stream
        if stream.random() < 0.02:
            return self._flags_loaded(bits)
        prefixes = b""
        while stream.random() < 0.2:
            prefixes += bytes([stream.choice(PREFIXES)])
        rex = bytes([0x40 | stream.getrandbits(4)]) if bits == 64 and stream.random() < 0.5 else b""
        wide = bits if b"\x66" not in prefixes else 48 - min(bits, 32)
        wide = min(wide, 32)
        if stream.random() < 0.6:
            opcode = stream.choice(MODRM_OPCODES)
            body = self._modrm(bits, b"\x67" in prefixes)
            kinds = WITH_MODRM[opcode]
            if opcode in {0xF6, 0xF7} and body[0] & 0x30 == 0:
                kinds = "b" if opcode == 0xF6 else "z"
        else:
            opcode = stream.choice(PLAIN_OPCODES)
            body, kinds = b"", PLAIN[opcode]
        if 0xB8 <= opcode <= 0xBF and rex and rex[0] & 8:
            kinds = "q"
        body += b"".join(self._immediate(kind, wide // 8, bits) for kind in kinds)
        return prefixes + rex + _bytes_of(opcode) + body

    def _flags_loaded(self, bits):
        """PUSH of flags with TF, and POPF."""
        wide = 2 if bits == 16 else 4
        value = self.stream.choice((0x102, 0x302, 0x502, 0x7102, 0x40102))
        return b"\x68" + (value & (1 << 8 * wide) - 1).to_bytes(wide, "little") + b"\x9d"

    def _modrm(self, bits, other_size):
        stream = self.stream
        if stream.random() < 0.4:
            return bytes([0xC0 | stream.getrandbits(6)])
        mod = stream.choice((0, 0, 1, 2))
        byte = mod << 6 | stream.getrandbits(6)
        small = (bits == 16) != (other_size and bits != 64)
        if small:
            size = {0: 2 if byte & 7 == 6 else 0, 1: 1, 2: 2}[mod]
            return bytes([byte]) + self._displacement(size)
        sib = b""
        absolute = mod == 0 and byte & 7 == 5
        if byte & 7 == 4:
            sib = stream.randbytes(1)
            absolute = mod == 0 and sib[0] & 7 == 5
        size = 4 if absolute else {0: 0, 1: 1, 2: 4}[mod]
        return bytes([byte]) + sib + self._displacement(size, absolute=absolute)

    def _displacement(self, size, *, absolute=False):
        if size <= 1:
            return self.stream.randbytes(size)
        near = DATA + self.stream.randrange(0x1FF0) if absolute or size == 2 else 0
        near = near or self.stream.choice((0, 1, 0x40, 0x3C, -4, -64))
        return (near & (1 << 8 * size) - 1).to_bytes(size, "little")

    def _immediate(self, kind, wide, bits):
        stream = self.stream
        if kind == "j":
            return stream.choice((b"\0", b"\1", b"\2", b"\5", b"\xfe", stream.randbytes(1)))
        if kind == "J":
            size = 4 if bits == 64 else wide
            return stream.choice((0, 1, 3, 0x100)).to_bytes(size, "little")
        if kind == "o":
            return (DATA + stream.randrange(0x1FF0)).to_bytes(bits // 8, "little")
        if kind == "p":
            at = stream.choice((CODE, DATA, 0x1800)).to_bytes(wide, "little")
            return at + stream.choice(SELECTORS).to_bytes(2, "little")
        size = {"b": 1, "w": 2, "q": 8, "z": wide}[kind]
        value = stream.choice((0, 1, 0x7F, 0x80, 0xFF, stream.getrandbits(64), DATA))
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def _general(self, mode):
        stream = self.stream
        real = mode == "real"
        values = [
            stream.choice(
                (
                    DATA + stream.randrange(0x1FC0),
                    DATA + 64 * stream.randrange(100) + 60,
                    stream.getrandbits(64),
                    stream.choice(SELECTORS),
                    stream.choice((0, 1, 2, 31, 32, (1 << 64) - 1)),
                )
            )
            for _ in range(16)
        ]
        if stream.random() < 0.9:
            values[1] = stream.randrange(5)
        if stream.random() < 0.95:
            values[4] = STACK + stream.choice((0, 0, 0, -2, 1))
        if not mode.startswith("long"):
            values = [value & 0xFFFF_FFFF for value in values]
            values[8:] = [0] * 8
        if real and stream.random() < 0.8:
            values = [value & 0xFFFF for value in values]
        return values

    def _flags(self, mode):
        value = self.stream.choice(FLAGS)
        if mode == "real":
            value &= ~0x10000
        return value
