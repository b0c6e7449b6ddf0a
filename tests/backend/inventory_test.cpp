// SPDX-License-Identifier: Apache-2.0
#include <annulus/backend/backend.hpp>
#include <annulus/backend/cuda_devices.hpp>
#include <annulus/backend/kernel_table.hpp>
#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>
#include <annulus/core/problem.hpp>
#include <annulus_test.hpp>

#include <algorithm>

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
        (build_info().cuda.empty() ? 0 : 1));
  for (const auto& [kind, name] : EnumNames<BackendKind>::values) {
    INFO(name);
    const auto entry = std::find_if(table.begin(), table.end(), [kind = kind](const KernelInfo& k) { return k.backend == kind; });
    BackendOptions options;
    options.kind = kind;
    if (entry != table.end() && entry->obstacle.empty()) {
      CHECK(make_backend(options)->kind() == kind);
    } else {
      CHECK_THROWS_AS(make_backend(options), Error);
    }
  }
}

TEST_CASE("every kernel takes every dtype and head dim of the program, and its fast head dims are among them") {
  for (const KernelInfo& kernel : kernel_table()) {
    INFO(to_string(kernel.backend) << " " << kernel.kernel);
    for (const auto& [dtype, name] : EnumNames<DType>::values) {
      CHECK(std::count(kernel.dtypes.begin(), kernel.dtypes.end(), dtype) == 1);
    }
    CHECK(kernel.largest_head_dim == kMaxHeadDim);
    CHECK(kernel.fast_head_dims.empty() == (kernel.fast != FastHeadDims::listed));
    for (const std::int64_t head_dim : kernel.fast_head_dims) { CHECK((head_dim >= 1 && head_dim <= kernel.largest_head_dim)); }
    CHECK_FALSE(kernel.products.empty());
  }
}

}  // namespace
