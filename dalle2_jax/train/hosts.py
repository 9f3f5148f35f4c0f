"""Several hosts: how they connect, and how one of them decides for all."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from dalle2_jax.errors import UserError

_MESSAGE_BYTES = 2048  # of JSON from process 0: every host must know the size beforehand
_COMPILING_SECONDS = 3600  # as long as the watchdog gives the first step
_meetings = itertools.count()  # a barrier's name serves once; all hosts count alike
# What a TPU's own environment says of a slice: its hosts, or several slices.
_TPU_HOSTS, _TPU_SLICES = "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"


class HostsMissing(UserError):
    """Not all hosts came; they may next time."""

    exit_status = os.EX_TEMPFAIL


def connect(
    distributed: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_seconds: float = 600.0,
) -> None:
    """Joins the other hosts, before JAX looks for devices; does nothing on a single host.

    With the three values, by them; otherwise, if `distributed` is true or the environment names
    several TPU hosts, by what JAX finds (TPU, Slurm, Open MPI).

    Raises:
        UserError: a value is missing or wrong, or nothing is found.
        HostsMissing: not all hosts came within `wait_seconds`.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        slice_of_several = "," in os.environ.get(_TPU_HOSTS, "") or _TPU_SLICES in os.environ
        if not distributed and not slice_of_several:
            return
    elif missing:
        raise UserError(f"{' and '.join(missing)} missing: give {', '.join(given)} or none of them")
    else:
        _check(str(coordinator_address), int(num_processes or 0), int(process_id or 0))
        logging.info("waiting for %d processes at %s", num_processes, coordinator_address)
    failures: list[Exception] = []

    def join() -> None:
        try:  # its own patience would end in an abort
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                initialization_timeout=int(2 * wait_seconds) + 60,
            )
        except Exception as error:  # raised by the main thread: no host may go on alone
            failures.append(error)

    # in a thread, since the main one must hear Ctrl-C and SIGTERM meanwhile
    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    joining.join(wait_seconds)
    if joining.is_alive():
        at = coordinator_address or "the first host"
        raise HostsMissing(
            f"not all hosts met at {at} within --wait_seconds={wait_seconds:g}: is every process "
            "started, with one address and one number of processes, and is the port open?"
        )
    if failures and not isinstance(failures[0], RuntimeError | ValueError):
        raise failures[0]
    if failures:
        message = str(failures[0]).strip().splitlines()[0]
        raise UserError(
            f"cannot join the other hosts ({message}): except on a TPU slice, Slurm or Open MPI, "
            f"give {', '.join(given)}"
        ) from failures[0]


def _check(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator_address.rpartition(":")
    requirement = f"--coordinator_address={coordinator_address} must be HOST:PORT of process 0"
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(requirement)
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be from 0 to {num_processes - 1} "
            f"(--num_processes={num_processes})"
        )
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))  # jax.distributed would abort, and late
    except OSError as error:
        raise UserError(f"{requirement}: {host}: {error.strerror}") from error


def from_first(work: Callable[[], int]) -> int:
    """Runs `work` on process 0 and returns its result on every host.

    Every host calls it at the same place. A UserError or OSError of process 0 is raised on all, so
    that they take the same way and none waits for another that gave up.
    """
    if jax.process_count() == 1:
        return work()
    from jax.experimental import multihost_utils

    # A broadcast takes arrays of one shape on all hosts, so the text lies in zeros: [2048].
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            message: dict[str, int | str] = {"value": work()}
        except (UserError, OSError) as error:
            # JSON may write a character in several bytes, as \u00e9.
            failure, message = error, {"error": str(error)[: _MESSAGE_BYTES // 8]}
        text = json.dumps(message).encode()
        buffer[: len(text)] = np.frombuffer(text, np.uint8)
    # The broadcast is a sum over hosts, of which all but one give zeros; in some versions of JAX
    # the sum widens the dtype.
    heard = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8)
    if failure:  # raised only now, as the other hosts wait in the broadcast
        raise failure
    answer = json.loads(heard.tobytes().rstrip(b"\0"))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def compile_together(step: Any, *args: Any) -> None:
    """Compiles the jitted `step` and waits until every host has; does nothing on a single host.

    Every host calls it at the same place, before it calls `step`. On CPUs a program's collectives
    wait only 30 seconds for another process (Gloo), and compiling may take one host longer than
    another by more.
    """
    if jax.process_count() == 1:
        return
    import orbax.checkpoint as ocp  # late: mistakes in the flags are reported at once

    step.lower(*args).compile()  # `step` itself then finds the program in JAX's cache
    everyone = set(range(jax.process_count()))  # without them Orbax meets in a collective, too
    name = f"compiled_{next(_meetings)}"
    ocp.multihost.sync_global_processes(name, processes=everyone, timeout=_COMPILING_SECONDS)
