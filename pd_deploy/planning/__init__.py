"""From a deployment and what the hosts said to a plan. Pure: no I/O, no clock.

Here belong placement (pods, ranks, ports), the rules, the plan, and what a run would change. Not
here: what an engine's containers hold (`engines`), and doing any of it (`steps`).
"""
