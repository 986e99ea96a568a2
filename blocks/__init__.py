"""Prefect blocks that hold secrets."""
