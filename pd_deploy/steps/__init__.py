"""What a run does on hosts, one verb a module; each looks first and changes only what is wrong.

Here belong the session with its hosts, a rollout, and the steps that tasks make visible. Not here:
their order (`flows`), what follows from the file alone (`planning`), and how a host is reached
(`hosts`).
"""
