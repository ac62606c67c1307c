"""The same random calls in both worlds at once: answers and the state read back are equal.

What a backend of KVM decides by itself is left out: how much of an interrupt shadow it keeps,
whether it shows virtual-8086 mode, and what time it is.
"""

import random

import pytest

from kvmsim.abi import ioctls, irq, memory, regs, structs

#: Getter, setter, structure, and the members that are a backend's own.
VCPU_STATE = (
    (ioctls.KVM_GET_REGS, ioctls.KVM_SET_REGS, structs.KVM_REGS, ("rflags",)),
    (ioctls.KVM_GET_SREGS, ioctls.KVM_SET_SREGS, regs.KVM_SREGS, ()),
    (ioctls.KVM_GET_FPU, ioctls.KVM_SET_FPU, regs.KVM_FPU, ()),
    (ioctls.KVM_GET_XCRS, ioctls.KVM_SET_XCRS, regs.KVM_XCRS, ()),
    (ioctls.KVM_GET_DEBUGREGS, ioctls.KVM_SET_DEBUGREGS, structs.KVM_DEBUGREGS, ()),
    (
        ioctls.KVM_GET_VCPU_EVENTS,
        ioctls.KVM_SET_VCPU_EVENTS,
        regs.KVM_VCPU_EVENTS,
        ("interrupt.shadow", "smi.smm", "smi.pending", "smi.smm_inside_nmi", "smi.latched_init"),
    ),
)
BITS = {"u8": 8, "u16": 16, "u32": 32, "u64": 64}
SEEDS = range(25)


@pytest.fixture
def worlds(both_worlds):
    """A VM in each world: (world, VM) twice."""
    return [(world, world.make(world.system, ioctls.KVM_CREATE_VM)) for world in both_worlds]


def change(chance, layout, data, left_out):
    """Change up to three members of a structure."""
    for _ in range(chance.randrange(1, 4)):
        name = chance.choice([name for name in layout.fields if name not in left_out])
        field = layout.fields[name]
        index, bits = chance.randrange(field.count), BITS[field.ctype]
        flipped = layout.get(data, name, index) ^ 1 << chance.randrange(bits)
        value = chance.choice((0, 1, 2, 3, 0xFF, flipped, chance.getrandbits(bits)))
        layout.put(data, name, value & (1 << bits) - 1, index)


def on_both(files, request_number, data):
    """Make a call in both; what each answered and left in the buffer."""
    answers = []
    for world, file in files:
        buffer = bytearray(data)
        answers.append((world.ioctl(file, request_number, buffer), buffer))
    return answers


@pytest.mark.parametrize("seed", SEEDS)
def test_state_of_a_vcpu(worlds, seed):
    chance = random.Random(seed)
    if chance.random() < 0.5:
        on_both(worlds, ioctls.KVM_CREATE_IRQCHIP, bytes(8))
    for number in (164, 218):
        enable = structs.KVM_ENABLE_CAP.pack(cap=number, args=chance.randrange(2))
        on_both(worlds, ioctls.KVM_ENABLE_CAP, enable)
    vcpus = [(world, world.make(vm, ioctls.KVM_CREATE_VCPU)) for world, vm in worlds]
    for _ in range(20):
        getter, setter, layout, left_out = chance.choice(VCPU_STATE)
        (_, data), _ = on_both(vcpus, getter, bytes(layout.size_bytes))
        change(chance, layout, data, left_out)
        kernels, ours = on_both(vcpus, setter, data)
        assert ours == kernels
        kernels, ours = on_both(vcpus, getter, bytes(layout.size_bytes))
        assert ours == kernels


@pytest.mark.parametrize("seed", SEEDS)
def test_interrupt_lines(worlds, seed):
    chance = random.Random(seed)
    on_both(worlds, ioctls.KVM_CREATE_IRQCHIP, bytes(8))
    for _ in range(20):
        chip = irq.KVM_IRQCHIP.pack(chip_id=chance.randrange(2))
        (_, data), _ = on_both(worlds, ioctls.KVM_GET_IRQCHIP, chip)
        pic = bytearray(data[8:24])
        if chance.random() < 0.3:
            member = chance.choice(("imr", "elcr", "isr", "priority_add"))
            irq.KVM_PIC_STATE.put(pic, member, chance.getrandbits(3 if "add" in member else 8))
            data[8:24] = pic
            on_both(worlds, ioctls.KVM_SET_IRQCHIP, data)
        line = irq.KVM_IRQ_LEVEL.pack(irq=chance.randrange(26), level=chance.randrange(2))
        kernels, ours = on_both(worlds, ioctls.KVM_IRQ_LINE_STATUS, line)
        assert ours == kernels
        for chip_id in range(3):
            chip = irq.KVM_IRQCHIP.pack(chip_id=chip_id)
            kernels, ours = on_both(worlds, ioctls.KVM_GET_IRQCHIP, chip)
            assert ours == kernels


PLACES = (0, 4096, 8192, 1 << 20, (1 << 20) + 4096, 1 << 45, 100, (1 << 64) - 8192)


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_slots(worlds, seed):
    chance = random.Random(seed)
    ram = [world.pages(32)[0] for world, _ in worlds]
    for _ in range(40):
        region = {
            "slot": chance.choice((0, 1, 2, 3, 32763, 32764, 1 << 17)),
            "flags": chance.choice((0, 0, 0, 1, 1, 2, 3, 4, 8)),
            "guest_phys_addr": chance.choice(PLACES),
            "memory_size": chance.choice((0, 4096, 8192, 16384, 16384, 100)),
        }
        offset = chance.choice((0, 0, 0, 4096, 1))
        kernels, ours = (
            world.ioctl(
                vm,
                ioctls.KVM_SET_USER_MEMORY_REGION,
                memory.KVM_USERSPACE_MEMORY_REGION.pack(**region, userspace_addr=hva + offset),
            )
            for (world, vm), hva in zip(worlds, ram, strict=True)
        )
        assert ours == kernels
