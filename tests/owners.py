"""Who stands behind an emulated process in tests that only need there to be one."""


class Owner:
    """Nothing happens to it."""

    def killed(self, now_ns):
        pass

    def frozen(self, frozen, now_ns):
        pass

    def moved(self, now_ns):
        pass
