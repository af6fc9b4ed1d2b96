"""How long idle threads of OpenMP look for work before they sleep, decided before torch starts them.

By default libgomp's threads spin between two loops. Alone on a machine that saves a wake-up;
beside another process it takes the processor away from whoever has work. libgomp reads its environment when
it is loaded, with torch, so `import cpcl` sets it first.
"""

import os, sys

SPINS = "100"  # turns of its waiting loop; libgomp's own number where threads outnumber processors
ASKED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # whoever sets one of these has decided


def settle(env, modules):
    "Have idle threads sleep soon, unless `env` says otherwise. A line to tell the user if it is too late."
    if any(env.get(name) for name in ASKED):
        return ""
    env["GOMP_SPINCOUNT"] = SPINS  # processes that are started from here read it
    if "torch" not in modules:
        return ""
    return (
        "torch was imported before cpcl, so its idle threads spin and slow down whatever else runs here: "
        "import cpcl first, or set OMP_WAIT_POLICY=passive"
    )


_LATE = [settle(os.environ, sys.modules)]


def say_once():
    "The line of `settle` the first time it is asked for, then nothing."
    late, _LATE[0] = _LATE[0], ""
    return late
