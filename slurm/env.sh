# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What is particular to this site. Every batch script here reads this file first, on the first node of the job; what is set in the
# environment of sbatch comes before it. Edit it once.

# Modules that the program was built with.
#module load gcc/13 cuda/13.0 openmpi/5.0 nccl/2.28 hdf5/1.14

# The program. By default build/cuda-release, then build/cpu-release, of the folder that the job was submitted from, then PATH.
#ANNULUS=${ANNULUS:-/opt/annulus/bin/annulus}

# srun or mpirun. By default srun where Slurm offers PMIx, else mpirun.
#LAUNCHER=${LAUNCHER:-srun}

# How often a job that was stopped with work left puts itself into the queue again.
ANNULUS_RESTARTS=${ANNULUS_RESTARTS:-20}

# Networks, if the defaults are not right.
#export NCCL_SOCKET_IFNAME=ib0
#export UCX_TLS=rc,sm,self,cuda_copy,cuda_ipc
