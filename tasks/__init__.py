"""The steps of a run as the UI shows them: their names, and the functions that do the work.

Here belongs a line for each step. What a step does belongs into `pd_deploy.steps`; what all steps
have in common, such as retries, into `step.py`; what takes more than one
call of them, into `composed.py`.
"""

from pd_deploy.steps import (
    adopting,
    containers,
    full_preflight,
    own_code,
    preflight,
    promotion,
    surveying,
    tidy,
    waiting_room,
)
from pd_deploy.steps.verify import adopted, smoke
from pd_deploy.steps.verify import benchmark as load
from pd_deploy.tasks import composed
from pd_deploy.tasks.step import TO_ITS_END, pure, step

LOOK_S = 15
"""How long hosts are still looked at when another has failed: so all that is wrong is told."""

# Look at the hosts, and plan
connect = step("connect {name}", grace=LOOK_S)(surveying.connect)
lock = step("lock")(composed.lock)
survey = step("survey {name}", grace=LOOK_S)(surveying.survey)
read_code = step("read code")(own_code.read)
choose_image = step("choose image")(surveying.choose)
resolve_image = step("resolve image")(surveying.resolve_image)
identify_image = step("identify image")(composed.identify)
device_addresses = step("device addresses {name}", grace=LOOK_S)(surveying.device_addresses)
make_plan = step("plan")(pure(surveying.planned))
take_plan = step("saved plan")(pure(surveying.restored))

# While the old generation serves
check_host = step("preflight {name}", grace=LOOK_S)(preflight.preflight)
compare_hosts = step("compare hosts", grace=LOOK_S)(preflight.compare)
pull_image = step("pull image {name}")(composed.pull)
find_load_generator = step("find load generator")(load.find_generator)
bring_code = step("bring code {name}")(composed.bring_code)
save = step("save {name}")(promotion.save)
launch = step("launch {instance}")(containers.launch)
write_ranktables = step("ranktable {name}")(containers.write_ranktables)
prepare_proxy = step("prepare proxy {instance}")(containers.prepare_proxy)
prepare_waiting_room = step("prepare waiting room {instance}")(waiting_room.prepare)

# Preflight alone
inspect_host = step("inspect {name}")(full_preflight.inspect_host)
compare_all = step("compare hosts")(full_preflight.compare_all)
try_ports = step("try ports")(full_preflight.try_ports)
ping_devices = step("ping devices")(full_preflight.ping_devices)
check_plan = step("check plan")(full_preflight.check_plan)

# From the cut-over to the promotion
clean_up = step("clean up {instance}", grace=TO_ITS_END)(composed.clean_up)
until_free = step("free {name}")(preflight.until_free)
start_server = step("start server {instance}")(containers.start_server)
until_ready = step("ready {instance}")(composed.until_ready)
smoke_test = step("smoke test")(smoke.smoke_test)
benchmark = step("benchmark")(composed.benchmark)
open_proxy = step("open proxy {instance}")(composed.open_proxy)
promote = step("promote", grace=TO_ITS_END)(promotion.promote)

# Remove what is not needed any more
prune = step("prune {name}", grace=TO_ITS_END)(tidy.prune)
clear = step("clear {name}", grace=TO_ITS_END)(tidy.clear)
stop = step("stop {name}", grace=TO_ITS_END)(tidy.stop)

# A service that was started by other means, and taken over
stop_adopted = step("stop adopted", grace=TO_ITS_END)(adopting.stop_all)
start_again = step("start again {name}")(adopting.start)
ready_again = step("ready again {name}")(adopting.until_ready)
prove_adopted = step("prove adopted")(adopted.prove)
prune_adopted = step("prune adopted {name}", grace=TO_ITS_END)(adopting.remove)

# What joins the steps of many hosts; its name says what is so from there on
gate = step("{name}")(composed.gate)
