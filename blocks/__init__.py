"""Secrets, as Prefect blocks."""
