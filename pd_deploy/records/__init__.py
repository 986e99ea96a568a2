"""What was deployed and what became of it: generations, releases, their record. Pure.

Here belong the documents that lie on the hosts, and what follows from them. Not here: reading and
writing them (`steps.host_records`, `steps.promotion`).
"""
