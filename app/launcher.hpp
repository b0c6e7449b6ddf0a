// SPDX-License-Identifier: Apache-2.0
// What a process knows of the launcher that started it, before MPI.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace annulus::app {

/// Whether a launcher started this process, so that MPI must be entered. Without one MPI is not touched: inside a batch script it would
/// abort.
bool under_launcher();

/// The rank that the launcher gave this process; 0 without one.
std::int64_t launched_rank();

/// Whether this rank is the first of its host, by what the launcher says; where it says nothing, every rank is.
bool first_on_host();

/// Tasks of the Slurm step this process belongs to; 1 outside one.
std::int64_t slurm_tasks();

/// Tells, for as long as MPI_Init waits for all processes of a job, whether one of this host has ended instead: it was told to do something
/// else. Knows it of launchers that say how many they started here and are this process's parent.
class Siblings {
 public:
  /// A sentence, once processes have been missing for a few seconds.
  std::optional<std::string> missing();

 private:
  int asked_ = 0;  ///< times in a row that they were
};

}  // namespace annulus::app
