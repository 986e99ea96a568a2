"""Prefect blocks that hold secrets, and logging in to hosts with them."""
