// SPDX-License-Identifier: Apache-2.0
// The kernels of backend cuda. Everything is enqueued and in flight at return; memory handed over stays in use until the stream has passed
// it. All memory is device memory of the current device, on which the stream was made. Partials are fp32.
#pragma once

#include <annulus/kernels/tasks.hpp>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

struct CUstream_st;

namespace annulus::kernels::cuda {

/// A CUDA or cuBLAS call failed; what() holds the call, the place and the library's message. CUDA's last-error slot is clear again.
class LibraryError : public std::runtime_error {
 public:
  explicit LibraryError(const std::string& message) : std::runtime_error(message) {}
};

/// Whether this binary holds machine code for the current device. Never throws; false without a device.
bool built_for_current_device() noexcept;

/// Sets acc [rows, head_dim] to 0, max [rows] to -inf and sum [rows] to 0; all contiguous.
/// @throws LibraryError if the launch fails
void fill_identity(const PartialPointers& partial, std::int64_t rows, std::int64_t head_dim, CUstream_st* stream);

/// As ZeroKeysTask says, fp32.
/// @throws LibraryError if the launch fails
void add_zero_keys(const ZeroKeysTask& task, CUstream_st* stream);

/// As PackTask says, for all tasks, in no order: no task's dst may alias the src or dst of another. 16 bytes at a time where addresses and
/// strides allow it; up to 32 tasks share a launch, as a short one takes longer to start than to run.
/// @throws LibraryError if a launch fails
void pack(std::span<const PackTask> tasks, CUstream_st* stream);

/// As FinishTask says; sums and logarithms in fp32.
/// @throws LibraryError if the launch fails
void finish(const FinishTask& task, CUstream_st* stream);

/// As BeginGradientsTask, ClearTask, AddTask and RoundTask say, fp32.
/// @throws LibraryError if a launch fails, std::invalid_argument if a RoundTask is of fp64
void begin_gradients(const BeginGradientsTask& task, CUstream_st* stream);
void clear(const ClearTask& task, CUstream_st* stream);
void add(const AddTask& task, CUstream_st* stream);
void round(const RoundTask& task, CUstream_st* stream);

}  // namespace annulus::kernels::cuda
