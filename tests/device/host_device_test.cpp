// SPDX-License-Identifier: Apache-2.0
// What only the host promises as a device, and its kernels.
#include <annulus/core/error.hpp>
#include <annulus/device/device.hpp>
#include <annulus/kernels/cpu.hpp>
#include <annulus_test.hpp>

#include "attention/task_operations.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <signal.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

namespace annulus {
namespace {

std::unique_ptr<Device> make(BackendKind kind, int threads = 1) {
  DeviceOptions options;
  options.kind = kind;
  options.threads = threads;
  return make_device(options);
}

std::unique_ptr<TaskOperations> make_operations(Device& backend, int threads = 1, std::int64_t tile_rows = 0) {
  KernelOptions options;
  options.threads = threads;
  options.tile_rows = tile_rows;
  return make_task_operations(options, backend);
}

/// Causal attention of `rows` rows, 2 heads over 1 KV head, head_dim 24: the bytes of acc, max and sum.
std::vector<float> attend(Device& backend, TaskOperations& operations, std::int64_t rows) {
  constexpr std::int64_t kHeadDim = 24;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto numbers = [&](std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) { value = normal(random); }
    return values;
  };
  const std::vector<float> q = numbers(rows * 2 * kHeadDim);
  const std::vector<float> k = numbers(rows * kHeadDim);
  const std::vector<float> v = numbers(rows * kHeadDim);
  std::vector<float> partial(static_cast<std::size_t>(rows * 2 * (kHeadDim + 2)));
  kernels::AttendTask task;
  task.mask = kernels::Mask::causal;
  task.batch = task.segments = task.kv_heads = 1;
  task.q_per_kv = 2;
  task.q_rows = task.k_rows = rows;
  task.head_dim = kHeadDim;
  task.scale = 0.2;
  task.q = q.data();
  task.k = k.data();
  task.v = v.data();
  task.acc = partial.data();
  task.max = partial.data() + rows * 2 * kHeadDim;
  task.sum = partial.data() + rows * 2 * (kHeadDim + 1);
  task.q_strides = task.acc_strides = {0, 0, 2 * kHeadDim, 0, kHeadDim};
  task.kv_strides.row = kHeadDim;
  task.stat_strides = {0, 0, 1, 0, rows};
  const std::unique_ptr<Queue> queue = backend.make_queue();
  operations.fill_identity(*queue, {task.acc, task.max, task.sum}, rows * 2, kHeadDim);
  operations.attend(*queue, {&task, 1});
  return partial;
}

/// The same on backend cpu.
std::vector<float> attend_on_cpu(int threads, std::int64_t tile_rows, std::int64_t rows) {
  const std::unique_ptr<Device> backend = make(BackendKind::cpu, threads);
  return attend(*backend, *make_operations(*backend, threads, tile_rows), rows);
}

TEST_CASE("the number of threads does not change a bit of the cpu backend's result", "[backend]") {
  const std::vector<float> one = attend_on_cpu(1, 0, 1111);

  for (const int threads : {2, 3, 7}) {
    const std::vector<float> several = attend_on_cpu(threads, 0, 1111);

    INFO("threads " << threads);
    CHECK(std::memcmp(one.data(), several.data(), one.size() * sizeof(float)) == 0);
  }
}

TEST_CASE("the cpu backend takes any number of tile rows", "[backend]") {
  const std::vector<float> expected = attend_on_cpu(2, 0, 333);

  for (const std::int64_t tile_rows : {1, 5, 64, 100, 1024}) {
    const std::vector<float> result = attend_on_cpu(2, tile_rows, 333);

    double largest = 0.0;
    for (std::size_t i = 0; i < result.size(); ++i) { largest = std::max(largest, std::abs(static_cast<double>(result[i] - expected[i]))); }
    INFO("tile_rows " << tile_rows);
    CHECK(largest <= 1e-4);  // of sums up to some hundreds
  }
}

TEST_CASE("the cpu backend's workspace is exactly what it predicts and is counted once", "[backend]") {
  const std::unique_ptr<Device> backend = make(BackendKind::cpu, 2);
  const std::unique_ptr<TaskOperations> operations = make_operations(*backend, 2);
  REQUIRE(backend->memory().in_use == 0);

  attend(*backend, *operations, 100);
  attend(*backend, *operations, 200);

  CHECK(backend->memory().in_use == operations->workspace_bytes(24, DType::fp32));
  CHECK(backend->memory().high_water == operations->workspace_bytes(24, DType::fp32));
}

TEST_CASE("host memory is aligned to cache lines, and to huge pages where it is large", "[backend]") {
  const std::unique_ptr<Device> backend = make(BackendKind::cpu);

  const Buffer small = backend->allocate(1, MemoryUse::tensor);
  const Buffer large = backend->allocate((std::int64_t{2} << 20) + 1, MemoryUse::slot);
  const Buffer none = backend->allocate(0, MemoryUse::tensor);

  CHECK(reinterpret_cast<std::uintptr_t>(small.get()) % 64 == 0);
  CHECK(reinterpret_cast<std::uintptr_t>(large.get()) % (std::uintptr_t{2} << 20) == 0);
  CHECK_FALSE(none);
  CHECK(backend->available_bytes() > 0);
}

TEST_CASE("a moved buffer frees its memory once", "[backend]") {
  const std::unique_ptr<Device> backend = make(BackendKind::reference);
  Buffer first = backend->allocate(100, MemoryUse::tensor);
  Buffer second = backend->allocate(200, MemoryUse::tensor);

  second = std::move(first);
  CHECK(backend->memory().in_use == 100);
  second.reset();
  second.reset();

  CHECK(backend->memory().in_use == 0);
  CHECK_FALSE(second);
}

TEST_CASE("the cpu backend says what it runs on", "[backend]") {
  const std::unique_ptr<Device> backend = make(BackendKind::cpu);
  const std::string text = make_operations(*backend, 3)->describe();

  CHECK(text.find("3 threads") != std::string::npos);
  CHECK(text.find("AVX") != std::string::npos);
  CHECK((text.find("LIBXSMM") != std::string::npos || text.find("OpenBLAS") != std::string::npos));
}

TEST_CASE("host backends refuse what they cannot do", "[backend]") {
  CHECK_THROWS_AS(make(BackendKind::cpu, 0), InvalidArgument);
  const std::unique_ptr<Device> backend = make(BackendKind::cpu);
  CHECK_THROWS_AS(make_operations(*backend, 0), InvalidArgument);
  CHECK_THROWS_AS(make_operations(*backend, 1, -1), InvalidArgument);
  CHECK_THROWS_AS(make_operations(*backend, 1, 1025), InvalidArgument);
  const std::unique_ptr<TaskOperations> operations = make_operations(*backend);
  const std::unique_ptr<Queue> queue = backend->make_queue();
  kernels::AttendTask task;
  task.batch = task.segments = task.q_rows = task.k_rows = task.kv_heads = task.q_per_kv = 1;
  task.head_dim = 257;
  CHECK_THROWS_AS(operations->attend(*queue, {&task, 1}), InvalidArgument);
  task.head_dim = 64;
  task.k_rows = 0;
  CHECK_THROWS_AS(operations->attend(*queue, {&task, 1}), InvalidArgument);
  kernels::FinishTask finish;
  finish.batch = finish.rows = finish.heads = finish.head_dim = 1;
  finish.partials = kernels::kMaxPartials + 1;
  CHECK_THROWS_AS(operations->finish(*queue, finish), InvalidArgument);
}

TEST_CASE("the measured FMA peak is that of a core", "[backend]") {
  REQUIRE(kernels::cpu::supported());

  const double one = kernels::cpu::fma_peak_gflops(1);

  CHECK(one > 1.0);
  CHECK(one < 1000.0);
}

#if !ANNULUS_ENABLE_CUDA
TEST_CASE("memory that outlives its device ends the process, and memory that does not is freed") {
  // In a process of its own. Returns the signal that ended it, 0 if none did.
  const auto signal_of = [](bool outlives) {
    const pid_t child = fork();
    if (child == 0) {
      signal(SIGABRT, SIG_DFL);
      std::unique_ptr<Device> device = make(BackendKind::cpu);
      Buffer buffer = device->allocate(100, MemoryUse::tensor);
      if (!outlives) { buffer.reset(); }
      device.reset();
      _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  };
  CHECK(signal_of(false) == 0);
  CHECK(signal_of(true) == SIGABRT);
}

TEST_CASE("the cuda backend of a build without CUDA says what there is", "[backend]") {
  CHECK_THROWS_AS(make(BackendKind::cuda), NotCompiled);
}
#endif

}  // namespace
}  // namespace annulus
