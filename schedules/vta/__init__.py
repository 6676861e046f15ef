"""Schedules of the VTA accelerator: tile-level operators (`ops`) and how they become instructions."""
