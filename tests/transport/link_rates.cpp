// SPDX-License-Identifier: Apache-2.0
// How fast each transport of this build passes the messages of a ring step between GPUs, by itself and while the attention runs, beside a
// bare copy between the same GPUs in the same run. Started on two ranks or more:
//   scripts/launch N annulus_link_rates [--share-gpu] [--repetitions N] [--sizes MIB,MIB,...]
// Every rank sends one message to the next rank and receives one from the rank before. What arrives is compared byte by byte before and
// after it is timed. Exit code 1 if a byte was wrong, 77 without a GPU.
#include <annulus/bench/statistics.hpp>
#include <annulus/core/enums.hpp>
#include <annulus/core/error.hpp>
#include <annulus/device/device.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/gpu/gpu_assignment.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/kernels/dtype.hpp>
#include <annulus/kernels/tasks.hpp>
#include <annulus/transport/gpu_transports.hpp>
#include <annulus/transport/make_transport.hpp>

#include "attention/task_operations.hpp"
#include "device/cuda_access.hpp"
#include "gpu/cuda_handles.hpp"
#include "gpu_test_kernels.hpp"
#include "transport/p2p_transport.hpp"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace annulus {
namespace {

using test::count_wrong_bytes;
using test::fill_pattern;
using test::keep_busy;

constexpr double kTimeoutSeconds = 120.0;
constexpr std::int64_t kMebibyte = std::int64_t{1} << 20;
/// The first steps bring the ranks into step.
constexpr std::int64_t kWarmSteps = 2;
/// A queue without work is held back that long for each step, so that all of them are enqueued before the first one runs.
constexpr std::int64_t kHoldMicroseconds = 250;
constexpr std::uint32_t kSeed = 20260101;

struct Options {
  bool share_gpu = false;
  std::int64_t repetitions = 21;
  std::vector<std::int64_t> sizes_mib{1, 4, 16, 64, 256};
};

std::optional<std::int64_t> positive_integer(std::string_view text, std::int64_t most) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > most) { return std::nullopt; }
  return value;
}

std::optional<std::vector<std::int64_t>> positive_integers(std::string_view text, std::int64_t most) {
  std::vector<std::int64_t> values;
  while (true) {
    const std::size_t comma = text.find(',');
    const auto value = positive_integer(text.substr(0, comma), most);
    if (!value) { return std::nullopt; }
    values.push_back(*value);
    if (comma == std::string_view::npos) { return values; }
    text.remove_prefix(comma + 1);
  }
}

/// Nothing if the command line is not understood.
std::optional<Options> parse(int argc, char** argv) {
  constexpr std::int64_t kMostRepetitions = 200;
  constexpr std::int64_t kMostMebibytes = 8192;
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    if (option == "--share-gpu") {
      options.share_gpu = true;
      continue;
    }
    if (i + 1 == argc) { return std::nullopt; }
    const std::string_view value = argv[++i];
    if (option == "--repetitions") {
      const auto repetitions = positive_integer(value, kMostRepetitions);
      if (!repetitions) { return std::nullopt; }
      options.repetitions = *repetitions;
    } else if (option == "--sizes") {
      const auto sizes = positive_integers(value, kMostMebibytes);
      if (!sizes) { return std::nullopt; }
      options.sizes_mib = *sizes;
    } else {
      return std::nullopt;
    }
  }
  return options;
}

/// A rank's GPU and one queue of it.
struct Gpu {
  explicit Gpu(int device)
      : backend(make_device({.kind = BackendKind::cuda, .threads = 1, .number = device})),
        operations(make_task_operations({}, *backend)),
        queue(backend->make_queue()) {}
  cudaStream_t stream() const { return stream_of(*queue); }

  std::unique_ptr<Device> backend;
  std::unique_ptr<TaskOperations> operations;
  std::unique_ptr<Queue> queue;
};

/// Dense attention in bf16 of as many keys and queries as a ring step of 64 MiB brings, 16 heads of 128.
class Attention {
 public:
  explicit Attention(Gpu& gpu) : gpu_(gpu) {
    // q, k and v are three stretches of the same noise.
    std::mt19937 engine(kSeed);
    std::normal_distribution<float> normal;
    std::vector<std::uint16_t> noise(static_cast<std::size_t>(kElements + 2 * kShift));
    for (std::uint16_t& element : noise) { element = kernels::to_bf16_bits(normal(engine)); }
    constexpr std::int64_t kStats = kRows * kHeads;
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      inputs_[i] = gpu.backend->allocate(kElements * size_of(DType::bf16), MemoryUse::tensor);
      gpu.backend->upload(*gpu.queue, inputs_[i].get(), noise.data() + static_cast<std::int64_t>(i) * kShift, inputs_[i].bytes());
    }
    acc_ = gpu.backend->allocate(kElements * 4, MemoryUse::tensor);
    stats_ = gpu.backend->allocate(2 * kStats * 4, MemoryUse::tensor);
    const kernels::PartialPointers partial{acc_.get(), stats_.get(), stats_.get() + kStats * 4};
    gpu.operations->fill_identity(*gpu.queue, partial, kStats, kHeadDim);

    task_.dtype = DType::bf16;
    task_.batch = 1;
    task_.segments = 1;
    task_.q_rows = kRows;
    task_.k_rows = kRows;
    task_.kv_heads = kHeads;
    task_.q_per_kv = 1;
    task_.head_dim = kHeadDim;
    task_.scale = 1.0 / std::sqrt(static_cast<double>(kHeadDim));
    task_.q = inputs_[0].get();
    task_.k = inputs_[1].get();
    task_.v = inputs_[2].get();
    task_.acc = partial.acc;
    task_.max = partial.max;
    task_.sum = partial.sum;
    task_.q_strides = {kElements, kElements, kHeads * kHeadDim, kHeadDim, kHeadDim};
    task_.kv_strides = task_.q_strides;
    task_.acc_strides = task_.q_strides;
    task_.stat_strides = {kStats, kStats, 1, kRows, kRows};

    // The kernel records what comes back, and plays it from the third call on.
    enqueue(3);
    gpu.queue->synchronize();
  }

  void enqueue(std::int64_t calls) {
    for (std::int64_t call = 0; call < calls; ++call) { gpu_.operations->attend(*gpu_.queue, {&task_, 1}); }
  }
  static std::string describe() { return fmt::format("dense bf16, {0} x {0} rows, {1} heads of {2}", kRows, kHeads, kHeadDim); }

 private:
  static constexpr std::int64_t kRows = 8192;
  static constexpr std::int64_t kHeads = 16;
  static constexpr std::int64_t kHeadDim = 128;
  static constexpr std::int64_t kElements = kRows * kHeads * kHeadDim;
  static constexpr std::int64_t kShift = 999983;

  Gpu& gpu_;
  std::array<Buffer, 3> inputs_;
  Buffer acc_;
  Buffer stats_;
  kernels::AttendTask task_;
};

/// Memory of this rank that the rank before can write, and the same of the next rank, mapped here. Collective.
class NeighbourMemory {
 public:
  NeighbourMemory(const Communicator& comm, Device& backend, std::int64_t bytes) : comm_(comm) {
    std::string own;
    together(comm, [&] {
      // CUDA shares whole blocks of 2 MiB; this allocation has its own.
      constexpr std::int64_t kBlockBytes = 2 * kMebibyte;
      memory_ = backend.allocate((bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes, MemoryUse::slot);
      cudaIpcMemHandle_t handle{};
      ANNULUS_CUDA(cudaIpcGetMemHandle(&handle, memory_.get()));
      own.assign(reinterpret_cast<const char*>(&handle), sizeof(handle));
    });
    const std::vector<std::string> all = comm.all_gather(own);
    together(comm, [&] {
      const std::string& published = all[static_cast<std::size_t>((comm.rank() + 1) % comm.size())];
      cudaIpcMemHandle_t handle{};
      std::memcpy(&handle, published.data(), sizeof(handle));
      next_.emplace(handle);
    });
  }
  NeighbourMemory(const NeighbourMemory&) = delete;
  NeighbourMemory& operator=(const NeighbourMemory&) = delete;
  ~NeighbourMemory() {
    if (std::uncaught_exceptions() > exceptions_at_start_) { return; }
    next_.reset();
    try {
      comm_.barrier();  // memory must not be freed while another rank has it mapped
    } catch (const std::exception& error) { comm_.abort(error.what()); }
  }
  std::byte* own() const { return memory_.get(); }
  std::byte* next() const { return next_->get(); }

 private:
  const Communicator& comm_;
  int exceptions_at_start_ = std::uncaught_exceptions();
  Buffer memory_;
  std::optional<IpcMapping> next_;
};

/// Medians of the slowest rank.
struct StepTimes {
  double transfer_ms = 0;  ///< from where the data could first move
  double complete_ms = 0;  ///< from the post
  double attend_ms = 0;
};

/// Passes messages around the ring and times them. Every function is collective.
class Ring {
 public:
  Ring(const Communicator& comm, Gpu& gpu, const Options& options) : comm_(comm), gpu_(gpu), steps_(options.repetitions + kWarmSteps) {
    together(comm, [&] {
      const std::int64_t most = *std::max_element(options.sizes_mib.begin(), options.sizes_mib.end()) * kMebibyte;
      send_ = gpu.backend->allocate(most, MemoryUse::slot);
      slot_ = gpu.backend->allocate(most, MemoryUse::slot);
      wrong_ = gpu.backend->allocate(sizeof(unsigned long long), MemoryUse::slot);
    });
  }

  /// Announces messages of that size to `transport` for what follows; no bytes end the announcement.
  void announce(Transport& transport, std::int64_t bytes) {
    std::vector<StepMessages> steps;
    if (bytes > 0) {
      steps.assign(static_cast<std::size_t>(steps_ + 1), messages(bytes));
      steps.front() = {};
    }
    transport.prepare(steps);
  }

  /// Passes one message. @returns the wrong bytes on all ranks
  std::int64_t check(Transport& transport, std::int64_t bytes) {
    write_data(slot_.get(), bytes);
    enqueue_step(transport, 1, messages(bytes));
    static_cast<void>(transport.traffic(1));
    return wrong_bytes(slot_.get(), bytes);
  }

  /// Passes messages one after the other. @returns nothing if a byte is wrong in the end
  std::optional<StepTimes> pass_alone(Transport& transport, std::int64_t bytes) {
    write_data(slot_.get(), bytes);
    keep_busy(gpu_.stream(), steps_ * kHoldMicroseconds);
    const StepMessages own = messages(bytes);
    for (std::int64_t step = 1; step <= steps_; ++step) { enqueue_step(transport, step, own); }
    StepTimes times;
    add_traffic(transport, times);
    if (wrong_bytes(slot_.get(), bytes) != 0) { return std::nullopt; }
    return times;
  }

  /// As the attention program does: each message is on its way while the attention before it is computed.
  /// @returns nothing if a byte is wrong in the end
  std::optional<StepTimes> pass_under_work(Transport& transport, std::int64_t bytes, Attention& attention, std::int64_t calls) {
    write_data(slot_.get(), bytes);
    const StepMessages own = messages(bytes);
    std::vector<Stretch> stretches;
    for (std::int64_t step = 1; step <= steps_; ++step) {
      transport.ready(step, *gpu_.queue);
      transport.post(step, own.sends, own.receives);
      stretches.push_back(enqueue_attention(attention, calls));
      transport.wait(step, *gpu_.queue);
    }
    StepTimes times;
    add_traffic(transport, times);
    gpu_.queue->synchronize();
    times.attend_ms = median_of_slowest(stretches);
    if (wrong_bytes(slot_.get(), bytes) != 0) { return std::nullopt; }
    return times;
  }

  /// Milliseconds of that many calls of the attention with nothing else.
  double attend_alone_ms(Attention& attention, std::int64_t calls) {
    comm_.barrier();
    std::vector<Stretch> stretches;
    for (std::int64_t step = 1; step <= steps_; ++step) { stretches.push_back(enqueue_attention(attention, calls)); }
    gpu_.queue->synchronize();
    return median_of_slowest(stretches);
  }

  /// Milliseconds of a copy into the next rank's memory, all ranks at once. @returns nothing if a byte is wrong in the end
  std::optional<double> bare_copy_ms(const NeighbourMemory& memory, std::int64_t bytes) {
    write_data(memory.own(), bytes);
    keep_busy(gpu_.stream(), steps_ * kHoldMicroseconds);
    std::vector<Stretch> stretches;
    for (std::int64_t step = 1; step <= steps_; ++step) {
      Stretch& stretch = stretches.emplace_back();
      stretch.begin = gpu_.backend->record(*gpu_.queue);
      ANNULUS_CUDA(cudaMemcpyAsync(memory.next(), send_.get(), static_cast<std::size_t>(bytes), cudaMemcpyDefault, gpu_.stream()));
      stretch.end = gpu_.backend->record(*gpu_.queue);
    }
    gpu_.queue->synchronize();
    const double ms = median_of_slowest(stretches);
    if (wrong_bytes(memory.own(), bytes) != 0) { return std::nullopt; }
    return ms;
  }

 private:
  struct Stretch {
    std::unique_ptr<Event> begin;
    std::unique_ptr<Event> end;
  };

  std::int64_t next() const { return (comm_.rank() + 1) % comm_.size(); }
  std::int64_t previous() const { return (comm_.rank() + comm_.size() - 1) % comm_.size(); }
  StepMessages messages(std::int64_t bytes) const { return {{{next(), send_.get(), bytes}}, {{previous(), slot_.get(), bytes}}}; }

  /// New data to send, and nothing like it where data is to come; on all ranks before any goes on.
  void write_data(std::byte* target, std::int64_t bytes) {
    ++data_;
    fill_pattern(gpu_.stream(), send_.get(), bytes, pattern_of(comm_.rank()));
    ANNULUS_CUDA(cudaMemsetAsync(target, 0, static_cast<std::size_t>(bytes), gpu_.stream()));
    ANNULUS_CUDA(cudaMemsetAsync(wrong_.get(), 0, sizeof(unsigned long long), gpu_.stream()));
    gpu_.queue->synchronize();
    comm_.barrier();
  }
  /// On all ranks together, and once the writers of all of them are done.
  std::int64_t wrong_bytes(const std::byte* target, std::int64_t bytes) {
    gpu_.queue->synchronize();
    comm_.barrier();
    count_wrong_bytes(gpu_.stream(), target, bytes, pattern_of(previous()), reinterpret_cast<unsigned long long*>(wrong_.get()));
    unsigned long long wrong = 0;
    gpu_.backend->download(*gpu_.queue, &wrong, wrong_.get(), sizeof(wrong));
    gpu_.queue->synchronize();
    return comm_.sum(static_cast<std::int64_t>(wrong));
  }
  std::uint64_t pattern_of(std::int64_t rank) const { return data_ * 100000 + static_cast<std::uint64_t>(rank); }

  void enqueue_step(Transport& transport, std::int64_t step, const StepMessages& own) {
    transport.ready(step, *gpu_.queue);
    transport.post(step, own.sends, own.receives);
    transport.wait(step, *gpu_.queue);
  }
  Stretch enqueue_attention(Attention& attention, std::int64_t calls) {
    Stretch stretch;
    stretch.begin = gpu_.backend->record(*gpu_.queue);
    attention.enqueue(calls);
    stretch.end = gpu_.backend->record(*gpu_.queue);
    return stretch;
  }

  void add_traffic(Transport& transport, StepTimes& times) {
    static_cast<void>(transport.traffic(steps_));
    std::vector<double> transfer_ms;
    std::vector<double> complete_ms;
    for (std::int64_t step = kWarmSteps + 1; step <= steps_; ++step) {
      const StepTraffic traffic = transport.traffic(step);
      transfer_ms.push_back(comm_.max(traffic.end_ms - traffic.begin_ms));
      complete_ms.push_back(comm_.max(traffic.communication_ms));
    }
    times.transfer_ms = median(transfer_ms);
    times.complete_ms = median(complete_ms);
  }
  double median_of_slowest(const std::vector<Stretch>& stretches) const {
    std::vector<double> ms;
    for (std::size_t step = kWarmSteps; step < stretches.size(); ++step) {
      ms.push_back(comm_.max(stretches[step].end->ms_since(*stretches[step].begin)));
    }
    return median(ms);
  }

  const Communicator& comm_;
  Gpu& gpu_;
  std::int64_t steps_;
  std::uint64_t data_ = 0;
  Buffer send_;
  Buffer slot_;
  Buffer wrong_;
};

/// The table; rank 0 prints.
class Report {
 public:
  explicit Report(bool prints) : prints_(prints) {}

  void line(const std::string& text) const {
    if (!prints_) { return; }
    fmt::print("{}\n", text);
    std::fflush(stdout);
  }
  void fail(std::string_view what, std::int64_t size_mib) {
    ++failures_;
    line(fmt::format("FAILED {}, {} MiB: wrong bytes arrived", what, size_mib));
  }
  void header() const {
    line(fmt::format("{:<9} {:>5} {:>10} {:>11} {:>8} {:>13} {:>11} {:>8} {:>13} {:>13} {:>9}", "transport", "MiB", "bare GB/s",
                     "alone GB/s", "of bare", "post-done ms", "work GB/s", "of bare", "attention ms", "with copy ms", "slowdown"));
  }
  void row(TransportKind kind, std::int64_t size_mib, double bare_ms, const StepTimes& alone, const StepTimes& busy,
           double attend_ms) const {
    const auto gbs = [&](double ms) { return static_cast<double>(size_mib * kMebibyte) / ms / 1e6; };
    const auto of_bare = [&](double ms) { return std::isnan(bare_ms) ? std::string("-") : fmt::format("{:.2f}", bare_ms / ms); };
    line(fmt::format("{:<9} {:>5} {:>10} {:>11.1f} {:>8} {:>13.3f} {:>11.1f} {:>8} {:>13.3f} {:>13.3f} {:>9.3f}", to_string(kind), size_mib,
                     std::isnan(bare_ms) ? std::string("-") : fmt::format("{:.1f}", gbs(bare_ms)), gbs(alone.transfer_ms),
                     of_bare(alone.transfer_ms), alone.complete_ms, gbs(busy.transfer_ms), of_bare(busy.transfer_ms), attend_ms,
                     busy.attend_ms, busy.attend_ms / attend_ms));
  }
  int failures() const { return failures_; }

 private:
  bool prints_;
  int failures_ = 0;
};

/// All sizes of one transport. `bare_ms` has the bare copy of each size, NaN where there is none.
void measure_transport(TransportKind kind, Transport& transport, Ring& ring, Attention& attention, std::span<const std::int64_t> sizes_mib,
                       std::span<const double> bare_ms, Report& report) {
  const double call_ms = ring.attend_alone_ms(attention, 1);
  for (std::size_t i = 0; i < sizes_mib.size(); ++i) {
    const std::int64_t bytes = sizes_mib[i] * kMebibyte;
    ring.announce(transport, bytes);
    if (ring.check(transport, bytes) != 0) {
      report.fail(to_string(kind), sizes_mib[i]);
      continue;
    }
    const std::optional<StepTimes> alone = ring.pass_alone(transport, bytes);
    if (!alone) {
      report.fail(fmt::format("{} alone", to_string(kind)), sizes_mib[i]);
      continue;
    }
    // Attention that covers the message with some room, and no more: what a copy costs would not show in a long one.
    constexpr double kRoom = 1.25;
    constexpr double kMostCalls = 64;
    const auto calls = static_cast<std::int64_t>(std::clamp(std::ceil(kRoom * alone->complete_ms / call_ms), 1.0, kMostCalls));
    const double attend_ms = ring.attend_alone_ms(attention, calls);
    const std::optional<StepTimes> busy = ring.pass_under_work(transport, bytes, attention, calls);
    if (!busy) {
      report.fail(fmt::format("{} under work", to_string(kind)), sizes_mib[i]);
      continue;
    }
    report.row(kind, sizes_mib[i], bare_ms[i], *alone, *busy, attend_ms);
  }
  ring.announce(transport, 0);
}

int measure(const Communicator& comm, const Options& options) {
  const int device = assign_gpu(comm, options.share_gpu);
  std::optional<Gpu> gpu;
  std::optional<Attention> attention;
  together(comm, [&] {
    gpu.emplace(device);
    attention.emplace(*gpu);
  });

  Report report(comm.rank() == 0);
  const std::vector<std::string> machines = comm.all_gather(fmt::format("{}: {}", comm.name(), gpu->operations->describe()));
  for (const std::string& machine : machines) { report.line(machine); }
  if (comm.max(ranks_on_gpu(comm, device)) > 1) { report.line("ranks share a GPU: these figures mean nothing"); }
  report.line(fmt::format("every rank sends to the next one; time of the slowest rank, median of {}; attention: {}", options.repetitions,
                          Attention::describe()));

  Ring ring(comm, *gpu, options);
  std::vector<TransportKind> kinds;
  std::vector<double> bare_ms(options.sizes_mib.size(), std::numeric_limits<double>::quiet_NaN());
  const std::string obstacle = p2p_obstacle(comm, *gpu->backend);
  if (obstacle.empty()) {
    kinds.push_back(TransportKind::p2p);
    const NeighbourMemory memory(comm, *gpu->backend, *std::max_element(options.sizes_mib.begin(), options.sizes_mib.end()) * kMebibyte);
    fail_fast(comm, [&] {
      for (std::size_t i = 0; i < bare_ms.size(); ++i) {
        if (const auto ms = ring.bare_copy_ms(memory, options.sizes_mib[i] * kMebibyte)) {
          bare_ms[i] = *ms;
        } else {
          report.fail("bare copy", options.sizes_mib[i]);
        }
      }
    });
  } else {
    report.line("no bare copy and no p2p: " + obstacle);
  }
  if (has_nccl_transport()) { kinds.push_back(TransportKind::nccl); }
  kinds.push_back(TransportKind::mpi);

  report.header();
  for (const TransportKind kind : kinds) {
    const std::unique_ptr<Transport> transport = make_transport(kind, comm, *gpu->backend, options.share_gpu);
    fail_fast(comm, [&] { measure_transport(kind, *transport, ring, *attention, options.sizes_mib, bare_ms, report); });
  }
  report.line(fmt::format("checks: {} failed", report.failures()));
  return static_cast<int>(report.failures() == 0 ? ExitCode::passed : ExitCode::check_failed);
}

int run(int argc, char** argv) {
  constexpr int kSkipped = 77;
  prepare_gpu_connections();
  if (std::any_of(argv, argv + argc, [](const char* argument) { return std::string_view(argument) == "--share-gpu"; })) {
    prepare_gpu_sharing();
  }
  const MpiEnvironment mpi(&argc, &argv);
  const Communicator comm = Communicator::world(kTimeoutSeconds);
  const Report report(comm.rank() == 0);
  const std::optional<Options> options = parse(argc, argv);
  if (!options || comm.size() < 2) {
    report.line("usage: scripts/launch N annulus_link_rates [--share-gpu] [--repetitions N] [--sizes MIB,MIB,...], with N of 2 or more");
    return static_cast<int>(ExitCode::bad_input);
  }
  if (comm.min(visible_gpus().empty() ? 0 : 1) == 0) {
    report.line("skipped: no GPU");
    return kSkipped;
  }
  try {
    return measure(comm, *options);
  } catch (const AgreedError& error) {
    // Every rank is here with the same code; one prints.
    if (error.reporter()) { fmt::print(stderr, "annulus_link_rates: {}\n", error.what()); }
    return static_cast<int>(error.code());
  } catch (const std::exception& error) { comm.abort(error.what()); }
}

}  // namespace
}  // namespace annulus

int main(int argc, char** argv) {
  try {
    return annulus::run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "annulus_link_rates: {}\n", error.what());
    return static_cast<int>(annulus::ExitCode::runtime_failure);
  }
}
