"""From a deployment and what the hosts said to a plan. Pure: no I/O, no clock.

Here belong placement (pods, ranks, ports), the rules, the plan, what a run would change, and the
plan as `docker` commands. Not here: what an engine's containers hold (`engines`), and doing any of
it (`steps`).
"""
