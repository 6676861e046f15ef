"""Tuning: which configuration of each kernel template is fastest on a device, found by measuring."""
