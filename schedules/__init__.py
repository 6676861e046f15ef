"""Schedules: kernels of each operator, by target."""
