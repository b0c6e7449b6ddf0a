// SPDX-License-Identifier: Apache-2.0
// How backend cuda deals with its device: what waits, what is left behind, and sizes beyond 32 bits.
#include <annulus/device/device.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/kernels/cublas.hpp>
#include <annulus/kernels/cuda.hpp>
#include <annulus_test.hpp>

#include "attention/task_operations.hpp"
#include "device/cuda_access.hpp"
#include "gpu/cuda_clock.hpp"
#include "gpu/cuda_handles.hpp"

#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace annulus;
using kernels::AttendTask;
using kernels::cuda::CublasAttention;
using kernels::cuda::CublasTiling;

namespace {

bool has_gpu() {
  if (!visible_gpus().empty()) { return true; }
  test::skip("no GPU");
  return false;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Work of a stream that lasts until the gate is opened, at the latest after ten seconds; a peer that has gone would never open it.
class Gate {
 public:
  void enqueue(cudaStream_t stream) { ANNULUS_CUDA(cudaLaunchHostFunc(stream, &Gate::stand, this)); }
  void open() { open_ = true; }

 private:
  static void CUDART_CB stand(void* gate) {
    const auto start = std::chrono::steady_clock::now();
    while (!static_cast<Gate*>(gate)->open_ && seconds_since(start) < 10.0) { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }
  }

  std::atomic<bool> open_ = false;
};

/// Device memory that is not the backend's.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::int64_t bytes) {
    void* data = nullptr;
    ANNULUS_CUDA(cudaMalloc(&data, static_cast<std::size_t>(bytes)));
    data_ = static_cast<std::byte*>(data);
    ANNULUS_CUDA(cudaMemset(data, 0, static_cast<std::size_t>(bytes)));
  }
  ~DeviceMemory() { static_cast<void>(cudaFree(data_)); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::byte* get() const { return data_; }

  void put(std::int64_t at, const std::vector<std::uint16_t>& values) {
    ANNULUS_CUDA(cudaMemcpy(data_ + at, values.data(), values.size() * sizeof(std::uint16_t), cudaMemcpyHostToDevice));
  }
  std::vector<float> floats(std::size_t count) const {
    std::vector<float> values(count);
    ANNULUS_CUDA(cudaMemcpy(values.data(), data_, count * sizeof(float), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  std::byte* data_ = nullptr;
};

constexpr std::int64_t kRows = 64;
constexpr std::int64_t kHeadDim = 64;
constexpr std::int64_t kElements = kRows * kHeadDim;

/// Dense attention of kRows x kRows in fp32 whose operands all lie in `memory`: q, k, v, acc, max, sum.
AttendTask small_task(std::byte* memory) {
  auto* numbers = reinterpret_cast<float*>(memory);
  AttendTask task;
  task.batch = task.segments = task.kv_heads = task.q_per_kv = 1;
  task.q_rows = task.k_rows = kRows;
  task.head_dim = kHeadDim;
  task.q = numbers;
  task.k = numbers + kElements;
  task.v = numbers + 2 * kElements;
  task.acc = numbers + 3 * kElements;
  task.max = numbers + 4 * kElements;
  task.sum = numbers + 4 * kElements + kRows;
  task.q_strides.row = task.kv_strides.row = task.acc_strides.row = kHeadDim;
  task.stat_strides.row = 1;
  return task;
}
constexpr std::int64_t kSmallTaskBytes = (4 * kElements + 2 * kRows) * static_cast<std::int64_t>(sizeof(float));

}  // namespace

TEST_CASE("nothing waits for the device while an exception is on its way") {
  if (!has_gpu()) { return; }
  Gate gate;
  const auto start = std::chrono::steady_clock::now();
  double left_after = 0;
  try {
    DeviceOptions options;
    options.kind = BackendKind::cuda;
    const std::unique_ptr<Device> backend = make_device(options);
    const std::unique_ptr<TaskOperations> operations = make_task_operations({}, *backend);
    const std::unique_ptr<Queue> queue = backend->make_queue();
    const Buffer tensors = backend->allocate(kSmallTaskBytes, MemoryUse::tensor);
    const Buffer slot = backend->allocate(1 << 20, MemoryUse::slot);
    const std::vector<AttendTask> tasks{small_task(tensors.get())};
    operations->attend(*queue, tasks);
    queue->synchronize();
    gate.enqueue(stream_of(*queue));
    operations->attend(*queue, tasks);
    left_after = -seconds_since(start);
    throw std::runtime_error("a peer is gone");
  } catch (const std::runtime_error&) { left_after += seconds_since(start); }
  CHECK(left_after < 5.0);
  gate.open();
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

TEST_CASE("a question that is not answered yet leaves no error behind") {
  if (!has_gpu()) { return; }
  ANNULUS_CUDA(cudaSetDevice(0));
  Gate gate;
  const CudaStream stream;
  const CudaEvent event;
  gate.enqueue(stream.get());
  ANNULUS_CUDA(cudaEventRecord(event.get(), stream.get()));
  CHECK_FALSE(is_reached(event.get()));
  CHECK(cudaPeekAtLastError() == cudaSuccess);
  CHECK_FALSE(is_idle(stream.get()));
  CHECK(cudaPeekAtLastError() == cudaSuccess);
  gate.open();
  ANNULUS_CUDA(cudaStreamSynchronize(stream.get()));
  CHECK(is_reached(event.get()));
  CHECK(is_idle(stream.get()));
}

TEST_CASE("a clock reads times in their order, and its stream waits for no event with timing") {
  if (!has_gpu()) { return; }
  ANNULUS_CUDA(cudaSetDevice(0));
  Gate gate;
  const CudaStream stream;
  CudaClock clock;
  CudaMoment before;
  CudaMoment after;
  clock.read(before, stream.get());
  gate.enqueue(stream.get());
  clock.read(after, stream.get());
  ANNULUS_CUDA(cudaEventSynchronize(before.passed()));
  CHECK_FALSE(is_reached(after.passed()));
  CHECK_FALSE(is_idle(clock.behind(stream.get())));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  gate.open();
  CHECK(after.ms_since(before) >= 19.0);
  CHECK(before.ms_since(before) == 0.0);
  ANNULUS_CUDA(cudaStreamSynchronize(clock.behind(stream.get())));
  CHECK(is_idle(stream.get()));
}

TEST_CASE("the number of connections to a GPU is the user's where he has set it") {
  REQUIRE(setenv("CUDA_DEVICE_MAX_CONNECTIONS", "5", 1) == 0);
  prepare_gpu_connections();
  CHECK(std::string_view(std::getenv("CUDA_DEVICE_MAX_CONNECTIONS")) == "5");
  REQUIRE(unsetenv("CUDA_DEVICE_MAX_CONNECTIONS") == 0);
  prepare_gpu_connections();
  CHECK(std::string_view(std::getenv("CUDA_DEVICE_MAX_CONNECTIONS")) == "32");
}

TEST_CASE("a handle that was moved from is empty") {
  if (!has_gpu()) { return; }
  ANNULUS_CUDA(cudaSetDevice(0));
  CudaEvent event;
  CudaEvent other_event;
  event = std::move(other_event);
  CHECK(event.get() != nullptr);
  CHECK(other_event.get() == nullptr);  // NOLINT(bugprone-use-after-move): that is the question
  CudaStream stream;
  CudaStream other_stream;
  stream = std::move(other_stream);
  CHECK(stream.get() != nullptr);
  CHECK(other_stream.get() == nullptr);  // NOLINT(bugprone-use-after-move): that is the question
}

TEST_CASE("what is recorded for a workspace goes with it") {
  if (!has_gpu()) { return; }
  ANNULUS_CUDA(cudaSetDevice(0));
  const CudaStream stream;
  const CublasTiling tiling;
  const std::int64_t bytes = CublasAttention::workspace_bytes(tiling);
  const DeviceMemory memory(kSmallTaskBytes);
  const DeviceMemory kept(bytes);
  const DeviceMemory freed(bytes);
  const std::vector<AttendTask> tasks{small_task(memory.get())};
  CublasAttention attention;
  for (int call = 0; call < 3; ++call) {
    attention.attend(tasks, tiling, kept.get(), bytes, stream.get());
    attention.attend(tasks, tiling, freed.get(), bytes, stream.get());
  }
  REQUIRE(attention.recordings() == 2);
  const std::int64_t launches = attention.graph_launches();
  CHECK(launches > 0);

  attention.forget(freed.get());

  CHECK(attention.recordings() == 1);
  attention.attend(tasks, tiling, kept.get(), bytes, stream.get());
  CHECK(attention.graph_launches() == launches + 1);
  ANNULUS_CUDA(cudaStreamSynchronize(stream.get()));
}

TEST_CASE("rows may lie more than 2^31 elements apart") {
  if (!has_gpu()) { return; }
  ANNULUS_CUDA(cudaSetDevice(0));
  constexpr std::int64_t kFar = (std::int64_t{1} << 31) + 64;
  constexpr std::int64_t kWideBytes = (kFar + kHeadDim) * 2;
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  ANNULUS_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (static_cast<std::int64_t>(free_bytes) < kWideBytes + (std::int64_t{1} << 30)) {
    test::skip("less than 6 GiB of GPU memory are free");
    return;
  }
  std::vector<std::uint16_t> first;
  std::vector<std::uint16_t> second;
  for (std::int64_t d = 0; d < kHeadDim; ++d) {
    first.push_back(kernels::to_bf16_bits(static_cast<float>(d % 7 - 3) / 4.0F));
    second.push_back(kernels::to_bf16_bits(static_cast<float>(d % 5 - 2) / 2.0F));
  }
  const CudaStream stream;
  const CublasTiling tiling;
  const std::int64_t workspace_bytes = CublasAttention::workspace_bytes(tiling);
  const DeviceMemory workspace(workspace_bytes);
  CublasAttention attention(kernels::cuda::Submission::eager);
  // Two rows that are queries, keys and values at once.
  const auto result_with = [&](std::int64_t row_stride) {
    DeviceMemory rows((row_stride + kHeadDim) * 2);
    rows.put(0, first);
    rows.put(row_stride * 2, second);
    const DeviceMemory partial((2 * kHeadDim + 4) * 4);
    AttendTask task;
    task.dtype = DType::bf16;
    task.batch = task.segments = task.kv_heads = task.q_per_kv = 1;
    task.q_rows = task.k_rows = 2;
    task.head_dim = kHeadDim;
    task.scale = 0.125;
    task.q = task.k = task.v = rows.get();
    task.q_strides.row = task.kv_strides.row = row_stride;
    task.acc_strides.row = kHeadDim;
    task.stat_strides.row = 1;
    task.acc = partial.get();
    task.max = partial.get() + 2 * kHeadDim * 4;
    task.sum = partial.get() + (2 * kHeadDim + 2) * 4;
    kernels::cuda::fill_identity({task.acc, task.max, task.sum}, 2, kHeadDim, stream.get());
    attention.attend(std::vector<AttendTask>{task}, tiling, workspace.get(), workspace_bytes, stream.get());
    ANNULUS_CUDA(cudaStreamSynchronize(stream.get()));
    return partial.floats(2 * kHeadDim + 4);
  };

  const std::vector<float> near = result_with(kHeadDim);
  const std::vector<float> far = result_with(kFar);

  CHECK(near[2 * kHeadDim + 2] > 1.0F);  // both keys are in the sum
  for (std::size_t i = 0; i < near.size(); ++i) {
    INFO("number " << i);
    CHECK(std::abs(far[i] - near[i]) <= 1e-5F);
  }
}
