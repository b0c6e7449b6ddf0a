// SPDX-License-Identifier: Apache-2.0
// Whether the machine under a job is what the program needs: what an administrator looks at before users come.
#pragma once

#include <annulus/core/affinity.hpp>
#include <annulus/core/enums.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/transport/ring_rate.hpp>

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace annulus {

/// What was found. `absent`: there is nothing here that could be looked at, which is no fault.
enum class Finding { passed, failed, absent };

std::string_view to_string(Finding finding);

/// One thing that was looked at.
struct MachineFact {
  std::string name;  ///< "binding"
  Finding finding = Finding::absent;
  std::string text;  ///< one sentence
};

/// What a rank has of its host.
struct RankView {
  std::string host;
  CpuMask cpus;                 ///< that it may use
  std::vector<GpuInfo> gpus;    ///< that it sees; only what visible_gpus() says of their properties
  std::string obstacle;         ///< why it sees none
  bool has_hidden_gpu = false;  ///< the host has one, and nobody asked to hide it
};

/// Whether ranks have as many CPUs as there are ranks, each its own or all of a host the same. @param views  by rank
MachineFact judge_binding(std::span<const RankView> views);
/// Whether each rank has a GPU of its own, and all are of one model.
MachineFact judge_gpus(std::span<const RankView> views);
/// Whether all GPUs may run at the same clocks and correct errors, or none does.
MachineFact judge_clocks(std::span<const RankView> views);

struct MachineCheck {
  std::vector<MachineFact> facts;
  struct Rate {
    TransportKind transport = TransportKind::mpi;
    RingRate rate;
  };
  std::vector<Rate> rates;  ///< of the transports that connect the ranks of this job

  bool passed() const;
};

/// Looks at the MPI library, the CPUs of the ranks, their GPUs and what reaches what, and passes messages over every transport that can
/// connect them, beside a copy within a rank's own memory. The same on all ranks. Collective.
/// @throws AgreedError if a device that is there cannot be used
MachineCheck check_machine(const Communicator& comm);

}  // namespace annulus
