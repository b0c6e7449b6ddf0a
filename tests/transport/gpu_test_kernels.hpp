// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace annulus::test {

/// Byte `index` of the pattern that `seed` names is a hash of both, so a byte out of place or of another message is seen.
void fill_pattern(cudaStream_t stream, std::byte* data, std::int64_t bytes, std::uint64_t seed);

/// Adds to *wrong (device memory) the number of bytes that differ from the pattern.
void count_wrong_bytes(cudaStream_t stream, const std::byte* data, std::int64_t bytes, std::uint64_t seed, unsigned long long* wrong);

/// Keeps the stream busy for that long by the clock on the wall.
void keep_busy(cudaStream_t stream, std::int64_t microseconds);

}  // namespace annulus::test
