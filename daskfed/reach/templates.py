"""Profiles to begin with, one for each kind of site."""

from __future__ import annotations

HEAD = """\
# Put this into ~/.config/dask/daskfed.yaml, change what is in capitals, and try it: daskfed profile check
daskfed:
  default-profile: mine
  profiles:
    mine:
      hub: embedded                  # or the address of one that runs: zmq://hub.example.org:8700
"""
SITES = """\
      sites:
        laptop:                      # a LocalCluster on this machine
          scale: {minimum: 0, maximum: 4}
"""
REMOTE = """\
          reach: ssh://USER@LOGIN.EXAMPLE.EDU     # leave it out where the batch system is on this machine
          python: ~/VENV/bin/python               # which has daskfed and dask-jobqueue there; or: install: true
"""
SCALE = """\
          scale: {minimum: 0, maximum: 40, idle-timeout: 5m}    # jobs, as work needs them
"""
BATCH = {  # kind: class, and the options that nearly everybody needs
    "slurm": ("SLURMCluster", 'queue: PARTITION, account: ACCOUNT, cores: 32, memory: 120GiB, walltime: "02:00:00"'),
    "pbs": (
        "PBSCluster",
        'queue: QUEUE, account: PROJECT, cores: 36, memory: 100GiB, resource_spec: "select=1:ncpus=36:mem=100GB", '
        'walltime: "02:00:00"',
    ),
    "sge": (
        "SGECluster",
        'queue: QUEUE, project: PROJECT, cores: 8, memory: 32GiB, resource_spec: "h_vmem=4G", walltime: "02:00:00"',
    ),
    "lsf": ("LSFCluster", 'queue: QUEUE, project: PROJECT, cores: 16, memory: 64GiB, walltime: "02:00"'),
    "htcondor": ("HTCondorCluster", "cores: 8, memory: 16GiB, disk: 20GiB"),
    "oar": ("OARCluster", 'queue: QUEUE, project: PROJECT, cores: 16, memory: 64GiB, walltime: "02:00:00"'),
}
WAITING = """\
      listen: zmq://0.0.0.0:8700     # where sites dial in
      contact: zmq://MY.HOST:8700    # the same, as they see it
      sites:
        cloud:
          reach: waiting             # daskfed up prints the command to run there
          scale: {minimum: 0, maximum: 16}
"""


def _batch(kind: str) -> str:
    cluster, options = BATCH[kind]
    lines = f"          cluster: dask_jobqueue.{cluster}\n          options: {{{options}}}\n"
    return HEAD + SITES + "        campus:\n" + REMOTE + lines + SCALE


TEMPLATES = {
    "local": HEAD + SITES,
    **{kind: _batch(kind) for kind in BATCH},
    "ssh": HEAD + SITES + "        office:\n" + REMOTE + "          scale: {minimum: 0, maximum: 16}\n",
    "waiting": HEAD + WAITING,
}
