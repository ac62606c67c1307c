from struct import unpack_from

import pytest

from kvmsim.abi import ioctls

FIRST_OF_VCPU = [
    *("halt_successful_poll", "halt_attempted_poll", "halt_poll_invalid", "halt_wakeup"),
    *("halt_poll_success_ns", "halt_poll_fail_ns", "halt_wait_ns"),
    *("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist", "blocking"),
]


@pytest.fixture(params=["vm", "vcpu"])
def kind(request):
    return request.param


@pytest.fixture
def content(world, vm, vcpu, kind):
    file = world.make(vm if kind == "vm" else vcpu, ioctls.KVM_GET_STATS_FD)
    return world.content(file)


def descriptors(content):
    count, _, offset = unpack_from("<III", content, 8)
    for at in range(offset, offset + 64 * count, 64):
        name = content[at + 16 : at + 64].rstrip(b"\0").decode()
        yield name, unpack_from("<IhHII", content, at)


def test_row_116_header(content, kind):
    flags, name_size, count, id_offset, desc_offset, data_offset = unpack_from("<6I", content)
    assert (flags, name_size, id_offset, desc_offset) == (0, 48, 24, 72)
    assert data_offset == 72 + 64 * count
    name = content[24:72].rstrip(b"\0").decode()
    assert name.startswith("kvm-")
    assert name.endswith("/vcpu-0") == (kind == "vcpu")


def test_values_fill_the_rest_of_the_file(content):
    (data_offset,) = unpack_from("<I", content, 20)
    end = max(offset + 8 * size for _, (_, _, size, offset, _) in descriptors(content))
    assert len(content) == data_offset + end


def test_first_descriptors(content, kind):
    got = list(descriptors(content))
    if kind == "vm":
        assert got[:2] == [
            ("remote_tlb_flush", (0, 0, 1, 0, 0)),
            ("remote_tlb_flush_requests", (0, 0, 1, 8, 0)),
        ]
        return
    assert [name for name, _ in got[:11]] == FIRST_OF_VCPU
    by_name = dict(got)
    assert by_name["halt_wait_ns"] == (0x20, -9, 1, 48, 0)
    assert by_name["halt_wait_hist"] == (0x24, -9, 32, 568, 0)
    assert by_name["blocking"] == (0x41, 0, 1, 824, 0)
    assert by_name["exits"][3] == 904
