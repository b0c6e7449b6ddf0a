// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/attention/attention_kernel.hpp>
#include <annulus/device/device.hpp>
#include <annulus/kernels/tasks.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace annulus {

/// What a kernel that takes tasks does in a backward pass; rules as TaskOperations.
class GradientOperations {
 public:
  virtual ~GradientOperations() = default;
  /// Of what differentiate() takes at its first call, and keeps.
  virtual std::int64_t gradient_workspace_bytes(std::int64_t head_dim, DType dtype) const = 0;
  /// As the tasks say; several in the order given.
  virtual void begin_gradients(Queue& queue, const kernels::BeginGradientsTask& task) = 0;
  virtual void differentiate(Queue& queue, std::span<const kernels::GradientTask> tasks) = 0;
  virtual void clear(Queue& queue, std::span<const kernels::ClearTask> tasks) = 0;
  virtual void add(Queue& queue, std::span<const kernels::AddTask> tasks) = 0;
  virtual void round(Queue& queue, std::span<const kernels::RoundTask> tasks) = 0;
};

/// The operations of a kernel that takes tasks of addresses, extents and strides: reference, cpu and cublas. Each is enqueued on a queue of
/// the device that it was made for and may still be in flight at return; operations of one queue run in order. Tasks are read before the
/// call returns, the memory that they name stays in use until the queue has passed.
/// Where the device is the host, operations are done when they return, and a task that they cannot take is an InvalidArgument.
class TaskOperations {
 public:
  virtual ~TaskOperations() = default;
  /// As AttentionKernel's.
  virtual std::string describe() const = 0;
  virtual bool rounds_probabilities(DType /*dtype*/) const { return false; }
  virtual std::int64_t workspace_bytes(std::int64_t head_dim, DType dtype) const = 0;
  /// Size of one number of a running partial: 4 (fp32) or 8 (fp64).
  virtual std::int64_t accumulator_bytes() const = 0;

  /// Sets a partial of `rows` (batch, head, row) triples to the identity: acc 0, max -inf, sum 0.
  virtual void fill_identity(Queue& queue, const kernels::PartialPointers& partial, std::int64_t rows, std::int64_t head_dim) = 0;
  /// As ZeroKeysTask says, task after task.
  virtual void add_zero_keys(Queue& queue, std::span<const kernels::ZeroKeysTask> tasks) = 0;
  /// As AttendTask says, in the order given where two tasks share rows. Takes workspace_bytes() of the device at its first call, and keeps
  /// them. @throws RuntimeFailure if they are not there
  virtual void attend(Queue& queue, std::span<const kernels::AttendTask> tasks) = 0;
  /// As FinishTask says.
  virtual void finish(Queue& queue, const kernels::FinishTask& task) = 0;

  /// The operations of a backward pass, or null where there are none.
  virtual GradientOperations* gradients() { return nullptr; }
};

/// Whether elements are those that tensor cores multiply with sums in fp32.
bool is_16_bit(DType dtype);

/// Those of the device's own kernel (backend cuda: of cublas). The device must outlive them.
/// @throws InvalidArgument if an option is out of range, RuntimeFailure if this CPU lacks the instructions or CUDA fails
std::unique_ptr<TaskOperations> make_task_operations(const KernelOptions& options, Device& device);

std::unique_ptr<TaskOperations> make_reference_operations(const KernelOptions& options);
std::unique_ptr<TaskOperations> make_cpu_operations(const KernelOptions& options, Device& device);
/// @throws NotCompiled in a build without CUDA
std::unique_ptr<TaskOperations> make_cublas_operations(const KernelOptions& options, Device& device);

}  // namespace annulus
