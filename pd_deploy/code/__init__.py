"""The user's own source tree: what of it is deployed, and what hosts lack of it.

Here belongs what is known without a host: reading the tree where pd-deploy runs, its digest, the
archives that are sent. What is done on hosts belongs into `pd_deploy.steps.own_code`.
"""
