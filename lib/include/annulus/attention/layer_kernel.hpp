// SPDX-License-Identifier: Apache-2.0
// The seam to the arithmetic of a layer around its attention.
#pragma once

#include <annulus/device/device.hpp>
#include <annulus/kernels/layer.hpp>

#include <cstdint>
#include <memory>

namespace annulus {

/// The two operations of a layer, on memory of one device. Everything is enqueued on the queue that is given; memory handed over stays in
/// use until the queue has passed it.
class LayerKernel {
 public:
  virtual ~LayerKernel() = default;
  /// As LinearTask says; sums in fp32 at least.
  virtual void linear(Queue& queue, const kernels::LinearTask& task) = 0;
  /// As TransformTask says.
  virtual void transform(Queue& queue, const kernels::TransformTask& task) = 0;
};

/// Bytes that the kernel of a backend takes for itself.
std::int64_t layer_kernel_bytes(BackendKind backend, int threads);

/// The kernel of a backend, which must outlive it. `threads`: of the cpu backend.
/// @throws RuntimeFailure if the device refuses
std::unique_ptr<LayerKernel> make_layer_kernel(Device& device, int threads);

}  // namespace annulus
