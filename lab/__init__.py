"""Simulated hosts on this machine, each with a real SSH server and a real Docker engine.

A lab is a switch (which also runs the registry) and the hosts ``a``, ``b``, … Each of them is
one set of Linux namespaces with its own root file system. None of them touches the machine's own
SSH server, Docker engine, firewall, or files outside the lab's two directories.
"""

from pd_deploy.lab.errors import LabError
from pd_deploy.lab.host import LabHost
from pd_deploy.lab.lifecycle import Lab

__all__ = ["Lab", "LabError", "LabHost"]
