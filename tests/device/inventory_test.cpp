// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/attention_kernel.hpp>
#include <annulus/attention/kernel_table.hpp>
#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>
#include <annulus/core/problem.hpp>
#include <annulus/device/device.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <memory>
#include <set>

namespace {

using namespace annulus;

TEST_CASE("a process sees GPUs or is told why not, and every pair of them has a link each way") {
  const std::vector<GpuInfo> gpus = visible_gpus();
  const std::string obstacle = gpu_obstacle();
  INFO(obstacle);

  CHECK(gpus.empty() == !obstacle.empty());
  if (build_info().cuda.empty()) { CHECK(obstacle == "this binary is built without CUDA"); }
  const std::vector<GpuLink> links = gpu_links();
  CHECK(links.size() == (gpus.empty() ? 0 : gpus.size() * (gpus.size() - 1)));
  for (const GpuLink& link : links) {
    CHECK(link.from != link.to);
    CHECK(std::max(link.from, link.to) < std::ssize(gpus));
  }
}

TEST_CASE("the table of kernels agrees with the backends that can be made") {
  const std::vector<KernelInfo> table = kernel_table();

  CHECK(std::count_if(table.begin(), table.end(), [](const KernelInfo& k) { return k.backend == BackendKind::cuda; }) ==
        (build_info().cuda.empty() ? 0 : 2));
  for (const auto& [kind, name] : EnumNames<BackendKind>::values) {
    INFO(name);
    const auto entry = std::find_if(table.begin(), table.end(), [kind = kind](const KernelInfo& k) { return k.backend == kind; });
    DeviceOptions options;
    options.kind = kind;
    const auto make = [&options, kind = kind] {
      const std::unique_ptr<Device> backend = make_device(options);
      CHECK(backend->kind() == kind);
      make_attention_kernel({}, *backend);
    };
    if (entry != table.end() && entry->obstacle.empty()) {
      CHECK_NOTHROW(make());
    } else {
      CHECK_THROWS_AS(make(), Error);
    }
  }
}

TEST_CASE("every backend has a kernel for every dtype and head dim of the program, and fast head dims are among a kernel's") {
  std::set<BackendKind> complete;
  std::set<BackendKind> backends;
  for (const KernelInfo& kernel : kernel_table()) {
    INFO(to_string(kernel.backend) << " " << kernel.kernel);
    backends.insert(kernel.backend);
    const bool all_dtypes = std::all_of(EnumNames<DType>::values.begin(), EnumNames<DType>::values.end(), [&](const auto& entry) {
      return std::count(kernel.dtypes.begin(), kernel.dtypes.end(), entry.first) == 1;
    });
    if (all_dtypes && kernel.head_dim_step == 1 && kernel.largest_head_dim == kMaxHeadDim) { complete.insert(kernel.backend); }
    CHECK(kernel.fast_head_dims.empty() == (kernel.fast != FastHeadDims::listed));
    for (const std::int64_t head_dim : kernel.fast_head_dims) {
      CHECK((head_dim >= 1 && head_dim <= kernel.largest_head_dim && head_dim % kernel.head_dim_step == 0));
    }
    CHECK_FALSE(kernel.products.empty());
  }
  CHECK(complete == backends);
}

}  // namespace
