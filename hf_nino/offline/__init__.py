"""Nowcasts from checkpoints that a run has saved, without the run."""

from __future__ import annotations

from .nowcast import OfflineNowcast, nowcast_checkpoints

__all__ = ["OfflineNowcast", "nowcast_checkpoints"]
