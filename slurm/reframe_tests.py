# SPDX-License-Identifier: Apache-2.0
"""Regression tests of annulus for ReFrame 4 (pip install reframe-hpc), as sites run them after every change of drivers, MPI or network.

    reframe -C site.py -c slurm/reframe_tests.py -S program=$PWD/build/cuda-release/app/annulus -S backend=cuda -S ranks=8 -r

`site.py` is the site's own configuration, which knows partitions and launchers. A test takes `ranks` ranks, at least two, all on one node
unless `ranks_per_node` says otherwise, and with backend cuda a GPU for each. What is measured is reported (--performance-report), and
compared where the site gives references (`-S RateIsMeasured.reference=...` or a class of its own that inherits).
"""

import csv
import os

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import performance_function, run_before, sanity_function, variable


class Annulus(rfm.RunOnlyRegressionTest):
    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    program = variable(str, value="annulus")
    backend = variable(str, value="cpu")
    ranks = variable(int, value=2)
    ranks_per_node = variable(int, value=0)

    @run_before("run")
    def take_ranks(self):
        self.executable = self.program
        self.num_tasks = self.ranks
        self.num_tasks_per_node = self.ranks_per_node or self.ranks
        if self.backend == "cuda":
            self.num_gpus_per_node = self.num_tasks_per_node


@rfm.simple_test
class MachineIsFit(Annulus):
    """MPI, CPUs, GPUs, and messages over every transport that connects the ranks."""

    executable_opts = ["info", "--check"]

    @sanity_function
    def is_fit(self):
        return sn.and_(sn.assert_found(r"^PASS the machine is fit$", self.stdout), sn.assert_not_found(r"^FAIL", self.stdout))

    @performance_function("GB/s")
    def fastest_transport(self):
        return sn.max(sn.extractall(r"^passed +transport \w+ +([\d.]+) GB/s", self.stdout, 1, float))


@rfm.simple_test
class OutputIsRight(Annulus):
    """The LongNet pattern against the fp64 oracle, causal."""

    seq_len = variable(int, value=16384)

    @run_before("run")
    def check_longnet(self):
        self.executable_opts = ["check", "--preset", "longnet-bench", "--causal", "--seq-len", str(self.seq_len), "--backend", self.backend]

    @sanity_function
    def passes(self):
        return sn.and_(sn.assert_found(r"^PASS configured problem", self.stdout), sn.assert_not_found(r"^FAIL", self.stdout))

    @performance_function("x plain")
    def error(self):
        return sn.extractsingle(r"([\d.]+) x plain\)", self.stdout, 1, float)


@rfm.simple_test
class RateIsMeasured(Annulus):
    """A dense row of `bench`, which proves its output before it times it."""

    seq_len = variable(int, value=8192)
    repetitions = variable(int, value=10)

    @run_before("run")
    def bench_dense(self):
        self.executable_opts = ["bench", "--seq-len", str(self.seq_len), "--heads", "8", "--head-dim", "64", "--backend", self.backend,
                                "--repetitions", str(self.repetitions), "--csv", "row.csv"]  # fmt: skip

    @sanity_function
    def is_measured(self):
        return sn.assert_found(r"^# wrote row\.csv$", self.stdout)

    def figure(self, name):
        with open(os.path.join(self.stagedir, "row.csv"), encoding="utf-8") as file:
            return float(next(csv.DictReader(file))[name])

    @performance_function("TFLOP/s")
    def tflops_per_rank(self):
        return self.figure("tflops_per_rank")

    @performance_function("ms")
    def exposed_communication(self):
        return self.figure("exposed_ms")
