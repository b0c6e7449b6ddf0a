// SPDX-License-Identifier: Apache-2.0
#include "task_operations.hpp"

namespace annulus {

bool is_16_bit(DType dtype) {
  switch (dtype) {
    case DType::fp16:
    case DType::bf16:
      return true;
    case DType::fp32:
      break;
  }
  return false;
}

std::unique_ptr<TaskOperations> make_task_operations(const KernelOptions& options, Device& device) {
  switch (device.kind()) {
    case BackendKind::reference:
      return make_reference_operations(options);
    case BackendKind::cuda:
      return make_cublas_operations(options, device);
    case BackendKind::cpu:
      break;
  }
  return make_cpu_operations(options, device);
}

}  // namespace annulus
