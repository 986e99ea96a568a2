#!/bin/bash
# Wrapper: the real script lies with the proxy's sources (contract 5.1).
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec bash "$here/../../omni/accelerators/sched/global_proxy/global_proxy.sh" "$@"
