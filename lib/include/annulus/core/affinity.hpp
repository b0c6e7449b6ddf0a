// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace annulus {

/// A set of CPUs: CPU i is bit i mod 64 of word i / 64. As long as the kernel's own, whatever number of CPUs that is.
using CpuMask = std::vector<std::uint64_t>;

/// Asks the system for the CPUs a process may use, into `mask` of `bytes` bytes; 0 or the error, which is EINVAL where the mask is shorter
/// than the kernel's.
using AskAffinity = std::function<int(std::size_t bytes, void* mask)>;

/// The CPUs that this process may use. `ask` stands in for the system in tests.
/// @throws RuntimeFailure with the system's reason if it does not say
CpuMask allowed_cpus(const AskAffinity& ask = {});

std::int64_t count_of(const CpuMask& mask);
/// Whether the sets have a CPU in common; they may have different lengths.
bool overlap(const CpuMask& a, const CpuMask& b);

}  // namespace annulus
