"""A Ray cluster for the time of one run: one that is there, or one of our own on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator

from hiedit.runconfig import DistributionConfig


@contextlib.contextmanager
def session(config: DistributionConfig) -> Iterator[None]:
    """Connect Ray for the block. One that was connected before is used and left as it is; one that
    was started here is stopped at the end, and no process of it remains.

    Raises:
        ValueError: if there is no cluster at ``config.address``, or it lacks the CPUs or GPUs that
            the workers ask for.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:  # Ray's own name for "listen on 127.0.0.1 alone", read when it is imported
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 starves them beside anything else
    import ray

    if ray.is_initialized():
        _check(config)
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": True}
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    if address:
        try:
            ray.init(address, **quiet)
        except ConnectionError as error:
            what = " ".join(str(error).split())[:200]
            raise ValueError(
                f"distribution.address={address!r}: no Ray cluster answers there ({what})"
            ) from None
    else:
        ray.init(
            "local",
            num_cpus=math.ceil(config.processes * config.num_cpus),
            include_dashboard=False,
            **quiet,
        )
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts its own in their place
            if handler not in (signal.SIG_DFL, None):
                signal.signal(number, handler)
    try:
        _check(config)
        yield
    finally:
        ray.shutdown()


def _check(config: DistributionConfig) -> None:
    """Waiting for resources that no node has would be waiting for ever."""
    import ray

    has = ray.cluster_resources()
    for resource, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        wanted = config.processes * getattr(config, key)
        wanted += config.learner_gpus if resource == "GPU" else 0
        if wanted > has.get(resource, 0.0):
            ranks = f" of {config.ranks_per_worker} ranks" if config.grouped else ""
            raise ValueError(
                f"distribution.workers={config.workers}{ranks} with {key}={getattr(config, key)} "
                f"each need {wanted:g} {resource}: the cluster has {has.get(resource, 0.0):g}"
            )
