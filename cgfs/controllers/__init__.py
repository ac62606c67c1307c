"""One module per controller; each exports ``CONTROLLER``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cgfs.controllers.bus_lock import CONTROLLER as BUS_LOCK
from cgfs.controllers.encryption_ids import CONTROLLER as ENCRYPTION_IDS
from cgfs.controllers.misc import CONTROLLER as MISC

if TYPE_CHECKING:
    from cgfs.core.css import Controller

# The order of this table is the order in which cgroup.controllers and cgroup.stat print.
CONTROLLERS: dict[str, type[Controller]] = {
    controller.name: controller for controller in (ENCRYPTION_IDS, MISC, BUS_LOCK)
}
