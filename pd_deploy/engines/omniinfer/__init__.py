"""omni-infer on Ascend, and all that only it needs.

engine       what `Engine` wants said, by the modules below
contracts    what images of each age expect
launcher     start scripts and arguments of servers
environment  variables of containers and servers
kv           how they take part in KV transfer
proxy        global_proxy and omni_proxy
by_image     which of these an image follows, by what it says of itself
in_image     what is run in a container of it for that
image_age    how old an image is, by its tag
rules        what it demands of a service
corrections  what is done otherwise than upstream does it
ranktable    device addresses in, ranktables out
npu_smi      who uses which NPU
"""
