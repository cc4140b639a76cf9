"""Heartbeats to ft_launcher, the launcher of NVIDIA's resiliency extension, which restarts a run whose ranks go silent.

Under torchrun, or without the package, nothing is sent. How long a silence is a failure the launcher's own flags say
(--ft-rank-heartbeat-timeout, --ft-initial-rank-heartbeat-timeout).
"""

import os
from typing import Any

#: Set by ft_launcher for each rank.
_MONITOR_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


class Heartbeat:
    """One rank's connection to its monitor, if it has one."""

    def __init__(self) -> None:
        self._client: Any = None
        if _MONITOR_SOCKET in os.environ:
            from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient  # type: ignore[import-not-found]

            self._client = RankMonitorClient()
            self._client.init_workload_monitoring()

    def beat(self) -> None:
        """Say that this rank gets on."""
        if self._client:
            self._client.send_heartbeat()

    def stop(self) -> None:
        """No more heartbeats will come, and that is all right."""
        if self._client:
            self._client.shutdown_workload_monitoring()
            self._client = None
