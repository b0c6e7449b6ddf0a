// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/io/source.hpp>

#include <cstdint>
#include <optional>
#include <string>

namespace annulus {

/// What examine_input() waits for, counted anew whenever the examination comes a step further.
struct ExamineLimits {
  int cpu_s = 5;       ///< of computing: HDF5 runs in circles
  int silent_s = 120;  ///< of anything: the file system does not answer
};

/// Opens an HDF5 input in a process of its own, which ends before this returns, and refuses it if that process crashes, does not come to an
/// end, or refuses it: HDF5 itself crashes or runs for ever on some damaged files, and one that brought down a short-lived process is never
/// opened by this one.
///
/// It does what reading will do: opens the file with all its parts, reads its attribute, looks up every chunk and asks every filter, as
/// open_input() does, and reads values of all datasets: all of a small file, up to 32 MiB of a large one, spread over it. What a
/// large file's other chunks do to their filters is only met by reading them.
///
/// Forks: to be called before MPI starts and while this process has one thread that holds locks.
/// @throws InvalidArgument if the input cannot be used, RuntimeFailure if the disk fails or no process can be started
void examine_input(const std::string& path, InputUse use = InputUse::forward, const ExamineLimits& limits = {});

/// The same of the input of a layer, as open_layer_input() opens it.
void examine_layer_input(const std::string& path, std::optional<std::int64_t> heads, const ExamineLimits& limits = {});

}  // namespace annulus
