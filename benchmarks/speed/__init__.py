"""Headwater beside its peers: each contestant in a fresh process, measured by the same meter. Started by benchmarks/run.py."""
