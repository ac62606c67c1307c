import ctypes

from kvmsim.interpose import notify


def test_structures_have_the_sizes_of_their_requests():
    for request, layout in (
        (notify.NOTIF_RECV, notify.NOTIF),
        (notify.NOTIF_SEND, notify.RESPONSE),
        (notify.NOTIF_ADDFD, notify.ADDFD),
    ):
        assert request >> 16 & 0x3FFF == layout.size
    assert notify.NOTIF.size == notify.NOTIF_BYTES
    assert ctypes.sizeof(ctypes.c_uint64) == notify.NOTIF_ID_VALID >> 16 & 0x3FFF
