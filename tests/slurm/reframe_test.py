#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: reframe_test.py REFRAME REFRAME_TESTS ANNULUS

Runs the tests that sites run by ReFrame on two ranks of this machine: with ANNULUS they pass and have figures, with a program that fails
they fail. REFRAME is where scripts/test installs it; without it that of PATH is taken, or the test is skipped.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

REFRAME, TESTS, ANNULUS = (os.path.abspath(path) for path in sys.argv[1:])
SKIPPED = 77  # as every test here says it

SITE = """site_configuration = {
    "systems": [{"name": "here", "hostnames": [".*"],
                 "partitions": [{"name": "cpu", "scheduler": "local", "launcher": "mpirun", "environs": ["builtin"]}]}],
    "environments": [{"name": "builtin", "cc": "cc", "cxx": "", "ftn": ""}],
}
"""
FAULTY = """#!/bin/sh
echo 'FAIL binding'
echo 'FAIL configured problem'
exit 1
"""


def skip(reason):
    print(f"skipped: {reason}")
    sys.exit(SKIPPED)


def run(reframe, folder, program):
    """ReFrame's exit code, what it printed, and figures by name."""
    environment = dict(os.environ)
    # ReFrame keeps a history at home. What MPI needs is what scripts/launch says: in containers a test may be called root, which mpirun
    # refuses, and processes may not read each other's memory.
    environment.update(HOME=folder, TMPDIR=folder, PYTHONDONTWRITEBYTECODE="1", CUDA_VISIBLE_DEVICES="", OMPI_ALLOW_RUN_AS_ROOT="1",
                       OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMPI_MCA_btl_vader_single_copy_mechanism="none",
                       OMPI_MCA_mpi_yield_when_idle="1")
    command = [reframe, "--nocolor", "-C", os.path.join(folder, "site.py"), "-c", TESTS, "--prefix", folder, "--exec-policy=serial",
               "-S", f"program={program}", "-S", "OutputIsRight.seq_len=2048", "-S", "RateIsMeasured.seq_len=1024",
               "-S", "RateIsMeasured.repetitions=3", "-r"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    text = done.stdout + done.stderr
    return done.returncode, text, {name: float(value) for name, value in re.findall(r"^P: (\w+): ([\d.e+-]+) ", text, re.MULTILINE)}


def main():
    reframe = REFRAME if os.access(REFRAME, os.X_OK) else shutil.which("reframe")
    if not reframe:
        skip("ReFrame is not installed (scripts/test installs it from PyPI)")
    if len(os.sched_getaffinity(0)) < 2:
        skip("two ranks need two CPUs")
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "site.py"), "w", encoding="utf-8") as file:
            file.write(SITE)
        faulty = os.path.join(folder, "faulty")
        with open(faulty, "w", encoding="utf-8") as file:
            file.write(FAULTY)
        os.chmod(faulty, 0o755)

        code, text, figures = run(reframe, folder, ANNULUS)
        assert code == 0, text
        assert re.search(r"Ran 3/3 test case", text), text
        assert set(figures) == {"fastest_transport", "error", "tflops_per_rank", "exposed_communication"}, text
        assert figures["fastest_transport"] > 0 and figures["tflops_per_rank"] > 0, text

        code, text, _ = run(reframe, folder, faulty)
        assert code != 0, text
        assert re.search(r"\b3 failure", text), text
    print("ReFrame's verdicts are those of the program")


main()
