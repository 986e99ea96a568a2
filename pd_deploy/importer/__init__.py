"""Reading the files of upstream's Ansible playbooks and of omni_cli into a deployment file.

What belongs here: bounded readers of those files (`documents`, `expressions`, `shell`), what they
describe (`source`, made by `inventory`, `playbook`, `roles` and `omni_cli`), the deployment file
that says the same (`writing`), and the comparison of both (`round_trip`). Nothing here runs
Ansible, a shell or a template, or connects to anything. What does not belong here: how pd-deploy
renders a service, which is the engines' business.
"""
